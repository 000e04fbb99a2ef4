"""lab/maskunet_study.py: arms differ as they must, the model stays, costs are equal, and nothing is done twice."""
import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import digest, randn

from folder import TINY
from lab import maskunet_study
from lab.maskunet_study import ARMS, RECIPES, LoRA, Study, Unmasked, main, matched_rank, plan_jobs, size
from maskunet import DynamicMasks, Masks
from stable_diffusion import StableDiffusion
from train import Training, train_denoiser
from unet import UNet


@pytest.fixture(scope="module")
def study(tmp_path_factory, world) -> Study:
    return Study(StableDiffusion.load(world), tmp_path_factory.mktemp("work"), "tiny",
                 dict(steps=2, sampler="ddim", cfg_scale=5.0), dict(
                     steps=2, batch=4, scenes=8, validation=6, pictures=6, free_pictures=6, free_steps=2))


def train_masks(study: Study, masks: torch.nn.Module, steps: int, lr: float) -> None:
    train_denoiser(study.sd, Training(masks, lr=lr), study.train_world.batches(4, 0, 0), steps, log_every=1)


def test_every_recipe_trains_its_own_weights_and_leaves_the_models(study):
    before, unet = digest(study.sd.unet), study.sd.unet
    for name, recipe in RECIPES.items():
        start, end = recipe.make(unet, 0), study.trained(name, 0)
        moved = [not torch.equal(a, b) for a, b in zip(start.state_dict().values(), end.state_dict().values())]
        assert any(moved) and not any(p.requires_grad for p in end.parameters())
    assert digest(unet) == before and all(p.grad is None for p in unet.parameters())


def test_lora_has_as_many_weights_as_the_network_of_masks_and_is_the_same_as_merged_weights(study):
    unet = StableDiffusion.load(TINY).unet
    assert abs(matched_rank(unet) * size(LoRA(unet, 1)) / size(DynamicMasks(unet)) - 1) < 0.05
    sd, unet = study.sd, study.sd.unet
    lora, merged = LoRA(unet, 4), deepcopy(unet)
    inputs = randn(2, 4, 16, 16), torch.tensor([10, 700]), randn(2, 5, 16)
    through = lambda: Unmasked(unet, lora)(*inputs, None, [0, 0], 0)[0]
    with torch.no_grad():
        assert torch.equal(through(), unet(*inputs))
        for p in lora.parameters():
            p.copy_(randn(*p.shape))
        for layer, own in zip(unet.modules(), merged.modules()):
            if layer in lora.names:
                own.weight.copy_(lora.of(layer))
        assert torch.equal(through(), merged(*inputs)) and not torch.equal(through(), unet(*inputs))
        assert torch.equal(sd.sample("a red circle", steps=2, masks=lora),
                           StableDiffusion(sd.config, sd.tokenizer, sd.text_encoders, merged, sd.vae).sample(
                               "a red circle", steps=2))


def test_fine_tuning_and_lora_lower_the_loss_of_what_they_see(study):
    sd = StableDiffusion.load(TINY)                                    # the last layers of random weights hide the rest
    for module, lr in ((RECIPES["full fine-tuning"].make(sd.unet, 0), 1e-4), (LoRA(sd.unet, 4), 5e-3)):
        batch = next(study.train_world.batches(4, 0, 0))
        run, fixed = Training(module, lr=lr), []
        for _ in range(3):                                             # the same times and noises again and again
            run.step, model = 0, Unmasked(sd.unet, module)
            fixed.append(train_denoiser(sd, run, [batch], 1, log_every=1, model=model)[-1][1])
        assert fixed[-1] < 0.97 * fixed[0]


def test_masks_of_the_official_network_depend_on_nothing_but_chance_and_working_ones_do(study):
    for init in ("official", "working"):
        masks = DynamicMasks(study.sd.unet, init=init, initial=0.0)
        train_masks(study, masks, 5, 0.1)
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
        assert masks.source.ratio == pytest.approx(0.2) and masks.fixed == (name == "random fixed") and trained == 0
        pictures[name] = study.sd.sample("a red circle", steps=2, masks=masks)
        one_step = study.sd.sample("a red circle", steps=2, masks=replace(masks, fixed=not masks.fixed))
        assert not torch.equal(pictures[name], one_step)
    assert not torch.equal(*pictures.values())


