"""Caches: between key steps, only some units of the U-Net run; the others' outputs are those of the last key step.

The flat list of `unet.py`, in SD 1.x:    conv_in  d1 d2 ... d11   mid   u0 u1 ... u11      (numbers 0 to 24)
Faster Diffusion reuses the left half:    -------------------------   and runs u0 ... u11
DeepCache, branch b, reuses the middle:   conv_in  d1 ... db  ---------------   u(11-b) ... u11
Inheritance (A-SDM) reuses any chosen units.

Start at `Reuse`, which `UNet.encode` and `decode` ask what to run. `FasterDiffusion`, `DeepCache` and `Inherit` are
settings; the sampling loop makes `Features` from them for every run and drops it after the run. `TGate` works together
with them: from a given step on, it reuses the results of cross-attention, or drops guidance, or both.
Sources: Faster Diffusion, arXiv 2312.09608; DeepCache, arXiv 2312.00858; A-SDM, arXiv 2406.00210; T-GATE, arXiv
2404.02747. Checked against outputs of the official codes of the first two: hutaiHang/Faster-Diffusion, and DeepCache's
pip package, whose branch numbers are used here (the fork of its paper counts one less).
"""
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unet import PerUnit, UNetConfig


@dataclass
class Features:
    """What a run keeps of its last key step, for each set of branches of guidance that it predicts in one batch.

    run: the `sampler.Run`.
    reused: the numbers of the units that run at key steps only. Their outputs are kept there and reused at other steps.
    A unit whose output no running unit needs doesn't run at the other steps either; its output is not kept.
    """
    run: Any
    key_steps: list[int]
    reused: frozenset[int]
    kept: dict[tuple[int, ...], dict[int, Tensor]] = field(default_factory=dict)
    parallel = False

    def __post_init__(self) -> None:
        self.middle = self.run.network("a cache").middle
        plan, (self.live, self.read) = self.run.plan, live_units(self.middle, self.reused)
        self.keys = self.run.turns | {i for i in range(plan.calls) if plan.step(i) in self.key_steps}     # calls

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Reuse":
        key = calls[0] in self.keys
        return Reuse(key, self.live, self.read, {} if key else self.kept[halves], self.kept.setdefault(halves, {}))

    def units(self, i: int) -> frozenset[int]:
        """The numbers of the units that run at call i."""
        return frozenset(range(2 * self.middle + 1)) if i in self.keys else self.live

    def inject(self, i: int, x: Tensor, predicted: bool = False) -> Tensor:
        """The latents before the prediction of call i (predicted: after it). Faster Diffusion adds its noise here."""
        return x


@dataclass
class Reuse:
    """A cache at one call, for the U-Net."""
    key: bool                                   # a key step: all units run
    live: frozenset[int]                        # the units that run at every step
    read: frozenset[int]                        # the units whose kept outputs these need
    given: dict[int, Tensor]
    kept: dict[int, Tensor]

    def runs(self, unit: int) -> bool:
        return self.key or unit in self.live

    def output(self, unit: int, h: Tensor | None) -> Tensor | None:
        """Called after every unit: at key steps, keeps its output h; at others, returns it (None: no unit needs it)."""
        if self.key and unit in self.read:
            self.kept[unit] = h
        return h if self.runs(unit) else self.given.get(unit)


@dataclass
class Injecting(Features):
    """Faster Diffusion in a run: serial decoding, with prior noise."""
    settings: Any = None

    def inject(self, i: int, x: Tensor, predicted: bool = False) -> Tensor:
        run, s = self.run, self.settings
        if not s.alpha or run.plan.times[i] >= s.tau or predicted != (s.parallel and s.official_order):
            return x
        strength = run.plan.start_scale if run.init is None else math.sqrt(1 - run.plan.now[run.first])
        return x + s.alpha * (strength * run.noise)


@dataclass
class Ahead(Injecting):
    """Faster Diffusion in a run: a key step and all steps up to the next one are decoded in one batch."""
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


