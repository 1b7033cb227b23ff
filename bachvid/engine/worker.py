"""The model, the method and the token layout of a process, which all its videos share.

Knows no run directory, no order of work and no Ray. Each rank of a gang has a worker, and all of
them render the same videos in lockstep; only rank 0 sees pixels.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bachvid import __version__
from bachvid.attention.context import RunContext
from bachvid.attention.control import Denoised
from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.catalog.facts import ModelFacts
from bachvid.engine.results import Frames, MatchedTokens, PreviewFrames, RenderedVideo
from bachvid.engine.sampling import Track, denoise, replay, source_track
from bachvid.kv.cache import IdentityManifest
from bachvid.kv.files import FilePieces
from bachvid.kv.packing import StepPacker
from bachvid.layout.gangs import Gang, RankShare
from bachvid.methods.base import Observation, Run, RunControl
from bachvid.methods.ops.injection import InjectedTokens
from bachvid.methods.ops.masks import MaskRecovery
from bachvid.models.registry import load_model
from bachvid.planning.config import ResolvedConfig
from bachvid.planning.plan import VideoPlan
from bachvid.planning.resolve import build_method
from bachvid.prompts.compose import Prompt
from bachvid.prompts.tokenizer import PromptTokenizer, TokenizedPrompt


class ModelWorker:
    """A model with its method, as one rank of `group`.

    `model.threads` applies to the whole process, because torch has one number of threads.
    Raises ConfigError or ModelSupportError if the model cannot be loaded.
    """

    def __init__(
        self, config: ResolvedConfig, facts: ModelFacts, group: SequenceGroup = ALONE
    ) -> None:
        if config.model.threads is not None:
            torch.set_num_threads(config.model.threads)
        self.config = config
        self.facts = facts
        self.group = group
        self.model = load_model(config.model, facts, group)
        self._decodes_together = False
        if group is not ALONE:
            from bachvid.attention.parallel import share_decoder  # not needed by a single rank

            self._decodes_together = share_decoder(self.model.vae)
        self.method = build_method(config)
        self.layout = self.model.layout(config.video)
        self.embeds: dict[str, Tensor] = {}  # [1, T, C] by prompt, with the negative one
        self._tokenizer: PromptTokenizer | None = None

    @property
    def share(self) -> RankShare:
        """The branches and heads that this rank computes."""
        group = self.group
        gang = Gang(group.size * group.cfg_size, group.cfg_size)
        return gang.share(group.cfg_rank * group.size + group.rank, self.facts.num_heads)

    @property
    def sees_pixels(self) -> bool:
        """Whether this rank receives decoded frames (rank 0 of a gang only)."""
        return self.group.rank == self.group.cfg_rank == 0

    @property
    def provenance(self) -> dict[str, str]:
        """Versions and device needed to reproduce a video bit for bit."""
        device = self.model.device
        is_gpu = device.type == "cuda"
        size, cfg = self.group.size, self.group.cfg_size
        ranks = f"{size} x cfg {cfg}" if cfg > 1 else str(size)
        return {
            "bachvid": __version__,
            "torch": str(torch.__version__),  # a str subclass of torch otherwise
            "diffusers": metadata.version("diffusers"),
            "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
            "threads": str(torch.get_num_threads()),
            "machine": platform.machine(),
            **({"ranks": ranks} if size * cfg > 1 else {}),
        }

    def encode(self, prompts: Sequence[Prompt]) -> None:
        """Keep the embeddings of `prompts` and of the negative prompt; drop the text encoder."""
        negative = Prompt(self.config.sampling.negative_prompt)
        texts = {prompt.text: prompt for prompt in (negative, *prompts)}
        embeds_PTC = self.model.encode_prompts(list(texts.values()))
        self.embeds = dict(zip(texts, torch.split(embeds_PTC, 1), strict=True))
        self.model.free_text_encoder()

    def new_context(self) -> RunContext:
        """Return the context of one video, before its first step."""
        return RunContext(
            layout=self.layout, rotary=self.model.rotary(self.config.video), group=self.group
        )

    def new_packer(self) -> StepPacker:
        """Return a sink that packs what an identity video records, step by step."""
        return StepPacker(
            share=self.share, records=self.method.records, config_hash=self.config.sha256
        )

    def new_files(self, folder: Path) -> FilePieces:
        """Return a sink that keeps what an identity video records as files."""
        return FilePieces(folder, records=self.method.records, config_hash=self.config.sha256)

    def tokenize(self, video: VideoPlan) -> TokenizedPrompt:
        """Return the tokens of a video's prompt, from the plan where it has them."""
        if video.tokens is not None:
            return video.tokens
        self._tokenizer = self._tokenizer or PromptTokenizer.load(
            self.facts, revision=self.config.model.revision
        )
        return self._tokenizer.tokenize(video.prompt)

    def source_track(self, clean: Tensor, video: VideoPlan) -> Track:
        """Return the track of a finished video, noised to each step by the noise of `video`."""
        noise = self.model.initial_noise(video.seed, self.config.video)
        return source_track(self.model, clean, noise, self.config.sampling)

    def steps(
        self,
        context: RunContext,
        run: Run,
        video: VideoPlan,
        control: RunControl,
        track: Track | None,
    ) -> Iterator[Denoised]:
        """Render one run of a video, step by step: from its seed's noise, or along a track."""
        sampling, embeds = self.config.sampling, self.embeds
        prompt_embeds, negative = embeds[video.prompt.text], embeds[sampling.negative_prompt]
        if track is not None:
            return replay(
                self.model,
                context,
                run,
                prompt_embeds=prompt_embeds,
                negative_embeds=negative,
                track=track,
                sampling=sampling,
                control=control,
            )
        return denoise(
            self.model,
            context,
            run,
            prompt_embeds=prompt_embeds,
            negative_embeds=negative,
            noise=self.model.initial_noise(video.seed, self.config.video),
            noise_seed=video.seed,
            sampling=sampling,
            control=control,
        )

    def manifest(self, context: RunContext, seen: Observation, seed: int) -> IdentityManifest:
        """Return the manifest of an identity. A collective: it gathers features from all ranks."""
        foreground = seen.foreground
        return IdentityManifest(
            layout=self.layout,
            records=self.method.records,
            foreground_mask_N=None if foreground is None else foreground.mask_N.cpu(),
            features={
                layer: context.gather_positions(x_NC.to(self.model.device)).cpu()
                for layer, x_NC in seen.features.items()
            },
            seed=seed,
            config_hash=self.config.sha256,
        )

    def check(self, manifest: IdentityManifest) -> None:
        """Check that a frame video finds all that it reads. Raises CacheMissError, LayoutError."""
        matching = self.method.matching
        manifest.check(
            self.layout,
            records=self.method.records,
            match_layers=matching.layers if matching else (),
            config_hash=self.config.sha256,
        )

    def decode(self, latents: Tensor) -> Frames | None:
        """Decode, on this rank or with the whole gang; None for a rank that sees no pixels."""
        if not (self.sees_pixels or self._decodes_together):
            return None
        frames = self.model.decode(latents)
        return frames if self.sees_pixels else None

    def previews(self, done: Denoised) -> Iterator[PreviewFrames]:
        """Decode the estimate of a step, where the config wants a preview of it."""
        every = self.config.output.preview_every
        if every is not None and (done.step + 1) % every == 0:
            frames = self.decode(done.estimate)
            if frames is not None:
                yield PreviewFrames(frames)

    def rendered(
        self, latents: Tensor, frames: Frames, control: RunControl, seconds: Mapping[str, float]
    ) -> RenderedVideo:
        """Return a finished video with its foreground, matches, hashes and timings."""
        seen = control.observation
        assert seen is not None, "a video ends after its mask step"
        grid, foreground, injected = self.layout.grid, seen.foreground, control.injected
        return RenderedVideo(
            frames=frames,
            latents=latents.float().cpu().numpy(),
            foreground=None if foreground is None else _array(foreground.mask_N).reshape(grid),
            matched=None if injected is None else _matched_tokens(injected, grid),
            latents_sha256=_latents_sha256(latents),
            frames_sha256=array_sha256(frames),
            seconds=seconds,
            recoveries=tuple(_recovery_text(recovery) for recovery in seen.recoveries),
        )


