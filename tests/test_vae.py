"""vae.py: what encoding and decoding promise, and that tiles are invisible but for what a tile can't see."""
from pathlib import Path

import pytest
import torch
from torch import nn

from folder import load_weights
from memory import Meter
from vae import VAE, Downsample, GroupNorm, VAEConfig, in_tiles, tile_side, tile_weights, together

NARROW = VAEConfig(channels=(8, 16, 16), layers=1, groups=4)           # factor 4


def narrow(dtype: torch.dtype = torch.float64) -> VAE:
    torch.manual_seed(0)
    return VAE(NARROW).to(dtype).eval().requires_grad_(False)


class Neutral(nn.Module):
    """In place of a GroupNorm."""

    def forward(self, x, known=None):
        return x


def stripped(kernel: int) -> VAE:
    """A VAE where a pixel depends on its neighbourhood only: no norms, no attention. kernel 1: on itself only."""
    vae = narrow()
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, Neutral())
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and kernel == 1:
                middle = child.weight[:, :, 1, 1].clone()
                child.weight.zero_()[:, :, 1, 1] = middle
    for half in (vae.encoder, vae.decoder):
        half.mid_block.attentions[0].to_out[0].weight.zero_()
    return vae


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_the_published_autoencoder_has_this_many_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE().parameters()) == 83_653_863
    assert {norm.eps for norm in narrow().modules() if isinstance(norm, nn.GroupNorm)} == {1e-6}


