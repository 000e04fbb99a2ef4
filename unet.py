"""The U-Net of Stable Diffusion 1.x, 2.x, SDXL and the tiny model: one class, plain PyTorch.

Start at `UNet.forward` and its two halves, `encode` and `decode`: they call every layer themselves. The network is one
flat list of units, 25 of them in SD 1.x:

    number    0        1  ...  11      12     13 ... 24
    unit      conv_in  d1 ... d11      mid    u0 ... u11        up unit i takes the output of unit 11 - i as its skip

Techniques act on visible lines: `on.freeu`, `on.cache` and so on, see `Techniques`. All of them are off by default.
Shapes: B batch, C channels, H W latent pixels at a unit's resolution, N = H * W tokens, L text tokens, D text width.
Source: "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752; SDXL, arXiv 2307.01952.
Checked against diffusers 0.42.1 (UNet2DConditionModel). Parameter names are those of the published checkpoints.
"""
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """What differs between U-Nets. The defaults are those of Stable Diffusion 1.x."""
    in_channels: int = 4                                  # latent channels, in and out
    channels: tuple[int, ...] = (320, 640, 1280, 1280)    # one entry per level; each but the last halves the map
    layers: int = 2                                       # ResBlocks per level on the way down (one more on the way up)
    depth: tuple[int, ...] = (1, 1, 1, 0)                 # TransformerBlocks after each ResBlock, by level; 0: none
    mid_depth: int = 1                                    # TransformerBlocks in the middle
    heads: tuple[int, ...] = (8, 8, 8, 8)                 # attention heads by level; the middle uses the last entry
    context_dim: int = 768                                # D, width of the text embeddings
    linear_proj: bool = False                             # proj_in, proj_out stored as linear, not as 1x1 convolutions
    upcast_attention: bool = False                        # SD 2.1: q k^T overflows float16, so attend in float32
    add_dim: int = 0                                      # SDXL: width of the added condition (pooled text and sizes)
    add_time_dim: int = 256                               # SDXL: sinusoid width of each of the six image sizes
    groups: int = 32                                      # number of groups in every GroupNorm


WIDE = 320 * 320          # linear layers with at least this many weights run as convolutions on a CPU, see `project`
CHUNK = 32768              # tokens that a feed-forward layer processes at a time; SDXL at 1024 pixels has at most 4096

CONFIGS = {
    "sd15": UNetConfig(),
    "sd21": UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_proj=True, upcast_attention=True),
    "sdxl": UNetConfig(channels=(320, 640, 1280), depth=(0, 2, 10), mid_depth=10, heads=(5, 10, 20), context_dim=2048,
                       linear_proj=True, add_dim=2816),
    "tiny": UNetConfig(channels=(24, 48, 96, 96), heads=(2, 4, 4, 4), context_dim=128, groups=8),
}


# ------------------------------------------------------------------------------------------- where techniques act

class Techniques(NamedTuple):
    """The techniques that act in one pass. Each field is one place in the passes below; None: nothing acts there.

    A field has the same name as its flag of txt2img.py and its argument of `StableDiffusion.sample`. Its value is any
    object with the methods that are called at its place: nothing is registered, no module is changed.
    """
    freescale: "Scale | None" = None        # dilated convolutions, windows in self-attention               freescale.py
    highres: "Scale | None" = None          # likewise, and the sizes of the maps that the units pass on     highres.py
    cache: "Cache | None" = None            # which units run, and the outputs reused for the others        cache.py
    freeu: "Meeting | None" = None          # factors on the backbone and the skip before they are joined   freeu.py
    skips: "Meeting | None" = None          # a factor per skip: Skip-Tuning, ScaleLong                     freeu.py
    tgate: "tuple[Gate | None, Gate] | None" = None           # self- and cross-attention: is each reused?  cache.py
    attend: "Editor | None" = None          # replaces an attention, to change which tokens it attends to
    masks: "Weights | None" = None          # the weight of a linear layer in this pass                     maskunet.py


OFF = Techniques()


class Scale(Protocol):
    """unit: the number of a unit in the flat list. grid: the (H, W) that the N = H * W tokens of x come from."""
    def convolve(self, conv: nn.Conv2d, x: Tensor, unit: int) -> Tensor: ...
    def __call__(self, attention: "Attention", x: Tensor, grid: tuple[int, int], on: Techniques) -> Tensor: ...
    def resize(self, unit: int, h: Tensor, skip: Tensor | None = None) -> Tensor: ...        # highres only


