"""What all studies share: rules, arms, results that know what made them, intervals, tables, sheets, curves, flags.

The rules: the strict score decides. Its primary comparison, the arms, prompts, seeds and the margin are declared before
the first picture (`declare`). Differences are paired, and prompts are drawn with all their pictures (`bootstrap`).
p-values are corrected over all arms (`holm`), and "the same" means within the margin (`says`). Start at `compare`. No
technique is named here, and no picture is made: `measure_arms` of `lab/evaluate.py` runs a study.
"""
import argparse
import glob
import hashlib
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm

from command import ArgumentParser, HelpFormatter, InputError, check_device, check_flags, replacing
from folder import TINY, digests, read_config, read_json
from sampler import SAMPLERS, plan
from stable_diffusion import StableDiffusion

MARGIN = 0.02                      # scores are "the same" if the whole interval of their difference is within this
VERSION = 3                        # of the lab's code: raised when a change of the code changes results
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- results

@dataclass(frozen=True)
class Arm:
    """One of the things that a study compares. text: a sentence that says what it is. base: what it is compared with.

    settings: arguments of `StableDiffusion.sample`, beside those that all arms have; or what its study reads there.
    primary: the comparison with its base is one of those that the study was made for; other arms are exploratory.
    group: its line in a figure.
    """
    name: str
    text: str
    settings: Any
    base: str = "base"
    group: str = ""
    primary: bool = False


def declare(arms: Iterable[Arm], prompts: Sequence[str], seed: int) -> Row:
    """What is fixed before the first picture; it is printed, and belongs into the results."""
    primary = [f"{arm.name} over {arm.base}" for arm in arms if arm.primary]
    rules = (f"strict score, {', '.join(primary) or 'no primary comparison'}; all other comparisons are exploratory; "
             f"{len(prompts)} pictures per arm with the same prompts and seeds; p corrected over all arms (Holm); the "
             f"same: 95 % interval within {MARGIN:g}")
    print(f"declared before the run: {rules}", flush=True)
    return {"rules": rules, "primary": primary, "margin": MARGIN, "arms": {arm.name: arm.text for arm in arms},
            "seeds": [seed, seed + len(prompts) - 1], "prompts": list(prompts)}


def to_json(value: Any) -> Any:
    """The value as it comes back from a JSON file: estimates as objects, settings as their text in Python."""
    return json.loads(json.dumps(value, default=lambda x: asdict(x) if isinstance(x, Estimate) else repr(x)))


@dataclass
class Results:
    """A JSON file {section: {name: entry}}. Each entry says under "made with" what made it."""
    path: Path
    made_with: Row

    def read(self) -> dict[str, dict[str, Row]]:
        try:
            return dict(json.loads(self.path.read_text())) if self.path.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"can't read the results in {self.path} ({error}); move it, or choose another --out"
                             ) from None

    def section(self, name: str) -> dict[str, Row]:
        return self.read().get(name, {})

    def write(self, section: str, entries: dict[str, Row]) -> None:
        """Adds entries to the file, which is read just before: two commands may share it."""
        data = self.read()
        data[section] = {**data.get(section, {}), **to_json(entries)}
        write_text(self.path, json.dumps(data, indent=1) + "\n")

    def entry(self, section: str, name: str, make: Callable[[], Row], again: bool = False, **made_with: Any) -> Row:
        """The entry as the file has it. `make` makes it if it is absent, was made with anything else, or `again`."""
        wanted = to_json({**self.made_with, **made_with})
        if again or self.section(section).get(name, {}).get("made with") != wanted:
            self.write(section, {name: {"made with": wanted, **make()}})
        return self.section(section)[name]


def make_rows(path: Path, made_with: Row, n: int, batch: int, make: Callable[[list[int]], list[Row]], rank: int = 0,
              world: int = 1) -> list[Row]:
    """Rows 0 to n - 1 in order, each made once: `make` gets the numbers of a batch, and a row has its own as "k".

    Each of `world` processes makes its share. Every batch is kept in a file beside `path` until `remove_parts`, so that
    a stopped run resumes; rows made with other settings are refused. A process that ends before the others gets no
    rows; the last one gets all.
    """
    made_with = to_json(made_with)

    def read() -> dict[int, Row]:
        rows = []
        for file in parts(path):
            part = json.loads(file.read_text())
            if part["made with"] != made_with:
                raise InputError(f"{file} is from a stopped run with another model or other settings; delete it, or "
                                 "choose another --out")
            rows += part["rows"]
        return {row["k"]: row for row in rows}
    done = read()
    todo = [k for k in range(rank, n, world) if k not in done]
    with tqdm(total=len(todo), unit="picture", disable=rank > 0, leave=False) as bar:
        for start in range(0, len(todo), batch):
            numbers = todo[start:start + batch]
            write_text(path.with_name(f".{path.name} part {numbers[0]}.json"),
                       json.dumps({"made with": made_with, "rows": make(numbers)}))
            bar.update(len(numbers))
    done = read()
    return [done[k] for k in range(n)] if len(done) == n else []


