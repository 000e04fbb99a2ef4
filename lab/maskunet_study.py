"""MaskUNet's tables in miniature: what learned masks do to the tiny model, beside other things that could be learned.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m lab.maskunet_study     # everything; the processes share the work
    python -m lab.maskunet_study --arms "base,working,masks 15" --seeds 1   # some of it, into the same folder

Start at `RECIPES`, what is trained, and `ARMS`, what is judged. All trainings see the same latents, captions, times
and noises; all arms draw the same prompts from the same noise. Tables are in maskunet.md, all numbers in maskunet.json,
training.png shows how score and density move. The training-free arms (`FREE`) climb the model's CLIP and are judged by
the exact scorer as well. Weights and verdicts are kept in OUT/work under names made of the model and all settings
(not of the code), so that nothing is done twice and a stopped run goes on.
Sources: MaskUNet, arXiv 2505.03097; LoRA, arXiv 2106.09685; noise optimisation, ReNO, arXiv 2406.04312.
"""
import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import combinations, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from command import InputError, replacing, run_command
from folder import TINY, read_config
from lab import shapes
from lab.evaluate import BENCH, drawn_features, evaluate, fingerprint, frechet_distance, read_rows, to_bytes
from lab.freeu_study import pyplot, save
from lab.train_tiny import world_latents
from maskunet import (
    DynamicMasks,
    MaskRun,
    Masks,
    MaskSearch,
    RandomMasks,
    StaticMasks,
    key,
    masked_layers,
    mix,
    score_latents,
)
from memory import Meter
from reward import ClipReward, load_reward
from sampler import SAMPLERS, draw_noise, generate, plan
from stable_diffusion import StableDiffusion
from train import BUCKETS, Training, noised, train_denoiser
from unet import UNet

# ------------------------------------------------------------------------------------------------------ what is trained

class Tuned(nn.Module):
    """Other weights than masks: all of the U-Net's (rank None), or LoRA, W + 2 B A, in the layers that masks act on.

    A is random and B is 0 at first; the factor 2 is that of MaskUNet's LoRA baseline (rank 256, alpha 512).
    """
    def __init__(self, unet: UNet, rank: int | None = None, seed: int = 0):
        super().__init__()
        self.rank = rank
        if rank is None:
            values = {key(name): p.detach().clone() for name, p in unet.named_parameters()}
        else:
            values, generator = {}, torch.Generator().manual_seed(seed)
            for name, layer in masked_layers(unet).items():
                values[f"{key(name)}/A"] = torch.randn(rank, layer.in_features, generator=generator) / rank
                values[f"{key(name)}/B"] = torch.zeros(layer.out_features, rank)
        self.values = nn.ParameterDict(values).to(unet.conv_in.weight.device)

    def weights(self, unet: UNet) -> dict[str, Tensor]:
        """What takes the place of the U-Net's own, by name."""
        if self.rank is None:
            return {name: self.values[key(name)] for name, _ in unet.named_parameters()}
        return {f"{name}.weight": layer.weight + 2 * self.values[f"{key(name)}/B"] @ self.values[f"{key(name)}/A"]
                for name, layer in masked_layers(unet).items()}


class TunedUNet(nn.Module):
    """What `train_denoiser` trains in a `MaskedUNet`'s place; nothing is masked, so the density is 1."""

    def __init__(self, unet: UNet, tuned: Tuned):
        super().__init__()
        self.unet, self.tuned = unet, tuned

    def forward(self, x: Tensor, t: Tensor, context: Tensor, added: Tensor | None, seeds: list[int],
                step: int) -> tuple[Tensor, Tensor]:
        return functional_call(self.unet, self.tuned.weights(self.unet), (x, t, context, added)), torch.ones(())


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def matched_rank(unet: UNet) -> int:
    """The rank at which LoRA has as many weights as the network that makes masks."""
    return round(size(DynamicMasks(unet)) / size(Tuned(unet, 1)))


class Recipe(NamedTuple):
    """make(unet, seed): a module to train. lr: constant, the one of three with the lowest loss by `--sweep`."""
    make: Callable[[UNet, int], nn.Module]
    lr: float


def dynamic(unet: UNet, seed: int, **settings) -> DynamicMasks:
    return DynamicMasks(unet, seed=seed, **settings)


