"""The U-Net of Stable Diffusion 1.x, 2.x, SDXL and the tiny model: one class, plain PyTorch.

Start at `UNet.forward` and the two halves it is made of, `encode` and `decode`: they call every layer themselves. The
network is one flat list of units: conv_in, the down units (11 in SD 1.x), the middle, the up units (12 in SD 1.x). The
output of conv_in and of each down unit is kept as a skip, and an up unit takes the last skip not yet taken.
Shapes: B batch, C channels, H W latent pixels at a unit's resolution, N = H * W tokens, L text tokens, D text width.
Source: "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752; SDXL, arXiv 2307.01952.
Checked against diffusers 0.42.1 (UNet2DConditionModel). Parameter names are those of the published checkpoints.
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:                      # techniques are arguments: this file works without theirs
    from cache import Features, TextGate
    from freescale import Scale
    from freeu import FreeU
    from maskunet import MaskRun


@dataclass(frozen=True)
class UNetConfig:
    """What differs between U-Nets. The defaults are those of Stable Diffusion 1.x."""
    in_channels: int = 4                                  # latent channels, in and out
    channels: tuple[int, ...] = (320, 640, 1280, 1280)    # one entry a level; each level but the last halves the map
    layers: int = 2                                       # ResBlocks per level on the way down (one more on the way up)
    depth: tuple[int, ...] = (1, 1, 1, 0)                 # TransformerBlocks after each ResBlock, by level; 0: none
    mid_depth: int = 1                                    # TransformerBlocks in the middle
    heads: tuple[int, ...] = (8, 8, 8, 8)                 # attention heads by level; the middle uses the last entry
    context_dim: int = 768                                # D, width of the text embeddings
    linear_proj: bool = False                             # proj_in, proj_out stored as linear, not as 1x1 convolutions
    upcast_attention: bool = False                        # SD 2.1: q k^T overflows float16, so attend in float32
    add_dim: int = 0                                      # SDXL: width of the added condition (pooled text and sizes)
    add_time_dim: int = 256                               # SDXL: sinusoid width of each of the six image sizes
    groups: int = 32                                      # of every GroupNorm


WIDE = 320 * 320          # weights of a layer from which it is a convolution on a CPU, see `project`
CHUNK = 32768              # tokens that a feed-forward layer takes at a time; SDXL's largest at 1024 pixels has 4096

CONFIGS = {
    "sd15": UNetConfig(),
    "sd21": UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_proj=True, upcast_attention=True),
    "sdxl": UNetConfig(channels=(320, 640, 1280), depth=(0, 2, 10), mid_depth=10, heads=(5, 10, 20), context_dim=2048,
                       linear_proj=True, add_dim=2816),
    "tiny": UNetConfig(channels=(32, 64, 96, 96), heads=(1, 2, 3, 3), context_dim=128, groups=8),
}


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Numbers (B,) as waves (B, dim): cosines, then sines, wavelengths from 2 pi to 20,000 pi. Always float32."""
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


def convolve(conv: nn.Conv2d, x: Tensor, dilation: tuple[int, int] | None) -> Tensor:
    """A 3x3 convolution, its taps (down, along) so many pixels apart; None: one. The size of the result is the same."""
    if dilation is None:
        return conv(x)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, padding=dilation, dilation=dilation)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the time enters as one number a channel in between.

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

    def forward(self, x: Tensor, shift: Tensor, dilation: tuple[int, int] | None = None) -> Tensor:
        h = convolve(self.conv1, F.silu(self.norm1(x)), dilation) + shift[:, :, None, None]
        h = convolve(self.conv2, F.silu(self.norm2(h)), dilation)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionMasks(NamedTuple):
    """What multiplies the weights of an Attention's linear layers, (C_out, C_in) or one an image (B, C_out, C_in)."""
    q: Tensor | None = None                                            # None: the layer as it is
    k: Tensor | None = None
    v: Tensor | None = None
    out: Tensor | None = None


UNMASKED = AttentionMasks()


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (B, N, C_in) -> (B, N, C_out). Wide layers in float32 on a CPU as a 1x1 convolution over the tokens.

    PyTorch gives that to oneDNN, and products to MKL. On an AMD processor it was 1.3 times as fast with two
    threads, with one the same: see `benchmarks/README.md`.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.numel() < WIDE:
        return F.linear(x, weight, bias)
    return F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


