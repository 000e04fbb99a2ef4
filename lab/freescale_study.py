"""The comparison of FreeScale's paper on the tiny model, where truth is known at any size.

    python -m lab.freescale_study --factor 2 --n 200        # scores, spectra, seconds, memory, and a sheet of pictures

Start at `arms`, the table of what is compared: direct inference, ScaleCrafter, DemoFusion, HiDiffusion, FreeScale and
its ablations. Every arm draws the same prompts from the same seeds. The score is strict: nothing may be missing and
there may not be one object more, so a repeated object counts as wrong. Spectra are compared with drawings of the same
scenes at the same size. Results go to freescale_2x.json (or 4x); an arm that is there, made with the same settings and
weights, is not made again.
"""
import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from folder import TINY, InputError, read_config, replacing, run_command
from freescale import FreeScale
from highres_baselines import demo_fusion, hidiffusion, scale_crafter
from lab import shapes
from lab.evaluate import wilson
from memory import measure
from sampler import SAMPLERS, plan
from txt2img import StableDiffusion

Arm = Callable[[int], dict[str, Any]]                                  # a seed -> arguments of `sd.sample`

FREESCALE = {                                                          # what differs from the settings' defaults
    "FreeScale": {},
    "without fusion": {"attention": "global"},
    "local only": {"attention": "local"},
    "without dilation": {"dilate": 0.0},
    "latent upsampling": {"upsample": "latent"},
    "alpha 0.5": {"detail": 0.5},
    "alpha 1": {"detail": 1.0},
    "blur official": {"blur": "official"},
    "fast": {"fast": True},
}


def arms(sd: StableDiffusion, factor: int, guided: bool = True) -> dict[str, Arm]:
    """What is compared at `factor` times the training size, as arguments of `sd.sample`. guided: cfg_scale isn't 1."""
    size, native = sd.config.size, sd.config.size // sd.config.vae.factor
    sizes = tuple((size * 2 ** k, size * 2 ** k) for k in range(factor.bit_length()))
    large, free = dict(height=size * factor, width=size * factor), FreeScale(sizes)

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def demo(seed: int) -> dict[str, Any]:
        steps = FreeScale(sizes, upsample="latent", restart=0.0, detail=3.0, attention="global", dilate=0.0)
        return dict(model=demo_fusion(sd.unet, native, generator(seed)), freescale=steps)
    table = {
        "training size": lambda seed: {},
        "direct": lambda seed: large,
        "ScaleCrafter": lambda seed: dict(large, model=scale_crafter(sd.unet, native, guided)),
        "HiDiffusion": lambda seed: dict(large, model=hidiffusion(sd.unet, native, generator(seed))),
        "DemoFusion": demo,
    }
    for name, changes in FREESCALE.items():
        table[name] = lambda seed, changes=changes: dict(freescale=replace(free, **changes))
    return table


def make_scenes(kind: str, n: int, seed: int) -> tuple[list[str], list[shapes.Scene]]:
    """n captions of a kind and the scenes they describe."""
    rng, captions, scenes = np.random.default_rng(seed), [], []
    for _ in range(n):
        scenes.append(shapes.random_scene(rng, kind))
        captions.append(shapes.caption(scenes[-1], rng, kind))
    return captions, scenes


