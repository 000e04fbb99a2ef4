"""The embedded model: its size, what it draws, and that `lab/train_tiny.py` makes such a folder, in two goes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from folder import TINY
from lab import shapes
from lab.evaluate import evaluate, read_rows, to_bytes
from reward import load_reward
from stable_diffusion import StableDiffusion

ROOT = Path(__file__).resolve().parent.parent
MEASURED = 0.85                # by that test, when the weights were committed


def test_the_whole_model_folder_is_at_most_20_megabytes():
    assert sum(file.stat().st_size for file in TINY.rglob("*")) <= 20e6


def test_a_picture_needs_no_compiler():
    """Neither torch.compile nor sympy, which it brings: a second of imports, more than the picture takes."""
    code = ("import sys, folder, txt2img; sd = txt2img.StableDiffusion.load(folder.TINY); "
            "sd.decode(sd.sample('a red circle', steps=1)); print(*{'torch._dynamo', 'sympy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_the_score_on_60_fixed_prompts_has_not_fallen():
    rows = [row for kind in shapes.KINDS for row in
            [row for row in shapes.make_bench(seed=2) if row["kind"] == kind and row["seen"]][:10]]
    sd = StableDiffusion.load(TINY)
    verdicts, _ = evaluate(sd, [row["prompt"] for row in rows], batch=30, steps=20, cfg_scale=3.0)
    assert np.mean([v.ok for v in verdicts]) >= MEASURED - 0.05


def test_the_readmes_picture_is_what_the_model_draws():
    prompts = [row["prompt"] for row in read_rows(ROOT / "lab" / "prompts.txt")]
    sd = StableDiffusion.load(TINY)
    pictures = to_bytes(sd.decode(sd.sample(prompts)))
    with Image.open(TINY / "pictures.png") as sheet:
        committed = np.asarray(sheet.convert("RGB")).astype(int)
    for i, picture in enumerate(pictures):                             # as `contact_sheet` places them, doubled
        x, y = i % 8 * 136 + 4, i // 8 * 168 + 4
        there = committed[y:y + 128:2, x:x + 128:2]
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


def test_training_runs_on_two_processes_stops_resumes_and_writes_a_model_that_loads(tmp_path):
    def run(side_steps: int) -> dict:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                        "-m", "lab.train_tiny", "--out", tmp_path / "model", "--work", tmp_path / "work",
                        "--device", "cpu", "--vae-steps", "2", "--clip-steps", "2", "--clip-neat-steps", "2",
                        "--clip-side-steps", "2", "--steps", "2", "--side-steps", str(side_steps),
                        "--batch", "4", "--scenes", "16", "--score-n", "0"],
                       check=True, capture_output=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads((tmp_path / "model" / "training.json").read_text())
    assert run(0)["steps"] == 2
    before = (tmp_path / "model" / "unet.safetensors").read_bytes()
    facts = run(2)
    assert facts["steps"] == 4 and facts["samples"] == 4 * 4 * 2
    assert (tmp_path / "model" / "unet.safetensors").read_bytes() != before
    assert load_reward(tmp_path / "model" / "clip")(torch.rand(1, 3, 64, 64), ["a red circle"]).abs() <= 1
    assert StableDiffusion.load(tmp_path / "model").sample("a red circle", steps=1).shape == (1, 4, 16, 16)