def parts(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{glob.escape(path.name)} part *.json"))


def remove_parts(path: Path) -> None:
    for file in parts(path):
        file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def digest(folder: Path) -> str:
    """A short name for all weights and settings of a model folder."""
    found = [digests(place, read_json(place / "config.json")) for place in (folder, folder / "clip") if place.is_dir()]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- statistics

@dataclass(frozen=True)
class Estimate:
    """The mean of n numbers and its 95 % interval; f"{estimate:+.2f}" formats all three alike.

    p: two-sided, of the hypothesis that the mean is 0; for differences.
    """
    mean: float
    low: float
    high: float
    n: int
    p: float | None = None

    def __format__(self, form: str) -> str:
        mean, low, high = (format(x, form) for x in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"


def wilson(share: float, n: int) -> Estimate:
    """A share of n trials. Better than the bootstrap for a single share, whose interval at 0 and 1 has no width."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n)), n)


def bootstrap(values: Any, prompts: Sequence | None = None, kinds: Sequence | None = None,
              draws: int = 2000) -> dict[str, Estimate]:
    """Means with percentile intervals by kind, and "overall", the unweighted mean of the kinds.

    values: a number per picture, (pictures,), or (trainings, pictures); for a paired comparison, differences.
    prompts, kinds: those of the pictures. None: each picture has a prompt of its own; all are of one kind.

    Prompts are drawn with replacement within each kind, all pictures of a prompt together: they are not independent.
    (Drawing single pictures gives the same numbers where no prompt occurs twice, and too narrow intervals otherwise.)
    Trainings are drawn likewise, each with the same prompts. A kind with one prompt has no spread to see: p is 1 then.
    """
    values, rng = np.atleast_2d(np.asarray(values, float)), np.random.default_rng(0)
    prompts = range(values.shape[1]) if prompts is None else prompts
    kinds = np.array(["overall"] * values.shape[1] if kinds is None else list(kinds))
    trainings, found, all_drawn = rng.integers(len(values), size=(draws, len(values))).T, {}, []
    seen = True

    def estimate(mean: float, drawn: np.ndarray, n: int) -> Estimate:
        p = 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (draws + 1)
        return Estimate(float(mean), *np.quantile(drawn, (0.025, 0.975)).tolist(), n, float(min(p, 1)) if seen else 1.0)
    for kind in dict.fromkeys(kinds.tolist()):
        chosen = np.flatnonzero(kinds == kind)
        place = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts[k] for k in chosen))}
        cluster = np.array([place[prompts[k]] for k in chosen])
        sums, counts = np.zeros((len(values), len(place))), np.bincount(cluster)
        np.add.at(sums, (slice(None), cluster), values[:, chosen])
        drawn = rng.integers(len(place), size=(draws, len(place)))
        seen = seen and len(place) > 1
        means = sums[:, drawn].sum(axis=2) / counts[drawn].sum(axis=1)                   # (trainings, draws)
        all_drawn.append(np.take_along_axis(means, trainings, axis=0).mean(axis=0))
        found[kind] = estimate(values[:, chosen].mean(), all_drawn[-1], len(values) * len(chosen))
    if len(found) > 1:
        found["overall"] = estimate(np.mean([x.mean for x in found.values()]), np.mean(all_drawn, axis=0), values.size)
    return found if len(found) > 1 else {**found, "overall": found[kind]}


def holm(p: dict[str, float]) -> dict[str, float]:
    """p-values corrected for how many there are, by Holm's step-down method."""
    found, largest = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.get)):
        found[name] = largest = max(largest, min(1.0, (len(p) - k) * p[name]))
    return {name: found[name] for name in p}


