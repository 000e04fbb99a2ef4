"""highres.py: at the training size all are the plain U-Net; beyond it, each of their ideas, and what composes."""
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, UNETS, XL, make, randn, seeded
from torch import nn

import highres
from cache import DeepCache, FasterDiffusion, Inherit, TGate
from convert_weights import FAMILIES
from folder import TINY
from freeu import FreeU
from highres import DemoFusion, Dilated, HiDiffusion, ScaleCrafter, Shrunk, redilate, shifted_windows
from maskunet import RandomMasks
from sampler import SAMPLERS, Condition, Plan, Run, begin, ddim, generate, plan, x0_and_eps
from stable_diffusion import StableDiffusion
from unet import CONFIGS, OFF, Attention, Techniques, UNet

NATIVE = 8
ALL = {"ScaleCrafter": ScaleCrafter(native=NATIVE), "HiDiffusion": HiDiffusion(NATIVE),
       "DemoFusion": DemoFusion(native=NATIVE)}
every_baseline = pytest.mark.parametrize("name", ALL)
every_case = pytest.mark.parametrize("name,side", [("ScaleCrafter", 16), ("ScaleCrafter", 32), ("HiDiffusion", 16),
                                                   ("HiDiffusion", 32), ("DemoFusion", 16)])
both_families = pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])


def at(t: float) -> Plan:
    """A plan of one call, at time t."""
    return replace(plan("ddim", 1), times=(t,))


def rows(images: tuple[int, ...], *shape: int, seed: int = 0) -> torch.Tensor:
    """Of each image its own numbers."""
    return torch.cat([randn(1, *shape, seed=100 * seed + k) for k in images])


def conditions(config, images: tuple[int, ...] = (0,)) -> list[Condition]:
    """The prompt and the negative prompt."""
    return [Condition(rows(images, 5, 8, seed=seed), rows(images, 6, seed=seed + 1) if config.add_dim else None)
            for seed in (1, 3)]


def sample(settings: Any, size: tuple[int, int] = (16, 16), config=NARROW, images: tuple[int, ...] = (0,),
           calls: Plan | None = None, cfg_scale: float = 3.0, **more: Any) -> torch.Tensor:
    """The last latents of a run, of two calls if calls doesn't say otherwise."""
    *_, (_, latents) = generate(UNETS[config], rows(images, 4, *size), *conditions(config, images),
                                calls or plan("ddim", 2), cfg_scale, generators=seeded(*images), highres=settings,
                                **more)
    return latents


def started(settings: Any, size: tuple[int, int], t: float = 900.0, config=NARROW) -> Run:
    """A run of one call at time t."""
    return begin(UNETS[config], rows((0,), 4, *size), *conditions(config), at(t), 3.0, None, 1.0, seeded(0),
                 {"highres": settings})


@both_families
@every_baseline
def test_at_the_training_size_all_are_the_plain_unet_with_every_sampler(name, config):
    for sampler in SAMPLERS:
        for more in ({}, {"freeu": FreeU(1.2, 1.4, 0.9, 0.2)}):
            assert torch.equal(*(sample(settings, (8, 7), config, calls=plan(sampler, 2), **more)
                                 for settings in (ALL[name], None)))


@both_families
def test_a_pass_without_changes_is_the_plain_one(config):
    unet, (said, _) = UNETS[config], conditions(config)
    given = randn(1, 4, 9, 14), torch.tensor(900.0), *said[:2]
    for same in (Dilated((1,) * len(unet.units())), Shrunk(None, None, 0, {}, torch.zeros(1))):
        assert torch.equal(unet(*given, Techniques(highres=same)), unet(*given))


