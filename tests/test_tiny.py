"""The embedded model: its size, what it draws, and that `lab/train_tiny.py` makes such a folder, in two goes."""
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TWO_LEVELS
from PIL import Image

from folder import TINY
from lab import shapes, train_tiny
from lab.evaluate import draw, judged, read_rows, to_bytes
from lab.train_tiny import Muon, draw_curve, orthogonal, train_unet
from reward import load_reward
from stable_diffusion import StableDiffusion
from train import Training, leave

MEASURED = 0.667               # by that test, strictly, with the committed weights


def test_the_whole_model_folder_is_at_most_20_megabytes():
    assert sum(file.stat().st_size for file in TINY.rglob("*")) <= 20e6


def test_a_picture_needs_no_compiler():
    """Neither torch.compile nor sympy, which it brings: a second of imports, more than the picture takes."""
    code = ("import sys, folder, txt2img; sd = txt2img.StableDiffusion.load(folder.TINY); "
            "sd.decode(sd.sample('a red circle', steps=1)); print(*{'torch._dynamo', 'sympy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_the_score_on_60_fixed_prompts_has_not_fallen():
    prompts = [row["prompt"] for kind in shapes.KINDS for row in
               [row for row in shapes.make_bench(seed=2) if row["kind"] == kind and row["seen"]][:10]]
    pictures = draw(StableDiffusion.load(TINY), prompts, 30, 0, dict(steps=10, cfg_scale=3.0))
    assert np.mean([judged(*pair)["strict"] for pair in zip(pictures, prompts)]) >= MEASURED - 0.05


def test_the_readmes_picture_is_what_the_model_draws():
    prompts = [row["prompt"] for row in read_rows(ROOT / "lab" / "prompts.txt")][:8]       # one of its two rows
    sd = StableDiffusion.load(TINY)
    pictures = to_bytes(sd.decode(sd.sample(prompts, cfg_scale=7.5)))
    with Image.open(TINY / "pictures.png") as sheet:
        committed = np.asarray(sheet.convert("RGB")).astype(int)
    for i, picture in enumerate(pictures):                             # as `contact_sheet` places them, doubled
        there = committed[4:132:2, i * 136 + 4:i * 136 + 132:2]
        assert np.abs(there - picture).mean() < 1, prompts[i]          # other processors round otherwise


def test_a_picture_is_the_same_whatever_its_batch():
    sd = StableDiffusion.load(TINY, dtype=torch.float64)                       # in float32 only rounding is added
    prompts = [row["prompt"] for row in read_rows(ROOT / "lab" / "prompts.txt")][:8]
    alone = [sd.sample(prompt, steps=4, seed=seed)[0] for seed, prompt in enumerate(prompts)]
    for size in (3, 8):
        for one, other in zip(alone, sd.sample(prompts[:size], steps=4)):
            assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_the_autoencoder_keeps_what_the_scorer_reads():
    sd, rng = StableDiffusion.load(TINY), np.random.default_rng(7)
    scenes = [shapes.random_scene(rng) for _ in range(50)]
    images = torch.from_numpy(np.stack([shapes.draw(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    latents = sd.encode(images)
    again = sd.decode(latents)
    read = [shapes.read((image.permute(1, 2, 0) * 255).numpy()) for image in again]
    assert np.mean([shapes.same_things(r, s.things) for r, s in zip(read, scenes)]) >= 0.98
    assert -10 * (again - images).square().mean().log10() >= 32                # PSNR in dB
    assert 0.8 < latents.std() < 1.2                                           # what the U-Net was trained on


def test_training_runs_on_two_processes_scores_and_writes_a_model_that_loads(tmp_path, command, monkeypatch):
    flags = ["--out", tmp_path / "model", "--work", tmp_path / "work", "--device", "cpu", "--vae-steps", 2,
             "--clip-steps", 2, "--clip-neat-steps", 2, "--clip-side-steps", 2, "--steps", 2, "--batch", 4,
             "--scenes", 16, "--score-n", 1, "--score-every", 2]
    facts = lambda: json.loads((tmp_path / "model" / "training.json").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}       # as torchrun would set it
    other = subprocess.Popen([sys.executable, "-m", "lab.train_tiny", *map(str, flags)], cwd=ROOT,
                             env={**os.environ, **group, "RANK": "1", "OMP_NUM_THREADS": "1"})
    try:
        with monkeypatch.context() as environment:
            for name, value in {**group, "RANK": "0"}.items():
                environment.setenv(name, value)
            code, _, err = command(train_tiny.main, *flags)
        assert code == other.wait(60) == 0, err
    finally:
        leave()
        other.kill()
    first = facts()
    assert (first["steps"], first["fell"], first["samples"]) == (3, 2, 3 * 4 * 2)      # half as many at a falling rate
    assert [samples for samples, *_ in first["scores"]] == [2 * 4 * 2] and first["minutes"].keys() >= {"vae", "clip"}
    assert 0 <= first["scores"][0][2]["quality"] <= 1
    assert load_reward(tmp_path / "model" / "clip")(torch.rand(1, 3, 64, 64), ["a red circle"]).abs() <= 1
    assert StableDiffusion.load(tmp_path / "model").sample("a red circle", steps=1).shape == (1, 4, 16, 16)
    vae = (tmp_path / "model" / "vae.safetensors").read_bytes()
    code, _, err = command(train_tiny.main, *flags, "--parts", tmp_path / "model", "--work", tmp_path / "other",
                           "--score-n", 0)
    torch.set_flush_denormal(False)
    assert code == 0 and facts()["minutes"].keys() == {"unet"}, err                    # autoencoder and CLIP stay
    assert (tmp_path / "model" / "vae.safetensors").read_bytes() == vae


def test_the_score_is_drawn_against_the_samples(tmp_path):
    pytest.importorskip("matplotlib", reason="the curve needs matplotlib (requirements-dev.txt)")
    shares = {"overall": 0.5, "seen": 0.6, "unseen": 0.4}
    draw_curve({"scores": [[64, 0.1, shares], [128, 0.2, shares]]}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps, fell", [(4, 4), (6, 6), (1, 2)])
def test_a_stopped_training_goes_on_for_as_many_steps_as_one_wants(tmp_path, monkeypatch, steps, fell):
    monkeypatch.setattr(train_tiny, "UNET_CONFIG", replace(TWO_LEVELS, context_dim=train_tiny.TEXT_CONFIG.width))
    sd, clip, rng = StableDiffusion.load(TINY), load_reward(TINY / "clip"), np.random.default_rng(0)
    scenes = [shapes.random_scene(rng, split="train") for _ in range(8)]
    seen = []

    def train(steps: int, last: int = 99) -> None:
        def finish(model: torch.nn.Module, run: Training) -> None:
            seen.append((run.step, run.fell, run.optimizers[1].param_groups[0]["lr"]))
            if run.step > last:
                raise KeyboardInterrupt
        train_unet(sd.vae, clip, scenes, scenes, sd.tokenizer, tmp_path, steps, 2, 0, torch.device("cpu"), 2, finish)

    with pytest.raises(KeyboardInterrupt):
        train(4, last=2)                                                               # saved last at step 2
    seen.clear()
    train(steps)
    assert seen[-1][:2] == (fell * 3 // 2, fell)
    train(100)                                                                         # it has ended: no step more
    assert seen[-1][0] == fell * 3 // 2


@pytest.mark.parametrize("shape", [(8, 8), (8, 72), (72, 8)])
def test_an_orthogonal_update_has_the_same_directions_and_equal_sizes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    ours = u.mT @ orthogonal(x) @ v.mT
    assert torch.allclose(ours, ours.diagonal().diag(), atol=1e-6)
    assert ((ours.diagonal() > 0.5) & (ours.diagonal() < 1.3))[s > 0.05 * s[0]].all()


def test_muon_learns_what_a_matrix_is():
    torch.manual_seed(0)
    layer, target = torch.nn.Conv2d(4, 8, 3, bias=False), torch.nn.Conv2d(4, 8, 3, bias=False)
    muon, losses = Muon([layer.weight]), []
    for _ in range(100):
        x = torch.randn(16, 4, 5, 5)
        loss = (layer(x) - target(x)).square().mean()
        muon.zero_grad()
        loss.backward()
        muon.param_groups[0]["lr"] = 0.02
        muon.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
