"""The roles that render: one worker holds a model, an identity actor and a frame actor use it.

Plain classes: they know no run directory, no order of work and no Ray. The ranks of a gang each
have a worker, and run the same roles on the same videos, in step; rank 0 alone sees pixels.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bachvid import __version__
from bachvid.attention.context import RunContext
from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.catalog.facts import ModelFacts
from bachvid.engine.arrays import Frames
from bachvid.engine.results import MatchedTokens, RenderedVideo
from bachvid.engine.sampling import Denoised, denoise
from bachvid.engine.steps import Phase, PreviewFrames
from bachvid.engine.timing import timed
from bachvid.inputs.config import RenderConfig
from bachvid.kv.files import FileKVStore
from bachvid.kv.packing import StepPacker
from bachvid.layout.gangs import Gang, RankShare
from bachvid.methods import build_method
from bachvid.methods.base import MethodControl, MethodSettings
from bachvid.methods.ops.injection import InjectedTokens
from bachvid.methods.ops.masks import MaskRecovery
from bachvid.models.registry import load_model
from bachvid.planning.plan import VideoPlan
from bachvid.planning.resolve import config_hash
from bachvid.prompts.compose import Prompt
from bachvid.prompts.tokenizer import PromptTokenizer, TokenizedPrompt


class ModelWorker:
    """One process's model, method and token layout, for both roles; as one rank of `group`.

    `model.threads` is set for the whole process: torch knows one number of threads only.
    Raises ConfigError or ModelSupportError if the model cannot be loaded.
    """

    def __init__(
        self, config: RenderConfig, facts: ModelFacts, group: SequenceGroup = ALONE
    ) -> None:
        if config.model.threads is not None:
            torch.set_num_threads(config.model.threads)
        self.config = config
        self.facts = facts
        self.group = group
        self.model = load_model(config.model, facts, group)
        self._decodes_together = False
        if group is not ALONE:
            from bachvid.attention.parallel import share_decoder

            self._decodes_together = share_decoder(self.model.vae)
        self.method = build_method(config.method, config_hash=config_hash(config))
        self.layout = self.model.layout(config.video)
        self.embeds: dict[str, Tensor] = {}  # [1, T, C] by prompt; the negative one is needed too
        self._tokenizer: PromptTokenizer | None = None

    @property
    def share(self) -> RankShare:
        """The branches and heads that this rank computes."""
        group = self.group
        gang = Gang(group.size * group.cfg_size, group.cfg_size)
        return gang.share(group.cfg_rank * group.size + group.rank, self.facts.num_heads)

    @property
    def sees_pixels(self) -> bool:
        """Whether this rank has the frames of a video: one of a gang does."""
        return self.group.rank == self.group.cfg_rank == 0

    def decode(self, latents: Tensor) -> Frames | None:
        """Decode, on this rank or with the whole gang; None for a rank that sees no pixels."""
        if not (self.sees_pixels or self._decodes_together):
            return None
        frames = self.model.decode(latents)
        return frames if self.sees_pixels else None

    @property
    def made_with(self) -> dict[str, str]:
        """Versions and device: what a video must be rendered with to come out the same again."""
        device = self.model.device
        is_gpu = device.type == "cuda"
        size, cfg = self.group.size, self.group.cfg_size
        ranks = f"{size} x cfg {cfg}" if cfg > 1 else str(size)
        return {
            "bachvid": __version__,
            "torch": str(torch.__version__),  # of a class of torch, which the driver has not
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

    def new_run(self) -> RunContext:
        """Return the context of one video, before its first step."""
        return RunContext(
            layout=self.layout, rotary=self.model.rotary(self.config.video), group=self.group
        )

    def new_packer(self) -> StepPacker:
        """Return a store that packs what an identity video records."""
        settings = MethodSettings.from_config(self.config.method)
        return StepPacker(
            share=self.share,
            layers=settings.vital_layers,
            branches=settings.branches,
            config_hash=config_hash(self.config),
        )

    def new_file_store(self, folder: Path) -> FileKVStore:
        """Return a store that keeps what an identity video records, as files, if it is alone."""
        settings = MethodSettings.from_config(self.config.method)
        return FileKVStore(
            folder,
            layers=settings.vital_layers,
            branches=settings.branches,
            config_hash=config_hash(self.config),
        )

    def tokenize(self, video: VideoPlan) -> TokenizedPrompt:
        """Return the tokens of a video's prompt, from the plan where it has them."""
        if video.tokens is not None:
            return video.tokens
        self._tokenizer = self._tokenizer or PromptTokenizer.load(
            self.facts, revision=self.config.model.revision
        )
        return self._tokenizer.tokenize(video.prompt)

    def denoise(
        self, run: RunContext, video: VideoPlan, control: MethodControl, *, phase: Phase
    ) -> Iterator[Denoised]:
        """Denoise one video from its seed, step by step; a pre-pass ends at the mask step."""
        return denoise(
            self.model,
            run,
            prompt_embeds=self.embeds[video.prompt.text],
            negative_embeds=self.embeds[self.config.sampling.negative_prompt],
            noise=self.model.initial_noise(video.seed, self.config.video),
            noise_seed=video.seed,
            sampling=self.config.sampling,
            control=control,
            stop_after=self.config.method.mask_step if phase == "pre_pass" else None,
        )

    def previews(self, done: Denoised) -> Iterator[PreviewFrames]:
        """Decode what a step of a main run expects, if the config wants it of this step."""
        every = self.config.output.preview_every
        if every is not None and (done.step + 1) % every == 0:
            frames = self.decode(done.estimate)
            if frames is not None:
                yield PreviewFrames(frames)

    def finish(
        self,
        latents: Tensor,
        control: MethodControl,
        *,
        seconds: dict[str, float],
        cache_bytes: int,
    ) -> RenderedVideo | None:
        """Decode the latents of a video and put together what is known about it.

        None for a rank that sees no pixels.
        """
        with timed(seconds, "decode"):
            frames = self.decode(latents)
        if frames is None:
            return None
        seen = control.observation
        return RenderedVideo(
            frames=frames,
            latents=latents.float().cpu().numpy(),
            foreground=seen.foreground.mask_N.cpu().numpy().reshape(self.layout.grid),
            matched=_matched_tokens(control.injected, self.layout.grid),
            latents_sha256=_latents_sha256(latents),
            frames_sha256=array_sha256(frames),
            seconds=seconds,
            recoveries=tuple(_recovery_text(recovery) for recovery in seen.recoveries),
            cache_bytes=cache_bytes,
        )


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


def _matched_tokens(
    injected: InjectedTokens | None, grid: tuple[int, int, int]
) -> MatchedTokens | None:
    if injected is None:
        return None
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
