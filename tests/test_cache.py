"""cache.py: against outputs of the official codes, partial passes against full ones, schedules, counts, no leaks."""
import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, NARROW, UNETS, XL, make, randn, seeded
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.cache as benchmark
from cache import AttentionGate, DeepCache, FasterDiffusion, Features, Inherit, TGate, key_steps, nonuniform_keys, notes
from freeu import FreeU, SkipTuning
from memory import run_macs, shape_run, unit_macs
from sampler import SAMPLERS, Condition, ddim, generate, plan, x0_and_eps
from unet import CONFIGS, OFF, Techniques, UNet, UNetConfig

BOTH = pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
EXACT = make(UNet, NARROW).double()                      # in which rounding hides nothing
with torch.device("meta"):                               # the real ones: shapes without weights
    META = {family: UNet(CONFIGS[family]) for family in ("sd15", "sdxl")}


def given(batch: int = 2, config: UNetConfig = NARROW, exact: bool = False) -> tuple[Tensor, Condition, Condition]:
    """Noise, texts and negative texts of `batch` images."""
    noise, text, other = (randn(3, *shape, seed=k)[:batch] for k, shape in enumerate(((4, 8, 8), (5, 8), (5, 8))))
    added = randn(3, config.add_dim, seed=3)[:batch] if config.add_dim else None
    if exact:
        noise, text, other = noise.double(), text.double(), other.double()
    return noise, Condition(text, added), Condition(other, added)


def run(cache=None, batch: int = 2, guided: bool = True, config: UNetConfig = NARROW, exact: bool = False,
        steps: int = 10, sampler: str = "ddim", eta: float = 0.0, **settings) -> list[Tensor]:
    noise, text, other = given(batch, config, exact)
    return [x for _, x in generate(EXACT if exact else UNETS[config], noise, text, other if guided else None,
                                   plan(sampler, steps, eta=eta), generators=seeded(*range(batch)), cache=cache,
                                   **settings)]


plain = functools.cache(lambda sampler="ddim", config=NARROW: run(sampler=sampler, config=config))
PICTURE = dict(init=randn(2, 4, 8, 8, seed=5), strength=0.55)          # img2img: 5 of 10 steps


def start(cache, steps: int = 2, unet: UNet = UNETS[NARROW], first: int = 0) -> Features:
    """The state of a cache in a run of one branch."""
    return shape_run(unet, 8, 8, steps, first, guided=False, cache=cache).acting["cache"]


def at(features: Features, i: int) -> Techniques:
    return Techniques(cache=features.at((i,), (0,)))


def rms(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


# ------------------------------------------------------------------------------------------------- official outputs

GOLDEN = load_file(DATA / "cache.safetensors")


@pytest.fixture(scope="module")
def official():
    unet = UNet(UNetConfig(channels=(32, 64, 64, 64), context_dim=32)).requires_grad_(False)
    unet.load_state_dict({k.removeprefix("unet."): v.float() for k, v in GOLDEN.items() if k.startswith("unet.")})

    @functools.cache
    def last(cache=None) -> Tensor:
        *_, (_, x) = generate(unet, GOLDEN["latents"], Condition(GOLDEN["cond"]), Condition(GOLDEN["uncond"]),
                              plan("ddim", 10), cache=cache)
        return x
    return last


def test_the_plain_run_and_injection_alone_equal_the_official_baselines(official):
    assert rms(official(), GOLDEN["ddim10.baseline"]) < 1e-4 < rms(official(), GOLDEN["ddim10.baseline_inject0.003"])
    assert rms(official(FasterDiffusion(1)), GOLDEN["ddim10.baseline_inject0.003"]) < 1e-5


# how far from the uncached run, by branch: it falls with every unit that is recomputed, and isn't 0 with all but one
DISTANCES = (0.301, 0.244, 0.209, 0.192, 0.154, 0.113, 0.088, 0.061, 0.033, 0.023, 0.017, 0.014)


@pytest.mark.parametrize("interval,branch,distance", [
    *((3, branch, distance) for branch, distance in enumerate(DISTANCES)), (2, 0, 0.213), (5, 0, 0.364)])
def test_deepcache_equals_the_official_package_at_every_branch(official, interval, branch, distance):
    out = official(DeepCache(interval, branch))
    if interval == 3:
        assert rms(out, GOLDEN[f"ddim10.deepcache_plugin.N3.branch{branch}"]) < 1e-4
    assert rms(out, GOLDEN["ddim10.baseline"]) == pytest.approx(distance, abs=1e-3)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.003])
