"""The named choices of config keys. No torch."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
SchedulerName = Literal["ddim", "dpm", "unipc", "euler"]
Branches = Literal["both", "cond"]
MaskSoftmax = Literal["joint", "text"]
MaskWords = Literal["all", "nouns"]
MatchWithin = Literal["video", "foreground"]
PrePassInjection = Literal["background", "none"]
ProfileName = Literal["paper", "fast"]
CachePolicy = Literal["auto", "window", "retain"]
Policy = Literal["window", "retain"]  # what `auto` resolves to
Offload = Literal["none", "model"]
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
