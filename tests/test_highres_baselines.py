"""highres_baselines.py: at the training size all are the plain U-Net; beyond it, each of their ideas by itself."""
import math

import highres_baselines
import pytest
import torch
import torch.nn.functional as F
from highres_baselines import Changes, demo_fusion, forward, hidiffusion, redilate, scale_crafter, shifted_windows
from torch import nn

from folder import TINY
from freescale import FreeScale
from freeu import FreeU
from sampler import ddim, generate, plan, x0_and_eps
from txt2img import StableDiffusion
from unet import CONFIGS, Attention, UNet, UNetConfig

NARROW = UNetConfig(channels=(8, 16, 16, 16), heads=(2, 2, 2, 2), context_dim=8, groups=4)
XL = UNetConfig(channels=(8, 16, 16), depth=(0, 2, 3), mid_depth=3, heads=(2, 2, 2), context_dim=8, linear_proj=True,
                add_dim=6, groups=4)
NATIVE = 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def make(kind, *arguments):
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return kind(*arguments).requires_grad_(False)


UNETS = {config: make(UNet, config) for config in (NARROW, XL)}


def inputs(config: UNetConfig, height: int, width: int, t: float = 900.0) -> tuple:
    """Of both halves of guidance, for one picture."""
    return (randn(1, 4, height, width).repeat(2, 1, 1, 1), torch.tensor(t), randn(2, 5, 8, seed=1),
            randn(2, 6, seed=2) if config.add_dim else None)


def models(unet: UNet) -> list:
    return [scale_crafter(unet, NATIVE), hidiffusion(unet, NATIVE, seeded()), demo_fusion(unet, NATIVE, seeded())]


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
def test_at_the_training_size_and_without_changes_all_are_the_plain_unet(config):
    unet, freeu = UNETS[config], FreeU(1.2, 1.4, 0.9, 0.2)
    for more in ({}, {"freeu": freeu}):
        plain = unet(*inputs(config, 8, 8), **more)
        assert all(torch.equal(model(*inputs(config, 8, 8), **more), plain) for model in models(unet))
        odd = inputs(config, 9, 14)
        assert torch.equal(forward(unet, *odd, Changes(), **more), unet(*odd, **more))


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("size", [(16, 16), (13, 22), (32, 24)], ids=str)
def test_beyond_it_all_differ_from_direct_inference_and_are_finite(config, size):
    for t in (900.0, 500.0):
        plain = UNETS[config](*inputs(config, *size, t))
        for model in models(UNETS[config]):
            out = model(*inputs(config, *size, t))
            assert out.shape == plain.shape and out.isfinite().all() and not torch.allclose(out, plain, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- ScaleCrafter

def test_redilation_by_whole_numbers_is_dilation_and_between_them_keeps_size_and_constants():
    x = randn(1, 4, 12, 10)
    for stride in (1, 2):
        conv = make(nn.Conv2d, 4, 4, 3, stride, 1)
        assert torch.equal(redilate(conv, x, 1), conv(x))
        want = F.conv2d(x, conv.weight, conv.bias, stride, padding=2, dilation=2)
        assert torch.equal(redilate(conv, x, 2), want) and redilate(conv, x, 2.5).shape == want.shape
    conv = make(nn.Conv2d, 4, 4, 3, 1, 1)
    flat = torch.ones(1, 4, 21, 21)
    assert torch.allclose(redilate(conv, flat, 2.5)[:, :, 8:13, 8:13], conv(flat)[:, :, 8:13, 8:13], atol=1e-5)


def resampler(level: int) -> str:
    return f"down_blocks.{level}.downsamplers.0.conv"


# by family and factor: the levels whose ResBlocks are dilated, the resamplers, and the middle's four convolutions
DILATED = {("sdxl", 2): ({"mid_block": 2, "up_blocks.0": 2}, {"up_blocks.0.upsamplers.0.conv": 2}),
           ("sdxl", 4): ({"down_blocks.2": 4, "mid_block": 4, "up_blocks.0": 4, "up_blocks.1": 3, "up_blocks.2": 2},
                         {"up_blocks.0.upsamplers.0.conv": 4, "up_blocks.1.upsamplers.0.conv": 3}),
           ("sd15", 2): ({f"down_blocks.{i}": 2 for i in (1, 2, 3)} | {f"up_blocks.{i}": 2 for i in (0, 1, 2)}
                         | {"mid_block": 2}, {resampler(1): 2, resampler(2): 2}
                         | {f"up_blocks.{i}.upsamplers.0.conv": 2 for i in (0, 1, 2)})}


@pytest.mark.parametrize("family,factor", DILATED)
def test_scale_crafter_dilates_the_published_layers(family, factor, monkeypatch):
    c, seen = CONFIGS[family], {}
    with torch.device("meta"):
        unet = UNet(c)
        names = {conv: name for name, conv in unet.named_modules()}

        def noting(conv, x, p):
            seen.setdefault(names[conv], p)                            # the first pass: the strong one
            return redilate(conv, x, p)
        monkeypatch.setattr(highres_baselines, "redilate", noting)
        x, context = torch.empty(2, 4, 8 * factor, 8 * factor), torch.empty(2, 5, c.context_dim)
        added = torch.empty(2, c.add_dim) if c.add_dim else None
    scale_crafter(unet, 8, guided=False)(x, torch.tensor(1000.0), context, added)
    levels, resamplers = DILATED[family, factor]
    want = {name: p for name in seen for level, p in levels.items()
            if name.startswith(f"{level}.resnets")} | resamplers
    assert {name: p for name, p in seen.items() if p != 1} == want


def test_damped_guidance_is_the_papers_formula(monkeypatch):
    def fake(unet, x, t, context, added, changes, freeu=None):          # strong passes are told by their first level
        return context.mean((1, 2))[:, None, None, None] * (1.0 if 1 in changes.down else 0.1) + 0 * x
    monkeypatch.setattr(highres_baselines, "forward", fake)
    x, _, _, _ = inputs(NARROW, 32, 32)
    context = torch.tensor([2.0, 5.0])[:, None, None].expand(2, 5, 8)
    negative, positive = scale_crafter(UNETS[NARROW], NATIVE)(x, torch.tensor(999.0), context).chunk(2)
    out = negative + 7.5 * (positive - negative)
    assert torch.allclose(out, torch.tensor(0.1 * 2 + 7.5 * (5.0 - 2.0)))


def test_damped_guidance_is_for_both_halves_alone_and_one_half_gets_the_strong_pass():
    unet, (x, t, context, _) = UNETS[NARROW], inputs(NARROW, 32, 32)
    strong = scale_crafter(unet, NATIVE, guided=False)
    both = strong(x, t, context)
    for k in (0, 1):                                                   # cfg_scale 1, and the passes of low_memory
        alone = strong(x[k:k + 1], t, context[k:k + 1])
        assert alone.shape == (1, 4, 32, 32) and torch.allclose(alone, both[k:k + 1], atol=1e-5)
    assert not torch.allclose(scale_crafter(unet, NATIVE)(x, t, context), both, atol=1e-4)
    for rows in (x[:1], randn(2, 4, 32, 32)):                          # two rows of two pictures are no halves either
        with pytest.raises(ValueError, match="pass guided=False"):
            scale_crafter(unet, NATIVE)(rows, t, context[:len(rows)])


def test_dilation_ends_with_its_part_of_the_time():
    unet = UNETS[NARROW]
    for size, last in ((16, 400.0), (32, 300.0)):
        late, early = inputs(NARROW, size, size, last - 1), inputs(NARROW, size, size, last + 1)
        assert torch.equal(scale_crafter(unet, NATIVE)(*late), unet(*late))
        assert not torch.allclose(scale_crafter(unet, NATIVE)(*early), unet(*early), atol=1e-4)


# --------------------------------------------------------------------------------------------------------- HiDiffusion

def test_a_convolution_of_every_second_pixel_is_the_published_one_with_stride_4():
    conv, x = make(nn.Conv2d, 4, 4, 3, 2, 1), randn(1, 4, 16, 12)
    want = F.conv2d(x, conv.weight, conv.bias, stride=4, padding=2, dilation=2)
    assert torch.allclose(redilate(conv, x[:, :, ::2, ::2], 1), want, atol=1e-6)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (4, 14)], ids=str)
