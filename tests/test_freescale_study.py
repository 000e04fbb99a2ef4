"""lab/freescale_study.py: what it counts, and that every arm runs, is kept and is not made twice."""
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from command import run_command
from folder import TINY
from lab import freescale_study, shapes
from lab.evaluate import judged, make_scenes
from lab.freescale_study import arms, facts, log_spectrum, power, summary
from txt2img import StableDiffusion


@pytest.fixture()
def command(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["freescale_study", *map(str, arguments)])
        code = 0
        try:
            run_command(freescale_study.main)
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err
    return run


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
    noise = (torch.randn(40, 64, 64, 3, generator=torch.Generator().manual_seed(0)) * 20 + 128).clamp(0, 255)
    spectrum = log_spectrum(list(map(power, noise.byte().numpy())))
    assert spectrum.max() - spectrum.min() < 0.2


def test_every_arm_differs_from_the_others_in_what_it_asks_for():
    sd = StableDiffusion.load(TINY)
    for factor, stages in ((2, 2), (4, 3)):
        table = arms(sd, factor)
        arms(sd, factor, guided=False)["ScaleCrafter"].over({})(0)["model"](
            torch.zeros(1, 4, *2 * [16 * factor]), torch.tensor(999.0), torch.zeros(1, 24, 128))
        assert len(table) == 14 and table["direct"].settings == dict(height=64 * factor, width=64 * factor)
        for name, changes in freescale_study.FREESCALE.items():
            free = table[name].settings["freescale"]
            assert len(free.resolutions) == stages and free.resolutions[-1] == (64 * factor,) * 2
            assert all(getattr(free, field) == value for field, value in changes.items())


def test_arms_are_judged_kept_and_shown(tmp_path, command):
    arguments = ("--out", tmp_path, "--n", 2, "--steps", 2, "--arms", "direct,FreeScale", "--columns", 2)
    code, out, _ = command(*arguments)
    assert code == 0 and "FreeScale" in out
    results = json.loads((tmp_path / "freescale_2x.json").read_text())
    measured = results["measure"]
    assert set(measured) == {"direct", "FreeScale"} and all(len(arm["strict"]) == 2 for arm in measured.values())
    assert all(arm["peak GB"] > 0.001 and arm["seconds"] > 0 for arm in measured.values())
    assert "over base" in measured["direct"]
    assert Image.open(tmp_path / "freescale_2x.png").height == 3 * 136
    measured["direct"]["too many"] = 0.123                                 # shown as it is kept, so not made again
    (tmp_path / "freescale_2x.json").write_text(json.dumps(results))
    assert "0.123" in command(*arguments, "--arms", "direct")[1]


@pytest.mark.parametrize("flags,words", [(["--arms", "FreeU"], "there is no arm 'FreeU'"),
                                         (["--n", 0], "--n must be 1"),
                                         (["--kind", "cats"], "--kind is one of"), (["--steps", 0], "steps must be")])
def test_bad_input_ends_in_one_line(flags, words, tmp_path, command):
    code, _, err = command("--out", tmp_path, *flags)
    assert code == 2 and words in err and err.count("\n") == 1
