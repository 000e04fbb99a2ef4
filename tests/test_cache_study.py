"""lab/cache_study.py: watching changes nothing and sees every unit, and one small run leaves its files and resumes."""
import json

import pytest
import torch
from conftest import NARROW, UNETS, randn

from lab import cache_study, evaluate
from lab.cache_study import Watch, arms, main
from sampler import Condition, generate, plan
from unet import CONFIGS


def test_watching_changes_nothing_and_sees_every_unit_at_every_step():
    unet, watch = UNETS[NARROW], Watch(2)
    arguments = (unet, randn(2, 4, 8, 8), Condition(randn(2, 5, 8)), Condition(randn(2, 5, 8, seed=1)), plan("ddim", 4))
    plain, seen = ([x for _, x in generate(*arguments, cache=cache)] for cache in (None, watch))
    assert all(torch.equal(a, b) for a, b in zip(plain, seen))
    assert set(watch.size) == {(i, unit) for i in range(4) for unit in range(25)}
    assert set(watch.moved) == {(i, unit) for i in range(1, 4) for unit in range(25)}
    convolved = [unet.conv_in(x) for x in (randn(2, 4, 8, 8), plain[0])]           # what conv_in saw at steps 0 and 1
    change = (convolved[1] - convolved[0]).flatten(1).norm(dim=1) / convolved[0].flatten(1).norm(dim=1)
    assert watch.moved[1, 0] == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("steps", [20, 50])
def test_every_arm_fits_into_runs_from_20_steps_on_and_every_base_is_one(steps):
    table = arms(steps)
    for arm in table.values():
        assert arm.base in table
        for name in {"cache", "tgate"} & arm.settings.keys():
            arm.settings[name].check(CONFIGS["tiny"], steps)
    assert list(table)[0] == "base" and table["base"].settings == {}
    assert [arm.name for arm in table.values() if arm.primary] == ["DeepCache b1 N5", "Faster paper"]


def test_one_small_run_leaves_its_files_and_the_next_draws_nothing_again(tmp_path, monkeypatch, command, world):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib (requirements-dev.txt)")
    flags = ("--model", world, "--out", tmp_path, "--steps", 20, "--n", 2, "--images", 1, "--rounds", 1, "--only",
             "b1 N10", "--curves", "--measure")
    code, out, _ = command(main, *flags)
    assert code == 0 and "declared before the run: strict score, DeepCache b1 N5 over base" in out
    assert {path.name for path in tmp_path.iterdir()} == {"cache.json", "curves.png", "quality.png", "pictures.png"}
    numbers = json.loads((tmp_path / "cache.json").read_text())
    assert set(numbers["measure"]) == {"base", "FreeU", "DeepCache b1 N10"}
    arm = numbers["measure"]["DeepCache b1 N10"]
    assert arm["arithmetic"] > 1.3 and arm["PSNR"] < numbers["measure"]["base"]["PSNR"] and len(arm["strict"]) == 2
    assert len(arm["speed-up, 2 at a time"]) == 3
    assert len(numbers["figures"]["curves"]["encoder, mid"]["moved"]) == 19
    monkeypatch.setattr(evaluate, "measure", None)
    monkeypatch.setattr(cache_study, "curves", None)
    assert "DeepCache b1 N10" in command(main, *flags)[1]


def test_too_few_steps_are_named(tmp_path, command):
    code, _, err = command(main, "--steps", 10, "--out", tmp_path)
    assert code == 2 and "20 or more" in err