def linear(layer: nn.Linear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A linear layer, its weights times the mask: (B, N, C_in) -> (B, N, C_out). The bias is never masked."""
    if mask is None:
        return project(x, layer.weight, layer.bias)
    w = layer.weight * mask.to(layer.weight.dtype)
    if w.dim() == 2:
        return project(x, w, layer.bias)
    return torch.bmm(x, w.mT) if layer.bias is None else torch.baddbmm(layer.bias, x, w.mT)


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

    def keys_values(self, context: Tensor, masks: AttentionMasks = UNMASKED) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> what `forward` attends to. For a text it is the same at every step: see `UNet.embed_text`."""
        return self.split(linear(self.to_k, context, masks.k)), self.split(linear(self.to_v, context, masks.v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, heads, N, C / heads), keys and values (B, heads, L, C / heads) -> (B, N, C), unprojected."""
        dtype = q.dtype
        if self.upcast and dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        h = F.scaled_dot_product_attention(q, k, v).to(dtype)
        return h.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], masks: AttentionMasks = UNMASKED) -> Tensor:
        q = self.split(linear(self.to_q, x, masks.q))
        return linear(self.to_out[0], self.attend(q, *keys_values), masks.out)


class GEGLU(nn.Module):
    """A linear layer gated by another: value * gelu(gate), arXiv 2002.05202. (B, N, C) -> (B, N, C_out)"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = linear(self.proj, x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, C) -> (B, N, C), through four times the width: more than CHUNK tokens in pieces, to bound its memory."""

    def __init__(self, channels: int):
        super().__init__()
        # checkpoints count the dropout between the two layers: "net.0.proj", "net.2"
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        pieces = [linear(self.net[2], self.net[0](piece)) for piece in x.split(CHUNK, dim=1)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward. (B, N, C), keys and values of the text -> (B, N, C)

    grid: the (H, W) that the N = H * W tokens come from.
    gate: None, or what decides whether attention to the text is computed or reused, see T-GATE in `cache.py`.
    masks: None, or what multiplies the weights of both attentions, see `maskunet.py`; text is then (B, L, D) itself.
    freescale: None, or what stands in for self-attention, see `freescale.py`.
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
                gate: "TextGate | None" = None, masks: tuple[AttentionMasks, AttentionMasks] | None = None,
                freescale: "Scale | None" = None) -> Tensor:
        own, cross = (UNMASKED, UNMASKED) if masks is None else masks
        h = self.norm1(x)
        if freescale is None:
            x = x + self.attn1(h, self.attn1.keys_values(h, own), own)
        else:
            x = x + freescale(self.attn1, h, grid, own)
        if gate is None or gate.open:
            h = self.attn2(self.norm2(x), text if masks is None else self.attn2.keys_values(text, cross), cross)
        if gate is not None:
            h = gate.output(self, h)
        x = x + h
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """TransformerBlocks over the pixels of a map. (B, C, H, W), one keys-and-values pair a block -> (B, C, H, W)"""

    def __init__(self, channels: int, depth: int, heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)    # unlike the ResBlocks' 1e-5
        # the same arithmetic either way; checkpoints differ in the weight's shape: (C, C) or (C, C, 1, 1)
        self.proj_in = nn.Linear(channels, channels) if config.linear_proj else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(channels, config.context_dim, heads, config.upcast_attention) for _ in range(depth)])
        self.proj_out = nn.Linear(channels, channels) if config.linear_proj else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: list[tuple[Tensor, Tensor] | Tensor], gate: "TextGate | None" = None,
                masks: Iterable[tuple[AttentionMasks, AttentionMasks]] | None = None,
                freescale: "Scale | None" = None) -> Tensor:
        masks = [None] * len(text) if masks is None else masks
        h = self.norm(x).flatten(2).transpose(1, 2)                    # (B, N, C)
        h = project(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block, keys_values, mask in zip(self.transformer_blocks, text, masks, strict=True):
            h = block(h, keys_values, x.shape[2:], gate, mask, freescale)
        h = project(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])         # (B, C, H, W)


class Downsample(nn.Module):
    """Halves the map, rounding up. (B, C, H, W) -> (B, C, H / 2, W / 2)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, dilation: tuple[int, int] | None = None) -> Tensor:
        return convolve(self.conv, x, dilation)


class Upsample(nn.Module):
    """Enlarges the map to the size of the skip that it meets next (double, or one less where that was odd)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Level(nn.Module):
    """A bag of layers at one resolution (or the middle's): `UNet.encode` and `UNet.decode` call them."""

    def __init__(self, resnets: list[ResBlock], attentions: list[SpatialTransformer],
                 down: Downsample | None = None, up: Upsample | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)                    # as many as resnets, or none
        self.downsamplers = nn.ModuleList([] if down is None else [down])
        self.upsamplers = nn.ModuleList([] if up is None else [up])


class Unit(NamedTuple):
    """One entry of the flat list. On the way down a resample is a unit of its own; on the way up it ends one."""
    resnet: ResBlock | None
    attention: SpatialTransformer | None
    resample: Downsample | Upsample | None