def test_faster_diffusion_equals_the_official_code(official, parallel, alpha):
    want = GOLDEN[f"ddim10.fd.{'parallel' if parallel else 'serial'}.50ls.alpha{alpha}"]
    cache = FasterDiffusion(parallel=parallel, alpha=alpha, official_order=parallel and alpha > 0)
    assert rms(official(cache), want) < (1e-5 if alpha else 1e-4)     # the order of injection alone is worth 3e-5
    if cache.official_order:
        assert rms(official(FasterDiffusion(parallel=True)), official(FasterDiffusion())) < 2e-6
        assert 1e-5 < rms(official(cache), official(FasterDiffusion())) < 1e-4


# The official T-GATE, and the official DeepCache in img2img, on narrow U-Nets of SD 1.5 and SDXL in float64
MODELS, CASES = (safe_open(DATA / name, framework="pt") for name in ("baselines.safetensors", "reuse.safetensors"))
SETTINGS = {name: json.loads(text) for name, text in CASES.metadata().items()}


def golden(*names: str) -> list[Tensor]:
    return [CASES.get_tensor(name).double() for name in names]


@functools.cache
def baseline(family: str) -> tuple[UNet, Condition, Condition]:
    """The U-Net, the prompt and the negative prompt."""
    config = {name: tuple(value) if isinstance(value, list) else value
              for name, value in json.loads(MODELS.metadata()[f"{family}.config"]).items()}
    unet, prefix = UNet(UNetConfig(**config)).double().requires_grad_(False), f"{family}.unet."
    unet.load_state_dict({name.removeprefix(prefix): MODELS.get_tensor(name)
                          for name in MODELS.keys() if name.startswith(prefix)})
    return unet, *(Condition(*golden(*sorted(name for name in CASES.keys() if name.startswith(f"{family}.{kind}"))))
                   for kind in ("context", "negative"))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("case", [name for name in SETTINGS if name.startswith("tgate")])
def test_tgate_equals_the_official_code_after_every_step(case, low_memory):
    said, (_, family, version) = SETTINGS[case], case.split(".")
    more = {} if version == "v1" else dict(version=2, warm_up=said["warm_up"], interval=said["sp_interval"],
                                           late_interval=said["fi_interval"])
    (unet, *texts), (noise, want) = baseline(family), golden(f"{case}.noise", f"{case}.latents")
    out = [x for _, x in generate(unet, noise, *texts, plan("ddim", said["steps"]), low_memory=low_memory,
                                  tgate=TGate(said["gate"], **more))]
    assert rms(torch.cat(out), want) < 5e-7


@pytest.mark.parametrize("case", SETTINGS["deepcache"], ids=lambda case: f"{case['first']} of {case['steps']}")
def test_deepcache_counts_its_key_steps_from_the_first_that_runs_as_the_official_package_does(case):
    steps, first, name = case["steps"], case["first"], "deepcache.{steps}_{first}_{interval}.out".format(**case)
    cache = DeepCache(case["interval"])
    assert sorted(start(cache, steps, first=first).keys) == case["keys"]
    if name in CASES.keys():
        (unet, *texts), (init, noise, want) = baseline("sd15"), golden("deepcache.init", "deepcache.noise", name)
        *_, (_, x) = generate(unet, noise, *texts, plan("ddim", steps), 7.5, init, (steps - first) / steps, cache=cache)
        assert rms(x, want) < 1e-6


# ---------------------------------------------------------------------------------------------------- partial passes

