"""Trains masks on the weights of a model's U-Net (MaskUNet's training-based approach), and the loop of all trainings.

    python train.py masks --model models/tiny --data FOLDER --out masks.safetensors
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train.py masks --data FOLDER --out masks.safetensors

Start at `Training`, a run that can be saved and resumed, and `fit`, the loop; `lab/train_tiny.py` uses both.
`train_denoiser` is `fit` with the loss of diffusion models, for any batches of images and captions. Masks are in
`maskunet.py`. Source: arXiv 2505.03097; as published: AdamW, a constant rate, all times equally likely and weighted.
Shapes: B images of this process, H W pixels, h w latent pixels.
"""
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from command import (
    ArgumentParser,
    HelpFormatter,
    InputError,
    check_device,
    check_flags,
    check_writable,
    replacing,
    run_command,
)
from folder import TINY
from maskunet import DynamicMasks, Gumbel, MaskRun, Masks, StaticMasks, mix, save_masks, weight_digest
from pictures import open_picture
from sampler import Condition, draw_noise
from stable_diffusion import StableDiffusion
from unet import Techniques, UNet

BUCKETS = 5                                        # of the times 0..999, for the log


# ---------------------------------------------------------------------------------------------------- several processes

def join(device: torch.device) -> torch.device:
    """Join the other processes if torchrun started this one. Returns this process's device."""
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def distributed(module: nn.Module) -> nn.Module:
    """The module; backward passes average its gradients over all processes."""
    return DistributedDataParallel(module) if dist.is_initialized() else module


# ------------------------------------------------------------------------------------------------------------- the loop

class Training:
    """A training run: module, optimisers, progress and log. If the file `path` exists, the run continues from it.

    memory: None, or keep a moving average of all weights, over a tenth of the steps so far but at most this many.
    clip: the largest norm of the gradient. facts: more settings that must stay the same when a run is continued.
    optimizers: instead of AdamW with lr and weight_decay. The rate of a parameter group is its "factor" (default: 1)
        times the rate that `update` is given.
    InputError where the file belongs to another module or other facts.
    """
    KEPT = ("average", "step", "seconds", "curve", "scores", "fell")   # with the states of module and optimisers

    def __init__(self, module: nn.Module, path: Path | None = None, lr: float = 1e-3, weight_decay: float = 1e-2,
                 seed: int = 0, memory: int | None = None, clip: float | None = None,
                 optimizers: list[torch.optim.Optimizer] | None = None, **facts: Any):
        self.module, self.path, self.seed, self.memory, self.clip = module, path, seed, memory, clip
        self.optimizers = optimizers or [torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)]
        self.average = {name: p.detach().clone() for name, p in module.state_dict().items()} if memory else None
        self.facts = dict(lr=lr, weight_decay=weight_decay, seed=seed, **facts)
        self.step, self.seconds, self.curve, self.scores = 0, 0.0, [], []
        self.fell: int | None = None               # for callers: the step at which the rate began to fall
        if path is None or not path.exists():
            return
        try:
            state = torch.load(path, map_location=next(module.parameters()).device, weights_only=True)
            for name, value in self.facts.items():
                if state["facts"].get(name) != value:
                    raise InputError(f"{path} was begun with {name} {state['facts'].get(name)}, not {value}: continue "
                                     "as it began, or remove it")
            module.load_state_dict(state["module"])
            for optimizer, its in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(its)
            for name in self.KEPT:
                setattr(self, name, state[name])
        except InputError:
            raise
        except Exception as error:                 # torch.load and load_state_dict raise many kinds
            raise InputError(f"{path} is no checkpoint of this training ({type(error).__name__}); remove it") from None

    def save(self) -> None:
        if self.path is not None and rank() == 0:
            with replacing(self.path) as part:
                torch.save({"module": self.module.state_dict(), "facts": self.facts,
                            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                            **{name: getattr(self, name) for name in self.KEPT}}, part)

    def update(self, loss: Tensor, lr: float | None = None, first: int = 0) -> None:
        """One step of the optimisers. lr: their rate; None: unchanged. first: the step at which the average begins."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups if lr is not None else []:
                group["lr"] = lr * group.get("factor", 1)
            optimizer.step()
        self.step += 1
        with torch.no_grad():
            for name, p in self.module.state_dict().items() if self.average is not None else []:
                self.average[name].lerp_(p, max(1 / self.memory, 9 / (9 + self.step - first)))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """The rate of a step: rising over `warmup` steps, constant, falling linearly to zero over the last third."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (steps / 3))


