"""train.py: what masks learn, that a resumed training is the same, several processes, data and bad flags."""
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, digest, randn, seeded, weights
from PIL import Image
from safetensors import safe_open
from torch import nn

import train
import txt2img
from command import InputError
from maskunet import DynamicMasks, StaticMasks, mix
from sampler import x0_and_eps
from stable_diffusion import StableDiffusion
from train import MaskedUNet, Training, fit, learning_rate, noised, read_batches, read_pairs, train_denoiser


@pytest.fixture()
def data(tmp_path) -> Path:
    """Six pictures of various sizes with captions."""
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(6):
        pixels = (randn(32 + 8 * k, 40, 3, seed=k).sigmoid() * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{k}.{'jpg' if k == 3 else 'png'}")
        (folder / f"{k}.txt").write_text("a red circle\n" if k % 2 else "a blue circle")
    return folder


def fixed_batches(batch: int = 4):
    while True:
        yield torch.rand(batch, 3, 32, 32, generator=seeded(3)[0]), ["a red circle"] * batch


@torch.no_grad()
def fixed_loss(sd: StableDiffusion, masks: DynamicMasks | StaticMasks) -> float:
    """Always of the same pictures, times and noises."""
    x, t, target, (context, *_) = noised(sd, *next(fixed_batches(64)), seeded(*range(64)))
    out, _ = MaskedUNet(sd.unet, masks)(x, t, context, None, list(range(64)), 0)
    return F.mse_loss(out, target).item()


@pytest.mark.parametrize("kind,lr", [(DynamicMasks, 0.02), (StaticMasks, 0.1)])
def test_training_learns_masks_and_leaves_the_model_as_it_is(kind, lr, narrow):
    sd = StableDiffusion.load(narrow)
    for name, p in sd.unet.named_parameters():                         # attention that is too loud, for masks to soften
        p *= 8 if name.startswith("conv_out") else 6 if "up_blocks" in name and "to_out" in name else 1
    masks, model_before = kind(sd.unet, initial=2.0), digest(sd.unet, sd.vae, *sd.text_encoders)
    loss_before = fixed_loss(sd, masks)
    curve = train_denoiser(sd, Training(masks, lr=lr), fixed_batches(8), steps=30, log_every=10)
    assert fixed_loss(sd, masks) < loss_before - 0.03
    assert [step for step, *_ in curve] == [10, 20, 30]
    assert all(len(by_time) == 5 and 0 < density < 1 for _, _, by_time, density in curve)
    assert digest(sd.unet, sd.vae, *sd.text_encoders) == model_before
    assert all(p.grad is None for p in sd.unet.parameters())


def test_the_loss_by_time_is_the_loss_of_those_times(narrow):
    sd = StableDiffusion.load(narrow)
    curve = train_denoiser(sd, Training(DynamicMasks(sd.unet)), fixed_batches(64), steps=2, log_every=1)
    for step, (_, loss, by_time, density) in enumerate(curve):
        generators = seeded(*(mix(0, step, k) for k in range(64)))
        times = [float(torch.randint(1000, (), generator=advance(g))) for g in generators]
        counts = [sum(t // 200 == bucket for t in times) for bucket in range(5)]
        assert min(counts) > 0 and density == 1
        assert sum(n * x for n, x in zip(counts, by_time)) / 64 == pytest.approx(loss, rel=1e-6)


def advance(generator: torch.Generator) -> torch.Generator:
    torch.rand((), generator=generator)                                # the draw that decides whether the caption stays
    return generator


def test_latents_that_were_encoded_before_train_as_their_pictures_do(narrow):
    sd = StableDiffusion.load(narrow)
    images, captions = next(fixed_batches(4))
    mean, logvar = sd.vae.encode(images * 2 - 1)
    (*ours, mine), (*theirs, yours) = (noised(sd, given, captions, seeded(*range(4)))
                                       for given in ((mean, (0.5 * logvar).exp()), images))
    assert mine.words == yours.words and all(map(torch.equal, [*ours, mine.context], [*theirs, yours.context]))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_what_is_to_be_predicted_gives_the_clean_latents_back_and_captions_are_left_out(prediction, narrow):
    sd, mean = StableDiffusion.load(narrow), randn(4, 4, 8, 8)
    sd.config = replace(sd.config, prediction=prediction, vae=replace(sd.config.vae, scaling=0.5))
    x, t, target, condition = noised(sd, (mean, 0 * mean), ["red"] * 4, seeded(*range(4)), caption_dropout=0.7)
    for k, alpha in enumerate(sd.config.schedule.alphas()[t].tolist()):
        assert torch.allclose(x0_and_eps(x[k], target[k], alpha, prediction)[0], 0.5 * mean[k], atol=1e-4)
    assert set(condition.words) == {"", "red"}


def test_an_update_clips_the_gradient_and_the_average_goes_over_a_tenth_of_the_steps_but_no_more_than_memory():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    optimizer, mean = torch.optim.SGD([{"params": module.parameters(), "factor": 2}]), 0.0
    run = Training(module, memory=2, clip=1.0, optimizers=[optimizer])
    for step in range(1, 15):
        run.update(100 * module.weight.sum(), lr=0.5)
        assert module.weight.item() == pytest.approx(-step, rel=1e-4)
        mean += (-step - mean) * max(9 / (9 + step), 1 / 2)
        assert run.average["weight"].item() == pytest.approx(mean, rel=1e-4)


def test_the_curve_has_the_mean_loss_since_the_last_row_and_the_run_its_seconds():
    run = Training(nn.Linear(1, 1))
    fit(run, 5, lambda step: step + 0 * run.module.weight.sum(), "numbers", log_every=2)
    assert run.curve == [(2, 0.5), (4, 2.5), (5, 4.0)] and run.seconds > 0


def test_the_rate_rises_stays_and_falls_over_the_last_third():
    rates = [learning_rate(step, 900, 2.0) for step in (0, 99, 199, 600, 750, 899)]
    assert rates == pytest.approx([0.01, 1, 2, 2, 1, 2 / 300])


def test_a_resumed_training_is_the_uninterrupted_one(narrow, tmp_path):
    sd = StableDiffusion.load(narrow)
    whole = Training(DynamicMasks(sd.unet), lr=1e-2)
    train_denoiser(sd, whole, fixed_batches(), steps=5)
    train_denoiser(sd, Training(DynamicMasks(sd.unet), tmp_path / "c.pt", lr=1e-2), fixed_batches(), steps=3)
    second = Training(DynamicMasks(sd.unet), tmp_path / "c.pt", lr=1e-2)
    assert second.step == 3
    train_denoiser(sd, second, fixed_batches(), steps=5)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.module), weights(second.module)))
    assert not any(torch.equal(a, b) for a, b in zip(weights(whole.module), weights(DynamicMasks(sd.unet))))
    with pytest.raises(InputError, match="was begun with lr 0.01, not 0.02"):
        Training(DynamicMasks(sd.unet), tmp_path / "c.pt", lr=2e-2)
    (tmp_path / "c.pt").write_text("no checkpoint")
    with pytest.raises(InputError, match="no checkpoint of this training"):
        Training(DynamicMasks(sd.unet), tmp_path / "c.pt")


