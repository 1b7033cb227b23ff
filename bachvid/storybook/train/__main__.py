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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_model, save_model

from bachvid.storybook import model as storybook
from bachvid.storybook.judge import WEIGHTS, JudgeNetwork
from bachvid.storybook.train.common import Clips, Settings, render_clips
from bachvid.storybook.train.families import FAMILIES, TrainedFamily
from bachvid.storybook.train.judge import measure_judge, train_judge
from bachvid.storybook.train.transformer import (
    Latents,
    Prompts,
    encode_clips,
    train_transformer,
)
from bachvid.storybook.train.vae import reconstruct
from bachvid.storybook.world import Difficulty

_DECODED = 4_000  # clips that the judge sees as the autoencoder gives them back
_HELD_OUT_SEED = 10_000_000


_of_family = click.option(
    "--family",
    type=click.Choice(list(FAMILIES)),
    default="cogvideox",
    show_default=True,
    callback=lambda context, parameter, name: FAMILIES[name],
)


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
    """Return the trained autoencoder of the first model, its average weights."""
    vae = storybook.build_vae()
    vae.load_state_dict(_average(work / "vae.pt"))
    return vae.eval()


def _average(path: Path) -> Any:  # tensors by name
    return torch.load(path, weights_only=True)["average"]


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
def vae(settings: Settings, steps: int, family: TrainedFamily) -> None:
    """Train the autoencoder; that of the Wan family on the latents of the first one."""
    clips = _clips(settings.work, "varied")
    family.train_vae(clips, lambda: _latents(settings.work, "varied"), settings, steps)


@main.command()
@_of_family
@click.pass_obj
def shipped(settings: Settings, family: TrainedFamily) -> None:
    """Begin with the shipped autoencoder and transformer, at step 0 and without momentum."""
    paths = [family.checkpoint(settings.work, name) for name in ("vae", "transformer")]
    if found := [path for path in paths if path.exists()]:
        raise click.ClickException(f"{found[0]} exists: give a new folder as --work")
    autoencoder, text_to_video = family.build_vae(1.0), family.build_text_to_video()
    parts = {
        "vae": autoencoder,
        "transformer": text_to_video.transformer,
        "text_encoder": text_to_video.text_encoder,
    }
    for name, part in parts.items():
        (file,) = (family.weights / name).glob("*.safetensors")
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
    settings: Settings, steps: int, decay_steps: int, easy_steps: int, family: TrainedFamily
) -> None:
    """Train the transformer and its text encoder."""
    names: tuple[Difficulty, ...] = ("easy", "varied")
    worlds = {name: _latents(settings.work, name) for name in names}
    scale = float(1 / worlds["varied"].latent.std())
    scaled = {name: replace(world, latent=world.latent * scale) for name, world in worlds.items()}
    torch.manual_seed(settings.seed)
    train_transformer(
        family.checkpoint(settings.work, "transformer").stem,
        family.build_text_to_video(),
        family.noised,
        Prompts(only_nouns=family.only_nouns),
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
        few = Clips(clips.frames[:_DECODED], clips.mask[:_DECODED], clips.labels[:_DECODED])
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
def export(settings: Settings, out: Path | None, family: TrainedFamily) -> None:
    """Write the averaged weights as a diffusers folder."""
    deviation = float(_latents(settings.work, "varied").latent.std())
    autoencoder, text_to_video = family.build_vae(deviation), family.build_text_to_video()
    for name, module in (("vae", autoencoder), ("transformer", text_to_video)):
        module.load_state_dict(_average(family.checkpoint(settings.work, name)))
    family.save(
        out or family.weights,
        vae=autoencoder,
        transformer=text_to_video.transformer,
        text_encoder=text_to_video.text_encoder,
    )


if __name__ == "__main__":
    main()