RECIPES = {
    "full fine-tuning": Recipe(lambda unet, seed: Tuned(unet), 1e-5),
    "LoRA": Recipe(lambda unet, seed: Tuned(unet, matched_rank(unet), seed), 3e-4),
    "working": Recipe(dynamic, 3e-4),
    "without time": Recipe(partial(dynamic, time=False), 3e-4),
    "without sample": Recipe(partial(dynamic, sample=False), 3e-4),
    "official": Recipe(partial(dynamic, init="official"), 3e-4),
    "static": Recipe(lambda unet, seed: StaticMasks(unet, initial=5.0), 9e-2),     # at lower rates all masks stay 1
}
PARTS = (0.125, 0.25, 0.5)                         # of the steps, after which the working arm is judged as well


class Arm(NamedTuple):
    """What is judged: a recipe's weights after a part of its steps, or random masks, or (neither) the plain model."""
    recipe: str | None = None
    mode: str = "sample"
    part: float = 1.0
    random: bool = False                           # with the density of the working arm of the same seed
    fresh: bool = True


ARMS = {
    "base": Arm(),
    **{name: Arm(name) for name in RECIPES},
    "working threshold": Arm("working", "threshold"),                 # noise-free
    "working expected": Arm("working", "expected"),
    "random fresh": Arm("working", random=True),
    "random fixed": Arm("working", random=True, fresh=False),
    **{f"working at {part:.3g}": Arm("working", part=part) for part in PARTS},
}


# ------------------------------------------------------------------------------------------------ training and judging

class World(NamedTuple):
    """Scenes, a caption of each, and their latents' mean and standard deviation (S, 4, 16, 16)."""
    scenes: list[shapes.Scene]
    captions: list[str]
    latents: tuple[Tensor, Tensor]

    @staticmethod
    def make(sd: StableDiffusion, n: int, seed: int, path: Path) -> "World":
        rng = np.random.default_rng([seed, 6])
        scenes = [shapes.random_scene(rng, split="train") for _ in range(n)]
        return World(scenes, [shapes.caption(scene, rng) for scene in scenes],
                     world_latents(sd.vae, scenes, path, sd.device))

    def batches(self, batch: int, seed: int, first: int) -> Iterator[tuple[tuple[Tensor, Tensor], list[str]]]:
        """Endless, from step `first` on; every time a scene comes, it has another caption."""
        for step in count(first):
            rng = np.random.default_rng([seed, 7, step])
            rows = rng.integers(len(self.scenes), size=batch)
            yield tuple(z[rows] for z in self.latents), [shapes.caption(self.scenes[k], rng) for k in rows]


