"""lab/freeu_study.py: the amplitude's known values, looking changes nothing, the search, and one small run."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import make, randn, seeded

from folder import TINY
from freeu import FreeU, damp_low_frequencies
from lab import freeu_study
from lab.freeu_study import ChannelChoice, Plain, Recorder, Runs, arms, main, relative_log_amplitude
from lab.study import Results
from sampler import Condition, generate, plan
from stable_diffusion import StableDiffusion
from unet import UNet, UNetConfig

WIDER = UNetConfig(channels=(8, 16, 32, 32), depth=(1, 1, 1, 0), heads=(2, 2, 2, 2), context_dim=16, groups=8)


@pytest.fixture(scope="module")
def one_step():
    """A run of one step under anything that can stand in FreeU's place -> its latents."""
    unet = make(UNet, WIDER)

    def run(freeu) -> torch.Tensor:
        *_, (_, x) = generate(unet, randn(4, 4, 16, 16), Condition(randn(4, 5, 16, seed=1)), None, plan("ddim", 1),
                              freeu=freeu)
        return x
    return run


# ------------------------------------------------------------------------------------------------------- amplitude

@pytest.mark.parametrize("size", [(16, 16), (15, 15), (16, 24), (30, 16)])
def test_white_noise_has_its_plateau_and_scaling_changes_nothing(size):
    x = randn(64, 64, *size)
    frequency, relative, absolute = relative_log_amplitude(x)
    assert relative[0] == 0 and abs(relative[1:].mean() - freeu_study.WHITE_NOISE) < 0.03
    assert relative[1:].std() < 0.03
    assert (relative_log_amplitude(5 * x)[1] - relative).abs().max() < 1e-5
    assert (relative_log_amplitude(5 * x)[2] - absolute - math.log(5)).abs().max() < 1e-5
    n = min(size)
    assert len(frequency) == math.ceil(n / 2) and torch.allclose(frequency, 2 * torch.arange(math.ceil(n / 2)) / n)


def test_a_square_map_is_read_along_its_main_diagonal():
    i = torch.arange(16)
    wave = torch.cos(2 * math.pi * 3 * (i[:, None] + i) / 16) + 1
    frequency, relative, _ = relative_log_amplitude(wave[None, None])
    assert relative[3] == pytest.approx(-math.log(2), abs=1e-4) and frequency[3] == 6 / 16
    assert relative[[1, 2, 4, 5, 6, 7]].max() < -10


def test_the_skip_filter_lifts_the_whole_relative_curve_by_damping_the_mean():
    x, s = randn(8, 4, 16, 16), 0.2
    _, before, plain_before = relative_log_amplitude(x)
    _, after, plain_after = relative_log_amplitude(damp_low_frequencies(x, s))
    assert (after - before)[1] == pytest.approx(math.log((1 + s) / (2 * s)), abs=1e-3)                # 1.099
    assert (after - before)[2:] == pytest.approx(torch.full((6,), -math.log(s)), abs=1e-3)            # 1.609
    assert (plain_after - plain_before)[2:].abs().max() < 1e-3


def test_the_two_bands_sum_to_the_image_and_constant_images_have_no_high_band():
    images = torch.rand(2, 3, 32, 48, generator=seeded(0)[0])
    low, high = freeu_study.bands(images)
    assert (low + high - images).abs().max() < 1e-6 and high.mean().abs() < 1e-6
    assert freeu_study.bands(torch.ones(1, 3, 16, 16))[1].abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------ in FreeU's place

@pytest.mark.parametrize("inner", [None, FreeU(1.5, 1.6, 0.9, 0.2)])
def test_the_recorder_changes_nothing_and_sees_every_layer(inner, one_step):
    recorder = Recorder(inner, images=2)
    assert torch.equal(one_step(recorder), one_step(inner))
    (met,) = recorder.calls
    assert [m.skip.mean.shape[0] for m in met] == [2] * 3 + [4] * 3 + [8] * 3 + [16] * 3
    changed = [m.entering.norm != m.backbone.norm for m in met]
    assert changed == ([False] * 12 if inner is None else [True] * 10 + [False] * 2)


def test_recording_a_whole_run_keeps_each_step_and_the_same_latents(narrow):
    sd, prompts = StableDiffusion.load(narrow), ["a red circle", "a blue circle"]
    recorder = Recorder(FreeU(1.5, 1.6, 0.9, 0.2, skip=(0.5, 1.0)), images=2)
    settings = {"steps": 2, "cfg_scale": 4.0}
    assert torch.equal(sd.sample(prompts, freeu=recorder, **settings),
                       sd.sample(prompts, freeu=recorder.inner, **settings))
    assert [len(met) for met in recorder.calls] == [4, 4]


@pytest.mark.parametrize("version", [1, 2])
def test_the_first_half_of_the_channels_is_freeu_itself(version, one_step):
    factors = (1.3, 1.4, 0.9, 0.2, version)
    assert torch.equal(one_step(ChannelChoice(*factors, which="first half")), one_step(FreeU(*factors)))


@pytest.mark.parametrize("which, chosen", [("all", range(32)), ("first half", range(16)),
                                           ("second half", range(16, 32)), ("every other", range(0, 32, 2))])
