"""The comparison of FreeScale's paper on the tiny model, where truth is known at any size.

    python -m lab.freescale_study --factor 2 --n 200        # scores, spectra, seconds, memory, and a sheet of pictures

Start at `arms`, the table of what is compared: direct inference, ScaleCrafter, DemoFusion, HiDiffusion, FreeScale and
its ablations. Every arm draws the same prompts from the same seeds. The score is strict: a repeated object counts as
wrong. Spectra are compared with drawings of the same scenes at the same size. Results are in freescale_2x.json (or 4x);
those made with the same settings and weights are kept.
"""
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from command import InputError, run_command
from freescale import FreeScale
from highres import DemoFusion, HiDiffusion, ScaleCrafter
from lab import shapes, study
from lab.evaluate import draw, make_scenes, measure_arms, sample
from lab.study import Arm, Results, Row
from memory import measure

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


def arms(size: int, factor: int) -> dict[str, Arm]:
    """What is compared at `factor` times the size of the training pictures."""
    large, free = dict(height=size * factor, width=size * factor), FreeScale(factor)
    table = {"training size": ("the native size", {}),
             "direct": ("the large size without any technique", large),
             "ScaleCrafter": ("dilated convolutions", large | {"highres": ScaleCrafter()}),
             "HiDiffusion": ("smaller maps in deep layers, windows in self-attention",
                             large | {"highres": HiDiffusion()}),
             "DemoFusion": ("windows and interleaved parts, in stages", large | {"highres": DemoFusion()})}
    table |= {name: (f"FreeScale, {changes or 'its defaults'}", {"freescale": replace(free, **changes)})
              for name, changes in FREESCALE.items()}
    return {name: Arm(name, *what, base="FreeScale", primary=name == "direct") for name, what in table.items()}


def power(picture: np.ndarray, bins: int = 16) -> np.ndarray:
    """Power of the gray picture in rings of equal width, lowest frequency first. (bins,)"""
    gray = picture.astype(float).mean(axis=2) / 255
    square = np.abs(np.fft.fft2(gray - gray.mean())) ** 2 / gray.size
    fy, fx = (np.fft.fftfreq(n) * 2 for n in gray.shape)
    radius = np.hypot(fy[:, None], fx[None, :])
    return np.array([square[(radius > k / bins) & (radius <= (k + 1) / bins)].mean() for k in range(bins)])


def log_spectrum(powers: list[Any]) -> np.ndarray:
    """Log of the mean power of pictures. (bins,)"""
    return np.log10(np.mean(powers, axis=0) + 1e-12)


def facts(picture: np.ndarray, prompt: str) -> Row:
    """What is noted of a picture beside its score: objects asked for and found, and power."""
    return {"asked": sum(ask.count for ask in shapes.parse(prompt).asks), "found": len(shapes.read(picture)),
            "power": [float(f"{x:.6g}") for x in power(picture)]}


def summary(rows: list[Row], real: np.ndarray) -> Row:
    """Shares of pictures with too many and too few objects, and the distance of spectra from that of drawings."""
    own = log_spectrum([row["power"] for row in rows])
    return {"too many": float(np.mean([row["found"] > row["asked"] for row in rows])),
            "too few": float(np.mean([row["found"] < row["asked"] for row in rows])),
            "spectrum": own.tolist(), "spectrum of drawings": real.tolist(),
            "distance of spectra": float(np.abs(own - real).mean())}


def main() -> None:
    parser = study.flags("FreeScale and its rivals on the tiny model, judged exactly.",
                         "model out arms n seed steps sampler cfg_scale device", {
                             "batch_size": (10, "pictures per batch"), "columns": (8, "pictures per arm on the sheet")},
                         out=Path("out/freescale"), n=200)
    parser.add_argument("--factor", type=int, default=2, choices=[2, 4], help="times the training size")
    parser.add_argument("--kind", default="colors", help=", ".join(shapes.KINDS))
    args = parser.parse_args()
    if args.kind not in shapes.KINDS:
        raise InputError(f"--kind is one of {', '.join(shapes.KINDS)}")
    sd, made_with = study.load(args, "lab.freescale_study", (args.steps,), n=1, batch_size=1, columns=1, seed=0)
    known = arms(sd.config.size, args.factor)
    run = [known[name] for name in study.choose(known, args.arms)]
    settings = dict(steps=args.steps, sampler=args.sampler, cfg_scale=args.cfg_scale)
    prompts, scenes = make_scenes(args.kind, args.n, 40_000 + args.seed)
    name, side, shown = f"freescale_{args.factor}x", sd.config.size * args.factor, min(args.columns, args.n)
    results = Results(args.out / f"{name}.json", made_with | {"factor": args.factor, "kind": args.kind})

    def more(_: Arm, batch: list[int], images: Tensor, drawn: list[np.ndarray]) -> list[Row]:
        return [facts(picture, prompts[k]) for k, picture in zip(batch, drawn)]

    def totals(arm: Arm, rows: list[Row]) -> Row:
        size = sd.config.size if arm.name == "training size" else side
        real = log_spectrum([power(shapes.draw(scene, size, size)) for scene in scenes])
        once = dict(settings, steps=2, sampler="ddim")                 # memory is the same at every step
        cost = measure(lambda: sample(sd, prompts[:1], 0, once | arm.settings), sd.unet, sd.vae, *sd.text_encoders)
        return summary(rows, real) | {"seconds": float(np.mean([row["seconds"] for row in rows])),
                                      "peak GB": cost.peak / 1e9}
    columns = {"too many": ("too many", ".3f"), "too few": ("too few", ".3f"), "GB": ("peak GB", ".3f"),
               "spectra": ("distance of spectra", ".3f"), "seconds": ("seconds", ".2f")}
    measure_arms(sd, results, known.values(), run, prompts, args.seed, args.batch_size, settings, more, totals,
                 columns=columns)
    pictures = [(arm.name, draw(sd, prompts[:shown], args.batch_size, args.seed, settings | arm.settings))
                for arm in run]
    pictures.append(("drawings", [shapes.draw(scene, side, side) for scene in scenes[:shown]]))
    study.sheet(pictures, args.out / f"{name}.png")
    print(args.out / f"{name}.png")


if __name__ == "__main__":
    run_command(main)
