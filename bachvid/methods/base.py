"""The interface of a method: data that the plan reads without torch, and a control for each run.

A method deals with attention sites, tokens and prompt segments; not with models, workers or Ray.
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
    """The section `method` of a config; each method has its own subclass."""

    name: str


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Read(NamedTuple):
    """A step of a run, and the recorded step that is read there: the same one, or another."""

    step: int
    source: int


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over one video.

    steps: ascending. From `noise` they are 0, 1, 2, ...; a run that ends before the last step of
        the schedule yields only what its control observed.
    start: `noise` is denoised; `source` replays a finished video, noised to each step.
    reads: steps of the scene's identity video, in reading order.
    records: the steps whose pieces go to the readers of the scene; of identity videos only.
    keeps: pieces for later runs of the same video, in host memory.
    """

    steps: tuple[int, ...]
    start: Literal["noise", "source"] = "noise"
    reads: tuple[Read, ...] = ()
    records: tuple[int, ...] = ()
    keeps: Records = NO_RECORDS

    @property
    def sources(self) -> tuple[int, ...]:
        """The recorded steps that are read, in reading order."""
        return tuple(read.source for read in self.reads)


def reads_own(steps: Sequence[int]) -> tuple[Read, ...]:
    """Return the reads of steps that each read the recorded step of the same number."""
    return tuple(Read(step, step) for step in steps)


class Matching(NamedTuple):
    """How frame and identity tokens are matched: by which layers, among which tokens."""

    layers: tuple[int, ...]
    within: MatchWithin


@dataclass(frozen=True, slots=True)
class Observation:
    """What a run found out about its video.

    `features` are the attention outputs [N, C] of each match layer, at this rank's positions, in
    host memory; `recoveries` are those of all masks that the run used, in order. `foreground` is
    None if the method uses no mask.
    """

    foreground: ForegroundMask | None
    features: Mapping[int, Tensor]
    recoveries: tuple[MaskRecovery, ...] = ()


class RunControl(AttentionControl):
    """A control that reports what it observed and injected. The base class does neither."""

    @property
    def observation(self) -> Observation | None:
        """What was observed of the video; None until that is complete."""
        return Observation(None, {})

    @property
    def injected(self) -> InjectedTokens | None:
        """The tokens that attended to identity keys; None if the run injected nothing."""
        return None


@dataclass(frozen=True, slots=True)
class RunInputs:
    """The inputs from which the control of a run is built.

    run: the run, as `Method.runs` returned it.
    kept: stores what this run keeps, and has what earlier runs of this video kept.
    sink: stores what an identity video records; None in a frame video.
    scene: what a frame video reads; None in a run that reads nothing.
    earlier: the observations of this video's earlier runs, in order.
    """

    run: Run
    context: RunContext
    prompt: TokenizedPrompt
    kept: MemoryPieces
    sink: PieceSink | None = None
    scene: SceneCache | None = None
    earlier: Sequence[Observation] = ()


class Method(Generic[ConfigT]):
    """What is done to the attention of identity and frame videos: one object per render.

    Everything except `control` is data and imports no torch. The base class does nothing: every
    video is a single run, independent of the others.
    """

    Config: ClassVar[type[MethodConfig]]  # its section of a config, as written

    def __init__(self, config: ConfigT, *, num_steps: int) -> None:
        """Take the section that `resolve` returned, and the number of steps of the schedule."""
        self.config = config
        self.num_steps = num_steps

    @classmethod
    def resolve(
        cls, config: MethodConfig, facts: ModelFacts, sampling: ResolvedSampling
    ) -> MethodConfig:
        """Fill in the keys that the section leaves out, and check it. Raises ConfigError."""
        return config

    @property
    def records(self) -> Records:
        """The pieces that an identity video records for its frame videos."""
        return NO_RECORDS

    @property
    def observed_at(self) -> int | None:
        """The step at which the observation of a video is complete; None if it makes none."""
        return None

    @property
    def matching(self) -> Matching | None:
        """What is matched; None if nothing is, and then no identity features are kept."""
        return None

    @property
    def mask_words(self) -> MaskWords:
        """The words of a segment whose attention makes its mask."""
        return "all"

    @property
    def shows(self) -> frozenset[Overlay]:
        """The overlays that frame videos have; an identity video has no match."""
        return frozenset()

    @property
    def lines(self) -> Mapping[str, str]:
        """Lines that describe the method in a plan, by label."""
        return {"method": self.config.name}

    def notes(self, facts: ModelFacts) -> Sequence[str]:
        """Return notes that a user should know about this method on this model."""
        return ()

    def runs(self, role: Role) -> tuple[Run, ...]:
        """Return the runs of a video in this role, in order; the last one makes the video.

        An identity video has one complete run; the plan may repeat it for its readers.
        """
        records = self.records.steps if role == "identity" else ()
        return (Run(tuple(range(self.num_steps)), records=records),)

    def control(self, role: Role, number: int, given: RunInputs) -> RunControl:
        """Return the control of run `number`. Raises CacheMissError or LayoutError."""
        return RunControl()