@pytest.mark.parametrize("config,branch", [*((NARROW, b) for b in range(12)), *((XL, b) for b in range(9))])
def test_a_partial_pass_with_features_of_the_same_step_is_the_full_pass(config, branch):
    unet, x, t, context = UNETS[config], randn(2, 4, 8, 8), torch.tensor([500, 3]), randn(2, 5, 8, seed=1)
    added = randn(2, config.add_dim) if config.add_dim else None
    full = unet(x, t, context, added)
    for cache in (DeepCache(2, branch), Inherit(f"d1,u{branch}", 2), *([] if branch else [FasterDiffusion(2)])):
        features = start(cache, unet=unet)
        assert torch.equal(unet(x, t, context, added, at(features, 0)), full)
        assert torch.equal(unet(x, t, context, added, at(features, 1)), full)


EVERY_STEP = [DeepCache(1, 2), FasterDiffusion(1, alpha=0.0), FasterDiffusion(1, parallel=True, alpha=0.0)]


@BOTH
@pytest.mark.parametrize("cache", EVERY_STEP, ids=str)
def test_every_step_a_key_step_is_bit_equal_to_no_cache(config, cache):
    assert all(torch.equal(a, b) for a, b in zip(run(cache, config=config), plain(config=config)))


def test_between_key_steps_faster_diffusion_ignores_the_latent_and_deepcache_does_not():
    unet, context = UNETS[NARROW], randn(1, 5, 8)
    for cache, same in ((FasterDiffusion(2), True), (DeepCache(2, 0), False), (Inherit("d1-u3", 2), False)):
        features = start(cache)
        unet(randn(1, 4, 8, 8), torch.tensor(500), context, on=at(features, 0))
        a, b = (unet(randn(1, 4, 8, 8, seed=s), torch.tensor(480), context, on=at(features, 1)) for s in (1, 2))
        assert torch.equal(a, b) is same


FREEU = dict(freeu=FreeU(1.5, 1.6, 0.9, 0.2, backbone=(0, 0.6), skip=(0.15, 1)), skips=SkipTuning(0.9, steps=(0, 0.5)))


def test_only_what_is_reused_is_kept_and_it_is_never_written_to_even_with_freeu_at_any_branch():
    unet, (f, tuning) = UNETS[NARROW], FREEU.values()
    given = randn(2, 4, 8, 8), torch.tensor(500), randn(2, 5, 8)
    for cache in (FasterDiffusion(3), Inherit("d2,mid,u2-u3", 3), *(DeepCache(3, branch) for branch in range(12))):
        features = start(cache, 3)
        unet(*given, on=at(features, 0)._replace(freeu=f, skips=tuning))
        kept = {unit: x.clone() for unit, x in features.kept[0,].items()}
        outs = [unet(*given, on=at(features, i)._replace(freeu=f, skips=tuning)) for i in (1, 2)]
        assert kept.keys() == features.read and torch.equal(*outs)
        assert all(torch.equal(x, features.kept[0,][unit]) for unit, x in kept.items())


@pytest.mark.parametrize("family,side,elements", [      # at 512 and 1024 pixels, for one row
    ("sd15", 64, {FasterDiffusion(2): 6_717_440, DeepCache(2, 0): 320 * 64 * 64, DeepCache(2, 2): 640 * 64 * 64,
                  Inherit("mid", 2): 1280 * 8 * 8}),
    ("sdxl", 128, {FasterDiffusion(2): 26_869_760, DeepCache(2, 0): 320 * 128 * 128})], ids=["sd15", "sdxl"])
def test_what_is_kept_has_the_published_size(family, side, elements):
    unet, c, sizes = META[family], CONFIGS[family], {}
    watch = SimpleNamespace(runs=lambda unit: True, output=lambda unit, h: sizes.setdefault(unit, h.numel()) and h)
    with torch.device("meta"):
        unet(torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, c.context_dim),
             torch.empty(1, c.add_dim) if c.add_dim else None, Techniques(cache=watch))
    assert elements == {cache: sum(sizes[unit] for unit in start(cache, unet=unet).read) for cache in elements}


# ---------------------------------------------------------------------------------------- serial, parallel, composition

@pytest.mark.parametrize("sampler,batch,guided", [
    ("ddim", 1, True), ("ddim", 3, True), ("ddim", 1, False), ("heun", 3, False),
    *((sampler, 2, True) for sampler in SAMPLERS[1:])])
