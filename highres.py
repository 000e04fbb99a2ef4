"""Other ways to pictures beyond the model's size, to compare FreeScale with: ScaleCrafter, HiDiffusion, DemoFusion.

    python txt2img.py "a red star" --highres hidiffusion -W 128 -H 128

`ScaleCrafter`, `HiDiffusion` and `DemoFusion` are settings, from which the sampling loop makes a state for every run:
`Crafting`, which gives the U-Net a `Dilated` at every call, `Shrinking`, which gives it a `Shrunk`, and `Fusing`, which
calls it on windows and parts of the latents. (The fourth baseline, direct inference, needs no code: it samples at a
large size.)
Shapes: B rows, H W tokens of a map (N = H * W), C channels, h w latent pixels.
Sources: ScaleCrafter, arXiv 2310.07702; HiDiffusion, arXiv 2311.17528; DemoFusion, arXiv 2311.16973. Checked against
outputs of the official codes.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freescale import FreeScale, draw_seeds, gaussian, number_attentions, place_windows, scramble, smooth
from unet import OFF, Attention, Techniques, UNetConfig, linear, sinusoid

Call = Callable[[Tensor, int, tuple[int, ...]], Tensor]               # one pass of the U-Net, see `sampler.generate`


class Baseline:
    """What the settings share."""
    native: int | None                                                 # latent side of the training pictures

    def __post_init__(self) -> None:
        if self.native is not None and self.native < 1:
            raise ValueError(f"native is a side of latents, 1 or more, not {self.native}")

    def bind(self, sd: Any) -> Any:
        """With the latent side of the training pictures of sd, unless it is given."""
        return replace(self, native=self.native or sd.config.size // sd.config.vae.factor)


class State:
    """What the states share. Each overrides what it changes; if no side is above native, none changes anything.

    short, long: the two sides, divided by that of the training pictures. seeds, numbers: see `draw_seeds` and
    `number_attentions`.
    """
    draws = False                                                      # are there windows?

    def __init__(self, settings: Any, run: Any):
        if settings.native is None:
            raise ValueError("pass native, the latent side of the training pictures (SD 1.5: 64)")
        self.settings, self.run = settings, run
        self.short, self.long = (side / settings.native for side in sorted(run.noise.shape[2:]))
        if self.draws and self.long > 1:
            self.seeds, self.numbers = draw_seeds(run, type(settings).__name__), number_attentions(run.unet)

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> Any:
        return None

    def alike(self, i: int, j: int) -> bool:
        return self.at((i,), ()) == self.at((j,), ())

    def around(self, call: Call) -> Call:
        """DemoFusion's place in the loop: another way to call the U-Net."""
        return call

    def base(self, x: Tensor, i: int, without: Tensor) -> Tensor:
        """ScaleCrafter's place in guidance: what replaces the prediction without the prompt."""
        return without


class Acting:
    """What acts at one call or at several calls in one batch, for the U-Net. Nothing here changes anything."""

    def convolve(self, conv: nn.Conv2d, x: Tensor, unit: int) -> Tensor:
        return conv(x)

    def resize(self, unit: int, h: Tensor, skip: Tensor | None = None) -> Tensor:
        return h

    def __call__(self, attention: Attention, x: Tensor, grid: tuple[int, int], on: Techniques = OFF) -> Tensor:
        return attention(x, attention.keys_values(x, on), on)


# -------------------------------------------------------------------------------------------------------- ScaleCrafter

# Published dilations by family: of the levels of the encoder, of the middle, of the levels of the decoder; 1: none.
# First for up to 3 times the training side, where 2 stands for the factor itself; then for one side beyond that, in the
# strong and the weak pass of noise-damped guidance (equal: there is none); then likewise for both sides beyond it.
LAYERS = {"sd15": (("1222 2 2221",) * 2, ("1234 4 4321", "1134 4 4311"), ("1234 4 4321", "1134 4 4311")),
          "sd21": (("1222 2 2221",) * 2, ("1234 4 4321", "1234 4 4321"), ("1134 4 4432", "1134 4 4431")),
          "sdxl": (("111 2 211",) * 2, ("113 4 432", "111 2 211"), ("114 4 432", "111 2 211"))}
