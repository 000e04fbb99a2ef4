"""lab/freescale_study.py: what it counts, and that every arm runs, is kept and is not made twice."""
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import TEXT, TWO_LEVELS, randn, write_random
from PIL import Image
from tokenizers import Tokenizer

from folder import TINY, read_config
from lab import freescale_study, shapes
from lab.evaluate import judged, make_scenes
from lab.freescale_study import arms, facts, log_spectrum, main, power, summary
from stable_diffusion import StableDiffusion


def test_drawings_of_the_scenes_are_right_at_any_size_and_a_repeated_object_is_not():
    prompts, scenes = make_scenes("colors", 12, 1)
    for size in (128, 256):
        real = [shapes.draw(scene, size, size) for scene in scenes]
        four = [np.tile(picture[::2, ::2], (2, 2, 1)) for picture in real]
        spectrum = log_spectrum(list(map(power, real)))
        for pictures, right, too_many in ((real, True, 0), (four, False, 1)):
            found = summary([facts(*pair) for pair in zip(pictures, prompts)], spectrum)
            assert all(judged(*pair)["strict"] == right for pair in zip(pictures, prompts))
            assert found["too many"] == too_many
            assert found["distance of spectra"] < 1e-5 if right else found["distance of spectra"] > 0.05


def test_the_spectrum_of_white_noise_is_flat():
    noise = (randn(40, 64, 64, 3) * 20 + 128).clamp(0, 255)
    spectrum = log_spectrum(list(map(power, noise.byte().numpy())))
    assert spectrum.max() - spectrum.min() < 0.2


@pytest.mark.parametrize("factor", [2, 4])
def test_the_arms_are_freescale_its_changes_and_its_rivals(factor):
    table = arms(64, factor)
    assert len(table) == 14 and all(arm.base == "FreeScale" for arm in table.values())
    assert [name for name, arm in table.items() if arm.primary] == ["direct"]
    for name, changes in freescale_study.FREESCALE.items():
        free = table[name].settings["freescale"]
        assert free.resolutions == factor and all(getattr(free, field) == of for field, of in changes.items())


def test_every_arm_makes_pictures_of_the_wanted_size_and_no_two_are_alike(tmp_path):
    deep = replace(TWO_LEVELS, channels=(8, 8, 16), depth=(1, 1, 1), heads=(1, 1, 1))      # some arms act from level 2
    config = replace(read_config(TINY), unet=deep, text_encoder=replace(TEXT, vocab=55), size=32)
    sd, pictures = StableDiffusion.load(write_random(tmp_path / "deep", config, Tokenizer.from_file(
        str(TINY / "tokenizer.json")))), {}
    for name, arm in arms(32, 2).items():
        image = sd.decode(sd.sample("a red circle", steps=3, **arm.settings))
        side = 32 if name == "training size" else 64
        assert image.shape == (1, 3, side, side)
        pictures[image.numpy().tobytes()] = name
    assert len(pictures) == 14


def test_arms_are_judged_kept_and_shown(tmp_path, command, world):
    arguments = ("--model", world, "--out", tmp_path, "--n", 2, "--steps", 2, "--arms", "direct,FreeScale",
                 "--columns", 2)
    code, out, _ = command(main, *arguments)
    assert code == 0 and "| direct" in out and "declared before the run: strict score, direct over FreeScale" in out
    results = json.loads((tmp_path / "freescale_2x.json").read_text())
    measured = results["measure"]
    assert set(measured) == {"direct", "FreeScale"} and all(len(arm["strict"]) == 2 for arm in measured.values())
    assert all(arm["peak GB"] > 0 and arm["seconds"] > 0 for arm in measured.values())
    assert "over base" in measured["direct"]
    assert Image.open(tmp_path / "freescale_2x.png").height == 3 * 136
    measured["direct"]["too many"] = 0.123                                 # shown as it is kept, so not made again
    (tmp_path / "freescale_2x.json").write_text(json.dumps(results))
    assert "0.123" in command(main, *arguments, "--arms", "direct")[1]


@pytest.mark.parametrize("flags,words", [(["--arms", "FreeU"], "there is no arm 'FreeU'"),
                                         (["--n", 0], "--n must be 1"),
                                         (["--kind", "cats"], "--kind is one of"), (["--steps", 0], "steps must be")])
def test_bad_input_ends_in_one_line(flags, words, tmp_path, command):
    code, _, err = command(main, "--out", tmp_path, *flags)
    assert code == 2 and words in err and err.count("\n") == 1