@dataclass
class Study:
    """A study's model, data and settings; its methods do what isn't done yet and give what was found."""
    sd: StableDiffusion
    reward: ClipReward
    work: Path
    model: str                                     # a name for its weights
    steps: int = 300                               # of every training
    batch: int = 32
    scenes: int = 4000
    validation: int = 512                          # pictures behind a loss
    n: int = 90                                    # pictures an arm and seed, the six kinds alike
    free_n: int = 24                               # likewise, an arm of the training-free ones
    free_steps: int = 15
    settings: dict[str, Any] = field(default_factory=dict)             # of `sd.sample`

    def __post_init__(self) -> None:
        self.train_world = cache(lambda: World.make(self.sd, self.scenes, 0, self.work / "train.safetensors"))
        self.validation_world = cache(lambda: World.make(self.sd, self.validation, 1, self.work / "val.safetensors"))

    def path(self, name: str, ending: str, *depends: Any) -> Path:
        """A file in the work folder, named after what it is and all that it depends on."""
        digest = hashlib.sha256(repr((self.model, *depends)).encode()).hexdigest()[:12]
        return self.work / f"{name.replace(' ', '-')}-{digest}.{ending}"

    def training(self, name: str) -> tuple:
        """What the weights of a recipe depend on, beside seed and steps."""
        return self.steps, self.batch, self.scenes, RECIPES[name].lr

    def result_path(self, method: str, name: str, k: int) -> Path:
        if method == "search":
            return self.path(f"search {name} {k}", "json", self.free_n, self.free_steps, self.settings)
        arm = ARMS[name]
        depends = () if arm.recipe is None else self.training(arm.recipe)
        return self.path(f"{name} {k}", "json", arm, depends, self.validation, self.n, self.settings)

    def result(self, method: str, name: str, k: int) -> dict[str, Any]:
        """What `judge` or `search` gives for an arm, made if it isn't there."""
        path = self.result_path(method, name, k)
        if not path.exists():
            found = json.dumps(getattr(self, method)(name, k))
            with replacing(path) as part:
                part.write_text(found + "\n", encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def trained(self, name: str, seed: int, part: float = 1.0, factor: float = 1.0) -> nn.Module:
        """The weights of a recipe after a part of its steps. factor: on its rate."""
        recipe, module = RECIPES[name], RECIPES[name].make(self.sd.unet, seed)
        path = lambda what, ending: self.path(f"{name} {seed} {what}", ending, self.training(name), factor)
        goals = {p: max(1, round(self.steps * p)) for p in ((*PARTS, 1.0) if name == "working" else (1.0,))}
        wanted = path(goals[part], "safetensors")
        if not wanted.exists():
            run = Training(module, path("checkpoint", "pt"), recipe.lr * factor, seed=seed)
            model = TunedUNet(self.sd.unet, module) if isinstance(module, Tuned) else None
            for goal in goals.values():
                if not path(goal, "safetensors").exists():
                    batches = self.train_world().batches(self.batch, seed, run.step)
                    train_denoiser(self.sd, run, batches, goal, 50, model=model)
                    with replacing(path(goal, "safetensors")) as file:
                        save_file({key: p.detach().cpu() for key, p in module.state_dict().items()}, file)
            path("checkpoint", "pt").unlink()
        module.load_state_dict(load_file(wanted))
        return module.requires_grad_(False)

    def apply(self, arm: Arm, seed: int, factor: float = 1.0) -> tuple[StableDiffusion, Masks | None, int]:
        """The model and the masks of an arm, and how many weights were trained."""
        if arm.random:
            ratio = 1 - self.result("judge", "working", seed)["density"]
            return self.sd, Masks(RandomMasks(ratio), fresh=arm.fresh), 0
        sd, module = self.sd, None if arm.recipe is None else self.trained(arm.recipe, seed, arm.part, factor)
        if isinstance(module, Tuned):
            unet = UNet(sd.config.unet).to(sd.device).requires_grad_(False)
            unet.load_state_dict({**sd.unet.state_dict(), **module.weights(sd.unet)})
            return StableDiffusion(sd.config, sd.tokenizer, sd.text_encoders, unet, sd.vae), None, size(module)
        return (sd, None, 0) if module is None else (sd, Masks(module, arm.mode), size(module))

    def prompts(self, n: int) -> list[str]:
        """n of the benchmark's, n / 6 of each kind in turn, half of them of what training never showed."""
        rows, out = read_rows(BENCH), []
        for kind in shapes.KINDS:
            halves = [[row["prompt"] for row in rows if (row["kind"], row["seen"]) == (kind, seen)]
                      for seen in (True, False)]
            out += [prompt for pair in zip(*halves) for prompt in pair][:n // len(shapes.KINDS)]
        return out

    def judge(self, name: str, seed: int) -> dict[str, Any]:
        """All that is measured of an arm and training seed."""
        sd, masks, trained = self.apply(ARMS[name], seed)
        times, losses, density = self.losses(sd, masks, seed)
        verdicts, pictures = evaluate(sd, self.prompts(self.n), 30, 10_000 * (1 + seed), masks=masks, **self.settings)
        return {"trained": trained, "density": density, "times": times, "losses": losses,
                "right": "".join(str(int(v.ok)) for v in verdicts), "features": self.features(pictures),
                "differ": None if masks is None else self.differences(masks)}

    @torch.no_grad()
    def features(self, pictures: list[np.ndarray]) -> list[list[float]]:
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self.sd.device).float() / 255
        return [[round(f, 5) for f in row] for row in self.reward.image(images).tolist()]

    @torch.no_grad()
    def losses(self, sd: StableDiffusion, masks: Masks | None, seed: int) -> tuple[list[int], list[float], float]:
        """Time and loss of every validation picture, times and noises being the same for all arms; the density."""
        world, times, losses, densities = self.validation_world(), [], [], []
        for rows in torch.arange(self.validation).split(32):
            x, t, target, (context, added) = noised(
                sd, tuple(z[rows] for z in world.latents), [world.captions[k] for k in rows],
                [torch.Generator().manual_seed(mix(8, int(k))) for k in rows])
            run = None
            if masks is not None:
                run = MaskRun(masks, sd.unet, [mix(seed, 9, int(k)) for k in rows], halves=(0,)).at(0)
            error = sd.unet(x, t, context, added, masks=run) - target
            times += t.tolist()
            losses += error.square().mean(dim=(1, 2, 3)).tolist()
            densities += [1.0 if run is None else run.density] * len(rows)
        return times, losses, float(np.mean(densities))

    @torch.no_grad()
    def differences(self, masks: Masks, times: tuple[int, ...] = (100, 300, 500, 700, 900)) -> dict[str, float]:
        """Mean |m - m'| of masks that differ in one thing: the time, the picture with its caption, or the noise drawn.

        Likewise of their probabilities, where no noise hides what the network says.
        """
        sd, world, n = self.sd, self.validation_world(), len(times)
        alphas = sd.config.schedule.alphas().to(sd.device)
        z = sd.config.vae.scaling * world.latents[0][:n].float().to(sd.device)
        eps = draw_noise([torch.Generator().manual_seed(k) for k in range(n)], z)
        context, added = sd.conditions(world.captions[:n], None, sd.config.size, sd.config.size)

        def apart(masks: Masks, t: list[int], images: list[int], seeds: list[int]) -> float:
            t = torch.tensor(t, device=sd.device)
            a, run = alphas[t][:, None, None, None], Seen(masks, sd.unet, seeds, halves=(0,)).at(0)
            sd.unet(a.sqrt() * z[images] + (1 - a).sqrt() * eps[images], t, context[images],
                    None if added is None else added[images], masks=run)
            rows = torch.cat(run.seen, dim=1)                          # (n, all masked weights)
            return float(np.mean([(rows[i] - rows[j]).abs().mean().item() for i, j in combinations(range(n), 2)]))
        same, each, out = [0] * n, list(range(n)), {}
        for which, of in (("masks", masks), ("probabilities", replace(masks, mode="expected"))):
            out[f"{which}, times"] = np.mean([apart(of, list(times), [k] * n, same) for k in each[:3]])
            out[f"{which}, images"] = np.mean([apart(of, [t] * n, each, same) for t in times[::2]])
            out[f"{which}, draws"] = np.mean([apart(of, [t] * n, same, each) for t in times[::2]])
        return {name: float(value) for name, value in out.items()}

    def search(self, name: str, part: int) -> dict[str, Any]:
        """Verdicts, rewards and seconds of a training-free arm, of the part-th eight pictures."""
        prompts = self.prompts(self.free_n)[8 * part:8 * (part + 1)]
        settings, iterations = {**self.settings, "steps": self.free_steps}, iterations_of(name)
        draw, started = partial(FREE[name.split()[0]], self, settings=settings), time.perf_counter()
        images = self.sd.decode(draw(prompts, list(range(8 * part, 8 * part + len(prompts))), iterations))
        seconds = (time.perf_counter() - started) / len(prompts)
        modules = self.sd.unet, self.sd.vae, *self.sd.text_encoders, self.reward.image, self.reward.text
        meter = Meter()
        meter.ignore(*(p for module in modules for p in module.parameters()))
        with meter:                                                    # more iterations need no more memory than one
            draw(prompts[:1], [0], min(iterations, 1))
        with torch.no_grad():
            rewards = self.reward(images, prompts).tolist()
        right = [bool(shapes.judge(picture, prompt)) for picture, prompt in zip(to_bytes(images), prompts)]
        return {"right": "".join(str(int(ok)) for ok in right), "reward": rewards, "seconds": seconds,
                "GB": meter.peak / 1e9}


@dataclass
class Seen(MaskRun):
    """A `MaskRun` that keeps every mask it makes, (n, weights of the layer)."""
    seen: list[Tensor] = field(default_factory=list)

    def mask(self, *arguments: Any) -> Tensor | None:
        m = super().mask(*arguments)
        if m is not None:
            self.seen.append(m.expand(len(self.seeds), *m.shape[-2:]).flatten(1))
        return m


# ------------------------------------------------------------------------------------------------- without any training

def iterations_of(name: str) -> int:
    return int(name.split()[1]) if " " in name else 0


def plain(study: Study, prompts: list[str], seeds: list[int], iterations: int, settings: dict[str, Any]) -> Tensor:
    return study.sd.sample(prompts, seed=seeds, **settings)


def search_masks(study: Study, prompts: list[str], seeds: list[int], iterations: int,
                 settings: dict[str, Any]) -> Tensor:
    score = score_latents(study.sd.vae, study.reward, prompts)
    return study.sd.sample(prompts, seed=seeds, masks=MaskSearch(score, iterations), **settings)


def search_noise(study: Study, prompts: list[str], seeds: list[int], iterations: int, settings: dict[str, Any],
                 lr: float = 5.0, clip: float = 0.1, weight: float = 0.01) -> Tensor:
    """ReNO: gradient ascent of the reward by the initial noise, through all steps of the sampler; the best is kept.

    Nesterov's momentum, clipped gradients and the pull of the noise's norm to its likeliest value are ReNO's. An
    iteration is a pass and a gradient of every step, as an iteration of the masks' search at every step is; both need
    one more pass at the end.
    """
    sd, score = study.sd, score_latents(study.sd.vae, study.reward, prompts)
    side = sd.config.size // sd.config.vae.factor
    context, _ = sd.conditions(prompts, None, sd.config.size, sd.config.size)
    negative, _ = sd.conditions("", len(prompts), sd.config.size, sd.config.size)
    like = torch.empty(1, sd.config.unet.in_channels, side, side, device=sd.device)
    noise = draw_noise([torch.Generator().manual_seed(seed) for seed in seeds], like).requires_grad_()
    optimizer = torch.optim.SGD([noise], lr, momentum=0.9, nesterov=True)
    best, found = torch.full((len(prompts),), -math.inf, device=sd.device), noise.detach().clone()
    for k in range(iterations + 1):
        with torch.set_grad_enabled(k < iterations):
            *_, (_, x) = generate(sd.unet, noise, context, negative, prediction=sd.config.prediction,
                                  schedule=sd.config.schedule, **settings)
            reward, norm = score(x), noise.flatten(1).norm(dim=1)
        better = reward.detach() > best
        best, found = torch.where(better, reward.detach(), best), torch.where(better[:, None, None, None], x, found)
        found = found.detach()
        if k < iterations:
            likelihood = (like.numel() - 1) * norm.log() - norm.square() / 2
            optimizer.zero_grad()
            (-reward - weight * likelihood).sum().backward()
            length = noise.grad.flatten(1).norm(dim=1)[:, None, None, None]
            noise.grad *= (clip / length).clamp(max=1)
            optimizer.step()
    return found


FREE = {"base": plain, "masks": search_masks, "noise": search_noise}   # "masks 0" are random ones: 6.6 % dropped


# -------------------------------------------------------------------------------------------------------------- numbers

def interval(values: np.ndarray, draws: int = 2000) -> list[float]:
    """Mean and 95 % interval of numbers (seeds, kinds, prompts), by the bootstrap over seeds, and prompts of a kind."""
    rng, (s, k, p) = np.random.default_rng(0), values.shape
    rows, columns = rng.integers(s, size=(draws, s, 1, 1)), rng.integers(p, size=(draws, 1, k, p))
    means = values[rows, np.arange(k)[:, None], columns].mean(axis=(1, 2, 3))
    return [float(values.mean()), *np.percentile(means, (2.5, 97.5)).tolist()]


def verdicts(results: list[dict[str, Any]]) -> np.ndarray:
    """(seeds, kinds, prompts)"""
    return np.array([[int(c) for c in result["right"]] for result in results], float).reshape(
        len(results), len(shapes.KINDS), -1)


def summarize(found: dict[str, list[dict[str, Any]]], real: np.ndarray | None) -> dict[str, Any]:
    """An arm's numbers; those over base are paired: the same prompts and noises, the same pictures and times."""
    table, base = {}, found["base"]
    for name, results in found.items():
        right, plain = verdicts(results), verdicts(base)
        loss, plain_loss = (np.array([r["losses"] for r in of])[:, None] for of in (results, base))
        bucket = np.array(base[0]["times"]) * BUCKETS // 1000
        own = np.concatenate([r["features"] for r in results])
        table[name] = {
            "trained": results[0]["trained"], "density": [r["density"] for r in results], "n": right.size,
            "score": interval(right), "over base": interval(right - plain),
            "kinds": {kind: interval(right[:, k:k + 1]) for k, kind in enumerate(shapes.KINDS)},
            "loss": interval(loss), "loss over base": interval(loss - plain_loss),
            "loss by time": [None if not (bucket == b).any() else
                             float(plain_loss[..., bucket == b].mean()) if name == "base" else
                             interval((loss - plain_loss)[..., bucket == b]) for b in range(BUCKETS)],
            "differ": None if results[0]["differ"] is None else {
                what: float(np.mean([r["differ"][what] for r in results])) for what in results[0]["differ"]},
            "Frechet": None if real is None or len(own) <= own.shape[1] else frechet_distance(own, real)}
    return table


def summarize_free(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    joined = {name: {"right": "".join(part["right"] for part in parts)} for name, parts in found.items()}
    rewards = {name: np.concatenate([part["reward"] for part in parts])[None, None] for name, parts in found.items()}
    return {name: {"score": interval(verdicts([joined[name]])), "n": len(joined[name]["right"]),
                   "over base": interval(verdicts([joined[name]]) - verdicts([joined["base"]])),
                   "reward": interval(rewards[name]), "reward over base": interval(rewards[name] - rewards["base"]),
                   "seconds": float(np.mean([part["seconds"] for part in parts])), "GB": parts[0]["GB"]}
            for name, parts in found.items()}


def show(x: list[float], digits: int = 3, sign: str = "") -> str:
    return f"{x[0]:{sign}.{digits}f} ({x[1]:{sign}.{digits}f} to {x[2]:{sign}.{digits}f})"


def markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]) + "\n"


