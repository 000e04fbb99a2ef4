"""freeu.py: against outputs of the official code, against its Fourier form, and the algebra that the paper promises."""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import freeu
from freeu import FreeU, damp_low_frequencies, damp_mean, scale_long, skip_tuning, structure_gain
from sampler import generate
from unet import CONFIGS, UNet, UNetConfig

NARROW = UNetConfig(channels=(32, 64, 128, 128), depth=(1, 1, 1, 0), heads=(2, 2, 2, 2), context_dim=16, groups=8)
GOLDEN = safe_open(Path(__file__).parent / "data/freeu.safetensors", framework="pt")
CASES = {name: case for name, case in json.loads(GOLDEN.metadata()["manifest"]).items()
         if any(key.startswith(name + ".") for key in GOLDEN.keys())}


def golden(case: str, *names: str) -> list[torch.Tensor]:
    return [GOLDEN.get_tensor(f"{case}.{name}") for name in names]


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fourier_form(x: torch.Tensor, s: float, t: int) -> torch.Tensor:
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
    got_h, got_skip = f(h, skip, layer=3 * facts["stage"], config=NARROW)
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
    got_h, got_skip = FreeU(b1=b, s1=s, rule="level")(h, skip, layer=0, config=NARROW)
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


def test_an_impulse_gives_the_window_itself():
    delta = torch.zeros(1, 1, 8, 8)
    delta[..., 0, 0] = 1
    a, b = torch.meshgrid(*[torch.arange(8.) * 2 * math.pi / 8] * 2, indexing="ij")
    want = delta - 0.8 / 64 * (1 + a.cos() + b.cos() + (a + b).cos())
    assert (damp_low_frequencies(delta, 0.2) - want).abs().max() < 1e-7


def test_symmetries_hold_and_the_mirror_does_not():
    x = randn(1, 2, 16, 16)
    f = lambda x: damp_low_frequencies(x, 0.2)
    for same in (lambda x: x.mT, lambda x: x.flip(-1, -2), lambda x: x.roll((3, 5), (-2, -1))):
        assert (f(same(x)) - same(f(x))).abs().max() < 1e-6
    assert (f(x.flip(-1)) - f(x).flip(-1)).abs().max() > 0.05
    assert torch.allclose(damp_mean(x.flip(-1), 0.2), damp_mean(x, 0.2).flip(-1), atol=1e-6)     # the "dc" window


def test_the_filter_is_linear_self_adjoint_and_differentiable():
    a, b = randn(1, 2, 7, 5, dtype=torch.float64), randn(1, 2, 7, 5, seed=1, dtype=torch.float64)
    f = lambda x: damp_low_frequencies(x, 0.2)
    assert abs((f(a) * b).sum() - (a * f(b)).sum()) < 1e-12
    assert (f(2 * a + 3 * b) - 2 * f(a) - 3 * f(b)).abs().max() < 1e-12
    x = a.clone().requires_grad_()
    (b * f(x)).sum().backward()
    assert (x.grad - f(b)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x, k: FreeU(1.3, 1.4, 0.9, 0.2, rule="level")(x, k, 0, NARROW),
                                    (randn(2, 4, 3, 4, dtype=torch.float64).requires_grad_(), b.requires_grad_()))


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
    once, twice = f(h, skip, 0, NARROW), f(h, skip, 0, NARROW)
    assert torch.equal(h, before[0]) and torch.equal(skip, before[1])
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    assert torch.equal(once[0][:, 2:], h[:, 2:]) and not torch.equal(once[0][:, :2], h[:, :2])


def test_batch_mates_do_not_influence_each_other():
    h, skip = randn(3, 8, 8, 8), randn(3, 4, 8, 8, seed=1)
    f = FreeU(1.5, 1.6, 0.9, 0.2, rule="level")
    loud = [torch.cat([100 * x[:1], x[1:]]) for x in (h, skip)]
    for a, b in zip(f(h, skip, 0, NARROW), f(*loud, 0, NARROW)):
        assert torch.equal(a[1:], b[1:])


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_close_and_keeps_its_dtype(dtype, tolerance):
    h, skip = randn(2, 8, 12, 8).to(dtype), randn(2, 8, 12, 8, seed=1).to(dtype)
    f = FreeU(1.5, 1.6, 0.9, 0.2, rule="level")
    for half, full in zip(f(h, skip, 0, NARROW), f(h.double(), skip.double(), 0, NARROW)):
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
    widths = [unit.resnet.norm1.num_channels for unit in unet.up_units()]
    skips = [config.channels[0]]                                     # as UNet.__init__ counts them
    for i, c in enumerate(config.channels):
        skips += [c] * (config.layers + (i + 1 < len(config.channels)))
    for rule, want in zip(("channels", "level"), LAYERS[family]):
        f = FreeU(1.1, 1.2, 0.9, 0.8, rule=rule)
        got = [f.factors(w - k, i, config) for i, (w, k) in enumerate(zip(widths, reversed(skips)))]
        assert got == [{1: (1.1, 0.9), 2: (1.2, 0.8), 0: (1.0, 1.0)}[stage] for stage in want]


