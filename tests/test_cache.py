"""cache.py: against outputs of the official codes, partial passes against full ones, schedules, counts, no leaks."""
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.cache as benchmark
from cache import DeepCache, FasterDiffusion, Inherit, TextGate, TGate, nonuniform_keys, notes
from freeu import FreeU, skip_tuning
from memory import run_macs, unit_macs
from sampler import SAMPLERS, ddim, generate, plan, x0_and_eps
from unet import CONFIGS, UNet, UNetConfig

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
EXACT = make(NARROW).double()                            # in which rounding hides nothing
with torch.device("meta"):                               # the real ones: shapes without weights
    META = {family: UNet(CONFIGS[family]) for family in ("sd15", "sdxl")}


def given(batch: int = 2) -> list[torch.Tensor]:
    """Noise, texts and negative texts of so many images."""
    return [randn(3, *shape, seed=k)[:batch] for k, shape in enumerate(((4, 8, 8), (5, 8), (5, 8)))]


def run(cache=None, batch: int = 2, guided: bool = True, config: UNetConfig = NARROW, exact: bool = False,
        **settings) -> list[torch.Tensor]:
    noise, context, other = (x.double() if exact else x for x in given(batch))
    added = randn(3, config.add_dim, seed=3)[:batch] if config.add_dim else None
    generators = [torch.Generator().manual_seed(k) for k in range(batch)]
    unet = EXACT if exact else UNETS[config]
    return [x for _, x in generate(unet, noise, context, other if guided else None, added=added, cache=cache,
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


def test_injection_alone_equals_the_official_baseline_with_injection(official):
    assert rms(official(FasterDiffusion(1, alpha=0.003)), GOLDEN["ddim10.baseline_inject0.003"]) < 1e-5
    assert rms(official(), GOLDEN["ddim10.baseline_inject0.003"]) > 1e-4


def test_the_official_order_of_injection_is_what_tells_parallel_from_serial(official):
    serial, same, behind = (official(FasterDiffusion(alpha=0.003, **more)) for more in (
        {}, dict(parallel=True), dict(parallel=True, official_order=True)))
    assert rms(same, serial) < 2e-6 and 1e-5 < rms(behind, serial) < 1e-4


def test_the_plain_run_equals_the_official_baseline(official):
    assert rms(official(), GOLDEN["ddim10.baseline"]) < 1e-4


# how far from the uncached run, by branch: it falls with every unit that is recomputed, and isn't 0 with all but one
DISTANCES = (0.301, 0.244, 0.209, 0.192, 0.154, 0.113, 0.088, 0.061, 0.033, 0.023, 0.017, 0.014)


@pytest.mark.parametrize("branch", range(12))
def test_deepcache_equals_the_official_package_at_every_branch(official, branch):
    out = official(DeepCache(3, branch))
    assert rms(out, GOLDEN[f"ddim10.deepcache_plugin.N3.branch{branch}"]) < 1e-4
    assert rms(out, GOLDEN["ddim10.baseline"]) == pytest.approx(DISTANCES[branch], abs=1e-3)


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
    for cache in (DeepCache(2, branch), FasterDiffusion(2), Inherit(f"d1,u{branch}", 2)):
        features = cache.start(2, {0}, unet)
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
    for cache, same in ((FasterDiffusion(2), True), (DeepCache(2, 0), False), (Inherit("d1-u3", 2), False)):
        features = cache.start(2, {0}, unet)
        unet(randn(1, 4, 8, 8), torch.tensor(500), context, cache=features.at(0))
        a, b = (unet(randn(1, 4, 8, 8, seed=s), torch.tensor(480), context, cache=features.at(1)) for s in (1, 2))
        assert torch.equal(a, b) is same


def test_what_is_kept_is_never_written_to_even_with_freeu_at_any_branch():
    unet, context, f = UNETS[NARROW], randn(2, 5, 8), FreeU(1.5, 1.6, 0.5, 0.2, skip_scale=skip_tuning(0.8))
    for cache in (FasterDiffusion(3), Inherit("d2,mid,u2-u3", 3), *(DeepCache(3, branch) for branch in range(12))):
        features = cache.start(3, {0}, unet)
        unet(randn(2, 4, 8, 8), torch.tensor(500), context, freeu=f, cache=features.at(0))
        kept = {unit: x.clone() for unit, x in features.kept.items()}
        outs = [unet(randn(2, 4, 8, 8), torch.tensor(500), context, freeu=f, cache=features.at(i)) for i in (1, 2)]
        assert kept and all(torch.equal(x, features.kept[unit]) for unit, x in kept.items())
        assert torch.equal(*outs)


# ---------------------------------------------------------------------------------------- serial, parallel, composition

@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batch,guided", [(1, True), (3, True), (1, False), (3, False)])
def test_parallel_equals_serial(sampler, batch, guided):
    for alpha in (0.0, 0.003):
        serial, *others = (
            run(FasterDiffusion((0, 1, 5), alpha=alpha, **more), batch, guided, exact=True, sampler=sampler)
            for more in (dict(), dict(parallel=True), dict(parallel=True, max_batch=4)))
        assert all(rms(b, a) < 1e-12 for other in others for a, b in zip(serial, other))


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


def by_hand_with_noise(alpha: float, tau: float, init: torch.Tensor | None = None) -> torch.Tensor:
    """Every step in full, with noise injected before it: a loop of its own."""
    (noise, context, other), p, start = given(), plan("ddim", 10), 0 if init is None else 4
    prior = noise if init is None else math.sqrt(1 - p.now[start]) * noise
    x = prior if init is None else math.sqrt(p.now[start]) * init + prior
    unet, step = UNETS[NARROW], ddim(p, 0.0, lambda: None)
    text, shifts = unet.embed_text(torch.cat([other, context])), unet.embed_schedule(torch.tensor(p.times))
    for i in range(start, 10):
        x = x + alpha * prior if p.times[i] < tau else x
        negative, positive = unet(torch.cat([x, x]), shifts[i], text).chunk(2)
        x = step(i, x, *x0_and_eps(x, negative + 7.5 * (positive - negative), p.now[i], "epsilon"))
    return x


def test_what_is_injected_is_the_noise_that_the_run_began_with_also_on_top_of_a_picture():
    picture = randn(2, 4, 8, 8, seed=5)
    for tau in (500, 750):
        for settings in ({}, {"init": picture, "strength": 0.6}):
            out = run(FasterDiffusion(1, alpha=0.003, tau=tau), **settings)[-1]
            assert torch.equal(out, by_hand_with_noise(0.003, tau, settings.get("init")))
            assert rms(out, run(**settings)[-1]) > 1e-4
    assert not torch.equal(run(FasterDiffusion(1, True, alpha=0.003, official_order=True))[-1],
                           by_hand_with_noise(0.003, 500))


@pytest.mark.parametrize("cache", [DeepCache(3, 1), FasterDiffusion(3), FasterDiffusion(3, parallel=True),
                                   Inherit("d4-u4", 3)], ids=str)
def test_guidance_turned_round_with_its_halves_swapped_is_the_same(cache):
    noise, context, other = (x.double() for x in given())
    *_, (_, a) = generate(EXACT, noise, context, other, steps=10, cfg_scale=7.5, cache=cache)
    *_, (_, b) = generate(EXACT, noise, other, context, steps=10, cfg_scale=1 - 7.5, cache=cache)
    assert rms(b, a) < 1e-11


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
            return cache.output(12, torch.sin(x) if cache.runs(12) else None)
    for cache, steps in ((FasterDiffusion(5), 10), (FasterDiffusion("paper"), 50)):
        x, p, keys = randn(1, 4, 8, 8).double(), plan("ddim", steps), cache.key_steps(steps)
        after = [x for _, x in generate(Frozen(), x, randn(1, 5, 8).double(), steps=steps, cache=cache)]
        for key, end in zip(keys, [*keys[1:], steps]):
            x0, eps = x0_and_eps(x, torch.sin(x), p.now[key], "epsilon")
            x = p.after[end - 1] ** 0.5 * x0 + (1 - p.after[end - 1]) ** 0.5 * eps
            assert rms(after[end - 1], x) < 1e-9


# ------------------------------------------------------------------------------------------------------------- T-GATE

def by_hand(tgate: TGate, sampler: str, batch: int = 2) -> torch.Tensor:
    """T-GATE from outside: a U-Net function of which both halves follow the text where guidance is dropped."""
    unet = UNETS[NARROW]
    noise, context, other = (randn(3, *shape, seed=k)[:batch] for k, shape in enumerate(((4, 8, 8), (5, 8), (5, 8))))
    gate, step = TextGate(), iter(range(10))

    def function(x, t, both, added):
        i = next(step)
        if i == tgate.step and tgate.text == "reuse":
            gate.open = False
            if tgate.guidance == "drop":
                gate.kept = {block: (h[:batch] + h[batch:]) / 2 for block, h in gate.kept.items()}
        gated = {"gate": gate} if tgate.text == "reuse" else {}
        if i >= tgate.step and tgate.guidance == "drop":
            return unet(x[batch:], t, both[batch:], **gated).repeat(2, 1, 1, 1)
        return unet(x, t, both, **gated)
    *_, (_, x) = generate(function, noise, context, other, steps=10, sampler=sampler,
                          generators=[torch.Generator().manual_seed(k) for k in range(batch)])
    return x


GATES = [TGate(4), TGate(4, guidance="keep"), TGate(4, text="compute")]


@pytest.mark.parametrize("tgate", GATES, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tgate_in_the_loop_is_what_its_parts_do_by_hand(tgate, sampler):
    out, plain = run(tgate=tgate, sampler=sampler), run(sampler=sampler)
    assert all(torch.equal(a, b) for a, b in zip(out[:4], plain[:4]))
    assert rms(out[-1], by_hand(tgate, sampler)) < 2e-6 and rms(out[-1], plain[-1]) > 1e-4


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
def test_a_closed_gate_gives_the_same_pass_again_whatever_the_text(config):
    unet, x, t, added = UNETS[config], randn(2, 4, 8, 8), torch.tensor(500), randn(2, 6) if config.add_dim else None
    gate = TextGate()
    plain = unet(x, t, randn(2, 5, 8, seed=1), added)
    assert torch.equal(unet(x, t, randn(2, 5, 8, seed=1), added, gate=gate), plain)
    gate.close(average=False)
    assert torch.equal(unet(x, t, randn(2, 5, 8, seed=2), added, gate=gate), plain)


def test_tgate_attends_to_the_text_and_guides_in_its_first_steps_only():
    to_q = UNETS[NARROW].down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q
    for tgate, rows, attended in zip(GATES, ([4] * 4 + [2] * 6, [4] * 10, [4] * 4 + [2] * 6),
                                     ([4] * 4, [4] * 4, [4] * 4 + [2] * 6)):
        with Calls() as noted:
            run(tgate=tgate)
        assert noted.of(UNETS[NARROW].conv_in) == rows and noted.of(to_q) == attended


@pytest.mark.parametrize("tgate", GATES, ids=str)
@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
def test_tgate_with_faster_diffusion_is_the_same_in_series_and_in_parallel(tgate, config):
    serial, parallel, split = (
        run(FasterDiffusion((0, 2), alpha=0.003, **more), tgate=tgate, config=config, freeu=FREEU)
        for more in (dict(), dict(parallel=True), dict(parallel=True, max_batch=4)))
    assert rms(parallel[-1], serial[-1]) < 2e-6 and rms(split[-1], serial[-1]) < 2e-6


@pytest.mark.parametrize("cache", [DeepCache(3, 1), FasterDiffusion(3), Inherit("d4-u2", 3)], ids=str)
def test_tgate_makes_its_step_a_key_step_of_every_cache(cache):
    rows = calls(cache=cache, tgate=TGate(4))
    assert rows[12] == [4, 4, 2, 2, 2]                   # the middle: steps 0, 3, then 4 (the gate), 6, 9
    out, images = run(cache, tgate=TGate(4)), dict(init=randn(2, 4, 8, 8, seed=5), strength=0.55)
    assert all(torch.equal(a, b) for a, b in zip(out[:4], run(cache)[:4])) and not torch.equal(out[4], run(cache)[4])
    assert rms(run(cache, tgate=TGate(4), **images)[0], run(**images)[0]) < 2e-6     # step 5 here, computed in any case


# ------------------------------------------------------------------------------------------------ schedules and counts

def test_key_schedules_are_the_published_ones():
    assert FasterDiffusion("paper").key_steps(50) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert FasterDiffusion("paper").key_steps(10) == [0, 1, 2, 3, 5]
    assert FasterDiffusion("rescaled").key_steps(100) == [0, 2, 4, 6, 10, 20, 30, 50, 70]
    assert FasterDiffusion("square").key_steps(100) == [0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65, 77, 90]
    assert FasterDiffusion([0, 2, 5]).key_steps(6) == [0, 2, 5]
    assert FasterDiffusion(4).key_steps(10) == DeepCache(4).key_steps(10) == [0, 4, 8]
    assert DeepCache(5, 1, center=15).key_steps(50) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert DeepCache(5, 1, center=15, schedule="paper").key_steps(50) == [0, 6, 11, 14, 15, 19, 24, 29, 35, 42]
    assert nonuniform_keys(20, 10, 6, 1.4) == [0, 2, 4, 6, 7, 8, 10, 12, 15, 17]
    assert nonuniform_keys(50, 17, 15, 1.4) == [0, 3, 6, 8, 11, 13, 15, 17, 20, 22, 25, 28, 32, 35, 38, 42, 46]
    assert nonuniform_keys(10, 4, 3, 1.4) == [0, 3, 4, 6]


def test_unit_names_and_ranges_mean_the_flat_list():
    def numbers(text: str, config: UNetConfig = NARROW) -> frozenset[int]:
        return Inherit(text, 2).start(2, {0}, UNETS[config]).reused
    assert numbers("conv_in-mid") == set(range(13)) and numbers("d11, u0-u1") == {11, 13, 14}
    assert numbers("d8-u0", XL) == {8, 9, 10}
    assert calls(cache=Inherit("conv_in-mid", 3)) == calls(cache=FasterDiffusion(3))
    assert calls(cache=Inherit("d2-u9", 3)) == calls(cache=DeepCache(3, 1))


def test_key_steps_that_reach_too_far_are_told_of():
    assert notes(FasterDiffusion("paper").key_steps(50), 50) == notes(DeepCache(5).key_steps(50), 50) == []
    assert "over 65 of 100 steps" in notes(FasterDiffusion("paper").key_steps(100), 100)[0]
    assert "saves nothing" in notes(FasterDiffusion("paper").key_steps(4), 4)[0]
    assert "20 to 50 steps" in notes(DeepCache(2).key_steps(8), 8)[0]


class Calls(TorchFunctionMode):
    """Notes the weights and the rows of every linear layer and convolution that runs."""

    def __init__(self):
        super().__init__()
        self.rows: dict[int, list[int]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.conv2d, torch.nn.functional.linear):
            self.rows.setdefault(id(args[1]), []).append(len(args[0]))
        return func(*args, **(kwargs or {}))

    def of(self, layer: torch.nn.Module) -> list[int]:
        return self.rows.get(id(layer.weight), [])


def calls(steps: int = 10, **settings) -> list[list[int]]:
    """For every unit of the flat list, the batch of each of its calls in a run of two guided images."""
    unet = UNETS[NARROW]
    with Calls() as noted:
        list(generate(unet, randn(2, 4, 8, 8), randn(2, 5, 8), randn(2, 5, 8), steps=steps, **settings))
    down = [unit.resnet.conv1 if unit.resnet else unit.resample.conv for unit in unet.down_units()]
    return [noted.of(unet.conv_in), *map(noted.of, down),
            noted.of(unet.mid_block.resnets[0].conv1), *(noted.of(u.resnet.conv1) for u in unet.up_units())]


def test_exactly_the_planned_units_run():
    parallel = FasterDiffusion("paper", parallel=True)
    assert calls(cache=FasterDiffusion("paper")) == [[4] * 5] * 13 + [[4] * 10] * 12
    assert calls(cache=parallel) == [[4] * 5] * 13 + [[4, 4, 4, 8, 20]] * 12
    assert calls(50, cache=parallel) == [[4] * 9] * 13 + [[4 * n for n in (1, 1, 1, 2, 5, 5, 10, 10, 15)]] * 12
    assert [len(unit) for unit in calls(20, cache=parallel)] == [7] * 25
    assert calls(cache=DeepCache(3, 2)) == [[4] * 10] * 3 + [[4] * 4] * (9 + 1 + 9) + [[4] * 10] * 3
    # d5 and u6 onwards run, with their own skips; u2 to u5 and d4 are kept; nobody would read d6 to d11, mid, u0, u1
    reuse = Inherit("d4,mid,u2-u5", (0, 2, 5))
    assert calls(cache=reuse) == [[4] * 10] * 4 + [[4] * 3] + [[4] * 10] + [[4] * 3] * 13 + [[4] * 10] * 6


def test_the_units_of_a_run_are_counted():
    unet = UNETS[NARROW]
    assert FasterDiffusion("paper").start(50, {0}, unet).units_run() == (9 * 25 + 41 * 12, 50 * 25)
    assert DeepCache(5, 1).start(50, {0}, unet).units_run() == (10 * 25 + 40 * 4, 50 * 25)
    assert DeepCache(5, 11).start(10, {7}, unet).units_run(first=7) == (25 + 2 * 24, 3 * 25)
    assert DeepCache(1).start(10, {0}, UNETS[XL]).units_run() == (190, 190)


def test_only_what_is_reused_is_kept():
    for family, side, caches in (                        # at 512 and 1024 pixels
            ("sd15", 64, ((FasterDiffusion(2), 6_717_440), (DeepCache(2, 0), 320 * 64 * 64),
                          (DeepCache(2, 2), 640 * 64 * 64), (Inherit("mid", 2), 1280 * 8 * 8))),
            ("sdxl", 128, ((FasterDiffusion(2), 26_869_760), (DeepCache(2, 0), 320 * 128 * 128)))):
        unet, c = META[family], CONFIGS[family]
        with torch.device("meta"):
            x, t, context = torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, c.context_dim)
            added = torch.empty(1, c.add_dim) if c.add_dim else None
            for cache, elements in caches:
                features = cache.start(2, {0}, unet)
                unet(x, t, context, added, cache=features.at(0))
                assert sum(kept.numel() for kept in features.kept.values()) == elements


# --------------------------------------------------------------------------------------------------------- arithmetic

# billions of multiply-adds of one pass (a row) with two of each kind of matrix product in attention, 77 tokens: a table
# made with torch's FLOP counter and another U-Net implementation; cheap[b]: a pass between the keys of branch b
PASSES = {"sd15": (64, 401.64, 130.72, (31.6, 90.1, 152.7, 188.7, 226.6, 270.3, 305.2, 340.7, 378.0, 385.7, 390.7,
                                        395.6)),
          "sdxl": (128, 3380.62, 1466.48, (49.0, 127.9, 223.5, 435.9, 723.8, 1035.3, 1478.0, 2226.6, 2982.0))}


@pytest.mark.parametrize("family", PASSES)
def test_the_arithmetic_of_every_branch_is_the_published_one(family):
    side, full, encoder, cheap = PASSES[family]
    unet = META[family]
    counts = [sum(unit) / 1e9 for unit in unit_macs(unet, side, side)]
    n = len(unet.up_units())
    assert sum(counts) == pytest.approx(full, rel=1e-3) and sum(counts[:n + 1]) == pytest.approx(encoder, rel=1e-3)
    for branch, macs in enumerate(cheap):
        run = DeepCache(2, branch).start(2, {0}, unet).between
        assert sum(counts[unit] for unit in run) == pytest.approx(macs, rel=1e-3, abs=0.05)           # one decimal


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
def test_the_arithmetic_is_what_torchs_flop_counter_sees(config):
    with torch.device("meta"):                           # on the CPU, the counter misses attention's products
        unet, x, t, context = UNet(config), torch.empty(1, 4, 15, 8), torch.empty(1), torch.empty(1, 5, 8)
        counts, added = unit_macs(unet, 15, 8, tokens=5), torch.empty(1, 6) if config.add_dim else None
    with FlopCounterMode(display=False) as counter:
        unet(x, t, context, added)
    assert 2 * sum(map(sum, counts)) == counter.get_total_flops()
    caches = [FasterDiffusion(2), *(DeepCache(2, branch) for branch in range(len(unet.up_units())))]
    for cache in caches:
        features = cache.start(2, {0}, unet)
        unet(x, t, context, added, cache=features.at(0))
        cheap = sum(sum(counts[unit_number]) for unit_number in features.between)
        assert benchmark.pass_macs(unet, x, t, context, added, features.at(1)) == cheap


def test_the_arithmetic_of_whole_runs_is_the_published_one():
    def trillions(steps, cache=None, tgate=None, family="sd15") -> float:
        side = PASSES[family][0]
        return run_macs(META[family], side, side, steps, cache=cache, tgate=tgate) / 1e12
    for cache, sd15, sdxl in ((None, 40.16, 338.06), (FasterDiffusion("paper"), 29.45, 217.8),
                              (FasterDiffusion(5), 29.71, 220.7), (DeepCache(3, 0), 15.74, 118.2),
                              (DeepCache(5, 1), 15.24, 77.8), (DeepCache(10, 2), 17.76, 53.9)):
        assert trillions(50, cache) == pytest.approx(sd15, rel=1e-3)
        assert trillions(50, cache, family="sdxl") == pytest.approx(sdxl, rel=1e-3)
    assert trillions(25, tgate=TGate(5)) == pytest.approx((10 * 401.64 + 20 * (401.64 - 16.05)) / 1e3, rel=1e-3)
    assert trillions(25, tgate=TGate(5, guidance="keep")) == pytest.approx((50 * 401.64 - 40 * 16.05) / 1e3, rel=1e-3)


def test_the_benchmark_writes_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cache", "--parts", "passes", "schedules", "parallel", "--family", "tiny",
                                     "--size", "64", "--schedule-size", "64", "--steps", "4", "--rounds", "1",
                                     "--branches", "1", "--group", "3",
                                     "--only", "b1, N = 2", "--json", str(tmp_path / "rows.json"), "--device", "cpu"])
    benchmark.main()
    passes, schedules, parallel = json.loads((tmp_path / "rows.json").read_text()).values()
    assert [row["what"] for row in passes][-2:] == ["DeepCache, branch 1", "T-GATE, guidance kept"]
    assert [row["what"] for row in parallel] == ["serial", "2 steps a batch", "3 steps a batch"]
    serial, two, three = (row["peak of tensors, MB"] for row in parallel)
    assert 0 < serial < two < three
    assert [row["what"] for row in schedules] == ["full", "DeepCache b1, N = 2"]
    assert all(row["seconds"] > 0 for row in passes + schedules) and schedules[1]["by arithmetic"] > 1.5
    assert schedules[1]["cache, MB"] == 2 * 24 * 8 * 8 * 4 / 1e6       # one tensor: both halves, 24 channels, float32


