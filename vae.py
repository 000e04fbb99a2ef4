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
WHOLE = 128 * 128      # larger latents are decoded in tiles by default (this many pixels: SDXL's 1024x1024)


@dataclass(frozen=True)
class VAEConfig:
    """What differs between autoencoders. The defaults are those of Stable Diffusion 1.x and 2.x."""
    channels: tuple[int, ...] = (128, 256, 512, 512)   # one entry per level; each level but the last halves the image
    layers: int = 2                                    # ResBlocks per encoder level (the decoder has one more)
    latent_channels: int = 4
    groups: int = 32                                   # number of groups in each GroupNorm
    scaling: float = 0.18215                           # VAE latents times this are the U-Net's: about unit variance
    force_upcast: bool = False                         # SDXL: activations overflow float16; use float32 or bfloat16

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each axis."""
        return 2 ** (len(self.channels) - 1)


Known = dict[nn.Module, tuple[Tensor, Tensor]]     # mean and variance of each GroupNorm's groups, (B, groups) each


class GroupNorm(nn.GroupNorm):
    """GroupNorm that can use the statistics of another picture. (B, C, H, W) -> (B, C, H, W)

    known: a dict of statistics, filled by the first call and used by later ones; None: x is normalised by its own.
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
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])   # a list because checkpoints say "to_out.0"

    def forward(self, x: Tensor, known: Known | None = None) -> Tensor:
        tokens = self.group_norm(x, known).flatten(2).transpose(1, 2)         # (B, h*w, C)
        q, k, v = self.to_q(tokens)[:, None], self.to_k(tokens)[:, None], self.to_v(tokens)[:, None]
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Halves the image. Pads right and bottom only: SD's asymmetric padding, which the weights are trained with."""

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

        H and W are multiples of `config.factor`. tile: side of a tile in latent pixels (at least 8), or None to
        encode the image in one piece. Tiles bound the memory, as in `decode`.
        """
        factor, c, x = self.config.factor, self.config.latent_channels, x.to(self.quant_conv.weight.dtype)
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(f"image size {x.shape[-1]}x{x.shape[-2]} is not a multiple of {factor}: crop or resize it")
        size, known = (x.shape[-2] // factor, x.shape[-1] // factor), {}
        if tile is None or 8 <= tile >= max(size):
            moments = self.quant_conv(self.encoder(x))
        else:
            moments = x.new_empty(x.shape[0], 2 * c, *size)
            self.encoder(thumbnail(x, size, tile, factor), known)
            blend_tiles(moments, size, tile, 1, lambda top, bottom, left, right: self.quant_conv(self.encoder(
                x[:, :, top * factor:bottom * factor, left * factor:right * factor], known)))
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Unscaled latents (B, latent channels, h, w) -> images (B, 3, H, W), nominally in [-1, 1].

        tile: side of a tile in latent pixels (at least 8), or None to decode in one piece. Tiles overlap by a quarter
        and are blended linearly; apart from the result, memory doesn't grow with the image. GroupNorm uses the
        statistics of a thumbnail of the whole image: with a tile's own, tiles would differ in contrast. Self-attention
        sees one tile only, so the result differs slightly from decoding in one piece. If gradients flow back to z,
        every tile is computed twice, so that only one tile's activations are in memory.
        """
        z, known = self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)), {}
        size, factor = z.shape[-2:], self.config.factor
        if tile is None or 8 <= tile >= max(size):
            return self.decoder(z)
        image = z.new_empty(z.shape[0], 3, size[0] * factor, size[1] * factor)
        self.decoder(thumbnail(z, size, tile, 1), known)

        def compute(top: int, bottom: int, left: int, right: int) -> Tensor:
            part = z[:, :, top:bottom, left:right]
            if torch.is_grad_enabled() and z.requires_grad:
                return checkpoint(self.decoder, part, known, use_reentrant=False, preserve_rng_state=False)
            return self.decoder(part, known)
        return blend_tiles(image, size, tile, factor, compute)


def tile_side(tile: int | None, latents: Tensor) -> int | None:
    """The VAE's `tile` argument: `tile` if given (0 means no tiles), otherwise chosen by the size of the latents."""
    return (64 if latents.shape[-2] * latents.shape[-1] > WHOLE else None) if tile is None else tile or None


def together(latents: Tensor) -> tuple[Tensor, ...]:
    """Split a batch of latents into smaller batches for the decoder: several small latents each, or one large one."""
    return latents.split(max(TOGETHER // (latents.shape[-2] * latents.shape[-1]), 1))


def thumbnail(x: Tensor, size: tuple[int, int], tile: int, scale: int) -> Tensor:
    """Shrink x, of size (h, w) times scale, to a tile's size. Picking nearest pixels keeps its mean and variance."""
    if tile < 8:
        raise ValueError(f"a tile of {tile} latent pixels is too small: use 8 or more (64 is usual)")
    small = [max(round(side * tile / max(size)), 1) * scale for side in size]
    return F.interpolate(x, small, mode="nearest-exact")


def tile_weights(size: int, tile: int, scale: int) -> list[tuple[int, int, Tensor]]:
    """Cover 0..size with tiles: (start, end, blending weight of each of the tile's `scale * (end - start)` pixels).

    Neighbours overlap by at least a quarter of a tile. A tile's weights fall linearly in its first and last quarter.
    Then each weight is divided by the sum of all tiles' weights at its pixel, so that they add up to 1 everywhere.
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


def blend_tiles(out: Tensor, size: tuple[int, int], tile: int, scale: int,
                compute: Callable[[int, int, int, int], Tensor]) -> Tensor:
    """Fill `out` with the weighted sum of tiles. compute(top, bottom, left, right), in latent pixels, makes a tile."""
    out.zero_()
    for top, bottom, wy in tile_weights(size[0], tile, scale):
        for left, right, wx in tile_weights(size[1], tile, scale):
            weight = (wy[:, None] * wx).to(out)
            area = out[:, :, top * scale:bottom * scale, left * scale:right * scale]
            area += compute(top, bottom, left, right) * weight
    return out
