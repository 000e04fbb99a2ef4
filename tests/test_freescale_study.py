"""lab/freescale_study.py: what it counts, and that every arm runs, is kept and is not made twice."""
import json

import numpy as np
import pytest
from conftest import randn
from PIL import Image

from folder import TINY
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


def test_every_arm_makes_pictures_of_the_wanted_size_and_no_two_are_alike():
    sd, pictures = StableDiffusion.load(TINY), {}
    for factor in (2, 4):
        table = arms(64, factor)
        assert len(table) == 14 and all(arm.base == "FreeScale" for arm in table.values())
        for name, arm in table.items() if factor == 2 else []:
            image = sd.decode(sd.sample("a red circle", steps=3, **arm.settings))
            side = 64 if name == "training size" else 128
            assert image.shape == (1, 3, side, side)
            pictures[image.numpy().tobytes()] = name
        for name, changes in freescale_study.FREESCALE.items():
            free = table[name].settings["freescale"]
            assert free.resolutions == factor and all(getattr(free, field) == of for field, of in changes.items())
    assert len(pictures) == 14


def test_arms_are_judged_kept_and_shown(tmp_path, command):
    arguments = ("--out", tmp_path, "--n", 2, "--steps", 2, "--arms", "direct,FreeScale", "--columns", 2)
    code, out, _ = command(main, *arguments)
    assert code == 0 and "FreeScale" in out
    results = json.loads((tmp_path / "freescale_2x.json").read_text())
    measured = results["measure"]
    assert set(measured) == {"direct", "FreeScale"} and all(len(arm["strict"]) == 2 for arm in measured.values())
    assert all(arm["peak GB"] > 0.001 and arm["seconds"] > 0 for arm in measured.values())
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
