"""The runs of a frame video, and the steps that each of them reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from bachvid.inputs.config import MethodConfig


def read_steps(method: MethodConfig) -> tuple[tuple[int, ...], ...]:
    """Give, for every run of a frame video, the steps whose identity keys and values it reads.

    `method` is resolved. The last run is the main run; those before it are pre-passes.
    """
    if method.name == "none":
        return ((),)
    assert method.inject_steps is not None
    assert method.mask_step is not None
    assert method.pre_passes is not None
    injected = tuple(range(*method.inject_steps))
    first = tuple(range(1, method.mask_step + 1))  # by the mask of the step before
    repeated = tuple(step for step in injected if step <= method.mask_step)
    return (
        first if method.pre_pass_injection == "background" else (),
        *[repeated] * (method.pre_passes - 1),
        injected,
    )


def recorded_steps(method: MethodConfig) -> tuple[int, ...]:
    """Return the steps of the identity video whose keys and values some run reads."""
    return tuple(sorted({step for steps in read_steps(method) for step in steps}))
