"""Caches: between key steps only a part of the U-Net's units runs, the rest is reused from the last key step.

The flat list of `unet.py`, in SD 1.x:    conv_in  d1 d2 ... d11   middle   u0 u1 ... u11
Faster Diffusion reuses the left half:    ------- all skips, middle -------   and runs u0 ... u11
DeepCache, branch b, reuses the middle:   conv_in  d1 ... db  ---------------   u(11-b) ... u11

Start at `Features`, which `UNet.forward` asks what to run and what to reuse. `FasterDiffusion` and `DeepCache` are
settings; the sampling loop makes a `Features` from them for every run and throws it away afterwards.
Sources: Faster Diffusion, arXiv 2312.09608; DeepCache, arXiv 2312.00858. Checked against outputs of the official codes:
hutaiHang/Faster-Diffusion, and DeepCache's pip package, whose branch numbers are ours (its paper's fork has one less).
"""
import math
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from freescale import Stage
    from freeu import FreeU
    from unet import PerUnit, UNet


@dataclass
class Features:
    """What one run keeps from its last key step: a local variable of the sampling loop, never written to in place.

    branch: None, Faster Diffusion: the skips and the middle's output are reused; else DeepCache's, see above.
    """
    keys: frozenset[int]
    steps: int
    up_units: int
    branch: int | None = None
    parallel: bool = False                      # the settings of `FasterDiffusion`
    max_batch: int | None = None
    alpha: float = 0.0
    late: bool = False
    key: bool = True                            # does everything run at the present step?
    h: Tensor | None = None                     # the state that enters the first up unit that runs between key steps
    skips: list[Tensor] = field(default_factory=list)
    ahead: list[Tensor] = field(default_factory=list)     # parallel: predictions of this group's steps to come

    def at(self, step: int) -> "Features":
        """Set for this step, by the loop."""
        self.key = step in self.keys
        return self

    def units_run(self, first: int = 0) -> tuple[int, int]:
        """How many units a run from step `first` executes, and how many without a cache: conv_in and the middle too."""
        every, steps = 2 * self.up_units + 1, range(first, self.steps)
        between = self.up_units if self.branch is None else 2 * self.branch + 2
        encoders = sum(step in self.keys for step in steps)
        return encoders * every + (len(steps) - encoders) * between, len(steps) * every

    @property
    def down(self) -> int | None:
        """How many down units run behind conv_in; None: all, and the middle; -1: not even conv_in."""
        return None if self.key else -1 if self.branch is None else self.branch

    @property
    def up(self) -> int:
        """The first up unit that runs."""
        return 0 if self.key or self.branch is None else self.up_units - 1 - self.branch

    def encoded(self, h: Tensor | None, skips: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Faster Diffusion's place, behind the encoder: keep its output at a key step, give it back at the others."""
        if self.branch is not None:
            return h, skips
        if self.key:
            self.h, self.skips = h, skips
        return self.h, self.skips

    def enter(self, i: int, h: Tensor | None) -> Tensor | None:
        """DeepCache's place, before up unit i: keep the state that enters one unit, or give it back."""
        if self.branch is None or i != self.up_units - 1 - self.branch:
            return h
        if self.key:
            self.h = h
        return self.h

    def inject(self, x: Tensor, first_x: Tensor, t: float, late: bool = False) -> Tensor:
        """Prior noise injection: in the second half of the time, the latent plus a little of the first one."""
        return x + self.alpha * first_x if self.alpha and t < 500 and late == self.late else x

    def decode_ahead(self, unet: "UNet", x: Tensor, i: int, shifts: list["PerUnit"], text: "PerUnit",
                     freeu: "FreeU | None", stage: "Stage | None" = None) -> Tensor:
        """Parallel Faster Diffusion: at a key step, predict for it and all steps up to the next one; else look it up.

        One call of the encoder, and the decoder on one batch: the rows of the first step, of the second, and so on.
        """
        if self.key:
            scale = None if stage is None else stage.at(i)
            h, skips = unet.encode(x, shifts[i], text, None, scale)
            group = list(takewhile(lambda j: j == i or j not in self.keys, range(i, self.steps)))
            most = max(1, (self.max_batch or len(group) * len(x)) // len(x))              # steps a batch
            while group:
                strength = [None if freeu is None else freeu.at(j / self.steps) for j in group[:most]]
                n = next((k for k, s in enumerate(strength) if s != strength[0]), len(strength))    # alike in FreeU
                if stage is not None:                                  # step i goes on with its encoder's windows
                    scale = scale.together([scale if j == i else stage.at(j) for j in group[:n]])
                out = unet.decode(repeat(h, n), [repeat(skip, n) for skip in skips],
                                  stack_steps([shifts[j] for j in group[:n]], len(x)),
                                  text._replace(up=[kv and [(repeat(k, n), repeat(v, n)) for k, v in kv]
                                                    for kv in text.up]), strength[0], None, scale)
                self.ahead += out.chunk(n)
                group = group[n:]
        return self.ahead.pop(0)


def repeat(x: Tensor, n: int) -> Tensor:
    """(B, ...) -> (n * B, ...), the batch n times over."""
    return x.repeat(n, *[1] * (x.dim() - 1))


def stack_steps(shifts: list["PerUnit"], batch: int) -> "PerUnit":
    """The up units' time shifts of several steps as one batch, `batch` rows a step."""
    rows = [[shift.expand(batch, -1) for shift in step.up] for step in shifts]
    return shifts[0]._replace(up=[torch.cat(unit) for unit in zip(*rows)])


@dataclass(frozen=True)
class FasterDiffusion:
    """Reuse the encoder. Between key steps the prediction then doesn't depend on the latent, only on the time.

    keys: "paper", the released list for 50 steps, as it is; "rescaled", the same list stretched to the number of steps;
        "square", gaps that grow by one (the released "pro"); a number n, every n-th step; or the steps themselves.
    parallel: decode a key step and those behind it in one batch, of at most max_batch rows.
    alpha: prior noise injection: in the second half of the time (t < 500) add this much of the first noise to the
        latent at every step, 0.003 in the paper, which brings back texture that reuse takes away. (All samplers run
        on the variance-preserving latent here; the released code adds to Euler's x, which is larger.)
    official_order: in parallel mode, add it behind the prediction as released, not before it as in the paper; only then
        does parallel differ from serial.
    """
    keys: str | int | tuple[int, ...] = "paper"
    parallel: bool = False
    max_batch: int | None = None
    alpha: float = 0.0
    official_order: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.keys, str) and self.keys not in ("paper", "rescaled", "square"):
            raise ValueError(f"Faster Diffusion's keys are paper, rescaled, square or numbers, not {self.keys!r}")
        if isinstance(self.keys, int) and self.keys < 1:
            raise ValueError(f"Faster Diffusion's keys every {self.keys} steps make no sense: use 1 or more")
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"the largest decoder batch must be 1 or more rows, not {self.max_batch}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"the injected noise (alpha) must be between 0 and 1, not {self.alpha:g}; 0.003 is usual")

    def key_steps(self, steps: int) -> list[int]:
        """The steps at which everything runs, of a run of so many."""
        if isinstance(self.keys, tuple):
            return check_keys(self.keys, steps)
        if self.keys == "paper":
            return [k for k in PAPER_KEYS if k < steps]
        if self.keys == "rescaled":
            return sorted({round(k * steps / 50) for k in PAPER_KEYS if round(k * steps / 50) < steps})
        if self.keys == "square":
            return [i for i in range(steps) if math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i]
        return list(range(0, steps, self.keys))

    def start(self, steps: int, first: int, unet: "UNet") -> Features:
        """What the sampling loop makes for a run from step `first`, which is a key step in any case."""
        return Features(frozenset([*self.key_steps(steps), first]), steps, len(unet.up_units()), None,
                        self.parallel, self.max_batch, self.alpha, self.parallel and self.official_order)


PAPER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)


