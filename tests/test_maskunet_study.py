"""lab/maskunet_study.py: arms differ as they must, the model stays, costs are equal, and nothing is done twice."""
import hashlib
import json
import sys
from dataclasses import replace

import pytest
import torch

from command import run_command
from folder import TINY
from lab import maskunet_study
from lab.maskunet_study import ARMS, RECIPES, Study, Tuned, TunedUNet, matched_rank, share, size
from maskunet import DynamicMasks, Masks
from reward import load_reward
from train import Training, train_denoiser
from txt2img import StableDiffusion
from unet import UNet


def weights(sd: StableDiffusion) -> str:
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in sd.unet.state_dict().values())).hexdigest()


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    return Study(StableDiffusion.load(TINY), load_reward(TINY / "clip"), tmp_path_factory.mktemp("work"), "tiny",
                 steps=2, batch=4, scenes=8, validation=6, n=6, free_n=6, free_steps=2,
                 settings=dict(steps=2, cfg_scale=5.0))


def train_more(study: Study, module: torch.nn.Module, steps: int, lr: float) -> list[tuple]:
    model = TunedUNet(study.sd.unet, module) if isinstance(module, Tuned) else None
    run = Training(module, lr=lr)
    return train_denoiser(study.sd, run, study.train_world().batches(4, 0, 0), steps, log_every=1, model=model)


def test_every_recipe_trains_its_own_weights_and_leaves_the_models(study):
    before, unet = weights(study.sd), study.sd.unet
    for name, recipe in RECIPES.items():
        start, end = recipe.make(unet, 0), study.trained(name, 0)
        moved = [not torch.equal(a, b) for a, b in zip(start.state_dict().values(), end.state_dict().values())]
        assert any(moved) and not any(p.requires_grad for p in end.parameters())
    assert weights(study.sd) == before and all(p.grad is None for p in unet.parameters())


def test_lora_has_as_many_weights_as_the_network_of_masks_and_both_begin_as_the_model(study):
    unet = study.sd.unet
    lora, masks = Tuned(unet, matched_rank(unet)), DynamicMasks(unet)
    assert abs(size(lora) / size(masks) - 1) < 0.05
    assert size(Tuned(unet)) == size(unet)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), torch.randn(2, 5, 128)
    with torch.no_grad():
        plain = unet(x, t, context)
        for tuned in (lora, Tuned(unet)):
            assert torch.equal(TunedUNet(unet, tuned)(x, t, context, None, [0, 0], 0)[0], plain)
        for p in lora.values.values():
            p.normal_()
        merged = UNet(unet.config)
        merged.load_state_dict({**unet.state_dict(), **lora.weights(unet)})
        through = TunedUNet(unet, lora)(x, t, context, None, [0, 0], 0)[0]
        assert torch.equal(merged(x, t, context), through) and not torch.equal(through, plain)


def test_fine_tuning_and_lora_lower_the_loss_of_what_they_see(study):
    for module, lr in ((Tuned(study.sd.unet), 1e-4), (Tuned(study.sd.unet, 4), 2e-3)):
        batch = next(study.train_world().batches(4, 0, 0))
        run, fixed = Training(module, lr=lr), []
        model = TunedUNet(study.sd.unet, module)
        for _ in range(8):                                             # the same times and noises again and again
            run.step = 0
            fixed.append(train_denoiser(study.sd, run, [batch], 1, log_every=1, model=model)[-1][1])
        assert fixed[-1] < 0.97 * fixed[0]


def test_masks_of_the_official_network_depend_on_nothing_but_chance_and_working_ones_do(study):
    for init in ("official", "working"):
        masks = DynamicMasks(study.sd.unet, init=init, initial=0.0)
        train_more(study, masks, 5, 0.01)
        differ = study.differences(Masks(masks.requires_grad_(False)))
        for what in ("times", "images"):
            for which in ("masks", "probabilities"):
                apart = differ[f"{which}, {what}"]
                assert apart > 1e-5 if init == "working" else apart < 1e-6         # 1e-6: rounding alone
        assert differ["masks, draws"] > 0.01 and differ["probabilities, draws"] < 1e-6
        quiet = study.differences(Masks(masks, "threshold"))
        assert quiet["masks, draws"] < 1e-6


def test_fresh_masks_change_from_step_to_step_and_fixed_ones_do_not(study, monkeypatch):
    monkeypatch.setattr(Study, "result", lambda *_: {"density": 0.8})
    pictures = {}
    for name in ("random fresh", "random fixed"):
        _, masks, trained = study.apply(ARMS[name].settings, 0)
        assert masks.source.ratio == pytest.approx(0.2) and masks.fresh == (name == "random fresh") and trained == 0
        pictures[name] = study.sd.sample("a red circle", steps=2, masks=masks)
        one_step = study.sd.sample("a red circle", steps=2, masks=replace(masks, fresh=not masks.fresh))
        assert not torch.equal(pictures[name], one_step)
    assert not torch.equal(*pictures.values())


