"""freeu.py: against outputs of the official code, against its Fourier form, and the algebra that the paper promises."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, make, randn
from safetensors import safe_open
from torch import Tensor

from freeu import PRESETS, FreeU, ScaleLong, SkipTuning, damp_low_frequencies, damp_mean, structure_gain
from sampler import Condition, generate, plan
from unet import CONFIGS, OFF, Techniques, UNet, UNetConfig

# wider than the others', so that levels differ in their channels: the rule "channels" goes by them
WIDE = UNetConfig(channels=(32, 64, 128, 128), depth=(1, 1, 1, 0), heads=(2, 2, 2, 2), context_dim=16, groups=8)
NEUTRAL = FreeU(1, 1, 1, 1)
GOLDEN = safe_open(DATA / "freeu.safetensors", framework="pt")
CASES = {name: case for name, case in json.loads(GOLDEN.metadata()["manifest"]).items()
         if any(key.startswith(name + ".") for key in GOLDEN.keys())}


def golden(case: str, *names: str) -> list[Tensor]:
    return [GOLDEN.get_tensor(f"{case}.{name}") for name in names]


def fourier_form(x: Tensor, s: float, t: int) -> Tensor:
    """What the authors wrote: scale the middle of the shifted spectrum, keep the real part."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1))
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    mask = torch.ones(x.shape[-2:], dtype=torch.float64)
    mask[max(h - t, 0):h + t, max(w - t, 0):w + t] = s
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))).real


# ------------------------------------------------------------------------------------------------- official outputs

@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("v1")])
def test_version_1_equals_diffusers(case):
    facts = CASES[case]
    h, skip, h_out, skip_out = golden(case, "h", "skip", "h_out", "skip_out")
    f = FreeU(*(facts[k] for k in ("b1", "b2", "s1", "s2")), version=1, rule="level")
    got_h, got_skip = f(h, skip, layer=3 * facts["stage"], config=WIDE)
    tolerance = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}[facts["dtype"]]
    assert got_h.dtype == h.dtype and got_skip.dtype == skip.dtype
    assert torch.equal(got_h, h_out) and (got_skip.float() - skip_out.float()).abs().max() <= tolerance


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("ff")])
def test_the_filter_equals_the_official_one(case):
    x, out = golden(case, "x", "out")
    assert (damp_low_frequencies(x, CASES[case]["scale"], CASES[case]["threshold"]) - out).abs().max() <= 2e-6


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("v2")])
def test_version_2_equals_the_papers_formula(case):
    h, skip, alpha, h_out, skip_out = golden(case, "h", "skip", "alpha", "h_out", "skip_out")
    b, s = CASES[case]["b"], CASES[case]["s"]
    got_h, got_skip = FreeU(b1=b, s1=s, rule="level")(h, skip, layer=0, config=WIDE)
    for got, want in ((structure_gain(h, b), alpha), (got_h, h_out), (got_skip, skip_out)):
        assert (got - want).abs().max() <= 2e-6


# -------------------------------------------------------------------------------------------------------- the filter

@pytest.mark.parametrize(
    "size", [(16, 16), (15, 15), (9, 12), (7, 5), (1, 1), (2, 2), (3, 3), (1, 8), (2, 5), (96, 64)], ids=str)