@pytest.fixture(scope="module")
def unet() -> UNet:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return UNet(NARROW).requires_grad_(False)


def inputs(height: int = 8, width: int = 8, batch: int = 2):
    return randn(batch, 4, height, width), torch.full((batch,), 500), randn(batch, 5, 16, seed=1)


def test_neutral_factors_change_nothing_and_off_is_bit_equal(unet):
    x, t, context = inputs()
    plain = unet(x, t, context)
    assert torch.equal(unet(x, t, context, freeu=None), plain)
    assert torch.equal(unet(x, t, context, freeu=FreeU()), plain)
    assert FreeU().at(0.5) is None


@pytest.mark.parametrize("factors", [dict(b1=0.0), dict(s2=0.0), dict(b2=1.2), dict(s1=0.5)])
def test_every_factor_acts_and_zero_is_a_factor(unet, factors):
    x, t, context = inputs()
    assert not torch.allclose(unet(x, t, context, freeu=FreeU(**factors)), unet(x, t, context), atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (96, 64)])
def test_a_batch_with_guidance_equals_two_passes_at_any_size(unet, size):
    x, t, context = inputs(*size)
    f = FreeU(1.5, 1.6, 0.9, 0.2)
    together = unet(x, t, context, freeu=f)
    apart = torch.cat([unet(x[k:k + 1], t[:1], context[k:k + 1], freeu=f) for k in range(2)])
    assert (together - apart).abs().max() <= 1e-5 * apart.abs().max()


def test_the_whole_unet_equals_diffusers_with_its_own_rule(unet):
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs requirements-dev.txt")
    c = NARROW
    theirs = diffusers.UNet2DConditionModel(block_out_channels=c.channels, norm_num_groups=c.groups,
                                            cross_attention_dim=c.context_dim, attention_head_dim=2)
    theirs.load_state_dict(unet.state_dict())
    theirs.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    for size in ((8, 8), (12, 16)):
        x, t, context = inputs(*size)
        want = theirs(x, t, context).sample.detach()
        got = unet(x, t, context, freeu=FreeU(1.2, 1.4, 0.9, 0.2, version=1, rule="level"))
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# -------------------------------------------------------------------------------------------- time, and skip scaling

def test_the_two_gates_open_and_close_by_the_fraction_of_the_steps():
    f = FreeU(1.5, 1.6, 0.9, 0.2, backbone=(0, 0.6), skip=(0.4, 1))
    assert f.at(0.0) == replace(f, s1=1.0, s2=1.0) and f.at(0.5) == f and f.at(0.6) == replace(f, b1=1.0, b2=1.0)
    assert FreeU(1.5, backbone=(0.5, 1)).at(0.2) is None


def test_steps_outside_the_gates_are_bit_equal_to_the_plain_loop(unet):
    def run(f):
        return [x for _, x in generate(unet, randn(1, 4, 8, 8), randn(1, 5, 16), steps=4, freeu=f)]
    plain, late = run(None), run(FreeU(1.5, 1.6, 0.9, 0.2, backbone=(0.5, 1), skip=(0.5, 1)))
    assert torch.equal(plain[1], late[1]) and not torch.equal(plain[2], late[2])


def test_skip_scaling_by_depth():
    rho = [skip_tuning(0.6)(i, 12) for i in range(12)]
    assert rho[0] == 0.6 and rho[-1] == pytest.approx(1) and rho[3] + rho[8] == pytest.approx(1.6)
    assert [scale_long(0.5)(i, 4) for i in range(4)] == [0.125, 0.25, 0.5, 1]


def test_skip_scaling_works_alone_and_together_with_freeu(unet):
    x, t, context = inputs()
    h, skip = randn(1, 128, 4, 4), randn(1, 8, 4, 4, seed=1)
    alone, both = FreeU(skip_scale=skip_tuning(0.8)), FreeU(1.5, 1.6, 0.9, 0.2, skip_scale=skip_tuning(0.8))
    assert torch.equal(alone(h, skip, 0, NARROW)[1], 0.8 * skip) and torch.equal(alone(h, skip, 0, NARROW)[0], h)
    assert torch.allclose(both(h, skip, 0, NARROW)[1], 0.8 * damp_low_frequencies(skip, 0.9))
    assert alone.at(0.5) is alone
    assert not torch.allclose(unet(x, t, context, freeu=alone), unet(x, t, context), atol=1e-4)


@pytest.mark.parametrize("settings,words", [
    (dict(b1=-1), "b1"), (dict(s2=11), "s2"), (dict(b2="high"), "b2"), (dict(b1=math.nan), "b1"),
    (dict(version=3), "1 or 2"), (dict(rule="block"), "channels or level"), (dict(window="disc"), "2x2 or dc"),
    (dict(threshold=0), "threshold"), (dict(backbone=(0.5, 0.2)), "backbone gate"), (dict(skip=(0, 1.5)), "skip gate")])
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        FreeU(**settings)


def test_there_is_a_preset_for_every_family_and_version():
    for version in (1, 2):
        for family in CONFIGS:
            assert FreeU(*freeu.PRESETS[version][family], version=version).at(0.5) is not None
