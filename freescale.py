"""FreeScale: pictures of several times the training size from an unchanged U-Net, stage by stage.

Start at `FreeScale`, the settings. For every stage after the first, the sampling loop makes a `Stage` from them, which
gives the U-Net a `Scale` at every step. There are three parts. Scale fusion, `Scale.__call__`, replaces self-attention:
attention in local windows of the training size gives the large shapes, attention over the whole map the finest detail.
`Scale.convolve` dilates the deepest convolutions of the encoder. The cascade, `enlarge` and `Stage.mix`, enlarges the
finished picture, adds noise, restarts from it, and at first keeps the latents near it.
Shapes: B rows, H W tokens of a map (N = H * W), h w latent pixels, C channels, V windows.
Source: FreeScale, arXiv 2412.09626. Checked against outputs of the official code (ali-vilab/FreeScale), which differs
from the paper in `blur` and `restart`; the README has the flags for all its defaults. For pictures that are not square
or not a whole number of training sides, the rules here are our own: windows stay square like the training pictures,
each axis has its own dilation, and the size of the blur is rounded up.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unet import OFF, Attention, Techniques, UNetConfig, linear

WINDOW_TOKENS = 65536      # local attention processes windows in batches of about this many tokens, to bound the memory


class Size(NamedTuple):
    """The sides of a picture in pixels. As text they are width x height, as people write them."""
    height: int
    width: int

    @staticmethod
    def read(text: str) -> "Size":
        width, cross, height = text.partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()):
            raise ValueError(f"a size is WIDTHxHEIGHT, such as 512x512, not {text!r}")
        return Size(int(height), int(width))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class FreeScale:
    """FreeScale: pictures larger than the model's own, in stages.

    The defaults are the official ones, except for blur.

    resolutions: a factor, 2, 4 or 8: the first stage has the model's own size or --width and --height, and each further
        stage doubles it. Or the sizes of all stages in pixels, such as 512x512:1024x1024: multiples of 8 that never get
        smaller. The first stage is sampled as usual (or is a given picture), the last one is the result.
    detail: alpha, the power of the factor that keeps latents near the enlarged picture, see `Stage.mix`. Larger: freer,
        more new detail. Usual are 1 to 2, and at most 1 for 8 times the size. 0: kept there up to the last step. inf:
        as free as img2img.
    outside: alpha where the picture of detail_map is black.
    detail_map: a gray picture as large as one of the stages; alpha is `detail` where it isn't black.
    restart: the fraction of the steps that a later stage skips: it starts from its enlarged picture with the noise of
        step int(restart * steps). (The paper gives no number; this is the released code's.)
    upsample: between stages, "rgb" (decode, enlarge, encode) or "latent" (enlarge the latents, without the VAE).
    blur: what splits low from high frequencies: "spatial", over height and width as in the paper, or "official", which
        also blurs over neighbouring channels. On the tiny model at twice its size, "spatial" got 148 of 200 pictures
        right, "official" 142 (within chance; direct inference 27), and "spatial" is cheaper.
    fast: global attention on interleaved sub-grids of the training size instead of on all tokens at once.
    dilate: the fraction of the steps before which deep convolutions are dilated. 0: never.
    dilate_from: the first dilated level: its ResBlocks, the downsampler that leads to it, and all deeper layers of the
        encoder. 2 are SDXL's published layers, and SD's of the same width; 3 is the deepest level of SD alone.
    attention: "fused"; or for comparison one of its parts alone, "global" (plain attention) or "local".
    native: latent side of the model's training pictures (SD 1.5: 64); none: the model's own.
    """
    resolutions: int | tuple[Size, ...]
    detail: float = 2.0
    outside: float = 0.5
    detail_map: Path | None = None
    restart: float = 0.3
    upsample: Literal["rgb", "latent"] = "rgb"
    blur: Literal["spatial", "official"] = "spatial"
    fast: bool = False
    dilate: float = 0.7
    dilate_from: int = 2
    attention: Literal["fused", "global", "local"] = "fused"
    native: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.resolutions, int):
            if self.resolutions not in (2, 4, 8):
                raise ValueError(f"FreeScale enlarges 2, 4 or 8 times, not {self.resolutions}; for other sizes give "
                                 "every stage's, such as 512x512:1024x1024")
        else:
            object.__setattr__(self, "resolutions", tuple(Size(*size) for size in self.resolutions))     # or of lists
            if not self.resolutions:
                raise ValueError("FreeScale needs at least one resolution")
            for size in self.resolutions:
                if min(size) <= 0 or size.height % 8 or size.width % 8:
                    near = Size(*(max(round(side / 8), 1) * 8 for side in size))
                    raise ValueError(f"resolution {size} is not of multiples of 8; the nearest is {near}")
            for one, two in zip(self.resolutions, self.resolutions[1:]):
                if two.height < one.height or two.width < one.width:
                    raise ValueError(f"resolutions must not fall, but {one} is followed by {two}: sort them")
        alpha = "0 or more; 1 to 2 are usual, at most 1 for 8 times the size"
        for name, fits, words in (
                ("detail", self.detail >= 0, alpha), ("outside", self.outside >= 0, alpha),        # NaN doesn't fit
                ("restart", 0 <= self.restart < 1, "a fraction of the steps, from 0 to below 1"),
                ("upsample", self.upsample in ("rgb", "latent"), "rgb or latent"),
                ("blur", self.blur in ("spatial", "official"), "spatial or official"),
                ("dilate", 0 <= self.dilate <= 1, "a fraction of the steps, from 0 to 1"),
                ("dilate_from", self.dilate_from >= 1, "a level from 1 up"),
                ("attention", self.attention in ("fused", "global", "local"), "fused or global or local"),
                ("native", self.native is None or self.native >= 1, "a side of latents, 1 or more")):
            if not fits:
                raise ValueError(f"FreeScale's {name} is {words}, not {getattr(self, name)!r}")
        for name, idle, where in (("outside", self.detail_map is None, "without detail_map"),
                                  ("blur", self.attention != "fused", f"with attention={self.attention}"),
                                  ("fast", self.attention == "local", "with attention=local"),
                                  ("dilate", 0 < self.dilate <= self.restart, "up to restart, where stages begin"),
                                  ("dilate_from", self.dilate <= self.restart, "if dilate isn't above restart")):
            if idle and getattr(self, name) != getattr(FreeScale, name):
                raise ValueError(f"FreeScale's {name} does nothing {where}")

    def check(self, config: UNetConfig, steps: int, guided: bool = True) -> None:
        """ValueError for settings that don't fit this U-Net, or do nothing without a second stage."""
        levels, single = len(config.channels), isinstance(self.resolutions, tuple) and len(self.resolutions) == 1
        if self.dilate_from > levels:
            raise ValueError(f"FreeScale's dilate_from is at most {levels} with this model, where only the middle is "
                             f"dilated, not {self.dilate_from}")
        for field in fields(self)[1:-1] if single else ():             # all but resolutions and native
            if getattr(self, field.name) != field.default:
                raise ValueError(f"FreeScale's {field.name} does nothing without a second resolution")

    def fit(self, native: int, height: int, width: int) -> "FreeScale":
        """These settings with the sizes of all stages and the latent side of the training pictures filled in.

        height, width: of the first stage. ValueError if the detail map is no gray picture or has the size of no stage.
        """
        factor = self.resolutions
        if isinstance(factor, int):
            factor = tuple(Size(height * 2 ** k, width * 2 ** k) for k in range(factor.bit_length()))
        full = replace(self, resolutions=factor, native=self.native or native)
        if self.detail_map is not None:
            size = Size(*read_mask(self.detail_map).shape)
            if size not in full.resolutions:
                raise ValueError(f"{self.detail_map} is {size}, but must be as large as a stage "
                                 f"({', '.join(map(str, full.resolutions))}): resize it")
        return full

    def first_step(self, steps: int) -> int:
        """The step that later stages start from."""
        return int(self.restart * steps + 1e-9)                        # 0.29 * 100 is 28.999...

    def start(self, run: Any) -> "Stage":
        """The state for a stage whose enlarged picture is run.init."""
        if run.init is None:
            raise ValueError("FreeScale continues an enlarged picture: pass it as init")
        if self.native is None:
            raise ValueError("FreeScale needs the latent side of the training pictures: pass native (SD 1.5: 64)")
        alpha: float | Tensor = self.detail
        if self.detail_map is not None:
            alpha = torch.where(read_mask(self.detail_map), self.detail, self.outside)
            alpha = F.interpolate(alpha[None, None], run.noise.shape[2:], mode="nearest")    # (1, 1, h, w)
        return Stage(self, run, draw_seeds(run, "FreeScale"), alpha, number_attentions(run.unet))


def read_mask(path: Path) -> Tensor:
    """A gray picture as (H, W), true where it isn't black. ValueError for a file that is no gray picture."""
    try:
        with Image.open(path) as file:
            mode, pixels = file.mode, np.asarray(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"can't read the mask {path} ({error})") from None
    if mode not in ("1", "L"):
        raise ValueError(f"{path} has mode {mode}, but a mask is black and white or gray: save it so")
    return torch.from_numpy(pixels > 0)


def draw_seeds(run: Any, technique: str) -> Tensor:
    """What the windows of a run are placed by: a number per call and image, (calls, images)."""
    if run.generators is None:
        raise ValueError(f"{technique} draws its windows: pass generators, one per image")
    return torch.stack([torch.randint(2 ** 31, (run.plan.calls,), generator=g) for g in run.generators], dim=1)


def number_attentions(unet: Any) -> dict[Attention, int]:
    """Every self-attention with its number in the order of the units; none for a function in the U-Net's place."""
    units = [unit.attention for unit in (unet.units() if hasattr(unet, "units") else [])]
    return {block.attn1: n for n, block in enumerate(
        block for attention in units if attention is not None for block in attention.transformer_blocks)}


@dataclass(frozen=True, eq=False)
class Stage:
    """FreeScale in one stage of a run. It keeps nothing between calls: any of them can be repeated.

    seeds: see `draw_seeds`. alpha: the detail, a number or per latent pixel (1, 1, h, w). numbers: `number_attentions`.
    """
    settings: FreeScale
    run: Any
    seeds: Tensor
    alpha: float | Tensor
    numbers: dict[Attention, int]

    def mix(self, i: int, x: Tensor) -> Tensor:
        """Detail control: x (B, 4, h, w) is mixed with the enlarged picture, noised to the level of call i.

        The picture's part c = ((1 + cos(pi (T - t) / T)) / 2) ** alpha falls from 1 at t = T to 0. At the first call x
        is the noised picture itself. It is noised anew at every call: all 50 would take 0.8 GB at 8192 pixels.
        """
        run, T = self.run, self.run.plan.train_steps
        if i == run.first:
            return x
        c = ((1 + math.cos(math.pi * (T - run.plan.times[i]) / T)) / 2)
        c = c ** (self.alpha.to(x) if isinstance(self.alpha, Tensor) else self.alpha)
        alpha_bar = run.plan.now[i]
        return (1 - c) * x + c * (math.sqrt(alpha_bar) * run.init + math.sqrt(1 - alpha_bar) * run.noise)

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Scale | None":
        """What acts at these calls. Both branches of guidance see the same windows."""
        run = self.run
        if not self.numbers:                                           # a function in the U-Net's place
            return None
        return Scale(self.settings, tuple(run.noise.shape[2:]), run.plan.fraction(calls[0]) < self.settings.dilate,
                     self.seeds[list(calls)], self.numbers, run.unet.config)


@dataclass(eq=False)
class Scale:
    """FreeScale at one call, or at several calls in one batch, for the U-Net.

    size: of the latents, (h, w). dilated: are deep convolutions dilated? seeds: (calls, images), of the windows. The
    batch is ordered by call, then by branch of guidance, then by image. numbers: see `number_attentions`.
    """
    settings: FreeScale
    size: tuple[int, int]
    dilated: bool
    seeds: Tensor
    numbers: dict[Attention, int]
    config: UNetConfig

    def dilation(self, unit: int) -> tuple[int, int] | None:
        """The distance between taps of a unit's convolutions along both axes; None: not dilated.

        It is the size in training sides, rounded down: a convolution then sees as much of the picture as in training.
        The decoder is never dilated: that would cost detail.
        """
        levels, per_level = len(self.config.channels), self.config.layers + 1
        d = max(self.size[0] // self.settings.native, 1), max(self.size[1] // self.settings.native, 1)
        deep = min(self.settings.dilate_from, levels) * per_level <= unit <= levels * per_level
        return d if self.dilated and deep and d != (1, 1) else None

    def convolve(self, conv: nn.Conv2d, x: Tensor, unit: int) -> Tensor:
        """A 3x3 convolution of a unit, dilated or not. The size of the result is the same."""
        d = self.dilation(unit)
        return conv(x) if d is None else F.conv2d(x, conv.weight, conv.bias, conv.stride, padding=d, dilation=d)

    def window(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The tokens of a training picture on a map of grid (H, W), at most the map itself."""
        level = math.ceil(math.log2(max(self.size) / max(grid)))       # halves are rounded up
        side = -(-self.settings.native // 2 ** level)
        return min(side, grid[0]), min(side, grid[1])

    def __call__(self, attention: Attention, x: Tensor, grid: tuple[int, int], on: Techniques = OFF) -> Tensor:
        """Scale fusion, in place of the self-attention of a map of grid (H, W). (B, N, C) -> (B, N, C)"""
        window, s = self.window(grid), self.settings
        if window == grid or (s.attention == "global" and not s.fast):
            return attention(x, attention.keys_values(x, on), on)      # one window is all of it: plain attention
        seeds = self.seeds.to(x.device) + self.numbers[attention]      # each attention has windows of its own
        branches = len(x) // seeds.numel()
        starts = place_windows(grid, window, seeds.repeat(1, branches).flatten())
        parts = tuple(-(-n // w) for n, w in zip(grid, window)) if s.fast else (1, 1)
        taps = gaussian(2 * math.ceil(max(self.size) / s.native) - 1)
        return fuse(attention, x, grid, window, starts, taps, s.blur, parts, s.attention, on)


# -------------------------------------------------------------------------------------------------------- scale fusion

def fuse(attention: Attention, x: Tensor, grid: tuple[int, int], window: tuple[int, int], starts: Tensor,
         taps: Sequence[float], blur: str = "spatial", parts: tuple[int, int] = (1, 1), kind: str = "fused",
         on: Techniques = OFF) -> Tensor:
    """Low frequencies of local attention plus high frequencies of global attention. (B, N, C) -> (B, N, C)

    starts: of each row's windows, (B, V, 2), see `place_windows`. taps: of the blur along each axis. parts: the number
    of sub-grids along each axis for global attention. With L local and G global, blur(L) + G - blur(G) is
    G + blur(L - G), which needs one blur. The output projection is affine, and a spatial blur acts on every channel
    alike, so one projection of the sum is enough; for a blur over channels, both are projected before it.
    """
    q, k, v = (linear(layer, x, on).unflatten(1, grid) for layer in (attention.to_q, attention.to_k, attention.to_v))

    def out(h: Tensor) -> Tensor:                                      # (B, H, W, C) -> (B, N, C), projected
        return linear(attention.to_out[0], h.to(x.dtype).flatten(1, 2), on)

    if kind == "global":
        return out(attend_parts(attention, q, k, v, parts, on))
    local = attend_windows(attention, q, k, v, window, starts, on)     # float32 or wider: differences are small
    if kind == "local":
        return out(local)
    whole = attend_parts(attention, q, k, v, parts, on)
    if blur == "spatial":
        return out(whole + smooth(local - whole, taps, dims=(1, 2)))
    local, whole = out(local).unflatten(1, grid).to(local.dtype), out(whole).unflatten(1, grid)
    return (whole + smooth(local - whole, taps, dims=(1, 2, 3))).to(x.dtype).flatten(1, 2)


def attend_parts(attention: Attention, q: Tensor, k: Tensor, v: Tensor, parts: tuple[int, int],
                 on: Techniques = OFF) -> Tensor:
    """Attention over the whole map, or over each of parts[0] * parts[1] interleaved sub-grids. (B, H, W, C) each"""
    out = torch.empty_like(q)
    for top in range(parts[0]):
        for left in range(parts[1]):
            each = (slice(None), slice(top, None, parts[0]), slice(left, None, parts[1]))
            heads = [attention.split(m[each].flatten(1, 2)) for m in (q, k, v)]
            out[each] = attention.attend(*heads, on).unflatten(1, out[each].shape[1:3])
    return out


def attend_windows(attention: Attention, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int],
                   starts: Tensor, on: Techniques = OFF) -> Tensor:
    """Attention within each window, averaged where windows overlap. (B, H, W, C) each -> (B, H, W, C), float32

    The map is padded with zeros, an eighth of a window wide, because windows can stray so far; zeros are keys like any
    others. The official code pads the hidden states: queries, keys and values have no bias, so the result is the same.
    """
    (rows, height, width, _), (tall, broad) = q.shape, window
    pad_y, pad_x = tall // 8, broad // 8
    padded = rows, height + 2 * pad_y, width + 2 * pad_x
    q, k, v = (F.pad(m, (0, 0, pad_x, pad_x, pad_y, pad_y)).flatten(0, 2) for m in (q, k, v))

    # Token numbers in these flat maps: each window's first, (B * V,), and the offsets of its tokens from that
    row, y, x = (torch.arange(n, device=q.device) for n in (rows, tall, broad))
    first = ((row[:, None] * padded[1] + starts[..., 0]) * padded[2] + starts[..., 1]).flatten()
    others = (y[:, None] * padded[2] + x).flatten()

    total = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    count = total.new_zeros(len(total), 1)
    for some in first.split(max(WINDOW_TOKENS // len(others), 1)):
        tokens = (some[:, None] + others).flatten()
        heads = [attention.split(m.index_select(0, tokens).unflatten(0, (len(some), -1))) for m in (q, k, v)]
        out = attention.attend(*heads, on).flatten(0, 1).to(total.dtype)
        if total.is_cuda:                                              # index_add_ would add in no fixed order
            total.index_put_((tokens,), out, accumulate=True)
        else:
            total.index_add_(0, tokens, out)
        count.index_add_(0, tokens, torch.ones_like(out[:, :1]))
    inside = (slice(None), slice(pad_y, pad_y + height), slice(pad_x, pad_x + width))
    return total.unflatten(0, padded)[inside] / count.unflatten(0, padded)[inside]


def place_windows(grid: tuple[int, int], window: tuple[int, int], seeds: Tensor) -> Tensor:
    """Top and left of every window, counted from the corner of the padded map. Seeds of any shape -> (..., V, 2)

    Windows are half a window apart, and the last one ends with the map. Each strays by up to an eighth of a window. The
    first and the last of an axis never stray inwards, so that every token is covered.
    """
    bases, lows, highs = [], [], []
    for size, side in zip(grid, window):
        count = 1 + -(-(size - side) // max(side // 2, 1))
        base = (torch.arange(count, device=seeds.device) * max(side // 2, 1)).clamp(max=size - side)
        stray = side // 8
        low, high = torch.full_like(base, -stray), torch.full_like(base, stray)
        low[-1], high[0] = 0, 0
        bases, lows, highs = [*bases, base + stray], [*lows, low], [*highs, high]
    base, low, high = (torch.cartesian_prod(*axes) for axes in (bases, lows, highs))         # (V, 2) each
    places = torch.arange(base.numel(), device=seeds.device).view_as(base)
    return base + low + scramble(scramble(seeds)[..., None, None] + places) % (high - low + 1)


def scramble(x: Tensor) -> Tensor:
    """Whole numbers below 2^32 to pseudo-random ones, int64. Unlike a generator, it works in a compiled graph."""
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B & 0xFFFFFFFF
    return x ^ x >> 16


def gaussian(size: int, sigma: float = 1.0) -> list[float]:
    """Samples of a Gaussian that sum to 1; their number, size, is odd."""
    samples = [math.exp(-0.5 * ((k - size // 2) / sigma) ** 2) for k in range(size)]
    return [sample / sum(samples) for sample in samples]


def smooth(x: Tensor, taps: Sequence[float], dims: tuple[int, ...]) -> Tensor:
    """x filtered with these taps along each of the axes, with zeros around it."""
    middle = len(taps) // 2
    for dim in dims:
        out = x * float(taps[middle])
        for d in range(1, min(middle, x.shape[dim] - 1) + 1):
            n, g = x.shape[dim] - d, float(taps[middle + d])
            out.narrow(dim, d, n).add_(x.narrow(dim, 0, n), alpha=g)
            out.narrow(dim, 0, n).add_(x.narrow(dim, d, n), alpha=g)
        x = out
    return x


# ------------------------------------------------------------------------------------------------------------- cascade

def enlarge(latents: Tensor, size: tuple[int, int], upsample: str, vae: Any, noise: Tensor | None,
            tile: int | None = None) -> Tensor:
    """VAE-scaled latents (B, 4, h', w') of a stage to those of the next, whose size (height, width) is in pixels.

    upsample "rgb": each picture is decoded, enlarged by bicubic interpolation, not clamped (as released), and encoded;
    unit noise (B, 4, h, w) draws a sample from the encoder's distribution. "latent": the latents themselves are
    enlarged. tile: as in `VAE.decode`.
    """
    if upsample == "latent":
        return F.interpolate(latents, [side // vae.config.factor for side in size], mode="bicubic")
    larger = []
    for z, unit in zip(latents.split(1), noise.split(1)):
        image = vae.decode(z / vae.config.scaling, tile)
        image = F.interpolate(image.float(), size, mode="bicubic")
        mean, logvar = (m.to(z) for m in vae.encode(image, tile))
        larger.append((mean + torch.exp(0.5 * logvar) * unit) * vae.config.scaling)
    return torch.cat(larger)
