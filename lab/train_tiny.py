"""Trains the embedded model `models/tiny` on the world of `lab/shapes.py`: autoencoder, then CLIP, then U-Net.

Start at `main`; `train_vae`, `train_clip` and `train_unet` train the classes of the top level, each by `train.fit`.
Each stage keeps a checkpoint in the work folder and resumes from it. On a CPU, one process per core is fastest by far:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m lab.train_tiny --out models/tiny

Every process draws its own scenes from (seed, rank); gradients are averaged, so weights are the same everywhere.
With `--parts models/tiny` autoencoder and CLIP are taken from that folder, and only the U-Net is trained. Its rate
stays constant for `--steps`, then falls to zero during half as many more. Until it falls, a run is made longer by
resuming it with more steps; fewer steps than it has done make it fall at once.
Source: latent diffusion, arXiv 2112.10752, sections 3.1 and 3.2; classifier-free guidance, arXiv 2207.12598;
v-prediction, arXiv 2202.00512; Muon, https://kellerjordan.github.io/posts/muon and arXiv 2502.16982.
"""
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import clip_text
import reward
from checkpoint import open_safetensors
from clip_text import TextEncoder
from command import ArgumentParser, HelpFormatter, replacing, run_command
from folder import TINY, ModelConfig, write_config
from lab import shapes, study
from lab.evaluate import draw, judged
from lab.study import line
from reward import ClipReward, ImageEncoder, load_reward
from sampler import NoiseSchedule
from stable_diffusion import StableDiffusion
from train import Training, distributed, fit, join, leave, rank, world
from unet import CONFIGS, UNet
from vae import VAE, VAEConfig

SIZE = 64                                                              # native pixels
VAE_CONFIG = VAEConfig(channels=(16, 32, 64), layers=1, groups=8, scaling=1.0)   # 64 px -> 16x16 latents
TEXT_CONFIG = clip_text.CONFIGS["tiny"]
CLIP_CONFIGS = replace(TEXT_CONFIG, projection=64), reward.CONFIGS["tiny"]
UNET_CONFIG = replace(CONFIGS["tiny"], heads=(1, 2, 4, 4))            # widths in SD's proportions; equally wide heads
MIX = {"single": 0.10, "two": 0.16, "counting": 0.32, "colors": 0.10, "position": 0.18, "color_attr": 0.14}
NUMBERS = 2, 3, 4, 4                                                   # objects that are counted: four as often as both
COLORED = 0.5                                                          # the share of captions that name colours
LESSON = range(6000, 6400)                                             # steps that teach words for sides alone
RATE = 1.5e-3                                                          # of AdamW; Muon has twice as much
MODEL_CONFIG = ModelConfig(family="tiny", prediction="v", size=SIZE, schedule=NoiseSchedule(), unet=UNET_CONFIG,
                           vae=VAE_CONFIG, text_encoder=TEXT_CONFIG, cfg_scale=3.0)