def live_units(up_units: int, reused: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Which units run between key steps, and whose kept outputs they need: found by going back from the last unit."""
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
    """(B, ...) -> (n * B, ...): the batch repeated n times."""
    return x if n == 1 else x.repeat(n, *[1] * (x.dim() - 1))


def stack(shifts: list[PerUnit], rows: int) -> PerUnit:
    """The shifts of several calls as one batch, with `rows` rows per call."""
    def together(each: Iterable[Tensor]) -> Tensor:
        return torch.cat([x.expand(rows, -1) for x in each])
    return PerUnit([[together(resnet) for resnet in zip(*unit)] for unit in zip(*(step.of for step in shifts))],
                   together(step.source for step in shifts))


@dataclass(frozen=True)
class FasterDiffusion:
    """Faster Diffusion: reuse the encoder.

    Between key steps the prediction depends only on the time, not on the latents. That makes parallel decoding
    possible, with stochastic samplers too.

    keys: the key steps. "paper": the released list for 50 steps; "rescaled": this list, stretched to the number of
        steps; "square": gaps that grow by one (the released "pro"); a number n: every n-th step; or a list of steps.
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
    keys: Literal["paper", "rescaled", "square"] | int | tuple[int, ...] = "paper"
    parallel: bool = False
    max_batch: int | None = None
    alpha: float = 0.003
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
        for name in ("max_batch", "official_order"):
            if getattr(self, name) and not self.parallel:
                raise ValueError(f"Faster Diffusion's {name} does nothing without parallel")

    def check(self, config: UNetConfig, steps: int, guided: bool = True) -> None:
        """ValueError for settings that don't fit this U-Net, these steps or, by guided, a run without guidance."""
        key_steps(self.keys, steps)

    def start(self, run: Any) -> Features:
        make, keys = Ahead if self.parallel else Injecting, key_steps(self.keys, run.plan.steps)
        return make(run, keys, frozenset(range(run.network("a cache").middle + 1)), settings=self)


@dataclass(frozen=True)
class DeepCache:
    """DeepCache: between key steps, run conv_in, `branch` down units and the last `branch` + 1 up units.

    interval: a key step every `interval` steps.
    branch: 0 (the package's default, the fastest) to one less than the number of up units; the paper's is 1 here.
    center: None, or the step around which the key steps are denser; their number stays (paper: 15, of 50 steps).
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
        for name in ("power", "schedule"):
            if self.center is None and getattr(self, name) != getattr(DeepCache, name):
                raise ValueError(f"DeepCache's {name} does nothing without center")

    def key_steps(self, steps: int) -> list[int]:
        """The steps at which everything runs."""
        if self.center is None:
            return key_steps(self.interval, steps)
        if not 0 < self.center < steps:
            raise ValueError(f"DeepCache's center {self.center} is not between the first and the last of {steps} steps")
        return nonuniform_keys(steps, math.ceil(steps / self.interval), self.center, self.power, self.schedule)

    def check(self, config: UNetConfig, steps: int, guided: bool = True) -> None:
        n = len(config.channels) * (config.layers + 1)
        if self.branch >= n:
            raise ValueError(f"DeepCache's branch {self.branch} is too large: this U-Net has 0 to {n - 1}")
        self.key_steps(steps)

    def start(self, run: Any) -> Features:
        unet = run.network("a cache")
        self.check(unet.config, run.plan.steps)
        reused = range(self.branch + 1, 2 * unet.middle - self.branch)
        return Features(run, self.key_steps(run.plan.steps), frozenset(reused))


@dataclass(frozen=True)
class Inherit:
    """Feature inheritance (A-SDM): reuse the outputs of any units. The other two caches are special cases.

    units: names (conv_in, d1, d2, ..., mid, u0, u1, ...) and ranges of units, such as mid:u0-u2 or d4-u7.
    keys: the key steps. A number n: every n-th step; a list of steps; or a word, as for Faster Diffusion.
    """
    units: str
    keys: Literal["paper", "rescaled", "square"] | int | tuple[int, ...] = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", self.units.replace(" ", "").replace(",", ":"))
        check_keys(self.keys)

    def check(self, config: UNetConfig, steps: int, guided: bool = True) -> None:
        unit_numbers(self.units, len(config.channels) * (config.layers + 1))
        key_steps(self.keys, steps)

    def start(self, run: Any) -> Features:
        return Features(run, key_steps(self.keys, run.plan.steps),
                        unit_numbers(self.units, run.network("a cache").middle))


def unit_numbers(text: str, up_units: int) -> frozenset[int]:
    """The numbers of the units that a text such as "conv_in:d4-mid:u0" names."""
    names = ["conv_in", *(f"d{i}" for i in range(1, up_units)), "mid", *(f"u{i}" for i in range(up_units))]
    numbers = set()
    for part in text.split(":"):
        first, _, last = part.partition("-")
        if first not in names or (last or first) not in names or names.index(last or first) < names.index(first):
            raise ValueError(f"the cache's units are names and ranges of conv_in, d1 to d{up_units - 1}, mid, u0 to "
                             f"u{up_units - 1}, such as mid:u0-u2; {part!r} is none of them in this U-Net")
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
    """The key steps that `FasterDiffusion.keys` means in a run of `steps` steps. ValueError if they don't fit."""
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
    """Warnings to show to a user who chooses these key steps; none if they are as published."""
    longest = max(b - a for a, b in zip(keys, [*keys[1:], steps]))
    if longest == 1:
        return ["every step is a key step: the cache saves nothing"]
    found = []
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
    real part is truncated, and the power lowered by 0.02 until there are `count` different keys.
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
    """T-GATE: the text acts in the first `step` steps only.

    The paper and its released code use text "reuse" and guidance "drop"; they reuse the mean of both branches' results.
    With guidance kept, each branch reuses its own result: with a common mean, both would predict the same. The reused
    result is that of the last step with text; for a unit that a cache skipped in that step, it is the unit's latest.

    step: the number of steps in which the text acts, 1 or more.
    text: after these steps, "reuse" the last result of cross-attention, or "compute" it as before.
    guidance: after these steps, "drop" it (one row per image instead of two), or "keep" it. Dropping it gives most of
        T-GATE's saving: cross-attention is only 4 % of SD 1.5's arithmetic.
    """
    step: int
    text: Literal["reuse", "compute"] = "reuse"
    guidance: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        if not is_whole(self.step) or self.step < 1:
            raise ValueError(f"T-GATE's step must be 1 or more, not {self.step}: before it, the text acts")
        if self.text not in ("reuse", "compute") or self.guidance not in ("drop", "keep"):
            raise ValueError(f"T-GATE can reuse or compute the text and drop or keep guidance, not {self.text!r} and "
                             f"{self.guidance!r}")
        if self.text == "compute" and self.guidance == "keep":
            raise ValueError("T-GATE with the text computed and guidance kept does nothing: change one of them")

    def check(self, config: UNetConfig, steps: int, guided: bool = True) -> None:
        if self.step >= steps:
            raise ValueError(f"T-GATE's step {self.step} is beyond the last of {steps} steps ({steps - 1})")

    def turns(self, plan: Any, first: int, size: tuple[int, int]) -> set[int]:
        """The call from which T-GATE acts; the first call of a run is always computed in full."""
        self.check(None, plan.steps)
        return {plan.first_call(max(self.step, plan.step(first) + 1))}

    def start(self, run: Any) -> "Gating":
        run.network("T-GATE")
        return Gating(self, *self.turns(run.plan, run.first, run.noise.shape[2:]))


@dataclass
class Gating:
    """T-GATE in a run: the last results of cross-attention, for each set of branches, by TransformerBlock."""
    settings: TGate
    turn: int                                   # the first call without the text
    kept: dict[Any, dict[torch.nn.Module, Tensor]] = field(default_factory=dict)

    def guided(self, i: int) -> bool:
        return i < self.turn or self.settings.guidance == "keep"

    def open(self, i: int) -> bool:
        """Is the text attended to at call i?"""
        return i < self.turn or self.settings.text == "compute"

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "TextGate | None":
        if self.settings.text == "compute":
            return None
        is_open = self.open(calls[0])
        if is_open or self.settings.guidance == "keep" or halves != (1,):
            return TextGate(is_open, len(calls), self.kept.setdefault(halves, {}))
        if "mean" not in self.kept:                                    # made here: in the U-Net it would need a graph
            both = {block: h.chunk(2) for block, h in self.kept[0, 1].items()} if (0, 1) in self.kept else {
                block: (h, self.kept[1,][block]) for block, h in self.kept[0,].items()}
            self.kept["mean"] = {block: (a + b) / 2 for block, (a, b) in both.items()}
        return TextGate(is_open, len(calls), self.kept["mean"])


@dataclass
class TextGate:
    """T-GATE at one call, or at several in one batch, for the U-Net. open: is the text attended to?"""
    open: bool
    calls: int
    kept: dict[torch.nn.Module, Tensor]

    def output(self, block: torch.nn.Module, h: Tensor) -> Tensor:
        """Called after cross-attention: keeps its result (that of the last call), or returns the kept result."""
        if not self.open:
            return repeat(self.kept[block], self.calls)
        self.kept[block] = h if self.calls == 1 else h.chunk(self.calls)[-1].clone()
        return h