def tables(trained: dict[str, Any], free: dict[str, Any]) -> str:
    """Everything in Markdown."""
    scores = [["arm", "trained", "density", "score", "over base", *shapes.KINDS, "Frechet", "loss", "over base, 1e-3"]]
    times = [["arm", *(f"t < {1000 * (b + 1) // BUCKETS}" for b in range(BUCKETS))]]
    differ = []
    for name, x in trained.items():
        scores.append([name, str(x["trained"]), f"{np.mean(x['density']):.4f}", show(x["score"]),
                       show(x["over base"], sign="+"), *(f"{kind[0]:.2f}" for kind in x["kinds"].values()),
                       "" if x["Frechet"] is None else f"{x['Frechet']:.2f}", f"{x['loss'][0]:.5f}",
                       show([1000 * y for y in x["loss over base"]], sign="+")])
        times.append([name, *("" if y is None else f"{y:.5f}" if name == "base" else
                              show([1000 * z for z in y], sign="+")
                              for y in x["loss by time"])])
        if x["differ"] is not None:
            differ = differ or [["arm", *x["differ"]]]
            differ.append([name, *(f"{y:.5f}" for y in x["differ"].values())])
    searches = [["arm", "score", "over base", "reward", "over base", "s a picture", "GB, one picture", "n"]]
    searches += [[name, show(x["score"]), show(x["over base"], sign="+"), show(x["reward"]),
                  show(x["reward over base"], sign="+"), f"{x['seconds']:.1f}", f"{x['GB']:.3f}", str(x["n"])]
                 for name, x in free.items()]
    n = next((x["n"] for x in trained.values()), 0)
    parts = [(f"Score, n = {n} pictures an arm, over all seeds", scores),
             ("Loss by time: base, and differences from it in thousandths", times),
             ("How much masks differ, mean |m - m'|", differ), ("Without training", searches)]
    return "\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in parts if len(rows) > 1)


