"""Trains the embedded model `models/tiny` on the world of `lab/shapes.py`: first the autoencoder, then text and U-Net.

Start at `main`; `train_vae` and `train_unet` are two plain loops around the very classes of the top level. Both stages
keep a checkpoint in the work folder and resume from it. On CPU, one process a core is by far the fastest:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m lab.train_tiny --out models/tiny

Every process draws its own scenes from (seed, rank); gradients are averaged, so weights are the same everywhere.
Source: latent diffusion, arXiv 2112.10752, sections 3.1 and 3.2; classifier-free guidance, arXiv 2207.12598.
"""
import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import clip_text
from clip_text import TextEncoder
from folder import ModelConfig, open_safetensors, replacing, run_command, write_config
from lab import shapes
from sampler import NoiseSchedule
from unet import CONFIGS, UNet
from vae import VAE, VAEConfig

SIZE = 64                                                              # native pixels
VAE_CONFIG = VAEConfig(channels=(16, 32, 64), layers=1, groups=8, scaling=1.0)   # 64 px -> 16x16 latents
TEXT_CONFIG = clip_text.CONFIGS["tiny"]
UNET_CONFIG = CONFIGS["tiny"]


class TextToNoise(nn.Module):
    """Text encoder and U-Net, trained together. (B, 4, h, w), times (B,), ids (B, L) -> predicted noise (B, 4, h, w)"""

    def __init__(self):
        super().__init__()
        self.text, self.unet = TextEncoder(TEXT_CONFIG), UNet(UNET_CONFIG)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text(ids)[0])


