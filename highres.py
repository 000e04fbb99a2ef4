"""Other ways to pictures beyond the model's size, to compare FreeScale with: ScaleCrafter, HiDiffusion, DemoFusion.

    python txt2img.py "a red star" --highres hidiffusion -W 128 -H 128

`ScaleCrafter`, `HiDiffusion` and `DemoFusion` are settings. The sampling loop makes a state from them for every run:
`Crafting`, which gives the U-Net a `Dilated` at every call, `Shrinking`, which gives it a `Shrunk`, and `Fusing`, which
calls it on windows and parts of the latents. (The fourth baseline, direct inference, needs no code: it samples at a
large size.) Where the released codes count steps, the time t decides here: "the first 0.6 of the steps" are the times
above 0.4 * 1000, which is the same for evenly spaced steps.
Shapes: B rows, H W tokens of a map (N = H * W), C channels, h w latent pixels.
Sources: ScaleCrafter, arXiv 2310.07702; HiDiffusion, arXiv 2311.17528; DemoFusion, arXiv 2311.16973. Written from a
description of the released codes and not checked against their outputs.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freescale import FreeScale, gaussian, place_windows, scramble, smooth
from unet import OFF, Attention, Techniques, linear

Call = Callable[[Tensor, int, tuple[int, ...]], Tensor]               # one pass of the U-Net, see `sampler.generate`


class Baseline:
    """What the settings have in common."""
    native: int | None                                                 # latent side of the training pictures

    def __post_init__(self) -> None:
        if self.native is not None and self.native < 1:
            raise ValueError(f"native is a side of latents, 1 or more, not {self.native}")

    def bind(self, sd: Any) -> Any:
        """With the latent side of the training pictures of sd, where it isn't given."""
        return replace(self, native=self.native or sd.config.size // sd.config.vae.factor)


class State:
    """What the states have in common. One that overrides nothing changes nothing, as all do where r is at most 1.

    r: how many times larger the longer side is than the training pictures'.
    seeds: (calls, images), from which the windows of a call are placed.
    """
    draws = False                                                      # are there windows?

    def __init__(self, settings: Any, run: Any):
        if settings.native is None:
            raise ValueError("pass native, the latent side of the training pictures (SD 1.5: 64)")
        self.settings, self.run, self.r = settings, run, max(run.noise.shape[2:]) / settings.native
        if self.draws and self.r > 1:
            if run.generators is None:
                raise ValueError(f"{type(settings).__name__} draws its windows: pass generators, one per image")
            draw = [torch.randint(2 ** 31, (run.plan.calls,), generator=g) for g in run.generators]
            self.seeds = torch.stack(draw, dim=1)

    def left(self, i: int) -> float:
        """The fraction of the time that is left at call i, from 1 to 0."""
        return self.run.plan.times[i] / self.run.plan.train_steps

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> Any:
        return None

    def alike(self, i: int, j: int) -> bool:
        return self.at((i,), ()) == self.at((j,), ())

    def around(self, call: Call) -> Call:
        """DemoFusion's place in the loop: another way to call the U-Net."""
        return call

    def base(self, x: Tensor, i: int, without: Tensor) -> Tensor:
        """ScaleCrafter's place in guidance: what stands for the prediction without the prompt."""
        return without


# -------------------------------------------------------------------------------------------------------- ScaleCrafter

@dataclass(frozen=True)
class ScaleCrafter(Baseline):
    """ScaleCrafter: dilated convolutions; beyond 3 times the training side also noise-damped guidance.

    Beyond 3 times the side, dilation shrinks over the steps, and guidance is weak(negative) + g * (strong(prompt) -
    strong(negative)), where the weak pass has fewer dilated layers.

    until: the fraction of the steps that is dilated, up to 3 times the side and beyond it; none: 0.6:0.7, SD 2.1's
        0.4:0.74.
    native: latent side of the model's training pictures (SD 1.5: 64); none: the model's own.
    """
    until: tuple[float, float] | None = None
    native: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until is not None and not all(0 < part <= 1 for part in self.until):
            raise ValueError(f"ScaleCrafter's until are fractions of the steps, above 0 and up to 1, not {self.until}")

    def bind(self, sd: Any) -> "ScaleCrafter":
        until = (0.4, 0.74) if sd.config.family == "sd21" else (0.6, 0.7)
        return replace(super().bind(sd), until=self.until or until)

    def start(self, run: Any) -> "Crafting":
        run.network("ScaleCrafter")
        return Crafting(self, run)


class Crafting(State):
    """ScaleCrafter in a run."""

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Dilated | None":
        return self.dilated(calls[0])

    def dilated(self, i: int, weak: bool = False) -> "Dilated | None":
        """What acts at call i, of both passes beyond 3 times the side the strong or the weak one."""
        config, r, part = self.run.unet.config, self.r, (self.settings.until or (0.6, 0.7))[self.r > 3]
        left = (self.left(i) - (1 - part)) / part                      # 1 at the start, 0 where dilation ends
        if r <= 1 or left <= 0:
            return None
        two, three, four = (max(math.ceil(p * r / 4 * left), 2) for p in (2, 3, 4))
        # by level of the encoder, of the middle, by level of the decoder; the second table is SDXL's, of three levels
        near, strong, fewer = (
            ((1, r, r, r), r, (r, r, r, 1)),
            ((1, two, three, four), four, (four, three, two, 1)),
            ((1, 1, three, four), four, (four, three, 1, 1))) if len(config.channels) == 4 else (
            ((1, 1, 1), r, (r, 1, 1)),
            ((1, 1, four), four, (four, three, two)),
            ((1, 1, 1), 2, (2, 1, 1)))
        down, middle, up = near if r <= 3 else fewer if weak else strong
        down, up = ([p for p in levels for _ in range(config.layers + 1)] for levels in (down, up))
        return Dilated((1, *down[:-1], middle, *up))

    def base(self, x: Tensor, i: int, without: Tensor) -> Tensor:
        """Beyond 3 times the side, the weak pass for the negative prompt. No cache keeps anything of it."""
        run, weak = self.run, self.dilated(i, weak=True)
        if self.r <= 3 or weak is None:
            return without
        times, text, added = run.inputs((0,))
        beside = {name: state.at((i,), (0,)) for name, state in run.acting.items()
                  if name not in ("highres", "cache", "tgate")}
        return run.unet(x.to(text.source.dtype), times[i], text, added, Techniques(highres=weak, **beside)).to(x.dtype)


@dataclass(frozen=True)
class Dilated:
    """ScaleCrafter at one call, for the U-Net. factors: by unit, how many pixels lie between taps; 1: not dilated."""
    factors: tuple[float, ...]

    def convolve(self, conv: nn.Conv2d, x: Tensor, unit: int) -> Tensor:
        return redilate(conv, x, self.factors[unit])

    def resize(self, unit: int, h: Tensor, skip: Tensor | None = None) -> Tensor:
        return h

    def __call__(self, attention: Attention, x: Tensor, grid: tuple[int, int], on: Techniques = OFF) -> Tensor:
        return attention(x, attention.keys_values(x, on), on)


def redilate(conv: nn.Conv2d, x: Tensor, p: float) -> Tensor:
    """A 3x3 convolution with taps p pixels apart. Between whole numbers, one dilated more on an enlarged map."""
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

    There is one list of layers for up to 3 times the training side and one beyond it. SDXL takes the latter where both
    sides are beyond it.

    native: latent side of the model's training pictures (SD 1.5: 64); none: the model's own.
    """
    native: int | None = None

    def turns(self, plan: Any, first: int, size: tuple[int, int]) -> set[int]:
        """Calls at which maps may change their size: a cache can't reuse older ones. size: the latents'."""
        if self.native is not None and max(size) <= self.native:
            return set()
        done = [1 - t / plan.train_steps for t in plan.times]
        return {i for i in range(first + 1, plan.calls) for edge in (0.16, 0.3, 0.4, 0.7)
                if done[i - 1] < edge <= done[i]}

    def start(self, run: Any) -> "Shrinking":
        run.network("HiDiffusion")
        return Shrinking(self, run)


class Shrinking(State):
    """HiDiffusion in a run. numbers: of every self-attention, in the order of the units."""
    draws = True

    def __init__(self, settings: HiDiffusion, run: Any):
        super().__init__(settings, run)
        units = [unit.attention for unit in run.unet.units() if unit.attention is not None]
        blocks = [block for attention in units for block in attention.transformer_blocks]
        self.numbers = {block.attn1: n for n, block in enumerate(blocks)}

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Shrunk | None":
        config, done = self.run.unet.config, 1 - self.left(calls[0])
        if self.r <= 1:
            return None
        if len(config.channels) == 4:
            skipping, pooling = (done < 0.4, False) if self.r <= 3 else (done < 0.7, done < 0.3)
        elif min(self.run.noise.shape[2:]) <= 3 * self.settings.native:                   # SDXL
            skipping, pooling = done < 0.16, 0.16 <= done < 0.4
        else:
            skipping, pooling = done < 0.3, done < 0.7
        first = next(level for level, depth in enumerate(config.depth) if depth)              # with attention
        down, pooled = (first + 1) * (config.layers + 1), config.layers + 2   # its downsampler; level 1's first unit
        return Shrunk(down if skipping else None, pooled if pooling else None, config.channels[first], self.numbers,
                      self.seeds[list(calls)].repeat(1, len(halves)).flatten())

    def around(self, call: Call) -> Call:
        """The call as it is. ValueError beside a T-GATE that would reuse results of another size."""
        gate, calls = self.run.acting.get("tgate"), self.run.plan.calls
        if gate is not None and gate.settings.text == "reuse" and not all(
                self.alike(gate.turn - 1, i) for i in range(gate.turn, calls)):
            raise ValueError("HiDiffusion changes the size of maps after T-GATE's step: give T-GATE a later step, or "
                             "text=compute")
        return call


@dataclass(frozen=True)
class Shrunk:
    """HiDiffusion at one call, or at several in one batch, for the U-Net.

    skipping: the downsampler that sees every second pixel only; pooling: the unit whose output is halved; None: none.
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
            return attention(x, attention.keys_values(x, on), on)
        quarters = scramble(self.seeds.to(x.device) + self.numbers[attention]) % 4
        return shifted_windows(attention, x, grid, quarters, on)


def shifted_windows(attention: Attention, x: Tensor, grid: tuple[int, int], quarters: Tensor,
                    on: Techniques = OFF) -> Tensor:
    """Attention in 2 x 2 windows of the map, shifted by quarters of a window, per row. (B, N, C) -> (B, N, C)"""
    height, width = even = [side + side % 2 for side in grid]
    if even != list(grid):
        x = resample(x, grid, even)
    down, along = (torch.arange(side, device=x.device) + side // 2 * quarters[:, None] // 4 for side in even)
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
    """DemoFusion: a prediction from windows of the latent and from its interleaved parts.

    The released code takes a solver's step for each window and each part, averages the windows' latents and blends
    both. Steps of the solvers here are linear in the prediction, so predictions can be averaged and blended instead.
    Its third idea, the skip residual, is FreeScale's detail control with alpha 3 and no restart: see `stages`. Two
    things are left out: the matching of each stage's mean and deviation to the first's, and the crop coordinates of
    windows in SDXL's condition.

    sigma: of the blur before the parts are taken.
    native: latent side of the model's training pictures (SD 1.5: 64); none: the model's own.
    """
    sigma: float = 0.8
    native: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma <= 100:
            raise ValueError(f"DemoFusion's sigma must be above 0 and up to 100, not {self.sigma:g}")

    def stages(self, native: int, height: int, width: int) -> FreeScale:
        """Its cascade to this size in pixels: once, twice, three times the model's own size `native`, and so on."""
        r = math.ceil(max(height, width) / native)
        sizes = [tuple(max(round(side * k / r / 8), 1) * 8 for side in (height, width)) for k in range(1, r)]
        return FreeScale((*sizes, (height, width)), upsample="latent", restart=0.0, detail=3.0, attention="global",
                         dilate=0.0)

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
            c = (1 + math.cos(math.pi * (1 - self.left(i)))) / 2       # from 1 to 0; the released alphas 2 and 3 are 1
            y = smooth(x, gaussian(2 * math.ceil(self.r) - 1, self.settings.sigma * (0.99 * c + 0.01)), dims=(2, 3))
            (own_std, own_mean), (std, mean) = (torch.std_mean(m, (1, 2, 3), keepdim=True) for m in (y, x))
            y = (y - own_mean) / own_std * std + mean                  # the blur took from the noise's strength
            return (1 - c) * self.windows(call, x, i, halves) + c * self.parts(call, y, i, halves)
        return call if self.r <= 1 else fused

    def windows(self, call: Call, x: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
        """The mean of the predictions for overlapping windows, one window of each image at a time."""
        (height, width), native = x.shape[2:], self.settings.native
        pad, tall, broad = native // 8, min(native, height), min(native, width)
        padded = F.pad(x, (pad, pad, pad, pad))
        stray = torch.tensor([pad - tall // 8, pad - broad // 8])      # shorter axes stray less: see `place_windows`
        starts = place_windows((height, width), (tall, broad), self.seeds[i]) + stray     # (images, windows, 2)
        total = padded.new_zeros(len(halves), *padded.shape)           # by branch of guidance and image
        count = torch.zeros_like(padded[:, :1])
        for places in starts.transpose(0, 1).tolist():
            cuts = [(slice(top, top + tall), slice(left, left + broad)) for top, left in places]
            out = call(torch.stack([row[:, down, along] for row, (down, along) in zip(padded, cuts)]), i, halves)
            for image, (down, along) in enumerate(cuts):
                total[:, image, :, down, along] += out.unflatten(0, (len(halves), -1))[:, image]
                count[image, :, down, along] += 1
        return (total / count)[..., pad:pad + height, pad:pad + width].flatten(0, 1)

    def parts(self, call: Call, y: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
        """The predictions for every s-th pixel, for each of the s * s offsets."""
        s = math.ceil(self.r)
        out = y.new_empty(len(halves) * len(y), *y.shape[1:])
        for k in range(s * s):
            part = (slice(None), slice(None), slice(k // s, None, s), slice(k % s, None, s))
            out[part] = call(y[part], i, halves)
        return out
