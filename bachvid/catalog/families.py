"""What the models of one family have in common. Data only: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bachvid.inputs.choices import SchedulerName
from bachvid.layout.gangs import Branch

Family = Literal["cogvideox", "wan"]


@dataclass(frozen=True, slots=True)
class FamilyFacts:
    """One family.

    `passes` are the forwards of one guided step, in their order, by the CFG branches that share
    one. `has_joint_text`: text tokens stand in the video's own attention, not in one beside it.
    """

    pipeline: str  # the diffusers class
    schedulers: tuple[SchedulerName, ...]
    passes: tuple[tuple[Branch, ...], ...]
    has_joint_text: bool
    size_step: int  # the stock pipeline refuses sizes in pixels that this does not divide
    cleans_text: bool  # the stock pipeline unescapes HTML in prompts


FAMILIES: Mapping[Family, FamilyFacts] = {
    "cogvideox": FamilyFacts(
        pipeline="CogVideoXPipeline",
        schedulers=("ddim", "dpm"),
        passes=(("uncond", "cond"),),
        has_joint_text=True,
        size_step=8,
        cleans_text=False,
    ),
    "wan": FamilyFacts(
        pipeline="WanPipeline",
        schedulers=("unipc", "euler"),
        passes=(("cond",), ("uncond",)),
        has_joint_text=False,
        size_step=16,
        cleans_text=True,
    ),
}