class Run:
    """A training run: model, optimiser, averaged weights, progress and loss curve; knows how to save and resume."""

    def __init__(self, model: nn.Module, path: Path, device: torch.device):
        self.model, self.path = model.to(device), path
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {name: p.detach().clone() for name, p in model.state_dict().items()}
        self.step, self.seconds, self.curve = 0, 0.0, []
        if path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.curve = state["average"], state["curve"]
            self.step, self.seconds = state["step"], state["seconds"]

    def update(self, loss: Tensor, lr: float) -> None:
        """One optimiser step, and the exponential moving average whose memory grows to the last 2,000 steps."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            for name, p in self.model.state_dict().items():
                self.average[name].lerp_(p, max(1 / 2000, 9 / (9 + self.step)))

    def save(self) -> None:
        if rank() == 0:
            with replacing(self.path) as path:
                torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                            "average": self.average, "step": self.step, "seconds": self.seconds,
                            "curve": self.curve}, path)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def distributed(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Up over `warmup` steps, constant, then linearly down to zero over the last third: a run can be made longer."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (steps / 3))


def train(run: Run, steps: int, peak_lr: float, save_every: int, loss_of: Callable[[int], Tensor], name: str,
          on_save: Callable[[], None] = lambda: None) -> None:
    """The loop of both stages: loss_of(step) draws a batch and returns its loss."""
    bar = tqdm(range(run.step, steps), initial=run.step, total=steps, desc=name, disable=rank() > 0, mininterval=5)
    recent: list[float] = []
    for step in bar:
        started = time.time()
        loss = loss_of(step)
        run.update(loss, learning_rate(step, steps, peak_lr))
        recent.append(loss.item())
        run.seconds += time.time() - started
        if run.step % 100 == 0:
            run.curve.append((run.step, sum(recent) / len(recent)))
            bar.set_postfix(loss=f"{run.curve[-1][1]:.4f}")
            recent.clear()
        if run.step % save_every == 0 or run.step == steps:
            run.save()
            on_save()


# ------------------------------------------------------------------------------------------------ stage 1: autoencoder

class Reconstruct(nn.Module):
    """An image through the autoencoder: (B, 3, H, W), noise (B, 4, h, w) -> reconstruction, mean, log-variance"""

    def __init__(self):
        super().__init__()
        self.vae = VAE(VAE_CONFIG)
        with torch.no_grad():
            self.vae.quant_conv.bias[VAE_CONFIG.latent_channels:] = -5     # log-variance: start nearly noise-free

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.vae.encode(x)
        return self.vae.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar


def train_vae(work: Path, steps: int, batch: int, seed: int, device: torch.device) -> VAE:
    """Reconstruct crops of crowded scenes, then, for the last quarter, whole pictures of the world.

    Crops have many edges, which a loss over plain background doesn't see. Loss: L1 + L2 + L1 of the gradients / 2 + KL.
    """
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)                                 # initial weights
        model = Reconstruct()
    run = Run(model, work / "vae.pt", device)
    parallel = distributed(model)

    @cache
    def crowd(k: int) -> np.ndarray:
        return shapes.draw(shapes.dense_scene(np.random.default_rng([seed, 1, rank(), 0, k])), SIZE, SIZE)

    def picture(whole: bool, rng: np.random.Generator) -> np.ndarray:
        if whole:
            return shapes.draw(shapes.random_scene(rng), SIZE, SIZE)
        y, x = rng.integers(SIZE // 2 + 1, size=2)
        return crowd(int(rng.integers(5_000)))[y:y + SIZE // 2, x:x + SIZE // 2]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 1, rank(), 1, step])        # a new one a step: a resumed run is the same
        whole = step >= steps * 3 // 4
        n = batch // 4 if whole else batch                             # whole pictures have four times the pixels
        x = to_tensor(np.stack([picture(whole, rng) for _ in range(n)])).to(device)
        noise = torch.from_numpy(rng.standard_normal((n, 4, x.shape[2] // 4, x.shape[3] // 4), np.float32)).to(device)
        y, mean, logvar = parallel(x, noise)
        edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges + 1e-5 * kl

    train(run, steps, 2e-3, 500, loss_of, "autoencoder")
    model.load_state_dict(run.average)
    standardize(model.vae, device)
    return model.vae.eval().requires_grad_(False)


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) bytes -> (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def standardize(vae: VAE, device: torch.device) -> None:
    """Give every latent channel mean 0 and variance 1, by folding shift and scale into the 1x1 convolutions around it.

    Pictures stay the same, `scaling` is 1, and the U-Net sees channels of equal weight.
    """
    rng = np.random.default_rng(0)
    images = np.stack([shapes.draw(shapes.random_scene(rng, split="train"), SIZE, SIZE) for _ in range(512)])
    latents = torch.cat([vae.encode(to_tensor(part).to(device))[0] for part in np.split(images, 8)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    n, quant, post = VAE_CONFIG.latent_channels, vae.quant_conv, vae.post_quant_conv
    quant.bias[:n] -= mean
    quant.weight[:n] /= std[:, None, None, None]
    quant.bias[:n] /= std
    quant.bias[n:] -= 2 * std.log()                                    # log-variance of a scaled latent
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight *= std[None, :, None, None]


# ----------------------------------------------------------------------------------------------- stage 2: text + U-Net

def make_tokenizer() -> Tokenizer:
    """Whole words of the world's vocabulary. The end token has the largest id, as in CLIP; padding is 0."""
    words = ["<|padding|>", "<|unknown|>", "<|startoftext|>", *shapes.VOCABULARY, "<|endoftext|>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unknown|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def world_latents(vae: VAE, scenes: list[shapes.Scene], path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every scene's latent, (S, 4, 16, 16) float16: encoded once, kept in a file.

    The file is used again only for the same scenes and the same autoencoder.
    """
    made_of = hashlib.sha256(repr(scenes).encode() + b"".join(p.cpu().numpy().tobytes() for p in vae.parameters()))
    if path.exists():
        with open_safetensors(path) as file:
            if (file.metadata() or {}).get("made_of") == made_of.hexdigest():
                return tuple(file.get_tensor("latents"))
    stats = []
    with torch.no_grad():
        for start in tqdm(range(0, len(scenes), 64), desc="encoding", disable=rank() > 0, mininterval=5):
            images = np.stack([shapes.draw(scene, SIZE, SIZE) for scene in scenes[start:start + 64]])
            mean, logvar = vae.encode(to_tensor(images).to(device))
            stats.append(torch.stack([mean, (0.5 * logvar).exp()]).half().cpu())
    latents = torch.cat(stats, dim=1)
    with replacing(path) as part:
        save_file({"latents": latents}, part, metadata={"made_of": made_of.hexdigest()})
    return tuple(latents)


def train_unet(vae: VAE, work: Path, out: Path, steps: int, batch: int, scene_count: int, seed: int,
               device: torch.device) -> None:
    """Predict the noise in noised latents from their captions; a tenth of the captions is empty, for guidance."""
    schedule = NoiseSchedule()
    scenes_rng = np.random.default_rng([seed, 2, rank()])
    scenes = [shapes.random_scene(scenes_rng, split="train") for _ in range(scene_count)]
    mean, std = world_latents(vae, scenes, work / f"latents-{rank()}.safetensors", device)
    tokenizer_path = work / f"tokenizer-{rank()}.json"
    make_tokenizer().save(str(tokenizer_path))
    tokenizer = clip_text.Tokenizer(tokenizer_path)

    with torch.random.fork_rng():
        torch.random.manual_seed(seed)                                 # initial weights
        model = TextToNoise()
        initialize(model)
    run = Run(model, work / "unet.pt", device)
    parallel = distributed(model)
    rng = np.random.default_rng([seed, 3, rank(), run.step])
    alphas = schedule.alphas().to(device)

    def loss_of(step: int) -> Tensor:
        rows = rng.integers(len(scenes), size=batch)
        captions = ["" if rng.random() < 0.1 else shapes.caption(scenes[r], rng) for r in rows]
        ids, _ = tokenizer(captions, TEXT_CONFIG.length, TEXT_CONFIG.pad)
        z, eps = torch.from_numpy(rng.standard_normal((2, batch, *mean.shape[1:]), np.float32)).to(device)
        x0 = mean[rows].float().to(device) + std[rows].float().to(device) * z
        # shape and place are decided at high noise, so high times are drawn a little more often than low ones
        t = torch.from_numpy((1000 * rng.random(batch) ** 0.7).astype(np.int64)).to(device)
        a = alphas[t][:, None, None, None]
        return F.mse_loss(parallel(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, ids.to(device)), eps)

    def finish() -> None:
        if rank() == 0:
            average = TextToNoise().to(device)
            average.load_state_dict(run.average)
            facts = {"steps": run.step, "samples": run.step * batch * world(), "minutes": run.seconds / 60,
                     "processes": world(), "device": device.type, "seed": seed, "loss": run.curve}
            write_folder(out, vae, average, facts)

    train(run, steps, 1e-3, 1000, loss_of, "text + U-Net", finish)


def initialize(model: TextToNoise) -> None:
    """The last layer of each ResBlock and SpatialTransformer, and of the U-Net, begins at zero; embeddings small."""
    for name, p in model.unet.named_parameters():
        if any(part in name for part in ("conv2.", "proj_out.", "conv_out.")):
            nn.init.zeros_(p)
    embeddings = model.text.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.02)


def write_folder(out: Path, vae: VAE, model: TextToNoise, facts: dict) -> None:
    """The model folder that `txt2img.py` loads, in float16, and how it was trained."""
    out.mkdir(parents=True, exist_ok=True)
    for name, module in (("vae", vae), ("text_encoder", model.text), ("unet", model.unet)):
        with replacing(out / f"{name}.safetensors") as path:
            save_file({key: p.half().contiguous().cpu() for key, p in module.state_dict().items()}, path)
    with replacing(out / "tokenizer.json") as path:
        make_tokenizer().save(str(path))
    with replacing(out / "training.json") as path:
        path.write_text(json.dumps(facts) + "\n")
    write_config(out, ModelConfig(family="tiny", prediction="epsilon", size=SIZE, schedule=NoiseSchedule(),
                                  unet=UNET_CONFIG, vae=VAE_CONFIG, text_encoder=TEXT_CONFIG))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/tiny"), help="model folder to write (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("data/tiny"), help="checkpoints, to resume (%(default)s)")
    parser.add_argument("--vae-steps", type=int, default=2200, help="optimiser steps of stage 1 (%(default)s)")
    parser.add_argument("--steps", type=int, default=9000, help="optimiser steps of stage 2 (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step and process (%(default)s)")
    parser.add_argument("--scenes", type=int, default=40_000, help="different scenes a process (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and noise (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args()
    device = torch.device(args.device)
    if "RANK" in os.environ:                                           # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    torch.set_flush_denormal(True)                                     # +10-15 % on CPU
    args.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(args.work, args.vae_steps, 2 * args.batch, args.seed, device)
    train_unet(vae, args.work, args.out, args.steps, args.batch, args.scenes, args.seed, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