@both_families
@every_baseline
@pytest.mark.parametrize("size", [(16, 16), (13, 22), (32, 24)], ids=str)
def test_beyond_the_training_size_all_differ_from_direct_inference(name, size, config):
    for t in (900.0, 500.0):
        out, plain = (sample(settings, size, config, calls=at(t)) for settings in (ALL[name], None))
        assert out.shape == plain.shape and out.isfinite().all() and not torch.allclose(out, plain, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- composition

@both_families
@every_baseline
def test_all_compose_with_freeu_and_masks_and_repeat_themselves(name, config):
    both = {"freeu": FreeU(1.2, 1.4, 0.9, 0.2), "masks": RandomMasks(0.2)}
    out = sample(ALL[name], config=config, **both)
    assert torch.equal(sample(ALL[name], config=config, **both), out)
    for less in ({}, *({k: v} for k, v in both.items())):
        assert not torch.allclose(sample(ALL[name], config=config, **less), out, atol=1e-4)


@both_families
@every_case
def test_batch_mates_do_not_influence_each_other(name, side, config):
    together = sample(ALL[name], (side, side), config, images=(0, 1), masks=RandomMasks(0.2))
    for k in (0, 1):
        alone = sample(ALL[name], (side, side), config, images=(k,), masks=RandomMasks(0.2))
        torch.testing.assert_close(alone, together[k:k + 1], rtol=1e-4, atol=1e-4)


@both_families
@every_case
def test_guidance_in_two_passes_is_guidance_in_one_batch(name, side, config):
    one, two = (sample(ALL[name], (side, side), config, images=(0, 1), low_memory=low, masks=RandomMasks(0.2))
                for low in (False, True))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


CACHES = [DeepCache(5, 1), FasterDiffusion(5, alpha=0.0), FasterDiffusion(5, alpha=0.0, parallel=True),
          Inherit("d4-u4", 5)]


@both_families
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("side", [16, 32])
def test_a_cache_works_across_hidiffusions_changes_of_size(side, cache, config):
    given = dict(size=(side, side), config=config, images=(0, 1), calls=plan("ddim", 10))
    full, cached = (sample(ALL["HiDiffusion"], cache=c, **given) for c in (None, cache))
    assert cached.isfinite().all() and not torch.allclose(cached, full, atol=1e-5)
    every = replace(cache, **({"interval": 1} if isinstance(cache, DeepCache) else {"keys": 1}))
    torch.testing.assert_close(sample(ALL["HiDiffusion"], cache=every, **given), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m-karras", "heun"])
def test_every_change_of_hidiffusions_maps_is_a_key_step(sampler):
    for config in (NARROW, XL):
        for side in (16, 32):
            calls = plan(sampler, 20)
            run = begin(UNETS[config], randn(1, 4, side, side), *conditions(config), calls, 3.0, None, 1.0, seeded(0),
                        {"highres": ALL["HiDiffusion"], "cache": DeepCache(20)})
            state, keys = run.acting["highres"], run.acting["cache"].keys
            changes = {i for i in range(1, run.plan.calls) if not state.alike(i - 1, i)}
            assert changes and changes < keys and len(keys) <= 6       # 2 are the calls of the first step


@both_families
@pytest.mark.parametrize("side", [16, 32])
def test_parallel_faster_diffusion_is_the_serial_one(side, config):
    for name in ("ScaleCrafter", "HiDiffusion"):
        serial, parallel = (sample(ALL[name], (side, side), config, images=(0, 1), calls=plan("ddim", 8),
                                   cache=FasterDiffusion(4, parallel=p)) for p in (False, True))
        torch.testing.assert_close(parallel, serial, rtol=1e-4, atol=1e-4)


def test_tgate_composes_but_reuses_nothing_of_another_size():
    for name in ("ScaleCrafter", "HiDiffusion"):
        plain, *gated = (sample(ALL[name], calls=plan("ddim", 10), tgate=gate) for gate in (
            None, TGate(5), TGate(2, text="compute"), TGate(5, guidance="keep")))
        assert all(x.isfinite().all() and not torch.equal(x, plain) for x in gated)
    with pytest.raises(ValueError, match="after T-GATE's step: give T-GATE a later step, or text=compute"):
        sample(ALL["HiDiffusion"], calls=plan("ddim", 10), tgate=TGate(3))


@pytest.mark.parametrize("more", [{"cache": DeepCache(2)}, {"cache": FasterDiffusion(2, parallel=True)},
                                  {"tgate": TGate(1)}], ids=str)
def test_demofusion_refuses_a_cache_and_tgate_in_one_sentence(more):
    with pytest.raises(ValueError) as error:
        sample(ALL["DemoFusion"], **more)
    assert str(error.value) == "DemoFusion calls the U-Net many times per step: leave out cache and T-GATE"


@every_baseline
def test_what_the_loop_needs_is_named(name):
    with pytest.raises(ValueError, match="pass native"):
        sample(replace(ALL[name], native=None))
    given = randn(1, 4, 16, 16), *conditions(NARROW), plan("ddim", 2)
    if name != "DemoFusion":
        with pytest.raises(ValueError, match=f"{name} needs a UNet"):
            next(generate(lambda x, *_: x, *given, highres=ALL[name]))
    if name != "ScaleCrafter":
        with pytest.raises(ValueError, match=f"{name} draws its windows: pass generators"):
            next(generate(UNETS[NARROW], *given, highres=ALL[name]))


# -------------------------------------------------------------------------------------------------------- ScaleCrafter

def test_redilation_by_whole_numbers_is_dilation_and_between_them_keeps_size_and_constants():
    x = randn(1, 4, 12, 10)
    for stride in (1, 2):
        conv = make(nn.Conv2d, 4, 4, 3, stride, 1)
        assert torch.equal(redilate(conv, x, 1), conv(x))
        want = F.conv2d(x, conv.weight, conv.bias, stride, padding=2, dilation=2)
        assert torch.equal(redilate(conv, x, 2), want) and redilate(conv, x, 2.5).shape == want.shape
    conv, flat = make(nn.Conv2d, 4, 4, 3, 1, 1), torch.ones(1, 4, 21, 21)
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
def test_scalecrafter_dilates_the_published_layers(family, factor, monkeypatch):
    c, seen = CONFIGS[family], {}
    with torch.device("meta"):
        unet = UNet(c)
        names = {conv: name for name, conv in unet.named_modules()}
        said = Condition(torch.empty(1, 5, c.context_dim), torch.empty(1, c.add_dim) if c.add_dim else None)
        noise = torch.empty(1, 4, 8 * factor, 8 * factor)

    def noting(conv, x, p):
        seen[names[conv]] = p
        return redilate(conv, x, p)
    monkeypatch.setattr(highres, "redilate", noting)
    next(generate(unet, noise, said, None, at(1000.0), highres=ScaleCrafter(native=8)))
    levels, resamplers = DILATED[family, factor]
    want = {name: p for name in seen for level, p in levels.items()
            if name.startswith(f"{level}.resnets")} | resamplers
    assert {name: p for name, p in seen.items() if p != 1} == want


def result(run: Run, out: torch.Tensor) -> torch.Tensor:
    """The latents after a run's only call with this prediction."""
    return ddim(run.plan, None)(0, run.noise, *x0_and_eps(run.noise, out, run.plan.now[0], "epsilon"))


def test_damped_guidance_is_the_papers_formula(monkeypatch):
    def fake(self, x, t, context, added=None, on=OFF):                 # a strong pass has dilation in level 1
        return context.source.mean((1, 2))[:, None, None, None] * (1.0 if on.highres.factors[4] > 1 else 0.1) + 0 * x
    monkeypatch.setattr(UNet, "forward", fake)
    for low_memory in (False, True):
        run, (prompt, negative) = started(ALL["ScaleCrafter"], (32, 32), 999.0), conditions(NARROW)
        a, b = prompt.context.mean(), negative.context.mean()
        got = sample(ALL["ScaleCrafter"], (32, 32), calls=at(999.0), cfg_scale=7.5, low_memory=low_memory)
        assert torch.allclose(got, result(run, torch.as_tensor(0.1 * b + 7.5 * (a - b))), atol=1e-5)


def test_without_guidance_there_is_the_strong_pass_alone():
    run, (prompt, _) = started(ALL["ScaleCrafter"], (32, 32)), conditions(NARROW)
    strong = UNETS[NARROW](run.noise, torch.tensor(900.0), prompt.context, on=run.on((0,), (1,)))
    got = sample(ALL["ScaleCrafter"], (32, 32), calls=at(900.0), cfg_scale=1)
    assert torch.allclose(got, result(run, strong), atol=1e-5)


def test_dilation_ends_where_the_family_says():
    for side, until, last in ((16, (0.6, 0.7), 0.6), (32, (0.6, 0.7), 0.7), (16, (0.4, 0.74), 0.4),
                              (32, (0.4, 0.74), 0.74), (16, None, 0.6), (32, None, 0.7)):
        for part, plain in ((last - 0.01, False), (last + 0.01, True)):
            settings = ScaleCrafter(until, NATIVE)
            assert (started(settings, (side, side), 1000 * (1 - part)).on((0,), (0, 1)) == OFF) == plain
            assert torch.equal(*(sample(s, (side, side), calls=at(1000 * (1 - part))) for s in (settings, None))
                               ) == plain
    for family, until in (("sd15", (0.6, 0.7)), ("sd21", (0.4, 0.74)), ("sdxl", (0.6, 0.7))):
        sd = SimpleNamespace(config=FAMILIES[family])
        native = FAMILIES[family].size // 8
        assert ScaleCrafter().bind(sd) == ScaleCrafter(until, native) and HiDiffusion().bind(sd) == HiDiffusion(native)
        assert ScaleCrafter((0.1, 0.2), 5).bind(sd) == ScaleCrafter((0.1, 0.2), 5)


# --------------------------------------------------------------------------------------------------------- HiDiffusion

def test_a_convolution_of_every_second_pixel_is_the_published_one_with_stride_4():
    conv, x = make(nn.Conv2d, 4, 4, 3, 2, 1), randn(1, 4, 16, 12)
    want = F.conv2d(x, conv.weight, conv.bias, stride=4, padding=2, dilation=2)
    assert torch.allclose(Shrunk(3, None, 0, {}, torch.zeros(1)).convolve(conv, x, 3), want, atol=1e-6)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (4, 14)], ids=str)
