"""The variational autoencoder of Stable Diffusion: images to latents and back.

Start at `VAE.encode` and `VAE.decode`; below them, `Encoder.forward` and `Decoder.forward` read top to bottom.
Shapes: B batch, C channels, H W pixels, h w latent pixels (H = factor * h; factor is 8 for Stable Diffusion).
Source: "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752, section 3.1.
Checked against diffusers 0.42.1 (AutoencoderKL). Parameter names are those of the published checkpoints.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TOGETHER = 64 * 64     # latent pixels decoded in one batch: those of one 512x512 image, to bound the memory
WHOLE = 128 * 128      # by default, latents with more pixels are coded in tiles; SDXL's 1024x1024 image has this many


@dataclass(frozen=True)
class VAEConfig:
    """What differs between autoencoders. The defaults are those of Stable Diffusion 1.x and 2.x."""
    channels: tuple[int, ...] = (128, 256, 512, 512)   # one entry per level; each level but the last halves the image
    layers: int = 2                                    # ResBlocks per encoder level (the decoder has one more)
    latent_channels: int = 4
    groups: int = 32                                   # number of groups in each GroupNorm
    scaling: float = 0.18215                           # the U-Net's latents, of about unit variance: VAE latents * this
    force_upcast: bool = False                         # SDXL: activations overflow float16; use float32 or bfloat16

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each axis."""
        return 2 ** (len(self.channels) - 1)


Known = dict[nn.Module, tuple[Tensor, Tensor]]     # mean and variance of each GroupNorm's groups, (B, groups) each


class GroupNorm(nn.GroupNorm):
    """GroupNorm that can use the statistics of another image. (B, C, H, W) -> (B, C, H, W)

    known: a dict of statistics, filled by the first call and used by later calls. None: x is normalised by its own.
    """

    def forward(self, x: Tensor, known: Known | None = None) -> Tensor:
        if known is None:
            return super().forward(x)
        if self not in known:
            variance, mean = torch.var_mean(x.float().unflatten(1, (self.num_groups, -1)), (2, 3, 4), correction=0)
            known[self] = mean, variance
        mean, variance = (m.repeat_interleave(x.shape[1] // self.num_groups, dim=1) for m in known[self])
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return x * scale[:, :, None, None].to(x) + (self.bias - mean * scale)[:, :, None, None].to(x)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. (B, C_in, H, W) -> (B, C_out, H, W)"""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, known: Known | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, known)))
        h = self.conv2(F.silu(self.norm2(h, known)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all pixels of the smallest map. (B, C, h, w) -> (B, C, h, w)"""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])   # a list: checkpoints name it "to_out.0"

    def forward(self, x: Tensor, known: Known | None = None) -> Tensor:
        tokens = self.group_norm(x, known).flatten(2).transpose(1, 2)         # (B, h*w, C)
        q, k, v = self.to_q(tokens)[:, None], self.to_k(tokens)[:, None], self.to_v(tokens)[:, None]
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Halves the image. Pads right and bottom only, as the published weights were trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the image by repeating pixels, then smooths. (B, C, H, W) -> (B, C, 2H, 2W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Container for the layers at one resolution; `Encoder` and `Decoder` call them."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])


class Middle(nn.Module):
    """The smallest resolution: ResBlock, attention, ResBlock. (B, C, h, w) -> (B, C, h, w)"""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, h: Tensor, known: Known | None = None) -> Tensor:
        h = self.attentions[0](self.resnets[0](h, known), known)
        return self.resnets[1](h, known)


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2 * latent channels, h, w)"""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.channels, config.groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            Level(channels[max(i - 1, 0)], c, config.layers, groups, down=i < last) for i, c in enumerate(channels)])
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, known: Known | None = None) -> Tensor:
        h = self.conv_in(x)
        for level in self.down_blocks:
            for resnet in level.resnets:
                h = resnet(h, known)
            for downsample in level.downsamplers:
                h = downsample(h)
        h = self.mid_block(h, known)
        return self.conv_out(F.silu(self.conv_norm_out(h, known)))


class Decoder(nn.Module):
    """(B, latent channels, h, w) -> (B, 3, H, W)"""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.channels[::-1], config.groups        # deepest level first
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups)
        self.up_blocks = nn.ModuleList([
            Level(channels[max(i - 1, 0)], c, config.layers + 1, groups, up=i < last) for i, c in enumerate(channels)])
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Tensor, known: Known | None = None) -> Tensor:
        h = self.mid_block(self.conv_in(z), known)
        for level in self.up_blocks:
            for resnet in level.resnets:
                h = resnet(h, known)
            for upsample in level.upsamplers:
                h = upsample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h, known)))


class VAE(nn.Module):
    """Autoencoder with a Gaussian latent. Latents here are unscaled; the U-Net's are these times `config.scaling`."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance, each (B, latent channels, h, w), unscaled.

        H and W are multiples of `config.factor`. tile: as in `decode`.
        """
        factor, x = self.config.factor, x.to(self.quant_conv.weight.dtype)
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(f"image size {x.shape[-1]}x{x.shape[-2]} is not a multiple of {factor}: crop or resize it")
        moments = in_tiles(lambda x, known=None: self.quant_conv(self.encoder(x, known)), x, tile, factor, 1,
                           2 * self.config.latent_channels)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Unscaled latents (B, latent channels, h, w) -> images (B, 3, H, W), nominally in [-1, 1].

        tile: side of a tile in latent pixels (at least 8), or None to decode in one piece. Tiles bound the memory: see
        `in_tiles`.
        """
        z = self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))
        return in_tiles(self.decoder, z, tile, 1, self.config.factor, 3)


