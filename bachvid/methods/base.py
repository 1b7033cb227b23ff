"""What a method is: data that the plan reads without torch, and a control for each run.

A method knows attention sites, tokens and segments of prompts; no model, no worker, no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from bachvid.attention.control import AttentionControl
from bachvid.layout.records import Records

if TYPE_CHECKING:
    from torch import Tensor

    from bachvid.attention.context import RunContext
    from bachvid.kv.cache import MemoryPieces, PieceSink, SceneCache
    from bachvid.methods.ops.injection import InjectedTokens
    from bachvid.methods.ops.masks import ForegroundMask, MaskRecovery
    from bachvid.prompts.tokenizer import TokenizedPrompt

Role = Literal["identity", "frame"]
Overlay = Literal["mask", "match"]


class Read(NamedTuple):
    """A step of a run, and the recorded step that it reads there: its own, or another one."""

    step: int
    source: int


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over one video.

    steps: rising. From `noise` they begin with 0 and leave none out; a run that ends before the
        last step of the schedule is thrown away, but for what its control saw.
    start: `noise` is denoised; a `source` is replayed: a finished video, noised to each step.
    reads: of what the identity of the scene recorded, in the order of reading.
    records: the steps whose pieces go to the readers of the scene, of an identity.
    keeps: pieces for later runs of the same video, in host memory.
    """

    steps: tuple[int, ...]
    start: Literal["noise", "source"] = "noise"
    reads: tuple[Read, ...] = ()
    records: tuple[int, ...] = ()
    keeps: Records = Records()

    @property
    def sources(self) -> tuple[int, ...]:
        """The recorded steps that are read, in the order of reading."""
        return tuple(read.source for read in self.reads)


@dataclass(frozen=True, slots=True)
class Observation:
    """What a run showed of its video.

    `features` are attention outputs [N, C] of each match layer, of this rank's positions, in host
    memory; `recoveries` are those of all masks that the run used, in order. A method that takes no
    mask has no foreground.
    """

    foreground: ForegroundMask | None = None
    features: Mapping[int, Tensor] | None = None
    recoveries: tuple[MaskRecovery, ...] = ()


class RunControl(AttentionControl):
    """A control that can say what it saw and injected; this one saw nothing."""

    @property
    def observation(self) -> Observation | None:
        """What was seen of the video; None as long as that is not complete."""
        return Observation()

    @property
    def injected(self) -> InjectedTokens | None:
        """The tokens that saw identity keys; None if the run injected nothing."""
        return None


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What the control of a run is given.

    run: what the method said of it.
    sink: takes what an identity records; `scene` is what a frame video reads. A run that neither
        records nor reads has none.
    kept: what earlier runs of this video kept, and where this one keeps.
    earlier: what the earlier runs of this video saw, in their order.
    """

    run: Run
    context: RunContext
    prompt: TokenizedPrompt
    kept: MemoryPieces
    sink: PieceSink | None = None
    scene: SceneCache | None = None
    earlier: Sequence[Observation] = ()


class Method(Protocol):
    """What is done to the attention of identity and frame videos: one object for a render.

    Everything but `control` is data, and imports no torch.
    """

    @property
    def records(self) -> Records:
        """What the identity video of a scene leaves to its frame videos."""

    @property
    def shows(self) -> frozenset[Overlay]:
        """The overlays that its frame videos have; an identity video has no match."""

    @property
    def match_layers(self) -> tuple[int, ...]:
        """The layers whose features a frame video needs of its identity; () if none."""

    def runs(self, role: Role) -> tuple[Run, ...]:
        """Return the runs of a video in this role, in order: the last one is the video."""

    def control(self, role: Role, number: int, given: RunInputs) -> RunControl:
        """Return the control of run `number`. Raises CacheMissError or LayoutError."""
