"""`python -m bachvid`: the command line without the installed script, as `ray job submit` runs it."""

from __future__ import annotations

from bachvid.cli import main

if __name__ == "__main__":
    main()