@dataclass(frozen=True)
class DeepCache:
    """Reuse the deep units: between key steps, run conv_in, `branch` down units and the last `branch` + 1 up units.

    branch: 0 (the package's default: fastest) to one less than the number of up units; the paper's is 1 here.
    center, power: None, a key every `interval` steps; else as many keys, denser around step `center` (paper: 15 and 1.4
        of 50 steps).
    schedule: of these, "released" for the keys of the published numbers, in which Python's power of a negative number
        was complex and only the real part used; "paper" for the formula as printed.
    """
    interval: int = 3
    branch: int = 0
    center: int | None = None
    power: float = 1.4
    schedule: str = "released"

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"DeepCache's interval must be 1 or more steps, not {self.interval}")
        if self.branch < 0:
            raise ValueError(f"DeepCache's branch must be 0 or more, not {self.branch}")
        if self.schedule not in ("released", "paper"):
            raise ValueError(f"DeepCache's schedule is released or paper, not {self.schedule!r}")

    def key_steps(self, steps: int) -> list[int]:
        """The steps at which everything runs, of a run of so many."""
        if self.center is None:
            return list(range(0, steps, self.interval))
        if not 0 < self.center < steps:
            raise ValueError(f"DeepCache's center {self.center} is not between the first and the last of {steps} steps")
        return nonuniform_keys(steps, math.ceil(steps / self.interval), self.center, self.power, self.schedule)

    def start(self, steps: int, first: int, unet: "UNet") -> Features:
        """What the sampling loop makes for a run from step `first`, which is a key step in any case."""
        branches = len(unet.up_units())
        if self.branch >= branches:
            raise ValueError(f"DeepCache's branch {self.branch} is too large: this U-Net has 0 to {branches - 1}")
        return Features(frozenset([*self.key_steps(steps), first]), steps, branches, self.branch)


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
    while power > 0:
        ends = [complex(end) ** (1 / power) for end in (-center, steps - center)]
        keys = [int((x ** power).real) + center for x in np.linspace(*ends, count + 1)]
        keys = [0, *sorted(set(keys))[1:-1]]
        if len(keys) == count:
            return keys
        power -= 0.02
    raise ValueError(f"there are no {count} keys in {steps} steps around {center}; use a larger interval")


def check_keys(keys: tuple[int, ...], steps: int) -> list[int]:
    """Given keys begin at step 0 and lie within the run."""
    if not keys or keys[0] != 0 or list(keys) != sorted(set(keys)):
        raise ValueError(f"key steps must begin with 0 and rise, not {', '.join(map(str, keys)) or 'none'}")
    if keys[-1] >= steps:
        raise ValueError(f"key step {keys[-1]} is beyond the last of {steps} steps ({steps - 1})")
    return list(keys)
