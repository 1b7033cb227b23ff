"""How well masks and matches of the storybook model agree with the truth of its world.

    python benchmarks/storybook_truth.py [--pairs 100] [--set model.id=storybook-wan]

Procedural clips with varied positions, which no training stage has seen, are encoded, noised to
the mask step, and observed in one forward, as a pre-pass observes its video. A token is character
where 30 % of its pixels are. Beside the mask's IoU stands that of the best fixed mask per action,
which needs no image: the mean mask of 3,000 other clips, cut at the best threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bachvid.catalog.registry import load_facts
from bachvid.engine.worker import ModelWorker
from bachvid.kv.cache import MemoryPieces
from bachvid.methods.bachvid import ResolvedBachVid
from bachvid.methods.base import Observation, Run, RunInputs
from bachvid.methods.controls.observing import VideoObserver
from bachvid.methods.ops.matching import TokenMatch, match_tokens, match_within_foreground
from bachvid.planning.config import RenderConfig
from bachvid.planning.plan import VideoPlan
from bachvid.planning.resolve import resolve_config
from bachvid.prompts.compose import Prompt, compose_prompt
from bachvid.storybook.train.transformer import TOKEN_IS_CHARACTER, pool_to_tokens
from bachvid.storybook.world import ACTIONS, BACKGROUNDS, CHARACTERS, Clip, render_clip

FIRST_SEED = 20_000_000
PRIOR_CLIPS = 3_000
BoolArray = NDArray[np.bool_]


def token_masks(clips: Sequence[Clip]) -> BoolArray:
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


def iou(left: BoolArray, right: BoolArray) -> float:
    """Return the mean intersection over union of masks [clips, F, h, w]."""
    joint, either = (op.sum((1, 2, 3)) for op in (left & right, left | right))
    return float((joint / np.maximum(either, 1)).mean())


def prior_masks() -> dict[int, BoolArray]:
    """Return the best fixed mask of each action, from clips that are not measured."""
    best = {}
    for action in range(len(ACTIONS)):
        rng = np.random.default_rng(action)
        clips = [
            render_clip(FIRST_SEED + 10_000 + i, background, character, action)
            for i, (background, character) in enumerate(
                rng.integers(6, size=(PRIOR_CLIPS // len(ACTIONS), 2)).tolist()
            )
        ]
        masks = token_masks(clips)
        mean = masks.mean(0)
        cuts = [np.broadcast_to(mean >= t, masks.shape) for t in np.arange(0.1, 0.9, 0.05)]
        best[action] = max(cuts, key=lambda cut: iou(masks, cut))[0]
    return best


class Observer:
    """Observes noised clips as a pre-pass observes its video, and matches two of them."""

    def __init__(self, config: RenderConfig) -> None:
        facts = load_facts(config.model)
        self.config = resolve_config(config, facts)
        self.worker = ModelWorker(self.config, facts)
        self.grid, self.ratio = self.worker.layout.grid, facts.spatial_ratio
        self.negative = self.worker.model.encode_prompts([Prompt("")])
        method = self.config.method
        assert isinstance(method, ResolvedBachVid), "only that method matches"
        self.method, self.step = method, method.mask_step

    @torch.no_grad()
    def observe(self, clip: Clip, labels: tuple[int, int, int], seed: int) -> Observation:
        """Return what the observer sees of `clip` at the mask step."""
        model = self.worker.model
        words = (BACKGROUNDS[labels[0]], CHARACTERS[labels[1]], ACTIONS[labels[2]])
        prompt = compose_prompt(*words)
        video = VideoPlan("clip", None, prompt, None, seed)
        context, run = self.worker.new_context(), Run((self.step,), start="source")
        given = RunInputs(run, context, self.worker.tokenize(video), MemoryPieces())
        control = VideoObserver(given, self.method, self.method.match_layers)
        track = self.worker.source_track(model.encode(clip.frames), video)
        self.worker.embeds = {prompt.text: model.encode_prompts([prompt]), "": self.negative}
        for _ in self.worker.steps(context, run, video, control, track):
            pass
        assert control.observation is not None
        return control.observation

    def match(self, frame: Observation, identity: Observation) -> TokenMatch:
        """Match the foreground of a frame video to an identity video, as the method does."""
        mask_N, layers = foreground(frame), self.method.match_layers
        ours = [frame.features[layer][mask_N] for layer in layers]
        theirs = [identity.features[layer] for layer in layers]
        if self.method.match_within == "foreground":
            return match_within_foreground(ours, theirs, foreground(identity))
        return match_tokens(ours, theirs)


def foreground(seen: Observation) -> Tensor:
    """Return the mask of an observation."""
    assert seen.foreground is not None
    return seen.foreground.mask_N


def match_hits(
    matched: NDArray[np.int64],
    places: NDArray[np.int64],
    frame: Clip,
    identity: Clip,
    ratio: int,
) -> BoolArray:
    """Return whether each match [Q] of a token at `places` [Q, 3] is within one token of the truth.

    The truth is, in the latent frame of the match, the character token whose rest-pose point is
    the nearest.
    """
    frame_rest, identity_rest = token_rest(frame, ratio), token_rest(identity, ratio)
    identity_mask = token_masks([identity])[0]
    hits = []
    for index, place in zip(matched, places, strict=True):
        f, row, column = np.unravel_index(index, identity_mask.shape)
        distance = np.linalg.norm(identity_rest[f] - frame_rest[tuple(place)], axis=-1)
        distance = np.where(identity_mask[f], distance, np.inf)
        true_row, true_column = np.unravel_index(distance.argmin(), distance.shape)
        hits.append(max(abs(true_row - row), abs(true_column - column)) <= 1)
    return np.asarray(hits)


@click.command()
@click.option("--pairs", default=100, show_default=True, help="Pairs of clips to measure.")
@click.option("--set", "overrides", multiple=True, help="As of `bachvid render`.")
def main(pairs: int, overrides: tuple[str, ...]) -> None:
    """Print mask IoU beside the best fixed mask, and the share of right matches."""
    observer = Observer(RenderConfig.from_yaml(None, overrides))
    rng = np.random.default_rng(0)
    found, truth, priors = list[BoolArray](), list[BoolArray](), list[BoolArray]()
    hits, chance_hits, accepted = list[bool](), list[bool](), list[bool]()
    fixed = prior_masks()
    for pair in range(pairs):
        background, character, *actions = rng.integers(6, size=4).tolist()
        labels = [(background, character, action) for action in actions]
        seeds = (FIRST_SEED + 2 * pair, FIRST_SEED + 2 * pair + 1)
        frame, identity = (
            render_clip(seed, *label) for seed, label in zip(seeds, labels, strict=True)
        )
        clips = [frame, identity]
        seen = [observer.observe(*args) for args in zip(clips, labels, seeds, strict=True)]
        masks = [foreground(one).numpy().reshape(observer.grid) for one in seen]
        found += masks
        truth.extend(token_masks(clips))
        priors += [fixed[action] for action in actions]
        match = observer.match(*seen)
        threshold = observer.method.match_threshold
        taken = masks[1].ravel()[match.index_Q.numpy()] & (match.score_Q.numpy() >= threshold)
        accepted += taken.tolist()
        places, index = np.argwhere(masks[0])[taken], match.index_Q.numpy()[taken]
        # A token that is no character has no true match: it is measured by the mask's IoU.
        known = truth[-2][tuple(places.T)]
        places, index = places[known], index[known]
        hits += match_hits(index, places, frame, identity, observer.ratio).tolist()
        chance = rng.choice(np.flatnonzero(masks[1]), size=len(places))
        chance_hits += match_hits(chance, places, frame, identity, observer.ratio).tolist()
    truths = np.stack(truth)
    click.echo(f"step {observer.step}, {2 * pairs} clips")
    click.echo(f"mask IoU                             {iou(np.stack(found), truths):.3f}")
    click.echo(f"  best fixed mask per action         {iou(np.stack(priors), truths):.3f}")
    click.echo(f"foreground tokens with a match       {np.mean(accepted):.3f}")
    click.echo(f"matches within one token of truth    {np.mean(hits):.3f}")
    click.echo(f"  a random foreground token          {np.mean(chance_hits):.3f}")


if __name__ == "__main__":
    main()
