"""highres.py: against outputs of the official codes; at the training size the plain U-Net; each idea; what composes."""
import json
import math
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BASELINES, NARROW, UNETS, XL, baseline, make, official_run, randn, rms, seeded, still_windows
from torch import nn

import highres
from cache import DeepCache, FasterDiffusion, Inherit, TGate
from folder import TINY
from freescale import enlarge
from freeu import FreeU
from highres import DemoFusion, Dilated, HiDiffusion, ScaleCrafter, Shrunk, redilate, shifted_windows
from maskunet import RandomMasks
from sampler import SAMPLERS, Condition, Plan, Run, begin, ddim, generate, plan, x0_and_eps
from stable_diffusion import StableDiffusion
from txt2img import parse_arguments
from unet import OFF, Attention, Techniques, UNet

NATIVE = 8
ALL = {"ScaleCrafter": ScaleCrafter(native=NATIVE), "HiDiffusion": HiDiffusion(NATIVE),
       "DemoFusion": DemoFusion(native=NATIVE)}
every_baseline = pytest.mark.parametrize("name", ALL)
every_case = pytest.mark.parametrize("name,side", [("ScaleCrafter", 16), ("ScaleCrafter", 32), ("HiDiffusion", 16),
                                                   ("HiDiffusion", 32), ("DemoFusion", 16)])
both_families = pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
START = plan("ddim", 1)                                                # one call, at which all of them act


def rows(images: tuple[int, ...], *shape: int, seed: int = 0) -> torch.Tensor:
    """Of each image its own numbers."""
    return torch.cat([randn(1, *shape, seed=100 * seed + k) for k in images])


def conditions(config, images: tuple[int, ...] = (0,)) -> list[Condition]:
    """The prompt and the negative prompt."""
    return [Condition(rows(images, 5, 8, seed=seed),
                      rows(images, config.add_dim, seed=seed + 1) if config.add_dim else None) for seed in (1, 3)]


def sample(settings: Any, side: int | tuple[int, int] = 16, config=NARROW, images: tuple[int, ...] = (0,),
           calls: Plan = START, cfg_scale: float = 3.0, **more: Any) -> torch.Tensor:
    """The last latents of a run."""
    size = (side, side) if isinstance(side, int) else side
    *_, (_, latents) = generate(UNETS[config], rows(images, 4, *size), *conditions(config, images), calls, cfg_scale,
                                generators=seeded(*images), highres=settings, **more)
    return latents


def started(settings: Any, size: tuple[int, int], calls: Plan = START, config=NARROW, **more: Any) -> Run:
    """A run before its first call."""
    unet = UNETS[config] if config in UNETS else make(UNet, config)
    return begin(unet, rows((0,), 4, *size), *conditions(config), calls, 3.0, None, 1.0, seeded(0),
                 {"highres": settings, **more})


# ---------------------------------------------------------------------------------------------------- official outputs

@pytest.mark.parametrize("case,steps", [("sd21.x2", 50), ("sd15.x4", 10), ("sd21.x4", 10), ("sdxl.x4", 10)])
def test_scalecrafter_equals_the_official_code(case, steps):
    *_, (_, out) = islice(generate(*noised(f"scalecrafter.{case}"), plan("ddim", 50, spacing="leading"),
                                   highres=ScaleCrafter(native=8)), steps)
    assert rms(out, baseline(f"scalecrafter.{case}.{'out' if steps == 50 else 'after_step_9'}")) < 2e-5


def noised(case: str) -> tuple:
    """The U-Net, the noise and the prompts of an official case."""
    unet, prompt, negative = official_run(case.split(".")[1] if case[:4] != "demo" else "sdxl")
    return unet, baseline(f"{case}.noise"), prompt, negative


@pytest.mark.parametrize("case", ["sd15.16x32", "sd15.20x20", "sd15.28x28", "sd15.32x32", "sdxl.40x40", "sdxl.64x64"])
def test_hidiffusion_equals_the_official_code(case, monkeypatch):
    quarters = iter(baseline(f"hidiffusion.{case}.quarters").tolist())          # one draw per windowed attention
    monkeypatch.setattr(highres, "scramble", lambda seeds: torch.full_like(seeds, next(quarters)))
    *_, (_, out) = generate(*noised(f"hidiffusion.{case}"), plan("ddim", 10, spacing="leading"), generators=seeded(0),
                            highres=HiDiffusion(8 if "sd15" in case else 16))
    assert rms(out, baseline(f"hidiffusion.{case}.out")) < 2e-5 and not list(quarters)


