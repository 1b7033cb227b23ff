"""The facts of a family, as `docs/add-a-model.md` has it: a CogVideoX by another name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bachvid.catalog import cogvideox
from bachvid.catalog.facts import Family, ModelFacts

TRAITS = replace(cogvideox.TRAITS, name="toy", pipeline="ToyPipeline", schedulers=("ddim",))


def _read(folder: Path, name: str) -> ModelFacts:
    return replace(cogvideox.FAMILY.read(folder, name), traits=TRAITS)


FAMILY = Family(TRAITS, _read, {})