def test_shifted_windows_are_attention_within_quadrants_of_the_rolled_map(grid):
    a = make(Attention, 16, 16, 2, False)
    x = randn(2, grid[0] * grid[1], 16)
    for quarter in range(4):
        shift = [side // 2 * quarter // 4 for side in grid]
        rolled = x.unflatten(1, grid).roll([-s for s in shift], (1, 2))
        want, h, w = torch.empty_like(rolled), grid[0] // 2, grid[1] // 2
        for i in (0, h):
            for j in (0, w):
                part = rolled[:, i:i + h, j:j + w].flatten(1, 2)
                want[:, i:i + h, j:j + w] = a(part, a.keys_values(part)).unflatten(1, (h, w))
        want = want.roll(shift, (1, 2)).flatten(1, 2)
        assert (shifted_windows(a, x, grid, quarter) - want).abs().max() < 1e-5
    assert shifted_windows(a, randn(1, 35, 16), (5, 7), 1).shape == (1, 35, 16)


def test_hidiffusion_shrinks_the_maps_when_and_where_it_should(monkeypatch):
    seen = []

    def noting(unet, x, t, context, added, changes, freeu=None):
        seen.append((changes.skip_rows, changes.pool))
        return x
    monkeypatch.setattr(highres_baselines, "forward", noting)
    for config, factor, t in ((NARROW, 2, 700), (NARROW, 2, 500), (NARROW, 4, 800), (NARROW, 4, 400), (NARROW, 4, 200),
                              (XL, 2, 900), (XL, 2, 700), (XL, 2, 500), (XL, 4, 800), (XL, 4, 400), (XL, 4, 200)):
        hidiffusion(UNETS[config], NATIVE, seeded())(*inputs(config, 8 * factor, 8 * factor, t))
    assert seen == [((2,), ()), ((), ()), ((2,), (3,)), ((2,), ()), ((), ()),
                    ((5,), ()), ((), (3,)), ((), ()), ((5,), (3,)), ((), (3,)), ((), ())]
    seen.clear()
    for config in (NARROW, XL):                                        # four times as wide, twice as high
        hidiffusion(UNETS[config], NATIVE, seeded())(*inputs(config, 16, 32, 800))
    assert seen == [((2,), (3,)), ((), (3,))]                          # SDXL's list for both sides is not for one


def test_scale_crafters_dilation_ends_where_the_family_says(monkeypatch):
    unet = UNETS[NARROW]
    for factor, until, last in ((2, (0.6, 0.7), 0.6), (4, (0.6, 0.7), 0.7), (2, (0.4, 0.74), 0.4),
                                (4, (0.4, 0.74), 0.74)):
        for part, plain in ((last - 0.01, False), (last + 0.01, True)):
            given = inputs(NARROW, 8 * factor, 8 * factor, 1000 * (1 - part))
            out = scale_crafter(unet, NATIVE, guided=False, until=until)(*given)
            assert torch.equal(out, unet(*given)) == plain


# ---------------------------------------------------------------------------------------------------------- DemoFusion

def test_demo_fusion_of_a_pointwise_model_is_the_model_at_the_end_and_its_blurred_latent_at_the_start():
    model = demo_fusion(lambda x, *_: torch.sin(x), NATIVE, seeded())
    x, t, context, _ = inputs(NARROW, 16, 24)
    assert (model(x, torch.tensor(0.0), context) - torch.sin(x)).abs().max() < 1e-6
    start = model(x, torch.tensor(1000.0), context).asin()             # c is 1: interleaved parts of the blurred latent
    assert not torch.allclose(start, x, atol=0.1)
    linear = demo_fusion(lambda x, *_: x, NATIVE, seeded())(x, torch.tensor(1000.0), context)
    assert torch.allclose(linear.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(linear.std((1, 2, 3)), x.std((1, 2, 3)), atol=1e-4)
    assert (linear[..., 1:] - linear[..., :-1]).square().mean() < 0.5 * (x[..., 1:] - x[..., :-1]).square().mean()


def test_demo_fusion_calls_the_unet_as_often_as_published():
    for r, windows in ((2, 9), (3, 25), (4, 49)):
        seen = []
        model = demo_fusion(lambda x, *_, seen=seen: seen.append(x.shape) or x, NATIVE, seeded())
        model(*inputs(NARROW, 8 * r, 8 * r))
        assert sum(shape[0] // 2 for shape in seen) == windows + r * r and {shape[2:] for shape in seen} == {(8, 8)}


def test_blending_predictions_is_blending_the_latents_behind_their_steps():
    p, x = plan("ddim", 10), randn(1, 4, 8, 8)
    a, b = randn(1, 4, 8, 8, seed=1), randn(1, 4, 8, 8, seed=2)
    step = ddim(p, 0.0, lambda: None)
    apart = [step(3, x, *x0_and_eps(x, out, p.now[3], "epsilon")) for out in (a, b, 0.3 * a + 0.7 * b)]
    assert (0.3 * apart[0] + 0.7 * apart[1] - apart[2]).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------------ pictures

def test_all_draw_pictures_from_a_seed_alone():
    sd = StableDiffusion.load(TINY)

    def draw(kind: str) -> torch.Tensor:
        if kind == "demo_fusion":
            free = FreeScale(((64, 64), (64, 96)), upsample="latent", restart=0.0, detail=3.0, attention="global",
                             dilate=0.0)
            return sd.sample("a star", steps=2, model=demo_fusion(sd.unet, 16, seeded()), freescale=free)
        model = scale_crafter(sd.unet, 16) if kind == "scale_crafter" else hidiffusion(sd.unet, 16, seeded())
        return sd.sample("a star", steps=2, height=64, width=96, model=model)
    plain = sd.sample("a star", steps=2, height=64, width=96)
    for kind in ("scale_crafter", "hidiffusion", "demo_fusion"):
        a, b = draw(kind), draw(kind)
        assert torch.equal(a, b) and a.shape == plain.shape and a.isfinite().all()
        assert not torch.allclose(a, plain, atol=0.01)


def test_guidance_of_ordinary_sampling_reaches_them():
    for model in models(UNETS[NARROW]):
        noise, context = randn(1, 4, 16, 16), randn(1, 5, 8)
        *_, (_, x) = generate(model, noise, context, -context, steps=3, freeu=FreeU(1.2, 1.4, 0.9, 0.2))
        assert x.isfinite().all() and math.isfinite(x.std().item())