@pytest.mark.parametrize("make,words", [
    (lambda: DeepCache(30).key_steps(20), "more than the run's 20"), (lambda: run(Inherit("x", 2)), "d1 to d11, mid"),
    (lambda: run(Inherit("u2-u1", 2)), "'u2-u1' is none"), (lambda: Inherit("mid", 0), "makes no sense"),
    (lambda: TGate(0), "1 or more"), (lambda: TGate(3, "forget"), "reuse or compute"),
    (lambda: TGate(3, "compute", "keep"), "does nothing"), (lambda: run(tgate=TGate(10)), "beyond the last of 10"),
    (lambda: run(DeepCache(3).start(10, {0}, UNETS[NARROW])), "give the settings"),
    (lambda: [DeepCache(3).start(10, {0}, UNETS[NARROW]).at(9).at(0)], "another image's run"),
    (lambda: DeepCache(0), "interval must be 1 or more"), (lambda: DeepCache(3, -1), "branch must be 0 or more"),
    (lambda: run(DeepCache(3, 12)), "0 to 11"), (lambda: DeepCache(3, schedule="x"), "released or paper"),
    (lambda: DeepCache(2.5), "1 or more"), (lambda: DeepCache(3, True), "0 or more"), (lambda: TGate(2.5), "1 or more"),
    (lambda: DeepCache(3, center=2.5), "number of a step"), (lambda: FasterDiffusion(tau=float("nan")), "0 to 1000"),
    *[(lambda power=power: DeepCache(3, center=9, power=power), "power must be 0.1 to 10")
      for power in (0, -1, math.nan, math.inf, 0.001)],
    *[(lambda keys=keys: FasterDiffusion(keys), "begin with 0") for keys in ([1, 2], [5, 3], [-3, 4], [], (0, 2, 2))],
    *[(lambda keys=keys: Inherit("mid", keys), "whole numbers") for keys in (2.5, True, (0, 2.5), [0, "1"], None)],
    (lambda: list(generate(lambda *_: None, randn(1, 4, 8, 8), randn(1, 5, 8), cache=DeepCache(2))), "needs a UNet"),
    (lambda: FasterDiffusion("often"), "paper, rescaled, square"), (lambda: FasterDiffusion(0), "makes no sense"),
    (lambda: run(FasterDiffusion((1, 2))), "begin with 0"), (lambda: run(FasterDiffusion((0, 10))), "beyond the last"),
    (lambda: FasterDiffusion(alpha=2.0), "between 0 and 1"), (lambda: FasterDiffusion(max_batch=0), "1 or more rows"),
    (lambda: DeepCache(2, center=60).key_steps(50), "center 60 is not")])
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
