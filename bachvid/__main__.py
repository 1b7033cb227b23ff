"""`python -m bachvid`: the command line, as `ray job submit` starts it."""

from __future__ import annotations

from bachvid.cli.main import main

if __name__ == "__main__":
    main()
