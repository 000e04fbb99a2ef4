"""Caches: between key steps only a part of the U-Net's units runs, the rest is reused from the last key step.

The flat list of `unet.py`, in SD 1.x:    conv_in  d1 d2 ... d11   mid   u0 u1 ... u11      (numbers 0 to 24)
Faster Diffusion reuses the left half:    -------------------------   and runs u0 ... u11
DeepCache, branch b, reuses the middle:   conv_in  d1 ... db  ---------------   u(11-b) ... u11
Inheritance (A-SDM) reuses any units.

Start at `Features`, which `UNet.forward` asks what to run and what to reuse. `FasterDiffusion`, `DeepCache` and
`Inherit` are settings; the sampling loop makes a `Features` from them for every run and throws it away afterwards.
`TGate` composes with them: from a step on, it reuses the attention to the text, or drops guidance, or both.
Sources: Faster Diffusion, arXiv 2312.09608; DeepCache, arXiv 2312.00858; A-SDM, arXiv 2406.00210; T-GATE, arXiv
2404.02747. Checked against outputs of the official codes of the first two: hutaiHang/Faster-Diffusion, and DeepCache's
pip package, whose branch numbers are ours (its paper's fork has one less).
"""
import math
from dataclasses import dataclass, field
from itertools import takewhile
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from freescale import Stage
    from freeu import FreeU
    from maskunet import MaskRun
    from unet import PerUnit, UNet


