"""The errors that bachvid raises on purpose.

Each takes one string: an error crosses process boundaries, and an exception with other
constructor arguments does not unpickle. The message says where, what, the rule and the way out.
"""

from __future__ import annotations


class BachvidError(Exception):
    """Base of all errors meant for the user: what failed, why, and what to do."""


class ConfigError(BachvidError, ValueError):
    """A story or a config that cannot be rendered as written."""


class LayoutError(BachvidError, ValueError):
    """Tensors or caches of two videos whose token layouts differ."""


class CacheMissError(BachvidError, LookupError):
    """Recorded pieces of an identity video that are missing."""


class CorruptShardError(CacheMissError):
    """Recorded pieces whose bytes have changed since."""


class LostShardError(CacheMissError):
    """Published pieces whose node or owner has died."""


class WorkerError(BachvidError, RuntimeError):
    """A worker that failed while rendering."""


class ModelSupportError(BachvidError, ValueError):
    """A model, or a combination of model and method, that bachvid cannot run."""