@pytest.mark.parametrize("crops", [True, False])
def test_demofusion_equals_the_official_code(crops, monkeypatch):
    monkeypatch.setattr(highres, "place_windows", still_windows)
    of, settings = "demofusion.24x32", DemoFusion(native=16, crops=crops)
    stage = replace(settings.stages(128, *(8 * side for side in baseline(f"{of}.init").shape[2:])), native=16)
    *_, (_, out) = generate(*noised(of), plan("ddim", 6, spacing="leading"), init=baseline(f"{of}.init"),
                            generators=seeded(0), highres=settings, freescale=stage)
    assert rms(out, baseline(f"{of}.out" if crops else f"{of}.out_no_crops")) < 2e-5
    if crops:
        first, want = baseline(f"{of}.first"), baseline(f"{of}.out_matched")
        enlarged = enlarge(first, (192, 256), "latent", SimpleNamespace(config=SimpleNamespace(factor=8)), None)
        assert rms(enlarged, baseline(f"{of}.init")) < 1e-6
        assert rms(settings.finish(out, first), want) < 2e-5
        assert torch.equal(replace(settings, match=False).finish(out, first), out)


LISTS = json.loads(BASELINES.metadata()["scalecrafter.lists"])
LIKE = {"sd1.5": (NARROW, 512), "sd2.1": (replace(NARROW, linear_proj=True), 512), "sdxl": (XL, 1024)}