class Cache(Protocol):
    def runs(self, unit: int) -> bool: ...
    def output(self, unit: int, h: Tensor | None) -> Tensor | None: ...


class Meeting(Protocol):
    """layer: the number of the up unit, 0 for the deepest."""
    def __call__(self, h: Tensor, skip: Tensor, layer: int, config: UNetConfig) -> tuple[Tensor, Tensor]: ...


class Gate(Protocol):
    open: bool                              # the attention runs; if not, output returns its last result
    def output(self, block: nn.Module, h: Tensor) -> Tensor: ...


class Editor(Protocol):
    """q (B, heads, N, C / heads), k and v (B, heads, L, C / heads) -> (B, heads, N, C / heads); None: as usual."""
    def __call__(self, attention: "Attention", q: Tensor, k: Tensor, v: Tensor) -> Tensor | None: ...


class Weights(Protocol):
    """of: a layer's weight (C_out, C_in), or one per row of the batch (B, C_out, C_in)."""
    def enter(self, unit: int, h: Tensor, skip: Tensor, emb: Tensor) -> None: ...
    def of(self, layer: nn.Linear) -> Tensor: ...


# ----------------------------------------------------------------------------------------------------------- layers

def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, (B,) -> (B, dim): cosines, then sines, of wavelengths 2 pi to 20,000 pi. Always float32."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / half))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Embedding(nn.Module):
    """Two linear layers that turn a sinusoid (or SDXL's added condition) into the network's own embedding."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def convolve(conv: nn.Conv2d, x: Tensor, unit: int, on: Techniques) -> Tensor:
    """A 3x3 convolution of a unit; techniques for large pictures change it. (B, C_in, H, W) -> (B, C_out, H, W)"""
    if on.freescale is not None:                                       # FreeScale: dilated in the deep encoder
        return on.freescale.convolve(conv, x, unit)
    if on.highres is not None:                                         # ScaleCrafter: dilated; HiDiffusion: sparse
        return on.highres.convolve(conv, x, unit)
    return conv(x)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; between the two, a shift computed from the time is added.

    (B, C_in, H, W), shift (B or 1, C_out) -> (B, C_out, H, W). The shift comes from `UNet.embed_time`.
    """

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, shift: Tensor, unit: int, on: Techniques = OFF) -> Tensor:
        h = convolve(self.conv1, F.silu(self.norm1(x)), unit, on) + shift[:, :, None, None]
        h = convolve(self.conv2, F.silu(self.norm2(h)), unit, on)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (B, N, C_in) -> (B, N, C_out). On a CPU, wide layers in float32 run as a 1x1 convolution.

    PyTorch computes the convolution with oneDNN and the matrix product with MKL. On two threads of an AMD processor,
    oneDNN was 1.3 times as fast; on one thread there was no difference. See `benchmarks/README.md`.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.numel() < WIDE:
        return F.linear(x, weight, bias)
    return F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


def linear(layer: nn.Linear, x: Tensor, on: Techniques = OFF) -> Tensor:
    """(B, N, C_in) -> (B, N, C_out), with the layer's own weight or, with masks, the weight they give it."""
    weight = layer.weight if on.masks is None else on.masks.of(layer)
    if weight.dim() == 2:
        return project(x, weight, layer.bias)
    return torch.bmm(x, weight.mT) if layer.bias is None else torch.baddbmm(layer.bias, x, weight.mT)


