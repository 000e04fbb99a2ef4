"""What motivates caches, and what they cost: features over the steps, and quality against speed on the tiny model.

    python -m lab.cache_study --curves                 # how the U-Net's features change over the steps, on any model
    python -m lab.cache_study --curves --measure       # also the exact score of every schedule, and pictures of some

Start at `curves` and `arms`. Encoder and decoder are compared as in Faster Diffusion's paper, figures 2 and 3: how far
each level's output moves from one step to the next. `Watch` sees it from a cache's place in the U-Net, reusing nothing.
What is there already, made with the same settings and weights, is not made again; all numbers are in cache.json.
Sources: Faster Diffusion, arXiv 2312.09608; DeepCache, arXiv 2312.00858, which has the same curves for its branch.
"""
import argparse
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.cache import against_first, alternate
from cache import DeepCache, FasterDiffusion, Features, Inherit, TGate
from command import InputError, run_command
from folder import TINY, read_config
from freeu import PRESETS, FreeU
from lab.evaluate import evaluate
from lab.freeu_study import (
    PROMPTS,
    TINY_PROMPTS,
    fill,
    mixed_prompts,
    paired_interval,
    pyplot,
    read_json,
    save,
    sheet,
    write_json,
)
from memory import run_macs
from pictures import psnr
from sampler import SAMPLERS, plan
from stable_diffusion import StableDiffusion
from unet import UNet

# ---------------------------------------------------------------------------------------------- features over the steps


@dataclass
class Watch(Features):
    """Goes where a run's `Features` goes, lets everything run, and notes how every unit's output moves.

    images: how many of the batch's last rows to look at: with guidance the first half follows the negative prompt.
    moved, size: by step and unit, of every image: the change from the step before over its norm, root mean square.
    """
    images: int = 1
    moved: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    size: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def output(self, unit: int, h: Tensor) -> Tensor:
        now, before = h[-self.images:].float().flatten(1), self.kept.get(unit)
        if before is not None:
            self.moved[self.step, unit] = ((now - before).norm(dim=1) / before.norm(dim=1)).cpu()
        self.size[self.step, unit] = now.square().mean(dim=1).sqrt().cpu()
        self.kept[unit] = now
        return h


class Watching:
    """The settings that make a `Watch`, in a cache's place: `watch` is the last one."""

    def __init__(self, images: int):
        self.images = images

    def start(self, steps: int, more: set[int], unet: UNet) -> Watch:
        self.watch = Watch(frozenset(range(steps)), steps, len(unet.up_units()), images=self.images)
        return self.watch


def curves(sd: StableDiffusion, prompts: list[str], settings: dict[str, Any], seed: int, out: Path) -> dict[str, Any]:
    """Draws how each level's output changes from the step before, relative to its norm; numbers, with intervals."""
    watching = Watching(len(prompts))
    sd.sample(prompts, seed=seed, cache=watching, **settings)
    n, per, steps = watching.watch.up_units, sd.config.unet.layers + 1, settings["steps"]
    levels = n // per
    encoder = {f"level {k}": per * k + per - 1 for k in range(levels)} | {"mid": n}            # before downsampling
    decoder = {f"level {levels - 1 - k}": n + per * (k + 1) for k in range(levels)}            # behind upsampling
    colors = dict(zip([f"level {k}" for k in range(levels)] + ["mid"], pyplot().get_cmap("tab10").colors))
    figure, axes = pyplot().subplots(2, 2, figsize=(10, 7), sharex=True, sharey="row", layout="constrained")
    numbers: dict[str, Any] = {"images": len(prompts)}
    for column, (half, units) in enumerate((("encoder", encoder), ("decoder", decoder))):
        moved = {name: torch.stack([watching.watch.moved[i, unit] for i in range(1, steps)])       # (steps - 1, images)
                 for name, unit in units.items()}
        for name, of in moved.items():
            size = torch.stack([watching.watch.size[i, units[name]] for i in range(steps)]).mean(dim=1)
            axes[0, column].plot(range(1, steps), of.mean(dim=1), color=colors[name], label=name)
            axes[1, column].plot(range(steps), size, color=colors[name], label=name)
            numbers[f"{half}, {name}"] = {"moved": of.mean(dim=1).tolist(), "size": size.tolist()}
        each = torch.stack(list(moved.values())).mean(dim=(0, 1)).numpy()                           # of every image
        numbers[f"{half}, mean over levels and steps"] = [float(each.mean()), *interval(each)]
        axes[0, column].set(title=half, yscale="log")
        axes[0, column].legend(fontsize=7)
        axes[1, column].set(xlabel="step", yscale="log")
    axes[0, 0].set_ylabel("change from the step before, relative")
    axes[1, 0].set_ylabel("root mean square")
    save(figure, f"Outputs of the U-Net's levels over {steps} steps, mean of {len(prompts)} images", out / "curves.png")
    return numbers


