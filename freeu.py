"""FreeU: factors on the two maps that meet in a decoder layer, the backbone and the skip. No training, no extra pass.

Start at `FreeU.__call__`, which `UNet.decode` calls before each concatenation: half of the backbone's channels are
amplified by b, which denoises; the lowest frequencies of the skip are damped by s, which brings back detail. Two
techniques with one factor per skip follow: Skip-Tuning and ScaleLong's constant scaling.
Shapes: B batch, C channels, H W pixels of the maps. config: the U-Net's, whose `channels` and `layers` are read.
Sources: FreeU, arXiv 2309.11497; Skip-Tuning, arXiv 2402.15170; ScaleLong, arXiv 2310.13545. Checked against the
authors' README code (version 2), their demo code (version 1), and diffusers 0.42.1 (version 1 with rule "level").
"""
import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

Gate = tuple[float, float]


# Published values. Version 2: the authors' README of 2023-10-18; version 1: the README of 2023-09-22, and for SDXL the
# community's sweep that FreeScale uses. None were published for the tiny model, which takes SD 1.4's.
PRESETS = {
    2: {"sd15": (1.5, 1.6, 0.9, 0.2), "sd21": (1.4, 1.6, 0.9, 0.2), "sdxl": (1.3, 1.4, 0.9, 0.2),
        "tiny": (1.3, 1.4, 0.9, 0.2)},
    1: {"sd15": (1.2, 1.4, 0.9, 0.2), "sd21": (1.1, 1.2, 0.9, 0.2), "sdxl": (1.1, 1.2, 0.6, 0.4),
        "tiny": (1.2, 1.4, 0.9, 0.2)},
}
FACTORS = ("b1", "b2", "s1", "s2")