def test_parallel_equals_serial(sampler, batch, guided):
    serial, *others = (
        run(FasterDiffusion((0, 1, 4), tau=700, **more), batch, guided, exact=True, steps=7, sampler=sampler)
        for more in (dict(), dict(parallel=True), dict(parallel=True, max_batch=4)))
    assert all(rms(b, a) < 1e-12 for other in others for a, b in zip(serial, other))


def test_sdxl_with_noise_at_every_step_works_in_parallel():
    a, b = (run(FasterDiffusion(3, parallel=p), config=XL, eta=1.0)[-1] for p in (False, True))
    assert rms(b, a) < 2e-6 and rms(a, run(config=XL, eta=1.0)[-1]) > 1e-4


@pytest.mark.parametrize("cache", EVERY_STEP, ids=str)
def test_freeu_with_a_cache_of_interval_1_is_freeu_alone(cache):
    assert torch.equal(run(cache, **FREEU)[-1], run(**FREEU)[-1])


@pytest.mark.parametrize("cache", [DeepCache(3, 1), FasterDiffusion(parallel=True)], ids=str)
def test_rows_do_not_influence_each_other_and_a_second_run_remembers_nothing(cache):
    first, again, alone = run(cache), run(cache), run(cache, batch=1)
    assert torch.equal(first[-1], again[-1]) and rms(first[-1][:1], alone[-1]) < 1e-5


def by_hand_with_noise(alpha: float, tau: float, sampler: str = "ddim", init: Tensor | None = None, **_) -> Tensor:
    """Every step in full, with noise injected before it: a loop of its own."""
    (noise, (context, *_), (other, *_)), p, start = given(), plan(sampler, 10), 0 if init is None else 5
    prior = p.start_scale * noise if init is None else math.sqrt(1 - p.now[start]) * noise
    x = prior if init is None else math.sqrt(p.now[start]) * init + prior
    unet, step = UNETS[NARROW], ddim(p, lambda: None)
    text, shifts = unet.embed_text(torch.cat([other, context])), unet.embed_schedule(torch.tensor(p.times))
    for i in range(start, 10):
        x = x + alpha * prior if p.times[i] < tau else x
        negative, positive = unet(torch.cat([x, x]), shifts[i], text).chunk(2)
        x = step(i, x, *x0_and_eps(x, negative + 7.5 * (positive - negative), p.now[i], "epsilon"))
    return x


@pytest.mark.parametrize("tau,settings", [(501, {}), (500, PICTURE), (750, dict(sampler="euler"))], ids=str)
def test_what_is_injected_is_the_noise_that_the_run_began_with_also_on_top_of_a_picture(tau, settings):
    by_hand = by_hand_with_noise(0.003, tau, **settings)
    assert torch.equal(run(FasterDiffusion(1, tau=tau), **settings)[-1], by_hand)
    assert rms(by_hand, run(**settings)[-1]) > 1e-4
    assert not torch.equal(run(FasterDiffusion(1, True, tau=tau, official_order=True), **settings)[-1], by_hand)


@pytest.mark.parametrize("cache", [DeepCache(3, 1), FasterDiffusion(3), FasterDiffusion(3, parallel=True),
                                   Inherit("d4-u4", 3)], ids=str)
def test_guidance_turned_round_with_its_halves_swapped_is_the_same(cache):
    noise, text, other = given(exact=True)
    *_, (_, a) = generate(EXACT, noise, text, other, plan("ddim", 6), 7.5, cache=cache)
    *_, (_, b) = generate(EXACT, noise, other, text, plan("ddim", 6), 1 - 7.5, cache=cache)
    assert rms(b, a) < 1e-11


def test_img2img_makes_its_first_step_a_key_step():
    without = run(**PICTURE)
    assert len(without) == 5
    for cache in (DeepCache(10), FasterDiffusion((0,), alpha=0.0), FasterDiffusion((0,), True, alpha=0.0)):
        out = run(cache, **PICTURE)
        assert rms(out[0], without[0]) < 2e-6 and out[-1].isfinite().all()