def test_parts_of_a_training_are_the_shorter_trainings(study):
    early, late = (study.trained("working", 0, part).state_dict() for part in (0.5, 1.0))
    short = DynamicMasks(study.sd.unet, seed=0)
    train_more(study, short, 1, RECIPES["working"].lr)
    assert all(torch.equal(p, early[name]) for name, p in short.state_dict().items())
    assert any(not torch.equal(p, early[name]) for name, p in late.items())


def test_both_searches_cost_as_many_passes_and_gradients_and_that_for_noise_climbs_the_reward(study, monkeypatch):
    prompts, seeds, calls = study.prompts(6)[:2], [0, 1], {}
    forward = UNet.forward

    def counted(self, x, *arguments, **more):
        calls[torch.is_grad_enabled()] = calls.get(torch.is_grad_enabled(), 0) + len(x)
        return forward(self, x, *arguments, **more)
    monkeypatch.setattr(UNet, "forward", counted)
    costs = []
    for draw in (maskunet_study.search_masks, maskunet_study.search_noise):
        calls.clear()
        found = study.sd.decode(draw(study, prompts, seeds, 3, {**study.settings, "steps": 2}))
        costs.append(dict(calls))
    assert costs[0] == costs[1] == {True: 3 * 2 * 4, False: 2 * 4}
    plain = maskunet_study.plain(study, prompts, seeds, 0, {**study.settings, "steps": 2})
    start = maskunet_study.search_noise(study, prompts, seeds, 0, {**study.settings, "steps": 2})
    assert torch.allclose(plain, start, atol=1e-5)
    assert (study.reward(found, prompts) > study.reward(study.sd.decode(plain), prompts)).all()


def test_processes_share_all_jobs_and_no_job_twice():
    jobs = [(float(k % 5), [k]) for k in range(13)]
    shares = [share(jobs, rank, 3) for rank in range(3)]
    assert sorted(k for calls in shares for (k,) in calls) == list(range(13))
    loads = [sum(k % 5 for (k,) in calls) for calls in shares]
    assert max(loads) - min(loads) <= 2


@pytest.fixture()
def command(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["maskunet_study", *map(str, arguments)])
        code = 0
        try:
            run_command(maskunet_study.main)
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err
    return run


SMALL = ("--seeds", 1, "--steps", 2, "--batch", 2, "--scenes", 4, "--validation", 6, "--pictures", 6,
         "--sample-steps", 2, "--free-pictures", 6, "--free-steps", 2, "--iterations", 1, "--drawn", 0)


def test_one_small_run_leaves_tables_and_figure_and_the_next_does_nothing_again(tmp_path, command, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib (requirements-dev.txt)")
    arms = "working,random fixed,masks 0,noise 2"
    small = [*SMALL, "--noise-iterations", 2, "--out", tmp_path]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, _ = command(*small, "--arms", arms)
    assert code == 0 and "still to come from other processes" in out and not (tmp_path / "maskunet.md").exists()
    monkeypatch.setenv("RANK", "0")
    assert command(*small, "--arms", arms)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"maskunet.json", "maskunet.md", "training.png", "work"}
    numbers = json.loads((tmp_path / "maskunet.json").read_text())
    assert list(numbers["trained"]) == ["base", "working", "random fixed"]
    assert list(numbers["searched"]) == ["base", "masks 0", "noise 2"]
    assert numbers["trained"]["working"]["score"]["n"] == 6 and "over base" not in numbers["trained"]["base"]
    assert numbers["trained"]["working"]["density"] == [1.0]
    assert numbers["searched"]["noise 2"]["GB"] > 2 * numbers["searched"]["masks 0"]["GB"] > 0
    for method in ("judge", "search", "trained"):
        monkeypatch.setattr(Study, method, None)
    code, out, _ = command(*small, "--arms", arms)
    assert code == 0 and "| random fixed |" in out and "| noise 2 |" in out


@pytest.mark.parametrize("flags,words", [
    (["--arms", "base,worknig"], "there is no arm 'worknig'"), (["--pictures", 7], "--pictures must be 6, 12"),
    (["--free-pictures", 5], "--free-pictures must be"), (["--iterations", 0], "1 or more"),
    (["--seeds", 0], "--seeds must be 1 or more"),
    (["--free-steps", 0], "steps must be"), (["--model", "nowhere"], "there is no model folder nowhere"),
    (["--drawn", 5], "0, or 100 or more")])
def test_bad_input_ends_in_one_line(flags, words, tmp_path, command):
    code, _, err = command(*SMALL, "--out", tmp_path, *flags)
    assert code == 2 and words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
