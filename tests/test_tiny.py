"""The embedded model: its size, what it draws, and that `lab/train_tiny.py` makes such a folder, in two goes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from lab import shapes
from lab.evaluate import evaluate, make_prompts, wilson
from txt2img import TINY, StableDiffusion

ROOT = Path(__file__).resolve().parent.parent


def test_the_whole_model_folder_is_at_most_20_megabytes():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 20e6


def test_the_model_follows_single_object_prompts():
    sd = StableDiffusion.load(TINY)
    verdicts, _ = evaluate(sd, make_prompts("colors", 40), steps=20, cfg_scale=5.0)
    assert np.mean([v.ok for v in verdicts]) >= 0.70


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
    def run(steps: int) -> dict:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                        "-m", "lab.train_tiny", "--out", tmp_path / "model", "--work", tmp_path / "work",
                        "--device", "cpu", "--vae-steps", "2", "--steps", str(steps), "--batch", "4", "--scenes", "16"],
                       check=True, capture_output=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads((tmp_path / "model" / "training.json").read_text())
    assert run(2)["steps"] == 2
    before = (tmp_path / "model" / "unet.safetensors").read_bytes()
    facts = run(4)
    assert facts["steps"] == 4 and facts["samples"] == 4 * 4 * 2
    assert (tmp_path / "model" / "unet.safetensors").read_bytes() != before
    assert StableDiffusion.load(tmp_path / "model").sample("a red circle", steps=1).shape == (1, 4, 16, 16)


def test_the_confidence_interval_covers_its_share():
    low, high = wilson(0.7, 200)
    assert 0.63 < low < 0.7 < high < 0.76 and wilson(1.0, 50)[1] == 1.0
