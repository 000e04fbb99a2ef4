"""FreeScale: pictures of several times the training size from an unchanged U-Net, stage by stage.

Start at `FreeScale`, the settings; `sampler.generate` makes a `Stage` from them for every stage behind the first, and
the U-Net gets a `Scale` at every step. Three parts: `Scale.__call__`, scale fusion, stands in for self-attention: local
windows of the training size give the large shapes, attention over the whole map the finest detail. `Scale.dilation`
spreads the deepest encoder convolutions. `enlarge` and `Stage.mix` are the cascade: enlarge the finished picture, noise
it, restart, and hold on to it at first.
Shapes: B rows, H W tokens of a map (N = H * W), h w latent pixels, C channels, V windows.
Source: FreeScale, arXiv 2412.09626. Checked against outputs of the official code (ali-vilab/FreeScale), which differs
from the paper in what `blur` and `restart` below say; `--freescale-official` of txt2img.py sets all its defaults. Away
from square pictures of a whole number of training sides this file goes its own way: windows keep the training pictures'
square, each axis has its own dilation, and the blur's size is rounded up.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unet import UNMASKED, AttentionMasks, linear

if TYPE_CHECKING:
    from unet import Attention
    from vae import VAE

WINDOW_TOKENS = 65536      # local attention takes as many windows at a time as have this many tokens


class Shape(Protocol):
    """What is asked of a U-Net's config: ResBlocks per level on the way down."""
    layers: int