def test_shifted_windows_are_attention_within_quadrants_of_the_rolled_map(grid):
    a, x, (h, w) = make(Attention, 16, 16, 2, False), randn(4, grid[0] * grid[1], 16), (grid[0] // 2, grid[1] // 2)
    got = shifted_windows(a, x, grid, torch.arange(4))
    for quarter in range(4):
        shift = h * quarter // 4, w * quarter // 4
        rolled = x[quarter].unflatten(0, grid).roll([-s for s in shift], (0, 1))
        want = torch.empty_like(rolled)
        for i in (0, h):
            for j in (0, w):
                part = rolled[i:i + h, j:j + w].flatten(0, 1)[None]
                want[i:i + h, j:j + w] = a(part, a.keys_values(part))[0].unflatten(0, (h, w))
        assert (got[quarter] - want.roll(shift, (0, 1)).flatten(0, 1)).abs().max() < 1e-5
    assert shifted_windows(a, randn(1, 35, 16), (5, 7), torch.ones(1, dtype=torch.long)).shape == (1, 35, 16)


def test_hidiffusion_shrinks_the_maps_when_and_where_it_should():
    def shrunk(config, factor, t, wide: int = 1) -> tuple:
        on = started(ALL["HiDiffusion"], (8 * factor, 8 * factor * wide), t, config).on((0,), (0, 1))
        return on.highres.skipping, on.highres.pooling
    for config, factor, wanted in (
            (NARROW, 2, {700: (3, None), 500: (None, None)}),
            (NARROW, 4, {800: (3, 4), 400: (3, None), 200: (None, None)}),
            (XL, 2, {900: (6, None), 700: (None, 4), 500: (None, None)}),
            (XL, 4, {800: (6, 4), 400: (None, 4), 200: (None, None)})):
        assert {t: shrunk(config, factor, t) for t in wanted} == wanted
    assert shrunk(NARROW, 2, 800, wide=2) == (3, 4) and shrunk(XL, 2, 800, wide=2) == (None, 4)     # both sides count


# ---------------------------------------------------------------------------------------------------------- DemoFusion

def fused(unet, x: torch.Tensor, t: float) -> torch.Tensor:
    """DemoFusion's prediction for both branches of guidance, of a function in the U-Net's place."""
    run = begin(unet, x, *conditions(NARROW), at(t), 3.0, None, 1.0, seeded(0), {"highres": ALL["DemoFusion"]})
    return run.acting["highres"].around(lambda x, i, halves: unet(torch.cat([x] * len(halves))))(x, 0, (0, 1))


def test_demofusion_of_a_pointwise_model_is_the_model_at_the_end_and_its_blurred_latent_at_the_start():
    x = randn(1, 4, 16, 24)
    assert (fused(torch.sin, x, 0.0) - torch.sin(x)).abs().max() < 1e-6
    start = fused(torch.sin, x, 1000.0).asin()                         # c is 1: interleaved parts of the blurred latent
    assert not torch.allclose(start[:1], x, atol=0.1)
    linear = fused(lambda x: x, x, 1000.0)[:1]
    assert torch.allclose(linear.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(linear.std((1, 2, 3)), x.std((1, 2, 3)), atol=1e-4)
    assert (linear[..., 1:] - linear[..., :-1]).square().mean() < 0.5 * (x[..., 1:] - x[..., :-1]).square().mean()


def test_demofusion_calls_the_unet_as_often_as_published():
    for r, windows in ((2, 9), (3, 25), (4, 49)):
        seen = []
        fused(lambda x, seen=seen: seen.append(x.shape) or x, randn(1, 4, 8 * r, 8 * r), 500.0)
        assert len(seen) == windows + r * r and set(seen) == {(2, 4, 8, 8)}


def test_blending_predictions_is_blending_the_latents_after_their_steps():
    p, x = plan("ddim", 10), randn(1, 4, 8, 8)
    a, b = randn(1, 4, 8, 8, seed=1), randn(1, 4, 8, 8, seed=2)
    apart = [ddim(p, None)(3, x, *x0_and_eps(x, out, p.now[3], "epsilon")) for out in (a, b, 0.3 * a + 0.7 * b)]
    assert (0.3 * apart[0] + 0.7 * apart[1] - apart[2]).abs().max() < 1e-5


def test_demofusions_stages_end_with_the_size_that_is_asked_for():
    assert DemoFusion().stages(64, 128, 200).resolutions == ((32, 48), (64, 96), (96, 152), (128, 200))
    assert DemoFusion().stages(64, 64, 48).resolutions == ((64, 48),)
    with pytest.raises(ValueError, match="not of multiples of 8"):
        DemoFusion().stages(64, 100, 100)


# ------------------------------------------------------------------------------------------------------------ pictures

def test_all_draw_pictures_from_a_seed_alone():
    sd, given = StableDiffusion.load(TINY), dict(steps=2, height=64, width=96)
    plain = sd.sample("a star", **given)
    for kind in (ScaleCrafter, HiDiffusion, DemoFusion):
        a, b = (sd.sample("a star", highres=kind(), **given) for _ in range(2))
        assert torch.equal(a, b) and a.shape == plain.shape and a.isfinite().all()
        assert not torch.allclose(a, plain, atol=0.01) and math.isfinite(a.std())