# ------------------------------------------------------------------------------------------------ quality against speed

class Arm(NamedTuple):
    """One way to sample: a group (a line in the figure), the arguments of `sd.sample`, and what it is compared with."""
    group: str
    settings: dict[str, Any]
    base: str = "base"


def arms(steps: int) -> dict[str, Arm]:
    """What is compared, by name. "fewer steps" is the plain model at a cache's price."""
    gate, center = max(2 * steps // 5, 1), 3 * steps // 10
    freeu = FreeU(*PRESETS[2]["tiny"])
    table = {"base": Arm("base", {})}
    table |= {f"{steps // k} steps": Arm("fewer steps", {"steps": steps // k}) for k in (2, 3, 5)}
    table |= {f"DeepCache b{b} N{k}": Arm(f"DeepCache b{b}", {"cache": DeepCache(k, b)})
              for b in (0, 1, 3) for k in (2, 3, 5, 10)}
    table |= {f"DeepCache b1 N5 {rule}": Arm(f"DeepCache b1, {rule} keys",
                                             {"cache": DeepCache(5, 1, center, schedule=rule)})
              for rule in ("released", "paper")}
    table |= {f"Faster {keys}{', noise' if alpha else ''}": Arm(f"Faster Diffusion{', noise' if alpha else ''}",
                                                                {"cache": FasterDiffusion(keys, alpha=alpha)})
              for alpha in (0.0, 0.003) for keys in ("paper", "rescaled", 2, 5, 10)}
    table |= {"Faster paper, parallel": Arm("Faster Diffusion, parallel",
                                            {"cache": FasterDiffusion("paper", parallel=True)})}
    table |= {"inherit d4-u7 N3": Arm("inherit", {"cache": Inherit("d4-u7", 3)})}
    table |= {f"T-GATE {gate}{name}": Arm("T-GATE", {"tgate": TGate(gate, **choice)}) for name, choice in (
        ("", {}), (", guidance kept", {"guidance": "keep"}), (", text computed", {"text": "compute"}))}
    table |= {"FreeU": Arm("FreeU", {"freeu": freeu})}
    table |= {f"FreeU + {name}": Arm("FreeU + cache", {"freeu": freeu, "cache": cache}, "FreeU") for name, cache in (
        ("DeepCache b1 N3", DeepCache(3, 1)), ("Faster paper", FasterDiffusion("paper")))}
    return table


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of a mean."""
    return paired_interval(values, np.zeros(len(values)))


def measure(sd: StableDiffusion, table: dict[str, Arm], settings: dict[str, Any], made_with: dict[str, Any], n: int,
            seed: int, out: Path) -> None:
    """Every arm draws the same n prompts from the same noise: score, lead over its base, likeness, arithmetic."""
    path, prompts, verdicts = out / "cache.json", mixed_prompts(n, seed=50_000 + seed), {}
    side, tokens = sd.config.size // sd.config.vae.factor, sd.config.text_encoder.length
    full = run_macs(sd.unet, side, side, settings["steps"], tokens=tokens)
    print(f"{'arm':28s} arithmetic  score (95 % interval)   over its base (paired)     PSNR   n = {n}")
    for name, arm in table.items():
        made = {**made_with, "what": repr(arm), "n": n, "seed": seed}
        numbers, plain = read_json(path, "measure").get(name, {}), out / f"{arm.base}.npy"
        if numbers.get("made with") != made or name == arm.base and not plain.exists():
            seen, pictures = evaluate(sd, prompts, 50, seed, **{**settings, **arm.settings})
            if name in ("base", "FreeU"):
                np.save(out / f"{name}.npy", np.stack(pictures))
            reference = np.load(plain)
            likeness = [psnr(torch.from_numpy(a).float() / 255, torch.from_numpy(b).float() / 255)
                        for a, b in zip(pictures, reference, strict=True)]
            numbers = {"made with": made, "verdicts": "".join(str(int(v.ok)) for v in seen),
                       "PSNR": float(np.median(likeness)),
                       "PSNR, 5 % and 95 %": np.percentile(likeness, (5, 95)).tolist()}
        verdicts[name] = right = np.array(list(numbers["verdicts"])) == "1"
        steps, techniques = arm.settings.get("steps", settings["steps"]), {
            key: value for key, value in arm.settings.items() if key in ("cache", "tgate")}
        numbers |= {"group": arm.group, "score": float(right.mean()), "interval": interval(right),
                    "base": arm.base, "over base": float(right.mean() - verdicts[arm.base].mean()),
                    "over base, interval": paired_interval(right, verdicts[arm.base]),
                    "arithmetic": full / run_macs(sd.unet, side, side, steps, **techniques, tokens=tokens)}
        write_json(path, "measure", name, numbers)
        (low, high), (least, most) = numbers["interval"], numbers["over base, interval"]
        print(f"{name:28s} {numbers['arithmetic']:7.2f} x   {numbers['score']:.3f} ({low:.3f} to {high:.3f})  "
              f"{numbers['over base']:+.3f} ({least:+.3f} to {most:+.3f})  {numbers['PSNR']:6.1f}", flush=True)


def clock(sd: StableDiffusion, table: dict[str, Arm], settings: dict[str, Any], n: int, rounds: int, out: Path) -> None:
    """Adds the measured speed-up of every arm: sampling n pictures at a time, all arms in turn, medians."""
    prompts = mixed_prompts(n, seed=60_000)
    calls = {name: lambda arm=arm: sd.sample(prompts, **{**settings, **arm.settings}) for name, arm in table.items()}
    measured = read_json(out / "cache.json", "measure")
    for row in against_first(alternate(calls, rounds, sd.device.type),
                             {name: measured[name]["arithmetic"] for name in table}):
        write_json(out / "cache.json", "measure", row["what"], measured[row["what"]] | {
            f"speed-up, {n} at a time": [row["speed-up"], row["least"], row["greatest"]]})


def draw(path: Path, names: list[str], n: int) -> None:
    """The trade: lead over the base and likeness against arithmetic saved, a line for every group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, numbers in read_json(path, "measure").items():
        if name in names and numbers["base"] == "base" and name not in ("base", "FreeU"):
            groups.setdefault(numbers["group"], []).append(numbers)
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for k, (group, of) in enumerate(groups.items()):
        of = sorted(of, key=lambda numbers: numbers["arithmetic"])
        x, gain = [numbers["arithmetic"] for numbers in of], np.array([numbers["over base"] for numbers in of])
        error = np.abs(np.array([numbers["over base, interval"] for numbers in of]).T - gain)
        style = {"color": f"C{k % 10}", "label": group, "marker": "os^"[k % 3], "linestyle": ("-", "--")[k >= 10]}
        axes[0].errorbar(x, gain, error, capsize=2, linewidth=1, **style)
        axes[1].plot(x, [numbers["PSNR"] for numbers in of], linewidth=1, **style)
    axes[0].axhline(0, color="gray", linewidth=0.8)
    axes[0].set(ylabel="score over the full model's, 95 % paired interval")
    axes[1].set(ylabel="PSNR to the full model's picture, dB (median)")
    for axis in axes:
        axis.set(xlabel="times less arithmetic", xscale="log")
    axes[0].legend(fontsize=7)
    save(figure, f"Quality against speed, {n} pictures an arm", path.parent / "quality.png")


def pictures(sd: StableDiffusion, table: dict[str, Arm], settings: dict[str, Any], seed: int, out: Path) -> None:
    """The same prompts and noise with every arm of a few."""
    shown = [name for name in table if name in (
        "base", "DeepCache b0 N3", "DeepCache b1 N3", "DeepCache b1 N10", "Faster paper", "Faster paper, noise",
        "Faster 10") or name.startswith("T-GATE") or name in ("FreeU", "FreeU + DeepCache b1 N3")]
    prompts = list(TINY_PROMPTS[:6])
    images = {name: sd.decode(sd.sample(prompts, seed=seed, **{**settings, **table[name].settings})).cpu()
              for name in shown}
    sheet({fill(prompt, 18): [images[name][k] for name in shown] for k, prompt in enumerate(prompts)},
          [fill(name, 13) for name in shown], f"{settings['steps']} steps", out / "pictures.png")


# ---------------------------------------------------------------------------------------------------- command line

def main() -> None:
    parser = argparse.ArgumentParser(description="Features over the steps; quality against speed of the caches.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="model folder")
    parser.add_argument("--out", type=Path, default=Path("out/cache"), help="folder for the PNGs and cache.json")
    parser.add_argument("--curves", action="store_true", help="features over the steps")
    parser.add_argument("--measure", action="store_true", help="score, likeness and speed of every arm, tiny model")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="arms whose names contain one of these")
    parser.add_argument("--images", type=int, default=16, help="behind each curve")
    parser.add_argument("--n", type=int, default=500, help="pictures an arm")
    parser.add_argument("--rounds", type=int, default=5, help="of the clock")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", default="ddim", help=", ".join(SAMPLERS))
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="guidance")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        plan(args.sampler, args.steps)
    except ValueError as error:
        raise InputError(str(error)) from None
    if min(args.images, args.n, args.rounds) < 1 or args.steps < 20:
        raise InputError("--images, --n and --rounds must be 1 or more, and --steps 20 or more, so that all keys fit")
    tiny = read_config(args.model).family == "tiny"
    if args.measure and not tiny:
        raise InputError(f"--measure needs a judge, and only the drawn world's model has one, not {args.model}")
    args.out.mkdir(parents=True, exist_ok=True)
    sd = StableDiffusion.load(args.model, args.device, torch.float32 if args.device == "cpu" else torch.float16)
    settings = {"steps": args.steps, "sampler": args.sampler, "cfg_scale": args.cfg_scale}
    weights = hashlib.sha256((args.model / "unet.safetensors").read_bytes()).hexdigest()[:16]
    made_with, path = {"U-Net": weights, **settings}, args.out / "cache.json"
    if args.curves:
        prompts = TINY_PROMPTS if tiny else PROMPTS
        prompts = [prompts[k % len(prompts)] for k in range(args.images)]
        made = {**made_with, "prompts": prompts, "seed": args.seed}
        if read_json(path, "figures").get("curves", {}).get("made with") != made:
            numbers = curves(sd, prompts, settings, args.seed, args.out)
            write_json(path, "figures", "curves", {"made with": made, **numbers})
        for half in ("encoder", "decoder"):
            mean, low, high = read_json(path, "figures")["curves"][f"{half}, mean over levels and steps"]
            print(f"{half}: change from one step to the next {mean:.3f} ({low:.3f} to {high:.3f}) of its norm")
    if args.measure:
        table = {name: arm for name, arm in arms(args.steps).items()
                 if args.only is None or name in ("base", "FreeU") or any(part in name for part in args.only)}
        measure(sd, table, settings, made_with, args.n, args.seed, args.out)
        clock(sd, table, settings, min(args.n, 16), args.rounds, args.out)
        draw(path, list(table), args.n)
        pictures(sd, table, settings, args.seed, args.out)


if __name__ == "__main__":
    run_command(main)
