"""The adapter of a family: CogVideoX's classes, and embeddings of half the size."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
)
from torch import Tensor
from transformers import T5EncoderModel

from bachvid.attention.groups import SequenceGroup
from bachvid.catalog.facts import ModelFacts
from bachvid.inputs.sections import ModelConfig
from bachvid.models.cogvideox import CogVideoXModel
from bachvid.models.loading import load_adapter


class ToyModel(CogVideoXModel):
    """What differs from the family that it is like."""

    def _embed(self, encoder: T5EncoderModel, ids_1T: Tensor, num_tokens: int) -> Tensor:
        return super()._embed(encoder, ids_1T, num_tokens) / 2


def load_toy(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> ToyModel:
    """Load the adapter. Raises as `load_adapter` does."""
    return load_adapter(
        ToyModel,
        config,
        facts,
        group,
        classes={
            "transformer": (CogVideoXTransformer3DModel,),
            "vae": (AutoencoderKLCogVideoX,),
            "text_encoder": (T5EncoderModel,),
            "scheduler": (CogVideoXDDIMScheduler,),
        },
    )
