"""Learns masks on the weights of a U-Net from captioned pictures: MaskUNet's training-based approach.

    python maskunet.py train --model models/tiny --data FOLDER --out masks.safetensors
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 maskunet.py train --data FOLDER --out masks.safetensors

Start at `train`, a loop over any batches of images and captions; the command reads them from a folder. The masks are in
`maskunet.py`. Source: arXiv 2505.03097; as published: AdamW, a constant rate, all times alike, no weights by time.
Shapes: B images of this process, H W pixels, h w latent pixels.
"""
import argparse
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flags import check_device, open_picture
from folder import TINY, InputError, replacing
from maskunet import DynamicMasks, Gumbel, MaskRun, Masks, StaticMasks, fingerprint, mix, save_masks
from sampler import draw_noise
from txt2img import StableDiffusion
from unet import UNet

BUCKETS = 5                                        # of the times 0..999, for the log


class MaskedUNet(nn.Module):
    """What is trained, as one module for DistributedDataParallel: a U-Net that stays as it is, under masks."""

    def __init__(self, unet: UNet, masks: DynamicMasks | StaticMasks):
        super().__init__()
        self.unet, self.masks = unet.requires_grad_(False), masks

    def forward(self, x: Tensor, t: Tensor, context: Tensor, added: Tensor | None, seeds: list[int],
                step: int) -> tuple[Tensor, Tensor]:
        run = MaskRun(Masks(self.masks), self.unet, seeds, halves=(0,)).at(step)
        return self.unet(x, t, context, added, masks=run), torch.as_tensor(run.density)


class Training:
    """A training run of masks: what changes, and what was logged. It is kept in the file `path` and goes on from there.

    InputError where that file belongs to other masks or settings.
    """

    def __init__(self, masks: DynamicMasks | StaticMasks, path: Path | None = None, lr: float = 1e-3,
                 weight_decay: float = 1e-2, seed: int = 0, **facts: Any):
        self.masks, self.path, self.seed = masks, path, seed
        self.optimizer = torch.optim.AdamW(masks.parameters(), lr=lr, weight_decay=weight_decay)
        self.facts = dict(lr=lr, weight_decay=weight_decay, seed=seed, masks=repr((masks.settings, masks.gumbel)),
                          **facts)
        self.step, self.curve = 0, []              # curve: (step, loss, loss by time, density)
        if path is None or not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, value in self.facts.items():
                if state["facts"].get(name) != value:
                    raise InputError(f"{path} was begun with {name} {state['facts'].get(name)}, not {value}: go on as "
                                     "it began, or remove it")
            masks.load_state_dict(state["masks"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.curve = state["step"], state["curve"]
        except InputError:
            raise
        except Exception as error:                 # torch.load and load_state_dict raise many kinds
            raise InputError(f"{path} is no checkpoint of this training ({type(error).__name__}); remove it") from None

    def save(self) -> None:
        if self.path is not None and rank() == 0:
            with replacing(self.path) as part:
                torch.save({"masks": self.masks.state_dict(), "optimizer": self.optimizer.state_dict(),
                            "step": self.step, "curve": self.curve, "facts": self.facts}, part)


def join(device: torch.device) -> torch.device:
    """Join the other processes where torchrun started this one; the device that is this one's."""
    if "RANK" in os.environ:                                           # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def noised(sd: StableDiffusion, images: Tensor | tuple[Tensor, Tensor], captions: list[str],
           generators: list[torch.Generator],
           caption_dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor | None]]:
    """Images (B, 3, H, W) to noisy latents x (B, 4, h, w), times (B,), what to predict, and the U-Net's conditions.

    images: or, where they were encoded before, mean and standard deviation of their latents, (B, 4, h, w) each.
    All of row k is drawn from generator k: whether its caption stays, the time, the latent, the noise.
    """
    alphas = sd.config.schedule.alphas().to(sd.device)
    captions = ["" if torch.rand((), generator=g) < caption_dropout else c for g, c in zip(generators, captions)]
    t = torch.stack([torch.randint(len(alphas), (), generator=g) for g in generators]).to(sd.device)
    if isinstance(images, Tensor):
        mean, logvar = (z.float() for z in sd.vae.encode(images.to(sd.device) * 2 - 1))
        std = (0.5 * logvar).exp()
    else:
        mean, std = (z.float().to(sd.device) for z in images)
    x0 = sd.config.vae.scaling * (mean + std * draw_noise(generators, mean))
    eps, a = draw_noise(generators, mean), alphas[t][:, None, None, None]
    target = eps if sd.config.prediction == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x0
    height, width = (side * sd.config.vae.factor for side in mean.shape[-2:])
    return a.sqrt() * x0 + (1 - a).sqrt() * eps, t, target, sd.conditions(captions, None, height, width)


