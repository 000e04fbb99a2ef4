"""Other ways to pictures beyond the model's size, to compare FreeScale with: ScaleCrafter, HiDiffusion, DemoFusion.

    python txt2img.py "a red star" --highres hidiffusion -W 128 -H 128

`ScaleCrafter`, `HiDiffusion` and `DemoFusion` are settings; the sampling loop makes `Crafting`, `Shrinking` and
`Fusing` from them for every run. (The fourth baseline, direct inference, needs no code: it samples at a large size.)
Where the released codes count steps, the time t decides here: "the first 0.6 of the steps" are the times above
0.4 * 1000, which is the same for evenly spaced steps.
Shapes: B rows, H W tokens of a map, h w latent pixels.
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

from freescale import FreeScale, gaussian, place_windows, smooth
from unet import OFF, Attention, Techniques, UNet

Call = Callable[[Tensor, int, tuple[int, ...]], Tensor]               # one pass of the U-Net, see `sampler.generate`


class Baseline:
    """What the three have in common: the side of the training pictures, and a state that changes nothing by default."""
    native: int | None

    def bind(self, sd: Any) -> Any:
        """With the latent side of the training pictures of sd, where it isn't given."""
        return replace(self, native=self.native or sd.config.size // sd.config.vae.factor)


@dataclass
class State:
    """A baseline in a run. r: how many times larger the longer side is than the training pictures'."""
    settings: Any
    run: Any
    r: float = field(init=False)

    def __post_init__(self) -> None:
        if self.settings.native is None:
            raise ValueError("pass native, the latent side of the training pictures (SD 1.5: 64)")
        self.r = max(self.run.noise.shape[2:]) / self.settings.native

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

    def bind(self, sd: Any) -> "ScaleCrafter":
        until = (0.4, 0.74) if sd.config.family == "sd21" else (0.6, 0.7)
        return replace(super().bind(sd), until=self.until or until)

    def start(self, run: Any) -> "Crafting":
        run.network("ScaleCrafter")
        return Crafting(self, run)


class Crafting(State):
    """ScaleCrafter in a run."""

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...], weak: bool = False) -> "Dilated | None":
        config, r, part = self.run.unet.config, self.r, (self.settings.until or (0.6, 0.7))[self.r > 3]
        deep = len(config.channels) == 3                               # SDXL, whose three levels are dilated otherwise
        left = (self.left(calls[0]) - (1 - part)) / part               # 1 at the start, 0 where dilation ends
        if r <= 1 or left <= 0:
            return None
        if r <= 3:
            return Dilated(self.run.unet, *(({}, r, {0: r}) if deep else ({1: r, 2: r, 3: r}, r, {0: r, 1: r, 2: r})))

        def shrunk(p: float) -> float:
            return max(math.ceil(p * r / 4 * left), 2)
        if deep:
            strong = {2: shrunk(4)}, shrunk(4), {0: shrunk(4), 1: shrunk(3), 2: shrunk(2)}
            fewer = {}, 2, {0: 2}
        else:
            strong = ({1: shrunk(2), 2: shrunk(3), 3: shrunk(4)}, shrunk(4),
                      {0: shrunk(4), 1: shrunk(3), 2: shrunk(2)})
            fewer = {2: shrunk(3), 3: shrunk(4)}, shrunk(4), {0: shrunk(4), 1: shrunk(3)}
        return Dilated(self.run.unet, *(fewer if weak else strong))

    def base(self, x: Tensor, i: int, without: Tensor) -> Tensor:
        """Beyond 3 times the side, the weak pass for the negative prompt. No cache keeps anything of it."""
        run, weak = self.run, self.at((i,), (0,), weak=True)
        if self.r <= 3 or weak is None:
            return without
        times, text, added = run.inputs((0,))
        beside = {name: state.at((i,), (0,)) for name, state in run.acting.items()
                  if name not in ("highres", "cache", "tgate")}
        return run.unet(x.to(text.source.dtype), times[i], text, added, Techniques(highres=weak, **beside)).to(x.dtype)


