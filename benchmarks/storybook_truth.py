"""How well masks and matches of the storybook model agree with the truth of its world.

    python benchmarks/storybook_truth.py [--clips 96] [--step 11]

Procedural clips with varied positions, which no training stage has seen, are encoded, noised to
the mask step, and observed in one forward, as a pre-pass observes its video. A token is character
where 30 % of its pixels are. Beside the mask's IoU stands that of the best fixed mask per action,
which needs no image: the mean mask of 3,000 other clips, cut at the best threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bachvid.actors import ModelWorker
from bachvid.attention import RunContext
from bachvid.config import RenderConfig, resolve_config
from bachvid.facts import load_facts
from bachvid.methods.base import Observation
from bachvid.methods.matching import match_tokens
from bachvid.models.base import attention_control
from bachvid.plan import VideoPlan
from bachvid.prompts import compose_prompt
from bachvid.storybook.train_transformer import TOKEN_IS_CHARACTER, pool_to_tokens
from bachvid.storybook.training import to_video
from bachvid.storybook.world import ACTIONS, BACKGROUNDS, CHARACTERS, Clip, render_clip

FIRST_SEED = 20_000_000
PRIOR_CLIPS = 3_000


def token_masks(clips: Sequence[Clip]) -> NDArray[np.bool_]:
    """Return which tokens are character: bool [clips, F, h, w]."""
    share = pool_to_tokens(torch.from_numpy(np.stack([clip.mask for clip in clips])))
    return (share >= TOKEN_IS_CHARACTER).numpy()


def token_rest(clip: Clip, ratio: int) -> NDArray[np.float32]:
    """Return the mean rest-pose point of each token's character pixels: [F, h, w, 2], or NaN."""
    rest = np.where(clip.mask[..., None], clip.rest, 0.0)
    groups = [range(1)] + [range(i, i + 2) for i in range(1, len(rest), 2)]
    points = []
    for frames in groups:
        counted = clip.mask[frames].sum(0)
        total = rest[frames].sum(0)
        blocks = [
            x.reshape(x.shape[0] // ratio, ratio, x.shape[1] // ratio, ratio, *x.shape[2:]).sum(
                (1, 3)
            )
            for x in (total, counted)
        ]
        with np.errstate(invalid="ignore"):
            points.append(blocks[0] / blocks[1][..., None])
    return np.stack(points).astype(np.float32)


def iou(left: NDArray[np.bool_], right: NDArray[np.bool_]) -> float:
    """Return the mean intersection over union of masks [clips, F, h, w]."""
    joint, either = (op.sum((1, 2, 3)) for op in (left & right, left | right))
    return float((joint / np.maximum(either, 1)).mean())