def test_batches_that_end_too_early_leave_a_checkpoint_and_say_so(narrow, tmp_path):
    sd = StableDiffusion.load(narrow)
    run = Training(DynamicMasks(sd.unet), tmp_path / "c.pt", lr=1e-2)
    with pytest.warns(UserWarning, match="the batches ended after step 2 of 5"):
        curve = train_denoiser(sd, run, [batch for _, batch in zip(range(2), fixed_batches())], steps=5)
    assert [step for step, *_ in curve] == [2] and Training(DynamicMasks(sd.unet), tmp_path / "c.pt", lr=1e-2).step == 2


@pytest.mark.parametrize("what", ["loss", "masks"])
def test_a_training_that_diverges_ends_in_one_clear_line_and_keeps_the_last_good_checkpoint(what, narrow, tmp_path):
    sd = StableDiffusion.load(narrow)
    run = Training(StaticMasks(sd.unet), tmp_path / "c.pt", lr=1e-2)
    train_denoiser(sd, run, fixed_batches(), steps=1)
    if what == "loss":
        sd.unet.conv_out.weight[0, 0, 0, 0] = math.nan
    else:
        run.optimizers[0].param_groups[0]["lr"] = math.inf
    with pytest.raises(InputError, match=f"the {what} became infinite or NaN: lower --lr"):
        train_denoiser(sd, run, fixed_batches(), steps=2)
    kept = Training(StaticMasks(sd.unet), tmp_path / "c.pt", lr=1e-2)
    assert kept.step == 1 and all(p.isfinite().all() for p in weights(kept.module))


