"""The figures of FreeU's paper and talk on any model folder, and what FreeU does to the tiny model's exact score.

    python -m lab.freeu_study --model models/tiny --out out/freeu      # the figures, and all numbers in freeu.json
    python -m lab.freeu_study --search --measure                       # also searches for factors and measures all arms

Start at `FIGURES`, a table of functions (runs, out) -> numbers; `search` and `measure` are the other two parts.
`Recorder`, `Plain` and `ChannelChoice` take the place of FreeU in the U-Net. Results made with the same settings and
weights are kept. Sources: FreeU, arXiv 2309.11497, and the talk on it; figures have the paper's numbers. Amplitudes are
those of "How do vision transformers work?", arXiv 2202.06709, because FreeU's paper and code don't define theirs.
"""
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from command import run_command
from freeu import PRESETS, FreeU, ScaleLong, SkipTuning, structure_gain
from lab import study
from lab.evaluate import draw, judged, measure_arms, mixed_prompts
from lab.shapes import KINDS
from lab.study import Arm, Results, Row, bootstrap, line, plot, pyplot, sheet
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

    log |FFT|, averaged over images and channels, along the diagonal from the centre of the spectrum; in a map that
    isn't square, at bins of nearly equal frequency on both axes. The relative curve of white noise is 0.3466.
    Read both curves: a filter that damps only the mean raises the whole relative curve.
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
    """Takes FreeU's place in one run: does what `inner` does (None: nothing), and records the maps.

    images: the number of rows to record, the last ones of the batch; with guidance, the first half follows the negative
        prompt.
    calls: the maps by call and layer. A layer's fused map is the backbone that enters the next layer; at the end of a
        level, after upsampling.
    """
    inner: Any = None
    images: int = 1
    calls: list[list[Met]] = field(default_factory=list)
    state: Any = None                                                  # `inner` in this run
    acting: Any = None                                                 # and at this call

    def start(self, run: Any) -> "Recorder":
        self.state = None if self.inner is None else self.inner.start(run)
        return self

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Recorder":
        self.calls.append([])
        self.acting = None if self.state is None else self.state.at(calls, halves)
        return self

    def __call__(self, h: Tensor, skip: Tensor, layer: int, config: Any) -> tuple[Tensor, Tensor]:
        entering = self.look(h)
        if self.acting is not None:
            h, skip = self.acting(h, skip, layer, config)
        self.calls[-1].append(Met(entering, self.look(h), self.look(skip)))
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

    def start(self, run: Any) -> "Plain":
        return self

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Plain":
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


# --------------------------------------------------------------------------------------------------------- figures

@dataclass
class Runs:
    """Pictures of the same prompts and seeds with any factors, each sampled once."""
    sd: StableDiffusion
    prompts: list[str]
    settings: Row           # of `sd.sample`
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
            if freeu not in (None, self.preset):                       # `latents` is asked for no others
                del self.latents_of[freeu]
        return self.images_of[freeu]

    def maps(self, freeu: Any = None) -> list[list[Met]]:
        """What meets in every decoder layer at every step, for the first batch."""
        prompts = self.prompts[:self.batch]
        recorder = Recorder(freeu, len(prompts))
        self.sd.sample(prompts, seed=self.seed, freeu=recorder, **self.settings)
        return recorder.calls


def spread(n: int, count: int) -> list[int]:
    """`count` of the numbers 0..n - 1 (or all of them), evenly, ends included."""
    return sorted({round(i) for i in np.linspace(0, n - 1, count)})


