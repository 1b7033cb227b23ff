"""Train the storybook model: `python -m bachvid.storybook.train --work DIR STAGE`.

Stages, in order: `clips` (render the world once), `vae`, `latents` (encode it once), `transformer`
(with the text encoder), `judge`, `export`. Each goes on from its last checkpoint in DIR, logs to
DIR/log.jsonl, and depends only on its seed and its number of steps, not on the clock; `--minutes`
ends a call early, at a checkpoint. `shipped` makes first checkpoints of the weights in the package,
to train them on: then `latents` and `transformer` follow `clips`.

With `--family wan` a stage is that of the second embedded model. It shares the clips, and the
latents of the first model's autoencoder, which its own learns: its stages, `vae` and `transformer`,
follow `latents`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal, get_args

import click
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_model, save_model
from torch import nn

from bachvid.storybook import model as storybook
from bachvid.storybook import wan
from bachvid.storybook.judge import WEIGHTS, JudgeNetwork
from bachvid.storybook.train import wan as train_wan
from bachvid.storybook.train.common import Clips, Settings, render_clips
from bachvid.storybook.train.judge import measure_judge, train_judge
from bachvid.storybook.train.transformer import (
    Latents,
    Prompts,
    TextToVideo,
    Trainee,
    cogvideox_noised,
    encode_clips,
    train_transformer,
)
from bachvid.storybook.train.vae import reconstruct, train_decoder, train_vae
from bachvid.storybook.train.wan import WanTextToVideo, flow
from bachvid.storybook.world import Difficulty

_DECODED = 4_000  # clips that the judge sees as the autoencoder gives them back
_HELD_OUT_SEED = 10_000_000


Family = Literal["cogvideox", "wan"]
_of_family = click.option(
    "--family", type=click.Choice(get_args(Family)), default="cogvideox", show_default=True
)


def _text_to_video(family: Family) -> Trainee:
    return TextToVideo() if family == "cogvideox" else WanTextToVideo()


def _stage(name: str, family: Family) -> str:
    return name if family == "cogvideox" else f"{name}-{family}"


@click.group()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Checkpoints and log.")
@click.option("--minutes", default=600.0, show_default=True, help="End this call after so long.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=0, help="torch threads; 0 leaves torch's own choice.")
@click.pass_context
def main(context: click.Context, work: Path, minutes: float, seed: int, threads: int) -> None:
    """Train the storybook model, stage by stage."""
    work.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context.obj = Settings(work, device, minutes, seed)


def _clips(work: Path, difficulty: Difficulty) -> Clips:
    return Clips(**torch.load(work / f"clips-{difficulty}.pt", mmap=True, weights_only=True))


def _latents(work: Path, difficulty: Difficulty) -> Latents:
    return Latents(**torch.load(work / f"latents-{difficulty}.pt", weights_only=True))


def load_vae(work: Path) -> AutoencoderKLCogVideoX:
    """Return the trained autoencoder, its average weights."""
    vae = storybook.build_vae()
    vae.load_state_dict(
        torch.load(work / "vae.pt", weights_only=True, map_location="cpu")["average"]
    )
    return vae.eval()


@main.command()
@click.option("--varied", default=20_000, show_default=True)
@click.option("--easy", default=4_000, show_default=True)
@click.pass_obj
def clips(settings: Settings, varied: int, easy: int) -> None:
    """Render the training clips."""
    counts: dict[Difficulty, int] = {"varied": varied, "easy": easy}
    for difficulty, count in counts.items():
        path = settings.work / f"clips-{difficulty}.pt"
        if not path.exists():
            torch.save(asdict(render_clips(settings.seed, count, difficulty)), path)


@main.command()
@click.option("--steps", default=3_000, show_default=True)
@_of_family
@click.pass_obj
def vae(settings: Settings, steps: int, family: Family) -> None:
    """Train the autoencoder; that of the Wan family on the latents of the first one."""
    clips = _clips(settings.work, "varied")
    if family == "cogvideox":
        train_vae(clips, settings, steps)
    else:
        train_wan.train_vae(clips, _latents(settings.work, "varied").latent, settings, steps)


@main.command()
@click.option("--steps", default=20_000, show_default=True)
@click.pass_obj
def decoder(settings: Settings, steps: int) -> None:
    """Train the decoder of the first model on, for latents that stay as they are."""
    clips, latents = (of(settings.work, "varied") for of in (_clips, _latents))
    train_decoder(load_vae(settings.work), clips, latents.latent, settings, steps)


@main.command()
@_of_family
@click.pass_obj
def shipped(settings: Settings, family: Family) -> None:
    """Begin with the shipped autoencoder and transformer, at step 0 and without momentum."""
    paths = [settings.work / f"{_stage(name, family)}.pt" for name in ("vae", "transformer")]
    if found := [path for path in paths if path.exists()]:
        raise click.ClickException(f"{found[0]} exists: give a new folder as --work")
    autoencoder: nn.Module = storybook.build_vae() if family == "cogvideox" else wan.build_vae()
    text_to_video = _text_to_video(family)
    parts = {
        "vae": autoencoder,
        "transformer": text_to_video.transformer,
        "text_encoder": text_to_video.text_encoder,
    }
    folder = storybook.WEIGHTS if family == "cogvideox" else wan.WEIGHTS
    for name, part in parts.items():
        (file,) = (folder / name).glob("*.safetensors")
        load_model(part, str(file))  # copies float16 into float32
    for path, module in zip(paths, (autoencoder, text_to_video), strict=True):
        state = module.state_dict()
        torch.save({"module": state, "average": state, "optimizers": None, "step": 0}, path)


@main.command()
@click.pass_obj
def latents(settings: Settings) -> None:
    """Encode the training clips."""
    autoencoder = load_vae(settings.work).to(settings.device)
    for difficulty in ("varied", "easy"):
        path = settings.work / f"latents-{difficulty}.pt"
        if not path.exists():
            encoded = encode_clips(autoencoder, _clips(settings.work, difficulty), settings.device)
            torch.save(asdict(encoded), path)


@main.command()
@click.option("--steps", default=10_000, show_default=True)
@click.option("--decay-steps", default=4_000, show_default=True)
@click.option("--easy-steps", default=1_000, show_default=True)
@_of_family
@click.pass_obj
def transformer(
    settings: Settings, steps: int, decay_steps: int, easy_steps: int, family: Family
) -> None:
    """Train the transformer and its text encoder."""
    names: tuple[Difficulty, ...] = ("easy", "varied")
    worlds = {name: _latents(settings.work, name) for name in names}
    scale = float(1 / worlds["varied"].latent.float().std())
    scaled = {
        name: replace(world, latent=world.latent * scale).to(settings.device)
        for name, world in worlds.items()
    }
    torch.manual_seed(settings.seed)
    train_transformer(
        _stage("transformer", family),
        _text_to_video(family),
        cogvideox_noised if family == "cogvideox" else flow,
        Prompts(only_nouns=family == "wan"),
        lambda step: scaled["easy" if step < easy_steps else "varied"],
        settings,
        steps=steps,
        decay_steps=decay_steps,
    )


@main.command()
@click.option("--steps", default=1_000, show_default=True)
@click.pass_obj
def judge(settings: Settings, steps: int) -> None:
    """Train the judge, and print its accuracy on clips that no stage has seen."""
    clips = _clips(settings.work, "varied")
    path = settings.work / "decoded.pt"
    if not path.exists():
        few = Clips(*(getattr(clips, field.name)[:_DECODED] for field in fields(clips)))
        frames = reconstruct(load_vae(settings.work).to(settings.device), few.frames)
        torch.save(asdict(replace(few, frames=frames)), path)
    decoded = Clips(**torch.load(path, weights_only=True))
    if not train_judge(clips, decoded, settings, steps):
        return
    network = JudgeNetwork()
    network.load_state_dict(torch.load(settings.work / "judge.pt", weights_only=True)["average"])
    held_out = render_clips(_HELD_OUT_SEED, 864, "varied")
    click.echo(json.dumps(measure_judge(network.eval(), held_out, _HELD_OUT_SEED), indent=2))
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_model(network.half(), str(WEIGHTS))


@main.command()
@click.option("--out", type=click.Path(path_type=Path), help="Default: in the package.")
@_of_family
@click.pass_obj
def export(settings: Settings, out: Path | None, family: Family) -> None:
    """Write the averaged weights as a diffusers folder."""
    deviation = float(_latents(settings.work, "varied").latent.float().std())
    path = settings.work / f"{_stage('transformer', family)}.pt"
    state = torch.load(path, weights_only=True, map_location="cpu")["average"]
    if family == "wan":
        wan_text_to_video = WanTextToVideo()
        wan_text_to_video.load_state_dict(state)
        wan_autoencoder = wan.build_vae(deviation)
        found = torch.load(settings.work / "vae-wan.pt", weights_only=True, map_location="cpu")[
            "average"
        ]
        wan_autoencoder.load_state_dict(found)
        wan.save_storybook(
            out or wan.WEIGHTS,
            vae=wan_autoencoder,
            transformer=wan_text_to_video.transformer,
            text_encoder=wan_text_to_video.text_encoder,
        )
        return
    text_to_video = TextToVideo()
    text_to_video.load_state_dict(state)
    autoencoder = load_vae(settings.work)
    autoencoder.register_to_config(scaling_factor=1 / deviation)
    storybook.save_storybook(
        out or storybook.WEIGHTS,
        vae=autoencoder,
        transformer=text_to_video.transformer,
        text_encoder=text_to_video.text_encoder,
    )


if __name__ == "__main__":
    main()