class Muon(torch.optim.Optimizer):
    """Momentum, where the update of every matrix is replaced by the nearest orthogonal one.

    A convolution's weight counts as a matrix (C_out, C_in h w). The update is scaled to the usual size of AdamW's,
    arXiv 2502.16982. Each process makes the updates of its share of the matrices. (PyTorch's own Muon refuses weights
    of convolutions, and every process would make all updates.)
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, dict(lr=0.0, momentum=momentum, weight_decay=weight_decay, factor=2))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters, beta = group["params"], group["momentum"]
            updates = [torch.zeros_like(p) for p in parameters]
            for k, (p, update) in enumerate(zip(parameters, updates)):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - beta)
                if k % world() == rank():
                    matrix = p.grad.lerp(momentum, beta).flatten(1)
                    update.copy_((orthogonal(matrix) * 0.2 * max(matrix.shape) ** 0.5).view_as(p))
            if world() > 1:
                flat = torch.cat([update.flatten() for update in updates])
                dist.all_reduce(flat)
                updates = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters)]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """(m, n) -> (m, n) with the same singular vectors and singular values near 1, by five steps of Newton-Schulz.

    It iterates on the smaller Gram matrix and multiplies x by the result once, which is faster.
    """
    if len(x) > x.shape[1]:
        return orthogonal(x.mT).mT
    x = x / (x.norm() + 1e-7)
    gram, product = x @ x.mT, torch.eye(len(x), dtype=x.dtype, device=x.device)
    one = product
    for _ in range(5):
        factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        gram, product = factor @ gram @ factor, factor @ product
    return product @ x


def begin(module: nn.Module, path: Path, device: torch.device, matrices: list[nn.Parameter] | None = None,
          memory: int = 2000) -> Training:
    """A stage's training, with averaged weights. It resumes from the checkpoint `path`.

    matrices: these weights are trained by Muon, at twice the rate; all others by AdamW.
    """
    rest = [p for p in module.to(device).parameters() if not any(p is other for other in matrices or [])]
    optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices))
    return Training(module, path, memory=memory, clip=1.0, optimizers=optimizers)


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


def train_vae(work: Path, steps: int, batch: int, seed: int, device: torch.device) -> tuple[VAE, Training]:
    """Reconstructs crops of crowded scenes; in the last quarter of the steps, whole pictures of the world.

    Crops have more edges than whole pictures, whose loss is mostly about plain background. The loss is L1 + L2 + half
    the L1 of the gradients + 1e-5 KL.
    """
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)                                 # initial weights
        model = Reconstruct()
    run = begin(model, work / "vae.pt", device)
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
        rng = np.random.default_rng([seed, 1, rank(), 1, step])        # one per step: a resumed run is the same
        whole = step >= steps * 3 // 4
        n = batch // 4 if whole else batch                             # whole pictures have four times the pixels
        x = to_tensor(np.stack([picture(whole, rng) for _ in range(n)])).to(device)
        noise = torch.from_numpy(rng.standard_normal((n, 4, x.shape[2] // 4, x.shape[3] // 4), np.float32)).to(device)
        y, mean, logvar = parallel(x, noise)
        edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges + 1e-5 * kl

    fit(run, steps, loss_of, "autoencoder", peak=2e-3)
    model.load_state_dict(run.average)
    standardize(model.vae, device)
    return model.vae.eval().requires_grad_(False), run


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) bytes -> (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def standardize(vae: VAE, device: torch.device) -> None:
    """Gives every latent channel mean 0 and variance 1: the 1x1 convolutions on both sides take shift and scale.

    Reconstructions stay the same, and `scaling` is 1.
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


# ----------------------------------------------------------------------------------------------------- stage 2: CLIP