def denoising(runs: Runs, out: Path) -> Row:
    """Figure 3: x_t, decoded, and its two bands; numbers: their change between columns, relative to their end."""
    rows, numbers, at = {}, {}, spread(runs.settings["steps"], 8)
    for name, freeu in (("SD", None), ("FreeU", runs.preset)):
        images = torch.stack([runs.sd.decode(runs.latents(freeu)[i][:1]).cpu()[0] for i in at])
        rows[f"{name}\nx_t"] = list(images)
        for band, part, gray in zip(("low", "high"), bands(images), (0.0, 0.5)):
            rows[f"{name}\n{band} band"] = list(part + gray)
            change = (part[1:] - part[:-1]).square().mean(dim=(1, 2, 3)).sqrt() / part[-1].square().mean().sqrt()
            numbers[f"{name}, change of the {band} band"] = change.tolist()
    sheet(rows.items(), out / "denoising.png", [f"after step {i + 1}" for i in at],
          f"Denoising \"{runs.prompts[0]}\" (figure 3); bands split at a quarter of the highest frequency")
    return numbers


def panel(title: str, y: str, lines: list[Row]) -> tuple[Row, list[Row]]:
    """A panel of amplitudes y over frequencies; relative ones with the plateau of white noise."""
    x = max((of["x"] for of in lines), key=len)
    if y.startswith("relative"):
        lines = [*lines, line(x, [WHITE_NOISE] * len(x), "white noise, 0.3466", ":", "gray")]
    return dict(title=title, ylabel=y, xlabel="frequency, in units of pi"), lines


def spectra_over_steps(runs: Runs, out: Path) -> Row:
    """Figures 4 and 13: x_t's amplitude after every step, with and without FreeU; and white noise of the same size."""
    cmap, steps = pyplot().get_cmap("viridis"), runs.settings["steps"]
    noise = torch.randn(1024, 4, *runs.latents()[0].shape[-2:], generator=torch.Generator().manual_seed(0))
    frequency, white, _ = relative_log_amplitude(noise)
    numbers = {"frequency": frequency.tolist(), "white noise": white.tolist(), "its plateau": white[1:].mean().item()}
    curves = {name: [relative_log_amplitude(x) for x in runs.latents(freeu)]
              for name, freeu in (("SD", None), ("SD + FreeU", runs.preset))}
    panels, few = [], spread(steps, 3)
    for which, label in ((1, "relative log amplitude"), (2, "log amplitude")):
        row = [panel(name, label, [line(frequency, curve[i][which], f"step {i + 1}" if i in few else None, "-",
                                        cmap(i / steps)) for i in range(steps)]) for name, curve in curves.items()]
        both = [line(frequency, curve[i][which], f"{name}, step {i + 1}", style, cmap(i / steps))
                for i in few for (name, curve), style in zip(curves.items(), ("-", "--"))]
        panels.append([*row, panel("both", label, both)])
        numbers |= {f"{name}, {label}": [c[which].tolist() for c in curve] for name, curve in curves.items()}
    plot(panels, f"x_t over the steps (figures 4 and 13), {len(runs.prompts)} images; above relative to frequency "
         "0, below by itself", out / "spectra_over_steps.png")
    return numbers


def spectra_of_layers(runs: Runs, out: Path) -> Row:
    """Figure 7: backbone, skip and fused map at every decoder layer, with and without FreeU; mean over the steps."""
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
                    lines.append(line(of[0].frequency, mean, f"{part}, {name}", style, color))
        height, width = maps["SD"][0][i].skip.mean.shape
        title = (f"layer {i}, map {width}x{height}{', no curve' * all(len(of['x']) == 1 for of in lines)}, "
                 f"|skip| / |backbone| {ratio['SD']:.2f}")
        panels["log amplitude"].append(panel(title, "log amplitude", lines))
        panels["relative log amplitude"].append(panel(title, "relative log amplitude", [
            {**of, "y": of["y"] - of["y"][0]} for of in lines]))
        numbers.append({"layer": i, "map": [height, width], "norm of skip / of backbone": ratio,
                        "log amplitude": {of["label"]: of["y"].tolist() for of in lines}})
    for kind, row in panels.items():
        plot([row[k:k + 3] for k in range(0, len(row), 3)], "What meets in each decoder layer (figure 7), mean "
             f"over the steps: {kind}", out / f"spectra_of_layers_{kind.split()[0]}.png", legend=True)
    return {"layers": numbers}