def draw_curve(table: dict[str, Any], steps: int, path: Path) -> None:
    """The paper's figure 9b: score, loss and density of the working arm over its training."""
    points = [(0.0, "base"), *((part, f"working at {part:.3g}") for part in PARTS), (1.0, "working")]
    points = [(part * steps, table[name]) for part, name in points if name in table]
    figure, axes = pyplot().subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, what, label in ((axes[0], "over base", "score over base"), (axes[1], "loss over base", "loss over base")):
        values = np.array([x[what] for _, x in points])
        axis.errorbar([step for step, _ in points], values[:, 0], np.abs(values[:, 1:] - values[:, :1]).T, marker="o",
                      capsize=3)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_ylabel(f"{label}, 95 % paired interval")
    axes[2].plot([step for step, _ in points], [np.mean(x["density"]) for _, x in points], "o-", color="C1")
    axes[2].set_ylabel("part of the masked weights that is kept")
    for axis in axes:
        axis.set_xlabel("training steps")
    save(figure, "Learned masks over their training", path)


# --------------------------------------------------------------------------------------------------------- command line

def share(jobs: list[tuple[float, Any]], rank: int, world: int) -> list[Any]:
    """This process's jobs (cost, job): the dearest first, each to whoever has least so far."""
    loads, mine = [0.0] * world, []
    for cost, job in sorted(jobs, key=lambda job: -job[0]):
        who = loads.index(min(loads))
        loads[who] += cost
        mine += [job] if who == rank else []
    return mine


