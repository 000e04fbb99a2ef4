"""How the U-Net's features change over the steps, and the quality of pictures with caches against their speed.

    python -m lab.cache_study --curves                 # how the U-Net's features change over the steps, on any model
    python -m lab.cache_study --curves --measure       # also the exact score of every schedule, and pictures of some

Start at `curves` and `arms`. Encoder and decoder are compared as in figures 2 and 3 of Faster Diffusion's paper: how
far each level's output moves from one step to the next. All numbers are in cache.json; those made with the same
settings and weights are kept.
Sources: Faster Diffusion, arXiv 2312.09608; DeepCache, arXiv 2312.00858, which has the same curves for its branch.
"""
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cache import against_first, alternate
from cache import DeepCache, FasterDiffusion, Inherit, TGate
from command import InputError, run_command
from freeu import PRESETS, FreeU
from lab import study
from lab.evaluate import measure_arms, mixed_prompts, sample, to_bytes
from lab.freeu_study import PROMPTS, TINY_PROMPTS
from lab.study import Arm, Results, Row, bootstrap, line
from memory import run_macs
from pictures import psnr
from stable_diffusion import StableDiffusion

# ---------------------------------------------------------------------------------------------- features over the steps

@dataclass
class Watch:
    """Takes a cache's place in one run: reuses nothing, and records how much each unit's output changes.

    images: the number of rows to record, the last ones of the batch; with guidance, the first half follows the negative
        prompt.
    moved: by call and unit, per image: the change since the call before, divided by the norm before.
    size: likewise, the root mean square.
    """
    images: int
    call: int = 0
    last: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    size: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    parallel = False

    def start(self, run: Any) -> "Watch":
        return self

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Watch":
        self.call, = calls
        return self

    def inject(self, i: int, x: Tensor, predicted: bool = False) -> Tensor:
        return x

    def runs(self, unit: int) -> bool:
        return True

    def output(self, unit: int, h: Tensor) -> Tensor:
        now, before = h[-self.images:].float().flatten(1), self.last.get(unit)
        if before is not None:
            self.moved[self.call, unit] = ((now - before).norm(dim=1) / before.norm(dim=1)).cpu()
        self.size[self.call, unit] = now.square().mean(dim=1).sqrt().cpu()
        self.last[unit] = now
        return h


def curves(sd: StableDiffusion, prompts: list[str], settings: Row, seed: int, out: Path) -> Row:
    """Draws how each level's output changes from the step before, relative to its norm; returns the numbers."""
    watch = Watch(len(prompts))
    sd.sample(prompts, seed=seed, cache=watch, **settings)
    n, per, steps = sd.unet.middle, sd.config.unet.layers + 1, watch.call + 1
    levels = n // per
    encoder = {f"level {k}": per * k + per - 1 for k in range(levels)} | {"mid": n}            # before downsampling
    decoder = {f"level {levels - 1 - k}": n + per * (k + 1) for k in range(levels)}            # after upsampling
    colors = {f"level {k}": f"C{k}" for k in range(levels)} | {"mid": f"C{levels}"}
    numbers, moves, sizes = {"images": len(prompts)}, [], []
    for half, units in (("encoder", encoder), ("decoder", decoder)):
        lines, size_lines, each = [], [], []
        for name, unit in units.items():
            moved = torch.stack([watch.moved[i, unit] for i in range(1, steps)])       # (steps - 1, images)
            size = torch.stack([watch.size[i, unit] for i in range(steps)]).mean(dim=1)
            lines.append(line(range(1, steps), moved.mean(dim=1), name, color=colors[name]))
            size_lines.append(line(range(steps), size, name, color=colors[name]))
            numbers[f"{half}, {name}"] = {"moved": moved.mean(dim=1).tolist(), "size": size.tolist()}
            each.append(moved.mean(dim=0))
        numbers[f"{half}, mean over levels and steps"] = bootstrap(torch.stack(each).mean(dim=0))["overall"]
        moves.append((dict(title=half, yscale="log", ylabel="change from the step before, relative"), lines))
        sizes.append((dict(xlabel="step", yscale="log", ylabel="root mean square"), size_lines))
    study.plot([moves, sizes], f"Outputs of the U-Net's levels over {steps} steps, mean of {len(prompts)} images",
               out / "curves.png", size=4.8, share=True)
    return numbers


# ------------------------------------------------------------------------------------------------ quality against speed

PRIMARY = "DeepCache b1 N5", "Faster paper"                            # as the papers propose them