@dataclass(frozen=True)
class FreeU:
    """FreeU: more of the decoder's backbone, less of its skips.

    A factor of 1 is neutral; 0 is a factor too. None: the published factor of the model's family, see `PRESETS`.

    b1: of the backbone, in the deep decoder layers.
    b2: of the backbone, in the layers after them.
    s1: of the skip's low frequencies, in the deep decoder layers.
    s2: of the skip's low frequencies, in the layers after them.
    version: 2, the paper's: b acts where the map is strong (eq. 2 to 4); 1, the first release's: b acts everywhere.
    rule: which layers these are. "channels", the authors' code: b1 and s1 act where the backbone has 4 times the
        U-Net's base width, b2 and s2 where it has 2 times. "level", diffusers: the first and the second level of the
        decoder. They differ in 7 of SD 1.5's 12 layers: the first layer of a level, for one, still has the channels of
        the level before.
    window: "2x2", the code behind the published images: bins -threshold to threshold - 1 along both axes, which is not
        symmetric; "dc", the paper's equation at a radius below 1: the mean alone.
    threshold: half the side of the 2x2 window, 1 or more.
    backbone: b acts from the first of these fractions of the steps until the second, which is not included.
    skip: likewise, when s acts.
    """
    b1: float | None = None
    b2: float | None = None
    s1: float | None = None
    s2: float | None = None
    version: Literal[2, 1] = 2
    rule: Literal["channels", "level"] = "channels"
    window: Literal["2x2", "dc"] = "2x2"
    threshold: int = 1
    backbone: Gate = (0.0, 1.0)
    skip: Gate = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in FACTORS:
            check_factor(f"FreeU's {name}", 1 if getattr(self, name) is None else getattr(self, name))
        for name, legal in (("version", (1, 2)), ("rule", ("channels", "level")), ("window", ("2x2", "dc"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"FreeU's {name} is {' or '.join(map(str, legal))}, not {getattr(self, name)!r}")
        if not isinstance(self.threshold, int) or self.threshold < 1:
            raise ValueError(f"FreeU's threshold is a whole number from 1 up, not {self.threshold!r}")
        check_gate("FreeU's backbone", self.backbone)
        check_gate("FreeU's skip", self.skip)
        neutral = "s1 = s2 = 1" if self.s1 == self.s2 == 1 else None
        for name, idle in (("backbone", "b1 = b2 = 1" if self.b1 == self.b2 == 1 else None), ("skip", neutral),
                           ("window", neutral), ("threshold", "window=dc" if self.window == "dc" else neutral)):
            if idle and getattr(self, name) != getattr(FreeU, name):
                raise ValueError(f"FreeU's {name} does nothing with {idle}")

    def bind(self, sd: Any) -> "FreeU":
        """With the published factors of the family of sd.config in the place of None."""
        published = dict(zip(FACTORS, PRESETS[self.version][sd.config.family]))
        return replace(self, **{name: value for name, value in published.items() if getattr(self, name) is None})

    def check(self, config: Any, steps: int, guided: bool = True) -> None:
        """ValueError for a gate that is closed in all of a run's steps."""
        check_gate("FreeU's backbone", self.backbone, steps)
        check_gate("FreeU's skip", self.skip, steps)

    def start(self, run: Any) -> "Gated":
        if None in (self.b1, self.b2, self.s1, self.s2):
            raise ValueError("FreeU's factors are those of a family: give b1, b2, s1 and s2, or use StableDiffusion")
        return Gated(self, run.plan)

    def at(self, fraction: float) -> "FreeU | None":
        """What acts when this fraction of all steps is done (0 in step 0, below 1 in the last one); None: nothing."""
        now = self
        if not self.backbone[0] <= fraction < self.backbone[1]:
            now = replace(now, b1=1.0, b2=1.0, backbone=FreeU.backbone)
        if not self.skip[0] <= fraction < self.skip[1]:
            now = replace(now, s1=1.0, s2=1.0, skip=FreeU.skip, window=FreeU.window, threshold=FreeU.threshold)
        return None if now.b1 == now.b2 == now.s1 == now.s2 == 1 else now

    def __call__(self, h: Tensor, skip: Tensor, layer: int, config: Any) -> tuple[Tensor, Tensor]:
        """Backbone (B, C, H, W) and skip (B, C', H, W) of decoder layer 0, 1, ... (0 deepest), both made anew."""
        b, s = self.factors(h.shape[1], layer, config)
        if b != 1:
            half = h.shape[1] // 2
            gain = b if self.version == 1 else structure_gain(h, b)
            h = torch.cat([h[:, :half] * gain, h[:, half:]], dim=1)
        if s != 1:
            skip = damp_mean(skip, s) if self.window == "dc" else damp_low_frequencies(skip, s, self.threshold)
        return h, skip

    def factors(self, channels: int, layer: int, config: Any) -> tuple[float, float]:
        """(b, s) of a decoder layer, by its backbone's channels or by its level."""
        if self.rule == "channels":
            stage = {4 * config.channels[0]: 0, 2 * config.channels[0]: 1}.get(channels)
        else:
            stage = layer // (config.layers + 1)
        return {0: (self.b1, self.s1), 1: (self.b2, self.s2)}.get(stage, (1.0, 1.0))


def structure_gain(h: Tensor, b: float) -> Tensor:
    """Eq. 2 and 3: 1 where the channels' mean is least, b where it is greatest. (B, C, H, W) -> (B, 1, H, W)

    Each image by itself, in float32 or wider. A map whose mean is the same everywhere has no structure: gain 1.
    """
    mean = h.to(torch.promote_types(h.dtype, torch.float32)).mean(dim=1, keepdim=True)
    low, high = mean.amin(dim=(2, 3), keepdim=True), mean.amax(dim=(2, 3), keepdim=True)
    structure = torch.where(high > low, (mean - low) / (high - low), 0.0)
    return ((b - 1) * structure + 1).to(h.dtype)


def damp_mean(skip: Tensor, s: float) -> Tensor:
    """Eq. 5 to 8 with a radius below 1: the mean of every channel times s, the rest unchanged. (B, C, H, W)"""
    return skip - (1 - s) * skip.mean(dim=(2, 3), keepdim=True)


def damp_low_frequencies(skip: Tensor, s: float, threshold: int = 1) -> Tensor:
    """Eq. 5 to 8 as released: the Fourier bins -threshold to threshold - 1 along both axes times s. (B, C, H, W)

    This computes the real part of the released result without a Fourier transform, for any size and dtype:
    skip - (1 - s) low, where low sums the plane waves of the window: cosines along both axes minus sines along both.
    Bin -1 is in the window and bin +1 is not, so of the two lowest diagonal waves only one is damped.
    ValueError where the window is larger than the map.
    """
    height, width = skip.shape[-2:]
    most = max(min(height, width) // 2, 1)
    if threshold > most:
        raise ValueError(f"FreeU's threshold {threshold} is too large for a {width}x{height} map; use at most {most}")
    x = skip.to(torch.promote_types(skip.dtype, torch.float32))
    cos_h, sin_h = waves(height, threshold, x)
    cos_w, sin_w = waves(width, threshold, x)
    low = cos_h @ x @ cos_w.T - sin_h @ x @ sin_w.T
    return (x - (1 - s) * low).to(skip.dtype)


def waves(n: int, threshold: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the window's bins j of cos(2 pi j (p - q) / n) / n, and of sin: two (n, n) matrices."""
    bins = torch.arange(-threshold, threshold, device=like.device) if n > 1 else torch.zeros(1, device=like.device)
    p = torch.arange(n, device=like.device)
    angle = (2 * math.pi / n) * (bins[:, None, None] * (p[:, None] - p)).to(like.dtype)
    return angle.cos().sum(dim=0) / n, angle.sin().sum(dim=0) / n


# ------------------------------------------------------------------------------------------------- a factor per skip

class SkipFactors:
    """What Skip-Tuning and ScaleLong share. Each has a `factor` for decoder layer 0, 1, ... (0 deepest) of all."""
    steps: Gate

    def check(self, config: Any, steps: int, guided: bool = True) -> None:
        check_gate("the skip factors' steps", self.steps, steps)

    def start(self, run: Any) -> "Gated":
        return Gated(self, run.plan)

    def at(self, fraction: float) -> "SkipFactors | None":
        return self if self.steps[0] <= fraction < self.steps[1] else None

    def __call__(self, h: Tensor, skip: Tensor, layer: int, config: Any) -> tuple[Tensor, Tensor]:
        """The backbone as it is, and the skip of a decoder layer times its factor."""
        return h, skip * self.factor(layer, len(config.channels) * (config.layers + 1))


@dataclass(frozen=True)
class SkipTuning(SkipFactors):
    """Skip-Tuning: the skip's factor goes linearly from the deepest skip to the outermost.

    bottom: the factor of the deepest skip, next to the middle.
    top: the factor of the outermost skip.
    steps: it acts from the first of these fractions of the steps until the second, which is not included.
    """
    bottom: float
    top: float = 1.0
    steps: Gate = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_factor("Skip-Tuning's bottom", self.bottom)
        check_factor("Skip-Tuning's top", self.top)
        check_gate("Skip-Tuning's steps", self.steps)

    def factor(self, layer: int, layers: int) -> float:
        return self.bottom + layer * (self.top - self.bottom) / (layers - 1)


@dataclass(frozen=True)
class ScaleLong(SkipFactors):
    """ScaleLong's constant scaling: the outermost skip has the factor 1, each further in kappa times the one before.

    It is meant for training. Without it, use factors near 1.

    kappa: the factor from one skip to the next.
    steps: it acts from the first of these fractions of the steps until the second, which is not included.
    """
    kappa: float
    steps: Gate = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_factor("ScaleLong's kappa", self.kappa)
        check_gate("ScaleLong's steps", self.steps)

    def factor(self, layer: int, layers: int) -> float:
        return self.kappa ** (layers - 1 - layer)


def check_factor(name: str, value: float) -> None:
    if not isinstance(value, Real) or not 0 <= value <= 10:
        raise ValueError(f"{name} must be a number from 0 to 10 (1 is neutral), not {value!r}")


def check_gate(name: str, gate: Gate, steps: int | None = None) -> None:
    """ValueError for a gate that is not within 0..1, or closed in all of a run's steps."""
    if not 0 <= gate[0] < gate[1] <= 1:
        raise ValueError(f"{name} must lie within 0..1, start before end, not {gate[0]:g}:{gate[1]:g}")
    if steps is not None and not any(gate[0] <= i / steps < gate[1] for i in range(steps)):
        raise ValueError(f"{name} must cover at least one of the run's {steps} steps, not {gate[0]:g}:{gate[1]:g}")


@dataclass(frozen=True)
class Gated:
    """FreeU, Skip-Tuning or ScaleLong in a run: it may act in a part of the steps."""
    settings: FreeU | SkipFactors
    plan: Any

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...] = ()) -> FreeU | SkipFactors | None:
        return self.settings.at(self.plan.fraction(calls[0]))

    def alike(self, i: int, j: int) -> bool:
        return self.at((i,)) == self.at((j,))