def test_a_choice_of_channels_scales_exactly_those(which, chosen):
    h, skip = randn(2, 32, 4, 4), randn(2, 8, 4, 4, seed=1)
    got, got_skip = ChannelChoice(1.5, 1.0, 1.0, 1.0, which=which)(h, skip, 0, WIDER)
    expected = torch.stack([h[:, c] * (1.5 if c in chosen else 1.0) for c in range(32)], dim=1)
    assert torch.equal(got, expected) and torch.equal(got_skip, skip)


def test_plain_factors_act_in_every_layer(one_step):
    h, skip = Plain(1.2, 0.8)(torch.ones(1, 3, 2, 2), torch.ones(1, 5, 2, 2), 11, WIDER)
    assert h.eq(1.2).all() and skip.eq(0.8).all()
    assert torch.equal(one_step(Plain(1.0, 1.0)), one_step(None))


# ---------------------------------------------------------------------------------------------- search and measure

def test_the_search_finds_the_best_region_of_a_toy_reward():
    best = np.array([1.2, 1.5, 0.7, 0.4])
    tried = freeu_study.search(lambda f: -float(np.abs(np.array(f) - best).max()), [(1.0, 1.0, 1.0, 1.0)], 200)
    assert len(tried) == 200 and tried[0][1] == max(reward for _, reward in tried)
    assert np.abs(np.array(tried[0][0]) - best).max() < 0.12


def test_the_search_tries_what_is_known_and_stays_within_its_ranges():
    known = [(1.0, 1.0, 1.0, 1.0), (1.3, 1.4, 0.9, 0.2)]
    tried = [factors for factors, _ in freeu_study.search(lambda f: f[0], known, 40, seed=3)]
    assert set(known) <= set(tried) and len(tried) == 40
    assert (np.array(tried) >= freeu_study.LOW).all() and (np.array(tried) <= freeu_study.HIGH).all()


def test_only_a_search_adds_its_arm_and_the_preset_is_the_primary_one():
    found = {arm.name: arm for arm in arms("tiny", (1.1, 1.2, 0.9, 0.8))}
    assert found["searched"].settings["freeu"].s2 == 0.8
    assert [arm.name for arm in arms("tiny", None)] == [name for name in found if name != "searched"]
    assert [arm.name for arm in found.values() if arm.primary] == ["preset v2"]


# ----------------------------------------------------------------------------------------------------- the command

def test_a_small_run_writes_every_figure_and_measures_what_isnt_there_yet(tmp_path, world):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib (requirements-dev.txt)")
    sd, settings = StableDiffusion.load(world), {"steps": 2, "cfg_scale": 1.0}
    runs = Runs(sd, ["a red circle"], settings, preset=FreeU(1.3, 1.4, 0.9, 0.2))
    path = tmp_path / "freeu.json"
    results = Results(path, {"model": "x"})
    freeu_study.make_figures(runs, tmp_path, results)
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "denoising", "spectra_over_steps", "spectra_of_layers_relative", "spectra_of_layers_log", "feature_maps",
        "image_spectra", "b_s_grids_plain", "b_s_grids_freeu", "sheets_b_sweep", "sheets_channels",
        "sheets_versions", "sheets_s_ablation"}
    figures = json.loads(path.read_text())["figures"]
    assert set(figures) == set(freeu_study.FIGURES)
    assert figures["spectra_over_steps"]["its plateau"] == pytest.approx(freeu_study.WHITE_NOISE, abs=0.05)
    assert len(figures["spectra_of_layers"]["layers"]) == 4

    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    freeu_study.make_figures(runs, tmp_path, results)                 # all there: nothing is made
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times

    known, few = arms("tiny", None), ("base", "preset v2")
    freeu_study.tune(sd, results, settings, candidates=3, n=2, seed=0)
    found = json.loads(path.read_text())["search"]["factors"]
    assert len(found["tried"]) == 3 and found["best"] == found["tried"][0][0] and len(found["prompts"]) == 2
    run = [arm for arm in known if arm.name in few]
    freeu_study.measure(sd, results, known, run, settings, n=6, seed=0)
    first = json.loads(path.read_text())
    assert first["figures"] == figures and len(first["measure"]["preset v2"]["strict"]) == 6
    assert first["design"]["declared"]["primary"] == ["preset v2 over base"]
    freeu_study.measure(None, results, known, run, settings, n=6, seed=0)                  # kept: needs no model
    assert json.loads(path.read_text()) == first


def test_a_model_without_a_judge_is_an_error_of_one_line(tmp_path, command):
    config = json.loads((TINY / "config.json").read_text()) | {"family": "sd15"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = command(main, "--model", tmp_path, "--out", tmp_path / "out", "--measure")
    assert code == 2 and "can be judged" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments, words", [
    (("--model", "nowhere"), "no model folder nowhere"), (("--steps", "2000"), "steps must be 1 to 1000"),
    (("--n", "3"), "--n must be"), (("--device", "nonsense"), "nonsense")])
def test_bad_input_is_an_error_of_one_line(arguments, words, command):
    code, _, err = command(main, *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1