@dataclass
class Features:
    """What one run keeps from its last key step: a local variable of the sampling loop, never written to in place.

    reused: the numbers of the units whose output is kept at key steps and stands in for them at the others. A unit
    whose output nobody would read doesn't run either, and is not kept.
    """
    keys: frozenset[int]
    steps: int
    up_units: int
    reused: frozenset[int] = frozenset()
    parallel: bool = False                      # the settings of `FasterDiffusion`
    max_batch: int | None = None
    alpha: float = 0.0
    tau: float = 500
    late: bool = False
    step: int = -1                              # the present one
    key: bool = True                            # does everything run at the present step?
    kept: dict[int, Tensor] = field(default_factory=dict)
    ahead: list[Tensor] = field(default_factory=list)     # parallel: predictions of this group's steps to come

    def __post_init__(self) -> None:
        self.between, self.read = live_units(self.up_units, self.reused)

    def at(self, step: int) -> "Features":
        """Set for this step, by the loop. ValueError where steps fall: that is another image, which needs its own."""
        if step < self.step:
            raise ValueError("these features belong to another image's run: make new ones for every run")
        self.step, self.key = step, step in self.keys
        return self

    def runs(self, unit: int) -> bool:
        """Does this unit run at the present step?"""
        return self.key or unit in self.between

    def output(self, unit: int, h: Tensor | None) -> Tensor | None:
        """The place behind every unit: keep its output at key steps, give it back (None: nobody reads it) at others."""
        if self.key and unit in self.read:
            self.kept[unit] = h
        return h if self.runs(unit) else self.kept.get(unit)

    def units_run(self, first: int = 0) -> tuple[int, int]:
        """How many units a run from step `first` executes, and how many without a cache: conv_in and the middle too."""
        every, steps = 2 * self.up_units + 1, range(first, self.steps)
        full = sum(step in self.keys for step in steps)
        return full * every + (len(steps) - full) * len(self.between), len(steps) * every

    def inject(self, x: Tensor, prior: Tensor, t: float, late: bool = False) -> Tensor:
        """Prior noise injection: at times below tau, the latent plus a little of the noise that the run began with."""
        return x + self.alpha * prior if self.alpha and t < self.tau and late == self.late else x

    def decode_ahead(self, unet: "UNet", x: Tensor, i: int, shifts: list["PerUnit"], text: "PerUnit",
                     freeu: "FreeU | None", gate: "TextGate | None" = None, masks: "MaskRun | None" = None,
                     stage: "Stage | None" = None) -> Tensor:
        """Parallel Faster Diffusion: at a key step, predict for it and all steps up to the next one; else look it up.

        One call of the encoder, and the decoder on one batch: the rows of the first step, of the second, and so on.
        """
        if self.key:
            if gate is not None:
                gate.steps = 1
            scale = None if stage is None else stage.at(i)
            h, skips = unet.encode(x, shifts[i], text, gate=gate, freescale=scale)
            group = list(takewhile(lambda j: j == i or j not in self.keys, range(i, self.steps)))
            most = max(1, (self.max_batch or len(group) * len(x)) // len(x))              # steps a batch
            while group:
                strength = [None if freeu is None else freeu.at(j / self.steps) for j in group[:most]]
                n = next((k for k, s in enumerate(strength) if s != strength[0]), len(strength))    # alike in FreeU
                if gate is not None:
                    gate.steps = n
                if stage is not None:                                  # step i goes on with its encoder's windows
                    scale = scale.together([scale if j == i else stage.at(j) for j in group[:n]])
                out = unet.decode(repeat(h, n), [repeat(skip, n) for skip in skips],
                                  stack_steps([shifts[j] for j in group[:n]], len(x)),
                                  text._replace(up=[kv and [(repeat(k, n), repeat(v, n)) for k, v in kv]
                                                    for kv in text.up], source=repeat(text.source, n)),
                                  strength[0], None, gate, None if masks is None else masks.at(*group[:n]), scale)
                self.ahead += out.chunk(n)
                group = group[n:]
        return self.ahead.pop(0)

    def start(self, *_: object) -> "Features":
        """ValueError: for where the settings are asked for, and these are given."""
        raise ValueError("these are the features of one run: give the settings (DeepCache, ...) as the cache instead")


def live_units(up_units: int, reused: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Which units run between key steps, and whose kept outputs they read: what is read, from the last unit back."""
    run, read, todo = set(), set(), [2 * up_units]
    while todo:
        unit = todo.pop()
        if unit in reused:
            read.add(unit)
        elif unit not in run:
            run.add(unit)
            todo += [unit - 1] if unit > 0 else []
            todo += [2 * up_units - unit] if unit > up_units else []                      # an up unit's skip
    return frozenset(run), frozenset(read)


def repeat(x: Tensor, n: int) -> Tensor:
    """(B, ...) -> (n * B, ...), the batch n times over."""
    return x if n == 1 else x.repeat(n, *[1] * (x.dim() - 1))


def stack_steps(shifts: list["PerUnit"], batch: int) -> "PerUnit":
    """The up units' time shifts, and the times' embeddings, of several steps as one batch, `batch` rows a step."""
    rows = [[shift.expand(batch, -1) for shift in (*step.up, step.source)] for step in shifts]
    *up, source = [torch.cat(unit) for unit in zip(*rows)]
    return shifts[0]._replace(up=up, source=source)


@dataclass(frozen=True)
class FasterDiffusion:
    """Reuse the encoder. Between key steps the prediction then doesn't depend on the latent, only on the time.

    keys: "paper", the released list for 50 steps, as it is; "rescaled", the same list stretched to the number of steps;
        "square", gaps that grow by one (the released "pro"); a number n, every n-th step; or the steps themselves.
    parallel: decode a key step and those behind it in one batch, of as many whole steps as max_batch rows hold, and one
        at least: a step's rows are one batch in the encoder too. Valid with every sampler, stochastic ones too: the
        predictions don't depend on the latents between, and the noise is drawn step by step.
    alpha, tau: prior noise injection: at the times below tau, of 1000 (released: the second half), add alpha times the
        noise that the run began with to the latent at every step, 0.003 in the paper, which brings back texture that
        reuse takes away. Of a run that begins with a picture it is the noise alone, as strong as it was added there.
        (All samplers run on the variance-preserving latent here; the released code adds to Euler's x, which is larger.)
    official_order: in parallel mode, add it behind the prediction as released, not before it as in the paper; only then
        does parallel differ from serial.
    """
    keys: str | int | tuple[int, ...] = "paper"
    parallel: bool = False
    max_batch: int | None = None
    alpha: float = 0.0
    official_order: bool = False
    tau: float = 500

    def __post_init__(self) -> None:
        check_keys(self.keys)
        if self.max_batch is not None and (not is_whole(self.max_batch) or self.max_batch < 1):
            raise ValueError(f"the largest decoder batch must be 1 or more rows, not {self.max_batch}")
        if not 0 <= self.tau <= 1000:
            raise ValueError(f"the time below which noise is injected (tau) must be 0 to 1000, not {self.tau:g}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"the injected noise (alpha) must be between 0 and 1, not {self.alpha:g}; 0.003 is usual")

    def key_steps(self, steps: int) -> list[int]:
        """The steps at which everything runs, of a run of so many."""
        return key_steps(self.keys, steps)

    def start(self, steps: int, more: set[int], unet: "UNet") -> Features:
        """What the sampling loop makes for every run; `more` are key steps in any case, its first step among them."""
        n = len(unet.up_units())
        return Features(more.union(self.key_steps(steps)), steps, n, frozenset(range(n + 1)),
                        self.parallel, self.max_batch, self.alpha, self.tau, self.parallel and self.official_order)


@dataclass(frozen=True)
class DeepCache:
    """Reuse the deep units: between key steps, run conv_in, `branch` down units and the last `branch` + 1 up units.

    branch: 0 (the package's default: fastest) to one less than the number of up units; the paper's is 1 here.
    center, power: None, a key every `interval` steps; else as many keys, denser around step `center` (paper: 15 and 1.4
        of 50 steps), the more so the larger the power is; 1: evenly.
    schedule: of these, "released" for the keys of the published numbers, in which Python's power of a negative number
        was complex and only the real part used; "paper" for the formula as printed.
    """
    interval: int = 3
    branch: int = 0
    center: int | None = None
    power: float = 1.4
    schedule: str = "released"

    def __post_init__(self) -> None:
        if not is_whole(self.interval) or self.interval < 1:
            raise ValueError(f"DeepCache's interval must be 1 or more steps, not {self.interval}")
        if not is_whole(self.branch) or self.branch < 0:
            raise ValueError(f"DeepCache's branch must be 0 or more, not {self.branch}")
        if self.center is not None and not is_whole(self.center):
            raise ValueError(f"DeepCache's center is the number of a step, not {self.center}")
        if not 0.1 <= self.power <= 10:
            raise ValueError(f"DeepCache's power must be 0.1 to 10, not {self.power:g}; 1.2 to 1.5 are published")
        if self.schedule not in ("released", "paper"):
            raise ValueError(f"DeepCache's schedule is released or paper, not {self.schedule!r}")

    def key_steps(self, steps: int) -> list[int]:
        """The steps at which everything runs, of a run of so many."""
        if self.center is None:
            return key_steps(self.interval, steps)
        if not 0 < self.center < steps:
            raise ValueError(f"DeepCache's center {self.center} is not between the first and the last of {steps} steps")
        return nonuniform_keys(steps, math.ceil(steps / self.interval), self.center, self.power, self.schedule)

    def start(self, steps: int, more: set[int], unet: "UNet") -> Features:
        """What the sampling loop makes for every run; `more` are key steps in any case, its first step among them."""
        n = len(unet.up_units())
        if self.branch >= n:
            raise ValueError(f"DeepCache's branch {self.branch} is too large: this U-Net has 0 to {n - 1}")
        reused = range(self.branch + 1, 2 * n - self.branch)
        return Features(more.union(self.key_steps(steps)), steps, n, frozenset(reused))


@dataclass(frozen=True)
class Inherit:
    """Reuse the outputs of any units: A-SDM's feature inheritance, of which the other two are special cases.

    units: names and ranges of the flat list, such as "mid,u0-u2" or "d4-u7"; conv_in, d1 ..., mid, u0 ... (see above).
    keys: as Faster Diffusion's; a number n (every n-th step), or the steps themselves, are what makes most sense here.
    """
    units: str
    keys: str | int | tuple[int, ...] = 3
    parallel = False                            # the units between may need the latent

    def __post_init__(self) -> None:
        check_keys(self.keys)

    def key_steps(self, steps: int) -> list[int]:
        """The steps at which everything runs, of a run of so many."""
        return key_steps(self.keys, steps)

    def start(self, steps: int, more: set[int], unet: "UNet") -> Features:
        """What the sampling loop makes for every run; `more` are key steps in any case, its first step among them."""
        n = len(unet.up_units())
        return Features(more.union(self.key_steps(steps)), steps, n, unit_numbers(self.units, n))


def unit_numbers(text: str, up_units: int) -> frozenset[int]:
    """The numbers of the units that a text such as "conv_in,d4-mid,u0" names."""
    names = ["conv_in", *(f"d{i}" for i in range(1, up_units)), "mid", *(f"u{i}" for i in range(up_units))]
    numbers = set()
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if first not in names or (last or first) not in names or names.index(last or first) < names.index(first):
            raise ValueError(f"the cache's units are names and ranges of conv_in, d1 to d{up_units - 1}, mid, u0 to "
                             f"u{up_units - 1}, such as mid,u0-u2; {part!r} is none of them in this U-Net")
        numbers |= set(range(names.index(first), names.index(last or first) + 1))
    return frozenset(numbers)


# ----------------------------------------------------------------------------------------------------------- key steps

PAPER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)


def check_keys(keys: str | int | tuple[int, ...]) -> None:
    """ValueError for keys that are wrong in runs of any length."""
    listed = isinstance(keys, (tuple, list)) and all(map(is_whole, keys))
    if not listed and not is_whole(keys) and keys not in ("paper", "rescaled", "square"):
        raise ValueError(f"a cache's keys are paper, rescaled, square or whole numbers, not {keys!r}")
    if is_whole(keys) and keys < 1:
        raise ValueError(f"a key every {keys} steps makes no sense: use 1 or more")
    if listed and (not keys or keys[0] != 0 or list(keys) != sorted(set(keys))):
        raise ValueError(f"key steps must begin with 0 and rise, not {', '.join(map(str, keys)) or 'none'}")


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def key_steps(keys: str | int | tuple[int, ...], steps: int) -> list[int]:
    """The steps that `FasterDiffusion.keys` means in a run of so many. ValueError where they don't fit into it."""
    if keys == "paper":
        return [k for k in PAPER_KEYS if k < steps]
    if keys == "rescaled":
        return sorted({round(k * steps / 50) for k in PAPER_KEYS if round(k * steps / 50) < steps})
    if keys == "square":
        return [i for i in range(steps) if math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i]
    if is_whole(keys):
        if keys > steps:
            raise ValueError(f"a key every {keys} steps is more than the run's {steps}: use at most {steps}")
        return list(range(0, steps, keys))
    if keys[-1] >= steps:
        raise ValueError(f"key step {keys[-1]} is beyond the last of {steps} steps ({steps - 1})")
    return list(keys)


def notes(keys: list[int], steps: int) -> list[str]:
    """What to tell somebody who asks for these key steps: sentences, none where all is as published."""
    longest = max(b - a for a, b in zip(keys, [*keys[1:], steps]))
    if longest == 1:
        return ["every step is a key step: the cache saves nothing"]
    found = [] if longest <= 0.3 * steps else [
        f"features are reused over {longest} of {steps} steps, more than in any published schedule (15 of 50): expect "
        "other pictures, or use more keys"]
    return found if steps >= 20 else [
        *found, f"caches were published for 20 to 50 steps and lose more with {steps}; distilled models can't use them"]


def nonuniform_keys(steps: int, count: int, center: int, power: float, schedule: str = "released") -> list[int]:
    """Keys at l ** power + center for evenly spaced l (DeepCache, eq. 9): fewer than `count` where they fall together.

    "released": l from (-center) ** (1 / power), a complex number in Python, along a line in the complex plane, the real
    part truncated; with a smaller power (by 0.02) until there are `count` different keys.
    """
    if schedule == "paper":
        ends = [math.copysign(abs(end) ** (1 / power), end) for end in (-center, steps - center)]
        spaced = np.linspace(*ends, count + 1)
        keys = np.trunc(np.sign(spaced) * np.abs(spaced) ** power).astype(int) + center
        return [0, *sorted(set(keys.tolist()))[1:-1]]
    while power > 0.02:                                                # below, the numbers overflow
        ends = [complex(end) ** (1 / power) for end in (-center, steps - center)]
        keys = [int((x ** power).real) + center for x in np.linspace(*ends, count + 1)]
        keys = [0, *sorted(set(keys))[1:-1]]
        if len(keys) == count:
            return keys
        power -= 0.02
    raise ValueError(f"there are no {count} keys in {steps} steps around {center}; use a larger interval")


# ------------------------------------------------------------------------------------------------------------- T-GATE

@dataclass(frozen=True)
class TGate:
    """T-GATE: the text acts in the first `step` steps alone. Two separate choices for the steps from there on:

    text: "reuse" what attention to the text gave last, or "compute" it as before.
    guidance: "drop" it (one row a picture instead of two), or "keep" it. Most of T-GATE's saving is this: attention to
        the text is 4 % of SD 1.5's arithmetic.
    The paper and its release do "reuse" and "drop", with the mean of both halves' attention. With guidance kept, each
    half reuses its own (of a common mean, both would predict the same, and guidance do nothing). The last of the
    `step` steps is kept, or where a cache skipped a unit there, what that gave last.
    """
    step: int
    text: str = "reuse"
    guidance: str = "drop"

    def __post_init__(self) -> None:
        if not is_whole(self.step) or self.step < 1:
            raise ValueError(f"T-GATE's step must be 1 or more, not {self.step}: before it, the text acts")
        if self.text not in ("reuse", "compute") or self.guidance not in ("drop", "keep"):
            raise ValueError(f"T-GATE can reuse or compute the text and drop or keep guidance, not {self.text!r} and "
                             f"{self.guidance!r}")
        if self.text == "compute" and self.guidance == "keep":
            raise ValueError("T-GATE with the text computed and guidance kept does nothing: change one of them")

    def start(self, steps: int, first: int) -> tuple[int, "TextGate | None"]:
        """The step from which it acts, of a run from step `first` (computed in any case), and what it keeps."""
        if self.step >= steps:
            raise ValueError(f"T-GATE's step {self.step} is beyond the last of {steps} steps ({steps - 1})")
        return max(self.step, first + 1), TextGate() if self.text == "reuse" else None


@dataclass
class TextGate:
    """What one run keeps of its attention to the text: for each TransformerBlock, what that gave last."""
    open: bool = True                           # is it computed at the present step?
    steps: int = 1                              # in one batch: parallel Faster Diffusion decodes several
    kept: dict["torch.nn.Module", Tensor] = field(default_factory=dict)

    def close(self, other: "TextGate | None" = None, average: bool = False) -> None:
        """From here on it is reused. average: both halves of guidance become one; the first is here or in `other`."""
        self.open = False
        if average:
            first_and_second = {block: h.chunk(2) if other is None else (other.kept[block], h)
                                for block, h in self.kept.items()}
            self.kept = {block: (a + b) / 2 for block, (a, b) in first_and_second.items()}

    def output(self, block: "torch.nn.Module", h: Tensor) -> Tensor:
        """The place behind attention to the text: keep what it gave (the last of several steps), or give it back."""
        if self.open:
            self.kept[block] = h if self.steps == 1 else h.chunk(self.steps)[-1].clone()
            return h
        return repeat(self.kept[block], self.steps)
