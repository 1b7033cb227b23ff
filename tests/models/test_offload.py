"""model.offload: parts that take turns on the device give what they give when all stay there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.catalog.registry import load_facts
from bachvid.engine.sampling import denoise
from bachvid.inputs.config import ModelConfig, RenderConfig
from bachvid.models.base import VideoModel
from bachvid.models.registry import load_model
from bachvid.planning.resolve import config_hash, resolve_config
from bachvid.prompts.compose import Prompt

PROMPT = Prompt("a red robot, a sunny beach, walks")


def load(folder: Path, offload: str) -> tuple[VideoModel, RenderConfig]:
    config = ModelConfig(id=str(folder), device="cpu", offload=offload)
    facts = load_facts(config)
    sizes = ("video.pixel_frames=5", "video.height=32", "video.width=32", "sampling.num_steps=2")
    resolved = resolve_config(RenderConfig.from_yaml(None, sizes), facts)
    resolved = resolved.model_copy(update={"model": config})
    return load_model(config, facts), resolved


def render(model: VideoModel, config: RenderConfig) -> tuple[Tensor, Tensor]:
    """Encode, denoise, decode, and encode again: each part is used after the others."""
    embeds_PTC = model.encode_prompts([PROMPT, Prompt("")])
    model.free_text_encoder()
    run = RunContext(model.layout(config.video), model.rotary(config.video))
    steps = denoise(
        model,
        run,
        prompt_embeds=embeds_PTC[:1],
        negative_embeds=embeds_PTC[1:],
        noise=model.initial_noise(7, config.video),
        noise_seed=7,
        sampling=config.sampling,
    )
    latents = [done.latents for done in steps][-1]
    frames = torch.from_numpy(model.decode(latents))
    assert torch.equal(model.encode_prompts([PROMPT]), embeds_PTC[:1])
    return latents, frames


@pytest.mark.parametrize("fixture", ["tiny_cogvideox_folder", "tiny_wan_folder"])
def test_offload_changes_no_bit(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    plain, config = load(folder, "none")
    assert not hasattr(plain.transformer, "_hf_hook")
    offloaded, other_config = load(folder, "model")
    for expected, found in zip(render(plain, config), render(offloaded, other_config), strict=True):
        assert torch.equal(found, expected)
    # Accelerate's hooks are there, and each part sends the other away.
    transformer, vae = offloaded.transformer, offloaded.vae
    assert transformer._hf_hook.prev_module_hook.model is vae
    assert vae._hf_hook.prev_module_hook.model is transformer
    assert config_hash(config) == config_hash(other_config)