def test_the_closed_form_is_the_fourier_form(size):
    for t in range(1, min(3, max(min(size) // 2, 1)) + 1):
        x = randn(2, 3, *size)
        assert (damp_low_frequencies(x, 0.2, t) - fourier_form(x, 0.2, t)).abs().max() <= 2e-6
    if max(size) <= 2:
        assert torch.allclose(damp_low_frequencies(x, 0.2), 0.2 * x, atol=1e-6)


def test_a_threshold_larger_than_the_map_is_refused():
    with pytest.raises(ValueError, match="threshold 3 is too large for a 8x4 map; use at most 2"):
        damp_low_frequencies(randn(1, 1, 4, 8), 0.2, threshold=3)


def test_the_mean_is_scaled_by_s_and_a_constant_map_too():
    x = randn(2, 3, 9, 12)
    for damp in (damp_low_frequencies, damp_mean):
        assert torch.allclose(damp(x, 0.2).mean(dim=(2, 3)), 0.2 * x.mean(dim=(2, 3)), atol=1e-6)
        assert torch.allclose(damp(torch.full((1, 1, 8, 8), 2.5), 0.2), torch.tensor(0.5), atol=1e-6)


def test_the_gain_of_every_wave_shows_the_lopsided_window():
    i, j = torch.meshgrid(torch.arange(16.), torch.arange(16.), indexing="ij")
    for down, along, gain in ((1, 0, .6), (0, 1, .6), (1, 1, .6), (1, -1, 1.), (2, 0, 1.), (0, 2, 1.), (0, 0, .2)):
        wave = torch.cos(2 * math.pi * (down * i + along * j) / 16)[None, None]
        assert (damp_low_frequencies(wave, 0.2) - gain * wave).abs().max() < 3e-6


def test_the_filter_and_the_gain_are_differentiable():
    h, skip = (randn(2, c, *size, dtype=torch.float64).requires_grad_() for c, size in ((4, (3, 4)), (2, (7, 5))))
    assert torch.autograd.gradcheck(lambda h, k: FreeU(1.3, 1.4, 0.9, 0.2, rule="level")(h, k, 0, WIDE), (h, skip))


# ------------------------------------------------------------------------------------------------------ the backbone

def test_the_structure_gain_runs_from_1_to_b_in_every_image():
    h = randn(3, 8, 6, 7)
    gain = structure_gain(h, 1.4)
    assert torch.allclose(gain.amin(dim=(1, 2, 3)), torch.tensor(1.)) and torch.allclose(gain.amax((1, 2, 3)),
                                                                                        torch.tensor(1.4))
    assert torch.allclose(structure_gain(3 * h + 2, 1.4), gain, atol=1e-5)
    assert torch.allclose(structure_gain(-h, 1.4), 2.4 - gain, atol=1e-5)
    assert torch.equal(structure_gain(h.flip(-1), 1.4), gain.flip(-1))


def test_a_map_without_structure_keeps_gain_1_and_is_never_nan():
    for shape in ((1, 4, 1, 1), (1, 4, 5, 5)):
        assert torch.equal(structure_gain(torch.full(shape, 3.0), 1.5), torch.ones(1, 1, *shape[2:]))


@pytest.mark.parametrize("version", [1, 2])
def test_only_the_first_half_of_the_channels_changes_and_inputs_are_left_alone(version):
    h, skip = randn(2, 5, 8, 8), randn(2, 3, 8, 8, seed=1)
    before = h.clone(), skip.clone()
    f = FreeU(1.5, 1.6, 0.9, 0.2, version=version, rule="level")
    once, twice = f(h, skip, 0, WIDE), f(h, skip, 0, WIDE)
    assert torch.equal(h, before[0]) and torch.equal(skip, before[1])
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    assert torch.equal(once[0][:, 2:], h[:, 2:]) and not torch.equal(once[0][:, :2], h[:, :2])


def test_batch_mates_do_not_influence_each_other():
    h, skip = randn(3, 8, 8, 8), randn(3, 4, 8, 8, seed=1)
    f = FreeU(1.5, 1.6, 0.9, 0.2, rule="level")
    loud = [torch.cat([100 * x[:1], x[1:]]) for x in (h, skip)]
    for a, b in zip(f(h, skip, 0, WIDE), f(*loud, 0, WIDE)):
        assert torch.equal(a[1:], b[1:])


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_close_and_keeps_its_dtype(dtype, tolerance):
    h, skip = randn(2, 8, 12, 8).to(dtype), randn(2, 8, 12, 8, seed=1).to(dtype)
    f = FreeU(1.5, 1.6, 0.9, 0.2, rule="level")
    for half, full in zip(f(h, skip, 0, WIDE), f(h.double(), skip.double(), 0, WIDE)):
        assert half.dtype == dtype and (half.double() - full).abs().max() < tolerance


# ------------------------------------------------------------------------------------------------------- the U-Net

SD = [1] * 7 + [2] * 3 + [0] * 2            # which of (b1, s1), (b2, s2), neither, by decoder layer
LAYERS = {"sd15": (SD, [1] * 3 + [2] * 3 + [0] * 6), "sd21": (SD, [1] * 3 + [2] * 3 + [0] * 6),
          "sdxl": ([1] * 4 + [2] * 3 + [0] * 2, [1] * 3 + [2] * 3 + [0] * 3), "tiny": (SD, [1] * 3 + [2] * 3 + [0] * 6)}


@pytest.mark.parametrize("family", LAYERS)
def test_both_rules_act_on_the_layers_that_the_released_codes_act_on(family):
    config = CONFIGS[family]
    with torch.device("meta"):
        unet = UNet(config)
    widths = [unit.resnets[0].norm1.num_channels for unit in unet.units()[unet.middle + 1:]]
    skips = [config.channels[0]]                                     # as UNet.__init__ counts them
    for i, c in enumerate(config.channels):
        skips += [c] * (config.layers + (i + 1 < len(config.channels)))
    for rule, want in zip(("channels", "level"), LAYERS[family]):
        f = FreeU(1.1, 1.2, 0.9, 0.8, rule=rule)
        got = [f.factors(w - k, i, config) for i, (w, k) in enumerate(zip(widths, reversed(skips)))]
        assert got == [{1: (1.1, 0.9), 2: (1.2, 0.8), 0: (1.0, 1.0)}[stage] for stage in want]


@pytest.fixture(scope="module")
def unet() -> UNet:
    return make(UNet, WIDE)


def inputs(height: int = 8, width: int = 8, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return randn(batch, 4, height, width), torch.full((batch,), 500), randn(batch, 5, 16, seed=1)


def test_neutral_factors_change_nothing_and_off_is_bit_equal(unet):
    plain = unet(*inputs())
    assert torch.equal(unet(*inputs(), on=Techniques()), plain)
    assert torch.equal(unet(*inputs(), on=Techniques(freeu=NEUTRAL)), plain)
    assert NEUTRAL.at(0.5) is None


@pytest.mark.parametrize("factors", [dict(b1=0.0), dict(s2=0.0), dict(b2=1.2), dict(s1=0.5)])
def test_every_factor_acts_and_zero_is_a_factor(unet, factors):
    on = Techniques(freeu=replace(NEUTRAL, **factors))
    assert not torch.allclose(unet(*inputs(), on=on), unet(*inputs()), atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (24, 16)])
def test_a_batch_with_guidance_equals_two_passes_at_any_size(unet, size):
    x, t, context = inputs(*size)
    on = Techniques(freeu=FreeU(1.5, 1.6, 0.9, 0.2))
    together = unet(x, t, context, on=on)
    apart = torch.cat([unet(x[k:k + 1], t[:1], context[k:k + 1], on=on) for k in range(2)])
    assert (together - apart).abs().max() <= 1e-5 * apart.abs().max()


def test_the_whole_unet_equals_diffusers_with_its_own_rule(unet):
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs requirements-dev.txt")
    c = WIDE
    theirs = diffusers.UNet2DConditionModel(block_out_channels=c.channels, norm_num_groups=c.groups,
                                            cross_attention_dim=c.context_dim, attention_head_dim=2)
    theirs.load_state_dict(unet.state_dict())
    theirs.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    on = Techniques(freeu=FreeU(1.2, 1.4, 0.9, 0.2, version=1, rule="level"))
    for size in ((8, 8), (12, 16)):
        want, got = theirs(*inputs(*size)).sample.detach(), unet(*inputs(*size), on=on)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# -------------------------------------------------------------------------------------------- time, and skip scaling

def test_each_gate_opens_with_its_first_fraction_of_the_steps_and_closes_with_its_second():
    f = FreeU(1.5, 1.6, 0.9, 0.2, window="dc", backbone=(0, 0.6), skip=(0.4, 0.8))
    for fraction, b, s in ((0, True, False), (0.4, True, True), (0.59, True, True), (0.6, False, True),
                           (0.79, False, True)):
        now = f.at(fraction)
        assert (now.b1, now.b2) == ((1.5, 1.6) if b else (1, 1)) and (now.s1, now.s2) == ((0.9, 0.2) if s else (1, 1))
    assert f.at(0.8) is NEUTRAL.at(0.5) is FreeU(1.5, 1.6, 1, 1, backbone=(0.5, 1)).at(0.2) is None
    for skips in (SkipTuning(0.8, steps=(0.25, 0.5)), ScaleLong(0.8, steps=(0.25, 0.5))):
        assert [skips.at(fraction) for fraction in (0, 0.25, 0.49, 0.5)] == [None, skips, skips, None]


@pytest.mark.parametrize("technique", [
    dict(freeu=FreeU(1.5, 1.6, 0.9, 0.2, backbone=(0.25, 0.5), skip=(0.25, 0.5))),
    dict(skips=SkipTuning(0.8, steps=(0.25, 0.5))), dict(skips=ScaleLong(0.9, steps=(0.25, 0.5)))], ids=str)
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_only_the_steps_within_the_gates_differ_from_the_plain_network(unet, technique, sampler):
    seen, p = [], plan(sampler, 4)

    class Watched:
        """The U-Net, in each call compared with itself without techniques."""
        units, embed_schedule, embed_text = unet.units, unet.embed_schedule, unet.embed_text

        def __call__(self, *given, on=OFF):
            out = unet(*given, on=on)
            seen.append(torch.equal(out, unet(*given)))
            return out
    list(generate(Watched(), randn(1, 4, 8, 8), Condition(randn(1, 5, 16, seed=1)), None, p, **technique))
    assert seen == [p.step(i) != 1 for i in range(p.calls)]


def test_skips_have_factors_by_depth():
    rho = [SkipTuning(0.6).factor(i, 12) for i in range(12)]
    assert rho[0] == 0.6 and rho[-1] == pytest.approx(1) and rho[3] + rho[8] == pytest.approx(1.6)
    assert [SkipTuning(0.5, 0.8).factor(i, 4) for i in (0, 3)] == [0.5, 0.8]
    assert [ScaleLong(0.5).factor(i, 4) for i in range(4)] == [0.125, 0.25, 0.5, 1]


def test_skip_scaling_leaves_the_backbone_alone_and_comes_after_freeu(unet):
    h, skip, f, tuned = randn(1, 128, 4, 4), randn(1, 8, 4, 4, seed=1), FreeU(1.5, 1.6, 0.9, 0.2), SkipTuning(0.8)
    assert torch.equal(tuned(h, skip, 0, WIDE)[1], 0.8 * skip) and torch.equal(tuned(h, skip, 0, WIDE)[0], h)
    both = unet(*inputs(), on=Techniques(freeu=f, skips=tuned))
    one_by_one = Techniques(freeu=lambda h, skip, *place: tuned(*f(h, skip, *place), *place))
    assert torch.equal(unet(*inputs(), on=one_by_one), both)
    for alone in (Techniques(freeu=f), Techniques(skips=tuned), Techniques()):
        assert not torch.allclose(unet(*inputs(), on=alone), both, atol=1e-4)


@pytest.mark.parametrize("kind,settings,words", [
    (FreeU, dict(b1=-1), "b1"), (FreeU, dict(s2=11), "s2"), (FreeU, dict(b2="high"), "b2"),
    (FreeU, dict(b1=math.nan), "b1"), (FreeU, dict(version=3), "1 or 2"), (FreeU, dict(rule="block"), "channels or"),
    (FreeU, dict(window="disc"), "2x2 or dc"), (FreeU, dict(threshold=0), "threshold"),
    (FreeU, dict(backbone=(0.5, 0.2)), "backbone must lie"), (FreeU, dict(skip=(0, 1.5)), "skip must lie"),
    (FreeU, dict(b1=1, b2=1, backbone=(0, 0.5)), "backbone does nothing with b1 = b2 = 1"),
    *[(FreeU, dict(s1=1, s2=1) | idle, f"{name} does nothing with s1 = s2 = 1")
      for idle in (dict(window="dc"), dict(threshold=2), dict(skip=(0, 0.5))) for name in idle],
    (FreeU, dict(window="dc", threshold=2), "threshold does nothing with window=dc"),
    (SkipTuning, dict(bottom=-1), "Skip-Tuning's bottom"), (SkipTuning, dict(bottom=1, top=11), "Skip-Tuning's top"),
    (SkipTuning, dict(bottom=1, steps=(1, 0)), "Skip-Tuning's steps"), (ScaleLong, dict(kappa=math.nan), "kappa"),
    (ScaleLong, dict(kappa=1, steps=(0, 2)), "ScaleLong's steps")])
def test_bad_and_idle_settings_are_named(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(**settings)


@pytest.mark.parametrize("settings", [FreeU(1.5, 1.6, 0.9, 0.2, skip=(0.95, 1)), ScaleLong(0.9, steps=(0.12, 0.18)),
                                      FreeU(1.5, 1.6, 0.9, 0.2, backbone=(0.31, 0.39)), SkipTuning(0.9, 1, (0.95, 1))])
def test_a_gate_that_is_closed_in_every_step_of_a_run_is_refused(settings):
    settings.check(WIDE, 50)
    with pytest.raises(ValueError, match="at least one of the run's 10 steps"):
        settings.check(WIDE, 10)


# version 2: the README of 2023-10-18; version 1: the README of 2023-09-22, and for SDXL the community's sweep
PUBLISHED = {2: {"sd15": (1.5, 1.6, 0.9, 0.2), "sd21": (1.4, 1.6, 0.9, 0.2), "sdxl": (1.3, 1.4, 0.9, 0.2)},
             1: {"sd15": (1.2, 1.4, 0.9, 0.2), "sd21": (1.1, 1.2, 0.9, 0.2), "sdxl": (1.1, 1.2, 0.6, 0.4)}}


@pytest.mark.parametrize("version", PUBLISHED)
@pytest.mark.parametrize("family", CONFIGS)
def test_factors_that_are_not_given_are_the_published_ones_of_the_family(family, version):
    sd, published = SimpleNamespace(config=SimpleNamespace(family=family)), PRESETS[version][family]
    assert published == PUBLISHED[version].get(family, published)
    assert FreeU(version=version).bind(sd) == FreeU(*published, version=version)
    some = FreeU(b2=0.0, s1=1, version=version).bind(sd)
    assert (some.b2, some.s1) == (0, 1) and (some.b1, some.s2) == (published[0], published[3])


def test_a_run_without_a_family_needs_all_factors(unet):
    with pytest.raises(ValueError, match="give b1, b2, s1 and s2"):
        next(generate(unet, randn(1, 4, 8, 8), Condition(randn(1, 5, 16)), None, plan("ddim", 4), freeu=FreeU(b1=1.5)))