def says(lead: Estimate, p: float) -> str:
    """What a difference shows. Within the margin it counts as none, however certain it is.

    Fewer than 3 / MARGIN pictures never show that: if no picture differs, up to 3 / n of all may (the rule of three).
    """
    if -MARGIN < lead.low and lead.high < MARGIN and lead.n >= 3 / MARGIN:
        return "the same"
    return "not decided" if p >= 0.05 else "higher" if lead.mean > 0 else "lower"


def compare(arms: Iterable[Arm], scores: dict[str, np.ndarray], prompts: Sequence | None = None,
            kinds: Sequence | None = None) -> dict[str, Row]:
    """Score of every arm and its lead over its base, paired picture by picture, with p corrected over all arms.

    scores: by name, as in `bootstrap`. An arm whose base isn't there has no lead.
    """
    found = {}
    for arm in arms:
        own, base = scores[arm.name], scores.get(arm.base)
        found[arm.name] = {"base": arm.base, "primary": arm.primary, "score": wilson(float(own.mean()), own.size)
                           if own.ndim == 1 else bootstrap(own, prompts, kinds)["overall"]}
        if base is not None and arm.base != arm.name:
            found[arm.name]["over base"] = bootstrap(own - base, prompts, kinds)["overall"]
    for name, p in holm({name: x["over base"].p for name, x in found.items() if "over base" in x}).items():
        found[name] |= {"p, Holm": p, "says": says(found[name]["over base"], p)}
    return found


LEAD = ["over base", "p, Holm", f"same: within {MARGIN:g}"]             # the head of `lead_cells`


def lead_cells(row: Row) -> list[str]:
    if "over base" not in row:
        return [""] * 3
    return [f"{row['over base']:+.3f}", f"{row['p, Holm']:.3f}", row["says"] + " (primary)" * row["primary"]]


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    widths = [max(3, *map(len, of)) for of in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(x.ljust(width) for x, width in zip(row, widths))} |" for row in rows) + "\n"


# ------------------------------------------------------------------------------------------------- pictures and curves

def sheet(rows: Iterable[tuple[str, Sequence[Any]]], path: Path, columns: Sequence[str] = (), title: str = "",
          captions: Sequence[str] = (), frames: Sequence[str] = (), side: int = 128) -> None:
    """Labelled rows of pictures, (3, H, W) in [0, 1] or (H, W, 3) of bytes, as a PNG. side: the longer one's pixels.

    columns: a text above each column. captions, frames: a text below and a colour around each picture, row by row.
    """
    cell, captions, frames = side + 8, iter(captions), iter(frames)
    table = [[text_image(of, cell) for of in ("", *columns)]]
    for label, pictures in rows:
        table.append([text_image(label), *(framed(of, side, next(frames, "white")) for of in pictures)])
        table.append([text_image(""), *(text_image(next(captions, ""), cell) for _ in pictures)])
    left, heights = max(row[0].width for row in table), [max(image.height for image in row) for row in table]
    width = left + cell * (max(map(len, table)) - 1)
    head = text_image(title, width)
    page, y = Image.new("RGB", (width, head.height + sum(heights)), "white"), head.height
    page.paste(head)
    for row, height in zip(table, heights):
        for k, image in enumerate(row):
            page.paste(image, (left + cell * (k - 1) if k else 0, y))
        y += height
    with replacing(path) as part:
        page.save(part, format="PNG")