@dataclass
class Dilated:
    """ScaleCrafter at one call, for the U-Net: by how much the convolutions of a level are dilated, 1 if not named.

    down, up: by level of the encoder and of the decoder, 0 for the encoder's largest map and for the decoder's deepest.
    """
    unet: UNet
    down: dict[int, float]
    middle: float
    up: dict[int, float]

    def convolve(self, conv: nn.Conv2d, x: Tensor, unit: int) -> Tensor:
        middle, per_level = self.unet.middle, self.unet.config.layers + 1
        if unit == 0:
            return conv(x)
        if unit == middle:
            return redilate(conv, x, self.middle)
        level = (unit - 1) // per_level if unit < middle else (unit - middle - 1) // per_level
        return redilate(conv, x, (self.down if unit < middle else self.up).get(level, 1))

    def __call__(self, attention: Attention, x: Tensor, grid: tuple[int, int], on: Techniques = OFF) -> Tensor:
        return attention(x, attention.keys_values(x, on), on)

    def resize(self, unit: int, h: Tensor, skip: Tensor | None = None) -> Tensor:
        return h


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

    def turns(self, plan: Any, first: int) -> set[int]:
        """Calls at which maps may change their size: a cache can't reuse older ones."""
        done = [1 - t / plan.train_steps for t in plan.times]
        return {next((i for i, now in enumerate(done) if now >= edge and i > first), first) for edge in
                (0.16, 0.3, 0.4, 0.7)}

    def start(self, run: Any) -> "Shrinking":
        """Draws the shifts of all windows: one number per image, call and self-attention."""
        if run.generators is None:
            raise ValueError("HiDiffusion draws its windows: pass generators, one per image")
        units = [unit.attention for unit in run.network("HiDiffusion").units() if unit.attention is not None]
        blocks = [block.attn1 for attention in units for block in attention.transformer_blocks]
        quarters = torch.stack([torch.randint(4, (run.plan.calls, len(blocks)), generator=g) for g in run.generators])
        return Shrinking(self, run, quarters, {attention: n for n, attention in enumerate(blocks)})


@dataclass
class Shrinking(State):
    """HiDiffusion in a run. quarters: (images, calls, attentions), of a window by which windows are shifted."""
    quarters: Tensor
    numbers: dict[Attention, int]

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Shrunk | None":
        config, r, done = self.run.unet.config, self.r, 1 - self.left(calls[0])
        if r <= 1:
            return None
        if len(config.channels) == 3:                                  # SDXL
            far = min(self.run.noise.shape[2:]) > 3 * self.settings.native
            skipping, pooling = (done < 0.3, done < 0.7) if far else (done < 0.16, 0.16 <= done < 0.4)
        else:
            skipping, pooling = (done < 0.4, False) if r <= 3 else (done < 0.7, done < 0.3)
        first = next(level for level, depth in enumerate(config.depth) if depth)              # with attention
        down, pooled = (first + 1) * (config.layers + 1), config.layers + 2   # its downsampler; level 1's first unit
        rows = [self.quarters[image, i] for i in calls for _ in halves for image in range(len(self.quarters))]
        return Shrunk(down if skipping else None, pooled if pooling else None, config.channels[first], self.numbers,
                      [row.tolist() for row in rows])

    def alike(self, i: int, j: int) -> bool:
        one, two = self.at((i,), ()), self.at((j,), ())
        return one == two or (one.skipping, one.pooling) == (two.skipping, two.pooling)