def test_training_reads_pictures_as_they_look(tmp_path):
    for name, picture in (("clear", Image.new("RGBA", (8, 8), (0, 0, 0, 0))),
                          ("gray", Image.fromarray(np.full((8, 8), 30000, np.uint16)))):
        picture.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    images, captions = next(read_batches(read_pairs(tmp_path), 8, 2, seed=0))
    for image, caption in zip(images, captions):
        assert torch.allclose(image, torch.tensor({"clear": 1.0, "gray": 117 / 255}[caption]), atol=1e-6)


def test_two_processes_train_as_one_does(narrow, data, tmp_path, command):
    arguments = ["masks", "--model", narrow, "--data", data, "--steps", 3, "--batch", 4, "--lr", 0.01, "--initial", 1,
                 "--device", "cpu"]
    assert command(train.main, *arguments, "--out", tmp_path / "one.safetensors")[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, arguments), "--out",
                              tmp_path / "two.safetensors"], stderr=subprocess.DEVNULL,
                             env={**os.environ, **told, "OMP_NUM_THREADS": "1", "RANK": str(k)}) for k in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]           # told what torchrun tells its processes
    one, two = (safe_open(tmp_path / f"{name}.safetensors", "pt") for name in ("one", "two"))
    (a, b) = (json.loads(file.metadata()["maskunet"])["training"]["curve"][-1] for file in (one, two))
    assert a[0] == b[0] == 3 and a[1] == pytest.approx(b[1], rel=1e-5) and a[3] == pytest.approx(b[3], abs=1e-6)
    assert all((one.get_tensor(name) - two.get_tensor(name)).abs().max() < 1e-4 for name in one.keys())
    fresh = DynamicMasks(StableDiffusion.load(narrow).unet, initial=1.0).state_dict()
    assert max((one.get_tensor(name) - fresh[name]).abs().max() for name in fresh) > 0.02


def test_the_batches_of_a_folder_cover_it_in_every_epoch_and_split_between_processes(data, monkeypatch):
    pairs = read_pairs(data)
    assert [caption for _, caption in pairs[:2]] == ["a blue circle", "a red circle"]
    whole = [batch for _, batch in zip(range(3), read_batches(pairs, 32, 4, seed=0))]
    assert all(images.shape == (4, 3, 32, 32) and 0 <= images.min() and images.max() <= 1 for images, _ in whole)
    pictures = torch.cat([images for images, _ in whole])
    assert len(pictures[:6].unique(dim=0)) == len(pictures[6:].unique(dim=0)) == 6
    assert not torch.equal(pictures[:6], pictures[6:])
    resumed = next(read_batches(pairs, 32, 4, seed=0, first=2))
    assert torch.equal(resumed[0], whole[2][0]) and resumed[1] == whole[2][1]
    monkeypatch.setattr("train.world", lambda: 2)
    monkeypatch.setattr("train.rank", lambda: 1)
    assert torch.equal(next(read_batches(pairs, 32, 4, seed=0))[0], whole[0][0][2:])


