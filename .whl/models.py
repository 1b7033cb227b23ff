#!/usr/bin/env python3
"""Train both embedded models on a GPU, within a budget of seconds.

    python models.py clips --work W --count 40000        # CPU only, in the background
    python models.py vae --work W --seconds 90           # waits for the clips
    python models.py latents --work W
    python models.py transformer|wan --work W --seconds 300
    python models.py pack --work W --out OUT

Every stage measures its seconds a step first, and then takes as many steps as fit.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

START = time.monotonic()

from bachvid.storybook.train import __main__ as train  # noqa: E402
from bachvid.storybook.train import common, transformer, vae, wan  # noqa: E402

A = argparse.ArgumentParser()
A.add_argument("stage")
A.add_argument("--work", type=Path, required=True)
A.add_argument("--seconds", type=float, default=60)
A.add_argument("--count", type=int, default=40_000)
A.add_argument("--easy", type=int, default=4_000)
A.add_argument("--workers", type=int, default=14)
A.add_argument("--probe", type=int, default=40)
A.add_argument("--easy-steps", type=int, default=400)
A.add_argument("--tiny", action="store_true")
A.add_argument("--out", type=Path)
args = A.parse_args()
if args.tiny:
    vae.fold_latent_statistics = lambda *a: None  # of so few steps it makes denormals, which CPUs hate
    vae._CROPS, vae.WHOLE, wan.WHOLE, transformer._BATCH = 4, 1, 1, 4
common._CHECKPOINT_SECONDS = 60.0
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
torch.set_num_threads(4 if device == "cuda" else 2)


def write(**row) -> None:
    row = {"stage": args.stage, "at_s": round(time.monotonic() - START, 1), **row}
    print(json.dumps(row), flush=True)
    with (args.work / "gpu.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def sync() -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def budget(begin: float) -> float:
    return args.seconds - (time.monotonic() - begin)


def run() -> None:
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    settings = common.Settings(work, device, 60.0, 0)
    if args.stage == "clips":
        for name, count in (("easy", args.easy), ("varied", args.count)):
            path = work / f"clips-{name}.pt"
            if not path.exists():
                clips = common.render_clips(0, count, name, workers=args.workers)
                torch.save(asdict(clips), path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
                write(clips=count, difficulty=name)
        return
    while not (work / "clips-varied.pt").exists():
        time.sleep(0.5)
    if args.stage == "vae":
        clips = train._clips(work, "varied").to(device)
        write(loaded=len(clips.frames))
        folder = work / "probe-vae"
        folder.mkdir(exist_ok=True)
        probe = common.Settings(folder, device, 60.0, 0)
        # 60 % of these steps are crops, the rest whole frames: each kind is met and timed.
        vae.train_vae(clips, probe, args.probe)
        sync()
        write(tuned=True)
        start = time.monotonic()
        (folder / "vae.pt").unlink()
        vae.train_vae(clips, probe, args.probe)
        sync()
        per = (time.monotonic() - start) / args.probe
        steps = max(args.probe, int(0.95 * budget(begin) / per))
        write(seconds_a_step=round(per, 4), steps=steps)
        torch.cuda.empty_cache() if device == "cuda" else None
        vae.train_vae(clips, settings, steps)
        sync()
        held = common.render_clips(10_000_000, 108, "varied", workers=4)
        model = train.load_vae(work).to(device)
        back = vae.reconstruct(model, held.frames)
        square = ((back.float() - held.frames.float()) / 255).square().mean(-1)
        write(
            done=True,
            psnr=float(-10 * torch.log10(square.mean())),
            psnr_figure=float(-10 * torch.log10(square[held.mask].mean())),
            psnr_head=float(-10 * torch.log10(square[held.head].mean())),
        )
        torch.save((back[:6].clone(), held.frames[:6].clone()), work / "vae-sample.pt")
        for name in ("easy", "varied"):
            encoded = transformer.encode_clips(model, train._clips(work, name), device)
            torch.save(asdict(encoded), work / f"latents-{name}.tmp")
            (work / f"latents-{name}.tmp").replace(work / f"latents-{name}.pt")
        write(latents=True, std=float(encoded.latent.float().std()))
        return
    while not (work / "latents-varied.pt").exists():
        time.sleep(0.5)
    if args.stage == "vae-wan":
        clips = train._clips(work, "varied").to(device)
        latents = train._latents(work, "varied").latent
        folder = work / "probe-vae-wan"
        folder.mkdir(exist_ok=True)
        probe = common.Settings(folder, device, 60.0, 0)
        wan.train_vae(clips, latents, probe, args.probe)
        (folder / "vae-wan.pt").unlink()
        sync()
        start = time.monotonic()
        wan.train_vae(clips, latents, probe, args.probe)
        sync()
        per = (time.monotonic() - start) / args.probe
        steps = max(args.probe, int(0.93 * budget(begin) / per))
        write(seconds_a_step=round(per, 4), steps=steps)
        wan.train_vae(clips, latents, settings, steps)
        write(done=True)
        return
    family = {"transformer": "cogvideox", "wan": "wan"}[args.stage]
    worlds = {n: train._latents(work, n) for n in ("easy", "varied")}
    scale = float(1 / worlds["varied"].latent.float().std())
    worlds = {
        n: transformer.Latents(w.latent * scale, w.token_mask, w.token_head, w.labels).to(device)
        for n, w in worlds.items()
    }
    noised = transformer.cogvideox_noised if family == "cogvideox" else wan.flow
    stage = train._stage("transformer", family)

    transformer.swapped_losses = lambda *a: {}  # it would compile for another batch
    if device == "cpu":
        torch.compiler.set_stance("force_eager")
    trainer_run = common.Trainer.run

    def within_budget(self, loss_at, *, steps, rate_at, average_decay, inspect=None, inspect_every=500):
        warm = functools.partial(common.warm_then_decay, warm=60)
        rate = transformer._RATE
        flat = {"average_decay": average_decay, "inspect": None}
        compiled = args.probe // 2
        trainer_run(self, loss_at, steps=compiled, rate_at=lambda s: rate * warm(s, steps=10**9, decay_steps=1), **flat)
        sync()
        write(compiled=True)
        start = time.monotonic()
        trainer_run(self, loss_at, steps=args.probe, rate_at=lambda s: rate * warm(s, steps=10**9, decay_steps=1), **flat)
        sync()
        per = (time.monotonic() - start) / (args.probe - compiled)
        total = max(2 * args.probe, self.step + int(0.96 * budget(begin) / per))
        decay = int(0.5 * total)
        write(seconds_a_step=round(per, 4), steps=total, decay_steps=decay)
        done = trainer_run(self, loss_at, steps=total,
                           rate_at=lambda s: rate * warm(s, steps=total, decay_steps=decay), **flat)
        sync()
        write(done=done, step=self.step, peak=torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0)
        return done

    common.Trainer.run = within_budget

    def fit():
        torch.manual_seed(0)
        return transformer.train_transformer(
            stage, train._text_to_video(family), noised,
            transformer.Prompts(only_nouns=family == "wan"),
            lambda step: worlds["easy" if step < args.easy_steps else "varied"],
            settings, steps=1, decay_steps=1,
        )

    try:
        fit()
    except Exception as error:
        if (work / f"{stage}.pt").exists():
            raise
        write(compile_failed=f"{type(error).__name__}: {error}"[:600])
        torch.compiler.set_stance("force_eager")
        fit()


def pack() -> None:
    """Averages in float16, one file each: what is shipped, and what training goes on from."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "vae-wan", "transformer", "transformer-wan"):
        path = args.work / f"{name}.pt"
        if not path.exists():
            print("missing", name)
            continue
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = {k: v for k, v in state["average"].items() if not k.startswith(("blocks.", "text_projection."))}
        half = {k: v.half() if v.is_floating_point() else v for k, v in own.items()}
        torch.save({"average": half, "step": state["step"]}, args.out / f"{name}.f16.pt")
        print(name, state["step"], (args.out / f"{name}.f16.pt").stat().st_size)
    std = None
    if (args.work / "latents-varied.pt").exists():
        std = float(torch.load(args.work / "latents-varied.pt", weights_only=True)["latent"].float().std())
    logs = {p.name: p.read_text() for p in args.work.glob("*.jsonl")}
    sample = torch.load(args.work / "vae-sample.pt") if (args.work / "vae-sample.pt").exists() else None
    torch.save({"std": std, "logs": logs, "sample": sample}, args.out / "more.pt")


pack() if args.stage == "pack" else run()
