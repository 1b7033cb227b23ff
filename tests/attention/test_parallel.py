"""Joining and leaving a gang of one; larger ones are tested in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

from bachvid.attention.parallel import join_group, share_decoder
from bachvid.layout.gangs import Gang
from bachvid.layout.tokens import TokenLayout

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
def test_one_rank_has_everything_and_may_join_again(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "is put back after the test")
    layout = TokenLayout(text_tokens=2, latent_frames=3, grid_height=1, grid_width=1)
    x = torch.randn(2, layout.joint_tokens, 4, 3, device=device)
    for meeting in ("first", "second"):
        group = join_group(Gang(), 0, device=torch.device(device), init_file=tmp_path / meeting)
        assert (group.rank, group.size, group.cfg_rank, group.cfg_size) == (0, 1, 0, 1)
        for same in (
            group.to_heads(x, layout),
            group.to_tokens(x, layout),
            group.gather_tokens(x, layout.joint_tokens),
            group.sum(x),
            group.from_cond(x),
        ):
            assert torch.equal(same, x)
        group.close()


def test_the_ranks_share_the_decoder_of_wan_and_no_other(
    tmp_path: Path, tiny_wan_folder: Path, tiny_cogvideox_folder: Path
) -> None:
    group = join_group(Gang(), 0, device=torch.device("cpu"), init_file=tmp_path / "meeting")
    wan = AutoencoderKLWan.from_pretrained(tiny_wan_folder, subfolder="vae")
    latents = torch.randn(1, wan.config.z_dim, 2, 4, 4)
    with torch.no_grad():
        expected = wan.decode(latents).sample
        assert share_decoder(wan)
        assert type(wan.decoder).__module__.startswith("distvae")
        torch.testing.assert_close(wan.decode(latents).sample, expected)
    cogvideox = AutoencoderKLCogVideoX.from_pretrained(tiny_cogvideox_folder, subfolder="vae")
    assert not share_decoder(cogvideox)
    group.close()