def plan_jobs(study: Study, arms: list[str], free: list[str], seeds: int) -> list[tuple[float, list[tuple]]]:
    """Results to make, those of one training together, and what they cost, in about one row through the U-Net."""
    jobs: dict[Any, list[tuple]] = {}
    for seed in range(seeds):
        for name in sorted(arms, key=lambda name: ARMS[name].random):  # random ones after what sets their density
            jobs.setdefault((ARMS[name].recipe, seed), []).append(("judge", name, seed))
    costs = [(3 * study.steps * study.batch + 4 * study.n * study.settings["steps"] * len(of), of)
             for of in jobs.values()]
    return costs + [(8 * study.free_steps * (2 + 8 * iterations_of(name)), [("search", name, part)])
                    for name in free for part in range(math.ceil(study.free_n / 8))]


def sweep(study: Study) -> None:
    """Prints by how much every recipe lowers the validation loss at a third of its rate, at its rate, and at three."""
    base = np.array(study.losses(study.sd, None, 0)[1])
    for name, recipe in RECIPES.items():
        for factor in (1 / 3, 1.0, 3.0):
            sd, masks, _ = study.apply(Arm(name), 1000, factor)        # a seed that no arm is judged with
            _, losses, density = study.losses(sd, masks, 1000)
            difference = interval(1000 * (np.array(losses) - base)[None, None])
            print(f"{name:18s} lr {recipe.lr * factor:.1e}  loss over base, 1e-3: {show(difference, sign='+')}  "
                  f"density {density:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learned masks, what else could be learned, and searches, on the tiny "
                                     "model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="model folder of the drawn world")
    parser.add_argument("--out", type=Path, default=Path("out/maskunet"), help="folder for tables, figures and work")
    parser.add_argument("--arms", help="some of them, separated by commas (default: all)")
    parser.add_argument("--iterations", type=int, nargs="+", default=[5, 15, 30], help="of the searches for masks")
    parser.add_argument("--noise-iterations", type=int, nargs="+", default=[15], help="of the search for noise")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every recipe")
    parser.add_argument("--steps", type=int, default=300, help="of every training")
    parser.add_argument("--batch", type=int, default=32, help="pictures a training step")
    parser.add_argument("--scenes", type=int, default=4000, help="to train on")
    parser.add_argument("--validation", type=int, default=512, help="pictures behind a loss")
    parser.add_argument("--pictures", type=int, default=90, help="pictures an arm and seed, a multiple of 6")
    parser.add_argument("--free-pictures", type=int, default=24, help="likewise, a training-free arm; 0: none")
    parser.add_argument("--free-steps", type=int, default=15, help="of a training-free picture, as in the paper")
    parser.add_argument("--sample-steps", type=int, default=20, help="of the other pictures")
    parser.add_argument("--sampler", default="ddim", help=", ".join(SAMPLERS))
    parser.add_argument("--cfg-scale", type=float, default=5.0, help="guidance")
    parser.add_argument("--drawn", type=int, default=2000, help="ground truths for the Frechet distance; 0: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweep", action="store_true", help="instead: each recipe's loss at three rates")
    args = parser.parse_args()
    for flag, ok, legal in (
            ("--seeds, --steps, --batch and --scenes", min(args.seeds, args.steps, args.batch, args.scenes) >= 1,
             "1 or more"),
            ("--validation", args.validation >= 5, "5 or more"),
            ("--pictures", 6 <= args.pictures <= 480 and args.pictures % 6 == 0, "6, 12, ... up to 480"),
            ("--free-pictures", 0 <= args.free_pictures <= 480 and args.free_pictures % 6 == 0,
             "0, 6, 12, ... up to 480"),
            ("--sampler", args.sampler != "euler-a", "one that draws no noise at its steps"),
            ("--iterations and --noise-iterations", min(args.iterations + args.noise_iterations) >= 1, "1 or more"),
            ("--drawn", args.drawn == 0 or args.drawn >= 100, "0, or 100 or more")):
        if not ok:
            raise InputError(f"{flag} must be {legal}")
    try:
        for steps in (args.sample_steps, args.free_steps):
            plan(args.sampler, steps)
    except ValueError as error:
        raise InputError(str(error)) from None
    free = ["base", "masks 0", *(f"masks {k}" for k in args.iterations), *(f"noise {k}" for k in args.noise_iterations)]
    known = [*ARMS, *free]
    wanted = known if args.arms is None else [name.strip() for name in args.arms.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"there is no arm {unknown[0]!r}; there are {', '.join(known)}")
    if read_config(args.model).family != "tiny":
        raise InputError(f"{args.model} wasn't trained on the drawn world, so its pictures can't be judged")
    try:
        (args.out / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {args.out} ({error.strerror}); choose another --out") from None
    torch.set_flush_denormal(True)
    study = Study(StableDiffusion.load(args.model, args.device), load_reward(args.model / "clip", args.device),
                  args.out / "work", fingerprint(args.model), args.steps, args.batch, args.scenes, args.validation,
                  args.pictures, args.free_pictures, args.free_steps,
                  dict(steps=args.sample_steps, sampler=args.sampler, cfg_scale=args.cfg_scale))
    if args.sweep:
        return sweep(study)
    arms = [name for name in ARMS if name in wanted or name == "base"]
    free = [name for name in free if args.free_pictures and (name in wanted or name == "base")]
    jobs = plan_jobs(study, arms, free, args.seeds)
    mine = [call for calls in share(jobs, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
            for call in calls]
    with tqdm(mine, desc="study", unit="result") as bar:
        for call in bar:
            bar.set_postfix_str(f"{call[1]}, {call[2]}")
            study.result(*call)
    if missing := [call for _, calls in jobs for call in calls if not study.result_path(*call).exists()]:
        return print(f"{len(missing)} results are still to come from other processes; the last one writes the tables")
    write(study, arms, free, args.seeds, args.drawn, args.out)


def write(study: Study, arms: list[str], free: list[str], seeds: int, drawn: int, out: Path) -> None:
    """maskunet.json, maskunet.md and the figures, from results that are all there."""
    real = drawn_features(study.reward.image, drawn, study.sd.config.size, study.sd.config.size, 1) if drawn else None
    trained = summarize({name: [study.result("judge", name, seed) for seed in range(seeds)] for name in arms}, real)
    parts = range(math.ceil(study.free_n / 8))
    searched = summarize_free({name: [study.result("search", name, part) for part in parts] for name in free})
    made_with = {name: getattr(study, name) for name in ("model", "steps", "batch", "scenes", "validation", "n",
                                                         "free_n", "free_steps", "settings")}
    text = tables(trained, searched)
    for name, content in (("maskunet.json", json.dumps({"made with": {**made_with, "seeds": seeds, "drawn": drawn},
                                                        "trained": trained, "searched": searched}, indent=1) + "\n"),
                          ("maskunet.md", text)):
        with replacing(out / name) as part:
            part.write_text(content, encoding="utf-8")
    draw_curve(trained, study.steps, out / "training.png")
    print(text)


if __name__ == "__main__":
    run_command(main)