def _array(mask_N: Tensor) -> NDArray[np.bool_]:
    array: NDArray[np.bool_] = mask_N.cpu().numpy()
    return array


def array_sha256(array: NDArray[np.uint8]) -> str:
    """Hash an array's shape, type and bytes."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _latents_sha256(latents: Tensor) -> str:
    """Hash latents; by their bytes, because NumPy has no bfloat16."""
    digest = hashlib.sha256(f"{latents.dtype} {tuple(latents.shape)}".encode())
    digest.update(latents.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _matched_tokens(injected: InjectedTokens, grid: tuple[int, int, int]) -> MatchedTokens:
    index_N = np.zeros(grid, dtype=np.int64).ravel()
    used_N = np.zeros(index_N.shape, dtype=np.bool_)
    positions_Q = injected.foreground_positions_Q.cpu().numpy()
    index_N[positions_Q] = injected.identity_index_Q.cpu().numpy()
    used_N[positions_Q] = True
    return MatchedTokens(index_N, used_N.reshape(grid))


def _recovery_text(recovery: MaskRecovery) -> str:
    text = f"step {recovery.step}: the foreground mask was {recovery.found}; "
    if recovery.remedy == "quantile":
        return f"{text}taken again above the score {recovery.threshold:.3g}"
    return f"{text}only the background was injected"