# Published fractions of the steps that are dilated: up to 2 times the training side, up to 3 times, beyond
UNTIL = {"sd15": (0.6, 0.7, 0.7), "sd21": (0.4, 0.6, 0.74), "sdxl": (0.6, 0.6, 0.7)}


@dataclass(frozen=True)
class ScaleCrafter(Baseline):
    """ScaleCrafter: dilated convolutions; beyond 3 times the training side, also noise-damped guidance.

    Beyond 3 times the side, dilation shrinks over the steps, and guidance is weak(negative) + g * (strong(prompt) -
    strong(negative)), where the weak pass has fewer dilated layers. The release also sets other things: to follow it,
    add --sampler ddim --eta 1 --freeu version=1.

    until: the fraction of the steps that is dilated; none: the published one for the family and this size.
    native: latent side of the model's training pictures (SD 1.5: 64); none: the model's own.
    """
    until: float | None = None
    native: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until is not None and not 0 < self.until <= 1:
            raise ValueError(f"ScaleCrafter's until is a fraction of the steps, above 0 and up to 1, not {self.until}")

    def start(self, run: Any) -> "Crafting":
        run.network("ScaleCrafter")
        return Crafting(self, run)


class Crafting(State):
    """ScaleCrafter in a run."""

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...], weak: bool = False) -> "Dilated | None":
        """What acts in the strong (the usual) or the weak pass."""
        config, far, both = self.run.unet.config, self.long > 3, self.short > 3
        family = "sdxl" if len(config.channels) == 3 else "sd21" if config.linear_proj else "sd15"
        until = self.settings.until or UNTIL[family][(self.long > 2) + far]
        left = 1 - self.run.plan.fraction(calls[0]) / until            # 1 at the start, 0 where dilation ends
        if self.long <= 1 or left <= 0:
            return None
        down, middle, up = (list(map(int, part)) for part in LAYERS[family][far + both][weak].split())
        down, up = ([p for p in levels for _ in range(config.layers + 1)] for levels in (down, up))
        units = [1, *down[:-1], *middle, *up]
        if family == "sd21" and both:                                  # unlike its level, which has 3
            units[3 * (config.layers + 1)] = 4
        shrunk = lambda p: max(math.ceil(p * self.long / 4 * left - 1e-9), 2) if far else self.long
        return Dilated(tuple(1 if p == 1 else shrunk(p) for p in units))

    def base(self, x: Tensor, i: int, without: Tensor) -> Tensor:
        """With noise-damped guidance, the weak pass for the negative prompt. No cache keeps anything of it."""
        run, weak = self.run, self.at((i,), (0,), weak=True)
        if weak == self.at((i,), (0,)):
            return without
        times, text, added = run.inputs((0,))
        beside = {name: state.at((i,), (0,)) for name, state in run.acting.items()
                  if name not in ("highres", "cache", "tgate")}
        return run.unet(x.to(text.source.dtype), times[i], text, added, Techniques(highres=weak, **beside)).to(x.dtype)


@dataclass(frozen=True)
class Dilated(Acting):
    """ScaleCrafter for the U-Net. factors: by unit, the distance between taps; 1: not dilated."""
    factors: tuple[float, ...]

    def convolve(self, conv: nn.Conv2d, x: Tensor, unit: int) -> Tensor:
        return redilate(conv, x, self.factors[unit])