def test_masks_from_the_command_line_make_a_picture_that_says_so(narrow, data, tmp_path, command):
    masks, picture = tmp_path / "m.safetensors", ["a red circle", "--model", narrow, "--steps", 4, "--device", "cpu"]
    training = ["masks", "--model", narrow, "--data", data, "--out", masks, "--batch", 2, "--initial", -1, "--device",
                "cpu", "--steps"]
    assert command(train.main, *training, 2)[0] == 0
    for flags, words in (([1], "m.checkpoint.pt is at step 2 already: give as many --steps or more"),
                         ([3, "--caption-dropout", 0.5], "was begun with caption_dropout 0.0, not 0.5")):
        code, _, err = command(train.main, *training, *flags)
        assert code == 2 and words in err
    made, fixed = {}, f"{masks},fixed"
    for flags in ([], ["--masks", masks], ["--masks", fixed], ["--masks", f"{masks},threshold"],
                  ["--masks", "random,0.3"], ["--masks", "random,0.3,window"]):
        code, _, err = command(txt2img.main, *picture, *flags, "--out", tmp_path / "o.png")
        assert code == 0, err
        with Image.open(tmp_path / "o.png") as file:
            made[str(flags[-1]) if flags else ""] = (file.tobytes(), file.info["parameters"])
    assert len({pixels for pixels, _ in made.values()}) == len(made) == 6
    short = hashlib.sha256(masks.read_bytes()).hexdigest()[:8]
    for flag, words in ((fixed, f'Masks: "file=m.safetensors {short},fixed"'),
                        ("random,0.3,window", 'Masks: "random,ratio=0.3,window"')):
        assert words in made[flag][1] and "Masks" not in made[""][1]


@pytest.mark.parametrize("damage,words", [
    (lambda d: [p.unlink() for p in d.iterdir()], "has no pictures"),
    (lambda d: (d / "2.txt").unlink(), "1 of the 6 pictures .* the first is 2.png"),
    (lambda d: [(d / f"{k}.png").write_text("no picture") for k in (0, 1, 2, 4, 5)], "can't read the picture"),
    (lambda d: (d / "2.txt").write_bytes(b"\xff\xfe\xfa"), "can't read the captions")])
def test_bad_training_folders_end_in_one_clear_line(damage, words, narrow, data, tmp_path, command):
    damage(data)
    code, _, err = command(train.main, "masks", "--model", narrow, "--data", data, "--out", tmp_path / "m.safetensors",
                           "--batch", 6, "--device", "cpu")
    assert code == 2 and re.search(words, err.splitlines()[-1]) and "Traceback" not in err
    assert not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize("flags,words", [
    (["--data", "nowhere"], "no folder nowhere"), (["--out", "m.pt"], "a .safetensors file"),
    (["--steps", 0], "1 or more"), (["--lr", -1], "above 0"), (["--caption-dropout", 2], "between 0 and 1"),
    (["--lr", 1e38], "at most 1"), (["--device", "abacus"], "abacus can't be used here"),
    (["--device", "meta"], "can't hold a picture"),
    (["--batch", 3], "must be a multiple of the 2 processes"), (["--initial", "nan"], "finite"),
    (["--out", "no/where/m.safetensors"], "no/where")])
def test_bad_training_flags_end_in_one_clear_line(flags, words, narrow, data, tmp_path, command, monkeypatch):
    monkeypatch.setattr("train.world", lambda: 2)
    code, _, err = command(train.main, "masks", "--model", narrow, "--data", data, "--out", tmp_path / "m.safetensors",
                           "--batch", 2, "--device", "cpu", *flags)
    assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err and err.count("step 1 ") == 0