def feature_maps(runs: Runs, out: Path) -> Row:
    """Figures 8 and 14: the mean over channels of what meets in each layer, in the middle of the run."""
    middle = runs.settings["steps"] // 2
    met = {"SD": runs.maps()[middle], "FreeU": runs.maps(runs.preset)[middle]}
    maps = {(part, name): [getattr(m, part) for m in met[name]] for part in ("backbone", "skip") for name in met}
    cmap, shown = pyplot().get_cmap("viridis"), []
    for (part, name), of in maps.items():
        scaled = [(seen.mean - seen.mean.min()) / (seen.mean.max() - seen.mean.min()).clamp_min(1e-12) for seen in of]
        shown.append((f"{part}\n{name}", [(255 * cmap(x.numpy())[..., :3]).astype(np.uint8) for x in scaled]))
    sheet(shown, out / "feature_maps.png", [f"layer {i}\n{m.skip.mean.shape[1]}x{m.skip.mean.shape[0]}"
                                            for i, m in enumerate(met["SD"])],
          f"Mean over the channels at step {middle + 1} of \"{runs.prompts[0]}\" (figures 8 and 14); each map on "
          "its own scale", side=110)
    return {f"norm of the {part}, {name}": [seen.norm for seen in of] for (part, name), of in maps.items()}


def image_spectra(runs: Runs, out: Path) -> Row:
    """Figure 6: the finished images' amplitude against b, for plain scaling and for FreeU."""
    cmap, panels, numbers = pyplot().get_cmap("plasma"), [[], [], []], {}
    kinds = {"all of the backbone times b": {b: Plain(b, 1.0) for b in (0.6, 0.8, 1.0, 1.2, 1.4)},
             "FreeU's b1 = b2 = b": {b: FreeU(b, b, 1.0, 1.0) for b in (1.0, 1.2, 1.4, 1.6, 1.8)}}
    for kind, variants in kinds.items():
        curves = {b: relative_log_amplitude(runs.images(freeu)) for b, freeu in variants.items()}
        of = {"relative log amplitude": {b: relative for b, (_, relative, _) in curves.items()},
              "log amplitude": {b: plain for b, (_, _, plain) in curves.items()},
              "log amplitude less that at b = 1": {b: c[2] - curves[1.0][2] for b, c in curves.items()}}
        for row, (label, lines) in zip(panels, of.items()):            # frequency 0 would dwarf the rest
            row.append(panel(kind, label, [line(curves[b][0][1:], y[1:], f"b = {b:g}", color=cmap(i / 5))
                                           for i, (b, y) in enumerate(lines.items())]))
        numbers[kind] = {label: {f"{b:g}": y.tolist() for b, y in lines.items()} for label, lines in of.items()}
    plot(panels, f"Finished images against b (figure 6), {len(runs.prompts)} images, without frequency 0",
         out / "image_spectra.png", size=4.2)
    return numbers


def b_s_grids(runs: Runs, out: Path) -> Row:
    """Figure 5, with plain factors in all layers, and the same question put to FreeU."""
    kinds = {"plain": ("All of the backbone times b, all of the skip times s, in all layers (figure 5)", Plain,
                       (0.6, 0.8, 1.0, 1.2, 1.4), (0.6, 0.8, 1.0, 1.2, 1.4)),
             "freeu": ("FreeU with b1 = b2 = b and s1 = s2 = s", lambda b, s: FreeU(b, b, s, s),
                       (1.0, 1.2, 1.4, 1.6, 1.8), (1.0, 0.8, 0.6, 0.4, 0.2))}
    numbers = {}
    for name, (title, make, bs, ss) in kinds.items():
        sheet([(f"s = {s:g}", [runs.images(make(b, s))[0] for b in bs]) for s in ss], out / f"b_s_grids_{name}.png",
              [f"b = {b:g}" for b in bs], f"{title}\n\"{runs.prompts[0]}\"")
        numbers[name] = {f"b {b:g}, s {s:g}": image_facts(runs.images(make(b, s))) for b in bs for s in ss}
    return numbers


