"""Controls that observe a video (its mask and features) and record what readers need.

Shape suffixes: see `bachvid.attention.control`.
"""

from __future__ import annotations

from torch import Tensor

from bachvid.attention.control import QKV
from bachvid.errors import LayoutError
from bachvid.kv.cache import Shard
from bachvid.layout.gangs import Branch
from bachvid.layout.records import AttentionSite, Records
from bachvid.methods.base import Observation, RunControl, RunInputs
from bachvid.methods.masking import ResolvedMaskConfig
from bachvid.methods.ops.masks import ForegroundMask, extract_foreground_mask, text_mass


class VideoObserver(RunControl):
    """Extracts the mask of a video and keeps its features. Changes nothing.

    It observes the conditional branch, at the mask step or at every step up to it. Every rank of a
    group gets the mask of the whole video, and the features of its own positions.
    """

    def __init__(
        self,
        given: RunInputs,
        config: ResolvedMaskConfig,
        match_layers: tuple[int, ...],
        *,
        every_step: bool = False,
    ) -> None:
        self.context, self.prompt = given.context, given.prompt
        self.config, self.match_layers = config, match_layers
        self._mask_steps = range(0 if every_step else config.mask_step, config.mask_step + 1)
        self._masses: dict[int, Tensor] = {}
        self._features: dict[int, Tensor] = {}
        self.masks: dict[int, ForegroundMask] = {}  # by step

    @property
    def observation(self) -> Observation | None:
        """What was seen of the video; None before the mask step is over."""
        mask = self.masks.get(self.config.mask_step)
        if mask is None or len(self._features) < len(self.match_layers):
            return None
        recoveries = (mask.recovery for _, mask in sorted(self.masks.items()))
        return Observation(mask, self._features, tuple(found for found in recoveries if found))

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        """Add the text mass of a mask layer, where the text is in the joint sequence."""
        layout, rotary = self.context.layout, self.context.rotary
        if not layout.text_tokens or not self._looks_for_mask(site):
            return qkv
        _check_one_video(qkv.query_BSHD)
        if self.config.mask_softmax == "joint":
            key_BKHD = rotary.rotate_joint(qkv.key_BSHD, layout)
        else:
            key_BKHD = self._words(qkv.key_BSHD)
        query_BNHD = rotary.rotate(qkv.query_BSHD[:, layout.video_rows])
        mass_NG = text_mass(query_BNHD[0], key_BKHD[0], self._segments)
        group = self.context.group
        self._add_mass(site, group.sum(mass_NG) / group.size)  # the mean over all heads
        return qkv

    def cross(self, site: AttentionSite, query_BSHD: Tensor, key_BTHD: Tensor) -> None:
        """Add the text mass of a mask layer, where the text has an attention of its own."""
        if not self._looks_for_mask(site):
            return
        _check_one_video(query_BSHD)
        is_joint = self.config.mask_softmax == "joint"
        key_BKHD = key_BTHD if is_joint else self._words(key_BTHD)
        mass_NG = text_mass(query_BSHD[0], key_BKHD[0], self._segments)
        self._add_mass(site, self.context.gather_positions(mass_NG))

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        """Keep this rank's video rows of the match layers at the mask step, in host memory."""
        is_wanted = site.layer in self.match_layers and site.step == self.config.mask_step
        if self._looks_at(site.branch) and is_wanted:
            rows_NC = out_BSC[0, self.context.layout.text_tokens :].clone()
            # All layers would take a tenth of what a GPU needs for a video, up to its end.
            self._features[site.layer] = self.context.group.from_cond(rows_NC).cpu()
        return out_BSC

    @property
    def _segments(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.prompt.rows["background"], self.prompt.rows["character"]

    def _words(self, key_BTHD: Tensor) -> Tensor:
        """Cut off the end token: it collects attention that belongs to no word."""
        return key_BTHD[:, : self.prompt.num_tokens - 1]

    def _looks_at(self, branch: Branch) -> bool:
        """Whether to observe a branch: the conditional one; with cfg ranks, the rank's own."""
        return branch == "cond" or self.context.group.cfg_size > 1

    def _looks_for_mask(self, site: AttentionSite) -> bool:
        is_wanted = site.layer in self.config.mask_layers and site.step in self._mask_steps
        return is_wanted and self._looks_at(site.branch)

    def _add_mass(self, site: AttentionSite, mass_NG: Tensor) -> None:
        """Keep a layer's mass; the last layer completes the step's mask."""
        layers = self.config.mask_layers
        self._masses[site.layer] = self.context.group.from_cond(mass_NG)
        if site.layer != layers[-1]:  # they are in rising order
            return
        # An early mask only steers the pre-pass: on_empty_mask speaks of the final one.
        final = site.step == self.config.mask_step
        self.masks[site.step] = extract_foreground_mask(
            [self._masses[layer] for layer in layers],
            self.context.layout,
            step=site.step,
            morphology=self.config.morphology,
            on_empty=self.config.on_empty_mask if final else "adapt",
        )


def _check_one_video(query_BSHD: Tensor) -> None:
    if len(query_BSHD) != 1:
        raise LayoutError(
            f"{len(query_BSHD)} videos in one batch: masks and matches are of one video; render "
            f"one video at a time"
        )


class IdentityRecorder(VideoObserver):
    """Records keys and values of an identity video at the steps of its run. Changes nothing."""

    def __init__(
        self,
        given: RunInputs,
        config: ResolvedMaskConfig,
        records: Records,
        match_layers: tuple[int, ...],
    ) -> None:
        super().__init__(given, config, match_layers)
        self._sink, self._records = given.sink, records
        self._steps = frozenset(given.run.records)

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        """Put a copy of this site's video rows into the sink, then look for the mask."""
        if self._sink is not None and site.step in self._steps and self._records.kinds(site):
            # Copies: a slice would keep the queries' memory, and the text's, alive.
            rows = self.context.layout.video_rows
            key_BMHD, value_BMHD = qkv.key_BSHD[:, rows], qkv.value_BSHD[:, rows]
            self._sink.put(Shard(site, {"key": key_BMHD.clone(), "value": value_BMHD.clone()}))
        return super().before(site, qkv)
