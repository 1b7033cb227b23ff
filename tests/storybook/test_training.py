"""Training: deterministic, resumable, and what it folds into weights changes no picture."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from bachvid.storybook import model as storybook
from bachvid.storybook import wan
from bachvid.storybook.judge import QUESTIONS, JudgeNetwork
from bachvid.storybook.train import wan as train_wan
from bachvid.storybook.train.__main__ import main
from bachvid.storybook.train.common import (
    Clips,
    Settings,
    Trainer,
    render_clips,
    to_video,
    warm_then_decay,
)
from bachvid.storybook.train.judge import measure_judge, train_judge
from bachvid.storybook.train.transformer import (
    Latents,
    Prompts,
    TextToVideo,
    cogvideox_noised,
    encode_clips,
    pool_to_tokens,
    swapped_losses,
    train_transformer,
)
from bachvid.storybook.train.vae import fold_latent_statistics, train_vae


def settings_in(work: Path) -> Settings:
    return Settings(work, "cpu", minutes=5, seed=0)


def train_line(work: Path, steps: int) -> dict[str, Tensor]:
    """Fit a line, in as many calls as the trainer's checkpoint in `work` leaves to do."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    trainer = Trainer(settings_in(work), "line", module, [torch.optim.AdamW(module.parameters())])

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(4, 3, generator=generator)
        return {"loss": (module(x) - x.sum(1, keepdim=True)).square().mean()}

    done = trainer.run(loss_at, steps=steps, rate_at=lambda step: 1.0, average_decay=0.9)
    assert done
    return {**module.state_dict(), **{f"average {k}": v for k, v in trainer.average.items()}}


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train_line(tmp_path / "whole", 20)
    train_line(tmp_path / "parts", 7)
    parts = train_line(tmp_path / "parts", 20)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)


def test_the_rate_warms_up_stays_and_decays() -> None:
    rates = [warm_then_decay(step, warm=10, steps=100, decay_steps=40) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9:61] == [1.0] * 52
    assert 0.02 < rates[-1] < 0.05


