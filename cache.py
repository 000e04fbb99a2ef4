"""Caches: between key steps, only some units of the U-Net run; the others' outputs are those of the last key step.

The flat list of `unet.py`, in SD 1.x:    conv_in  d1 d2 ... d11   mid   u0 u1 ... u11      (numbers 0 to 24)
Faster Diffusion reuses the left half:    -------------------------   and runs u0 ... u11
DeepCache, branch b, reuses the middle:   conv_in  d1 ... db  ---------------   u(11-b) ... u11
Inheritance (A-SDM) reuses any chosen units.

Start at `Reuse`, which `UNet.encode` and `decode` ask what to run. `FasterDiffusion`, `DeepCache` and `Inherit` are
settings; for every run the sampling loop makes `Features` from them and drops it afterwards. `TGate` works together
with them: from a given step on, it reuses the results of cross-attention, or drops guidance, or both.
Sources: Faster Diffusion, arXiv 2312.09608; DeepCache, arXiv 2312.00858; A-SDM, arXiv 2406.00210; T-GATE, arXiv
2404.02747. Checked against outputs of the official codes of all but A-SDM. DeepCache's branches are numbered as in its
pip package; the fork of its paper counts one less.
"""
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unet import PerUnit, UNetConfig


@dataclass
class Features:
    """A cache in a run. settings: of one of the caches. run: the `sampler.Run`.

    keys: the calls that run all units. live: the units that run at every call.
    read: the units whose outputs are kept at key calls, because a live unit needs them at the others.
    kept: these outputs, for each set of branches of guidance that is predicted in one batch.
    """
    settings: "CacheSettings"
    run: Any
    kept: dict[tuple[int, ...], dict[int, Tensor]] = field(default_factory=dict)
    parallel = False

    def __post_init__(self) -> None:
        plan, self.middle = self.run.plan, self.run.network("a cache").middle
        self.live, self.read = live_units(self.middle, self.settings.reused(self.middle))
        steps = self.settings.key_steps(plan.steps, plan.step(self.run.first))
        self.keys = self.run.turns | {i for i in range(plan.calls) if plan.step(i) in steps}

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Reuse":
        return Reuse(calls[0] in self.keys, self.live, self.read, self.kept.setdefault(halves, {}))

    def units(self, i: int) -> frozenset[int]:
        """The numbers of the units that run at call i."""
        return frozenset(range(2 * self.middle + 1)) if i in self.keys else self.live

    def inject(self, i: int, x: Tensor, predicted: bool = False) -> Tensor:
        """Faster Diffusion's prior noise: x before the prediction of call i or, in the released order, after it."""
        run, s = self.run, self.settings
        if not s.alpha or run.plan.times[i] >= s.tau or predicted != s.official_order:
            return x
        strength = run.plan.start_scale if run.init is None else math.sqrt(1 - run.plan.now[run.first])
        return x + s.alpha * (strength * run.noise)


@dataclass
class Reuse:
    """A cache at one call, for the U-Net. key: do all units run? The others are as in `Features`."""
    key: bool
    live: frozenset[int]
    read: frozenset[int]
    kept: dict[int, Tensor]

    def runs(self, unit: int) -> bool:
        return self.key or unit in self.live

    def output(self, unit: int, h: Tensor | None) -> Tensor | None:
        """Called after every unit. Returns its output h, or the kept one if it did not run (None: no unit needs it)."""
        if self.key and unit in self.read:
            self.kept[unit] = h
        return h if self.runs(unit) else self.kept.get(unit)


