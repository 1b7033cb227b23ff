"""What a method is: data that the plan reads without torch, and a control for each run.

A method knows attention sites, tokens and segments of prompts; no model, no worker, no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, NamedTuple, TypeVar

from bachvid.attention.control import AttentionControl
from bachvid.inputs.choices import MaskWords, MatchWithin
from bachvid.inputs.sections import ResolvedSampling, Section
from bachvid.layout.records import NO_RECORDS, Records

if TYPE_CHECKING:
    from torch import Tensor

    from bachvid.attention.context import RunContext
    from bachvid.catalog.facts import ModelFacts
    from bachvid.kv.cache import MemoryPieces, PieceSink, SceneCache
    from bachvid.methods.ops.injection import InjectedTokens
    from bachvid.methods.ops.masks import ForegroundMask, MaskRecovery
    from bachvid.prompts.tokenizer import TokenizedPrompt

Role = Literal["identity", "frame"]
Overlay = Literal["mask", "match"]


class MethodConfig(Section):
    """The section `method` of a config; every method has its own class of it."""

    name: str


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


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
    keeps: Records = NO_RECORDS

    @property
    def sources(self) -> tuple[int, ...]:
        """The recorded steps that are read, in the order of reading."""
        return tuple(read.source for read in self.reads)


def reads_own(steps: Sequence[int]) -> tuple[Read, ...]:
    """Return reads of each step's own recording."""
    return tuple(Read(step, step) for step in steps)


class Matching(NamedTuple):
    """What is matched between frame and identity video: features of these layers, among whom."""

    layers: tuple[int, ...]
    within: MatchWithin


@dataclass(frozen=True, slots=True)
class Observation:
    """What a run showed of its video.

    `features` are attention outputs [N, C] of each match layer, of this rank's positions, in host
    memory; `recoveries` are those of all masks that the run used, in order. A method that takes no
    mask has no foreground.
    """

    foreground: ForegroundMask | None
    features: Mapping[int, Tensor]
    recoveries: tuple[MaskRecovery, ...] = ()


class RunControl(AttentionControl):
    """A control that can say what it saw and injected; this one looks at nothing."""

    @property
    def observation(self) -> Observation | None:
        """What was seen of the video; None as long as that is not complete."""
        return Observation(None, {})

    @property
    def injected(self) -> InjectedTokens | None:
        """The tokens that saw identity keys; None if the run injected nothing."""
        return None


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What the control of a run is given.

    run: what the method said of it.
    kept: what earlier runs of this video kept, and where this one keeps.
    sink: takes what an identity records; None in a frame video.
    scene: what a frame video reads; None in a run that reads nothing.
    earlier: what the earlier runs of this video saw, in their order.
    """

    run: Run
    context: RunContext
    prompt: TokenizedPrompt
    kept: MemoryPieces
    sink: PieceSink | None = None
    scene: SceneCache | None = None
    earlier: Sequence[Observation] = ()


class Method(Generic[ConfigT]):
    """What is done to the attention of identity and frame videos: one object for a render.

    Everything but `control` is data, and imports no torch. As it stands here, a method that does
    nothing: every video is one run on its own.
    """

    Config: ClassVar[type[MethodConfig]]  # its section of a config, as written

    def __init__(self, config: ConfigT, *, num_steps: int) -> None:
        """Take the section as `resolve` filled it, and the number of steps of the schedule."""
        self.config = config
        self.num_steps = num_steps

    @classmethod
    def resolve(
        cls, config: MethodConfig, facts: ModelFacts, sampling: ResolvedSampling
    ) -> MethodConfig:
        """Fill in what the section leaves out, and check it. Raises ConfigError."""
        return config

    @property
    def records(self) -> Records:
        """What the identity video of a scene leaves to its frame videos."""
        return NO_RECORDS

    @property
    def observed_at(self) -> int | None:
        """The step at which the observation of a video is complete; None: it takes none."""
        return None

    @property
    def matching(self) -> Matching | None:
        """What is matched; None: nothing, and the identity's features are not kept."""
        return None

    @property
    def mask_words(self) -> MaskWords:
        """Which words of a segment stand for it in masks."""
        return "all"

    @property
    def shows(self) -> frozenset[Overlay]:
        """The overlays that its frame videos have; an identity video has no match."""
        return frozenset()

    @property
    def lines(self) -> Mapping[str, str]:
        """What a plan says of it, by a label."""
        return {"method": self.config.name}

    def notes(self, facts: ModelFacts) -> Sequence[str]:
        """Return what a user must know of this method on this model."""
        return ()

    def runs(self, role: Role) -> tuple[Run, ...]:
        """Return the runs of a video in this role, in order: the last one is the video.

        An identity has one, whole, run; where it is run again for its readers is the plan's.
        """
        records = self.records.steps if role == "identity" else ()
        return (Run(tuple(range(self.num_steps)), records=records),)

    def control(self, role: Role, number: int, given: RunInputs) -> RunControl:
        """Return the control of run `number`. Raises CacheMissError or LayoutError."""
        return RunControl()