class Attention(nn.Module):
    """Multi-head attention. (B, N, C), keys and values (B, heads, L, C / heads) each -> (B, N, C)"""

    def __init__(self, channels: int, context_dim: int, heads: int, upcast: bool):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels can't be split into {heads} heads")
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])   # a list because checkpoints say "to_out.0"

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)       # (B, heads, N, C / heads)

    def keys_values(self, context: Tensor, on: Techniques = OFF) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> keys and values for `forward`. Those of a text are the same at every step: `UNet.embed_text`."""
        return self.split(linear(self.to_k, context, on)), self.split(linear(self.to_v, context, on))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, on: Techniques = OFF) -> Tensor:
        """Queries (B, heads, N, C / heads), keys and values (B, heads, L, C / heads) -> (B, N, C), unprojected."""
        dtype = q.dtype
        if self.upcast and dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        h = None if on.attend is None else on.attend(self, q, k, v)    # an editor may replace the attention
        if h is None:
            h = F.scaled_dot_product_attention(q, k, v)
        return h.to(dtype).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], on: Techniques = OFF) -> Tensor:
        return linear(self.to_out[0], self.attend(self.split(linear(self.to_q, x, on)), *keys_values, on), on)


class GEGLU(nn.Module):
    """A linear layer gated by another: value * gelu(gate), arXiv 2002.05202. (B, N, C) -> (B, N, C_out)"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = linear(self.proj, x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, C) -> (B, N, C), with a hidden width of 4 C; CHUNK tokens at a time, to bound the memory."""

    def __init__(self, channels: int):
        super().__init__()
        # the Identity stands for the dropout that checkpoints count in their names: "net.0.proj", "net.2"
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        pieces = [linear(self.net[2], self.net[0](piece)) for piece in x.split(CHUNK, dim=1)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward. (B, N, C) -> (B, N, C)

    text: the keys and values of the text for this block; with masks, the text (B, L, D) itself, see `words`.
    grid: the (H, W) that the N = H * W tokens come from.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, upcast: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads, upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads, upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor] | Tensor, grid: tuple[int, int],
                on: Techniques = OFF) -> Tensor:
        own, cross = on.tgate or (None, None)                          # T-GATE: reuses the last results at some steps
        h = self.norm1(x)
        if own is None or own.open:
            if on.freescale is not None:                               # FreeScale: shapes by windows, detail globally
                h = on.freescale(self.attn1, h, grid, on)
            elif on.highres is not None:                               # HiDiffusion: in shifted windows
                h = on.highres(self.attn1, h, grid, on)
            else:
                h = self.attn1(h, self.attn1.keys_values(h, on), on)
        x = x + (h if own is None else own.output(self, h))
        if cross is None or cross.open:
            text = self.attn2.keys_values(text, on) if isinstance(text, Tensor) else text
            h = self.attn2(self.norm2(x), text, on)
        x = x + (h if cross is None else cross.output(self, h))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """TransformerBlocks over the pixels of a map. (B, C, H, W), the text for each block -> (B, C, H, W)"""

    def __init__(self, channels: int, depth: int, heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)    # unlike the ResBlocks' 1e-5
        # linear or 1x1 convolution, the result is the same; only the weight's shape differs, (C, C) or (C, C, 1, 1)
        self.proj_in = nn.Linear(channels, channels) if config.linear_proj else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(channels, config.context_dim, heads, config.upcast_attention) for _ in range(depth)])
        self.proj_out = nn.Linear(channels, channels) if config.linear_proj else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: list[tuple[Tensor, Tensor]] | list[Tensor], on: Techniques = OFF) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)                    # (B, N, C)
        h = project(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block, words in zip(self.transformer_blocks, text, strict=True):
            h = block(h, words, x.shape[2:], on)
        h = project(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])         # (B, C, H, W)