def test_folding_the_statistics_leaves_the_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = storybook.build_vae().eval()
    video = to_video(render_clips(0, 4, "varied", workers=1).frames)
    with torch.no_grad():
        latent = vae.encode(video).latent_dist.mean
        mean, deviation = latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4))
        before = vae.decode(latent).sample
        fold_latent_statistics(vae, video)
        folded = vae.encode(video).latent_dist.mean
        after = vae.decode(folded).sample
    torch.testing.assert_close(folded.mean((0, 2, 3, 4)), torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(folded.std((0, 2, 3, 4)), torch.ones_like(deviation))
    # Zero padding of the decoder's first convolution means another latent than before: borders
    # differ, the middle does not but for the reach of group norms over the whole frame.
    inner = (slice(None), slice(None), slice(None), slice(16, 32), slice(16, 32))
    assert (after - before)[inner].abs().mean() < 0.1 * before[inner].abs().mean()


def test_tokens_pool_the_pixels_that_they_show() -> None:
    mask = torch.zeros(1, 5, 48, 48, dtype=torch.bool)
    mask[0, 0, :4, :4] = True  # all of the first token
    mask[0, 3, 44:, 44:] = True  # half of the last token: one of its two frames
    pooled = pool_to_tokens(mask)
    assert pooled.shape == (1, 3, 12, 12)
    assert pooled[0, 0, 0, 0] == 1
    assert pooled[0, 2, 11, 11] == 0.5
    assert pooled.sum() == 1.5


def test_prompts_know_their_parts() -> None:
    ids, spans = Prompts().encode((5, 0, 3))
    assert ids.shape == (storybook.TEXT_TOKENS,)
    assert spans.sum(1).tolist() == [6, 6]  # "a rocky coast ...", "a girl in a yellow dress"
    assert not (spans[0] & spans[1]).any()
    ids, spans = Prompts().encode((-1, -1, -1))
    assert spans.sum() == 0
    assert ids[0] == 1  # </s>, then padding


def train_cogvideox(latents: Latents, settings: Settings, steps: int) -> bool:
    return train_transformer(
        "transformer",
        TextToVideo(),
        cogvideox_noised,
        Prompts(),
        lambda step: latents,
        settings,
        steps=steps,
        decay_steps=1,
    )


def test_prompts_may_leave_words_unmarked() -> None:
    _, spans = Prompts(only_nouns=True).encode((5, 0, 3))
    assert spans.sum(1).tolist() == [3, 3]  # rocky coast lighthouse; girl yellow dress


def test_the_wan_family_learns_the_same_latents_and_prompts(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    clips = render_clips(0, 4, "varied", workers=1)
    latents = encode_clips(storybook.build_vae(), clips, "cpu")
    assert train_wan.train_vae(clips, latents.latent, settings, steps=2)
    vae = wan.build_vae()
    assert vae.decode(latents.latent[:1].transpose(1, 2)).sample.shape == (1, 3, 5, 48, 48)
    before = train_wan.WanTextToVideo().state_dict()
    with torch.compiler.set_stance("force_eager"):
        assert train_transformer(
            "transformer-wan",
            train_wan.WanTextToVideo(),
            train_wan.flow,
            Prompts(only_nouns=True),
            lambda step: latents,
            settings,
            steps=2,
            decay_steps=1,
        )
    trained = torch.load(tmp_path / "transformer-wan.pt", weights_only=True)["module"]
    assert any((trained[name] != before[name]).any() for name in before)


def test_padding_of_a_prompt_changes_nothing_in_the_wan_family() -> None:
    model = train_wan.WanTextToVideo().eval()
    ids, _ = Prompts().encode((0, 0, 0))
    with torch.no_grad():
        text = model.encode(ids[None])
        longer = model.encode(torch.cat([ids, torch.zeros(5, dtype=torch.int64)])[None])
    torch.testing.assert_close(longer[:, : len(ids)], text)
    assert not longer[:, int((ids != 0).sum()) :].any()


def test_flow_goes_straight_from_the_clip_to_the_noise() -> None:
    clean, noise = torch.zeros(2, 1, 1, 1, 1), torch.ones(2, 1, 1, 1, 1)
    noisy, target = train_wan.flow(clean, torch.tensor([250, 1000]), noise)
    assert noisy.flatten().tolist() == [0.25, 1.0]
    assert target.flatten().tolist() == [1.0, 1.0]


def test_every_stage_trains_on_two_clips(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    clips = render_clips(0, 4, "varied", workers=1)
    assert train_vae(clips, settings, steps=2)
    vae = storybook.build_vae()
    latents = encode_clips(vae, clips, "cpu")
    assert isinstance(latents, Latents)
    assert latents.latent.shape == (4, 3, storybook.LATENT_CHANNELS, 12, 12)
    before = TextToVideo().state_dict()
    rises = swapped_losses(TextToVideo(), latents, Prompts(), cogvideox_noised, "cpu")
    assert rises["right"] > 0
    assert rises["action"] == 0  # untrained: nothing comes out yet, whatever the prompt
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than the test
        assert train_cogvideox(latents, settings, steps=2)
    trained = torch.load(tmp_path / "transformer.pt", weights_only=True)["module"]
    assert any((trained[name] != before[name]).any() for name in before)
    few = Clips(clips.frames, clips.mask, clips.labels)
    assert train_judge(clips, few, settings, steps=2)
    accuracy = measure_judge(JudgeNetwork(), clips, 0)
    assert accuracy.keys() == {*QUESTIONS, "mask_iou"}


def test_shipped_weights_can_be_trained_on(tmp_path: Path) -> None:
    begin = CliRunner().invoke(main, ["--work", str(tmp_path), "shipped"])
    assert begin.exit_code == 0, begin.output
    states = {
        stage: torch.load(tmp_path / f"{stage}.pt", weights_only=True)["average"]
        for stage in ("vae", "transformer")
    }
    shipped = {
        folder: load_file(storybook.WEIGHTS / folder / f"{name}.safetensors")
        for folder, name in (
            ("vae", "diffusion_pytorch_model"),
            ("transformer", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        )
    }
    assert set(states["vae"]) == set(shipped["vae"])
    for name, weight in shipped["vae"].items():
        assert torch.equal(states["vae"][name].half(), weight)
    for part in ("transformer", "text_encoder"):
        for name, weight in shipped[part].items():
            assert torch.equal(states["transformer"][f"{part}.{name}"].half(), weight)

    settings = settings_in(tmp_path)
    latents = encode_clips(storybook.build_vae(), render_clips(0, 4, "varied", workers=1), "cpu")
    with torch.compiler.set_stance("force_eager"):
        assert train_cogvideox(latents, settings, steps=1)
    again = CliRunner().invoke(main, ["--work", str(tmp_path), "shipped"])
    assert (again.exit_code, again.output) == (
        1,
        f"Error: {tmp_path}/vae.pt exists: give a new folder as --work\n",
    )
