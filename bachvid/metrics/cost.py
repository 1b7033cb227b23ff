"""Cost: the seconds that a video took and the bytes of the identity cache it read."""

from __future__ import annotations

from bachvid.output.journal import VideoRecord


def cost(record: VideoRecord) -> dict[str, float]:
    """Return `seconds` of wall clock and `cache_mebibytes` of keys and values."""
    return {
        "seconds": sum(record.seconds.values()),
        "cache_mebibytes": record.cache_bytes / 2**20,
    }