def arms(steps: int) -> dict[str, Arm]:
    """What is compared, by name. The arms of group "fewer steps" save as much arithmetic as caches do."""
    gate, center, freeu = max(2 * steps // 5, 1), 3 * steps // 10, FreeU(*PRESETS[2]["tiny"])
    table = [Arm("base", "the plain model", {}), Arm("FreeU", "FreeU version 2, SD 1.4's factors", {"freeu": freeu})]
    table += [Arm(f"{steps // k} steps", f"the plain model with {steps // k} steps", {"steps": steps // k},
                  group="fewer steps") for k in (2, 3, 5)]
    table += [Arm(f"DeepCache b{b} N{k}", f"DeepCache, branch {b}, a key step every {k}", {"cache": DeepCache(k, b)},
                  group=f"DeepCache b{b}") for b in (0, 1, 3) for k in (2, 3, 5, 10)]
    table += [Arm(f"DeepCache b1 N5 {rule}", f"DeepCache, branch 1, the {rule} formula's key steps around {center}",
                  {"cache": DeepCache(5, 1, center, schedule=rule)}, group=f"DeepCache b1, {rule} keys")
              for rule in ("released", "paper")]
    table += [Arm(f"Faster {keys}{', noise' if alpha else ''}", f"Faster Diffusion, key steps: {keys}; alpha {alpha}",
                  {"cache": FasterDiffusion(keys, alpha=alpha)},
                  group=f"Faster Diffusion{', noise' if alpha else ''}")
              for alpha in (0.0, 0.003) for keys in ("paper", "rescaled", 2, 5, 10)]
    table += [Arm("Faster paper, parallel", "Faster Diffusion, the paper's key steps, decoded in batches",
                  {"cache": FasterDiffusion("paper", parallel=True, alpha=0.0)}, group="Faster Diffusion, parallel"),
              Arm("inherit d4-u7 N3", "units d4 to u7 reuse their outputs, a key step every 3",
                  {"cache": Inherit("d4-u7", 3)}, group="inherit")]
    table += [Arm(f"T-GATE {gate}{name}", f"T-GATE from step {gate} on{name}", {"tgate": TGate(gate, **choice)},
                  group="T-GATE") for name, choice in (
        ("", {}), (", guidance kept", {"guidance": "keep"}), (", text computed", {"text": "compute"}))]
    table += [Arm(f"FreeU + {name}", f"FreeU with {name}", {"freeu": freeu, "cache": cache}, "FreeU", "FreeU + cache")
              for name, cache in (("DeepCache b1 N3", DeepCache(3, 1)),
                                  ("Faster paper", FasterDiffusion("paper", alpha=0.0)))]
    return {arm.name: replace(arm, primary=arm.name in PRIMARY) for arm in table}


def measure(sd: StableDiffusion, run: list[Arm], settings: Row, results: Results, n: int, seed: int) -> None:
    """Every arm draws the same n prompts from the same noise: score, lead over its base, likeness, arithmetic."""
    prompts, table = mixed_prompts(n, seed=50_000 + seed), arms(settings["steps"])
    drawn: dict[str, dict[int, np.ndarray]] = {arm.base: {} for arm in run}
    side, tokens = sd.config.size // sd.config.vae.factor, sd.config.text_encoder.length

    def macs(**techniques: Any) -> int:
        techniques = {name: techniques[name] for name in ("cache", "tgate") if name in techniques} | {
            "steps": techniques.get("steps", settings["steps"])}
        return run_macs(sd.unet, side, side, tokens=tokens, **techniques)

    def likeness(arm: Arm, batch: list[int], _: Tensor, pictures: list[np.ndarray]) -> list[Row]:
        if arm.name in drawn:
            drawn[arm.name] |= zip(batch, pictures)
        plain = drawn[arm.base]
        if absent := [k for k in batch if k not in plain]:             # the base was measured by an earlier run
            plain |= zip(absent, to_bytes(sample(sd, [prompts[k] for k in absent], [seed + k for k in absent],
                                                 settings | table[arm.base].settings)))
        return [{"PSNR": psnr(*(torch.from_numpy(of).float() / 255 for of in (picture, plain[k])))}
                for k, picture in zip(batch, pictures)]

    def summary(_: Arm, rows: list[Row]) -> Row:
        of = [row["PSNR"] for row in rows]
        return {"PSNR": float(np.median(of)), "PSNR, 5 % and 95 %": np.percentile(of, (5, 95)).tolist()}
    measure_arms(sd, results, table.values(), run, prompts, seed, 50, settings, likeness, summary,
                 lambda arm, _: {"arithmetic": macs() / macs(**arm.settings)},
                 {"times less arithmetic": ("arithmetic", ".2f"), "PSNR, dB": ("PSNR", ".1f")})


def clock(sd: StableDiffusion, table: list[Arm], settings: Row, n: int, rounds: int, results: Results) -> None:
    """Adds the measured speed-up of every arm: sampling n pictures at a time, all arms in turn, medians."""
    prompts, measured = mixed_prompts(n, seed=60_000), results.section("measure")
    calls = {arm.name: lambda arm=arm: sd.sample(prompts, **settings | arm.settings) for arm in table}
    for row in against_first(alternate(calls, rounds, sd.device.type),
                             {arm.name: measured[arm.name]["arithmetic"] for arm in table}):
        measured[row["what"]][f"speed-up, {n} at a time"] = [row["speed-up"], row["least"], row["greatest"]]
    results.write("measure", measured)


def draw(results: Results, table: list[Arm], n: int, path: Path) -> None:
    """The trade: lead over the base and likeness against arithmetic saved, one line per group."""
    measured, leads, likeness = results.section("measure"), [], []
    groups = dict.fromkeys(arm.group for arm in table if arm.base == "base" and arm.group)
    for k, group in enumerate(groups):
        of = sorted((measured[arm.name] for arm in table if arm.group == group), key=lambda row: row["arithmetic"])
        x = [row["arithmetic"] for row in of]
        style = dict(label=group, fmt="os^"[k % 3] + ("-", "--")[k >= 10], color=f"C{k % 10}")
        leads.append(line(x, [study.Estimate(**row["over base"]) for row in of], **style))
        likeness.append(line(x, [row["PSNR"] for row in of], **{**style, "label": None}))
    leads.append(line([1, max(row["x"].max() for row in leads)] if leads else [1, 1], [0, 0], None, ":", "gray"))
    axes = dict(xlabel="times less arithmetic", xscale="log")
    study.plot([[(axes | dict(ylabel="score over the full model's, 95 % paired interval"), leads),
                 (axes | dict(ylabel="PSNR to the full model's picture, dB (median)"), likeness)]],
               f"Quality against speed, {n} pictures per arm", path, size=6.2)


def pictures(sd: StableDiffusion, table: list[Arm], settings: Row, seed: int, path: Path) -> None:
    """The same prompts and noise with some of the arms."""
    shown = [arm for arm in table if arm.name.startswith("T-GATE") or arm.name in (
        "base", "DeepCache b0 N3", "DeepCache b1 N3", "DeepCache b1 N10", "Faster paper", "Faster paper, noise",
        "Faster 10", "FreeU", "FreeU + DeepCache b1 N3")]
    prompts = list(TINY_PROMPTS[:6])
    images = [sample(sd, prompts, seed, settings | arm.settings) for arm in shown]
    study.sheet([(prompt, [of[k] for of in images]) for k, prompt in enumerate(prompts)], path,
                [arm.name for arm in shown], f"{settings['steps']} steps")


# ---------------------------------------------------------------------------------------------------- command line

def main() -> None:
    parser = study.flags("Features over the steps; quality against speed of the caches.",
                         "model out n seed steps sampler cfg_scale device",
                         {"images": (16, "pictures per curve"), "rounds": (5, "of the clock")},
                         out=Path("out/cache"), steps=50)
    parser.add_argument("--curves", action="store_true", help="features over the steps")
    parser.add_argument("--measure", action="store_true", help="score, likeness and speed of every arm, tiny model")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="arms whose names contain one of these")
    args = parser.parse_args()
    if args.steps < 20:
        raise InputError("--steps must be 20 or more, so that all key steps fit")
    sd, made_with = study.load(args, "--measure" if args.measure else "", (args.steps,), images=1, n=1, rounds=1,
                               seed=0)
    settings, results = dict(steps=args.steps, sampler=args.sampler, cfg_scale=args.cfg_scale), Results(
        args.out / "cache.json", made_with)
    if args.curves:
        prompts = TINY_PROMPTS if sd.config.family == "tiny" else PROMPTS
        prompts = [prompts[k % len(prompts)] for k in range(args.images)]
        found = results.entry("figures", "curves", lambda: curves(sd, prompts, settings, args.seed, args.out),
                              prompts=prompts, seed=args.seed, **settings)
        for half in ("encoder", "decoder"):
            x = study.Estimate(**found[f"{half}, mean over levels and steps"])
            print(f"{half}: change from one step to the next {x:.3f} of its norm")
    if args.measure:
        table = [arm for arm in arms(args.steps).values()
                 if args.only is None or arm.name in ("base", "FreeU") or any(part in arm.name for part in args.only)]
        measure(sd, table, settings, results, args.n, args.seed)
        clock(sd, table, settings, min(args.n, 16), args.rounds, results)
        draw(results, table, args.n, args.out / "quality.png")
        pictures(sd, table, settings, args.seed, args.out / "pictures.png")


if __name__ == "__main__":
    run_command(main)