@dataclass
class Ahead(Features):
    """Parallel Faster Diffusion in a run: a key step and all steps up to the next one are decoded in one batch."""
    waiting: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)     # predictions of later calls
    parallel = True

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> None:
        return None                             # all units of a pass run; `ahead` decides whether the encoder runs

    def ahead(self, x: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
        """The prediction of call i. A key step runs the encoder once, then the decoder on batches of calls."""
        run, waiting = self.run, self.waiting.setdefault(halves, [])
        if i in self.keys:
            shifts, text, _ = run.inputs(halves)
            x = torch.cat([x.to(text.source.dtype)] * len(halves))
            h, skips = run.unet.encode(x, shifts[i], text, run.on((i,), halves))
            unread = self.middle + 1                                   # the units before the decoder's
            for group in self.groups(i, len(x)):
                n = len(group)
                waiting += run.unet.decode(
                    repeat(h, n), [repeat(skip, n) for skip in skips], stack([shifts[j] for j in group], len(x)),
                    PerUnit([[]] * unread + [[(repeat(k, n), repeat(v, n)) for k, v in unit]
                                             for unit in text.of[unread:]], repeat(text.source, n)),
                    run.on(group, halves)).chunk(n)
        return waiting.pop(0)

    def groups(self, i: int, rows: int) -> Iterator[tuple[int, ...]]:
        """The calls from i up to the next key step, in groups that are small enough and alike enough for one batch."""
        most, group = max(1, (self.settings.max_batch or 10 ** 9) // rows), (i,)
        for j in takewhile(lambda j: j not in self.keys, range(i + 1, self.run.plan.calls)):
            if len(group) == most or not self.run.alike(group[0], j):
                yield group
                group = ()
            group += (j,)
        yield group


def live_units(middle: int, reused: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Which units run at every call, and whose kept outputs they need: found by going back from the last unit.

    A unit whose output no live unit needs runs at key calls only, and its output is not kept.
    """
    live, read, todo = set(), set(), [2 * middle]
    while todo:
        unit = todo.pop()
        if unit in reused:
            read.add(unit)
        elif unit not in live:
            live.add(unit)
            todo += [unit - 1] if unit > 0 else []
            todo += [2 * middle - unit] if unit > middle else []       # an up unit's skip
    return frozenset(live), frozenset(read)


def repeat(x: Tensor, n: int) -> Tensor:
    """(B, ...) -> (n * B, ...): the batch repeated n times."""
    return x if n == 1 else x.repeat(n, *[1] * (x.dim() - 1))


def stack(shifts: list[PerUnit], rows: int) -> PerUnit:
    """The shifts of several calls as one batch, with `rows` rows per call."""
    def together(each: Iterable[Tensor]) -> Tensor:
        return torch.cat([x.expand(rows, -1) for x in each])
    return PerUnit([[together(resnet) for resnet in zip(*unit)] for unit in zip(*(step.of for step in shifts))],
                   together(step.source for step in shifts))


# ------------------------------------------------------------------------------------------------------------ settings

Keys = Literal["paper", "rescaled", "square"] | int | tuple[int, ...]


class CacheSettings:
    """What the settings of the caches share. Each says which units are reused between key steps: `reused(middle)`."""
    keys: Keys
    parallel = official_order = False
    alpha = 0.0

    def key_steps(self, steps: int, first: int = 0) -> list[int]:
        """The steps at which all units run, of a run of the steps from `first` to steps - 1."""
        return key_steps(self.keys, steps, first)

    def check(self, config: UNetConfig, steps: int, guided: bool = True) -> None:
        """ValueError for settings that don't fit this U-Net or a run of this many steps."""
        self.reused(len(config.channels) * (config.layers + 1))
        self.key_steps(steps)

    def start(self, run: Any) -> Features:
        self.check(run.network("a cache").config, run.plan.steps)
        return (Ahead if self.parallel else Features)(self, run)


@dataclass(frozen=True)
class FasterDiffusion(CacheSettings):
    """Faster Diffusion: reuse the encoder.

    Between key steps the prediction depends only on the time, not on the latents. That makes parallel decoding
    possible, with stochastic samplers too.

    keys: the key steps. "paper": the released list for 50 steps; "rescaled": this list, stretched to the number of
        steps; "square": gaps that grow by one (the released "pro"); a number n: every n-th step, counted from the first
        one that runs; or a list of steps.
    parallel: decode a key step together with the steps up to the next one.
    max_batch: with parallel, the largest number of rows in a batch of the decoder; a batch has at least one step.
    alpha: how much prior noise is injected at every step below tau; 0: none. 0.003 is the paper's. Prior noise is the
        noise with which the run began. It restores texture that reuse removes. In img2img, only the noise that was
        added to the start picture is injected, at the strength it had there. (All samplers run on the
        variance-preserving latent here; the released code adds the noise to Euler's x, which is larger.)
    official_order: with parallel, inject after the prediction, as in the released code; the paper injects before it.
        Only this setting makes parallel and serial decoding differ.
    tau: the timestep (0 to 1000) below which noise is injected (released code: the second half).
    """
    keys: Keys = "paper"
    parallel: bool = False
    max_batch: int | None = None
    alpha: float = 0.003
    official_order: bool = False
    tau: float = 500

    def __post_init__(self) -> None:
        check_keys(self.keys)
        check_fields("Faster Diffusion", self,
                     max_batch=(self.max_batch is None or whole(self.max_batch, 1), "1 or more rows"),
                     alpha=(0 <= self.alpha <= 1, "between 0 and 1 (0.003 is usual)"),
                     tau=(0 <= self.tau <= 1000, "a timestep from 0 to 1000"))
        check_idle("Faster Diffusion", self, not self.parallel, "without parallel", "max_batch", "official_order")
        check_idle("Faster Diffusion", self, not self.alpha, "with alpha 0", "official_order", "tau")

    def reused(self, middle: int) -> frozenset[int]:
        return frozenset(range(middle + 1))

    def canonical(self) -> "FasterDiffusion":
        """The settings of the same pictures, without what only makes them faster: for a picture's metadata."""
        return replace(self, parallel=self.official_order, max_batch=None)


@dataclass(frozen=True)
class DeepCache(CacheSettings):
    """DeepCache: between key steps, run conv_in, `branch` down units and the last `branch` + 1 up units.

    interval: a key step every `interval` steps, counted as in the package from the first step that runs: 11, 16, 21,
        ... in img2img from step 11 on.
    branch: 0 (the package's default, the fastest) to one less than the number of up units; the paper's is 1 here.
    center: None, or the step around which the key steps are denser; their number stays (paper: 15, of 50 steps). These
        key steps are counted from step 0, in img2img too.
    power: with center, how much denser they are; 1: evenly spaced (paper: 1.4).
    schedule: with center: "paper" for the formula as printed; "released" for the key steps of the published results,
        whose code took the real part where Python's power of a negative number is complex.
    """
    interval: int = 3
    branch: int = 0
    center: int | None = None
    power: float = 1.4
    schedule: Literal["released", "paper"] = "released"

    def __post_init__(self) -> None:
        check_fields("DeepCache", self, interval=(whole(self.interval, 1), "1 or more steps"),
                     branch=(whole(self.branch, 0), "0 or more"),
                     center=(self.center is None or whole(self.center, 0), "the number of a step"),
                     power=(1 <= self.power <= 10, "1 to 10 (1.2 to 1.5 are published)"),
                     schedule=(self.schedule in ("released", "paper"), "released or paper"))
        check_idle("DeepCache", self, self.center is None, "without center", "power", "schedule")

    def key_steps(self, steps: int, first: int = 0) -> list[int]:
        if self.center is None:
            return key_steps(self.interval, steps, first)
        if not 0 < self.center < steps:
            raise ValueError(f"DeepCache's center {self.center} is not between the first and the last of {steps} steps")
        return nonuniform_keys(steps, math.ceil(steps / self.interval), self.center, self.power, self.schedule)

    def reused(self, middle: int) -> frozenset[int]:
        if self.branch >= middle:
            raise ValueError(f"DeepCache's branch {self.branch} is too large: this U-Net has 0 to {middle - 1}")
        return frozenset(range(self.branch + 1, 2 * middle - self.branch))


@dataclass(frozen=True)
class Inherit(CacheSettings):
    """Feature inheritance (A-SDM): reuse the outputs of any units. The other two caches are special cases.

    units: names (conv_in, d1, d2, ..., mid, u0, u1, ...) and ranges of units, such as mid:u0-u2 or d4-u7.
    keys: the key steps. A number n: every n-th step; a list of steps; or a word, as for Faster Diffusion.
    """
    units: str
    keys: Keys = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", self.units.replace(" ", "").replace(",", ":"))
        check_keys(self.keys)

    def reused(self, middle: int) -> frozenset[int]:
        names = ["conv_in", *(f"d{i}" for i in range(1, middle)), "mid", *(f"u{i}" for i in range(middle))]
        numbers = set()
        for part in self.units.split(":"):
            first, _, last = part.partition("-")
            if first not in names or (last or first) not in names or names.index(last or first) < names.index(first):
                raise ValueError(f"the cache's units are names and ranges of conv_in, d1 to d{middle - 1}, mid, u0 to "
                                 f"u{middle - 1}, such as mid:u0-u2; {part!r} is none of them in this U-Net")
            numbers |= set(range(names.index(first), names.index(last or first) + 1))
        return frozenset(numbers)


def check_fields(title: str, settings: Any, **legal: tuple[bool, str]) -> None:
    """ValueError for the first field that doesn't fit. legal: for each field, whether it fits, and what it must be."""
    for name, (fits, words) in legal.items():
        if not fits:
            raise ValueError(f"{title}'s {name} must be {words}, not {getattr(settings, name)!r}")


def check_idle(title: str, settings: Any, idle: bool, where: str, *names: str) -> None:
    """ValueError for the first field of these names that was given although it is idle."""
    for name in names if idle else ():
        if getattr(settings, name) != getattr(type(settings), name):
            raise ValueError(f"{title}'s {name} does nothing {where}")


def whole(value: object, least: float = -math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


# ----------------------------------------------------------------------------------------------------------- key steps

PAPER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)


def check_keys(keys: Keys) -> None:
    """ValueError for keys that are wrong in runs of any length."""
    rise = isinstance(keys, (tuple, list)) and all(map(whole, keys)) and list(keys) == sorted({0, *keys})
    if not (rise or whole(keys, 1) or keys in ("paper", "rescaled", "square")):
        raise ValueError("a cache's keys are paper, rescaled, square, a whole number from 1 up, or whole numbers that "
                         f"begin with 0 and rise, not {keys!r}")


def key_steps(keys: Keys, steps: int, first: int = 0) -> list[int]:
    """The key steps that `FasterDiffusion.keys` means in a run of the steps from `first` to steps - 1."""
    if keys == "paper":
        return [k for k in PAPER_KEYS if k < steps]
    if keys == "rescaled":
        return sorted({round(k * steps / 50) for k in PAPER_KEYS if round(k * steps / 50) < steps})
    if keys == "square":
        return [i for i in range(steps) if math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i]
    if whole(keys):
        if keys > steps:
            raise ValueError(f"a key every {keys} steps is more than the run's {steps}: use at most {steps}")
        return list(range(first, steps, keys))
    if keys[-1] >= steps:
        raise ValueError(f"key step {keys[-1]} is beyond the last of {steps} steps ({steps - 1})")
    return list(keys)


def notes(keys: list[int], steps: int) -> list[str]:
    """Warnings for a user who chooses these key steps; none if they are as published."""
    longest, found = max(b - a for a, b in zip(keys, [*keys[1:], steps])), []
    if longest == 1:
        return ["every step is a key step: the cache saves nothing"]
    if longest > 0.3 * steps:
        found += [f"features are reused over {longest} of {steps} steps, more than in any published schedule (15 of "
                  "50): expect other pictures, or use more keys"]
    if steps < 20:
        found += [f"caches were published for 20 to 50 steps and lose more with {steps}; distilled models can't use "
                  "them"]
    return found


def nonuniform_keys(steps: int, count: int, center: int, power: float, schedule: str = "released") -> list[int]:
    """Keys at l ** power + center for evenly spaced l (DeepCache, eq. 9); fewer than `count` if some coincide.

    "released": (-center) ** (1 / power) is a complex number in Python, so l lies on a line in the complex plane. The
    real part is truncated. Until there are `count` different keys, the power is lowered by 0.02, but not to 1 or less.
    """
    def raised(x: complex, power: float) -> complex:
        return (x + 0j) ** power if schedule == "released" else math.copysign(abs(x) ** power, x)

    lowered = power
    while True:
        spaced = np.linspace(*(raised(end, 1 / lowered) for end in (-center, steps - center)), count + 1)
        keys = [0, *sorted({int(raised(x, lowered).real) + center for x in spaced})[1:-1]]
        if len(keys) == count or schedule == "paper":
            return keys
        lowered -= 0.02
        if lowered <= 1:
            raise ValueError(f"there are no {count} different key steps of {steps} around {center} with power "
                             f"{power:g}; use a larger interval, or schedule=paper")


# ------------------------------------------------------------------------------------------------------------- T-GATE

@dataclass(frozen=True)
class TGate:
    """T-GATE: the text acts in the first `step` steps only.

    The paper and its released code use text "reuse" and guidance "drop"; they reuse the mean of both branches' results,
    and in SDXL the row that remains has the negative prompt's pooled text and sizes. With guidance kept, each branch
    reuses its own result: with a common mean, both would predict the same. The result reused is that of the last call
    in which the unit ran and computed it.

    step: the first step without the text, 1 or more. The first step of a run always has the text, in img2img too.
    text: from this step on, "reuse" the last result of cross-attention, or "compute" it as before.
    guidance: from this step on, "drop" it (one row per image instead of two), or "keep" it. Dropping it gives most of
        T-GATE's saving: cross-attention is only 4 % of SD 1.5's arithmetic.
    version: 1, the paper's; 2, the later default of the released code, which reuses results of self-attention too,
        except in the steps that the next three name, counted from the first step that runs.
    warm_up: version 2 computes self-attention in all steps up to this one.
    interval: after them, version 2 computes it in every interval-th step, and in the last one before `step`.
    late_interval: from `step` on, version 2 computes it in every late_interval-th step; 1: in all.
    """
    step: int
    text: Literal["reuse", "compute"] = "reuse"
    guidance: Literal["drop", "keep"] = "drop"
    version: Literal[1, 2] = 1
    warm_up: int = 2
    interval: int = 5
    late_interval: int = 1

    def __post_init__(self) -> None:
        check_fields("T-GATE", self, step=(whole(self.step, 1), "1 or more: before it, the text acts"),
                     text=(self.text in ("reuse", "compute"), "reuse or compute"),
                     guidance=(self.guidance in ("drop", "keep"), "drop or keep"),
                     version=(self.version in (1, 2), "1 or 2"), warm_up=(whole(self.warm_up, 0), "0 or more"),
                     interval=(whole(self.interval, 1), "1 or more"),
                     late_interval=(whole(self.late_interval, 1), "1 or more"))
        if self.text == "compute" and self.guidance == "keep":
            raise ValueError("T-GATE with the text computed and guidance kept does nothing: change one of them")
        check_idle("T-GATE", self, self.text == "compute", "with text=compute", "version")
        check_idle("T-GATE", self, self.version == 1, "without version=2", "warm_up", "interval", "late_interval")

    def check(self, config: UNetConfig | None, steps: int, guided: bool = True) -> None:
        """ValueError for settings that do nothing in a run of this many steps, or without guidance."""
        if self.step >= steps:
            raise ValueError(f"T-GATE's step {self.step} is beyond the last of {steps} steps ({steps - 1})")
        if not guided and self.text == "compute":
            raise ValueError("T-GATE with text=compute only drops guidance, and this run has none: leave it out")
        if not guided and self.guidance == "keep":
            raise ValueError("T-GATE's guidance=keep does nothing in a run without guidance: leave it out")

    def turns(self, plan: Any, first: int, size: tuple[int, int]) -> set[int]:
        """The call from which T-GATE acts; the first call of a run is always computed in full."""
        self.check(None, plan.steps)
        return {plan.first_call(max(self.step, plan.step(first) + 1))}

    def start(self, run: Any) -> "Gating":
        self.check(run.network("T-GATE").config, run.plan.steps, guided=len(run.branches) > 1)
        return Gating(self, run, *self.turns(run.plan, run.first, run.noise.shape[2:]))


@dataclass
class AttentionGate:
    """T-GATE at one call, or at several in one batch, for one kind of attention. open: is it computed?"""
    open: bool
    calls: int
    kept: dict[torch.nn.Module, Tensor]

    def output(self, block: torch.nn.Module, h: Tensor) -> Tensor:
        """Called after the attention: keeps its result h (that of the last call), or returns the kept result."""
        if not self.open:
            return repeat(self.kept[block], self.calls)
        self.kept[block] = h if self.calls == 1 else h.chunk(self.calls)[-1].clone()
        return h


@dataclass
class Gating:
    """T-GATE in a run.

    turn: the first call without the text.
    kept: the last results of self- and cross-attention by TransformerBlock, for each set of branches.
    """
    settings: TGate
    run: Any
    turn: int
    kept: dict[Any, tuple[dict[torch.nn.Module, Tensor], ...]] = field(default_factory=dict)

    def halves(self, i: int, halves: tuple[int, ...]) -> tuple[int, ...]:
        """The branches that call i needs. With the text reused, only the time and SDXL's added condition are read."""
        if i < self.turn or self.settings.guidance == "keep":
            return halves
        return halves[:1] if self.settings.text == "reuse" else halves[-1:]

    def open(self, i: int) -> bool:
        """Is the text attended to at call i?"""
        return i < self.turn or self.settings.text == "compute"

    def own(self, i: int) -> bool:
        """Is self-attention computed at call i?"""
        plan, s = self.run.plan, self.settings
        n, last = plan.step(i) - plan.step(self.run.first), plan.step(i) == plan.step(self.turn) - 1
        if s.version == 1 or i in self.run.turns - {self.turn}:
            return True
        return n % s.late_interval == 0 if i >= self.turn else n <= s.warm_up or n % s.interval == 0 or last

    def alike(self, i: int, j: int) -> bool:
        return self.own(i) == self.own(j)

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> tuple[AttentionGate | None, AttentionGate] | None:
        s, i, kept = self.settings, calls[0], self.kept.setdefault(halves, ({}, {}))
        if s.text == "compute":
            return None
        if s.guidance == "drop" and i >= self.turn and len(self.run.branches) > 1:
            if "mean" not in self.kept:                                # made here: in the U-Net it would need a graph
                both = self.kept.get((0, 1)) or [{block: torch.cat([h, b[block]]) for block, h in a.items()}
                                                 for a, b in zip(self.kept[0,], self.kept[1,])]
                self.kept["mean"] = tuple({block: sum(h.chunk(2)) / 2 for block, h in of.items()} for of in both)
            kept = self.kept["mean"]
        own = AttentionGate(self.own(i), len(calls), kept[0]) if s.version == 2 else None
        return own, AttentionGate(self.open(i), len(calls), kept[1])