def test_a_ddim_group_of_a_decoder_that_ignores_time_is_one_big_step():
    class Frozen:                                        # only the encoder looks at x, and the decoder not at t
        config, middle, units = NARROW, 12, ()
        embed_schedule, embed_text = staticmethod(lambda times, added: times), staticmethod(lambda context: context)

        def __call__(self, x, t, context, added, on):
            return on.cache.output(12, torch.sin(x) if on.cache.runs(12) else None)
    for keys, steps in ((5, 10), ("paper", 50)):
        x, p, ends = randn(1, 4, 8, 8).double(), plan("ddim", steps), key_steps(keys, steps)
        after = [x for _, x in generate(Frozen(), x, Condition(randn(1, 5, 8).double()), None, p,
                                        cache=FasterDiffusion(keys, alpha=0.0))]
        for key, end in zip(ends, [*ends[1:], steps]):
            x0, eps = x0_and_eps(x, torch.sin(x), p.now[key], "epsilon")
            x = p.after[end - 1] ** 0.5 * x0 + (1 - p.after[end - 1]) ** 0.5 * eps
            assert rms(after[end - 1], x) < 1e-9


# ------------------------------------------------------------------------------------------------------------- T-GATE

GATES = [TGate(4), TGate(4, guidance="keep"), TGate(4, text="compute")]
SECOND = TGate(5, version=2, warm_up=1, interval=3, late_interval=2)   # computes self-attention at 0 1 3 4, 6 8
SECOND_KEPT = TGate(5, "reuse", "keep", 2, 1, 3, 2)


def by_hand(tgate: TGate, sampler: str, batch: int = 2) -> Tensor:
    """T-GATE from outside: a U-Net function of which both branches follow the text where guidance is dropped."""
    unet, p, kept = UNETS[NARROW], plan(sampler, 10), {}
    turn, call = p.first_call(tgate.step), iter(range(p.calls))

    def function(x, t, both, added):
        i = next(call)
        drop = i >= turn and tgate.guidance == "drop"
        if i == turn and drop:
            kept.update({block: (h[:batch] + h[batch:]) / 2 for block, h in kept.items()})
        on = OFF if tgate.text == "compute" else Techniques(tgate=(None, AttentionGate(i < turn, 1, kept)))
        if drop:
            return unet(x[batch:], t, both[batch:], on=on).repeat(2, 1, 1, 1)
        return unet(x, t, both, on=on)
    *_, (_, x) = generate(function, *given(batch), p, generators=seeded(*range(batch)))
    return x


@pytest.mark.parametrize("tgate,sampler", [*((tgate, "ddim") for tgate in GATES), (GATES[0], "euler-a"),
                                           (GATES[0], "dpm++2m"), (GATES[1], "heun")], ids=str)
def test_tgate_in_the_loop_is_what_its_parts_do_by_hand(tgate, sampler):
    out, without, turn = run(tgate=tgate, sampler=sampler), plain(sampler), plan(sampler, 10).first_call(4)
    assert all(torch.equal(a, b) for a, b in zip(out[:turn], without[:turn]))
    assert not torch.equal(out[turn], without[turn]) and rms(out[-1], without[-1]) > 1e-4
    assert rms(out[-1], by_hand(tgate, sampler)) < 2e-6


@BOTH
def test_closed_gates_give_the_same_pass_again_whatever_the_text(config):
    unet, x, t = UNETS[config], randn(2, 4, 8, 8), torch.tensor(500)
    added = randn(2, config.add_dim) if config.add_dim else None
    full, kept = unet(x, t, randn(2, 5, 8, seed=1), added), ({}, {})
    for is_open, seed in ((True, 1), (False, 2)):
        on = Techniques(tgate=tuple(AttentionGate(is_open, 1, of) for of in kept))
        assert torch.equal(unet(x, t, randn(2, 5, 8, seed=seed), added, on), full)


