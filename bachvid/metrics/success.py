"""Success: was the video rendered, and did the method need a recovery for it?"""

from __future__ import annotations

from bachvid.output.journal import VideoRecord


def success(record: VideoRecord | None) -> dict[str, float]:
    """Return `rendered` and `recovered` as 1.0 or 0.0; a missing record is a failed video."""
    return {
        "rendered": float(record is not None),
        "recovered": float(record is not None and bool(record.recoveries)),
    }