def prior_masks() -> dict[int, NDArray[np.bool_]]:
    """Return the best fixed mask of each action, from clips that are not measured."""
    best = {}
    for action in range(len(ACTIONS)):
        rng = np.random.default_rng(action)
        clips = [
            render_clip(FIRST_SEED + 10_000 + i, *rng.integers(6, size=2).tolist(), action)
            for i in range(PRIOR_CLIPS // len(ACTIONS))
        ]
        masks = token_masks(clips)
        mean = masks.mean(0)
        cuts = [np.broadcast_to(mean >= t, masks.shape) for t in np.arange(0.1, 0.9, 0.05)]
        best[action] = max(cuts, key=lambda cut: iou(masks, cut))[0]
    return best


class Observer:
    """Observes noised clips as a pre-pass observes its video."""

    def __init__(self, config: RenderConfig, step: int) -> None:
        facts = load_facts(config.model)
        method = config.method.model_copy(update={"mask_step": step})
        self.worker = ModelWorker(
            resolve_config(config.model_copy(update={"method": method}), facts), facts
        )
        self.step = step

    @torch.no_grad()
    def observe(self, clip: Clip, labels: tuple[int, int, int], seed: int) -> Observation:
        """Return what the observer sees of `clip` at the mask step."""
        worker, model = self.worker, self.worker.model
        words = (BACKGROUNDS[labels[0]], CHARACTERS[labels[1]], ACTIONS[labels[2]])
        prompt = compose_prompt(*words)
        worker.encode([prompt])
        video = VideoPlan("clip", None, prompt, None, seed)
        run: RunContext = worker.new_run()
        run.step, run.branches = self.step, ("cond",)
        control = worker.method.pre_pass_control(run, worker.tokenize(video), None)
        assert control is not None
        scheduler = model.scheduler("ddim")
        assert worker.config.sampling.num_steps is not None
        scheduler.set_timesteps(worker.config.sampling.num_steps)
        timestep = scheduler.timesteps[self.step]
        noise = model.initial_noise(seed, worker.config.video)
        clean = self.encode(clip)
        noisy = scheduler.add_noise(clean, noise, timestep[None])
        with attention_control(model, run, control):
            model.predict(noisy, timestep, worker._embeds[prompt.text])
        return control.observation

    def encode(self, clip: Clip) -> Tensor:
        """Return the latents [1, F, C, h, w] of a clip."""
        vae = self.worker.model._vae
        mean = vae.encode(to_video(torch.from_numpy(clip.frames[None]))).latent_dist.mean
        return (mean * vae.config.scaling_factor).transpose(1, 2)


def match_hits(
    matched: Tensor, frame: Clip, identity: Clip, used: NDArray[np.bool_], ratio: int
) -> NDArray[np.bool_]:
    """Return, for each used frame token, whether its match is within one token of the truth.

    The truth is, in the latent frame of the match, the character token whose rest-pose point is
    the nearest.
    """
    frame_rest, identity_rest = token_rest(frame, ratio), token_rest(identity, ratio)
    identity_mask = token_masks([identity])[0]
    hits = []
    for index, place in zip(matched.tolist(), np.argwhere(used), strict=True):
        point = frame_rest[tuple(place)]
        f, row, column = np.unravel_index(index, identity_mask.shape)
        distance = np.linalg.norm(identity_rest[f] - point, axis=-1)
        distance = np.where(identity_mask[f], distance, np.inf)
        true_row, true_column = np.unravel_index(np.nanargmin(distance), distance.shape)
        hits.append(max(abs(true_row - row), abs(true_column - column)) <= 1)
    return np.asarray(hits)


@click.command()
@click.option("--clips", default=96, show_default=True, help="How many clips to measure.")
@click.option("--step", type=int, help="Mask step; the profile's by default.")
@click.option("--config", type=click.Path(path_type=Path), help="A config file.")
@click.option("--set", "overrides", multiple=True, help="As of `bachvid render`.")
def main(clips: int, step: int | None, config: Path | None, overrides: tuple[str, ...]) -> None:
    """Print mask IoU beside the best fixed mask, and the share of right matches."""
    settings = RenderConfig.from_yaml(
        config, overrides=(*overrides, "method.pre_pass_injection=none")
    )
    if step is None:
        step = resolve_config(settings, load_facts(settings.model)).method.mask_step
        assert step is not None
    observer = Observer(settings, step)
    ratio = observer.worker.facts.spatial_ratio
    grid = observer.worker.layout.grid
    layers = observer.worker.method._settings.match_layers
    rng = np.random.default_rng(0)
    found, truth, priors, hits, random_hits = [], [], [], [], []
    fixed = prior_masks()
    for i in range(clips):
        background, character = rng.integers(6, size=2).tolist()
        action, other = rng.integers(6, size=2).tolist()
        seen, made = [], []
        for k, (seed, act) in enumerate(
            ((FIRST_SEED + 2 * i, action), (FIRST_SEED + 2 * i + 1, other))
        ):
            labels = (background, character, act)
            made.append(render_clip(seed, *labels))
            seen.append(observer.observe(made[k], labels, seed))
            found.append(seen[k].foreground.mask_N.numpy().reshape(grid))
            priors.append(fixed[act])
        masks = token_masks(made)
        truth.extend(masks)
        used = masks[0] & ~np.isnan(token_rest(made[0], ratio)[..., 0])
        rows = torch.from_numpy(used.ravel())
        match = match_tokens(
            [seen[0].features[layer][rows] for layer in layers],
            [seen[1].features[layer] for layer in layers],
        )
        inside = torch.from_numpy(masks[1].ravel())[match.index_Q].numpy()
        right = match_hits(match.index_Q, made[0], made[1], used, ratio)
        hits.extend(right & inside)
        chance = torch.from_numpy(rng.choice(np.flatnonzero(masks[1]), size=int(used.sum())))
        random_hits.extend(match_hits(chance, made[0], made[1], used, ratio))
    scheduler = observer.worker.model.scheduler("ddim")
    scheduler.set_timesteps(observer.worker.config.sampling.num_steps)
    click.echo(f"step {step} (t = {int(scheduler.timesteps[step])}), {2 * clips} clips")
    click.echo(f"mask IoU                      {iou(np.stack(found), np.stack(truth)):.3f}")
    click.echo(f"best fixed mask per action    {iou(np.stack(priors), np.stack(truth)):.3f}")
    click.echo(f"matches within one token      {np.mean(hits):.3f}")
    click.echo(f"random character token        {np.mean(random_hits):.3f}")


if __name__ == "__main__":
    main()