def test_tgate_attends_and_guides_in_its_own_steps_only_and_its_arithmetic_is_counted_so():
    block = UNETS[NARROW].down_blocks[0].attentions[0].transformer_blocks[0]
    whole = run_macs(META["sd15"], 64, 64, 10)
    _, own, text = map(sum, zip(*unit_macs(META["sd15"], 64, 64)))
    for tgate, rows, attended, itself in (
            (GATES[0], [4] * 4 + [2] * 6, [4] * 4, [4] * 4 + [2] * 6), (GATES[1], [4] * 10, [4] * 4, [4] * 10),
            (GATES[2], [4] * 4 + [2] * 6, [4] * 4 + [2] * 6, [4] * 4 + [2] * 6),
            (SECOND, [4] * 5 + [2] * 5, [4] * 5, [4] * 4 + [2] * 2), (SECOND_KEPT, [4] * 10, [4] * 5, [4] * 6)):
        with Calls() as noted:
            run(tgate=tgate)
        assert noted.of(UNETS[NARROW].conv_in) == rows
        assert (noted.of(block.attn2.to_q), noted.of(block.attn1.to_q)) == (attended, itself)
        passes, with_own, with_text = (sum(of) / 2 for of in (rows, itself, attended))             # of one row
        assert run_macs(META["sd15"], 64, 64, 10, tgate=tgate) == passes * whole / 20 - (
            (passes - with_own) * own + (passes - with_text) * text)


@pytest.mark.parametrize("tgate", [None, *GATES, SECOND, SECOND_KEPT], ids=str)
@BOTH
def test_what_changes_with_time_is_the_same_in_series_and_in_parallel(tgate, config):
    serial, parallel, split = (
        run(FasterDiffusion((0, 1), **more), tgate=tgate, config=config, **FREEU)
        for more in (dict(), dict(parallel=True), dict(parallel=True, max_batch=4)))
    assert rms(parallel[-1], serial[-1]) < 2e-6 and rms(split[-1], serial[-1]) < 2e-6


@pytest.mark.parametrize("cache", [DeepCache(3, 1), FasterDiffusion(3, alpha=0.0), Inherit("d4-u2", 3)], ids=str)
def test_tgate_makes_its_step_a_key_step_of_every_cache(cache):
    rows = calls(cache=cache, tgate=TGate(4))
    assert rows[12] == [4, 4, 2, 2, 2]                   # the middle: steps 0, 3, then 4 (the gate), 6, 9
    out, without = run(cache, tgate=TGate(4)), run(cache)
    assert all(torch.equal(a, b) for a, b in zip(out[:4], without[:4])) and not torch.equal(out[4], without[4])
    assert rms(run(cache, tgate=TGate(4), **PICTURE)[0], run(**PICTURE)[0]) < 2e-6   # step 5 here, computed in any case


def test_tgate_2_counts_its_steps_from_the_first_that_runs():
    gating = shape_run(UNETS[NARROW], 8, 8, 20, 7, tgate=TGate(15, version=2, interval=4)).acting["tgate"]
    assert [i for i in range(7, 20) if gating.own(i)] == [7, 8, 9, 11, 14, *range(15, 20)]


@pytest.mark.parametrize("tgate,words", [(GATES[1], "guidance=keep does nothing in a run without guidance"),
                                         (GATES[2], "only drops guidance, and this run has none")], ids=str)
def test_tgate_that_does_nothing_without_guidance_is_refused(tgate, words):
    tgate.check(NARROW, 10)
    for refused in (lambda: tgate.check(NARROW, 10, guided=False), lambda: run(tgate=tgate, guided=False)):
        with pytest.raises(ValueError, match=words):
            refused()
    assert len(run(tgate=TGate(4), guided=False)) == 10


# ------------------------------------------------------------------------------------------------ schedules and counts

def test_key_schedules_are_the_published_ones():
    assert key_steps("paper", 50) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert key_steps("paper", 10) == [0, 1, 2, 3, 5]
    assert key_steps("rescaled", 100) == [0, 2, 4, 6, 10, 20, 30, 50, 70]
    assert key_steps("rescaled", 30) == [0, 1, 2, 3, 6, 9, 15, 21]      # rounded: 0.6 1.2 1.8 3 6 9 15 21
    assert key_steps("square", 100) == [0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65, 77, 90]
    assert key_steps([0, 2, 5], 6) == [0, 2, 5]
    assert key_steps(4, 10) == DeepCache(4).key_steps(10) == [0, 4, 8]
    assert DeepCache(5, 1, center=15).key_steps(50) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert DeepCache(5, 1, center=15, schedule="paper").key_steps(50) == [0, 6, 11, 14, 15, 19, 24, 29, 35, 42]
    assert nonuniform_keys(20, 10, 6, 1.4) == [0, 2, 4, 6, 7, 8, 10, 12, 15, 17]
    assert nonuniform_keys(50, 17, 15, 1.4) == [0, 3, 6, 8, 11, 13, 15, 17, 20, 22, 25, 28, 32, 35, 38, 42, 46]
    assert nonuniform_keys(10, 4, 3, 1.4) == [0, 3, 4, 6]