def test_parts_of_a_training_are_the_shorter_trainings(study):
    early, late = (study.trained("working", 0, part).state_dict() for part in (0.5, 1.0))
    short = DynamicMasks(study.sd.unet, seed=0)
    train_masks(study, short, 1, RECIPES["working"].lr)
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
        found = draw(study, prompts, seeds, 3, study.settings)
        costs.append(dict(calls))
    assert costs[0] == costs[1] == {True: 3 * 2 * 4, False: 2 * 4}
    plain = maskunet_study.plain(study, prompts, seeds, 0, study.settings)
    start = maskunet_study.search_noise(study, prompts, seeds, 0, study.settings)
    assert torch.allclose(plain, start, atol=1e-5)
    assert (study.score(found, prompts) > study.score(plain, prompts)).all()


def test_every_result_is_planned_once_and_random_masks_after_what_sets_their_density():
    jobs = plan_jobs(["base", "random fresh", "working", "LoRA"], 2)
    calls = [call for job in jobs for call in job]
    assert len(calls) == len(set(calls)) == 4 * 2
    assert [("working", 0), ("random fresh", 0)] in jobs               # one process trains both


SMALL = ("--seeds", 1, "--steps", 2, "--batch", 2, "--scenes", 4, "--validation", 6, "--pictures", 6,
         "--sample-steps", 2, "--free-pictures", 6, "--free-steps", 2, "--iterations", 1, "--drawn", 0)


def test_one_small_run_leaves_tables_and_figure_and_the_next_does_nothing_again(tmp_path, command, monkeypatch, world):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib (requirements-dev.txt)")
    arms = "working,random fixed,masks 0,noise 2"
    small = [*SMALL, "--noise-iterations", 2, "--out", tmp_path, "--model", world]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, _ = command(main, *small, "--arms", arms)
    assert code == 0 and "still to come from other processes" in out and not (tmp_path / "maskunet.md").exists()
    monkeypatch.setenv("RANK", "0")
    assert command(main, *small, "--arms", arms)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"maskunet.json", "maskunet.md", "training.png", "work"}
    numbers = json.loads((tmp_path / "maskunet.json").read_text())
    assert list(numbers["trained"]) == ["base", "working", "random fixed"]
    assert list(numbers["searched"]) == ["base", "masks 0", "noise 2"]
    assert numbers["trained"]["working"]["score"]["n"] == 6 and "over base" not in numbers["trained"]["base"]
    assert numbers["trained"]["working"]["density"] == [1.0]
    assert numbers["searched"]["noise 2"]["GB"] > 2 * numbers["searched"]["masks 0"]["GB"] > 0
    assert [row["primary"] for row in numbers["declared"]] == [["working over base"], []]
    for method in ("judge", "trained"):
        monkeypatch.setattr(Study, method, None)
    monkeypatch.setattr(StableDiffusion, "sample", None)
    code, out, _ = command(main, *small, "--arms", arms)
    assert code == 0 and "| random fixed |" in out and "| noise 2 |" in out


@pytest.mark.parametrize("flags,words", [
    (["--arms", "base,worknig"], "there is no arm 'worknig'"), (["--pictures", 7], "--pictures must be 6, 12"),
    (["--free-pictures", 5], "--free-pictures must be"), (["--iterations", 0], "1 or more"),
    (["--seeds", 0], "--seeds must be 1 or more"),
    (["--free-steps", 0], "steps must be"), (["--model", "nowhere"], "there is no model folder nowhere"),
    (["--drawn", 5], "0, or 100 or more")])
def test_bad_input_ends_in_one_line(flags, words, tmp_path, command):
    code, _, err = command(main, *SMALL, "--out", tmp_path, *flags)
    assert code == 2 and words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
