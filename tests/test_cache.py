"""cache.py: against outputs of the official codes, partial passes against full ones, schedules, counts, no leaks."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache import DeepCache, FasterDiffusion, Features, nonuniform_keys
from freeu import FreeU, skip_tuning
from sampler import SAMPLERS, generate, plan, x0_and_eps
from unet import UNet, UNetConfig

NARROW = UNetConfig(channels=(8, 16, 16, 16), heads=(2, 2, 2, 2), context_dim=8, groups=4)
XL = UNetConfig(channels=(8, 16, 16), depth=(0, 2, 3), mid_depth=3, heads=(2, 2, 2), context_dim=8, linear_proj=True,
                add_dim=6, groups=4)
ALL_BRANCHES = [(config, b) for config in (NARROW, XL) for b in range(3 * len(config.channels))]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(config: UNetConfig) -> UNet:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return UNet(config).requires_grad_(False)


UNETS = {config: make(config) for config in (NARROW, XL)}


def run(cache=None, batch: int = 2, guided: bool = True, config: UNetConfig = NARROW, **settings) -> list[torch.Tensor]:
    noise, context, other = (randn(3, *shape, seed=k)[:batch] for k, shape in enumerate(((4, 8, 8), (5, 8), (5, 8))))
    added = randn(3, config.add_dim, seed=3)[:batch] if config.add_dim else None
    generators = [torch.Generator().manual_seed(k) for k in range(batch)]
    return [x for _, x in generate(UNETS[config], noise, context, other if guided else None, added=added, cache=cache,
                                   negative_added=added, generators=generators, **{"steps": 10, **settings})]


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


# ------------------------------------------------------------------------------------------------- official outputs

GOLDEN = load_file(Path(__file__).parent / "data/cache.safetensors")


@pytest.fixture(scope="module")
def official():
    unet = UNet(UNetConfig(channels=(32, 64, 64, 64), context_dim=32)).requires_grad_(False)
    unet.load_state_dict({k.removeprefix("unet."): v.float() for k, v in GOLDEN.items() if k.startswith("unet.")})

    def last(cache=None) -> torch.Tensor:
        *_, (_, x) = generate(unet, GOLDEN["latents"], GOLDEN["cond"], GOLDEN["uncond"], steps=10, cache=cache)
        return x
    return last


def test_the_plain_run_equals_the_official_baseline(official):
    assert rms(official(), GOLDEN["ddim10.baseline"]) < 1e-4


@pytest.mark.parametrize("branch", range(12))
def test_deepcache_equals_the_official_package_at_every_branch(official, branch):
    want = GOLDEN.get(f"ddim10.deepcache_plugin.N3.branch{branch}")
    assert rms(official(DeepCache(3, branch)), want) < 1e-4 and rms(want, GOLDEN["ddim10.baseline"]) > 1e-3


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.003])
def test_faster_diffusion_equals_the_official_code(official, parallel, alpha):
    want = GOLDEN[f"ddim10.fd.{'parallel' if parallel else 'serial'}.50ls.alpha{alpha}"]
    cache = FasterDiffusion("paper", parallel=parallel, alpha=alpha, official_order=True)
    assert rms(official(cache), want) < (1e-5 if alpha else 1e-4)     # the order of injection alone is worth 3e-5


# ---------------------------------------------------------------------------------------------------- partial passes

@pytest.mark.parametrize("config,branch", ALL_BRANCHES)
def test_a_partial_pass_with_features_of_the_same_step_is_the_full_pass(config, branch):
    unet, x, t, context = UNETS[config], randn(2, 4, 8, 8), torch.tensor([500, 3]), randn(2, 5, 8, seed=1)
    added = randn(2, 6) if config.add_dim else None
    plain = unet(x, t, context, added)
    for kind in (branch, None):
        features = Features(frozenset({0}), 2, len(unet.up_units()), kind)
        assert torch.equal(unet(x, t, context, added, cache=features.at(0)), plain)
        assert torch.equal(unet(x, t, context, added, cache=features.at(1)), plain)


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("cache", [DeepCache(1, 2), FasterDiffusion(1), FasterDiffusion(1, parallel=True)], ids=str)
def test_every_step_a_key_step_is_bit_equal_to_no_cache(config, cache):
    assert all(torch.equal(a, b) for a, b in zip(run(cache, config=config), run(config=config)))


def test_error_falls_with_the_branch_and_rises_with_the_interval():
    plain = run()[-1]
    by_branch = [rms(run(DeepCache(3, b))[-1], plain) for b in (0, 4, 8, 11)]
    by_interval = [rms(run(DeepCache(n, 1))[-1], plain) for n in (2, 3, 5)]
    assert by_branch == sorted(by_branch, reverse=True) and by_interval == sorted(by_interval)


def test_between_key_steps_faster_diffusion_ignores_the_latent_and_deepcache_does_not():
    unet, context = UNETS[NARROW], randn(1, 5, 8)
    for branch, same in ((None, True), (0, False)):
        features = Features(frozenset({0}), 2, 12, branch)
        unet(randn(1, 4, 8, 8), torch.tensor(500), context, cache=features.at(0))
        a, b = (unet(randn(1, 4, 8, 8, seed=s), torch.tensor(480), context, cache=features.at(1)) for s in (1, 2))
        assert torch.equal(a, b) is same


def test_what_is_kept_is_never_written_to_even_with_freeu_at_any_branch():
    unet, context, f = UNETS[NARROW], randn(2, 5, 8), FreeU(1.5, 1.6, 0.5, 0.2, skip_scale=skip_tuning(0.8))
    for branch in (None, *range(12)):
        features = Features(frozenset({0}), 3, 12, branch)
        unet(randn(2, 4, 8, 8), torch.tensor(500), context, freeu=f, cache=features.at(0))
        kept = [x.clone() for x in (features.h, *features.skips)]
        outs = [unet(randn(2, 4, 8, 8), torch.tensor(500), context, freeu=f, cache=features.at(i)) for i in (1, 2)]
        assert all(torch.equal(a, b) for a, b in zip(kept, (features.h, *features.skips)))
        assert torch.equal(*outs)


# ---------------------------------------------------------------------------------------- serial, parallel, composition

@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batch,guided", [(1, True), (3, True), (1, False), (3, False)])
def test_parallel_equals_serial(sampler, batch, guided):
    for alpha in (0.0, 0.003):
        serial, parallel, split = (run(FasterDiffusion((0, 1, 5), alpha=alpha, **more), batch, guided, sampler=sampler)
                                   for more in (dict(), dict(parallel=True), dict(parallel=True, max_batch=4)))
        for a, b, c in zip(serial, parallel, split):
            assert rms(b, a) < 2e-6 and rms(c, a) < 2e-6


def test_sdxl_conditions_and_stochastic_samplers_work_in_parallel():
    for more in (dict(eta=1.0), dict(sampler="euler-a")):
        a, b = (run(FasterDiffusion(3, parallel=p), config=XL, **more)[-1] for p in (False, True))
        assert rms(b, a) < 2e-6 and rms(a, run(config=XL, **more)[-1]) > 1e-4


FREEU = FreeU(1.5, 1.6, 0.9, 0.2, backbone=(0, 0.6), skip=(0.25, 1), skip_scale=skip_tuning(0.9))


def test_freeu_that_changes_with_time_is_the_same_in_series_and_in_parallel():
    a, b = (run(FasterDiffusion((0, 2), parallel=p), freeu=FREEU)[-1] for p in (False, True))
    assert rms(b, a) < 2e-6 and rms(a, run(FasterDiffusion((0, 2)))[-1]) > 1e-3


@pytest.mark.parametrize("cache", [DeepCache(1), FasterDiffusion(1), FasterDiffusion(1, parallel=True)], ids=str)
def test_freeu_with_a_cache_of_interval_1_is_freeu_alone(cache):
    assert torch.equal(run(cache, freeu=FREEU)[-1], run(freeu=FREEU)[-1])


@pytest.mark.parametrize("cache", [DeepCache(3, 1), FasterDiffusion("paper", parallel=True, alpha=0.003)], ids=str)
def test_rows_do_not_influence_each_other_and_a_second_run_remembers_nothing(cache):
    first, again, alone = run(cache), run(cache), run(cache, batch=1)
    assert torch.equal(first[-1], again[-1]) and rms(first[-1][:1], alone[-1]) < 1e-5


def test_img2img_makes_its_first_step_a_key_step():
    settings = dict(init=randn(2, 4, 8, 8, seed=5), strength=0.55)
    assert len(run(**settings)) == 5
    for cache in (DeepCache(10), FasterDiffusion((0,)), FasterDiffusion((0,), parallel=True)):
        out = run(cache, **settings)
        assert rms(out[0], run(**settings)[0]) < 2e-6 and out[-1].isfinite().all()


def test_a_ddim_group_of_a_decoder_that_ignores_time_is_one_big_step():
    class Frozen:                                        # only the encoder looks at x, and the decoder not at t
        config, up_units = NARROW, lambda self: [None] * 12

        def __call__(self, x, t, context, added, cache):
            h, _ = cache.encoded(torch.sin(x) if cache.down is None else None, [])
            return h
    x, p = randn(1, 4, 8, 8), plan("ddim", 10)
    after = [x for _, x in generate(Frozen(), x, randn(1, 5, 8), steps=10, cache=FasterDiffusion(5))]
    x0, eps = x0_and_eps(x, torch.sin(x), p.now[0], "epsilon")
    assert rms(after[4], p.after[4] ** 0.5 * x0 + (1 - p.after[4]) ** 0.5 * eps) < 1e-5


# ------------------------------------------------------------------------------------------------ schedules and counts

def test_key_schedules_are_the_published_ones():
    assert FasterDiffusion("paper").key_steps(50) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert FasterDiffusion("paper").key_steps(10) == [0, 1, 2, 3, 5]
    assert FasterDiffusion("rescaled").key_steps(100) == [0, 2, 4, 6, 10, 20, 30, 50, 70]
    assert FasterDiffusion("square").key_steps(100) == [0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65, 77, 90]
    assert FasterDiffusion(4).key_steps(10) == DeepCache(4).key_steps(10) == [0, 4, 8]
    assert DeepCache(5, 1, center=15).key_steps(50) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert DeepCache(5, 1, center=15, schedule="paper").key_steps(50) == [0, 6, 11, 14, 15, 19, 24, 29, 35, 42]
    assert nonuniform_keys(20, 10, 6, 1.4) == [0, 2, 4, 6, 7, 8, 10, 12, 15, 17]
    assert nonuniform_keys(50, 17, 15, 1.4) == [0, 3, 6, 8, 11, 13, 15, 17, 20, 22, 25, 28, 32, 35, 38, 42, 46]
    assert nonuniform_keys(10, 4, 3, 1.4) == [0, 3, 4, 6]


class Counting(UNet):
    """Notes the batch of every call of its two halves."""

    def encode(self, x, shifts, text, down=None, *more):
        if down is None or down >= 0:
            self.calls.append(("encode", len(x), down))
        return super().encode(x, shifts, text, down, *more)

    def decode(self, h, skips, shifts, text, freeu=None, cache=None, *more):
        self.calls.append(("decode", len(skips[0]), 0 if cache is None else cache.up))
        return super().decode(h, skips, shifts, text, freeu, cache, *more)


def calls(cache, steps: int = 10) -> list[tuple]:
    unet = Counting(NARROW).requires_grad_(False)
    unet.calls = []
    list(generate(unet, randn(2, 4, 8, 8), randn(2, 5, 8), randn(2, 5, 8), steps=steps, cache=cache))
    return unet.calls


def test_exactly_the_planned_units_run():
    serial, parallel = calls(FasterDiffusion("paper")), calls(FasterDiffusion("paper", parallel=True))
    assert [c[0] for c in serial].count("encode") == 5 and [c[0] for c in serial].count("decode") == 10
    assert [c[1] for c in parallel if c[0] == "decode"] == [4, 4, 4, 8, 20]
    assert [c[1] for c in calls(FasterDiffusion("paper", parallel=True), 50) if c[0] == "decode"] == \
        [4 * n for n in (1, 1, 1, 2, 5, 5, 10, 10, 15)]
    deep = calls(DeepCache(3, 2))
    assert [c[2] for c in deep if c[0] == "encode"] == [None, 2, 2] * 3 + [None]
    assert [c[2] for c in deep if c[0] == "decode"] == [0, 9, 9] * 3 + [0]


def test_the_units_of_a_run_are_counted():
    unet = UNETS[NARROW]
    assert FasterDiffusion("paper").start(50, 0, unet).units_run() == (9 * 25 + 41 * 12, 50 * 25)
    assert DeepCache(5, 1).start(50, 0, unet).units_run() == (10 * 25 + 40 * 4, 50 * 25)
    assert DeepCache(5, 11).start(10, 7, unet).units_run(first=7) == (25 + 2 * 24, 3 * 25)
    assert DeepCache(1).start(10, 0, UNETS[XL]).units_run() == (190, 190)


def test_only_what_is_reused_is_kept():
    with torch.device("meta"):
        unet = UNet()                                    # SD 1.5 at 512 pixels
        x, t, context = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
        for branch, elements in ((None, 6_717_440), (0, 320 * 64 * 64), (2, 640 * 64 * 64)):
            features = Features(frozenset({0}), 1, 12, branch)
            unet(x, t, context, cache=features.at(0))
            assert sum(k.numel() for k in (features.h, *features.skips)) == elements


@pytest.mark.parametrize("make,words", [
    (lambda: DeepCache(0), "interval must be 1 or more"), (lambda: DeepCache(3, -1), "branch must be 0 or more"),
    (lambda: run(DeepCache(3, 12)), "0 to 11"), (lambda: DeepCache(3, schedule="x"), "released or paper"),
    (lambda: FasterDiffusion("often"), "paper, rescaled, square"), (lambda: FasterDiffusion(0), "1 or more"),
    (lambda: run(FasterDiffusion((1, 2))), "begin with 0"), (lambda: run(FasterDiffusion((0, 10))), "beyond the last"),
    (lambda: FasterDiffusion(alpha=2.0), "between 0 and 1"), (lambda: FasterDiffusion(max_batch=0), "1 or more rows"),
    (lambda: DeepCache(2, center=60).key_steps(50), "center 60 is not")])
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