def fit(run: Training, steps: int, loss_of: Callable[[int], Tensor | None], name: str, save_every: int = 500,
        log_every: int = 100, log: Callable[[float], None] | None = None, on_save: Callable[[], None] = lambda: None,
        peak: float | None = None, first: int = 0, stop: int | None = None) -> None:
    """The loop of all trainings, up to `steps` optimiser steps in all.

    loss_of(step): draws a batch and returns its loss, or None if there are no more batches.
    log(loss): called every log_every steps and before each checkpoint, with the mean loss since the last call. None:
        (step, loss) is added to the curve. on_save(): called before each checkpoint.
    peak: of `learning_rate`, which begins at step `first`; None: the optimisers' own constant rate.
    stop: a step before `steps` at which to leave this schedule.
    Batches that end too early end the training, with a warning; InputError where a loss or a weight is not finite. Both
    leave the last good checkpoint.
    """
    recent: list[float] = []
    log, stop = log or (lambda loss: run.curve.append((run.step, loss))), steps if stop is None else stop
    with tqdm(total=stop, initial=min(run.step, stop), desc=name, unit="step", disable=rank() > 0) as bar:
        while run.step < stop:
            started = time.time()
            loss = loss_of(run.step)
            if loss is None:
                warnings.warn(f"the batches ended after step {run.step} of {stop}", stacklevel=3)
                stop = run.step
            else:
                check_finite("loss", run.step, [loss])                 # before it reaches the weights
                run.update(loss, None if peak is None else learning_rate(run.step - first, steps - first, peak), first)
                recent.append(loss.item())
                bar.update()
            run.seconds += time.time() - started
            save = run.step % save_every == 0 or run.step == stop
            if recent and (save or run.step % log_every == 0):         # a checkpoint holds no half-summed losses
                check_finite(name, run.step, run.module.parameters())
                log(sum(recent) / len(recent))
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
                recent.clear()
            if save:
                on_save()
                run.save()


def check_finite(what: str, step: int, tensors: Iterable[Tensor]) -> None:
    if not all(x.isfinite().all() for x in tensors):
        raise InputError(f"at step {step} the {what} became infinite or NaN: lower --lr; the last checkpoint is kept")


# ---------------------------------------------------------------------------------------------- the loss of diffusion

