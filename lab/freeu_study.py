"""The figures of FreeU's paper and talk on any model folder, and what FreeU does to the tiny model's exact score.

    python -m lab.freeu_study --model models/tiny --out out/freeu      # the figures, and all numbers in freeu.json
    python -m lab.freeu_study --search --measure                       # also tune the factors, and judge them

Start at FIGURES, a table of functions (runs, out) -> numbers; `search` and `measure` are the other two parts. They
reach the U-Net through its `freeu` argument alone, where anything with FreeU's two methods can go: `Recorder`,
`Plain` and `ChannelChoice`. What is there already, made with the same settings and weights, is not made again.
Sources: FreeU, arXiv 2309.11497, whose numbers the figures have here, and the talk on it. The amplitude's
definition is that of "How do vision transformers work?", arXiv 2202.06709: FreeU's paper and code don't give one.
"""
import argparse
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from command import InputError, replacing, run_command
from folder import TINY, read_config
from freeu import PRESETS, FreeU, scale_long, skip_tuning, structure_gain
from lab.evaluate import evaluate, make_prompts, wilson
from lab.shapes import KINDS
from sampler import SAMPLERS, plan
from stable_diffusion import StableDiffusion

WHITE_NOISE = math.log(2) / 2      # its relative log amplitude, 0.3466: the mean is real, other bins are complex
PROMPTS = ("a cabin on a snowy mountain, Disney style", "a drone view of a Christmas tree with fireworks",
           "flying through fantasy landscapes", "a fat rabbit in a purple robe", "a squirrel eating a burger")
TINY_PROMPTS = ("a red circle left of a blue square", "a large green ring", "three yellow stars",
                "a purple triangle above an orange cross", "a white star on a gray background", "two blue circles",
                "a black cross right of a red ring", "a small orange square")

Factors = tuple[float, float, float, float]                            # b1, b2, s1, s2


# ------------------------------------------------------------------------------------------------------ amplitudes