def test_unit_names_and_ranges_mean_the_flat_list():
    assert Inherit("conv_in-mid").reused(12) == set(range(13)) and Inherit("d11, u0-u1").reused(12) == {11, 13, 14}
    assert Inherit("d8-u0").reused(9) == {8, 9, 10}
    assert calls(6, cache=Inherit("conv_in-mid", 3)) == calls(6, cache=FasterDiffusion(3))
    assert calls(6, cache=Inherit("d2-u9", 3)) == calls(6, cache=DeepCache(3, 1))


def test_key_steps_that_reach_too_far_are_told_of():
    assert notes(key_steps("paper", 50), 50) == notes(DeepCache(5).key_steps(50), 50) == []
    assert "over 65 of 100 steps" in notes(key_steps("paper", 100), 100)[0]
    assert "saves nothing" in notes(key_steps("paper", 4), 4)[0]
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
        list(generate(unet, *given(), plan("ddim", steps), **settings))
    return [noted.of(unit.conv or unit.resnets[0].conv1) for unit in unet.units()]


def test_exactly_the_planned_units_run():
    parallel = FasterDiffusion("paper", parallel=True)
    assert calls(cache=FasterDiffusion("paper")) == [[4] * 5] * 13 + [[4] * 10] * 12
    assert calls(cache=parallel) == [[4] * 5] * 13 + [[4, 4, 4, 8, 20]] * 12
    for steps, sizes in ((20, (1, 1, 1, 2, 5, 5, 5)), (50, (1, 1, 1, 2, 5, 5, 10, 10, 15))):
        ahead = start(parallel, steps)
        assert [len(group) for key in sorted(ahead.keys) for group in ahead.groups(key, 4)] == list(sizes)
    assert calls(cache=DeepCache(3, 2)) == [[4] * 10] * 3 + [[4] * 4] * (9 + 1 + 9) + [[4] * 10] * 3
    # d5 and u6 onwards run, with their own skips; u2 to u5 and d4 are kept; nobody would read d6 to d11, mid, u0, u1
    reuse = Inherit("d4,mid,u2-u5", (0, 2, 5))
    assert calls(cache=reuse) == [[4] * 10] * 4 + [[4] * 3] + [[4] * 10] + [[4] * 3] * 13 + [[4] * 10] * 6


def test_the_units_of_a_run_are_counted():
    def units_run(cache, steps: int, first: int = 0, config: UNetConfig = NARROW) -> int:
        features = start(cache, steps, UNETS[config], first)
        return sum(len(features.units(i)) for i in range(first, steps))
    assert units_run(FasterDiffusion("paper"), 50) == 9 * 25 + 41 * 12
    assert units_run(DeepCache(5, 1), 50) == 10 * 25 + 40 * 4
    assert units_run(DeepCache(5, 11), 10, first=7) == 25 + 2 * 24
    assert units_run(DeepCache(1), 10, config=XL) == 10 * 19


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
    assert sum(counts) == pytest.approx(full, rel=1e-3)
    assert sum(counts[:unet.middle + 1]) == pytest.approx(encoder, rel=1e-3)
    for branch, macs in enumerate(cheap):
        live = start(DeepCache(2, branch), unet=unet).live
        assert sum(counts[unit] for unit in live) == pytest.approx(macs, rel=1e-3, abs=0.05)           # one decimal