class PerUnit(NamedTuple):
    """One value for each unit of the flat list.

    Of the time: the ResBlock's shift (B, C_out), or None in a unit without one; the middle has a pair. Of the text:
    keys and values for each TransformerBlock, or None in a unit without attention. Masks need the source as well: the
    time's embedding (B, 4 C) or the text (B, L, D), from which the values were made.
    """
    down: list[Any]
    mid: Any
    up: list[Any]
    source: Tensor | None = None


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
            down = Downsample(c) if i < last else None
            self.down_blocks.append(Level(resnets, attentions(i, config.layers), down=down))
            skips += [c] * (config.layers + (i < last))
            h = c

        middle = SpatialTransformer(h, config.mid_depth, config.heads[-1], config)
        self.mid_block = Level([resnet(h, h), resnet(h, h)], [middle])

        self.up_blocks = nn.ModuleList()
        for i, c in reversed(list(enumerate(channels))):
            resnets = [resnet((h if j == 0 else c) + skips.pop(), c) for j in range(config.layers + 1)]
            up = Upsample(c) if i > 0 else None
            self.up_blocks.append(Level(resnets, attentions(i, config.layers + 1), up=up))
            h = c

        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | PerUnit, context: Tensor | PerUnit, added: Tensor | None = None,
                freeu: "FreeU | None" = None, cache: "Features | None" = None,
                gate: "TextGate | None" = None, masks: "MaskRun | None" = None,
                freescale: "Scale | None" = None) -> Tensor:
        """Latents x (B, 4, H, W) at times t, with texts, to the predicted noise (or v) (B, 4, H, W).

        t: timesteps 0..999, (B,) or a scalar, may be fractional; or what `embed_time` made of them.
        context: text embeddings (B, L, D); or what `embed_text` made of them.
        added: SDXL's pooled text and image sizes (B, add_dim); None for the other models.
        freeu: factors on backbone and skips, see `freeu.py`; None: the plain network.
        cache: which units run at this step, and what stands in for the others, see `cache.py`; None: all run.
        gate: whether the text is attended to, or what that gave before is reused, see `cache.py`; None: it is.
        masks: what multiplies the weights of the up units' attention, see `maskunet.py`; None: the weights as they are.
        freescale: scale fusion and dilated convolutions for large maps, see `freescale.py`; None: the plain network.
        """
        shifts = t if isinstance(t, PerUnit) else self.embed_time(t, added)
        text = context if isinstance(context, PerUnit) else self.embed_text(context)
        h, skips = self.encode(x, shifts, text, cache, gate, freescale)
        return self.decode(h, skips, shifts, text, freeu, cache, gate, masks, freescale)

    def compile(self, **options: Any) -> None:
        """torch.compile, with its options: a call of the module as one graph, and each of its two halves as one.

        Parallel Faster Diffusion calls the halves themselves. Nothing is compiled before it is called.
        """
        self.encode, self.decode = (torch.compile(half, **options) for half in (self.encode, self.decode))
        super().compile(**options)

    def encode(self, x: Tensor, shifts: PerUnit, text: PerUnit, cache: "Features | None" = None,
               gate: "TextGate | None" = None,
               freescale: "Scale | None" = None) -> tuple[Tensor | None, list[Tensor | None]]:
        """conv_in, the down units and the middle -> the middle's output and the skips, largest map first.

        None takes the place of what a cache neither runs nor keeps, because nobody reads it.
        """
        h, units = x, self.down_units()
        if cache is None or cache.runs(0):
            h = self.conv_in(h)
        if cache is not None:
            h = cache.output(0, h)
        skips = [h]
        for i, (unit, shift, keys_values) in enumerate(zip(units, shifts.down, text.down), start=1):
            if cache is None or cache.runs(i):
                dilation = None if freescale is None else freescale.dilation(i - 1, self.config)
                if unit.resample is not None:
                    h = unit.resample(h, dilation)
                else:
                    h = unit.resnet(h, shift, dilation)
                    if unit.attention is not None:
                        h = unit.attention(h, keys_values, gate, None, freescale)
            if cache is not None:
                h = cache.output(i, h)
            skips.append(h)

        middle = len(units) + 1
        if cache is None or cache.runs(middle):
            dilation = None if freescale is None else freescale.dilation(None, self.config)
            resnet_1, resnet_2 = self.mid_block.resnets
            h = resnet_1(h, shifts.mid[0], dilation)
            h = self.mid_block.attentions[0](h, text.mid, gate, None, freescale)
            h = resnet_2(h, shifts.mid[1], dilation)
        if cache is not None:
            h = cache.output(middle, h)
        return h, skips

    def decode(self, h: Tensor | None, skips: list[Tensor | None], shifts: PerUnit, text: PerUnit,
               freeu: "FreeU | None" = None, cache: "Features | None" = None, gate: "TextGate | None" = None,
               masks: "MaskRun | None" = None, freescale: "Scale | None" = None) -> Tensor:
        """The up units, each with its skip, and the output layers -> prediction (B, 4, H, W)."""
        units = self.up_units()
        for i, (unit, shift, keys_values) in enumerate(zip(units, shifts.up, text.up)):
            if cache is None or cache.runs(len(units) + 1 + i):
                skip = skips[len(units) - 1 - i]
                mask = None if masks is None else masks.unit(i, h, skip, shifts.source)
                if mask is not None:                                   # masked keys and values differ at every step
                    keys_values = [text.source] * len(keys_values)
                if freeu is not None:
                    h, skip = freeu(h, skip, i, self.config)
                h = unit.resnet(torch.cat([h, skip], dim=1), shift)
                if unit.attention is not None:
                    h = unit.attention(h, keys_values, gate, mask, freescale)
                if unit.resample is not None:
                    h = unit.resample(h, skips[len(units) - 2 - i].shape[-2:])
            if cache is not None:
                h = cache.output(len(units) + 1 + i, h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def down_units(self) -> list[Unit]:
        """In SD 1.x: (resnet + attention) x 2 and a downsampler, three times, then two resnets: 11 units."""
        units = []
        for level in self.down_blocks:
            units += [Unit(resnet, attention, None) for resnet, attention in pairs(level)]
            units += [Unit(None, None, downsample) for downsample in level.downsamplers]
        return units

    def up_units(self) -> list[Unit]:
        """In SD 1.x: four levels of three (resnet + attention, where the level has one): 12 units."""
        units = []
        for level in self.up_blocks:
            units += [Unit(resnet, attention, None) for resnet, attention in pairs(level)]
            if level.upsamplers:
                units[-1] = units[-1]._replace(resample=level.upsamplers[0])
        return units

    def embed_time(self, t: Tensor, added: Tensor | None = None) -> PerUnit:
        """Times (B,) or scalar, and SDXL's added condition (B, add_dim), to every ResBlock's shift (B, C_out)."""
        weight = self.time_embedding.linear_1.weight
        t = torch.as_tensor(t, device=weight.device).reshape(-1)
        emb = self.time_embedding(sinusoid(t, self.config.channels[0]).to(weight.dtype))
        if self.config.add_dim:
            if added is None:
                raise ValueError("this U-Net needs the added condition (SDXL: pooled text and image sizes): pass added")
            emb = emb + self.add_embedding(added)
        h = F.silu(emb)

        def shift(unit: Unit) -> Tensor | None:
            return None if unit.resnet is None else unit.resnet.time_emb_proj(h)
        return PerUnit([shift(unit) for unit in self.down_units()],
                       [resnet.time_emb_proj(h) for resnet in self.mid_block.resnets],
                       [shift(unit) for unit in self.up_units()], emb)

    def embed_schedule(self, timesteps: Tensor, added: Tensor | None = None) -> list[PerUnit]:
        """`embed_time` for a whole schedule (S,) at once: S values, to be passed to `forward` one a step."""
        batch = 1 if added is None else len(added)
        t = timesteps.repeat_interleave(batch)
        shifts = self.embed_time(t, None if added is None else added.repeat(len(timesteps), 1))

        def step(i: int) -> PerUnit:
            rows = slice(i * batch, (i + 1) * batch)
            return PerUnit([s if s is None else s[rows] for s in shifts.down], [s[rows] for s in shifts.mid],
                           [s[rows] for s in shifts.up], shifts.source[rows])
        return [step(i) for i in range(len(timesteps))]

    def embed_text(self, context: Tensor) -> PerUnit:
        """Text embeddings (B, L, D) to the keys and values of every cross-attention: they don't depend on the step."""
        def keys_values(attention: SpatialTransformer | None) -> list[tuple[Tensor, Tensor]] | None:
            if attention is None:
                return None
            return [block.attn2.keys_values(context) for block in attention.transformer_blocks]
        return PerUnit([keys_values(unit.attention) for unit in self.down_units()],
                       keys_values(self.mid_block.attentions[0]),
                       [keys_values(unit.attention) for unit in self.up_units()], context)


def pairs(level: Level) -> list[tuple[ResBlock, SpatialTransformer | None]]:
    """The ResBlocks of a level, each with the attention that follows it (None in levels without attention)."""
    return list(zip(level.resnets, level.attentions or [None] * len(level.resnets), strict=True))