def relative_log_amplitude(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (B, C, H, W) -> frequencies in units of pi, log amplitude relative to frequency 0, and that by itself.

    log |FFT|, averaged over images and channels, from the centre of the spectrum along its diagonal; a map that
    isn't square is read at bins of (nearly) the same frequency on both axes. White noise has 0.3466 everywhere.
    Read both curves: a filter that damps nothing but the mean lifts all of the relative one.
    """
    height, width = x.shape[-2:]
    n = min(height, width)
    spectrum = torch.fft.fft2(x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32)))
    log = torch.fft.fftshift(torch.log(spectrum.abs() + 1e-6), dim=(-2, -1)).mean(dim=(0, 1))
    j = torch.arange(math.ceil(n / 2))
    line = log[height // 2 + j * height // n, width // 2 + j * width // n]
    return 2 * j / n, line - line[0], line


def bands(images: Tensor, cutoff: float = 0.25) -> tuple[Tensor, Tensor]:
    """Images (on the CPU) as the sum of frequencies up to `cutoff` (1: the highest) and of those above."""
    fy, fx = (torch.fft.fftfreq(n) * 2 for n in images.shape[-2:])
    low = torch.fft.ifft2(torch.fft.fft2(images) * (torch.hypot(fy[:, None], fx[None, :]) <= cutoff)).real
    return low, images - low


def image_facts(images: Tensor) -> dict[str, float]:
    """What the paper says by eye. detail: root mean square of the high band; color: mean of max - min over RGB."""
    return {"detail": bands(images)[1].square().mean().sqrt().item(),
            "color": (images.amax(dim=1) - images.amin(dim=1)).mean().item()}


# ----------------------------------------------------------------------------- what stands where FreeU would stand

class Seen(NamedTuple):
    """What is kept of maps (B, C, H, W)."""
    mean: Tensor           # over the channels of the first image, (H, W)
    frequency: Tensor      # in units of pi
    curve: Tensor          # the log amplitude there, not normalised
    norm: float            # root mean square


class Met(NamedTuple):
    """The maps that meet in one decoder layer: the backbone as it comes, then both as they are concatenated."""
    entering: Seen
    backbone: Seen
    skip: Seen


@dataclass
class Recorder:
    """Goes where a FreeU goes, does what `inner` does (None: nothing) and notes the maps: steps[step][layer].

    images: how many of the batch's last rows to look at: with guidance the first half follows the negative prompt.
    The fused map of a layer is what the next one gets as its backbone, at a level's end behind the upsampling.
    """
    inner: Any = None
    images: int = 1
    steps: list[list[Met]] = field(default_factory=list)

    def at(self, fraction: float) -> "Recorder":
        self.steps.append([])
        return Recorder(None if self.inner is None else self.inner.at(fraction), self.images, self.steps)

    def __call__(self, h: Tensor, skip: Tensor, layer: int, config: Any) -> tuple[Tensor, Tensor]:
        entering = self.look(h)
        if self.inner is not None:
            h, skip = self.inner(h, skip, layer, config)
        self.steps[-1].append(Met(entering, self.look(h), self.look(skip)))
        return h, skip

    def look(self, x: Tensor) -> Seen:
        x = x[-self.images:].float()
        frequency, _, curve = relative_log_amplitude(x)
        return Seen(x[0].mean(dim=0).cpu(), frequency, curve, x.square().mean().sqrt().item())


@dataclass(frozen=True)
class Plain:
    """The paper's first experiment (figure 5): in all layers the whole backbone times b, whole skip times s."""
    b: float
    s: float

    def at(self, fraction: float) -> "Plain":
        return self

    def __call__(self, h: Tensor, skip: Tensor, layer: int, config: Any) -> tuple[Tensor, Tensor]:
        return h * self.b, skip * self.s


CHANNELS: dict[str, Callable[[int], slice]] = {
    "all": lambda c: slice(None), "first half": lambda c: slice(c // 2),
    "second half": lambda c: slice(c // 2, None), "every other": lambda c: slice(None, None, 2)}


@dataclass(frozen=True)
class ChannelChoice(FreeU):
    """FreeU that amplifies other channels of the backbone than the first half (figures 9 and 19)."""
    version: int = 1
    which: str = "first half"

    def __call__(self, h: Tensor, skip: Tensor, layer: int, config: Any) -> tuple[Tensor, Tensor]:
        b, _ = self.factors(h.shape[1], layer, config)
        chosen = torch.zeros(h.shape[1], 1, 1, dtype=torch.bool, device=h.device)
        chosen[CHANNELS[self.which](h.shape[1])] = True
        _, skip = super().__call__(h, skip, layer, config)
        return torch.where(chosen, h * (b if self.version == 1 else structure_gain(h, b)), h), skip


# --------------------------------------------------------------------------------------------------------- drawing

def pyplot() -> Any:
    """matplotlib, which nothing else here needs, set to draw into files."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the figures need matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    pyplot().close(figure)


Line = tuple[str | None, Tensor, Tensor, Any, str]                     # label, x, y, colour, line style


def plot(panels: list[list[tuple[str, str, list[Line]]]], title: str, path: Path, size: float = 3.4,
         common_legend: bool = False) -> None:
    """Rows of panels (title, label of the y axis, lines)."""
    rows, columns = len(panels), len(panels[0])
    figure, axes = pyplot().subplots(rows, columns, figsize=(size * columns + 0.5, 0.85 * size * rows + 0.6),
                                     squeeze=False, layout="constrained")
    for axis, (name, y_label, lines) in zip(axes.flat, (panel for row in panels for panel in row)):
        for label, x, y, color, style in lines:
            axis.plot(x.numpy(), y.numpy(), style, color=color, label=label, linewidth=1.3, markersize=3)
        if y_label.startswith("relative"):
            axis.axhline(WHITE_NOISE, color="gray", linewidth=0.8, linestyle=":", label="white noise, 0.3466")
            if all(len(x) == 1 for _, x, _, _, _ in lines):
                axis.text(0.5, 0.6, "a 2x2 map\nhas no curve", transform=axis.transAxes, ha="center", va="center")
        axis.set_title(name, fontsize=9)
        axis.set_ylabel(y_label, fontsize=8)
        axis.set_xlabel("frequency, in units of pi", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    if common_legend:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    else:
        for axis in axes[0]:
            axis.legend(fontsize=6, framealpha=0.5)
    save(figure, title, path)


def sheet(rows: dict[str, list[Tensor]], columns: list[str], title: str, path: Path, side: float = 1.3) -> None:
    """Labelled rows of pictures: (3, H, W) in [0, 1], or maps (H, W), each of which gets its own full scale."""
    figure, axes = pyplot().subplots(len(rows), len(columns), squeeze=False, layout="constrained",
                                     figsize=(side * len(columns) + 1.2, (side + 0.05) * len(rows) + 0.8))
    for row, (label, pictures) in zip(axes, rows.items()):
        for axis, picture in zip(row, pictures, strict=True):
            picture = picture.permute(1, 2, 0).clamp(0, 1) if picture.ndim == 3 else picture
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    for axis, text in zip(axes[0], columns):
        axis.set_title(text, fontsize=8)
    save(figure, title, path)


# --------------------------------------------------------------------------------------------------------- figures

@dataclass
class Runs:
    """The pictures of the same prompts and seeds under any factors; each kind is sampled once."""
    sd: StableDiffusion
    prompts: list[str]
    settings: dict[str, Any]           # of `sd.sample`
    preset: FreeU
    seed: int = 0
    batch: int = 8
    latents_of: dict[Any, list[Tensor]] = field(default_factory=dict)
    images_of: dict[Any, Tensor] = field(default_factory=dict)

    def latents(self, freeu: Any = None) -> list[Tensor]:
        """x_t (B, 4, h, w) after every step."""
        if freeu not in self.latents_of:
            parts = []
            for k in range(0, len(self.prompts), self.batch):
                parts.append([])
                self.sd.sample(self.prompts[k:k + self.batch], seed=self.seed + k, freeu=freeu, **self.settings,
                               callback=lambda _, x: parts[-1].append(x.cpu()))  # noqa: B023
            self.latents_of[freeu] = [torch.cat(step) for step in zip(*parts)]
        return self.latents_of[freeu]

    def images(self, freeu: Any = None) -> Tensor:
        """The results (B, 3, H, W) in [0, 1]."""
        if freeu not in self.images_of:
            self.images_of[freeu] = self.sd.decode(self.latents(freeu)[-1]).cpu()
            if freeu not in (None, self.preset):                       # the only ones whose way is looked at
                del self.latents_of[freeu]
        return self.images_of[freeu]

    def maps(self, freeu: Any = None) -> list[list[Met]]:
        """What meets in every decoder layer at every step, for the first batch."""
        prompts = self.prompts[:self.batch]
        recorder = Recorder(freeu, len(prompts))
        self.sd.sample(prompts, seed=self.seed, freeu=recorder, **self.settings)
        return recorder.steps


def spread(n: int, count: int) -> list[int]:
    """`count` of the numbers 0..n - 1 (or all of them), evenly, ends included."""
    return sorted({round(i) for i in np.linspace(0, n - 1, count)})


def denoising(runs: Runs, out: Path) -> dict[str, Any]:
    """Figure 3: x_t, decoded, and its two bands; numbers: their change between columns, relative to their end."""
    rows, numbers, at = {}, {}, spread(runs.settings["steps"], 8)
    for name, freeu in (("SD", None), ("FreeU", runs.preset)):
        images = torch.stack([runs.sd.decode(runs.latents(freeu)[i][:1]).cpu()[0] for i in at])
        rows[f"{name}\nx_t"] = list(images)
        for band, part, gray in zip(("low", "high"), bands(images), (0.0, 0.5)):
            rows[f"{name}\n{band} band"] = list(part + gray)
            change = (part[1:] - part[:-1]).square().mean(dim=(1, 2, 3)).sqrt() / part[-1].square().mean().sqrt()
            numbers[f"{name}, change of the {band} band"] = change.tolist()
    sheet(rows, [f"after step {i + 1}" for i in at], f"Denoising \"{runs.prompts[0]}\" (figure 3); bands split at "
          "a quarter of the highest frequency", out / "denoising.png")
    return numbers


def spectra_over_steps(runs: Runs, out: Path) -> dict[str, Any]:
    """Figures 4 and 13: x_t's amplitude after every step, with and without FreeU; and white noise of that size."""
    cmap, steps = pyplot().get_cmap("viridis"), runs.settings["steps"]
    noise = torch.randn(1024, 4, *runs.latents()[0].shape[-2:], generator=torch.Generator().manual_seed(0))
    frequency, white, _ = relative_log_amplitude(noise)
    numbers = {"frequency": frequency.tolist(), "white noise": white.tolist(),
               "its plateau": white[1:].mean().item()}
    curves = {name: [relative_log_amplitude(x) for x in runs.latents(freeu)]
              for name, freeu in (("SD", None), ("SD + FreeU", runs.preset))}
    panels, few = [], spread(steps, 3)
    for which, label in ((1, "relative log amplitude"), (2, "log amplitude")):
        row = [(name, label, [(f"after step {i + 1}" if i in few else None, frequency, curve[i][which],
                               cmap(i / steps), "-") for i in range(steps)]) for name, curve in curves.items()]
        both = [(f"{name}, step {i + 1}", frequency, curve[i][which], cmap(i / steps), style)
                for i in few for (name, curve), style in zip(curves.items(), ("-", "--"))]
        panels.append([*row, ("both", label, both)])
        numbers |= {f"{name}, {label}": [c[which].tolist() for c in curve] for name, curve in curves.items()}
    plot(panels, f"x_t over the steps (figures 4 and 13), {len(runs.prompts)} images; above relative to frequency "
         "0, below by itself", out / "spectra_over_steps.png")
    return numbers


def spectra_of_layers(runs: Runs, out: Path) -> dict[str, Any]:
    """Figure 7: backbone, skip and fused map at every decoder layer, with and without FreeU; the steps' mean."""
    maps = {"SD": runs.maps(), "SD + FreeU": runs.maps(runs.preset)}
    numbers, panels = [], {"relative log amplitude": [], "log amplitude": []}
    for i in range(len(maps["SD"][0])):
        lines, ratio = [], {}
        for (name, steps), style in zip(maps.items(), (".-", ".--")):
            ratio[name] = float(np.mean([met[i].skip.norm / met[i].backbone.norm for met in steps]))
            seen = {"backbone": [met[i].backbone for met in steps], "skip": [met[i].skip for met in steps],
                    "fused": [met[i + 1].entering for met in steps if i + 1 < len(met)]}
            for (part, of), color in zip(seen.items(), ("tab:blue", "tab:orange", "tab:green")):
                if of:
                    mean = torch.stack([x.curve for x in of]).mean(dim=0)
                    lines.append((f"{part}, {name}", of[0].frequency, mean, color, style))
        height, width = maps["SD"][0][i].skip.mean.shape
        title = f"layer {i}, map {width}x{height}, |skip| / |backbone| {ratio['SD']:.2f}"
        panels["log amplitude"].append((title, "log amplitude", lines))
        panels["relative log amplitude"].append((title, "relative log amplitude", [
            (label, x, y - y[0], color, style) for label, x, y, color, style in lines]))
        numbers.append({"layer": i, "map": [height, width], "norm of skip / of backbone": ratio,
                        "log amplitude": {label: y.tolist() for label, _, y, _, _ in lines}})
    for kind, row in panels.items():
        plot([row[k:k + 3] for k in range(0, len(row), 3)], "What meets in each decoder layer (figure 7), mean "
             f"over the steps: {kind}", out / f"spectra_of_layers_{kind.split()[0]}.png", common_legend=True)
    return {"layers": numbers}


def feature_maps(runs: Runs, out: Path) -> dict[str, Any]:
    """Figures 8 and 14: the mean over channels of what meets in each layer, in the middle of the run."""
    middle = runs.settings["steps"] // 2
    met = {"SD": runs.maps()[middle], "FreeU": runs.maps(runs.preset)[middle]}
    maps = {(part, name): [getattr(m, part) for m in met[name]] for part in ("backbone", "skip") for name in met}
    sheet({f"{part}\n{name}": [seen.mean for seen in of] for (part, name), of in maps.items()},
          [f"layer {i}\n{m.skip.mean.shape[1]}x{m.skip.mean.shape[0]}" for i, m in enumerate(met["SD"])],
          f"Mean over the channels at step {middle + 1} of \"{runs.prompts[0]}\" (figures 8 and 14); each map on "
          "its own scale", out / "feature_maps.png", side=1.0)
    return {f"norm of the {part}, {name}": [seen.norm for seen in of] for (part, name), of in maps.items()}


def image_spectra(runs: Runs, out: Path) -> dict[str, Any]:
    """Figure 6: the finished images' amplitude against b, for plain scaling and for FreeU."""
    cmap, panels, numbers = pyplot().get_cmap("plasma"), [[], [], []], {}
    kinds = {"all of the backbone times b": {b: Plain(b, 1.0) for b in (0.6, 0.8, 1.0, 1.2, 1.4)},
             "FreeU's b1 = b2 = b": {b: FreeU(b, b) for b in (1.0, 1.2, 1.4, 1.6, 1.8)}}
    for kind, variants in kinds.items():
        curves = {b: relative_log_amplitude(runs.images(freeu)) for b, freeu in variants.items()}
        of = {"relative log amplitude": {b: relative for b, (_, relative, _) in curves.items()},
              "log amplitude": {b: plain for b, (_, _, plain) in curves.items()},
              "log amplitude less that at b = 1": {b: c[2] - curves[1.0][2] for b, c in curves.items()}}
        for row, (label, lines) in zip(panels, of.items()):            # frequency 0 would dwarf the rest
            row.append((kind, label, [(f"b = {b:g}", curves[b][0][1:], y[1:], cmap(i / 5), "-")
                                      for i, (b, y) in enumerate(lines.items())]))
        numbers[kind] = {label: {f"{b:g}": y.tolist() for b, y in lines.items()} for label, lines in of.items()}
    plot(panels, f"Finished images against b (figure 6), {len(runs.prompts)} images, without frequency 0",
         out / "image_spectra.png", size=4.2)
    return numbers


def b_s_grids(runs: Runs, out: Path) -> dict[str, Any]:
    """Figure 5, with plain factors in all layers, and the same question put to FreeU."""
    kinds = {"plain": ("All of the backbone times b, all of the skip times s, in all layers (figure 5)", Plain,
                       (0.6, 0.8, 1.0, 1.2, 1.4), (0.6, 0.8, 1.0, 1.2, 1.4)),
             "freeu": ("FreeU with b1 = b2 = b and s1 = s2 = s", lambda b, s: FreeU(b, b, s, s),
                       (1.0, 1.2, 1.4, 1.6, 1.8), (1.0, 0.8, 0.6, 0.4, 0.2))}
    numbers = {}
    for name, (title, make, bs, ss) in kinds.items():
        sheet({f"s = {s:g}": [runs.images(make(b, s))[0] for b in bs] for s in ss}, [f"b = {b:g}" for b in bs],
              f"{title}\n\"{runs.prompts[0]}\"", out / f"b_s_grids_{name}.png")
        numbers[name] = {f"b {b:g}, s {s:g}": image_facts(runs.images(make(b, s))) for b in bs for s in ss}
    return numbers


def sheets(runs: Runs, out: Path) -> dict[str, Any]:
    """Figures 9, 10, 15 to 19: what the variants of FreeU do to the same pictures."""
    f, strong = runs.preset, replace(runs.preset, b1=1.8, b2=1.8)
    table = {
        "b_sweep": ("FreeU's b1 = b2 = b alone (figure 17)",
                    {f"b = {b:g}": FreeU(b, b) for b in (1.2, 1.4, 1.6, 1.8)}),
        "channels": (f"Channels that a constant b of {f.b1:g}, {f.b2:g} acts on (figures 9 and 19)",
                     {which: ChannelChoice(f.b1, f.b2, which=which) for which in CHANNELS}),
        "versions": ("Constant and content-aware factors (figure 16)",
                     {f"{name}\nb {g.b1:g} {g.b2:g}": replace(g, version=version)
                      for g in (f, strong) for version, name in ((1, "constant"), (2, "aware"))}),
        "s_ablation": ("What s adds to b (figures 10, 15 and 18)",
                       {"b alone" if s == 1 else f"b, s = {s:g}": replace(f, s1=s, s2=s)
                        for s in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)})}
    numbers = {}
    for name, (title, variants) in table.items():
        variants = {"SD": None, **variants}
        numbers[name] = facts = {key: image_facts(runs.images(freeu)) for key, freeu in variants.items()}
        sheet({f"{k + 1}: {fill(prompt, 16)}": [runs.images(freeu)[k] for freeu in variants.values()]
               for k, prompt in enumerate(runs.prompts[:4])},
              [f"{key}\ndetail {n['detail']:.3f}\ncolor {n['color']:.3f}" for key, n in facts.items()],
              f"{title}; numbers of {len(runs.prompts)} images", out / f"sheets_{name}.png")
    return numbers


FIGURES = {f.__name__: f for f in (denoising, spectra_over_steps, spectra_of_layers, feature_maps, image_spectra,
                                   b_s_grids, sheets)}


def make_figures(runs: Runs, out: Path, made_with: dict[str, Any]) -> None:
    """All figures as PNG files and their numbers in freeu.json; those that are there already stay."""
    path, made_with = out / "freeu.json", {**made_with, "prompts": runs.prompts, "seed": runs.seed}
    pyplot()                                                           # better missed now than after minutes
    for name, figure in tqdm(FIGURES.items(), desc="figures", unit="figure"):
        there = read_json(path, "figures").get(name, {}).get("made with") == made_with
        if not there or not any(out.glob(f"{name}*.png")):
            numbers = json.dumps({"made with": made_with, "what": figure.__doc__, **figure(runs, out)})
            write_json(path, "figures", name, json.loads(numbers, parse_float=lambda x: float(f"{float(x):.5g}")))


# -------------------------------------------------------------------------------------------- search and judgement

LOW, HIGH = (0.8, 0.8, 0.0, 0.0), (1.8, 1.8, 1.2, 1.2)                 # where b1, b2, s1, s2 are searched


def search(reward: Callable[[Factors], float], known: list[Factors], candidates: int,
           seed: int = 0) -> list[tuple[Factors, float]]:
    """Random search, then refinement: (b1, b2, s1, s2) that were tried and their rewards, the best first.

    Tries what is `known`; half of the other candidates lie anywhere in LOW..HIGH, half near the best so far, ever
    nearer. The reward is noisy, so that its maximum flatters: judge the winner on other pictures.
    """
    rng, low, high = np.random.default_rng(seed), np.array(LOW), np.array(HIGH)
    tried = [(factors, reward(factors)) for factors in known]
    remaining = candidates - len(known)
    for k in range(remaining):
        point = rng.uniform(low, high)
        if k >= remaining // 2 and tried:
            radius = 0.3 * 0.05 ** (k / remaining - 0.5)               # of the range, from 0.3 to 0.07
            best, _ = max(tried, key=lambda pair: pair[1])
            point = np.clip(best + radius * (high - low) * rng.uniform(-1, 1, 4), low, high)
        factors = tuple(round(float(x), 3) for x in point)
        tried.append((factors, reward(factors)))
    return sorted(tried, key=lambda pair: -pair[1])


def mixed_prompts(n: int, seed: int) -> list[str]:
    """n captions, the six kinds of scene in turn."""
    kinds = [make_prompts(kind, math.ceil(n / len(KINDS)), seed + k) for k, kind in enumerate(KINDS)]
    return [prompt for turn in zip(*kinds) for prompt in turn][:n]


def search_prompts(made_with: dict[str, Any]) -> list[str]:
    """The prompts of a search with these settings; none where there was no search."""
    return mixed_prompts(made_with["n"], seed=20_000 + made_with["seed"]) if made_with else []


def tune(sd: StableDiffusion, path: Path, settings: dict[str, Any], made_with: dict[str, Any], candidates: int,
         n: int, seed: int) -> None:
    """Search by the exact score of n pictures, of other draws of prompts and noise than those of `measure`.

    The world has few short sentences, so both draw some prompts alike: `measure` also counts without these.
    """
    made_with = {**made_with, "candidates": candidates, "n": n, "seed": seed}
    if read_json(path, "search").get("made with") == made_with:
        return
    prompts = search_prompts(made_with)
    with tqdm(total=candidates, desc="search", unit="candidate") as bar:
        def reward(factors: Factors) -> float:
            verdicts, _ = evaluate(sd, prompts, batch=50, seed=1_000_000 + seed, freeu=FreeU(*factors), **settings)
            bar.update()
            return float(np.mean([v.ok for v in verdicts]))
        tried = search(reward, [(1.0, 1.0, 1.0, 1.0), PRESETS[2][sd.config.family]], candidates, seed)
    write_json(path, "search", None, {"made with": made_with, "best": tried[0][0], "tried": tried})


def arms(family: str, searched: Factors | None) -> dict[str, tuple[str, FreeU | None]]:
    """What is compared: name -> (what it is, the argument). The first is what the others are compared with."""
    two, one = PRESETS[2][family], PRESETS[1][family]
    found = {} if searched is None else {"searched": (f"FreeU version 2, {tuple(searched)}", FreeU(*searched))}
    return {
        "base": ("no factors", None),
        "preset v2": (f"FreeU version 2, {two}", FreeU(*two)),
        "preset v1": (f"FreeU version 1, {one}", FreeU(*one, version=1)),
        **found,
        "time-gated": (f"FreeU version 2, {two}, b in steps 0 to 0.6, s from 0.4 on",
                       FreeU(*two, backbone=(0.0, 0.6), skip=(0.4, 1.0))),
        "Skip-Tuning 0.8": ("skips times 0.8 (deepest) to 1", FreeU(skip_scale=skip_tuning(0.8))),
        "Skip-Tuning 0.9": ("skips times 0.9 (deepest) to 1", FreeU(skip_scale=skip_tuning(0.9))),
        "ScaleLong 0.95": ("skips times 0.95 to the power of depth", FreeU(skip_scale=scale_long(0.95)))}


def paired_interval(a: np.ndarray, b: np.ndarray, resamples: int = 2000, seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean of a - b, whose entries belong to the same prompt and noise."""
    difference = a.astype(float) - b
    rows = np.random.default_rng(seed).integers(0, len(difference), (resamples, len(difference)))
    return np.percentile(difference[rows].mean(axis=1), (2.5, 97.5)).tolist()


def measure(sd: StableDiffusion, path: Path, table: dict[str, tuple[str, FreeU | None]], settings: dict[str, Any],
            made_with: dict[str, Any], n: int, seed: int) -> None:
    """Every arm draws the same n prompts from the same noise; prints and notes score and lead over base."""
    prompts, base = mixed_prompts(n, seed=30_000 + seed), None
    known = set(search_prompts(read_json(path, "search").get("made with", {})))
    fresh = np.array([prompt not in known for prompt in prompts])
    print(f"{'arm':16s} score (95 % interval)    over base (95 %, paired)    n = {n}; then the lead on those "
          f"{fresh.sum()} whose prompts the search didn't have")
    for name, (text, freeu) in table.items():
        made = {**made_with, "what": text, "n": n, "seed": seed}
        arm = read_json(path, "measure").get(name, {})
        if arm.get("made with") != made:
            verdicts, _ = evaluate(sd, prompts, batch=50, seed=seed, freeu=freeu, **settings)
            arm = {"made with": made, "verdicts": "".join(str(int(v.ok)) for v in verdicts)}
        right = np.array(list(arm["verdicts"])) == "1"
        base = right if base is None else base
        score, gain = float(right.mean()), float(right.mean() - base.mean())
        (low, high), (least, most) = wilson(score, n), paired_interval(right, base)
        fresh_gain = float(right[fresh].mean() - base[fresh].mean()) if fresh.any() else math.nan
        fresh_low, fresh_high = paired_interval(right[fresh], base[fresh]) if fresh.any() else (math.nan, math.nan)
        write_json(path, "measure", name, arm | {
            "score": score, "interval": [low, high], "over base": gain, "over base, interval": [least, most],
            "prompts the search didn't have": {"n": int(fresh.sum()), "over base": fresh_gain,
                                               "over base, interval": [fresh_low, fresh_high]},
            "by kind": {kind: float(right[k::len(KINDS)].mean()) for k, kind in enumerate(KINDS)}})
        print(f"{name:16s} {score:.3f} ({low:.3f} to {high:.3f})   "
              f"{gain:+.3f} ({least:+.3f} to {most:+.3f})   "
              f"{fresh_gain:+.3f} ({fresh_low:+.3f} to {fresh_high:+.3f})   {text}", flush=True)


# ---------------------------------------------------------------------------------------------------- command line

def read_json(path: Path, section: str) -> dict[str, Any]:
    """A section of the results; {} where there is none yet."""
    try:
        return json.loads(path.read_text()).get(section, {}) if path.exists() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"can't read the results in {path} ({error}); move it, or choose another --out") from None


def write_json(path: Path, section: str, name: str | None, value: Any) -> None:
    """Puts a value into the results (None: it is the section), read just before: two commands may share a file."""
    data = {key: read_json(path, key) for key in ("figures", "search", "measure")}
    data[section] = value if name is None else {**data[section], name: value}
    with replacing(path) as part:
        part.write_text(json.dumps({key: of for key, of in data.items() if of}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="FreeU's figures on any model; for the tiny one, its score.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="model folder")
    parser.add_argument("--out", type=Path, default=Path("out/freeu"), help="folder for the PNGs and freeu.json")
    parser.add_argument("--search", action="store_true", help="tune the four factors, judge on other prompts")
    parser.add_argument("--measure", action="store_true", help="the score of every arm, with intervals")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="of the figures (default: the paper's)")
    parser.add_argument("--images", type=int, default=8, help="pictures behind each curve of the figures")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures of the figures at a time")
    parser.add_argument("--n", type=int, default=500, help="pictures an arm to measure")
    parser.add_argument("--candidates", type=int, default=25, help="factors to try in the search")
    parser.add_argument("--search-n", type=int, default=80, help="pictures a candidate")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--sampler", default="ddim", help=", ".join(SAMPLERS))
    parser.add_argument("--cfg-scale", type=float, help="guidance (default: 7.5, the tiny model's 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        plan(args.sampler, args.steps)
        torch.empty(0, device=args.device)
    except (ValueError, RuntimeError, AssertionError) as error:        # the last two: no such device
        raise InputError(str(error).splitlines()[0]) from None
    for flag, least in (("steps", 2), ("images", 1), ("batch_size", 1), ("n", len(KINDS)), ("candidates", 3),
                        ("search_n", 1), ("seed", 0)):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} must be {least} or more")
    return args


def main() -> None:
    args = parse_arguments()
    family = read_config(args.model).family
    tiny = family == "tiny"
    if (args.search or args.measure) and not tiny:
        raise InputError(f"--search and --measure need a judge, and only the drawn world's model has one, not "
                         f"{args.model} ({family}); leave them out to make the figures")
    sd = StableDiffusion.load(args.model, args.device, torch.float32 if args.device == "cpu" else torch.float16)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {args.out} ({error.strerror}); choose another --out") from None

    guidance = args.cfg_scale if args.cfg_scale is not None else 4.0 if tiny else 7.5
    settings = {"steps": args.steps, "sampler": args.sampler, "cfg_scale": guidance}
    weights = hashlib.sha256((args.model / "unet.safetensors").read_bytes())
    made_with = {"U-Net": weights.hexdigest()[:16], **settings}
    prompts = args.prompt or (TINY_PROMPTS if tiny else PROMPTS)
    prompts = [prompts[k % len(prompts)] for k in range(args.images)]
    runs = Runs(sd, prompts, settings, FreeU(*PRESETS[2][family]), args.seed, args.batch_size)
    make_figures(runs, args.out, made_with)

    path = args.out / "freeu.json"
    if args.search:
        tune(sd, path, settings, made_with, args.candidates, args.search_n, args.seed)
    if args.search or args.measure:
        table = arms(family, read_json(path, "search").get("best"))
        if not args.measure:
            table = {name: table[name] for name in ("base", "preset v2", "searched")}
        measure(sd, path, table, settings, made_with, args.n, args.seed)


if __name__ == "__main__":
    run_command(main)