def tile_side(tile: int | None, latents: Tensor) -> int | None:
    """The VAE's `tile` argument: the given `tile` (0 means no tiles), or for None a choice by the latents' size."""
    return (64 if latents.shape[-2] * latents.shape[-1] > WHOLE else None) if tile is None else tile or None


def together(latents: Tensor) -> tuple[Tensor, ...]:
    """Split a batch of latents into batches for the decoder, of at most TOGETHER pixels or of one latent."""
    return latents.split(max(TOGETHER // (latents.shape[-2] * latents.shape[-1]), 1))


def in_tiles(coder: Callable[..., Tensor], x: Tensor, tile: int | None, before: int, after: int,
             channels: int) -> Tensor:
    """coder(x); in tiles if tile is below the longer side of x in latent pixels.

    Per latent pixel and axis, x has `before` pixels and the result `after`; the result has `channels` channels. Tiles
    overlap and are blended linearly, see `tile_weights`. Apart from the result, memory does not grow with x. Every
    GroupNorm uses the statistics of a thumbnail of x, because tiles with statistics of their own differ in contrast.
    Self-attention sees one tile only, so the result differs slightly from coding in one piece. If gradients flow back
    to x, every tile is computed twice, so that only one tile's activations are in memory.
    """
    height, width = size = x.shape[-2] // before, x.shape[-1] // before
    if tile is None or 8 <= tile >= max(size):
        return coder(x)
    if tile < 8:
        raise ValueError(f"a tile of {tile} latent pixels is too small: use 8 or more (64 is usual)")
    out, known = x.new_zeros(len(x), channels, height * after, width * after), {}
    small = [max(round(side * tile / max(size)), 1) * before for side in size]
    coder(F.interpolate(x, small, mode="nearest-exact"), known)        # nearest pixels keep the mean and the variance
    for top, bottom, wy in tile_weights(height, tile, after):
        for left, right, wx in tile_weights(width, tile, after):
            part = x[:, :, top * before:bottom * before, left * before:right * before]
            made = checkpoint(coder, part, known, use_reentrant=False, preserve_rng_state=False) \
                if torch.is_grad_enabled() and x.requires_grad else coder(part, known)
            out[:, :, top * after:bottom * after, left * after:right * after] += made * (wy[:, None] * wx).to(out)
    return out


def tile_weights(size: int, tile: int, scale: int) -> list[tuple[int, int, Tensor]]:
    """Cover 0..size with tiles: (start, end, blending weight of each of the tile's `scale * (end - start)` pixels).

    Neighbouring tiles overlap by at least a quarter. A tile's weights rise linearly over its first quarter and fall
    over its last one; at each pixel they are then divided by the sum of all tiles' weights, so that they add up to 1.
    """
    tile = min(tile, size)
    count = 1 + -(-(size - tile) // (tile - tile // 4))
    starts = [round(i * (size - tile) / max(count - 1, 1)) for i in range(count)]
    position = torch.arange(tile * scale, dtype=torch.float64) + 0.5
    ramp = torch.minimum(position, tile * scale - position).clamp(max=tile * scale / 4)
    total = torch.zeros(size * scale, dtype=torch.float64)
    for start in starts:
        total[start * scale:(start + tile) * scale] += ramp
    return [(start, start + tile, ramp / total[start * scale:(start + tile) * scale]) for start in starts]
