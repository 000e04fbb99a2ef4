"""freescale.py: against outputs of the official code, every identity of its parts, the cascade, and composition."""
import json
import math
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, NARROW, UNETS, XL, baseline, make, official, official_run, randn, rms, seeded, still_windows
from PIL import Image
from safetensors import safe_open

import freescale
from cache import DeepCache, FasterDiffusion
from clip_text import TextConfig
from folder import TINY, ModelConfig
from freescale import FreeScale, Scale, Stage, attend_parts, attend_windows, fuse, gaussian, place_windows, smooth
from freeu import FreeU
from sampler import SAMPLERS, Condition, NoiseSchedule, generate, plan
from stable_diffusion import StableDiffusion
from unet import OFF, Attention, Techniques, TransformerBlock, UNet, UNetConfig
from vae import VAE

NATIVE = 8                                          # latent side that stands for the training size in most tests here
GOLDEN = safe_open(DATA / "freescale.safetensors", framework="pt")
golden = GOLDEN.get_tensor
CASES = json.loads(GOLDEN.metadata()["meta"])
CONTEXT, OTHER = Condition(randn(1, 5, 8)), Condition(randn(1, 5, 8, seed=1))


def settings(height: int = 16, width: int = 16, **more) -> FreeScale:
    """Of a second stage of latents (height, width)."""
    return FreeScale(((8 * NATIVE,) * 2, (8 * height, 8 * width)) if height >= NATIVE <= width
                     else ((8 * height, 8 * width),), native=NATIVE, **more)


def run(free: FreeScale | None, height: int = 16, width: int = 16, batch: int = 1, config: UNetConfig = NARROW,
        steps: int = 4, sampler: str = "ddim", schedule: NoiseSchedule | None = None, **more) -> list[torch.Tensor]:
    """A second stage by `generate`, from a random picture: the latents of every call."""
    noise, init, context, other = (randn(3, *shape, seed=k)[:batch] for k, shape in enumerate(
        ((4, height, width), (4, height, width), (5, 8), (5, 8))))
    added = randn(3, config.add_dim, seed=3)[:batch] if config.add_dim else None
    more = {"generators": seeded(*range(batch)), "init": init, **more}
    return [x for _, x in generate(UNETS[config], noise, Condition(context, added), Condition(other, added),
                                   plan(sampler, steps, schedule or NoiseSchedule()), freescale=free, **more)]


def stage(free: FreeScale, height: int = 16, width: int = 16, steps: int = 10, config: UNetConfig = NARROW,
          **more) -> Stage:
    """The state of a stage with this noise and init."""
    given = dict(unet=UNETS[config], plan=plan("ddim", steps), noise=randn(1, 4, height, width, seed=1),
                 init=randn(1, 4, height, width), generators=seeded(0))
    given |= {"first": free.first_step(steps), **more}
    return free.start(types.SimpleNamespace(**given))


def scale_at(size: tuple[int, int], **more) -> Scale:
    """What acts at the first call of a stage of latents of this size."""
    return stage(settings(*size, **more), *size).at((0,), (0,))


# --------------------------------------------------------------------------------------------------- official outputs

@pytest.fixture(scope="module")
def block() -> TransformerBlock:
    made = TransformerBlock(16, 12, 2, False)
    made.load_state_dict({key[2:]: golden(key) for key in GOLDEN.keys() if key.startswith("w.")})
    return made.requires_grad_(False)


@pytest.mark.parametrize("case", [name for name in CASES if f"{name}.out" in GOLDEN.keys()])
def test_a_block_with_scale_fusion_equals_the_official_one(block, case):
    facts, views, x = CASES[case], golden(f"{case}.views").long(), golden("A.x")
    window, starts = tuple((views[0, 1::2] - views[0, ::2]).tolist()), views[:, ::2].expand(len(x), -1, -1)
    parts = (2, 2) if facts["fast"] else (1, 1)

    def fused(attention, h, grid, on):
        return fuse(attention, h, grid, window, starts, gaussian(facts["ksize"]), "official", parts)
    text, grid = block.attn2.keys_values(golden("ctx")), (facts["h"], facts["w"])
    assert (block(x, text, grid, Techniques(freescale=fused)) - golden(f"{case}.out")).abs().max() <= 2e-5
    h = block.norm1(x)
    for kind in ("local", "global"):
        got = fuse(block.attn1, h, grid, window, starts, gaussian(1), parts=parts, kind=kind)
        assert (got - golden(f"{case}.{kind}").flatten(1, 2)).abs().max() <= 2e-5
    assert (block(x, text, grid) - golden("A.plain_out")).abs().max() <= 2e-5