def test_gradient_reaches_every_parameter():
    vae = narrow().requires_grad_(True)
    mean, logvar = vae.encode(noise(1, 3, 16, 24))
    (vae.decode(mean).square().sum() + logvar.square().sum()).backward()
    assert not [key for key, p in vae.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("h,w", [(6, 6), (5, 9), (1, 1)])
def test_shapes_are_those_of_the_factor(h, w):
    vae = narrow()
    mean, logvar = vae.encode(noise(2, 3, 4 * h, 4 * w))
    assert mean.shape == logvar.shape == (2, 4, h, w)
    assert vae.decode(mean).shape == (2, 3, 4 * h, 4 * w)


def test_images_of_a_batch_do_not_influence_each_other():
    vae, images = narrow(), noise(2, 3, 16, 24)
    mean, logvar = vae.encode(images)
    alone = vae.encode(images[1:])
    assert relative(mean[1:], alone[0]) < 1e-12 and relative(logvar[1:], alone[1]) < 1e-12
    assert relative(vae.decode(mean)[1:], vae.decode(mean[1:])) < 1e-12


def test_downsampling_pads_right_and_bottom_only():
    down = Downsample(1)
    nn.init.ones_(down.conv.weight), nn.init.zeros_(down.conv.bias)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    sums = [[x[0, 0, i:i + 3, j:j + 3].sum() for j in (0, 2)] for i in (0, 2)]
    assert torch.equal(down(x)[0, 0], torch.tensor(sums))


@pytest.mark.parametrize("bias,bound", [(1e4, 20), (-1e4, -30)])
def test_log_variance_is_clamped_and_the_mean_is_not(bias, bound):
    vae = narrow()
    vae.quant_conv.bias.fill_(bias)
    mean, logvar = vae.encode(noise(1, 3, 8, 8))
    assert (logvar == bound).all() and (mean.abs() > 9e3).all()


def test_tile_weights_are_1_in_sum_and_positive_and_neighbours_overlap_by_a_quarter():
    for tile in (8, 9, 13, 16, 64):
        for size in range(1, 300):
            tiles, total = tile_weights(size, tile, 2), torch.zeros(2 * size, dtype=torch.float64)
            for start, end, weight in tiles:
                assert end - start == min(tile, size) and len(weight) == 2 * (end - start) and (weight > 0).all()
                total[2 * start:2 * end] += weight
            assert (total - 1).abs().max() < 1e-12
            assert tiles[0][0] == 0 and tiles[-1][1] == size
            assert all(a[1] - b[0] >= tile // 4 for a, b in zip(tiles, tiles[1:]))
            if size <= tile:
                assert len(tiles) == 1
    (*_, first), (*_, second) = tile_weights(24, 16, 1)                # they share pixels 8 to 15
    fall = torch.tensor([8.0, 8, 8, 8, 7, 5, 3, 1], dtype=torch.float64)
    rise = fall.flip(0)
    assert torch.allclose(first[8:], fall / (fall + rise)) and torch.allclose(second[:8], rise / (fall + rise))


@pytest.mark.parametrize("tile", [12, 13, 64])
def test_a_tile_that_holds_the_image_is_the_image_in_one_piece(tile):
    vae, z, x = narrow(torch.float32), noise(2, 4, 12, 9).float(), noise(2, 3, 48, 36).float()
    assert torch.equal(vae.decode(z, tile), vae.decode(z))
    assert all(torch.equal(a, b) for a, b in zip(vae.encode(x, tile), vae.encode(x)))


@pytest.mark.parametrize("tile", [8, 11])
@pytest.mark.parametrize("h,w", [(20, 33), (8, 25), (19, 7)])
def test_tiles_put_every_pixel_where_it_belongs(h, w, tile):
    vae, z, x = stripped(kernel=1), noise(2, 4, h, w), noise(2, 3, 4 * h, 4 * w)
    assert relative(vae.decode(z, tile), vae.decode(z)) < 1e-12
    assert all(relative(a, b) < 1e-12 for a, b in zip(vae.encode(x, tile), vae.encode(x)))


def test_without_norms_and_attention_only_the_borders_of_tiles_show_and_they_are_faded_out():
    vae, z, x = stripped(kernel=3), noise(1, 4, 40, 24), noise(1, 3, 160, 96)
    pairs = [(vae.decode(z, 16), vae.decode(z)), (vae.encode(x, 16)[0], vae.encode(x)[0])]
    for tiled, whole in pairs:                                # measured: 0.04 and 0.05, rms 0.009 and 0.014
        assert 0 < relative(tiled, whole) < 0.08
        assert (tiled - whole).square().mean().sqrt() < 0.03 * whole.square().mean().sqrt()


def test_with_them_larger_tiles_come_nearer_to_the_whole():
    vae, z = narrow(), noise(1, 4, 40, 24)
    errors = [relative(vae.decode(z, tile), vae.decode(z)) for tile in (8, 16, 24)]
    assert errors[0] > 2 * errors[1] > 3 * errors[2] and errors[2] < 0.2        # measured: 1.59, 0.33, 0.17


def test_group_norm_takes_the_statistics_of_what_it_saw_first():
    norm, x, known = GroupNorm(2, 4), noise(2, 4, 6, 6).float(), {}
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    assert relative(norm(x, known), norm(x)) < 1e-6 and torch.equal(norm(x, None), nn.GroupNorm.forward(norm, x))
    piece = norm(3 * x[:, :, 2:4] + 1, known)                          # of another picture: no statistics of its own
    assert torch.equal(piece, norm(3 * x + 1, known)[:, :, 2:4]) and relative(piece, norm(3 * x + 1)[:, :, 2:4]) > 0.1
    assert relative(norm(x.half(), known).float(), norm(x)) < 5e-3 and norm(x.half(), known).dtype == torch.float16


def test_tiles_normalised_by_a_thumbnail_have_the_contrast_of_the_whole():
    vae = load_weights(VAE(VAEConfig((16, 32, 64), layers=1, groups=8, scaling=1.0)),
                       Path(__file__).parent.parent / "models/tiny/vae.safetensors", "cpu", torch.float32)
    image = torch.full((1, 3, 192, 192), 0.5)
    image[:, 1:, 20:60, 20:60] = -1.0                       # a red square in one corner of a gray picture
    z = vae.encode(image)[0]
    whole, tiled = vae.decode(z), vae.decode(z, 16)
    rms = lambda x: x.square().mean().sqrt().item()
    tiles = torch.cat([vae.decode(z[:, :, i:i + 16, j:j + 16]) for i in (0, 16, 32) for j in (0, 16, 32)])
    by_themselves = tiles.unflatten(0, (3, 3)).permute(2, 0, 3, 1, 4).reshape(1, 3, 192, 192)
    assert rms(tiled - whole) < 0.6 * rms(by_themselves - whole)                # measured: 0.018 and 0.039
    corners = [(i, j) for i in (0, 64, 128) for j in (0, 64, 128)]
    tiles = torch.cat([vae.encode(image[:, :, i:i + 64, j:j + 64])[0] for i, j in corners])
    by_themselves = tiles.unflatten(0, (3, 3)).permute(2, 0, 3, 1, 4).reshape(z.shape)
    assert rms(vae.encode(image, 16)[0] - z) < 0.6 * rms(by_themselves - z)     # measured: 0.170 and 0.393


def test_memory_of_tiled_coding_beside_the_result_does_not_grow_with_the_image():
    vae = narrow(torch.float32)

    def peaks(h: int, w: int, tile: int | None) -> list[int]:
        """Bytes at the peak of decoding and of encoding, beyond the latents (or their moments) and the image made."""
        z, image = torch.zeros(1, 4, h, w), torch.zeros(1, 3, 4 * h, 4 * w)
        out = []
        for run, made in ((lambda: vae.decode(z, tile), z.nbytes + image.nbytes),
                          (lambda: vae.encode(image, tile), 2 * z.nbytes)):
            with Meter() as meter:
                meter.ignore(z, image, *vae.parameters())
                run()
            out.append(meter.peak - made)
        return out
    small, square, large = (peaks(h, w, 16) for h, w in ((16, 48), (48, 48), (48, 96)))
    for i in (0, 1):
        # beside a tile only the thumbnail, whose shape is the image's and whose long side is a tile's
        assert max(small[i], square[i], large[i]) < 1.15 * min(small[i], square[i], large[i])
        assert peaks(48, 96, None)[i] > 5 * large[i]


def test_the_first_tile_is_a_thumbnail_with_the_images_proportions():
    seen = []
    in_tiles(lambda x, known: seen.append(tuple(x.shape)) or torch.zeros(1, 2, x.shape[2] // 4, x.shape[3] // 4),
             noise(1, 3, 160, 96), 16, 4, 1, 2)
    assert seen[0] == (1, 3, 64, 40) and set(seen[1:]) == {(1, 3, 64, 64)}


def test_large_latents_get_tiles_and_small_ones_are_decoded_together():
    z = torch.empty(5, 4, 128, 128)
    assert [tile_side(tile, z) for tile in (None, 0, 16)] == [None, None, 16]
    assert tile_side(None, torch.empty(1, 4, 128, 129)) == 64
    assert [[len(part) for part in together(z[:, :, :side, :side])] for side in (128, 64, 45, 32)] == [
        [1] * 5, [1] * 5, [2, 2, 1], [4, 1]]


def test_gradients_through_tiles_are_those_of_one_pass_and_only_one_tiles_activations_are_kept():
    vae, peaks = narrow(torch.float32), []
    for height in (24, 48):
        z = noise(1, 4, height, 16).float().requires_grad_()
        with Meter() as meter:
            meter.ignore(z, *vae.parameters())
            vae.decode(z, 8).sum().backward()
        peaks.append(meter.peak - 3 * 16 * 16 * 4 * height)            # beside the image
        assert z.grad.isfinite().all() and z.grad.abs().min() > 0
    assert peaks[1] < 1.6 * peaks[0]                                   # 2, if those of all tiles were kept


def test_bad_sizes_are_named_and_say_what_to_do():
    with pytest.raises(ValueError, match="image size 18x16 is not a multiple of 4: crop or resize"):
        narrow().encode(noise(1, 3, 16, 18))
    with pytest.raises(ValueError, match="use 8 or more"):
        narrow().decode(noise(1, 4, 16, 16), tile=7)
    with pytest.raises(ValueError, match="use 8 or more"):
        narrow().encode(noise(1, 3, 64, 64), tile=0)