@torch.no_grad()
def noised(sd: StableDiffusion, images: Tensor | tuple[Tensor, Tensor], captions: list[str],
           generators: list[torch.Generator],
           caption_dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """Noisy latents x (B, 4, h, w) of images, their times (B,), what to predict, and the U-Net's condition.

    images: (B, 3, H, W) in [0, 1]; or mean and standard deviation of their latents, (B, 4, h, w) each.
    Generator k draws all of row k: whether its caption stays, the time, the latent, the noise.
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


class MaskedUNet(nn.Module):
    """A frozen U-Net with masks that learn, as one module for DistributedDataParallel."""

    def __init__(self, unet: UNet, masks: DynamicMasks | StaticMasks):
        super().__init__()
        self.unet, self.masks = unet.requires_grad_(False), masks

    def forward(self, x: Tensor, t: Tensor, context: Tensor, added: Tensor | None, seeds: list[int],
                step: int) -> tuple[Tensor, Tensor]:
        run = MaskRun(Masks(self.masks), self.unet, seeds)
        out = self.unet(x, t, context, added, Techniques(masks=run.at((step,), (0,))))
        return out, torch.as_tensor(run.density)


def train_denoiser(sd: StableDiffusion, run: Training,
                   batches: Iterable[tuple[Tensor | tuple[Tensor, Tensor], list[str]]], steps: int,
                   save_every: int = 500, log_every: int = 50, caption_dropout: float = 0.0,
                   model: nn.Module | None = None) -> list[tuple]:
    """Train with the loss of diffusion models. Returns the curve: (step, loss, loss by time, density of the masks).

    run: a training of masks; or of other weights, if `model` is given: it replaces `MaskedUNet` and takes the same
        arguments.
    batches: this process's images (see `noised`) and captions, from step `run.step` on.
    steps: optimiser steps in all. caption_dropout: the fraction of the captions that is left out (as published: none).
    Every random number is a function of seed, step and place in the batch of all processes: runs resume exactly.
    """
    parallel, batches = distributed(MaskedUNet(sd.unet, run.module) if model is None else model), iter(batches)
    sums = torch.zeros(2, BUCKETS + 1, dtype=torch.float64)            # sums and counts: the buckets, and the density

    def loss_of(step: int) -> Tensor | None:
        images, captions = next(batches, (None, None))
        if captions is None:
            return None
        seeds = [mix(run.seed, step, rank() * len(captions) + k) for k in range(len(captions))]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        x, t, target, (context, added, _) = noised(sd, images, captions, generators, caption_dropout)
        out, density = parallel(x.to(sd.dtype), t, context, added, seeds, step)
        losses = (out.float() - target).square().mean(dim=(1, 2, 3))
        bucket = (t * BUCKETS // sd.config.schedule.train_steps).cpu()
        sums[0].index_add_(0, bucket, losses.detach().double().cpu())
        sums[1].index_add_(0, bucket, torch.ones(len(bucket), dtype=torch.float64))
        sums[:, -1] += torch.stack([density.double().cpu(), torch.ones((), dtype=torch.float64)])
        return losses.mean()

    def log(_: float) -> None:
        """A row of the curve, over all processes; NaN for a range of times that no image had."""
        device = next(run.module.parameters()).device
        total = sums.to(device if device.type == "cuda" else "cpu", copy=True)
        sums.zero_()
        if dist.is_initialized():
            dist.all_reduce(total)
        loss, (*by_time, density) = float(total[0, :-1].sum() / total[1, :-1].sum()), (total[0] / total[1]).tolist()
        run.curve.append((run.step, loss, by_time, density))
        if rank() == 0:
            tqdm.write(f"step {run.step}  loss {loss:.5f}  by time {' '.join(f'{x:.4f}' for x in by_time)}  "
                       f"density {density:.4f}")

    fit(run, steps, loss_of, "masks" if model is None else "weights", save_every, log_every, log)
    return run.curve


# ------------------------------------------------------------------------------------------------------------- the data

def read_pairs(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder, NAME.png or .jpg, and the caption of each, in NAME.txt."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; --data is a folder of NAME.png (or .jpg), each with a NAME.txt")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise InputError(f"{folder} has no pictures; it must have NAME.png (or .jpg), each with a NAME.txt")
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
    """This process's part of endless batches, from step `first` on: centre squares. Each epoch has its own order."""
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


# ---------------------------------------------------------------------------------------------------------- the command

def main() -> None:
    parser = ArgumentParser(description="Train what makes a model better.")
    add = parser.add_subparsers(dest="what", required=True, metavar="WHAT").add_parser(
        "masks", formatter_class=HelpFormatter, help="masks on the weights of the U-Net, from captioned pictures",
        description="Learn masks on the weights of a U-Net from captioned pictures (maskunet.py).").add_argument
    add("--model", type=Path, default=TINY, help="model folder written by convert_weights.py")
    add("--data", type=Path, required=True, help="folder of NAME.png or .jpg (the centre square counts), each with its "
        "caption in NAME.txt")
    add("--out", type=Path, required=True, help="safetensors file; a checkpoint to resume from is kept next to it")
    add("--steps", type=int, default=1000, help="optimiser steps in all")
    add("--batch", type=int, default=32, help="pictures per step, over all processes")
    add("--lr", type=float, default=1e-3, help="constant learning rate; the paper's, for 9,000 steps, is 1e-5")
    add("--seed", type=int, default=0, help="of weights, order and noise")
    add("--init", choices=["working", "official"], default="working",
        help="official: as released, which can't learn to depend on time and image")
    add("--initial", type=float, default=5.0, help="first value of all logits")
    add("--gumbels", type=int, choices=[1, 2], default=1, help="1: as released; 2: as cited")
    add("--caption-dropout", type=float, default=0.0, help="fraction of the captions that is left out")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    args = parser.parse_args()
    check_flags(("--steps", args.steps >= 1, "1 or more"), ("--batch", args.batch >= 1, "1 or more"),
                ("--save-every", args.save_every >= 1, "1 or more"), ("--seed", args.seed >= 0, "0 or more"),
                ("--lr", 0 < args.lr <= 1, "above 0, at most 1"),
                ("--initial", math.isfinite(args.initial), "a finite number"),
                ("--caption-dropout", 0 <= args.caption_dropout <= 1, "between 0 and 1"),
                ("--out", args.out.suffix == ".safetensors", "a .safetensors file"))
    device = check_device(args.device)
    pairs = read_pairs(args.data)
    check_writable(args.out.parent)
    warnings.showwarning = lambda message, *_: tqdm.write(f"note: {message}", file=sys.stderr)
    device = join(device)
    if args.batch % world():
        raise InputError(f"--batch {args.batch} must be a multiple of the {world()} processes")
    sd = StableDiffusion.load(args.model, device)
    masks = DynamicMasks(sd.unet, init=args.init, initial=args.initial, gumbel=Gumbel(args.gumbels), seed=args.seed)
    run = Training(masks, args.out.with_suffix(".checkpoint.pt"), args.lr, seed=args.seed,
                   masks=repr((masks.settings, masks.gumbel)), batch=args.batch, caption_dropout=args.caption_dropout,
                   pictures=len(pairs), model=weight_digest(sd.unet, masks.layers))
    if run.step > args.steps:
        raise InputError(f"{run.path} is at step {run.step} already: give as many --steps or more, or remove it")
    train_denoiser(sd, run, read_batches(pairs, sd.config.size, args.batch, args.seed, run.step), args.steps,
                   args.save_every, caption_dropout=args.caption_dropout)
    if rank() == 0:
        save_masks(masks, args.out, sd.unet, {**run.facts, "steps": run.step, "curve": run.curve})
        print(args.out)
    leave()


if __name__ == "__main__":
    run_command(main)