@pytest.mark.parametrize("size", [1, 3, 7, 15])
def test_the_blur_equals_the_official_one(size):
    assert (torch.tensor(gaussian(size)) - golden(f"blur.kernel3d_k{size}_1d")).abs().max() < 1e-7
    assert (smooth(golden("blur.x"), gaussian(size), dims=(1, 2, 3)) - golden(f"blur.k{size}")).abs().max() < 2e-6


@pytest.mark.parametrize("case,more", [("plain", {}), ("freeu_fast", {"fast": True})])
def test_the_cascade_equals_the_official_one(case, more, monkeypatch):
    unet, prompt, negative = official_run("sdxl")
    vae = official(VAE, "vae")
    monkeypatch.setattr(freescale, "place_windows", still_windows)
    sd = StableDiffusion(ModelConfig("sdxl", "epsilon", 256, NoiseSchedule(), unet.config, vae.config, TextConfig()),
                         None, [], unet, vae)
    monkeypatch.setattr(sd, "conditions", lambda prompted, *_: prompt if prompted == "a" else negative)
    freeu = FreeU(1.1, 1.2, 0.6, 0.4, version=1) if "freeu" in case else None
    out = sd.sample("a", "b", steps=10, sampler="euler", spacing="leading", seed=5, cfg_scale=7.5, freeu=freeu,
                    freescale=FreeScale(2, blur="official", **more))
    assert rms(out, baseline(f"freescale.{case}.stage1")) < 2e-5


# -------------------------------------------------------------------------------------------------------- scale fusion

def attention(channels: int = 16, heads: int = 2) -> Attention:
    return make(Attention, channels, channels, heads, False).double()


def parts_of(grid=(16, 16), window=(8, 8), rows: int = 2) -> tuple:
    """An attention, hidden states and windows to fuse."""
    starts = place_windows(grid, window, torch.arange(rows))
    return attention(), randn(rows, grid[0] * grid[1], 16, dtype=torch.float64), grid, window, starts


def test_a_blur_that_blurs_nothing_leaves_local_attention_and_one_that_is_zero_leaves_global():
    a, *rest = parts_of()
    local, whole = (fuse(a, *rest, gaussian(1), kind=kind) for kind in ("local", "global"))
    for blur in ("spatial", "official"):
        for same in (gaussian(1), gaussian(7, sigma=1e-3)):
            assert (fuse(a, *rest, same, blur) - local).abs().max() < 1e-12
        assert (fuse(a, *rest, torch.zeros(1), blur) - whole).abs().max() < 1e-12
    assert rms(local, whole) > 0.01


@pytest.mark.parametrize("blur", ["spatial", "official"])
def test_one_window_that_covers_the_map_is_plain_attention(blur):
    a, x, grid, *_ = parts_of()
    starts = place_windows(grid, grid, torch.zeros(len(x), dtype=torch.long))
    assert (fuse(a, x, grid, grid, starts, gaussian(7), blur) - a(x, a.keys_values(x))).abs().max() < 1e-12
    x = randn(2, 4, NATIVE, NATIVE)
    assert torch.equal(predict(x, freescale=scale_at((NATIVE, NATIVE), blur=blur)), predict(x))


VALUES = types.SimpleNamespace(split=lambda x: x, attend=lambda q, k, v, *_: v)        # "attention" that returns values


def sizes(count: int) -> list[tuple[int, int]]:
    some = torch.randint(8, 50, (count - 4, 2), generator=seeded(0)[0]).tolist()
    return [(16, 64), (64, 16), (17, 68), (9, 33), *map(tuple, some)]


