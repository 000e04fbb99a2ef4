"""What FreeScale is compared with: ScaleCrafter, HiDiffusion and DemoFusion, each as a function in the U-Net's place.

    python txt2img.py "a red star" --baseline hidiffusion -W 128 -H 128

`scale_crafter`, `hidiffusion` and `demo_fusion` make functions (x, t, context, added) -> prediction that
`sampler.generate` and the `model` argument of `StableDiffusion.sample` take instead of the U-Net. (The fourth
baseline, direct inference, is sampling at a large size and needs no code.) The first two change what the U-Net does:
see `forward`, its pass with their lines in it. Where the released codes count steps, the time t decides here: "the
first 0.6 of the steps" are the times above 0.4 * 1000, the same for evenly spaced steps. FreeU composes; caches don't.
Shapes: B rows, H W tokens of a map, h w latent pixels.
Sources: ScaleCrafter, arXiv 2310.07702; HiDiffusion, arXiv 2311.17528; DemoFusion, arXiv 2311.16973. Written from a
description of the released codes and not checked against their outputs.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freescale import gaussian, place_windows, smooth
from freeu import FreeU
from unet import Attention, AttentionMasks, UNet

Model = Callable[..., Tensor]
T = 1000                                                               # training timesteps


@dataclass
class Changes:
    """What one pass of the U-Net does differently.

    down, mid, up: by how much the convolutions of a level's ResBlocks and resampler are dilated (up: by decoder level,
        0 deepest); a level that isn't named: not at all.
    skip_rows: down units (resamplers) that see every second pixel only. pool: down units whose result is halved.
    attention: stands in for self-attention, called with (attention, x, grid, masks).
    """
    down: dict[int, float] = field(default_factory=dict)
    mid: float = 1
    up: dict[int, float] = field(default_factory=dict)
    skip_rows: tuple[int, ...] = ()
    pool: tuple[int, ...] = ()
    attention: Callable[[Attention, Tensor, tuple[int, int], AttentionMasks], Tensor] | None = None


def forward(unet: UNet, x: Tensor, t: Tensor, context: Tensor, added: Tensor | None, changes: Changes,
            freeu: FreeU | None = None) -> Tensor:
    """`UNet.forward` with changes. x (B, 4, h, w) -> prediction (B, 4, h, w)"""
    shifts, text, per_level = unet.embed_time(t, added), unet.embed_text(context), unet.config.layers + 1

    def resnet(block: nn.Module, h: Tensor, shift: Tensor, p: float) -> Tensor:
        inner = redilate(block.conv1, F.silu(block.norm1(h)), p) + shift[:, :, None, None]
        inner = redilate(block.conv2, F.silu(block.norm2(inner)), p)
        return inner + (h if block.conv_shortcut is None else block.conv_shortcut(h))

    h = unet.conv_in(x)
    skips = [h]
    for i, (unit, shift, keys_values) in enumerate(zip(unet.down_units(), shifts.down, text.down)):
        p = changes.down.get(i // per_level, 1)
        if unit.resample is not None:
            h = redilate(unit.resample.conv, h[:, :, ::2, ::2] if i in changes.skip_rows else h, p)
        else:
            h = resnet(unit.resnet, h, shift, p)
            if unit.attention is not None:
                h = unit.attention(h, keys_values, freescale=changes.attention)
        if i in changes.pool:
            h = F.avg_pool2d(h, 2, ceil_mode=True)
        skips.append(h)

    h = resnet(unet.mid_block.resnets[0], h, shifts.mid[0], changes.mid)
    h = unet.mid_block.attentions[0](h, text.mid, freescale=changes.attention)
    h = resnet(unet.mid_block.resnets[1], h, shifts.mid[1], changes.mid)

    for i, (unit, shift, keys_values) in enumerate(zip(unet.up_units(), shifts.up, text.up)):
        skip, p = skips.pop(), changes.up.get(i // per_level, 1)
        if h.shape[2:] != skip.shape[2:]:                              # the skip is from before a pooling
            h = F.interpolate(h, skip.shape[2:], mode="bicubic")
        if freeu is not None:
            h, skip = freeu(h, skip, i, unet.config)
        h = resnet(unit.resnet, torch.cat([h, skip], dim=1), shift, p)
        if unit.attention is not None:
            h = unit.attention(h, keys_values, freescale=changes.attention)
        if unit.resample is not None:
            h = F.interpolate(h, skips[-1].shape[2:], mode="nearest")
            h = redilate(unit.resample.conv, h, p)
    return unet.conv_out(F.silu(unet.conv_norm_out(h)))


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


def times_larger(x: Tensor, native: int) -> float:
    return max(x.shape[2:]) / native


# -------------------------------------------------------------------------------------------------------- ScaleCrafter

def scale_crafter(unet: UNet, native: int, guided: bool = True, until: tuple[float, float] = (0.6, 0.7)) -> Model:
    """Re-dilation; beyond 3 times the training side (latent, `native`) noise-damped guidance and shrinking dilation.

    Damped guidance is weak(negative) + g * (strong(positive) - strong(negative)), weak being a pass with fewer dilated
    layers. The pair (weak(negative), weak(negative) + strong(positive) - strong(negative)) makes ordinary guidance say
    just that; so rows must be the two halves of guidance, negative first.

    guided: they are; False (cfg_scale 1, or low_memory): they are one half, which gets the strong pass alone.
    until: the fraction of the steps that is dilated, up to 3 times the side and beyond; SD 2.1's are (0.4, 0.74).
    """
    deep = len(unet.config.channels) == 3                              # SDXL, whose three levels are dilated otherwise

    def predict(x: Tensor, t: Tensor, context: Tensor, added: Tensor | None = None,
                freeu: FreeU | None = None) -> Tensor:
        r = times_larger(x, native)
        part = until[r > 3]                                            # of the steps: 30 or 35 of 50
        left = (float(t) / T - (1 - part)) / part                      # 1 at the start, 0 where dilation ends
        if r <= 1 or left <= 0:
            return unet(x, t, context, added, freeu=freeu)
        if r <= 3:
            changes = Changes(mid=r, up={0: r}) if deep else \
                Changes({1: r, 2: r, 3: r}, r, {0: r, 1: r, 2: r})
            return forward(unet, x, t, context, added, changes, freeu)

        def shrunk(p: float) -> float:
            return max(math.ceil(p * r / 4 * left), 2)
        if deep:
            strong = Changes({2: shrunk(4)}, shrunk(4), {0: shrunk(4), 1: shrunk(3), 2: shrunk(2)})
            weak = Changes(mid=2, up={0: 2})
        else:
            strong = Changes({1: shrunk(2), 2: shrunk(3), 3: shrunk(4)}, shrunk(4),
                             {0: shrunk(4), 1: shrunk(3), 2: shrunk(2)})
            weak = Changes({2: shrunk(3), 3: shrunk(4)}, shrunk(4), {0: shrunk(4), 1: shrunk(3)})
        out = forward(unet, x, t, context, added, strong, freeu)
        if not guided:
            return out
        half = len(x) // 2                                             # both halves are of the same latents
        if len(x) % 2 or not torch.equal(x[:half], x[half:]):
            raise ValueError("ScaleCrafter's damped guidance needs both halves in one batch: with cfg_scale 1 and with "
                             "low_memory, pass guided=False")
        damped = forward(unet, x[:half], t, context[:half], None if added is None else added[:half], weak, freeu)
        return torch.cat([damped, damped + out[half:] - out[:half]])
    return predict


# --------------------------------------------------------------------------------------------------------- HiDiffusion

def hidiffusion(unet: UNet, native: int, generator: torch.Generator) -> Model:
    """Smaller maps inside, as the deep layers know them (RAU-Net), and shifted windows in the largest attention.

    Up to 3 times the training side (latent, `native`), and beyond it the lists for 4 times: SDXL's where both sides are
    beyond it. generator: for the shifts.
    """
    config = unet.config
    per_level, deep = config.layers + 1, len(config.channels) == 3
    first = next(level for level, depth in enumerate(config.depth) if depth)              # with attention
    down = (first + 1) * per_level - 1                                 # the downsampler of that level
    pooled = 1 * per_level                                             # the first unit of level 1
    width = config.channels[first]

    def windows(attention: Attention, x: Tensor, grid: tuple[int, int], masks: AttentionMasks) -> Tensor:
        if x.shape[2] != width or min(grid) < 2:
            return attention(x, attention.keys_values(x))
        return shifted_windows(attention, x, grid, int(torch.randint(4, (1,), generator=generator)))

    def predict(x: Tensor, t: Tensor, context: Tensor, added: Tensor | None = None,
                freeu: FreeU | None = None) -> Tensor:
        r, done = times_larger(x, native), 1 - float(t) / T            # done: the fraction of the steps
        if r <= 1:
            return unet(x, t, context, added, freeu=freeu)
        if deep:
            far = min(x.shape[2:]) > 3 * native
            skipping, pooling = (done < 0.3, done < 0.7) if far else (done < 0.16, 0.16 <= done < 0.4)
        else:
            skipping, pooling = (done < 0.4, False) if r <= 3 else (done < 0.7, done < 0.3)
        return forward(unet, x, t, context, added, Changes(
            skip_rows=(down,) if skipping else (), pool=(pooled,) if pooling else (), attention=windows), freeu)
    return predict


def shifted_windows(attention: Attention, x: Tensor, grid: tuple[int, int], quarter: int) -> Tensor:
    """Attention in 2 x 2 windows of the map, rolled by so many quarters of a window. (B, N, C) -> (B, N, C)"""
    maps = x.unflatten(1, grid).permute(0, 3, 1, 2)                    # (B, C, H, W)
    even = [side + side % 2 for side in grid]
    if even != list(grid):
        maps = F.interpolate(maps, even, mode="bicubic")
    side = even[0] // 2, even[1] // 2
    shift = side[0] * quarter // 4, side[1] * quarter // 4
    rolled = maps.roll((-shift[0], -shift[1]), (2, 3)).unflatten(3, (2, side[1])).unflatten(2, (2, side[0]))
    each = rolled.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)                   # (B * 4, tokens, C)
    out = attention(each, attention.keys_values(each))
    out = out.unflatten(0, (len(x), 2, 2)).unflatten(3, side).permute(0, 5, 1, 3, 2, 4)   # (B, C, 2, h, 2, w)
    maps = out.flatten(4, 5).flatten(2, 3).roll(shift, (2, 3))
    if even != list(grid):
        maps = F.interpolate(maps, grid, mode="bicubic")
    return maps.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------- DemoFusion

def demo_fusion(unet: UNet, native: int, generator: torch.Generator, sigma: float = 0.8, batch: int = 16) -> Model:
    """Local patches and dilated sampling: a prediction from windows of the latent and from its interleaved parts.

    The released code takes a solver's step for each window and each part, averages the windows' latents and blends
    both. Steps of all solvers here are linear in the prediction, so predictions can be averaged and blended instead.
    Its third idea, the skip residual, is FreeScale's detail control with alpha 3 and no restart; as a whole it is

        sd.sample(prompt, model=demo_fusion(sd.unet, 16, generator), freescale=FreeScale(
            resolutions, upsample="latent", restart=0.0, detail=3.0, attention="global", dilate=0.0))

    but for two things left out: the matching of each stage's mean and deviation to the first's, and crop coordinates of
    windows in SDXL's condition. generator: for the windows, which stray. batch: windows at a time.
    """
    def windows(x: Tensor, t: Tensor, context: Tensor, added: Tensor | None, **more: FreeU) -> Tensor:
        grid, pad = x.shape[2:], native // 8
        window = min(native, grid[0]), min(native, grid[1])
        padded = F.pad(x, (pad, pad, pad, pad)) if pad else x
        total, count = torch.zeros_like(padded), torch.zeros_like(padded[:1, :1])
        inside = (slice(None), slice(None), slice(pad, pad + grid[0]), slice(pad, pad + grid[1]))
        stray = [side // 8 for side in window]                         # of a shorter axis, less: see `place_windows`
        seed = torch.randint(2 ** 31, (), generator=generator)
        starts = place_windows(grid, window, seed) + torch.tensor([pad - s for s in stray])
        for part in starts.split(batch):
            places = [(slice(None), slice(None), slice(i, i + window[0]), slice(j, j + window[1]))
                      for i, j in part.tolist()]
            n = len(places)
            out = unet(torch.cat([padded[place] for place in places]), t, context.repeat(n, 1, 1),
                       None if added is None else added.repeat(n, 1), **more)
            for place, patch in zip(places, out.chunk(n)):
                total[place].add_(patch)
                count[place].add_(1)
        return total[inside] / count[inside]

    def parts(x: Tensor, y: Tensor, t: Tensor, context: Tensor, added: Tensor | None, **more: FreeU) -> Tensor:
        s, out = math.ceil(times_larger(x, native)), torch.empty_like(x)
        for i in range(s):
            for j in range(s):
                out[:, :, i::s, j::s] = unet(y[:, :, i::s, j::s], t, context, added, **more)
        return out

    def predict(x: Tensor, t: Tensor, context: Tensor, added: Tensor | None = None, freescale: object = None,
                **more: FreeU) -> Tensor:
        r = times_larger(x, native)
        if r <= 1:
            return unet(x, t, context, added, **more)
        c = (1 + math.cos(math.pi * (1 - float(t) / T))) / 2           # from 1 to 0; the released alphas 2 and 3 are 1
        y = smooth(x, gaussian(2 * math.ceil(r) - 1, sigma * (0.99 * c + 0.01)), dims=(2, 3))
        (own_std, own_mean), (std, mean) = (torch.std_mean(m, (1, 2, 3), keepdim=True) for m in (y, x))
        y = (y - own_mean) / own_std * std + mean                      # the blur took from the noise's strength
        local, whole = windows(x, t, context, added, **more), parts(x, y, t, context, added, **more)
        return (1 - c) * local + c * whole
    return predict