def text_image(text: str, width: int = 132) -> Image.Image:
    """The text in lines of about this width in pixels; an empty text gives a picture of no size."""
    if not text:
        return Image.new("RGB", (0, 0))
    lines = "\n".join(textwrap.fill(line, width // 6) for line in text.splitlines())
    *_, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((4, 2), lines)
    image = Image.new("RGB", (math.ceil(right) + 4, math.ceil(bottom) + 6), "white")
    ImageDraw.Draw(image).text((4, 2), lines, fill="black")
    return image


def framed(picture: Any, side: int, color: str) -> Image.Image:
    """A picture whose longer side is scaled to `side` pixels, in a frame of this colour."""
    if isinstance(picture, Tensor):
        picture = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    scale = side / max(picture.shape[:2])
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    image = Image.fromarray(picture).resize([round(scale * of) for of in picture.shape[1::-1]], resample)
    return ImageOps.expand(ImageOps.expand(image, 3, color), 1, "white")


def pyplot() -> Any:
    """matplotlib, which only the curves need, set to draw into files."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the figures need matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
        "figure.titlesize": 10, "axes.grid": True, "grid.alpha": 0.25, "lines.markersize": 3, "errorbar.capsize": 2})
    import matplotlib.pyplot
    return matplotlib.pyplot


def line(x: Any, y: Any, label: str | None = None, fmt: str = "-", color: Any = None, width: float = 1.3) -> Row:
    """y: numbers, or estimates, which are drawn with their intervals. fmt: matplotlib's line style and marker."""
    error = None
    if isinstance(y, Sequence) and y and isinstance(y[0], Estimate):
        error = [[of.mean - of.low for of in y], [of.high - of.mean for of in y]]
        y = [of.mean for of in y]
    return dict(x=np.asarray(x), y=np.asarray(y), label=label, fmt=fmt, color=color, yerr=error, linewidth=width)


def plot(panels: list[list[tuple[Row, list[Row]]]], title: str, path: Path, size: float = 3.4,
         legend: bool = False, share: bool = False) -> None:
    """Rows of panels, each the settings of its axes (title, ylabel, yscale, ...) and its lines, as a PNG.

    legend: one for all panels, in place of one per panel of the first row. share: one y axis per row.
    """
    rows, columns = len(panels), len(panels[0])
    figure, axes = pyplot().subplots(rows, columns, figsize=(size * columns + 0.5, 0.85 * size * rows + 0.6),
                                     squeeze=False, sharey="row" if share else False, layout="constrained")
    for axis, (look, lines) in zip(axes.flat, sum(panels, [])):
        for of in lines:
            axis.errorbar(**of)
        axis.set(**look)
    if legend:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for axis in axes[0]:
        if not legend and axis.get_legend_handles_labels()[1]:
            axis.legend(framealpha=0.5)
    figure.suptitle(title)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    pyplot().close(figure)


# --------------------------------------------------------------------------------------------------------------- flags

FLAGS = {"model": (Path, TINY, "model folder"), "out": (Path, None, "folder for figures and numbers"),
         "n": (int, 500, "pictures per arm"), "seed": (int, 0, "of the first picture; picture k has seed + k"),
         "steps": (int, 20, "denoising steps per picture"), "sampler": (str, "ddim", ", ".join(SAMPLERS)),
         "cfg_scale": (float, 4.0, "scale of classifier-free guidance"),
         "device": (str, "cuda" if torch.cuda.is_available() else "cpu", "of the model"),
         "arms": (str, None, "some of them, separated by commas (default: all)")}


def flags(description: str, names: str, numbers: dict[str, tuple[int, str]],
          **defaults: Any) -> argparse.ArgumentParser:
    """A parser with some of the shared flags, and with whole numbers of the study's own: their defaults and help."""
    parser = ArgumentParser(description=description, formatter_class=HelpFormatter)
    known = {name: FLAGS[name] for name in names.split()} | {name: (int, *of) for name, of in numbers.items()}
    for name, (kind, default, text) in known.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=defaults.get(name, default), help=text)
    return parser


def choose(known: Iterable[str], wanted: str | None) -> list[str]:
    """The names that --arms gives, in the study's order."""
    known = list(known)
    names = known if wanted is None else [name.strip() for name in wanted.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"there is no arm {unknown[0]!r}; there are {', '.join(known)}")
    return [name for name in known if name in names]


def load(args: argparse.Namespace, judged: str, runs: Iterable[int], dtype: torch.dtype | None = None,
         **least: int) -> tuple[StableDiffusion, Row]:
    """The model (dtype None: float32 on a CPU, else float16) and what its results depend on. Makes the folder --out.

    Bad flags are refused before the model is read. judged: the flags that need the drawn world's model, "" if none
    does. runs: numbers of steps that the sampler must be able to take. least: the smallest legal value by flag.
    """
    check_flags(*((f"--{name.replace('_', '-')}", getattr(args, name) >= smallest, f"{smallest} or more")
                  for name, smallest in least.items()))
    check_device(args.device)
    family = read_config(args.model).family
    if judged and family != "tiny":
        raise InputError(f"{judged}: only pictures of the drawn world can be judged, and {args.model} ({family}) "
                         "wasn't trained on it")
    try:
        for steps in runs:
            plan(args.sampler, steps)
        args.out.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise InputError(f"can't write to {args.out} ({error.strerror}); choose another --out") from None
    dtype = dtype or (torch.float32 if args.device == "cpu" else torch.float16)
    return StableDiffusion.load(args.model, args.device, dtype), {
        "model": digest(args.model), "dtype": str(dtype), "PyTorch": torch.__version__, "lab": VERSION}