def draw_pictures(sd: StableDiffusion, prompts: list[str], arm: Arm, settings: dict[str, Any], seed: int,
                  batch: int) -> list[np.ndarray]:
    """One picture (H, W, 3) of bytes a prompt; picture k has seed + k."""
    pictures = []
    for start in tqdm(range(0, len(prompts), batch), unit="batch", leave=False):
        latents = sd.sample(prompts[start:start + batch], seed=seed + start, **settings, **arm(seed + start))
        pictures += list((sd.decode(latents) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return pictures


def log_spectrum(pictures: list[np.ndarray], bins: int = 16) -> Tensor:
    """Mean log power of the gray pictures in rings of equal width, lowest frequency first. (bins,)"""
    gray = torch.from_numpy(np.stack(pictures)).float().mean(dim=3) / 255
    power = torch.fft.fft2(gray - gray.mean((1, 2), keepdim=True)).abs().square().mean(dim=0) / gray[0].numel()
    fy, fx = (torch.fft.fftfreq(n) * 2 for n in gray.shape[1:])
    radius = torch.hypot(fy[:, None], fx[None, :])
    rings = [(radius > k / bins) & (radius <= (k + 1) / bins) for k in range(bins)]
    return torch.stack([torch.log10(power[ring].mean() + 1e-12) for ring in rings])


def judge_arm(pictures: list[np.ndarray], prompts: list[str], scenes: list[shapes.Scene]) -> dict[str, Any]:
    """The numbers of an arm: score, its interval, objects too many, and distance of the spectrum from real drawings."""
    height, width = pictures[0].shape[:2]
    asked = [sum(ask.count for ask in shapes.parse(prompt).asks) for prompt in prompts]
    found = [len(shapes.read(picture)) for picture in pictures]
    right = [bool(shapes.judge(picture, prompt)) for picture, prompt in zip(pictures, prompts)]
    real = log_spectrum([shapes.draw(scene, height, width) for scene in scenes])
    own = log_spectrum(pictures)
    return {"right": "".join(str(int(r)) for r in right), "score": float(np.mean(right)),
            "interval": list(wilson(float(np.mean(right)), len(right))),
            "too many": float(np.mean([f > a for f, a in zip(found, asked)])),
            "too few": float(np.mean([f < a for f, a in zip(found, asked)])),
            "spectrum": own.tolist(), "spectrum of drawings": real.tolist(),
            "distance of spectra": (own - real).abs().mean().item()}


def picture_sheet(rows: dict[str, list[np.ndarray]], path: Path, side: int = 128, left: int = 120) -> None:
    """Every arm's pictures of the same prompts and seeds, a row an arm."""
    columns = max(len(row) for row in rows.values())
    sheet = Image.new("RGB", (left + columns * (side + 4), len(rows) * (side + 4)), "white")
    for y, (name, row) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((4, y * (side + 4) + side // 2), name, fill="black")
        for x, picture in enumerate(row):
            small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + x * (side + 4), y * (side + 4)))
    with replacing(path) as part:
        sheet.save(part, format="PNG")


def read_results(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"can't read the results in {path} ({error}); move it, or choose another --out") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="FreeScale and its rivals on the tiny model, judged exactly.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="model folder")
    parser.add_argument("--out", type=Path, default=Path("out/freescale"), help="folder for the sheet and the numbers")
    parser.add_argument("--factor", type=int, default=2, choices=[2, 4], help="times the training size")
    parser.add_argument("--arms", help="some of them, separated by commas (default: all)")
    parser.add_argument("--kind", default="colors", help=", ".join(shapes.KINDS))
    parser.add_argument("--n", type=int, default=200, help="pictures an arm")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="ddim", help=", ".join(SAMPLERS))
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--columns", type=int, default=8, help="pictures of an arm on the sheet")
    args = parser.parse_args()
    for flag, least in (("n", 1), ("batch_size", 1), ("columns", 1), ("seed", 0)):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} must be {least} or more")
    try:
        plan(args.sampler, args.steps)
    except ValueError as error:
        raise InputError(str(error)) from None
    if args.kind not in shapes.KINDS:
        raise InputError(f"--kind is one of {', '.join(shapes.KINDS)}")
    if read_config(args.model).family != "tiny":
        raise InputError(f"{args.model} wasn't trained on the drawn world, so its pictures can't be judged")
    sd = StableDiffusion.load(args.model)
    table = arms(sd, args.factor, args.cfg_scale != 1)
    names = list(table) if args.arms is None else [name.strip() for name in args.arms.split(",")]
    for name in names:
        if name not in table:
            raise InputError(f"there is no arm {name!r}; there are {', '.join(table)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {args.out} ({error.strerror}); choose another --out") from None

    settings = dict(steps=args.steps, sampler=args.sampler, cfg_scale=args.cfg_scale)
    weights = hashlib.sha256((args.model / "unet.safetensors").read_bytes()).hexdigest()[:16]
    made_with = {"U-Net": weights, "factor": args.factor, "kind": args.kind, "n": args.n, "seed": args.seed, **settings}
    prompts, scenes = make_scenes(args.kind, args.n, 40_000 + args.seed)
    path, rows = args.out / f"freescale_{args.factor}x.json", {}
    print(f"arm                right (95 % interval)    too many  too few  spectra   s a picture   GB   n = {args.n}")
    for name in names:
        shown = min(args.columns, args.n)
        arm = read_results(path).get(name, {})
        if arm.get("made with") != made_with:
            started = time.perf_counter()
            pictures = draw_pictures(sd, prompts, table[name], settings, args.seed, args.batch_size)
            seconds = (time.perf_counter() - started) / args.n
            once = dict(settings, steps=2, sampler="ddim")             # memory is the same at every step
            cost = measure(lambda: sd.decode(sd.sample(prompts[0], **once, **table[name](0))), sd.unet, sd.vae,  # noqa: B023
                           *sd.text_encoders)
            arm = {"made with": made_with, **judge_arm(pictures, prompts, scenes), "seconds": seconds,
                   "peak GB": cost.peak / 1e9}
            results = read_results(path)
            with replacing(path) as part:
                part.write_text(json.dumps({**results, name: arm}, indent=1) + "\n")
        else:
            pictures = draw_pictures(sd, prompts[:shown], table[name], settings, args.seed, args.batch_size)
        rows[name] = pictures[:shown]
        low, high = arm["interval"]
        print(f"{name:18s} {arm['score']:.3f} ({low:.3f} to {high:.3f})   {arm['too many']:8.3f} {arm['too few']:8.3f} "
              f"{arm['distance of spectra']:8.3f} {arm['seconds']:13.2f} {arm['peak GB']:6.3f}", flush=True)
    height = sd.config.size * args.factor
    rows["drawings"] = [shapes.draw(scene, height, height) for scene in scenes[:args.columns]]
    picture_sheet(rows, args.out / f"freescale_{args.factor}x.png")
    print(args.out / f"freescale_{args.factor}x.png")


if __name__ == "__main__":
    run_command(main)