def make_tokenizer() -> Tokenizer:
    """Whole words of the world's vocabulary. The end token has the largest id, as in CLIP; padding is 0."""
    words = ["<|padding|>", "<|unknown|>", "<|startoftext|>", *shapes.VOCABULARY, "<|endoftext|>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unknown|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


class TextImage(nn.Module):
    """CLIP. Pictures (B, 3, H, W), ids (B (1 + K), L) -> unit vectors (B, P), (B (1 + K), P), factor on cosines"""

    def __init__(self):
        super().__init__()
        self.text, self.image = TextEncoder(CLIP_CONFIGS[0]), ImageEncoder(CLIP_CONFIGS[1])
        self.logit_scale = nn.Parameter(torch.tensor(np.log(10.0), dtype=torch.float32))
        places = self.image.vision_model.embeddings.position_embedding
        for embedding in (*self.text.text_model.embeddings.children(), places):
            nn.init.normal_(embedding.weight, std=0.02 if embedding is not places else 0.1)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (F.normalize(self.image(images), dim=-1), F.normalize(self.text(ids)[1], dim=-1),
                self.logit_scale.exp().clamp(max=100))


def hard_negatives(scene: shapes.Scene, request: shapes.Request, n: int, rng: np.random.Generator,
                   sides: bool = False) -> list[str]:
    """n false captions that differ from a true one in one thing; sides: in a place or relation.

    None names what is held out: the model would learn that such a combination is always false.
    """
    found = []
    while len(found) < n:
        other = shapes.alter(request, rng, sides)
        if not shapes.asks_held_out(other) and not shapes.is_true(other, scene):
            found.append(shapes.phrase(other, rng))
    return found


def train_clip(scenes: list[shapes.Scene], neat: list[shapes.Scene], tokenizer: clip_text.Tokenizer, work: Path,
               steps: int, neat_steps: int, side_steps: int, batch: int, seed: int, device: torch.device,
               negatives: int = 3) -> tuple[ClipReward, Training]:
    """Contrasts a picture's own caption with the other captions of the batch and with hard negatives.

    As long as neither tower knows sides, neither has a reason to learn them. So after `steps`, half of every batch is a
    lesson: captions say where objects lie, and their hard negatives are wrong about that. The lesson's pictures are
    neat ones for `neat_steps`, then, for `side_steps`, any pictures of one or two objects.

    Every process contrasts its own batch. Captions that happen to be true of another picture don't count against it.
    """
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)                                 # initial weights
        model = TextImage()
    run = begin(model, work / "clip.pt", device)
    parallel = distributed(model)
    every = scenes + neat
    unlike = [k for k, scene in enumerate(scenes) if len({t.shape for t in scene.things}) == len(scene.things)]

    @cache
    def picture(k: int) -> np.ndarray:
        return shapes.draw(every[k], SIZE, SIZE)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 3, rank(), step])
        rows = [int(k) for k in rng.integers(len(scenes), size=batch)]
        lesson = [step >= steps and i % 2 == 0 for i in range(batch)]  # pictures about sides
        lessons = range(len(scenes), len(every)) if step < steps + neat_steps else unlike
        rows = [lessons[k % len(lessons)] if sides else k for k, sides in zip(rows, lesson)]
        requests = [shapes.describe(every[k], rng, where=sides) for k, sides in zip(rows, lesson)]
        texts = [shapes.phrase(request, rng) for request in requests]
        for k, request, sides in zip(rows, requests, lesson):
            texts += hard_negatives(every[k], request, negatives, rng, sides)
        also = torch.tensor([[i != j and shapes.is_true(requests[j], every[rows[i]]) for j in range(batch)]
                             for i in range(batch)], device=device)
        images = to_tensor(np.stack([picture(k) for k in rows])) / 2 + 0.5
        ids, _ = tokenizer(texts, TEXT_CONFIG.length, TEXT_CONFIG.pad)
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):         # twice as fast on CPU
            image, text, scale = parallel(images.to(device), ids.to(device))
        image, text = image.float(), text.float()
        among = (scale * image @ text[:batch].T).masked_fill(also, -torch.inf)                      # (B, B)
        hard = scale * torch.einsum("bp,bkp->bk", image, text[batch:].unflatten(0, (batch, -1)))    # (B, K)
        own = torch.arange(batch, device=device)
        return (F.cross_entropy(torch.cat([among, hard], dim=1), own) + F.cross_entropy(among.T, own)) / 2

    fit(run, steps, loss_of, "CLIP", peak=1e-3)
    for name, first, n in (("neat sides", steps, neat_steps), ("sides", steps + neat_steps, side_steps)):
        fit(run, first + n, loss_of, f"CLIP, {name}", peak=1e-3, first=first)
    model.load_state_dict(run.average)
    model.eval().requires_grad_(False)
    return ClipReward(model.image, model.text, tokenizer), run


# ------------------------------------------------------------------------------------------------------ stage 3: U-Net

class TextToVelocity(nn.Module):
    """Text encoder and U-Net, trained together. (B, 4, h, w), times (B,), ids (B, L) -> predicted v (B, 4, h, w)"""

    def __init__(self, clip_text: TextEncoder):
        """The text encoder begins as CLIP's, without the projection."""
        super().__init__()
        self.text, self.unet = TextEncoder(TEXT_CONFIG), UNet(UNET_CONFIG)
        own = self.text.state_dict()
        self.text.load_state_dict({name: p for name, p in clip_text.state_dict().items() if name in own})
        for name, p in self.unet.named_parameters():                   # every block begins as the identity
            if any(part in name for part in ("conv2.", "proj_out.", "conv_out.")):
                nn.init.zeros_(p)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text(ids)[0])


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