@pytest.mark.parametrize("released", LISTS)
def test_scalecrafter_dilates_the_published_layers_in_the_published_steps(released, monkeypatch):
    want, (family, size), seen = LISTS[released], released.split(), []
    config, native = LIKE[family]
    run = started(ScaleCrafter(native=8), [8 * int(side) // native for side in size.split("x")],
                  plan("ddim", 50), config)
    state, names = run.acting["highres"], {conv: name for name, conv in run.unet.named_modules()}
    monkeypatch.setattr(highres, "redilate", lambda conv, x, p: seen.append((names[conv], p)) or redilate(conv, x, p))
    next(generate(run.unet, run.noise, *conditions(config), run.plan, highres=state.settings))
    for passed, dilations in zip((seen[:len(seen) // 2], seen[len(seen) // 2:]) if want["damped_dilations"] else
                                 (seen,), (want["dilations"], want["damped_dilations"])):
        got = {name: p for name, p in passed if p != 1}
        assert got == {name: p for name, _ in passed for part, p in dilations.items() if name.startswith(part)}
    strong, weak = ([state.at((i,), (0,), weak=w) for i in range(50)] for w in (False, True))
    assert [on is not None for on in strong] == [i < want["dilated_steps"] for i in range(50)]
    assert sum(a != b for a, b in zip(strong, weak)) == want["damped_guidance_steps"]
    n, first = want["dilated_steps"], strong[0].factors
    for i, on in enumerate(strong[:n]):
        assert on.factors == (tuple(1 if p == 1 else max(math.ceil(p * (n - i) / n), 2) for p in first)
                              if want["shrinking"] else first)


# -------------------------------------------------------------------------------------------------------- on and off

@both_families
def test_at_the_training_size_all_are_the_plain_unet_with_every_sampler(config):
    for sampler in SAMPLERS:
        plain, *others = (sample(settings, (8, 7), config, calls=plan(sampler, 2), freeu=FreeU(1.2, 1.4, 0.9, 0.2))
                          for settings in (None, *ALL.values()))
        assert all(torch.equal(other, plain) for other in others)


@both_families
def test_a_pass_without_changes_is_the_plain_one(config):
    unet, (said, _) = UNETS[config], conditions(config)
    given = randn(1, 4, 9, 14), torch.tensor(900.0), *said[:2]
    for same in (Dilated((1,) * len(unet.units())), Shrunk(None, None, 0, {}, torch.zeros(1))):
        assert torch.equal(unet(*given, Techniques(highres=same)), unet(*given))


@both_families
@every_baseline
def test_beyond_the_training_size_all_differ_from_direct_inference_and_repeat_themselves(name, config):
    out, again, plain = (sample(settings, (11, 18), config) for settings in (ALL[name], ALL[name], None))
    assert out.shape == plain.shape and not torch.allclose(out, plain, atol=1e-4) and torch.equal(out, again)


# --------------------------------------------------------------------------------------------------------- composition

@both_families
@every_case
def test_images_do_not_see_each_other_and_guidance_in_two_passes_is_that_in_one(name, side, config):
    one = sample(ALL[name], side, config, images=(0, 1), masks=RandomMasks(0.2))
    two = sample(ALL[name], side, config, images=(0, 1), masks=RandomMasks(0.2), low_memory=True)
    alone = sample(ALL[name], side, config, images=(1,), masks=RandomMasks(0.2))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, one[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config,side", [(NARROW, 16), (NARROW, 32), (XL, 16)], ids=["sd-2x", "sd-4x", "sdxl-2x"])
def test_caches_work_across_hidiffusions_changes_of_size(config, side):
    given = dict(side=side, config=config, images=(0, 1), calls=plan("ddim", 7))
    full = sample(ALL["HiDiffusion"], **given)
    for cache in (DeepCache(5, 1), FasterDiffusion(5, alpha=0.0), FasterDiffusion(5, alpha=0.0, parallel=True),
                  Inherit("d4-u4", 5)):
        cached = sample(ALL["HiDiffusion"], cache=cache, **given)
        assert cached.isfinite().all() and not torch.allclose(cached, full, atol=1e-5)
    for cache in (DeepCache(1, 1), Inherit("d4-u4", 1)):
        torch.testing.assert_close(sample(ALL["HiDiffusion"], cache=cache, **given), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m-karras", "heun"])
def test_every_change_of_hidiffusions_maps_is_a_key_step(sampler):
    for config in (NARROW, XL):
        for side in (16, 32):
            run = started(ALL["HiDiffusion"], (side, side), plan(sampler, 20), config, cache=DeepCache(20))
            state, keys = run.acting["highres"], run.acting["cache"].keys
            changes = {i for i in range(1, run.plan.calls) if not state.alike(i - 1, i)}
            assert changes and changes < keys and len(keys) <= 6       # 2 are the calls of the first step


@pytest.mark.parametrize("config,side", [(NARROW, 32), (XL, 16)], ids=["sd", "sdxl"])
def test_parallel_faster_diffusion_is_the_serial_one(config, side):
    for name in ("ScaleCrafter", "HiDiffusion"):
        serial, parallel = (sample(ALL[name], side, config, images=(0, 1), calls=plan("ddim", 6),
                                   cache=FasterDiffusion(4, parallel=p)) for p in (False, True))
        torch.testing.assert_close(parallel, serial, rtol=1e-4, atol=1e-4)


def test_tgate_composes_but_reuses_nothing_of_another_size():
    for name in ("ScaleCrafter", "HiDiffusion"):
        plain, *gated = (sample(ALL[name], calls=plan("ddim", 5), tgate=gate) for gate in (
            None, TGate(3), TGate(1, text="compute"), TGate(3, guidance="keep"), TGate(3, version=2, warm_up=0)))
        assert all(x.isfinite().all() and not torch.equal(x, plain) for x in gated)
    for step in (1, 2):                                                # maps grow at step 2
        with pytest.raises(ValueError, match="after T-GATE's step: give T-GATE a later step, or text=compute"):
            sample(ALL["HiDiffusion"], calls=plan("ddim", 5), tgate=TGate(step))


@pytest.mark.parametrize("more", [{"cache": DeepCache(2)}, {"cache": FasterDiffusion(2, parallel=True)},
                                  {"tgate": TGate(1)}], ids=str)
def test_demofusion_refuses_a_cache_and_tgate_in_one_sentence(more):
    with pytest.raises(ValueError) as error:
        sample(ALL["DemoFusion"], calls=plan("ddim", 2), **more)
    assert str(error.value) == "DemoFusion calls the U-Net many times per step: leave out cache and T-GATE"


@every_baseline
def test_what_the_loop_needs_is_named(name):
    with pytest.raises(ValueError, match="pass native"):
        sample(replace(ALL[name], native=None))
    given = randn(1, 4, 16, 16), *conditions(NARROW), START
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


def test_without_guidance_there_is_the_strong_pass_alone():
    run, (prompt, _) = started(ALL["ScaleCrafter"], (32, 32)), conditions(NARROW)
    strong = UNETS[NARROW](run.noise, torch.tensor(run.plan.times[0]), prompt.context, on=run.on((0,), (1,)))
    want = ddim(run.plan, None)(0, run.noise, *x0_and_eps(run.noise, strong, run.plan.now[0], "epsilon"))
    assert torch.allclose(sample(ALL["ScaleCrafter"], 32, cfg_scale=1), want, atol=1e-5)


def test_the_weak_pass_has_the_other_techniques_too(monkeypatch):
    seen, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, text, added=None, on=OFF: seen.append(on) or forward(
        self, x, t, text, added, on))
    sample(ALL["ScaleCrafter"], 32, freeu=FreeU(1.2, 1.4, 0.9, 0.2), masks=RandomMasks(0.2), cache=DeepCache(1))
    strong, weak = seen
    assert weak.highres != strong.highres and weak.freeu == strong.freeu is not None is not weak.masks
    assert strong.cache is not None is weak.cache
    sample(ALL["ScaleCrafter"], 16)                                    # without noise-damped guidance
    assert len(seen) == 3


def test_until_and_native_are_obeyed_and_whole_steps_count():
    for sampler, steps, dilated in (("ddim", 20, 10), ("heun", 6, 6), ("euler", 7, 4)):
        run = started(ScaleCrafter(0.5, NATIVE), (16, 16), plan(sampler, steps))
        on = [run.on((i,), (0, 1)) != OFF for i in range(run.plan.calls)]
        assert on == [True] * dilated + [False] * (len(on) - dilated)
    sd = SimpleNamespace(config=SimpleNamespace(size=768, vae=SimpleNamespace(factor=8)))
    for settings in (ScaleCrafter(0.2), HiDiffusion(), DemoFusion(2.0)):
        assert settings.bind(sd) == replace(settings, native=96)
        assert replace(settings, native=5).bind(sd) == replace(settings, native=5)


# --------------------------------------------------------------------------------------------------------- HiDiffusion

def test_hidiffusion_shrinks_the_maps_when_and_where_it_should():
    near, far, near_xl, far_xl = (  # the steps of 10 at which units are skipping and pooling
        {(3, None): 4, (None, None): 6}, {(3, 4): 3, (3, None): 4, (None, None): 3},
        {(6, None): 1, (None, 4): 3, (None, None): 6}, {(6, 4): 3, (None, 4): 4, (None, None): 3})
    for config, size, wanted in ((NARROW, (16, 16), near), (NARROW, (31, 40), near), (NARROW, (32, 40), far),
                                 (XL, (16, 64), near_xl), (XL, (31, 31), near_xl), (XL, (32, 32), far_xl)):
        run = started(ALL["HiDiffusion"], size, plan("ddim", 10), config)
        on = [run.on((i,), (0, 1)).highres for i in range(10)]
        assert [(a.skipping, a.pooling) for a in on] == [what for what, n in wanted.items() for _ in range(n)]


def test_odd_maps_are_halved_rounding_up_and_get_back_the_size_of_the_skip(monkeypatch):
    sizes, resample, a = [], highres.resample, make(Attention, 16, 16, 2, False)
    monkeypatch.setattr(highres, "resample", lambda x, grid, size: sizes.append(tuple(size)) or resample(x, grid, size))
    out = shifted_windows(a, randn(1, 35, 16), (5, 7), torch.ones(1, dtype=torch.long))
    assert out.shape == (1, 35, 16) and sizes == [(6, 8), (5, 7)]
    shrunk = Shrunk(None, 4, 0, {}, torch.zeros(1))
    half = shrunk.resize(4, randn(1, 2, 5, 8))
    assert half.shape == (1, 2, 3, 4) and shrunk.resize(5, half) is half
    assert shrunk.resize(9, half, randn(1, 2, 5, 8)).shape == (1, 2, 5, 8)


def test_each_attention_and_each_step_have_windows_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(highres, "shifted_windows", lambda a, x, grid, quarters, on: seen.append(
        quarters.tolist()) or a(x, a.keys_values(x)))
    sample(ALL["HiDiffusion"], images=(0, 1), calls=plan("ddim", 4))
    assert len(seen) == 4 * 5 and all(branches[:2] == branches[2:] for branches in seen)
    assert {q for rows in seen for q in rows} == {0, 1, 2, 3} and len({tuple(rows) for rows in seen[:5]}) > 1


# ---------------------------------------------------------------------------------------------------------- DemoFusion

def test_demofusion_calls_the_unet_as_often_as_published():
    for r, windows in ((2, 9), (3, 25), (4, 49)):
        seen, x = [], randn(1, 4, 8 * r, 8 * r)
        next(generate(lambda x, *_, seen=seen: seen.append(x.shape) or x, x, *conditions(NARROW), START,
                      generators=seeded(0), highres=ALL["DemoFusion"]))
        assert len(seen) == windows + r * r and set(seen) == {(2, 4, 8, 8)}


def test_demofusions_windows_cover_a_side_that_is_shorter_than_theirs():
    *_, (_, out) = generate(lambda x, *_: 0.5 * x, randn(1, 4, 6, 16), *conditions(NARROW), START,
                            generators=seeded(0), highres=ALL["DemoFusion"])
    assert out.isfinite().all()


def test_demofusions_stages_end_with_the_size_that_is_asked_for():
    assert DemoFusion().stages(64, 128, 200).resolutions == ((32, 48), (64, 96), (96, 152), (128, 200))
    assert DemoFusion().stages(64, 64, 48).resolutions == ((64, 48),)
    with pytest.raises(ValueError, match="not of multiples of 8"):
        DemoFusion().stages(64, 100, 100)


def test_in_every_stage_sdxl_is_told_the_last_size_and_latents_end_with_the_first_stages_mean(narrow_xl, monkeypatch):
    sd, sizes, seen, condition = StableDiffusion.load(narrow_xl), [], [], StableDiffusion.conditions
    monkeypatch.setattr(StableDiffusion, "conditions", lambda self, prompt, batch, *size: sizes.append(size) or
                        condition(self, prompt, batch, *size))
    out = sd.sample("a", steps=2, height=64, width=64, highres=DemoFusion(), callback=lambda i, x: seen.append(x))
    assert set(sizes) == {(64, 64)}
    first, last = seen[1], seen[-1]
    assert first.shape[2:] == (8, 8) and not torch.allclose(last.std(), first.std(), rtol=1e-3)
    torch.testing.assert_close(torch.stack(torch.std_mean(out)), torch.stack(torch.std_mean(first)))
    assert torch.equal(sd.sample("a", steps=2, height=64, width=64, highres=DemoFusion(match=False)), last)


# ------------------------------------------------------------------------------------------------------- the whole way

@pytest.mark.parametrize("settings,words", [
    (lambda: ScaleCrafter(0.0), "until is a fraction of the steps, above 0 and up to 1, not 0.0"),
    (lambda: DemoFusion(0.0), "sigma must be above 0 and up to 100"), (lambda: HiDiffusion(0), "native is a side"),
    (lambda: DemoFusion(crops=False).check(NARROW, 10), "crops=no does nothing without SDXL")])
def test_bad_and_idle_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        settings()
    DemoFusion(crops=False).check(XL, 10)


def test_scalecrafters_docstring_has_the_releases_other_flags(monkeypatch):
    flags = "--sampler ddim --eta 1 --freeu version=1"
    assert flags in " ".join(ScaleCrafter.__doc__.split())
    monkeypatch.setattr("sys.argv", ["txt2img.py", "a star", "--highres", "scalecrafter", *flags.split()])
    args = parse_arguments()
    assert (args.sampler, args.eta, args.freeu) == ("ddim", 1, FreeU(version=1))


def test_all_draw_pictures_from_a_seed_alone():
    sd, given = StableDiffusion.load(TINY), dict(steps=2, height=64, width=96)
    plain = sd.sample("a star", **given)
    for kind in (ScaleCrafter, HiDiffusion, DemoFusion):
        a, b = (sd.sample("a star", highres=kind(), **given) for _ in range(2))
        assert torch.equal(a, b) and a.shape == plain.shape and a.isfinite().all()
        assert not torch.allclose(a, plain, atol=0.01)
