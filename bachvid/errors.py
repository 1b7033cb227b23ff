"""The errors that bachvid raises on purpose.

Each takes one string: an error crosses process boundaries, and an exception with other
constructor arguments does not unpickle. The message says where, what, the rule and the way out.
"""

from __future__ import annotations


class BachvidError(Exception):
    """Something that bachvid refuses or could not do, in words for the person who asked."""


class ConfigError(BachvidError, ValueError):
    """A story or a config that cannot be rendered as written."""


class LayoutError(BachvidError, ValueError):
    """Tensors or caches of two videos that do not have the same token layout."""


class CacheMissError(BachvidError, LookupError):
    """Identity keys and values that were never recorded, or are gone."""


class CorruptShardError(CacheMissError):
    """Identity keys and values whose bytes are no longer those that were recorded."""


class LostShardError(CacheMissError):
    """Identity keys and values that were published, and whose node or owner is gone since."""


class WorkerError(BachvidError, RuntimeError):
    """A worker that failed while rendering."""


class ModelSupportError(BachvidError, ValueError):
    """A model, or a combination of model and method, that bachvid cannot run."""