@BOTH
def test_the_arithmetic_is_what_torchs_flop_counter_sees(config):
    with torch.device("meta"):                           # on the CPU, the counter misses attention's products
        unet, x, t, context = UNet(config), torch.empty(1, 4, 15, 8), torch.empty(1), torch.empty(1, 5, 8)
        counts, added = unit_macs(unet, 15, 8, tokens=5), torch.empty(1, config.add_dim) if config.add_dim else None
    def counted(*more) -> int:
        with FlopCounterMode(display=False) as counter:
            unet(x, *more)
        return counter.get_total_flops() // 2

    assert sum(map(sum, counts)) == counted(t, context, added)
    # a pass of the loop gets its shifts, keys and values ready made: what they cost, by unit
    made = [sum(r.time_emb_proj.weight.numel() for r in unit.resnets) + 5 * sum(
        block.attn2.to_k.weight.numel() + block.attn2.to_v.weight.numel()
        for block in (unit.attention.transformer_blocks if unit.attention else ())) for unit in unet.units()]
    made[-1] += sum(p.numel() for name, p in unet.named_parameters() if "_embedding" in name and p.dim() == 2)
    shifts, text = unet.embed_time(t, added), unet.embed_text(context)
    for cache in (FasterDiffusion(2), DeepCache(2, 5)):
        features = start(cache, unet=unet)
        unet(x, shifts, text, added, at(features, 0))
        assert counted(shifts, text, added, at(features, 1)) == sum(sum(counts[k]) - made[k] for k in features.live)


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
    (lambda: run(Inherit("u2-u1", 2)), "'u2-u1' is none"), (lambda: Inherit("mid", 0), "whole number from 1 up"),
    (lambda: TGate(0), "1 or more"), (lambda: TGate(3, "forget"), "reuse or compute"),
    (lambda: TGate(3, "compute", "keep"), "does nothing"), (lambda: run(tgate=TGate(10)), "beyond the last of 10"),
    (lambda: TGate(3, version=3), "1 or 2"), (lambda: TGate(3, interval=4), "interval does nothing without version=2"),
    (lambda: TGate(3, version=2, warm_up=-1), "0 or more"), (lambda: TGate(3, "compute", version=2), "with text=comp"),
    (lambda: DeepCache(0), "interval must be 1 or more"), (lambda: DeepCache(3, -1), "branch must be 0 or more"),
    (lambda: run(DeepCache(3, 12)), "0 to 11"), (lambda: DeepCache(3, schedule="x"), "released or paper"),
    (lambda: DeepCache(2.5), "1 or more"), (lambda: DeepCache(3, True), "0 or more"), (lambda: TGate(2.5), "1 or more"),
    (lambda: DeepCache(3, center=2.5), "number of a step"), (lambda: FasterDiffusion(tau=math.nan), "0 to 1000"),
    *[(lambda power=power: DeepCache(3, center=9, power=power), "power must be 1 to 10")
      for power in (0.98, math.nan, math.inf)],
    (lambda: nonuniform_keys(10, 5, 5, 1.4), "no 5 different key"),     # the release lowers the power, but not to 1
    *[(lambda keys=keys: Inherit("mid", keys), "from 1 up, or whole numbers that begin with 0 and rise")
      for keys in ([1, 2], [5, 3], [-3, 4], [], (0, 2, 2), 2.5, True, (0, 2.5), [0, "1"], None, "often")],
    *[(lambda name=name, technique=technique: next(generate(
        lambda *_: None, *given(), plan("ddim", 10), **{name: technique})), "needs a UNet")
      for name, technique in (("cache", DeepCache(2)), ("cache", FasterDiffusion(2, True)), ("tgate", TGate(3)))],
    (lambda: FasterDiffusion(0), "paper, rescaled, square"), (lambda: run(FasterDiffusion((0, 10))), "beyond the"),
    (lambda: FasterDiffusion(2, max_batch=4), "without parallel"), (lambda: DeepCache(3, power=1.2), "without center"),
    (lambda: FasterDiffusion(2, alpha=0, tau=300), "tau does nothing with alpha 0"),
    (lambda: FasterDiffusion(alpha=2.0), "between 0 and 1"), (lambda: FasterDiffusion(max_batch=0), "1 or more rows"),
    (lambda: DeepCache(2, center=60).key_steps(50), "center 60 is not")])
def test_bad_and_idle_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