def train_unet(vae: VAE, clip: ClipReward, scenes: list[shapes.Scene], neat: list[shapes.Scene],
               tokenizer: clip_text.Tokenizer, work: Path, steps: int, batch: int, seed: int, device: torch.device,
               save_every: int, finish: Callable[[TextToVelocity, Training], None]) -> None:
    """Trains text encoder and U-Net to predict v = sqrt(a) eps - sqrt(1 - a) x0 of noised latents from captions.

    A tenth of the captions is empty, for guidance. Muon trains the matrices. The rate is constant for `steps` and falls
    during half as many more. The text encoder begins with CLIP's weights.

    Words for sides are hard to learn: objects are visible in the noise at nearly all times, so these words matter only
    above t = 950. So some rows are lessons: neat scenes at times above 900, whose captions say where objects lie. These
    are an eighth of the rows at first, all rows in the steps of `LESSON`, and a quarter afterwards.

    finish(model with averaged weights, run): called at each checkpoint.
    """
    plain = world_latents(vae, scenes, work / f"latents-{rank()}.safetensors", device)
    lined_up = world_latents(vae, neat, work / f"neat-{rank()}.safetensors", device)
    mean, std = (torch.cat(pair) for pair in zip(plain, lined_up))
    every = scenes + neat
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)                                 # initial weights
        model = TextToVelocity(clip.text)
    ends = ("embedding", "conv_in", "conv_out")
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and not any(part in name for part in ends)]
    run = begin(model, work / "unet.pt", device, matrices, memory=4000)
    parallel = distributed(model)
    alphas = NoiseSchedule().alphas().to(device)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 4, rank(), step])
        rows = rng.integers(len(scenes), size=batch)
        lesson = np.arange(batch) % (8 if step < LESSON.start else 1 if step in LESSON else 4) == 0
        rows[lesson] = len(scenes) + rows[lesson] % len(neat)
        captions = ["" if rng.random() < 0.1 else shapes.caption(every[r], rng, where=bool(at_sides), colored=COLORED)
                    for r, at_sides in zip(rows, lesson)]
        ids, _ = tokenizer(captions, TEXT_CONFIG.length, TEXT_CONFIG.pad)
        z, eps = torch.from_numpy(rng.standard_normal((2, batch, *mean.shape[1:]), np.float32)).to(device)
        x0 = mean[rows].float().to(device) + std[rows].float().to(device) * z
        # High noise decides shape, number and place, so such times are drawn more often. The highest times weigh less
        # (down to a tenth), because little can be predicted there; not in lessons.
        u = rng.random(batch)
        t = torch.from_numpy(np.where(lesson, 900 + 100 * u, 1000 * u ** 0.6).astype(np.int64)).to(device)
        a = alphas[t][:, None, None, None]
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        error = parallel(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, ids.to(device)) - v
        weight = (20 * a).clamp(max=1).where(torch.from_numpy(~lesson).to(device)[:, None, None, None], 1.0)
        return (error.square() * weight).mean()

    def average() -> None:
        averaged = TextToVelocity(clip.text).to(device)
        averaged.load_state_dict(run.average)
        finish(averaged.eval().requires_grad_(False), run)

    if run.fell is None:
        turn = max(steps, run.step)
        fit(run, turn * 3 // 2, loss_of, "U-Net", save_every, on_save=average, peak=RATE, stop=turn)
        run.fell = run.step
    fit(run, run.fell * 3 // 2, loss_of, "U-Net, falling rate", save_every, on_save=average, peak=RATE)


def score(sd: StableDiffusion, per_half: int) -> dict[str, float]:
    """The scores of a few prompts of each kind and half, other prompts than the benchmark's; the processes share them.
    """
    bench = shapes.make_bench(seed=1)
    rows = [row for kind in shapes.KINDS for seen in (True, False)
            for row in [r for r in bench if (r["kind"], r["seen"]) == (kind, seen)][:per_half]]
    mine = rows[rank()::world()]
    pictures = draw(sd, [row["prompt"] for row in mine], 48, 1_000_000 + 10_000 * rank(), dict(steps=20, cfg_scale=5.0))
    found = [row | judged(picture, row["prompt"]) | {"overlap": shapes.measure(picture, row["prompt"]).overlap}
             for row, picture in zip(mine, pictures)]
    if dist.is_initialized():
        parts = [None] * world()
        dist.all_gather_object(parts, found)
        found = sum(parts, [])
    mean = lambda name, **of: float(np.mean([row[name] for row in found if of.items() <= row.items()]))
    return {"overall": mean("strict"), "seen": mean("strict", seen=True), "unseen": mean("strict", seen=False),
            **{kind: mean("strict", kind=kind) for kind in shapes.KINDS},
            **{name: mean(name) for name in ("loose", "quality", "overlap")}}


def draw_curve(facts: dict, path: Path) -> None:
    """The scores against the samples seen, of a training.json, and against the hours if it has them."""
    *before, last = zip(*facts["scores"])
    axes = dict(zip(("samples", "hours"), before))                     # models/tiny has no hours
    wide = {"overall": 2.5, "quality": 2.5, "seen": 1.5, "unseen": 1.5}
    study.plot([[(dict(xlabel=what, ylabel="share of right pictures, or mean", ylim=(0, 1)), [
        line(x, [numbers[name] for numbers in last], name, "o-", width=wide.get(name, 0.8)) for name in last[0]])
        for what, x in axes.items()]], path.stem, path, size=5, legend=True, share=True)


def write_folder(out: Path, vae: VAE, clip: ClipReward, model: TextToVelocity, facts: dict) -> None:
    """The model folder that `txt2img.py` loads, in float16, and how it was trained; in it, CLIP's own folder."""
    clip.save(out / "clip")
    for name, module in (("vae", vae), ("text_encoder", model.text), ("unet", model.unet)):
        with replacing(out / f"{name}.safetensors") as path:
            save_file({key: p.half().contiguous().cpu() for key, p in module.state_dict().items()}, path)
    with replacing(out / "tokenizer.json") as path:
        make_tokenizer().save(str(path))
    with replacing(out / "training.json") as path:
        path.write_text(json.dumps(facts) + "\n")
    write_config(out, MODEL_CONFIG)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=TINY, help="model folder to write")
    add("--work", type=Path, default=Path("data/tiny"), help="checkpoints, to resume")
    add("--parts", type=Path, metavar="FOLDER", help="take autoencoder and CLIP from this model folder")
    for name, default, text in (
            ("vae-steps", 2200, "optimiser steps of stage 1"), ("clip-steps", 3000, "optimiser steps of stage 2"),
            ("clip-neat-steps", 1500, "then, about neat sides"), ("clip-side-steps", 6000, "then, about any sides"),
            ("steps", 28_000, "optimiser steps of stage 3 at a constant rate; half as many follow at a falling one"),
            ("batch", 32, "pictures per step and process"), ("scenes", 60_000, "different scenes per process"),
            ("save-every", 500, "steps of stage 3 between checkpoints"), ("score-every", 2000, "steps between scores"),
            ("score-n", 16, "prompts judged, per kind and half"), ("seed", 0, "of weights, scenes and noise")):
        add(f"--{name}", type=int, default=default, help=text)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the training")
    add("--curve", type=Path, metavar="PNG", help="instead: draw the score of OUT against samples")
    args = parser.parse_args()
    if args.curve:
        return draw_curve(json.loads((args.out / "training.json").read_text()), args.curve)
    device = join(torch.device(args.device))
    torch.set_flush_denormal(True)                                     # +10-15 % on CPU
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer_path = args.work / f"tokenizer-{rank()}.json"
    make_tokenizer().save(str(tokenizer_path))
    tokenizer = clip_text.Tokenizer(tokenizer_path)
    neat_kinds = [kind for kind in shapes.KINDS if kind != "counting"]
    neat_rng = np.random.default_rng([args.seed, 5, rank()])
    neat = [shapes.random_scene(neat_rng, neat_kinds[k % len(neat_kinds)], "train", neat=True)
            for k in range(args.scenes // 4)]
    minutes: dict[str, float] = {}

    if args.parts:
        vae, clip = StableDiffusion.load(args.parts, device).vae, load_reward(args.parts / "clip", device)
        for part in (vae, clip.image, clip.text):
            part.eval().requires_grad_(False)
    else:
        vae, vae_run = train_vae(args.work, args.vae_steps, 2 * args.batch, args.seed, device)
        scenes_rng = np.random.default_rng([args.seed, 2, rank()])
        scenes = [shapes.random_scene(scenes_rng, split="train") for _ in range(args.scenes)]
        clip, clip_run = train_clip(scenes, neat, tokenizer, args.work, args.clip_steps, args.clip_neat_steps,
                                    args.clip_side_steps, 2 * args.batch, args.seed, device)
        minutes = {"vae": vae_run.seconds / 60, "clip": clip_run.seconds / 60}

    def finish(model: TextToVelocity, run: Training) -> None:
        sd = StableDiffusion(MODEL_CONFIG, tokenizer, [model.text], model.unet, vae)
        if args.score_n and run.step % args.score_every == 0:
            run.scores.append((run.step * args.batch * world(), run.seconds / 3600, score(sd, args.score_n)))
        if rank() == 0:
            write_folder(args.out, vae, clip, model, {
                "steps": run.step, "samples": run.step * args.batch * world(), "fell": run.fell,
                "minutes": minutes | {"unet": run.seconds / 60}, "processes": world(), "device": device.type,
                "seed": args.seed, "scores": run.scores, "loss": run.curve})

    rng = np.random.default_rng([args.seed, 6, rank()])
    scenes = [shapes.random_scene(rng, str(kind), "train", numbers=NUMBERS)
              for kind in rng.choice(list(MIX), args.scenes, p=list(MIX.values()))]
    train_unet(vae, clip, scenes, neat, tokenizer, args.work, args.steps, args.batch, args.seed, device,
               args.save_every, finish)
    leave()


if __name__ == "__main__":
    run_command(main)