@pytest.mark.parametrize("grid", sizes(40), ids=str)
def test_windows_are_a_partition_of_unity_at_any_size(grid):
    for side in (8, 7, 16):
        window = min(side, grid[0]), min(side, grid[1])
        starts = place_windows(grid, window, torch.arange(2))
        v = randn(2, *grid, 3)
        assert (attend_windows(VALUES, v, v, v, window, starts) - v).abs().max() < 1e-6
        assert (starts >= 0).all() and (starts + torch.tensor(window) <= torch.tensor(grid) + 2 * torch.tensor(
            [w // 8 for w in window])).all()


def test_windows_stray_by_an_eighth_and_their_number_is_the_papers():
    for r in (2, 4, 8):
        assert len(place_windows((16 * r, 16 * r), (16, 16), torch.tensor(0))) == (2 * r - 1) ** 2
    many = place_windows((32, 64), (16, 16), torch.arange(200)).unflatten(1, (3, 7))
    assert many[..., 0].amin((0, 2)).tolist() == [0, 8, 18] and many[..., 0].amax((0, 2)).tolist() == [2, 12, 20]
    assert many[..., 1].amin((0, 1)).tolist() == [0, 8, 16, 24, 32, 40, 50]
    assert many[..., 1].amax((0, 1)).tolist() == [2, 12, 20, 28, 36, 44, 52]
    assert len({tuple(m.flatten().tolist()) for m in many}) == 200


def test_sub_grids_are_counted_along_each_side_and_the_blur_by_the_longer_one():
    a, x, grid = make(Attention, 16, 16, 2, False), randn(1, 12 * 20, 16), (12, 20)
    scale = replace(scale_at(grid, fast=True), numbers={a: 3})
    starts = place_windows(grid, (8, 8), scale.seeds.flatten() + 3)
    assert torch.equal(scale(a, x, grid), fuse(a, x, grid, (8, 8), starts, gaussian(5), parts=(2, 3)))


@pytest.mark.parametrize("native", [4, 8, 16, 64])
def test_a_maps_level_is_known_by_its_size_however_halves_are_rounded(native):
    for side in range(native, 20 * native, 3):
        grid, scale = side, stage(FreeScale(((64, 64),), native=native), side, 4).at((0,), (0,))
        for level in range(4):
            assert scale.window((grid, grid)) == (min(-(-native // 2 ** level), grid),) * 2
            grid = (grid + 1) // 2


def test_the_output_projection_may_follow_the_spatial_blur():
    a, x, grid, window, starts = parts_of()
    local, whole = (fuse(a, x, grid, window, starts, gaussian(1), kind=kind).unflatten(1, grid)
                    for kind in ("local", "global"))
    want = (whole + smooth(local - whole, gaussian(3), dims=(1, 2))).flatten(1, 2)
    got, official = (fuse(a, x, grid, window, starts, gaussian(3), blur) for blur in ("spatial", "official"))
    assert (got - want).abs().max() < 1e-12 and rms(official, got) > 0.01


def test_interleaved_parts_are_a_permutation_and_one_part_is_all_of_it():
    for grid in ((16, 16), (9, 20)):
        v = randn(2, *grid, 3)
        for parts in ((1, 1), (2, 2), (2, 3)):
            assert torch.equal(attend_parts(VALUES, v, v, v, parts), v)
# ----------------------------------------------------------------------------------------------- dilated convolutions

def dilate(conv: torch.nn.Conv2d, x: torch.Tensor, d: tuple[int, int]) -> torch.Tensor:
    """The convolution as in the middle of a stage that is d times as large as the training pictures."""
    return scale_at((NATIVE * d[0], NATIVE * d[1])).convolve(conv, x, UNETS[NARROW].middle)


def test_dilation_is_an_ordinary_convolution_of_every_phase_and_1_is_the_identity():
    x = randn(1, 4, 12, 10, dtype=torch.float64)
    for stride in (1, 2):
        conv = make(torch.nn.Conv2d, 4, 4, 3, stride, 1).double()
        assert torch.equal(dilate(conv, x, (1, 1)), conv(x))
        assert torch.equal(scale_at((16, 16)).convolve(conv, x, 1), conv(x))     # the first level is never dilated
    conv = make(torch.nn.Conv2d, 4, 4, 3, 1, 1).double()
    out, tall = dilate(conv, x, (2, 2)), dilate(conv, x, (2, 1))
    for i in range(2):
        for j in range(2):
            assert (out[:, :, i::2, j::2] - conv(x[:, :, i::2, j::2])).abs().max() < 1e-14
        assert (tall[:, :, i::2] - conv(x[:, :, i::2])).abs().max() < 1e-14
    double = lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert (dilate(conv, double(x), (2, 2)) - double(conv(x))).abs().max() < 1e-14
    down = make(torch.nn.Conv2d, 4, 4, 3, 2, 1).double()
    once = F.conv2d(x[:, :, ::2, ::2], down.weight, down.bias, padding=1)
    assert (dilate(down, x, (2, 2)) - once).abs().max() < 1e-14


SD_LAYERS = [f"down_blocks.{level}.{layer}" for level, layers in (
    (1, ["downsamplers.0.conv"]),
    (2, [f"resnets.{i}.conv{j}" for i in (0, 1) for j in (1, 2)] + ["downsamplers.0.conv"]),
    (3, [f"resnets.{i}.conv{j}" for i in (0, 1) for j in (1, 2)])) for layer in layers]
MIDDLE = [f"mid_block.resnets.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
RESTRAINED = [(XL, 2, [n for n in SD_LAYERS if "blocks.3" not in n and n != "down_blocks.2.downsamplers.0.conv"]),
              (NARROW, 2, SD_LAYERS),
              (NARROW, 3, [n for n in SD_LAYERS if "blocks.3" in n or n == "down_blocks.2.downsamplers.0.conv"])]


@pytest.mark.parametrize("config,level,layers", RESTRAINED, ids=["sdxl", "sd", "sd-3"])
def test_exactly_the_published_layers_are_dilated_along_each_axis_by_its_own_factor(config, level, layers, monkeypatch):
    seen, convolve, unet = [], Scale.convolve, UNETS[config]
    names = {conv: name for name, conv in unet.named_modules()}

    def noting(self, conv, x, unit):
        seen.extend([(names[conv], self.dilation(unit))] * (self.dilation(unit) is not None))
        return convolve(self, conv, x, unit)
    monkeypatch.setattr(Scale, "convolve", noting)
    run(replace(settings(32, 16, attention="global"), dilate_from=level), 32, 16, config=config, steps=1)
    assert seen == [(name, (4, 2)) for name in layers + MIDDLE]


# -------------------------------------------------------------------------------------------------------- the cascade

def factor(alpha: float, t: float) -> float:
    """What c is at time t: the part of an enlarged picture of ones without noise, in latents that are zero."""
    calls = types.SimpleNamespace(times=(1000, t), now=(1.0, 1.0), train_steps=1000)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return stage(settings(detail=alpha), plan=replace(plan("ddim", 2), **vars(calls)), first=0, init=zero + 1,
                 noise=zero).mix(1, zero).item()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_the_factor_of_the_detail_control_equals_the_official_one(alpha):
    got = [factor(alpha, t) for t in golden("cos.t").tolist()]
    assert (torch.tensor(got) - golden(f"cos.c_a{alpha}")).abs().max() < 1e-6
    assert [factor(alpha, t) for t in (1000, 500, 0)] == [1, pytest.approx(2 ** -alpha), 0]
    assert factor(0.0, 1) == 1 and factor(math.inf, 999) == 0


def test_at_the_restart_mixing_changes_nothing():
    some = stage(settings(), steps=50)
    i, p, (init, noise) = settings().first_step(50), plan("ddim", 50), (some.run.init, some.run.noise)
    x = math.sqrt(p.now[i]) * init + math.sqrt(1 - p.now[i]) * noise
    assert i == 15 and p.times[i] == 681
    assert torch.equal(some.mix(i, x), x)
    later = stage(settings(), steps=50, first=0)                       # where the same time is not the first call's
    assert (later.mix(i, x) - x).abs().max() < 1e-6
    assert [settings(restart=r).first_step(n) for r, n in
            ((0.29, 100), (0.3, 10), (0.5, 4), (0.0, 5), (0.7, 10))] == [29, 3, 2, 0, 7]


def redraw(model, init: torch.Tensor, noise: torch.Tensor, free: FreeScale, calls) -> torch.Tensor:
    """The last latents of a second stage without guidance, with a function in the U-Net's place."""
    *_, (_, x) = generate(model, noise, Condition(CONTEXT.context.to(noise)), None, calls, init=init,
                          freescale=free, generators=seeded(0))
    return x


def test_detail_0_repeats_the_picture_up_to_the_last_step():
    init, noise, seen, p = randn(1, 4, 16, 16), randn(1, 4, 16, 16, seed=1), [], plan("ddim", 10)
    redraw(lambda x, *_: seen.append(x) or 0.1 * x, init, noise, settings(detail=0.0), p)
    for x, a in zip(seen, p.now[3:], strict=True):
        assert (x - math.sqrt(a) * init - math.sqrt(1 - a) * noise).abs().max() < 1e-6


def test_a_second_stage_of_the_training_size_is_img2img():
    free = settings(NATIVE, NATIVE, detail=math.inf)
    for sampler in SAMPLERS:
        a, b = (run(f, NATIVE, NATIVE, steps=4, strength=0.75, sampler=sampler) for f in (free, None))
        if sampler != "euler-a":                         # whose noise is drawn after the windows' seeds
            assert len(a) == len(b) >= 3 and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return StableDiffusion.load(TINY)


def test_one_resolution_is_bit_equal_to_plain_sampling(tiny):
    plain = tiny.sample("a red circle", steps=2, seed=3)
    assert torch.equal(tiny.sample("a red circle", steps=2, seed=3, freescale=FreeScale(((64, 64),))), plain)


def test_the_same_seed_gives_the_same_picture_whatever_the_global_generator_did(tiny):
    free = FreeScale(((32, 32), (32, 64)), native=8)
    a = tiny.sample(["a red circle", "a star"], steps=3, seed=3, freescale=free)
    torch.randn(5)
    b, c = (tiny.sample(["a red circle", "a star"], steps=3, seed=s, freescale=free) for s in (3, 8))
    alone = tiny.sample("a star", steps=3, seed=4, freescale=free)
    assert a.shape == (2, 4, 8, 16) and torch.equal(a, b) and rms(c, a) > 0.1
    assert rms(alone, a[1:]) < 1e-4                      # windows are an image's own, not the batch's


def test_stages_run_as_many_steps_as_they_should_and_see_the_first_stages_size(tiny, monkeypatch):
    calls, conditions, steps, condition = [], [], [], tiny.conditions

    def noting(self, x, *_, on=OFF):
        calls.append((tuple(x.shape[2:]), None if on.freescale is None else on.freescale.dilated))
        return torch.zeros_like(x)

    def noting_too(prompt, batch, height, width, *known):
        conditions.append((height, width))
        return condition(prompt, batch, height, width, *known)
    monkeypatch.setattr(UNet, "forward", noting)
    monkeypatch.setattr(tiny, "conditions", noting_too)
    tiny.sample("a star", steps=50, freescale=FreeScale(((64, 64), (128, 128))), callback=lambda i, _: steps.append(i))
    assert conditions == [(64, 64)] * 2
    assert calls == [((16, 16), None)] * 50 + [((32, 32), True)] * 20 + [((32, 32), False)] * 15
    assert steps == [*range(50), *range(65, 100)]


def test_enlarging_in_rgb_and_in_latent_space_keep_the_picture(tiny):
    x = tiny.sample("a red circle", steps=8, cfg_scale=4, seed=1)
    small = F.interpolate(tiny.decode(x), (64, 128), mode="bicubic")
    for how in ("rgb", "latent"):
        large = tiny.sample("a red circle", steps=2, init=x, freescale=FreeScale(
            ((64, 64), (64, 128)), upsample=how, detail=0.0, restart=0.5))
        assert large.shape == (1, 4, 16, 32)
        assert (tiny.decode(large) - small).abs().mean() < 0.1
    tiles, coder = [], tiny.vae
    noting = types.SimpleNamespace(config=coder.config, decode=lambda z, tile: tiles.append(tile) or coder.decode(z),
                                   encode=lambda image, tile: tiles.append(tile) or coder.encode(image))
    freescale.enlarge(x, (64, 128), "rgb", noting, randn(1, 4, 16, 32), 12)
    assert tiles == [12, 12]


def draw_map(path: Path, height: int = 128, width: int = 128, white: slice = slice(64, None), mode: str = "L") -> Path:
    """A picture that is white in these columns, black elsewhere."""
    pixels = torch.zeros(height, width, dtype=torch.uint8)
    pixels[:, white] = 255
    Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return path


def test_a_map_of_detail_acts_where_it_says(tmp_path):
    half = draw_map(tmp_path / "half.png", white=slice(57, None))      # of 8 pixels, the first one counts
    for mode in ("L", "1"):
        free = settings(detail=0.0, outside=math.inf, detail_map=draw_map(
            tmp_path / f"{mode}.png", white=slice(57, None), mode=mode))
        some, x = stage(free), randn(1, 4, 16, 16, seed=5)
        out, alpha = some.mix(6, x), some.run.plan.now[6]
        assert torch.equal(out[..., :8], x[..., :8])
        noised = math.sqrt(alpha) * some.run.init + math.sqrt(1 - alpha) * some.run.noise
        assert (out - noised)[..., 8:].abs().max() < 1e-6
    white = draw_map(tmp_path / "white.png", white=slice(None))
    even, number, split = (run(settings(**more))[-1] for more in (dict(detail_map=white), {}, dict(detail_map=half)))
    assert rms(even, number) < 1e-5 < rms(split, number) and split.isfinite().all()


def test_a_map_of_detail_must_be_a_gray_picture_of_a_stages_size(tmp_path):
    small, rgb = draw_map(tmp_path / "small.png", 64, 32), draw_map(tmp_path / "rgb.png", mode="RGB")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for path, words in ((small, r"is 32x64, but must be as large as a stage \(64x64, 128x128\)"),
                        (rgb, "has mode RGB, but a mask is black and white or gray"), (text, "can't read the mask")):
        with pytest.raises(ValueError, match=words):
            FreeScale(2, detail_map=path).fit(8, 64, 64)
    full = FreeScale(2, detail_map=draw_map(tmp_path / "map.png")).fit(8, 64, 64)
    assert full.resolutions == ((64, 64), (128, 128)) and full.native == 8
    assert FreeScale(2, native=5).fit(8, 64, 64).native == 5
    assert FreeScale([[64, 64], [64, 72]]).resolutions == ((64, 64), (64, 72))


# -------------------------------------------------------------------------------------------------------- composition

FREEU = FreeU(1.1, 1.2, 0.6, 0.4, version=1)
CACHES = [DeepCache(2, 2), FasterDiffusion(2, alpha=0.0), FasterDiffusion(2, alpha=0.0, parallel=True)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_with_fusion_that_acts(sampler):
    with_it, without = (run(f, 12, 20, config=XL, sampler=sampler, strength=0.75)[-1] for f in (settings(12, 20), None))
    assert with_it.isfinite().all() and rms(with_it, without) > 1e-3


@pytest.mark.parametrize("more", [dict(fast=True), dict(blur="official"), dict(attention="local"), dict(dilate=0.0),
                                  dict(attention="global"), dict(attention="global", fast=True), dict(detail=0.5)],
                         ids=str)
def test_every_setting_changes_the_result(more):
    assert rms(run(settings(**more))[-1], run(settings())[-1]) > 1e-4


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_freeu_and_caches_compose_with_it(cache):
    full, cached, plain = (run(settings(), freeu=f, cache=c, steps=6)[-1]
                           for f, c in ((FREEU, None), (FREEU, cache), (None, None)))
    assert cached.isfinite().all() and 1e-5 < rms(cached, full) and rms(full, plain) > 1e-3
    every = replace(cache, **({"interval": 1} if isinstance(cache, DeepCache) else {"keys": 1}))
    assert torch.equal(run(settings(), freeu=FREEU, cache=every)[-1], run(settings(), freeu=FREEU)[-1])


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
def test_a_windows_place_depends_on_call_and_layer_alone(config):
    for batch, more in ((1, {}), (2, {"max_batch": 8})):               # so parallel Faster Diffusion is the serial one
        a, b = (run(settings(), batch=batch, config=config, steps=6, freeu=FREEU, cache=FasterDiffusion(
            3, parallel=parallel, **(more if parallel else {})))[-1] for parallel in (False, True))
        assert rms(a, b) < 1e-5
    some, x = stage(settings(), config=config), randn(1, 256, 16)
    one, two = list(some.numbers)[:2]
    same = make(Attention, 16, 16, 2, False)
    here, there, later = (Scale(scale.settings, scale.size, True, scale.seeds, {same: some.numbers[layer]}, config)
                          (same, x, (16, 16)) for scale, layer in (
                              (some.at((2,), (0,)), one), (some.at((2,), (0,)), two), (some.at((3,), (0,)), one)))
    assert rms(there, here) > 1e-4 and rms(later, here) > 1e-4


# of the official code's crashes, with 8 latent pixels for 1024: 1024x1536, 2048x1152, 2048x1536, 1664x2432, 768x768;
# and extremes
@pytest.mark.parametrize("size", [(8, 12), (16, 9), (16, 12), (13, 19), (6, 6), (8, 32), (33, 8), (17, 23), (3, 40)],
                         ids=str)
def test_every_aspect_ratio_works_also_those_that_crash_the_official_code(size):
    for more in ({}, {"fast": True, "blur": "official"}):
        assert run(settings(*size, **more), *size, steps=2)[-1].isfinite().all()


def predict(x: torch.Tensor, unet: UNet = UNETS[NARROW], **techniques) -> torch.Tensor:
    """One pass at time 500."""
    return unet(x, torch.tensor([500]), randn(1, 5, 8).to(x.dtype).expand(len(x), -1, -1), on=Techniques(**techniques))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(dtype):
    x, narrow = randn(1, 4, 16, 16), make(UNet, NARROW).to(dtype)
    for blur in ("spatial", "official"):
        full, half = (predict(x.to(unet.conv_in.weight.dtype), unet, freescale=stage(
            settings(blur=blur), unet=unet).at((0,), (0,))) for unet in (UNETS[NARROW], narrow))
        assert half.dtype == dtype and half.isfinite().all() and rms(half.float(), full) < 0.05


def test_a_steps_windows_are_the_same_however_often_it_is_asked_for():
    x, some = randn(1, 4, 16, 16), stage(settings())
    a, b, other = (predict(x, freescale=some.at((i,), (0,))) for i in (2, 2, 3))
    both = predict(x.repeat(2, 1, 1, 1), freescale=some.at((2,), (0, 1)))
    assert torch.equal(a, b) and rms(other, a) > 1e-4
    assert rms(both[:1], a) < 1e-5 and rms(both[1:], a) < 1e-5         # branches of guidance share windows


def test_gradients_pass_through_scale_fusion():
    x = randn(1, 4, 16, 16).requires_grad_()
    predict(x, freescale=scale_at((16, 16))).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


# -------------------------------------------------------------------------------------------------------- bad settings

@pytest.mark.parametrize("more,words", [
    (dict(resolutions=()), "at least one resolution"),
    (dict(resolutions=((64, 100),)), "100x64 is not of multiples of 8; the nearest is 96x64"),
    (dict(resolutions=((128, 128), (64, 256))), "must not fall, but 128x128 is followed by 256x64"),
    (dict(restart=1.0), "restart is a fraction"), (dict(dilate=1.5), "dilate is a fraction"),
    (dict(dilate_from=0), "level from 1 up"), (dict(upsample="pixels"), "rgb or latent"),
    (dict(blur="gauss"), "spatial or official"), (dict(attention="none"), "fused or global or local"),
    (dict(detail=-1.0), "0 or more"), (dict(detail=math.nan), "0 or more"),
    (dict(resolutions=3), "2, 4 or 8 times, not 3"), (dict(outside=0.1), "does nothing without detail_map"),
    (dict(blur="official", attention="local"), "blur does nothing with attention=local"),
    (dict(fast=True, attention="local"), "fast does nothing with attention=local"),
    (dict(dilate=0.0, dilate_from=3), "dilate_from does nothing if dilate isn't above restart"),
    (dict(dilate=0.3), "dilate does nothing up to restart"),
    (dict(outside=-1.0), "outside is 0 or more"), (dict(native=0), "native is a side of latents")])
def test_bad_settings_are_named(more, words):
    with pytest.raises(ValueError) as error:
        FreeScale(**{"resolutions": ((64, 64),), **more})
    assert words in str(error.value)


def test_settings_without_an_effect_in_a_run_are_named():
    for free, words in ((FreeScale(2, dilate_from=5), "dilate_from is at most 4 with this model"),
                        (FreeScale(((64, 64),), fast=True), "fast does nothing without a second resolution")):
        with pytest.raises(ValueError, match=words):
            free.check(NARROW, 10)
    FreeScale(2, dilate_from=4).check(NARROW, 10)
    FreeScale(((64, 64),), native=8).check(NARROW, 10)


def test_what_the_loop_needs_is_named(tiny):
    for free, more, words in ((settings(), dict(init=None), "pass it as init"),
                              (settings(), dict(generators=None), "one per image"),
                              (replace(settings(), native=None), {}, "pass native")):
        with pytest.raises(ValueError, match=words):
            run(free, **more)
    with pytest.raises(ValueError, match="ends with 128x128, so leave height and width"):
        tiny.sample("a star", steps=1, height=64, freescale=FreeScale(((64, 64), (128, 128))))


def test_the_schedule_of_the_restart_is_the_models():
    x = [run(settings(), schedule=NoiseSchedule(beta_end=b))[-1] for b in (0.012, 0.02)]
    assert rms(*x) > 1e-2