@dataclass(frozen=True, eq=False)
class FreeScale:
    """Settings of a run; each default is the official one unless it says otherwise.

    resolutions: (height, width) of every stage in pixels, multiples of 8 that don't fall. The first is sampled as usual
        (or is a picture of one's own), the last is the result.
    native: latent side of the pictures the model was trained with (SD 1.5: 64); None: `StableDiffusion.sample` knows.
    restart: the fraction of the steps that a later stage skips: it starts from its enlarged picture with the noise of
        step int(restart * steps). (The paper names none; this is the released code's.)
    detail: alpha of the factor c that draws towards the noised picture, see `Stage.mix`. Larger: freer, more new
        detail. 0: the picture itself up to the last step; infinity: none, img2img. Or alpha by pixel (H, W), as large
        as one of the resolutions.
    upsample: between stages, "rgb" (decode, enlarge, encode) or "latent" (enlarge the latent: no VAE in between).
    attention: "fused"; or for comparison one of its parts alone, "global" (plain attention) or "local".
    blur: what splits low from high frequencies: "spatial", over height and width as in the paper, or "official", which
        also blurs over neighbouring channels. The default is the former: on the tiny model at twice its size it got 148
        of 200 pictures right, "official" 142 (no more than chance; direct inference 27), and it is cheaper by a blur
        and an output projection.
    fast: global attention on interleaved sub-grids of the training size instead of all tokens at once.
    dilate: the fraction of the steps up to which the restrained convolutions are dilated. 0: never.
    dilate_from: the first level whose ResBlocks, and the downsampler that leads to it, are dilated, and all behind it
        to the middle. 2 are SDXL's published layers, and SD's of the same width; SD's deepest level alone is 3.
    """
    resolutions: tuple[tuple[int, int], ...]
    native: int | None = None
    restart: float = 0.3
    detail: float | Tensor = 2.0
    upsample: str = "rgb"
    attention: str = "fused"
    blur: str = "spatial"
    fast: bool = False
    dilate: float = 0.7
    dilate_from: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolutions", tuple(tuple(size) for size in self.resolutions))     # or of lists
        if not self.resolutions:
            raise ValueError("FreeScale needs at least one resolution")
        if self.native is not None and self.native < 1:
            raise ValueError(f"FreeScale's native is a side of latents, 1 or more, not {self.native}")
        for height, width in self.resolutions:
            if height <= 0 or width <= 0 or height % 8 or width % 8:
                raise ValueError(f"resolution {width}x{height} is not of multiples of 8; the nearest is "
                                 f"{max(round(width / 8), 1) * 8}x{max(round(height / 8), 1) * 8}")
        for (h1, w1), (h2, w2) in zip(self.resolutions, self.resolutions[1:]):
            if h2 < h1 or w2 < w1:
                raise ValueError(f"resolutions must not fall, but {w1}x{h1} is followed by {w2}x{h2}: sort them")
        for name, legal in (("upsample", ("rgb", "latent")), ("attention", ("fused", "global", "local")),
                            ("blur", ("spatial", "official"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"FreeScale's {name} is {' or '.join(legal)}, not {getattr(self, name)!r}")
        if not 0 <= self.restart < 1:
            raise ValueError(f"FreeScale's restart is a fraction of the steps, from 0 to below 1, not {self.restart:g}")
        if not 0 <= self.dilate <= 1:
            raise ValueError(f"FreeScale's dilate is a fraction of the steps, from 0 to 1, not {self.dilate:g}")
        if self.dilate_from < 1:
            raise ValueError(f"FreeScale's dilate_from is a level from 1 up, not {self.dilate_from}")
        if isinstance(self.detail, Tensor):
            if tuple(self.detail.shape) not in self.resolutions:
                sizes = ", ".join(f"{w}x{h}" for h, w in self.resolutions)
                raise ValueError(f"the map of FreeScale's detail has shape {tuple(self.detail.shape)}, not (height, "
                                 f"width) of one of the resolutions ({sizes}): resize it")
        if not (torch.as_tensor(self.detail) >= 0).all():              # NaN fails too
            raise ValueError("FreeScale's detail must be 0 or more everywhere; 1 to 2 are usual, at most 1 for 8x")

    def first_step(self, steps: int) -> int:
        """The step that later stages start from, of so many."""
        return int(self.restart * steps + 1e-9)                        # 0.29 * 100 is 28.999...

    def start(self, size: tuple[int, int], steps: int, generators: list[torch.Generator]) -> "Stage":
        """What the sampling loop makes for a stage of latents (h, w). Draws one number an image and step."""
        if self.native is None:
            raise ValueError("FreeScale needs the latent side of the training pictures: pass native (SD 1.5: 64)")
        seeds = torch.stack([torch.randint(2 ** 31, (steps,), generator=g) for g in generators], dim=1)
        alpha = self.detail
        if isinstance(alpha, Tensor):
            alpha = F.interpolate(alpha[None, None].float(), size, mode="nearest")           # (1, 1, h, w)
        return Stage(self, size, steps, seeds, alpha)


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage of a run, a local variable of the sampling loop. Its steps know no past: any of them can be repeated.

    seeds: (steps, images), from which a step's windows are made.
    """
    settings: FreeScale
    size: tuple[int, int]
    steps: int
    seeds: Tensor
    alpha: float | Tensor

    def mix(self, x: Tensor, init: Tensor, noise: Tensor, alpha_bar: float, t: float, train_steps: int) -> Tensor:
        """Detail control: x (B, 4, h, w) drawn by the factor c to the enlarged picture with this step's noise.

        c = ((1 + cos(pi (T - t) / T)) / 2) ** alpha falls from 1 at t = T to 0. The noised picture is made anew from
        picture and noise at every step: 50 of them kept would be 0.8 GB at 8192 pixels.
        """
        c = ((1 + math.cos(math.pi * (train_steps - t) / train_steps)) / 2)
        c = c ** (self.alpha.to(x) if isinstance(self.alpha, Tensor) else self.alpha)
        return (1 - c) * x + c * (math.sqrt(alpha_bar) * init + math.sqrt(1 - alpha_bar) * noise)

    def at(self, step: int) -> "Scale":
        """What acts at this step, each time the same: both halves of guidance see the same windows."""
        return Scale(self.settings, self.size, step / self.steps < self.settings.dilate, self.seeds[step:step + 1])


@dataclass(eq=False)
class Scale:
    """FreeScale at one step, for the U-Net.

    seeds: (steps, images), of the next attention's windows. Rows of the U-Net's batch belong to the images in turn (the
    halves of guidance are such turns), and those of a further step stand behind them, see `together`.
    """
    settings: FreeScale
    size: tuple[int, int]
    dilated: bool
    seeds: Tensor
    taps: list[float] = field(init=False)          # of the blur, along each axis

    def __post_init__(self) -> None:
        self.taps = gaussian(2 * math.ceil(max(self.size) / self.settings.native) - 1).tolist()

    @staticmethod
    def together(steps: list["Scale"]) -> "Scale":
        """Several steps as one batch, the rows of one step behind those of the other (see `Features.decode_ahead`)."""
        seeds = torch.cat([s.seeds.to(steps[0].seeds.device) for s in steps])
        return Scale(steps[0].settings, steps[0].size, steps[0].dilated, seeds)

    def dilation(self, unit: int | None, config: Shape) -> tuple[int, int] | None:
        """Distance of the taps of down unit 0, 1, ... (None: the middle) along both axes; None: not dilated.

        As many times as the picture is larger than the training pictures, rounded down: a convolution then sees as much
        of the picture as it did in training. Never in the decoder, where it would cost detail.
        """
        d = max(self.size[0] // self.settings.native, 1), max(self.size[1] // self.settings.native, 1)
        restrained = unit is None or unit >= self.settings.dilate_from * (config.layers + 1) - 1
        return d if self.dilated and restrained and d != (1, 1) else None

    def window(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Tokens of a training picture on a map of grid (H, W), at most the map itself."""
        level = math.ceil(math.log2(max(self.size) / max(grid)))       # halves are rounded up
        side = -(-self.settings.native // 2 ** level)
        return min(side, grid[0]), min(side, grid[1])

    def __call__(self, attention: "Attention", x: Tensor, grid: tuple[int, int],
                 masks: AttentionMasks = UNMASKED) -> Tensor:
        """Scale fusion, in place of the self-attention of a map of grid (H, W). (B, N, C) -> (B, N, C)

        masks: on the attention's weights, or none, see `maskunet.py`.
        """
        window = self.window(grid)
        s = self.settings
        if window == grid or (s.attention == "global" and not s.fast):
            return attention(x, attention.keys_values(x, masks), masks)     # one window is all of it: plain attention
        seeds = self.seeds.to(x.device)
        self.seeds = seeds + 1                                         # each attention has windows of its own
        halves = len(x) // seeds.numel()
        starts = place_windows(grid, window, seeds.repeat(1, halves).flatten())
        parts = tuple(-(-n // w) for n, w in zip(grid, window)) if s.fast else (1, 1)
        return fuse(attention, x, grid, window, starts, self.taps, s.blur, parts, s.attention, masks)


# -------------------------------------------------------------------------------------------------------- scale fusion

def fuse(attention: "Attention", x: Tensor, grid: tuple[int, int], window: tuple[int, int], starts: Tensor,
         taps: Sequence[float], blur: str = "spatial", parts: tuple[int, int] = (1, 1), kind: str = "fused",
         masks: AttentionMasks = UNMASKED) -> Tensor:
    """Low frequencies of local attention plus high frequencies of global attention. (B, N, C) -> (B, N, C)

    starts: of every row's windows, (B, V, 2), see `place_windows`. taps: the blur along each axis. parts: sub-grids for
    the global attention. With L local, G global: blur(L) + G - blur(G) = G + blur(L - G), which needs one blur. The
    output projection is affine and a spatial blur acts on every channel alike, so one projection of the sum is enough;
    a blur over channels needs both projected before it.
    """
    q, k, v = (linear(layer, x, mask).unflatten(1, grid) for layer, mask in
               ((attention.to_q, masks.q), (attention.to_k, masks.k), (attention.to_v, masks.v)))

    def out(h: Tensor) -> Tensor:                                      # (B, H, W, C), projected
        return linear(attention.to_out[0], h.flatten(1, 2), masks.out).unflatten(1, grid)

    if kind == "global":
        return out(attend_parts(attention, q, k, v, parts)).flatten(1, 2)
    local = attend_windows(attention, q, k, v, window, starts)         # (B, H, W, C), float32
    if kind == "local":
        return out(local.to(x.dtype)).flatten(1, 2)
    whole = attend_parts(attention, q, k, v, parts)
    if blur == "spatial":
        return out((whole + smooth(local - whole, taps, dims=(1, 2))).to(x.dtype)).flatten(1, 2)
    local, whole = out(local.to(x.dtype)), out(whole)
    return (whole + smooth(wide(local) - whole, taps, dims=(1, 2, 3))).to(x.dtype).flatten(1, 2)


def attend_parts(attention: "Attention", q: Tensor, k: Tensor, v: Tensor, parts: tuple[int, int]) -> Tensor:
    """Attention over the whole map, or over each of parts[0] * parts[1] interleaved sub-grids. (B, H, W, C) each"""
    out = torch.empty_like(q)
    for top in range(parts[0]):
        for left in range(parts[1]):
            each = (slice(None), slice(top, None, parts[0]), slice(left, None, parts[1]))
            heads = [attention.split(m[each].flatten(1, 2)) for m in (q, k, v)]
            out[each] = attention.attend(*heads).unflatten(1, out[each].shape[1:3])
    return out


def attend_windows(attention: "Attention", q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int],
                   starts: Tensor) -> Tensor:
    """Attention within each window, averaged where windows overlap. (B, H, W, C) each -> (B, H, W, C), float32

    Around the map lie as many zeros as windows can stray (an eighth of one). They are keys like any other: as queries,
    keys and values have no bias, that is what the official zeros around the hidden states come to.
    """
    (rows, height, width, _), (tall, wide_) = q.shape, window
    pad_y, pad_x = tall // 8, wide_ // 8
    padded = rows, height + 2 * pad_y, width + 2 * pad_x
    q, k, v = (F.pad(m, (0, 0, pad_x, pad_x, pad_y, pad_y)).flatten(0, 2) for m in (q, k, v))

    # Token numbers in these flat maps: each window's first, (B * V,), and how far behind it the others are
    row, y, x = (torch.arange(n, device=q.device) for n in (rows, tall, wide_))
    first = ((row[:, None] * padded[1] + starts[..., 0]) * padded[2] + starts[..., 1]).flatten()
    behind = (y[:, None] * padded[2] + x).flatten()

    total = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    count = total.new_zeros(len(total), 1)
    for some in first.split(max(WINDOW_TOKENS // len(behind), 1)):
        tokens = (some[:, None] + behind).flatten()
        heads = [attention.split(m.index_select(0, tokens).unflatten(0, (len(some), -1))) for m in (q, k, v)]
        out = attention.attend(*heads).flatten(0, 1).to(total.dtype)
        if total.is_cuda:                                              # there index_add_ adds in no fixed order
            total.index_put_((tokens,), out, accumulate=True)
        else:
            total.index_add_(0, tokens, out)
        count.index_add_(0, tokens, torch.ones_like(out[:, :1]))
    inside = (slice(None), slice(pad_y, pad_y + height), slice(pad_x, pad_x + width))
    return total.unflatten(0, padded)[inside] / count.unflatten(0, padded)[inside]


def place_windows(grid: tuple[int, int], window: tuple[int, int], seeds: Tensor) -> Tensor:
    """Top and left of every window, counted from the corner of the padded map. Seeds of any shape -> (..., V, 2)

    Windows are half a window apart, the last one ends with the map. Each strays by up to an eighth of a window, but the
    first of an axis not inwards and the last not either, so that nothing is left uncovered.
    """
    bases, lows, highs = [], [], []
    for size, side in zip(grid, window):
        count = 1 + -(-(size - side) // max(side // 2, 1))
        base = (torch.arange(count, device=seeds.device) * max(side // 2, 1)).clamp(max=size - side)
        stray = side // 8
        low, high = torch.full_like(base, -stray), torch.full_like(base, stray)
        low[-1], high[0] = 0, 0
        if count == 1:
            low[0] = 0
        bases, lows, highs = [*bases, base + stray], [*lows, low], [*highs, high]
    base, low, high = (torch.cartesian_prod(*axes) for axes in (bases, lows, highs))         # (V, 2) each
    places = torch.arange(base.numel(), device=seeds.device).view_as(base)
    return base + low + scramble(scramble(seeds)[..., None, None] + places) % (high - low + 1)


def scramble(x: Tensor) -> Tensor:
    """Whole numbers below 2^32 to others that look like chance, int64: a compiled graph's stand-in for a generator."""
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B & 0xFFFFFFFF
    return x ^ x >> 16


def gaussian(size: int, sigma: float = 1.0) -> Tensor:
    """Samples of a Gaussian that sum to 1, (size,), float64; size is odd."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    g = torch.exp(-0.5 * (x / sigma) ** 2)
    return g / g.sum()


def smooth(x: Tensor, taps: Sequence[float], dims: tuple[int, ...]) -> Tensor:
    """x filtered along each of the axes, with zeros around it."""
    middle = len(taps) // 2
    for dim in dims:
        out = x * float(taps[middle])
        for d in range(1, min(middle, x.shape[dim] - 1) + 1):
            n, g = x.shape[dim] - d, float(taps[middle + d])
            out.narrow(dim, d, n).add_(x.narrow(dim, 0, n), alpha=g)
            out.narrow(dim, 0, n).add_(x.narrow(dim, d, n), alpha=g)
        x = out
    return x


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider: differences of two attentions are small."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------- cascade

def enlarge(latents: Tensor, size: tuple[int, int], upsample: str, vae: "VAE", noise: Tensor | None,
            tile: int | None = None) -> Tensor:
    """The next stage's picture: VAE-scaled latents (B, 4, h', w') at the size (height, width) in pixels.

    "rgb": decoded, enlarged by bicubic interpolation, encoded; unit noise (B, 4, h', w') picks one of the encoder's
    possible latents. Not clamped in between, as released. "latent": the latents enlarged, likewise; noise isn't used.
    tile: as in `VAE.decode`. One picture after the other, to save memory.
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