def train(sd: StableDiffusion, run: Training, batches: Iterable[tuple[Tensor | tuple[Tensor, Tensor], list[str]]],
          steps: int, save_every: int = 500, log_every: int = 50, caption_dropout: float = 0.0,
          model: nn.Module | None = None) -> list[tuple]:
    """Learn masks with which the frozen U-Net predicts the noise better. Returns the curve: see `Training`.

    batches: this process's images (B, 3, H, W) in [0, 1] (or their latents, see `noised`) and captions, from step
        `run.step` on.
    steps: optimiser steps in all; caption_dropout: part of the captions that is left out (as published: none).
    model: what predicts, in a `MaskedUNet`'s place, where other weights than masks are trained.
    Every random number is a function of seed, step and place in the batch of all processes: runs resume exactly.
    Batches that end too early end the training, with a warning; InputError where a loss or a weight is not finite. Both
    leave the last good checkpoint.
    """
    model = MaskedUNet(sd.unet, run.masks) if model is None else model
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    log = torch.zeros(2, BUCKETS + 1, dtype=torch.float64)             # sums and counts: the buckets, and the density
    with tqdm(total=steps, initial=min(run.step, steps), desc="masks", unit="step", disable=rank() > 0) as bar:
        for _, (images, captions) in zip(range(run.step, steps), batches):
            seeds = [mix(run.seed, run.step, rank() * len(captions) + k) for k in range(len(captions))]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            x, t, target, (context, added) = noised(sd, images, captions, generators, caption_dropout)
            out, density = parallel(x.to(sd.dtype), t, context, added, seeds, run.step)
            losses = (out.float() - target).square().mean(dim=(1, 2, 3))
            check_finite("loss", run.step, [losses])                   # before it reaches the weights
            run.optimizer.zero_grad()
            losses.mean().backward()
            run.optimizer.step()
            run.step += 1
            bar.update()

            bucket = (t * BUCKETS // sd.config.schedule.train_steps).cpu()
            log[0].index_add_(0, bucket, losses.detach().double().cpu())
            log[1].index_add_(0, bucket, torch.ones(len(bucket), dtype=torch.float64))
            log[:, -1] += torch.stack([density.double().cpu(), torch.ones((), dtype=torch.float64)])
            save = run.step % save_every == 0 or run.step == steps
            if save or run.step % log_every == 0:                      # a checkpoint knows of no sums that were begun
                note(run, log)
                log = torch.zeros_like(log)
            if save:
                run.save()
    if run.step < steps:
        warnings.warn(f"the batches ended after step {run.step} of {steps}", stacklevel=2)
        if log[1, -1] > 0:                                             # steps since the last line of the curve
            note(run, log)
        run.save()
    return run.curve


def note(run: Training, log: Tensor) -> None:
    """A line of the curve from the sums since the line before."""
    device = next(run.masks.parameters()).device
    loss, by_time, kept = summary(log.to(device if device.type == "cuda" else "cpu"))
    check_finite("masks", run.step, run.masks.parameters())
    run.curve.append((run.step, loss, by_time, kept))
    if rank() == 0:
        tqdm.write(f"step {run.step}  loss {loss:.5f}  by time {' '.join(f'{x:.4f}' for x in by_time)}  "
                   f"density {kept:.4f}")


def check_finite(what: str, step: int, tensors: Iterable[Tensor]) -> None:
    if not all(x.isfinite().all() for x in tensors):
        raise InputError(f"at step {step} the {what} became infinite or NaN: lower --lr; the last checkpoint is kept")


def summary(log: Tensor) -> tuple[float, list[float], float]:
    """Mean loss, mean loss by time (nan where no image had such a time) and density, over all processes."""
    if dist.is_initialized():
        dist.all_reduce(log)
    *by_time, density = (log[0] / log[1]).tolist()
    return float(log[0, :-1].sum() / log[1, :-1].sum()), by_time, density


def read_pairs(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder, NAME.png or .jpg, with the captions beside them in NAME.txt."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; --data is a folder of NAME.png (or .jpg) beside NAME.txt")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise InputError(f"{folder} has no pictures; it must have NAME.png (or .jpg) beside NAME.txt")
    missing = [path for path in paths if not path.with_suffix(".txt").is_file()]
    if missing:
        raise InputError(f"{len(missing)} of the {len(paths)} pictures in {folder} have no caption, the first is "
                         f"{missing[0].name}: write it to {missing[0].stem}.txt")
    try:
        return [(path, path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()) for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read the captions in {folder} ({error}); they must be text files") from None


def read_batches(pairs: list[tuple[Path, str]], size: int, batch: int, seed: int,
                 first: int = 0) -> Iterator[tuple[Tensor, list[str]]]:
    """This process's part of endless batches, from step `first` on: every epoch in another order, squares of `size`."""
    part, order = batch // world(), {}
    for step in range(first, 10 ** 12):
        images, captions = [], []
        for place in range(step * batch + rank() * part, step * batch + (rank() + 1) * part):
            epoch, k = divmod(place, len(pairs))
            if epoch not in order:
                order = {epoch: np.random.default_rng([seed, epoch]).permutation(len(pairs))}
            path, caption = pairs[order[epoch][k]]
            picture = ImageOps.fit(open_picture(path), (size, size), Image.Resampling.LANCZOS)
            images.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255)
            captions.append(caption)
        yield torch.stack(images), captions


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn masks on the weights of a U-Net from captioned pictures.")
    parser.add_argument("command", choices=["train"])
    parser.add_argument("--model", type=Path, default=TINY, help="model folder written by convert_weights.py")
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.png or .jpg beside NAME.txt")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file; beside it a checkpoint to resume")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps in all (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step, of all processes (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="constant (%(default)s; the paper's 9,000 steps: 1e-5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise (%(default)s)")
    parser.add_argument("--init", choices=["working", "official"], default="working",
                        help="official: as released, which can't learn to depend on time and image")
    parser.add_argument("--initial", type=float, default=5.0, help="logit that all weights begin with (%(default)s)")
    parser.add_argument("--gumbels", type=int, choices=[1, 2], default=1, help="1: as released; 2: as cited")
    parser.add_argument("--caption-dropout", type=float, default=0.0, help="part without captions (%(default)s)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args()
    for flag, ok, legal in (("--steps", args.steps >= 1, "1 or more"), ("--batch", args.batch >= 1, "1 or more"),
                            ("--save-every", args.save_every >= 1, "1 or more"),
                            ("--seed", args.seed >= 0, "0 or more"), ("--lr", 0 < args.lr <= 1, "above 0, at most 1"),
                            ("--initial", math.isfinite(args.initial), "a finite number"),
                            ("--caption-dropout", 0 <= args.caption_dropout <= 1, "between 0 and 1"),
                            ("--out", args.out.suffix == ".safetensors", "a .safetensors file")):
        if not ok:
            raise InputError(f"{flag} must be {legal}")
    device = check_device(args.device)
    pairs = read_pairs(args.data)
    try:
        with tempfile.TemporaryFile(dir=args.out.parent):              # better now than after hours of work
            pass
    except OSError as error:
        raise InputError(f"can't write to {args.out.parent} ({error.strerror}); choose another --out") from None
    warnings.showwarning = lambda message, *_: tqdm.write(f"note: {message}", file=sys.stderr)
    device = join(device)
    if args.batch % world():
        raise InputError(f"--batch {args.batch} must be a multiple of the {world()} processes")
    sd = StableDiffusion.load(args.model, device)
    masks = DynamicMasks(sd.unet, init=args.init, initial=args.initial, gumbel=Gumbel(args.gumbels), seed=args.seed)
    facts = dict(batch=args.batch, caption_dropout=args.caption_dropout, pictures=len(pairs),
                 model=fingerprint(sd.unet, masks.layers))
    run = Training(masks, args.out.with_suffix(".checkpoint.pt"), args.lr, seed=args.seed, **facts)
    train(sd, run, read_batches(pairs, sd.config.size, args.batch, args.seed, run.step), args.steps, args.save_every,
          caption_dropout=args.caption_dropout)
    if rank() == 0:
        save_masks(masks, args.out, sd.unet, {**run.facts, "steps": run.step, "curve": run.curve})
        print(args.out)
    if dist.is_initialized():
        dist.destroy_process_group()