def sheets(runs: Runs, out: Path) -> Row:
    """Figures 9, 10, 15 to 19: what the variants of FreeU do to the same pictures."""
    f, strong = runs.preset, replace(runs.preset, b1=1.8, b2=1.8)
    table = {
        "b_sweep": ("FreeU's b1 = b2 = b alone (figure 17)",
                    {f"b = {b:g}": FreeU(b, b, 1.0, 1.0) for b in (1.2, 1.4, 1.6, 1.8)}),
        "channels": (f"Channels that a constant b of {f.b1:g}, {f.b2:g} acts on (figures 9 and 19)",
                     {which: ChannelChoice(f.b1, f.b2, 1.0, 1.0, which=which) for which in CHANNELS}),
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
        sheet([(f"{k + 1}: {prompt}", [runs.images(freeu)[k] for freeu in variants.values()])
               for k, prompt in enumerate(runs.prompts[:4])], out / f"sheets_{name}.png",
              [f"{key}\ndetail {n['detail']:.3f}\ncolor {n['color']:.3f}" for key, n in facts.items()],
              f"{title}; numbers of {len(runs.prompts)} images")
    return numbers


FIGURES = {f.__name__: f for f in (denoising, spectra_over_steps, spectra_of_layers, feature_maps, image_spectra,
                                   b_s_grids, sheets)}


def make_figures(runs: Runs, out: Path, results: Results) -> None:
    """All figures as PNG files, and their numbers in the results; those made with the same settings are kept."""
    pyplot()                                                           # refused now, not after minutes
    for name, figure in tqdm(FIGURES.items(), desc="figures", unit="figure"):
        def numbers(figure=figure) -> Row:
            made = json.dumps({"what": figure.__doc__, **figure(runs, out)})
            return json.loads(made, parse_float=lambda x: float(f"{float(x):.5g}"))
        results.entry("figures", name, numbers, again=not any(out.glob(f"{name}*.png")), prompts=runs.prompts,
                      seed=runs.seed, **runs.settings)


# -------------------------------------------------------------------------------------------- search and judgement

LOW, HIGH = (0.8, 0.8, 0.0, 0.0), (1.8, 1.8, 1.2, 1.2)                 # where b1, b2, s1, s2 are searched


def search(reward: Callable[[Factors], float], known: list[Factors], candidates: int,
           seed: int = 0) -> list[tuple[Factors, float]]:
    """Random search, then refinement: all (b1, b2, s1, s2) that were tried with their rewards, the best first.

    The `known` factors come first. Of the other candidates, half are uniform in LOW..HIGH; half lie around the best so
    far, at a shrinking distance. The reward is noisy, and the best one's is too high: judge it on other pictures.
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


def tune(sd: StableDiffusion, results: Results, settings: Row, candidates: int, n: int, seed: int) -> None:
    """Searches by the strict score of n pictures per candidate, with other prompts and noises than those of `measure`.

    This world has few short sentences, so some prompts are drawn in both: `measure` also counts without these.
    """
    prompts = mixed_prompts(n, seed=20_000 + seed)

    def make() -> Row:
        with tqdm(total=candidates, desc="search", unit="candidate") as bar:
            def reward(factors: Factors) -> float:
                pictures = draw(sd, prompts, 50, 1_000_000 + seed, settings | {"freeu": FreeU(*factors)})
                bar.update()
                return float(np.mean([judged(*pair)["strict"] for pair in zip(pictures, prompts)]))
            tried = search(reward, [(1.0, 1.0, 1.0, 1.0), PRESETS[2][sd.config.family]], candidates, seed)
        return {"best": tried[0][0], "tried": tried, "prompts": prompts}
    results.entry("search", "factors", make, candidates=candidates, n=n, seed=seed, **settings)


def arms(family: str, searched: Factors | None) -> list[Arm]:
    two, one = PRESETS[2][family], PRESETS[1][family]
    table = {
        "base": ("no factors", {}),
        "preset v2": (f"FreeU version 2, {two}", {"freeu": FreeU(*two)}),
        "preset v1": (f"FreeU version 1, {one}", {"freeu": FreeU(*one, version=1)}),
        **({} if searched is None else {
            "searched": (f"FreeU version 2, {tuple(searched)}, the best of a search", {"freeu": FreeU(*searched)})}),
        "time-gated": (f"FreeU version 2, {two}, b in the first 0.6 of the steps, s from 0.4 of them on",
                       {"freeu": FreeU(*two, backbone=(0.0, 0.6), skip=(0.4, 1.0))}),
        "Skip-Tuning 0.8": ("skips times 0.8 (deepest) to 1", {"skips": SkipTuning(0.8)}),
        "Skip-Tuning 0.9": ("skips times 0.9 (deepest) to 1", {"skips": SkipTuning(0.9)}),
        "ScaleLong 0.95": ("skips times 0.95 to the power of depth", {"skips": ScaleLong(0.95)})}
    return [Arm(name, *what, primary=name == "preset v2") for name, what in table.items()]


def measure(sd: StableDiffusion, results: Results, known: list[Arm], run: list[Arm], settings: Row, n: int,
            seed: int) -> None:
    """Every arm draws the same n prompts from the same noise; also counted without the prompts of the search."""
    prompts = mixed_prompts(n, seed=30_000 + seed)
    searched = results.section("search").get("factors", {}).get("prompts", [])
    fresh = [k for k, prompt in enumerate(prompts) if prompt not in searched]
    right: dict[str, np.ndarray] = {}

    def facts(arm: Arm, row: Row) -> Row:
        of = right[arm.name] = np.array(list(row["strict"]), float)
        lead = bootstrap((of - right["base"])[fresh], [prompts[k] for k in fresh])["overall"] if fresh else ""
        return {"fresh prompts": len(fresh), "over base, fresh": lead,
                "by kind": {kind: float(of[k::len(KINDS)].mean()) for k, kind in enumerate(KINDS)}}
    head = f"over base, {len(fresh)} prompts that the search didn't have"
    measure_arms(sd, results, known, run, prompts, seed, 50, settings, facts=facts,
                 columns={head: ("over base, fresh", "+.3f" if fresh else "")})


# ---------------------------------------------------------------------------------------------------- command line

def main() -> None:
    parser = study.flags("FreeU's figures on any model; for the tiny one, its score.",
                         "model out n seed steps sampler cfg_scale device",
                         {"images": (8, "pictures per curve of the figures"),
                          "search_n": (80, "pictures per candidate of the search"),
                          "batch_size": (8, "pictures per batch, of the figures"),
                          "candidates": (25, "factors to try in the search")},
                         out=Path("out/freeu"), steps=25, cfg_scale=None)
    parser.add_argument("--search", action="store_true", help="search for the four factors, measure on other prompts")
    parser.add_argument("--measure", action="store_true", help="the score of every arm, with intervals")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="of the figures (default: the paper's)")
    args = parser.parse_args()
    sd, made_with = study.load(args, "--search and --measure" if args.search or args.measure else "", (args.steps,),
                               steps=2, images=1, batch_size=1, n=len(KINDS), candidates=3, search_n=1, seed=0)
    family, tiny = sd.config.family, sd.config.family == "tiny"
    guidance = args.cfg_scale if args.cfg_scale is not None else 4.0 if tiny else 7.5
    settings, results = dict(steps=args.steps, sampler=args.sampler, cfg_scale=guidance), Results(
        args.out / "freeu.json", made_with)
    prompts = args.prompt or (TINY_PROMPTS if tiny else PROMPTS)
    prompts = [prompts[k % len(prompts)] for k in range(args.images)]
    make_figures(Runs(sd, prompts, settings, FreeU(*PRESETS[2][family]), args.seed, args.batch_size), args.out, results)
    if args.search:
        tune(sd, results, settings, args.candidates, args.search_n, args.seed)
    if args.search or args.measure:
        known = arms(family, results.section("search").get("factors", {}).get("best"))
        few = "base", "preset v2", "searched"
        measure(sd, results, known, [arm for arm in known if args.measure or arm.name in few], settings, args.n,
                args.seed)


if __name__ == "__main__":
    run_command(main)