class Resample(nn.Module):
    """Container for one convolution: stride 2 halves a map, rounding up; stride 1 comes after a map is enlarged."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1)


class Level(nn.Module):
    """The layers of one resolution, without a forward pass of their own: `UNet.encode` and `UNet.decode` call them."""

    def __init__(self, resnets: list[ResBlock], attentions: list[SpatialTransformer],
                 down: Resample | None = None, up: Resample | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)                    # as many as resnets, or none
        self.downsamplers = nn.ModuleList([] if down is None else [down])
        self.upsamplers = nn.ModuleList([] if up is None else [up])


class Unit(NamedTuple):
    """One entry of the flat list: only a convolution, or a ResBlock and the layers after it."""
    conv: nn.Conv2d | None = None                      # conv_in, or a downsampler
    resnets: tuple[ResBlock, ...] = ()                 # one; the middle has a second one after the attention
    attention: SpatialTransformer | None = None
    up: nn.Conv2d | None = None                        # the last unit of a level of the decoder ends with an upsampler


class PerUnit(NamedTuple):
    """Tensors per unit of the flat list that don't depend on the latents, so that they are computed once per run.

    of: for a time, the shift (B, C_out) of each ResBlock; for a text, the keys and values of each TransformerBlock.
    source: what they were computed from: the time embedding (B, 4 C), or the text (B, L, D).
    """
    of: list[list[Any]]
    source: Tensor


class UNet(nn.Module):
    """Predicts the noise (or v) in a latent. (B, 4, H, W), times (B,), text (B, L, D) -> (B, 4, H, W)"""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        channels, groups, emb_dim = config.channels, config.groups, 4 * config.channels[0]
        last = len(channels) - 1

        def resnet(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, emb_dim, groups)

        def attentions(level: int, count: int) -> list[SpatialTransformer]:
            return [SpatialTransformer(channels[level], config.depth[level], config.heads[level], config)
                    for _ in range(count if config.depth[level] else 0)]

        self.time_embedding = Embedding(channels[0], emb_dim)
        if config.add_dim:
            self.add_embedding = Embedding(config.add_dim, emb_dim)

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        h, skips = channels[0], [channels[0]]                          # channels of the running map and of each skip
        self.down_blocks = nn.ModuleList()
        for i, c in enumerate(channels):
            resnets = [resnet(h if j == 0 else c, c) for j in range(config.layers)]
            down = Resample(c, 2) if i < last else None
            self.down_blocks.append(Level(resnets, attentions(i, config.layers), down=down))
            skips += [c] * (config.layers + (i < last))
            h = c

        middle = SpatialTransformer(h, config.mid_depth, config.heads[-1], config)
        self.mid_block = Level([resnet(h, h), resnet(h, h)], [middle])
        self.up_blocks = nn.ModuleList()
        for i, c in reversed(list(enumerate(channels))):
            resnets = [resnet((h if j == 0 else c) + skips.pop(), c) for j in range(config.layers + 1)]
            up = Resample(c, 1) if i > 0 else None
            self.up_blocks.append(Level(resnets, attentions(i, config.layers + 1), up=up))
            h = c

        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | PerUnit, context: Tensor | PerUnit, added: Tensor | None = None,
                on: Techniques = OFF) -> Tensor:
        """Latents x (B, 4, H, W), times t and texts to the predicted noise (or v), (B, 4, H, W).

        t: timesteps 0..999, (B,) or a scalar, may be fractional; or the result of `embed_time` for them.
        context: text embeddings (B, L, D); or the result of `embed_text` for them.
        added: SDXL's pooled text and image sizes (B, add_dim); None for the other models.
        on: the techniques that act in this pass; OFF: the plain network.
        """
        shifts = t if isinstance(t, PerUnit) else self.embed_time(t, added)
        text = context if isinstance(context, PerUnit) else self.embed_text(context)
        h, skips = self.encode(x, shifts, text, on)
        return self.decode(h, skips, shifts, text, on)

    def compile(self, **options: Any) -> None:
        """torch.compile with these options for the module, and for the halves that parallel Faster Diffusion calls."""
        self.encode, self.decode = (torch.compile(half, **options) for half in (self.encode, self.decode))
        super().compile(**options)

    def encode(self, x: Tensor, shifts: PerUnit, text: PerUnit,
               on: Techniques = OFF) -> tuple[Tensor | None, list[Tensor | None]]:
        """conv_in, the down units and the middle -> the output of the middle, and the skips, the largest map first.

        With a cache, None stands for an output that no unit needs.
        """
        h, maps = x, []
        for k, unit in enumerate(self.units()[:self.middle + 1]):
            if on.cache is None or on.cache.runs(k):
                if unit.conv is not None:
                    h = convolve(unit.conv, h, k, on)
                else:
                    h = unit.resnets[0](h, shifts.of[k][0], k, on)
                    if unit.attention is not None:
                        h = unit.attention(h, words(text, k, on), on)
                    if k == self.middle:
                        h = unit.resnets[1](h, shifts.of[k][1], k, on)
                if on.highres is not None:                             # HiDiffusion: a smaller map from here on
                    h = on.highres.resize(k, h)
            if on.cache is not None:                                   # key step: keeps h; other steps: gives it back
                h = on.cache.output(k, h)
            maps.append(h)
        return maps[self.middle], maps[:self.middle]

    def decode(self, h: Tensor | None, skips: list[Tensor | None], shifts: PerUnit, text: PerUnit,
               on: Techniques = OFF) -> Tensor:
        """The up units, each with its skip, and the output layers -> prediction (B, 4, H, W)"""
        for i, unit in enumerate(self.units()[self.middle + 1:]):
            k, skip = self.middle + 1 + i, skips[-1 - i]
            if on.cache is None or on.cache.runs(k):
                if on.highres is not None:                             # HiDiffusion: back to the size of the skip
                    h = on.highres.resize(k, h, skip)
                if on.masks is not None:                               # MaskUNet: masks from these maps and the time
                    on.masks.enter(k, h, skip, shifts.source)
                if on.freeu is not None:                               # FreeU: more of the backbone, less of the skip
                    h, skip = on.freeu(h, skip, i, self.config)
                if on.skips is not None:                               # Skip-Tuning, ScaleLong: a factor by depth
                    h, skip = on.skips(h, skip, i, self.config)
                h = unit.resnets[0](torch.cat([h, skip], dim=1), shifts.of[k][0], k, on)
                if unit.attention is not None:
                    h = unit.attention(h, words(text, k, on), on)
                if unit.up is not None:                                # enlarged to the size of the next skip
                    h = convolve(unit.up, F.interpolate(h, size=skips[-2 - i].shape[-2:], mode="nearest"), k, on)
            if on.cache is not None:
                h = on.cache.output(k, h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    @property
    def middle(self) -> int:
        """The number of the middle in the flat list: as many units come before it as after it."""
        return len(self.config.channels) * (self.config.layers + 1)

    def units(self) -> list[Unit]:
        """The flat list. In SD 1.x: conv_in; 3 + 3 + 3 + 2 down units (third: a downsampler); middle; 4 x 3 up."""
        units = [Unit(conv=self.conv_in)]
        for level in self.down_blocks:
            units += [Unit(resnets=(resnet,), attention=attention) for resnet, attention in pairs(level)]
            units += [Unit(conv=down.conv) for down in level.downsamplers]
        units += [Unit(resnets=tuple(self.mid_block.resnets), attention=self.mid_block.attentions[0])]
        for level in self.up_blocks:
            units += [Unit(resnets=(resnet,), attention=attention) for resnet, attention in pairs(level)]
            if level.upsamplers:
                units[-1] = units[-1]._replace(up=level.upsamplers[0].conv)
        return units

    def embed_time(self, t: Tensor, added: Tensor | None = None) -> PerUnit:
        """Times (B,) or scalar, and SDXL's added condition (B, add_dim), to the shift (B, C_out) of every ResBlock."""
        weight = self.time_embedding.linear_1.weight
        t = torch.as_tensor(t, device=weight.device).reshape(-1)
        emb = self.time_embedding(sinusoid(t, self.config.channels[0]).to(weight.dtype))
        if self.config.add_dim:
            if added is None:
                raise ValueError("this U-Net needs the added condition (SDXL: pooled text and image sizes): pass added")
            emb = emb + self.add_embedding(added)
        h = F.silu(emb)
        return PerUnit([[resnet.time_emb_proj(h) for resnet in unit.resnets] for unit in self.units()], emb)

    def embed_schedule(self, timesteps: Tensor, added: Tensor | None = None) -> list[PerUnit]:
        """`embed_time` for a whole schedule (S,) at once: S results, one per step, to be passed to `forward`."""
        batch = 1 if added is None else len(added)
        shifts = self.embed_time(timesteps.repeat_interleave(batch),
                                 None if added is None else added.repeat(len(timesteps), 1))
        steps = [slice(i * batch, (i + 1) * batch) for i in range(len(timesteps))]
        return [PerUnit([[s[rows] for s in unit] for unit in shifts.of], shifts.source[rows]) for rows in steps]

    def embed_text(self, context: Tensor) -> PerUnit:
        """Text embeddings (B, L, D) to the keys and values of every cross-attention; every step uses the same."""
        return PerUnit([[] if unit.attention is None else
                        [block.attn2.keys_values(context) for block in unit.attention.transformer_blocks]
                        for unit in self.units()], context)


def words(text: PerUnit, k: int, on: Techniques) -> list[tuple[Tensor, Tensor]] | list[Tensor]:
    """The text's keys and values for unit k; or the text itself, where masks change the layers that compute them."""
    return text.of[k] if on.masks is None else [text.source] * len(text.of[k])


def pairs(level: Level) -> list[tuple[ResBlock, SpatialTransformer | None]]:
    """The ResBlocks of a level, each with the attention that follows it (None in levels without attention)."""
    return list(zip(level.resnets, level.attentions or [None] * len(level.resnets), strict=True))
