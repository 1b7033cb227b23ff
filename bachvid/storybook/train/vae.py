"""Train the video autoencoder of the storybook model."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from torch import Tensor, nn

from bachvid.storybook import model as storybook
from bachvid.storybook.train.common import Clips, Settings, Trainer, to_video, warm_then_decay

_CROPS, WHOLE = 64, 16  # clips of a step: quarters of frames, whole frames
_SHOWN = 4  # clips of a step of the decoder alone
LATENT_NOISE = 0.1  # of their deviation: what sampled latents are off, at least


def reconstruction_losses(
    decoded: Tensor, video: Tensor, figure: Tensor, head: Tensor
) -> dict[str, Tensor]:
    """Return the loss of decoded clips [B, 3, F, H, W], larger in the character and its head.

    figure and head are 0 or 1, [B, 1, F, H, W]. The error of differences between neighbours in
    time and space keeps motion and edges sharp.
    """
    weight = 1 + 3 * figure + 2 * head
    error = decoded - video
    pixel = (weight * (error.abs() + 2 * error.square())).mean()
    edges = sum(
        (weight.narrow(d, 1, error.shape[d] - 1) * error.diff(dim=d).abs()).mean()
        for d in (2, 3, 4)
    )
    square = (error.clamp(-2, 2) / 2).square().mean(1, keepdim=True)
    return {
        "loss": pixel + 0.5 * edges,
        "psnr": -10 * torch.log10(square.mean()),
        "psnr_figure": -10 * torch.log10((square * figure).sum() / figure.sum().clamp(min=1)),
    }


def keep_float32(module: nn.Module) -> None:
    """Run a module in float32 under autocast too.

    The last convolution of a decoder, to 3 channels: on CPUs its gradient is not finite in
    bfloat16 (torch 2.13).
    """
    forward = module.forward

    def in_float32(inputs: Tensor, *args: object) -> object:
        with torch.autocast(inputs.device.type, enabled=False):
            return forward(inputs.float(), *args)

    module.forward = in_float32


def train_vae(clips: Clips, settings: Settings, steps: int) -> bool:
    """Train the autoencoder: random crops for 60 % of the steps, then whole frames.

    When the crops end, per-channel mean and deviation of the latents are folded into the weights,
    as a pipeline knows one scalar only; the whole frames then heal what the fold did to borders.
    """
    torch.manual_seed(settings.seed)
    device = settings.device
    vae = storybook.build_vae().to(device)
    keep_float32(vae.decoder.conv_out)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, (0.9, 0.98), weight_decay=1e-3)
    trainer = Trainer(settings, "vae", vae, [optimizer])
    crop_steps = int(0.6 * steps)
    clips = clips.to(device)

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == crop_steps:
            fold_latent_statistics(vae, to_video(clips.frames[:256]))
            trainer.average = {k: v.detach().clone() for k, v in vae.state_dict().items()}
        size = storybook.FRAME_SIZE // (2 if step < crop_steps else 1)
        count = _CROPS if step < crop_steps else WHOLE
        rows = torch.randint(len(clips.frames), (count,), generator=generator, device=device)
        place = torch.Generator().manual_seed(generator.initial_seed())
        last = (storybook.FRAME_SIZE - size) // 4
        top, left = (4 * torch.randint(last + 1, (2,), generator=place)).tolist()
        window = (slice(top, top + size), slice(left, left + size))
        video = to_video(clips.frames[rows][:, :, *window])
        figure, head = (x[rows][:, None, :, *window].float() for x in (clips.mask, clips.head))
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(video).latent_dist
            latent = posterior.mean.float()
            spread = posterior.logvar.float()
            noise = torch.randn(latent.shape, generator=generator, device=device)
            decoded = vae.decode(latent + noise * torch.exp(0.5 * spread)).sample.float()
        losses = reconstruction_losses(decoded, video, figure, head)
        divergence = 0.5 * (latent.square() + spread.exp() - 1 - spread).mean()
        losses["loss"] = losses["loss"] + 2e-4 * divergence
        return {**losses, "divergence": divergence}

    def rate_at(step: int) -> float:
        return warm_then_decay(step, warm=100, steps=steps, decay_steps=int(0.5 * steps))

    return trainer.run(loss_at, steps=steps, rate_at=rate_at, average_decay=0.995)


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKLCogVideoX, video: Tensor) -> None:
    """Make the latents of `video` zero-mean and unit-variance per channel, by changing weights."""
    latent = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(video, 32)])
    mean, deviation = latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4))
    outward = vae.encoder.conv_out.conv
    half = len(mean)
    outward.weight[:half] /= deviation.view(-1, 1, 1, 1, 1)
    outward.bias[:half] = (outward.bias[:half] - mean) / deviation
    outward.bias[half:] -= 2 * deviation.log()  # the posterior's log variance
    inward = [vae.decoder.conv_in.conv]
    for module in vae.decoder.modules():
        if isinstance(module, CogVideoXSpatialNorm3D):
            inward += [module.conv_y.conv, module.conv_b.conv]
    for conv in inward:
        conv.bias += torch.einsum("oithw,i->o", conv.weight, mean)
        conv.weight *= deviation.view(1, -1, 1, 1, 1)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLCogVideoX, frames: Tensor) -> Tensor:
    """Return uint8 clips [N, F, H, W, 3] as the autoencoder gives them back."""
    device, back = vae.device, []
    for part in torch.split(frames, 32):
        with torch.autocast(device.type, torch.bfloat16):
            decoded = vae.decode(vae.encode(to_video(part).to(device)).latent_dist.mean).sample
        pixels = ((decoded.float() + 1) * 127.5).round().clamp(0, 255)
        back.append(pixels.permute(0, 2, 3, 4, 1).to(torch.uint8).cpu())
    return torch.cat(back)


def train_decoder(
    vae: AutoencoderKLCogVideoX, clips: Clips, latents: Tensor, settings: Settings, steps: int
) -> bool:
    """Train the decoder on, to show the latents [N, F, C, h, w] of clips: these do not change."""
    torch.manual_seed(settings.seed)
    device = settings.device
    decoder = vae.to(device).train().decoder
    keep_float32(decoder.conv_out)
    optimizer = torch.optim.AdamW(decoder.parameters(), 1e-3, (0.9, 0.98), weight_decay=1e-3)
    trainer = Trainer(settings, "decoder", decoder, [optimizer])
    clips, latents = clips.to(device), latents.to(device)
    noise_scale = LATENT_NOISE * float(latents[:1000].float().std())

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(clips.frames), (_SHOWN,), generator=generator, device=device)
        latent = latents[rows].float().transpose(1, 2).contiguous()
        noise = noise_scale * torch.randn(latent.shape, generator=generator, device=device)
        with torch.autocast(device, torch.bfloat16):
            decoded = vae.decode(latent + noise).sample.float()
        figure, head = (x[rows][:, None].float() for x in (clips.mask, clips.head))
        return reconstruction_losses(decoded, to_video(clips.frames[rows]), figure, head)

    def rate_at(step: int) -> float:
        return warm_then_decay(step, warm=100, steps=steps, decay_steps=int(0.6 * steps))

    return trainer.run(loss_at, steps=steps, rate_at=rate_at, average_decay=0.998)
