"""A method in one file, as `docs/add-a-method.md` has it: values drawn towards the identity's.

Importing it registers it, and the toy family: what unpickles its config in a worker knows both.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bachvid.attention.control import QKV
from bachvid.catalog.registry import FAMILIES
from bachvid.kv.cache import Shard
from bachvid.layout.records import AttentionSite, Records, RecordSet
from bachvid.methods.base import Method, MethodConfig, Role, Run, RunControl, RunInputs, reads_own
from bachvid.methods.registry import METHODS
from bachvid.models.registry import ADAPTERS


class ToyConfig(MethodConfig):
    """How far the values of a frame video are drawn, in the first steps."""

    name: Literal["toy"] = "toy"
    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    steps: Annotated[int, Field(ge=1)] = 1


class ToyMethod(Method[ToyConfig]):
    """Blends the values of two layers with those of the identity, token by token."""

    Config = ToyConfig

    @property
    def records(self) -> Records:
        return Records((RecordSet(("value",), (0, 1), tuple(range(self.config.steps)), ("cond",)),))

    def runs(self, role: Role) -> tuple[Run, ...]:
        if role == "identity":
            return super().runs(role)
        return (Run(tuple(range(self.num_steps)), reads=reads_own(self.records.steps)),)

    def control(self, role: Role, number: int, given: RunInputs) -> RunControl:
        return Recorder(given, self) if role == "identity" else Blender(given, self)


class Recorder(RunControl):
    """Records the values of the video rows."""

    def __init__(self, given: RunInputs, method: ToyMethod) -> None:
        self.given, self.records = given, method.records

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        if site.step in self.given.run.records and self.records.kinds(site):
            rows = self.given.context.layout.video_rows
            assert self.given.sink is not None
            self.given.sink.put(Shard(site, {"value": qkv.value_BSHD[:, rows].clone()}))
        return qkv


class Blender(RunControl):
    """Draws the values of the video rows towards what was recorded."""

    def __init__(self, given: RunInputs, method: ToyMethod) -> None:
        self.given, self.method = given, method

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        if not self.method.records.kinds(site):
            return qkv
        assert self.given.scene is not None
        value_BSHD, rows = qkv.value_BSHD.clone(), self.given.context.layout.video_rows
        theirs_BMHD = self.given.scene.source.get(site).pieces["value"].to(value_BSHD.device)
        value_BSHD[:, rows] = value_BSHD[:, rows].lerp(theirs_BMHD, self.method.config.strength)
        return qkv._replace(value_BSHD=value_BSHD)


LINES = (
    (METHODS, "toy_method:ToyMethod"),
    (FAMILIES, "toy_catalog"),
    (ADAPTERS, "toy_model:load_toy"),
)


def register() -> None:
    for registry, line in LINES:
        registry["toy"] = line


def unregister() -> None:
    for registry, _ in LINES:
        registry.pop("toy", None)


register()