def redilate(conv: nn.Conv2d, x: Tensor, p: float) -> Tensor:
    """A 3x3 convolution with taps p pixels apart. For a fraction, p is rounded up and the map enlarged as much."""
    if p == 1:
        return conv(x)
    d, size = math.ceil(p), x.shape[2:]
    if d != p:
        x = F.interpolate(x, [round(side * d / p) for side in size], mode="bilinear")
    out = F.conv2d(x, conv.weight, conv.bias, conv.stride, padding=d, dilation=d)
    same = [-(-side // conv.stride[0]) for side in size]
    return out if list(out.shape[2:]) == same else F.interpolate(out, same, mode="bilinear")


# --------------------------------------------------------------------------------------------------------- HiDiffusion

@dataclass(frozen=True)
class HiDiffusion(Baseline):
    """HiDiffusion: smaller maps in the deep layers (RAU-Net), and shifted windows in the largest self-attention.

    There is one published list of layers for 2 times the training side and one for 4 times. The latter is taken if both
    sides are at least 4 times as long.

    native: latent side of the model's training pictures (SD 1.5: 64); none: the model's own.
    """
    native: int | None = None

    def turns(self, plan: Any, first: int, size: tuple[int, int]) -> set[int]:
        """Calls at which maps may change their size: a cache can't reuse older ones. size: the latents'."""
        if self.native is not None and max(size) <= self.native:
            return set()
        return {plan.first_call(int(edge * plan.steps)) for edge in (0.16, 0.3, 0.4, 0.7)} - set(range(first))

    def start(self, run: Any) -> "Shrinking":
        run.network("HiDiffusion")
        return Shrinking(self, run)


class Shrinking(State):
    """HiDiffusion in a run."""
    draws = True

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Shrunk | None":
        config, plan, step = self.run.unet.config, self.run.plan, self.run.plan.step(calls[0])
        if self.long <= 1:
            return None
        before = lambda part: step < int(part * plan.steps)            # in whole steps, as released
        if len(config.channels) == 4:
            skipping, pooling = (before(0.4), False) if self.short < 4 else (before(0.7), before(0.3))
        else:                                                          # SDXL
            skipping, pooling = (before(0.16), not before(0.16) and before(0.4)) if self.short < 4 else (
                before(0.3), before(0.7))
        first = next(level for level, depth in enumerate(config.depth) if depth)              # with attention
        down, pooled = (first + 1) * (config.layers + 1), config.layers + 2   # its downsampler; level 1's first unit
        return Shrunk(down if skipping else None, pooled if pooling else None, config.channels[first],
                      self.numbers, self.seeds[list(calls)].repeat(1, len(halves)).flatten())

    def around(self, call: Call) -> Call:
        """The call as it is. ValueError beside a T-GATE that would reuse results of another size."""
        gate, calls = self.run.acting.get("tgate"), self.run.plan.calls
        if gate is not None and gate.settings.text == "reuse" and not all(
                self.alike(gate.turn - 1, i) for i in range(gate.turn, calls)):
            raise ValueError("HiDiffusion changes the size of maps after T-GATE's step: give T-GATE a later step, or "
                             "text=compute")
        return call


@dataclass(frozen=True)
class Shrunk(Acting):
    """HiDiffusion for the U-Net.

    skipping: the downsampler that sees every second pixel only. pooling: the unit whose output is halved. None: none.
    width: channels of the self-attention that is windowed. seeds: of the windows, by row of the batch.
    """
    skipping: int | None
    pooling: int | None
    width: int
    numbers: dict[Attention, int]
    seeds: Tensor = field(compare=False)

    def convolve(self, conv: nn.Conv2d, x: Tensor, unit: int) -> Tensor:
        return conv(x[:, :, ::2, ::2] if unit == self.skipping else x)

    def resize(self, unit: int, h: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is None:
            return F.avg_pool2d(h, 2, ceil_mode=True) if unit == self.pooling else h
        return h if h.shape[2:] == skip.shape[2:] else F.interpolate(h, skip.shape[2:], mode="bicubic")

    def __call__(self, attention: Attention, x: Tensor, grid: tuple[int, int], on: Techniques = OFF) -> Tensor:
        if x.shape[2] != self.width or min(grid) < 2:
            return super().__call__(attention, x, grid, on)
        quarters = scramble(self.seeds.to(x.device) + self.numbers[attention]) % 4
        return shifted_windows(attention, x, grid, quarters, on)


def shifted_windows(attention: Attention, x: Tensor, grid: tuple[int, int], quarters: Tensor,
                    on: Techniques = OFF) -> Tensor:
    """Attention in 2 x 2 windows of the map, shifted by these quarters of a window, per row. (B, N, C) -> (B, N, C)

    A quarter is rounded down before it is multiplied, as released.
    """
    height, width = even = [side + side % 2 for side in grid]
    if even != list(grid):
        x = resample(x, grid, even)
    down, along = (torch.arange(side, device=x.device) + side // 8 * quarters[:, None] for side in even)
    tokens = (down % height)[:, :, None] * width + (along % width)[:, None]      # (B, H, W): the shifted map
    tokens = tokens.unflatten(2, (2, -1)).unflatten(1, (2, -1)).transpose(2, 3).flatten(1)        # window by window
    tokens = tokens[:, :, None].expand_as(x)
    q, k, v = (linear(layer, x, on).gather(1, tokens).unflatten(1, (4, -1)).flatten(0, 1)         # (B * 4, N / 4, C)
               for layer in (attention.to_q, attention.to_k, attention.to_v))
    out = attention.attend(*map(attention.split, (q, k, v)), on).unflatten(0, (len(x), 4)).flatten(1, 2)
    out = linear(attention.to_out[0], torch.empty_like(out).scatter(1, tokens, out), on)
    return out if even == list(grid) else resample(out, even, grid)


def resample(x: Tensor, grid: list[int], size: list[int]) -> Tensor:
    """The tokens of a map of grid (H, W) as those of a map of another size. (B, N, C) -> (B, N', C)"""
    return F.interpolate(x.transpose(1, 2).unflatten(2, grid), size, mode="bicubic").flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------- DemoFusion

@dataclass(frozen=True)
class DemoFusion(Baseline):
    """DemoFusion: in stages, a prediction from windows of the latents and from their interleaved parts.

    The release takes a solver's step for each window and each part, averages the windows' latents and blends both.
    Steps of the solvers here are linear in the prediction, so predictions are averaged and blended instead. The skip
    residual is FreeScale's detail control with alpha 3 and no restart: see `stages`. SDXL is told the last stage's size
    in every stage.

    sigma: of the blur before the parts are taken.
    crops: SDXL is told the place of a window as the corner of a crop.
    match: the latents of each stage end with the mean and the standard deviation of the first stage's.
    native: latent side of the model's training pictures (SD 1.5: 64); none: the model's own.
    """
    sigma: float = 0.8
    crops: bool = True
    match: bool = True
    native: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma <= 100:
            raise ValueError(f"DemoFusion's sigma must be above 0 and up to 100, not {self.sigma:g}")

    def check(self, config: UNetConfig, steps: int, guided: bool = True) -> None:
        if not (self.crops or config.add_dim):
            raise ValueError("DemoFusion's crops=no does nothing without SDXL, which alone is told of crops")

    def stages(self, native: int, height: int, width: int) -> FreeScale:
        """The cascade to this size in pixels: once, twice, three times the model's own size `native`, and so on."""
        r = math.ceil(max(height, width) / native)
        sizes = [tuple(max(round(side * k / r / 8), 1) * 8 for side in (height, width)) for k in range(1, r)]
        return FreeScale((*sizes, (height, width)), upsample="latent", restart=0.0, detail=3.0, attention="global",
                         dilate=0.0)

    def finish(self, latents: Tensor, first: Tensor) -> Tensor:
        """The latents that a stage ends with, after the loop. first: those of the first stage."""
        return matched(latents, first) if self.match else latents

    def start(self, run: Any) -> "Fusing":
        return Fusing(self, run)


class Fusing(State):
    """DemoFusion in a run."""
    draws = True

    def around(self, call: Call) -> Call:
        """A call on windows and on parts of the latents. ValueError beside a cache or T-GATE, which would mix them."""
        if "cache" in self.run.acting or "tgate" in self.run.acting:
            raise ValueError("DemoFusion calls the U-Net many times per step: leave out cache and T-GATE")

        def fused(x: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
            # c falls from 1 to 0; the released powers of it for the blend and the blur are 1
            c = (1 + math.cos(math.pi * (1 - self.run.plan.times[i] / self.run.plan.train_steps))) / 2
            y = smooth(x, gaussian(2 * math.ceil(self.long) - 1, self.settings.sigma * (0.99 * c + 0.01)), dims=(2, 3))
            y = matched(y, x)                                          # because the blur weakens the noise
            return (1 - c) * self.windows(call, x, i, halves) + c * self.parts(call, y, i, halves)
        return call if self.long <= 1 else fused

    def windows(self, call: Call, x: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
        """The mean of the predictions for overlapping windows, one window of each image at a time."""
        (height, width), native = x.shape[2:], self.settings.native
        pad, tall, broad = native // 8, min(native, height), min(native, width)
        padded = F.pad(x, (pad, pad, pad, pad))
        stray = torch.tensor([pad - tall // 8, pad - broad // 8])      # shorter axes stray less: see `place_windows`
        starts = place_windows((height, width), (tall, broad), self.seeds[i]) + stray     # (images, windows, 2)
        crops = self.settings.crops and hasattr(self.run.unet, "units") and self.run.unet.config.add_dim
        total = padded.new_zeros(len(halves), *padded.shape)           # by branch of guidance and image
        count = torch.zeros_like(padded[:, :1])
        for corners in starts.unbind(1):
            cuts = [(slice(top, top + tall), slice(left, left + broad)) for top, left in corners.tolist()]
            rows = torch.stack([row[:, down, along] for row, (down, along) in zip(padded, cuts)])
            out = self.cropped(rows, i, halves, corners) if crops else call(rows, i, halves)
            for image, (down, along) in enumerate(cuts):
                total[:, image, :, down, along] += out.unflatten(0, (len(halves), -1))[:, image]
                count[image, :, down, along] += 1
        return (total / count)[..., pad:pad + height, pad:pad + width].flatten(0, 1)

    def cropped(self, x: Tensor, i: int, halves: tuple[int, ...], corners: Tensor) -> Tensor:
        """One pass of SDXL's U-Net, which is told these corners (images, 2), in latent pixels of the padded map."""
        unet, (_, text, added) = self.run.unet, self.run.inputs(halves)
        width = unet.config.add_time_dim                               # of a size's sinusoid; third and fourth of six:
        told = sinusoid(8 * corners.flatten(), width).unflatten(0, (len(x), 2)).flatten(1).repeat(len(halves), 1)
        added = torch.cat([added[:, :-4 * width], told.to(added), added[:, -2 * width:]], dim=1)
        rows = torch.cat([x.to(added.dtype)] * len(halves))
        return unet(rows, unet.embed_time(self.run.plan.times[i], added), text, added, self.run.on((i,), halves))

    def parts(self, call: Call, y: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
        """The predictions for every s-th pixel, for each of the s * s offsets."""
        s = math.ceil(self.long)
        out = y.new_empty(len(halves) * len(y), *y.shape[1:])
        for k in range(s * s):
            part = (slice(None), slice(None), slice(k // s, None, s), slice(k % s, None, s))
            out[part] = call(y[part], i, halves)
        return out


def matched(x: Tensor, like: Tensor) -> Tensor:
    """x with the mean and the standard deviation, per image, of another batch of latents."""
    (own_std, own_mean), (std, mean) = (torch.std_mean(m, (1, 2, 3), keepdim=True) for m in (x, like))
    return (x - own_mean) / own_std * std + mean