@dataclass
class Shrunk:
    """HiDiffusion at one call, for the U-Net.

    skipping: the downsampler that sees every second pixel only; pooling: the unit whose output is halved; None: none.
    width: channels of the self-attention that is windowed. quarters: by row of the batch and attention.
    """
    skipping: int | None
    pooling: int | None
    width: int
    numbers: dict[Attention, int]
    quarters: list[list[int]]

    def convolve(self, conv: nn.Conv2d, x: Tensor, unit: int) -> Tensor:
        return conv(x[:, :, ::2, ::2] if unit == self.skipping else x)

    def resize(self, unit: int, h: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is None:
            return F.avg_pool2d(h, 2, ceil_mode=True) if unit == self.pooling else h
        return h if h.shape[2:] == skip.shape[2:] else F.interpolate(h, skip.shape[2:], mode="bicubic")

    def __call__(self, attention: Attention, x: Tensor, grid: tuple[int, int], on: Techniques = OFF) -> Tensor:
        if x.shape[2] != self.width or min(grid) < 2:
            return attention(x, attention.keys_values(x, on), on)
        return shifted_windows(attention, x, grid, [row[self.numbers[attention]] for row in self.quarters], on)


def shifted_windows(attention: Attention, x: Tensor, grid: tuple[int, int], quarters: list[int],
                    on: Techniques = OFF) -> Tensor:
    """Attention in 2 x 2 windows of the map, shifted by so many quarters of a window per row. (B, N, C) -> (B, N, C)"""
    maps = x.unflatten(1, grid).permute(0, 3, 1, 2)                    # (B, C, H, W)
    even = [side + side % 2 for side in grid]
    if even != list(grid):
        maps = F.interpolate(maps, even, mode="bicubic")
    side = even[0] // 2, even[1] // 2
    shifts = [(side[0] * quarter // 4, side[1] * quarter // 4) for quarter in quarters]
    rolled = torch.stack([row.roll((-y, -x), (1, 2)) for row, (y, x) in zip(maps, shifts)])
    rolled = rolled.unflatten(3, (2, side[1])).unflatten(2, (2, side[0]))
    each = rolled.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)                   # (B * 4, tokens, C)
    out = attention(each, attention.keys_values(each, on), on)
    out = out.unflatten(0, (len(x), 2, 2)).unflatten(3, side).permute(0, 5, 1, 3, 2, 4)   # (B, C, 2, h, 2, w)
    maps = torch.stack([row.roll(shift, (1, 2)) for row, shift in zip(out.flatten(4, 5).flatten(2, 3), shifts)])
    if even != list(grid):
        maps = F.interpolate(maps, grid, mode="bicubic")
    return maps.flatten(2).transpose(1, 2)


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

    def stages(self, native: int, height: int, width: int) -> FreeScale:
        """Its cascade to this size in pixels: once, twice, three times the model's own size `native`, and so on."""
        r = math.ceil(max(height, width) / native)
        sizes = [tuple(max(round(side * k / r / 8), 1) * 8 for side in (height, width)) for k in range(1, r + 1)]
        return FreeScale(tuple(sizes), upsample="latent", restart=0.0, detail=3.0, attention="global", dilate=0.0)

    def start(self, run: Any) -> "Fusing":
        """Draws one number per image and call, for the windows."""
        if run.generators is None:
            raise ValueError("DemoFusion draws its windows: pass generators, one per image")
        seeds = torch.stack([torch.randint(2 ** 31, (run.plan.calls,), generator=g) for g in run.generators])
        return Fusing(self, run, seeds)


@dataclass
class Fusing(State):
    """DemoFusion in a run. seeds: (images, calls), of the windows."""
    seeds: Tensor

    def around(self, call: Call) -> Call:
        """A call on windows and on parts of the latents. ValueError beside a cache or T-GATE, which would mix them."""
        if "cache" in self.run.acting or "tgate" in self.run.acting:
            raise ValueError("DemoFusion calls the U-Net many times per step: leave out cache and T-GATE")

        def fused(x: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
            if self.r <= 1:
                return call(x, i, halves)
            c = (1 + math.cos(math.pi * (1 - self.left(i)))) / 2       # from 1 to 0; the released alphas 2 and 3 are 1
            blur = gaussian(2 * math.ceil(self.r) - 1, self.settings.sigma * (0.99 * c + 0.01))
            y = smooth(x, blur, dims=(2, 3))
            (own_std, own_mean), (std, mean) = (torch.std_mean(m, (1, 2, 3), keepdim=True) for m in (y, x))
            y = (y - own_mean) / own_std * std + mean                  # the blur took from the noise's strength
            return (1 - c) * self.windows(call, x, i, halves) + c * self.parts(call, y, i, halves)
        return fused

    def windows(self, call: Call, x: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
        """The mean of the predictions for overlapping windows, one window of all images at a time."""
        grid, native = x.shape[2:], self.settings.native
        pad, window = native // 8, (min(native, grid[0]), min(native, grid[1]))
        padded = F.pad(x, (pad, pad, pad, pad)) if pad else x
        stray = torch.tensor([pad - side // 8 for side in window])     # shorter axes stray less: see `place_windows`
        starts = place_windows(grid, window, self.seeds[:, i]) + stray                        # (images, V, 2)
        total = x.new_zeros(len(halves) * len(x), x.shape[1], *padded.shape[2:])
        count = torch.zeros_like(total[:, :1])
        for places in starts.transpose(0, 1).tolist():
            cuts = [(slice(top, top + window[0]), slice(left, left + window[1])) for top, left in places]
            out = call(torch.stack([row[:, down, along] for row, (down, along) in zip(padded, cuts)]), i, halves)
            for row, patch in enumerate(out.to(x.dtype)):
                down, along = cuts[row % len(x)]
                total[row, :, down, along] += patch
                count[row, :, down, along] += 1
        inside = (slice(None), slice(None), slice(pad, pad + grid[0]), slice(pad, pad + grid[1]))
        return total[inside] / count[inside]

    def parts(self, call: Call, y: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
        """The predictions for every s-th pixel, for each of the s * s offsets."""
        s = math.ceil(self.r)
        out = y.new_zeros(len(halves) * len(y), *y.shape[1:])
        for top in range(s):
            for left in range(s):
                out[:, :, top::s, left::s] = call(y[:, :, top::s, left::s], i, halves).to(y.dtype)
        return out
