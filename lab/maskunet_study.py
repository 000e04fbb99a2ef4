"""MaskUNet's tables in miniature: what learned masks do to the tiny model, compared with other ways to train it.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m lab.maskunet_study     # everything; the processes share the work
    python -m lab.maskunet_study --arms "base,working,masks 15" --seeds 1   # some of it, into the same folder

Start at `RECIPES`, what is trained, and `ARMS`, what is judged. All trainings get the same latents, captions, times and
noises; all arms draw the same prompts from the same noise. Tables are in maskunet.md, all numbers in maskunet.json;
training.png shows score and density over the training. The training-free arms (`FREE`) maximise the reward of the
model's CLIP; the strict score judges them too. Weights and verdicts are kept in OUT/work, in folders named after
the model and all settings, so that nothing is done twice and a stopped run resumes.
Sources: MaskUNet, arXiv 2505.03097; LoRA, arXiv 2106.09685; noise optimisation, ReNO, arXiv 2406.04312.
"""
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from command import check_flags, replacing, run_command
from lab import shapes
from lab import study as lab_study
from lab.evaluate import BENCH, draw, drawn_features, frechet_distance, judged, read_rows, to_bytes
from lab.study import Arm, Estimate, Row, bootstrap, line, markdown
from lab.train_tiny import world_latents
from maskunet import DynamicMasks, MaskRun, Masks, MaskSearch, RandomMasks, Search, StaticMasks, key, masked_layers, mix
from memory import Meter
from reward import load_reward
from sampler import draw_noise, generate, plan
from stable_diffusion import StableDiffusion
from train import BUCKETS, Training, noised, train_denoiser
from unet import Techniques, UNet, Weights

# ------------------------------------------------------------------------------------------------------ what is trained

class LoRA(nn.Module):
    """The weights W + 2 B A of the layers that masks act on. It takes the masks' place in `sample` and in the U-Net.

    At first, A is random and B is 0. The factor 2 is that of MaskUNet's LoRA baseline (rank 256, alpha 512).
    """

    def __init__(self, unet: UNet, rank: int, seed: int = 0):
        super().__init__()
        generator, self.names, self.a, self.b = torch.Generator().manual_seed(seed), {}, {}, {}
        for name, layer in masked_layers(unet).items():
            self.names[layer] = name = key(name)
            self.a[name] = torch.randn(rank, layer.in_features, generator=generator) / rank
            self.b[name] = torch.zeros(layer.out_features, rank)
        self.a, self.b = nn.ParameterDict(self.a), nn.ParameterDict(self.b)
        self.to(unet.conv_in.weight.device)

    def start(self, run: Any) -> "LoRA":
        return self

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "LoRA":
        return self

    def search(self, i: int, x: Tensor, clean: Callable[[Tensor, int], Tensor]) -> None:
        """Nothing is searched for."""

    def enter(self, unit: int, h: Tensor, skip: Tensor, emb: Tensor) -> None:
        """Nothing depends on the maps."""

    def of(self, layer: nn.Linear) -> Tensor:
        name = self.names.get(layer)
        return layer.weight if name is None else layer.weight + 2 * self.b[name] @ self.a[name]


class Unmasked(nn.Module):
    """Takes the place of `MaskedUNet` in `train_denoiser`: another U-Net, or this one with a LoRA. Its density is 1."""

    def __init__(self, unet: UNet, module: UNet | LoRA):
        super().__init__()
        self.unet, self.lora = (module, None) if isinstance(module, UNet) else (unet, module)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, added: Tensor | None, seeds: list[int],
                step: int) -> tuple[Tensor, Tensor]:
        return self.unet(x, t, context, added, Techniques(masks=self.lora)), torch.ones(())


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def matched_rank(unet: UNet) -> int:
    """The rank at which LoRA has as many weights as the network that makes masks."""
    return round(size(DynamicMasks(unet)) / size(LoRA(unet, 1)))


class Recipe(NamedTuple):
    """make(unet, seed): a module to train. lr: constant, the best of three by `--sweep`. text: what it is."""
    make: Callable[[UNet, int], nn.Module]
    lr: float
    text: str


def dynamic(unet: UNet, seed: int, **settings) -> DynamicMasks:
    return DynamicMasks(unet, seed=seed, **settings)


RECIPES = {
    "full fine-tuning": Recipe(lambda unet, seed: deepcopy(unet).requires_grad_(), 1e-5, "all weights of the U-Net"),
    "LoRA": Recipe(lambda unet, seed: LoRA(unet, matched_rank(unet), seed), 3e-4, "LoRA of as many weights as masks"),
    "working": Recipe(dynamic, 3e-4, "masks, with an init that lets gradients through"),
    "without time": Recipe(partial(dynamic, time=False), 3e-4, "the same without the time"),
    "without sample": Recipe(partial(dynamic, sample=False), 3e-4, "the same without the picture"),
    "official": Recipe(partial(dynamic, init="official"), 3e-4, "masks, with the released code's init"),
    "static": Recipe(lambda unet, seed: StaticMasks(unet, initial=5.0), 9e-2,      # at lower rates all masks stay 1
                     "logits alone, the same masks for all inputs"),
}
PARTS = (0.125, 0.25, 0.5)                         # of the steps, after which the working arm is judged as well


class Use(NamedTuple):
    """What an arm uses: the weights of a recipe after a part of its steps; random masks; or the plain model."""
    recipe: str | None = None
    mode: str = "sample"
    part: float = 1.0
    random: bool = False                           # with the density of the working arm of the same seed
    fixed: bool = False


ARMS = {arm.name: arm for arm in (
    Arm("base", "the plain model", Use()),
    *(Arm(name, recipe.text, Use(name), primary=name == "working") for name, recipe in RECIPES.items()),
    Arm("working threshold", "working masks, noise-free", Use("working", "threshold")),
    Arm("working expected", "the expectation of working masks", Use("working", "expected")),
    Arm("random fresh", "random masks, new at every step", Use("working", random=True)),
    Arm("random fixed", "random masks, the same at all steps", Use("working", random=True, fixed=True)),
    *(Arm(f"working at {part:.3g}", f"working masks after {part:.3g} of the training", Use("working", part=part))
      for part in PARTS))}


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


NUMBERS = {"seeds": (3, "trainings per recipe"), "steps": (300, "optimiser steps per training"),
           "batch": (32, "pictures per training step"),
           "scenes": (4000, "to train on"), "validation": (512, "pictures per loss"),
           "pictures": (90, "pictures per arm and seed, a multiple of 6"),
           "free_pictures": (24, "likewise, per training-free arm; 0: none"),
           "free_steps": (15, "denoising steps of a training-free picture, as in the paper"),
           "sample_steps": (20, "denoising steps of the other pictures"),
           "drawn": (2000, "ground truths for the Frechet distance; 0: none")}


@dataclass
class Study:
    """A study's model, data and settings. Its methods return results from files, and make those that are missing."""
    sd: StableDiffusion
    work: Path
    model: str                                     # what makes results its own: weights, versions
    settings: Row                                  # sampler, steps and cfg_scale of `sd.sample`
    of: dict[str, int]                             # by the names of `NUMBERS`

    def __post_init__(self) -> None:
        self.score = self.sd.latent_score(("clip",))
        self.image_tower = load_reward(self.sd.folder / "clip", self.sd.device).image
        training = self.model, *(self.of[name] for name in ("steps", "batch", "scenes")), [
            recipe.lr for recipe in RECIPES.values()]
        judging = self.model, self.of | {"seeds": 0, "drawn": 0}, self.settings         # these make no result another
        self.weights, self.results = (self.work / f"{what}-{hashlib.sha256(repr(on).encode()).hexdigest()[:12]}"
                                      for what, on in (("weights", training), ("results", (training, judging))))
        for folder in (self.weights, self.results):
            folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def train_world(self) -> World:
        return World.make(self.sd, self.of["scenes"], 0, self.work / "train.safetensors")

    @cached_property
    def validation_world(self) -> World:
        return World.make(self.sd, self.of["validation"], 1, self.work / "val.safetensors")

    def path(self, name: str, seed: int) -> Path:
        return self.results / f"{name} {seed}.json"

    def result(self, name: str, seed: int) -> Row:
        """What `judge` gives for an arm, made if it isn't there."""
        path = self.path(name, seed)
        if not path.exists():
            lab_study.write_text(path, json.dumps(self.judge(name, seed)) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))

    def trained(self, name: str, seed: int, part: float = 1.0, factor: float = 1.0) -> nn.Module:
        """The weights of a recipe after a part of its steps. factor: on its rate."""
        recipe, module = RECIPES[name], RECIPES[name].make(self.sd.unet, seed)
        path = lambda what: self.weights / f"{name} {seed} {factor:.3g} {what}"
        goals = {p: max(1, round(self.of["steps"] * p)) for p in ((*PARTS, 1.0) if name == "working" else (1.0,))}
        wanted = path(f"{goals[part]}.safetensors")
        if not wanted.exists():
            run = Training(module, path("checkpoint.pt"), recipe.lr * factor, seed=seed)
            model = Unmasked(self.sd.unet, module) if isinstance(module, UNet | LoRA) else None
            for goal in goals.values():
                if not path(f"{goal}.safetensors").exists():
                    batches = self.train_world.batches(self.of["batch"], seed, run.step)
                    train_denoiser(self.sd, run, batches, goal, 50, model=model)
                    with replacing(path(f"{goal}.safetensors")) as file:
                        save_file({key: p.detach().cpu() for key, p in module.state_dict().items()}, file)
            path("checkpoint.pt").unlink()
        module.load_state_dict(load_file(wanted))
        return module.requires_grad_(False)

    def apply(self, use: Use, seed: int, factor: float = 1.0) -> tuple[StableDiffusion, Masks | LoRA | None, int]:
        """The model, what stands in the masks' place, and how many weights were trained, of an arm."""
        if use.random:
            ratio = 1 - self.result("working", seed)["density"]
            return self.sd, Masks(RandomMasks(ratio), fixed=use.fixed), 0
        if use.recipe is None:
            return self.sd, None, 0
        sd, module = self.sd, self.trained(use.recipe, seed, use.part, factor)
        if isinstance(module, UNet):
            return StableDiffusion(sd.config, sd.tokenizer, sd.text_encoders, module, sd.vae), None, size(module)
        return sd, module if isinstance(module, LoRA) else Masks(module, use.mode), size(module)

    def prompts(self, n: int) -> list[str]:
        """n of the benchmark's, n / 6 of each kind in turn, half of them of what training never showed."""
        rows, out = read_rows(BENCH), []
        for kind in shapes.KINDS:
            halves = [[row["prompt"] for row in rows if (row["kind"], row["seen"]) == (kind, seen)]
                      for seen in (True, False)]
            out += [prompt for pair in zip(*halves) for prompt in pair][:n // len(shapes.KINDS)]
        return out

    @torch.no_grad()
    def judge(self, name: str, seed: int) -> Row:
        """All that is measured of an arm and training seed."""
        with torch.enable_grad():
            sd, masks, trained = self.apply(ARMS[name].settings, seed)
        times, losses, density = self.losses(sd, masks, seed)
        prompts = self.prompts(self.of["pictures"])
        pictures = draw(sd, prompts, 30, 10_000 * (1 + seed), self.settings | {"masks": masks})
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self.sd.device).float() / 255
        return {"trained": trained, "density": density, "times": times, "losses": losses,
                "right": [judged(*pair)["strict"] for pair in zip(pictures, prompts)],
                "features": [[round(f, 5) for f in row] for row in self.image_tower(images).tolist()],
                "differ": self.differences(masks) if isinstance(masks, Masks) else None}

    @torch.no_grad()
    def losses(self, sd: StableDiffusion, masks: Masks | LoRA | None,
               seed: int) -> tuple[list[int], list[float], float]:
        """Time and loss of every validation picture, times and noises being the same for all arms; the density."""
        world, times, losses, densities = self.validation_world, [], [], []
        for rows in torch.arange(self.of["validation"]).split(32):
            x, t, target, (context, added, _) = noised(
                sd, tuple(z[rows] for z in world.latents), [world.captions[k] for k in rows],
                [torch.Generator().manual_seed(mix(8, int(k))) for k in rows])
            on = acting(masks, sd.unet, [mix(seed, 9, int(k)) for k in rows])
            error = sd.unet(x, t, context, added, Techniques(masks=on)) - target
            times += t.tolist()
            losses += error.square().mean(dim=(1, 2, 3)).tolist()
            densities += [on.run.density if isinstance(masks, Masks) else 1.0] * len(rows)
        return times, losses, float(np.mean(densities))

    @torch.no_grad()
    def differences(self, masks: Masks, times: tuple[int, ...] = (100, 300, 500, 700, 900)) -> dict[str, float]:
        """Mean |m - m'| of masks that differ in one thing: the time, the picture with its caption, or the noise drawn.

        The same for the probabilities of the masks, which have no noise.
        """
        sd, world, n = self.sd, self.validation_world, len(times)
        alphas = sd.config.schedule.alphas().to(sd.device)
        z = sd.config.vae.scaling * world.latents[0][:n].float().to(sd.device)
        eps = draw_noise([torch.Generator().manual_seed(k) for k in range(n)], z)
        context, added, _ = sd.conditions(world.captions[:n], None, sd.config.size, sd.config.size)

        def apart(masks: Masks, t: list[int], images: list[int], seeds: list[int]) -> float:
            t = torch.tensor(t, device=sd.device)
            a, seen = alphas[t][:, None, None, None], Seen(acting(masks, sd.unet, seeds))
            sd.unet(a.sqrt() * z[images] + (1 - a).sqrt() * eps[images], t, context[images],
                    None if added is None else added[images], Techniques(masks=seen))
            rows = torch.cat(seen.masks, dim=1)                        # (n, all masked weights)
            return float(np.mean([(rows[i] - rows[j]).abs().mean().item() for i, j in combinations(range(n), 2)]))
        same, each, out = [0] * n, list(range(n)), {}
        for which, of in (("masks", masks), ("probabilities", replace(masks, mode="expected"))):
            out[f"{which}, times"] = np.mean([apart(of, list(times), [k] * n, same) for k in each[:3]])
            out[f"{which}, images"] = np.mean([apart(of, [t] * n, each, same) for t in times[::2]])
            out[f"{which}, draws"] = np.mean([apart(of, [t] * n, same, each) for t in times[::2]])
        return {name: float(value) for name, value in out.items()}

    def search(self, name: str, rank: int, world: int) -> list[Row]:
        """A row per picture of a training-free arm; none while other processes are at work."""
        prompts, (kind, iterations) = self.prompts(self.of["free_pictures"]), free_settings(name)
        find = partial(FREE[kind], self, settings=self.settings | {"steps": self.of["free_steps"]})

        def make(numbers: list[int]) -> list[Row]:
            started, words = time.perf_counter(), [prompts[k] for k in numbers]
            latents = find(words, numbers, iterations)
            pictures, seconds = to_bytes(self.sd.decode(latents)), (time.perf_counter() - started) / len(words)
            with torch.no_grad():
                rewards = self.score(latents, words).tolist()
            meter = Meter()
            meter.ignore(*(x for x in gc.get_objects() if issubclass(type(x), Tensor)))  # what is there already
            with meter:                                                # more iterations need no more memory than one
                find(words[:1], numbers[:1], min(iterations, 1))
            return [{"k": k, "right": judged(picture, prompts[k])["strict"], "reward": reward, "seconds": seconds,
                     "GB": meter.peak / 1e9} for k, picture, reward in zip(numbers, pictures, rewards)]
        return lab_study.make_rows(self.results / f"search {name}", {}, len(prompts), 8, make, rank, world)


def acting(masks: Masks | LoRA | None, unet: UNet, seeds: list[int]) -> Weights | None:
    """What stands in the masks' place in one pass without guidance, for images with these seeds."""
    return MaskRun(masks, unet, seeds).at((0,), (0,)) if isinstance(masks, Masks) else masks


@dataclass
class Seen:
    """Takes the place of a `MaskPass`, and keeps every mask that it makes, (n, weights of the layer)."""
    inner: Any
    masks: list[Tensor] = field(default_factory=list)

    def enter(self, unit: int, h: Tensor, skip: Tensor, emb: Tensor) -> None:
        self.inner.enter(unit, h, skip, emb)

    def of(self, layer: nn.Linear) -> Tensor:
        weight = self.inner.of(layer)
        if weight is not layer.weight:
            mask = (weight / layer.weight).nan_to_num(1.0)             # for a weight that is 0, no mask matters
            self.masks.append(mask.expand(len(self.inner.index), -1, -1).flatten(1))
        return weight


# ------------------------------------------------------------------------------------------------- without any training

def free_settings(name: str) -> tuple[str, int]:
    """What a training-free arm searches for, and in how many iterations: "masks 15"."""
    kind, _, iterations = name.partition(" ")
    return kind, int(iterations or 0)


def free_arms(names: Iterable[str]) -> list[Arm]:
    """"masks 0" are random masks that drop 6.6 % of the weights."""
    return [Arm(name, f"{name} iterations", name, primary=name == f"masks {MaskSearch.iterations}") for name in names]


def plain(study: Study, prompts: list[str], seeds: list[int], iterations: int, settings: Row) -> Tensor:
    return study.sd.sample(prompts, seed=seeds, **settings)


def search_masks(study: Study, prompts: list[str], seeds: list[int], iterations: int, settings: Row) -> Tensor:
    search = Search(MaskSearch(iterations=iterations), study.score)
    return study.sd.sample(prompts, seed=seeds, masks=search, **settings)


def search_noise(study: Study, prompts: list[str], seeds: list[int], iterations: int, settings: Row,
                 lr: float = 5.0, clip: float = 0.1, weight: float = 0.01) -> Tensor:
    """ReNO: gradient ascent of the reward by the initial noise, through all steps of the sampler; the best is kept.

    As in ReNO, with Nesterov's momentum, clipped gradients, and a term that pulls the noise's norm to its likeliest
    value. An iteration costs a forward and a backward pass per step, as much as one iteration per step of the search
    for masks; both need one more forward pass at the end.
    """
    sd, side = study.sd, study.sd.config.size
    said, negative = sd.conditions(prompts, None, side, side), sd.conditions("", len(prompts), side, side)
    calls = plan(settings["sampler"], settings["steps"], sd.config.schedule, prediction=sd.config.prediction)
    like = torch.empty(1, sd.config.unet.in_channels, *2 * [side // sd.config.vae.factor], device=sd.device)
    noise = draw_noise([torch.Generator().manual_seed(seed) for seed in seeds], like).requires_grad_()
    optimizer = torch.optim.SGD([noise], lr, momentum=0.9, nesterov=True)
    best, found = torch.full((len(prompts),), -math.inf, device=sd.device), noise.detach().clone()
    for k in range(iterations + 1):
        with torch.set_grad_enabled(k < iterations):
            *_, (_, x) = generate(sd.unet, noise, said, negative, calls, settings["cfg_scale"])
            reward, norm = study.score(x, prompts), noise.flatten(1).norm(dim=1)
        better = reward.detach() > best
        best, found = torch.where(better, reward, best).detach(), torch.where(better[:, None, None, None], x, found)
        found = found.detach()
        if k < iterations:
            likelihood = (like.numel() - 1) * norm.log() - norm.square() / 2
            optimizer.zero_grad()
            (-reward - weight * likelihood).sum().backward()
            length = noise.grad.flatten(1).norm(dim=1)[:, None, None, None]
            noise.grad *= (clip / length).clamp(max=1)
            optimizer.step()
    return found


FREE = {"base": plain, "masks": search_masks, "noise": search_noise}


# -------------------------------------------------------------------------------------------------------------- numbers

def mean(values: Any) -> Estimate:
    return bootstrap(values)["overall"]


def kinds_of(n: int) -> list[str]:
    return [kind for kind in shapes.KINDS for _ in range(n // len(shapes.KINDS))]


def summarize(found: dict[str, list[Row]], prompts: list[str], real: np.ndarray | None) -> dict[str, Row]:
    """Each arm's numbers; those over base are paired: the same prompts and noises, the same pictures and times."""
    kinds = kinds_of(len(prompts))                                     # right: (trainings, pictures)
    right = {name: np.array([result["right"] for result in results], float) for name, results in found.items()}
    table = lab_study.compare([ARMS[name] for name in found], right, prompts, kinds)
    bucket = np.array(found["base"][0]["times"]) * BUCKETS // 1000
    plain = np.array([result["losses"] for result in found["base"]])
    for name, results in found.items():
        lead = np.array([result["losses"] for result in results]) - plain
        own, differ = np.concatenate([result["features"] for result in results]), results[0]["differ"]
        by_time = [plain[:, bucket == b].mean() if name == "base" else mean(lead[:, bucket == b])
                   for b in range(BUCKETS) if (bucket == b).any()]
        times = iter(by_time)
        table[name] |= {
            "trained": results[0]["trained"], "density": [result["density"] for result in results],
            "kinds": {kind: x for kind, x in bootstrap(right[name], prompts, kinds).items() if kind != "overall"},
            "loss": mean(lead + plain), "loss over base": mean(lead),
            "loss by time": [next(times) if (bucket == b).any() else None for b in range(BUCKETS)],
            "differ": differ and {what: float(np.mean([result["differ"][what] for result in results]))
                                  for what in differ},
            "Frechet": None if real is None or len(own) <= own.shape[1] else frechet_distance(own, real)}
    return table


def summarize_free(found: dict[str, list[Row]], prompts: list[str]) -> dict[str, Row]:
    """Likewise, of the arms without training."""
    right, rewards = ({name: np.array([row[of] for row in rows], float) for name, rows in found.items()}
                      for of in ("right", "reward"))
    table = lab_study.compare(free_arms(found), right, prompts, kinds_of(len(prompts)))
    for name, rows in found.items():
        table[name] |= {"reward": mean(rewards[name]), "reward over base": mean(rewards[name] - rewards["base"]),
                        "seconds": float(np.mean([row["seconds"] for row in rows])), "GB": rows[0]["GB"]}
    return table


def thousandths(x: Estimate) -> str:
    return f"{replace(x, mean=1000 * x.mean, low=1000 * x.low, high=1000 * x.high):+.3f}"


def tables(trained: dict[str, Row], free: dict[str, Row]) -> str:
    """Everything in Markdown."""
    scores = [["arm", "trained", "density", "score", *lab_study.LEAD, *shapes.KINDS, "Frechet", "loss",
               "loss over base, 1e-3"]]
    times = [["arm", *(f"t < {1000 * (b + 1) // BUCKETS}" for b in range(BUCKETS))]]
    differ = []
    for name, x in trained.items():
        scores.append([name, str(x["trained"]), f"{np.mean(x['density']):.4f}", f"{x['score']:.3f}",
                       *lab_study.lead_cells(x), *(f"{kind.mean:.2f}" for kind in x["kinds"].values()),
                       "" if x["Frechet"] is None else f"{x['Frechet']:.2f}", f"{x['loss'].mean:.5f}",
                       thousandths(x["loss over base"])])
        times.append([name, *("" if y is None else thousandths(y) if isinstance(y, Estimate) else f"{y:.5f}"
                              for y in x["loss by time"])])
        if x["differ"] is not None:
            differ = differ or [["arm", *x["differ"]]]
            differ.append([name, *(f"{y:.5f}" for y in x["differ"].values())])
    searches = [["arm", "score", *lab_study.LEAD, "reward", "over base", "seconds per picture", "GB, one picture", "n"]]
    searches += [[name, f"{x['score']:.3f}", *lab_study.lead_cells(x), f"{x['reward']:.3f}",
                  f"{x['reward over base']:+.3f}", f"{x['seconds']:.1f}", f"{x['GB']:.3f}", str(x["score"].n)]
                 for name, x in free.items()]
    n = next((x["score"].n for x in trained.values()), 0)
    parts = [(f"Score, n = {n} pictures per arm, over all seeds", scores),
             ("Loss by time: base, and differences from it in thousandths", times),
             ("How much masks differ, mean |m - m'|", differ), ("Without training", searches)]
    return "\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in parts if len(rows) > 1)


def draw_curve(table: dict[str, Row], steps: int, path: Path) -> None:
    """The paper's figure 9b: score, loss and density of the working masks over their training."""
    points = [(0.0, "base"), *((part, f"working at {part:.3g}") for part in PARTS), (1.0, "working")]
    points = [(part * steps, table[name]) for part, name in points if name in table]
    x, panels = [step for step, _ in points], []
    for what in ("over base", "loss over base"):
        values = [row.get(what, Estimate(0.0, 0.0, 0.0, 0)) for _, row in points]
        panels.append((dict(xlabel="training steps", ylabel=f"{'score ' * (what == 'over base')}{what}, 95 % paired"),
                       [line(x, values, fmt="o-"), line(x, [0 * step for step in x], fmt=":", color="gray")]))
    panels.append((dict(xlabel="training steps", ylabel="part of the masked weights that is kept"),
                   [line(x, [np.mean(row["density"]) for _, row in points], fmt="o-", color="C1")]))
    lab_study.plot([panels], "Learned masks over their training", path)


# --------------------------------------------------------------------------------------------------------- command line

def plan_jobs(arms: list[str], seeds: int) -> list[list[tuple[str, int]]]:
    """Arms and seeds for `Study.result`, those of one training together; random masks after what sets their density."""
    jobs: dict[Any, list[tuple]] = {}
    for seed in range(seeds):
        for name in sorted(arms, key=lambda name: ARMS[name].settings.random):
            jobs.setdefault((ARMS[name].settings.recipe, seed), []).append((name, seed))
    return list(jobs.values())


def sweep(study: Study) -> None:
    """Prints by how much every recipe lowers the validation loss at a third of its rate, at its rate, and at three."""
    base = np.array(study.losses(study.sd, None, 0)[1])
    for name, recipe in RECIPES.items():
        for factor in (1 / 3, 1.0, 3.0):
            sd, masks, _ = study.apply(Use(name), 1000, factor)        # a seed that no arm is judged with
            _, losses, density = study.losses(sd, masks, 1000)
            print(f"{name:18s} lr {recipe.lr * factor:.1e}  loss over base, 1e-3: "
                  f"{thousandths(mean(np.array(losses) - base))}  density {density:.4f}", flush=True)


def main() -> None:
    parser = lab_study.flags("Learned masks, other ways to train, and searches, on the tiny model.",
                             "model out arms sampler cfg_scale device", NUMBERS, out=Path("out/maskunet"),
                             cfg_scale=5.0)
    parser.add_argument("--iterations", type=int, nargs="+", default=[5, 15, 30], help="of the searches for masks")
    parser.add_argument("--noise-iterations", type=int, nargs="+", default=[15], help="of the search for noise")
    parser.add_argument("--sweep", action="store_true", help="instead: each recipe's loss at three rates")
    args = parser.parse_args()
    check_flags(("--pictures", args.pictures in range(6, 481, 6), "6, 12, ... up to 480"),
                ("--free-pictures", args.free_pictures in range(0, 481, 6), "0, 6, 12, ... up to 480"),
                ("--sampler", args.sampler != "euler-a", "one that draws no noise at its steps"),
                ("--iterations and --noise-iterations", min(args.iterations + args.noise_iterations) >= 1, "1 or more"),
                ("--drawn", args.drawn == 0 or args.drawn >= 100, "0, or 100 or more"))
    free = ["base", "masks 0", *(f"masks {k}" for k in args.iterations), *(f"noise {k}" for k in args.noise_iterations)]
    wanted = lab_study.choose(dict.fromkeys([*ARMS, *free]), args.arms)
    sd, made_with = lab_study.load(args, "lab.maskunet_study", (args.sample_steps, args.free_steps), torch.float32,
                                   seeds=1, steps=1, batch=1, scenes=1, validation=5)
    torch.set_flush_denormal(True)
    numbers = {name: getattr(args, name) for name in NUMBERS}
    study = Study(sd, args.out / "work", repr(made_with), dict(
        steps=args.sample_steps, sampler=args.sampler, cfg_scale=args.cfg_scale), numbers)
    if args.sweep:
        return sweep(study)
    arms = [name for name in ARMS if name in wanted or name == "base"]
    free = [name for name in free if args.free_pictures and (name in wanted or name == "base")]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    prompts, free_prompts = study.prompts(args.pictures), study.prompts(args.free_pictures)
    declared = [lab_study.declare([ARMS[name] for name in arms], prompts, 10_000),
                *([lab_study.declare(free_arms(free), free_prompts, 0)] if free else [])]
    jobs = plan_jobs(arms, args.seeds)
    with tqdm([call for calls in jobs[rank::world] for call in calls], desc="trained arms", unit="result") as bar:
        for name, seed in bar:
            bar.set_postfix_str(f"{name}, {seed}")
            study.result(name, seed)
    found = {name: study.search(name, rank, world) for name in sorted(free, key=lambda name: -free_settings(name)[1])}
    if not all(found.values()) or not all(study.path(*call).exists() for calls in jobs for call in calls):
        return print("some results are still to come from other processes; the last one writes the tables")

    side, tower = sd.config.size, study.image_tower
    trained = summarize({name: [study.result(name, seed) for seed in range(args.seeds)] for name in arms}, prompts,
                        drawn_features(tower, args.drawn, side, side, 1) if args.drawn else None)
    searched = summarize_free({name: found[name] for name in free}, free_prompts)
    made_with |= {"settings": study.settings, **numbers}
    lab_study.write_text(args.out / "maskunet.json", json.dumps(lab_study.to_json(
        {"made with": made_with, "declared": declared, "trained": trained, "searched": searched}), indent=1) + "\n")
    lab_study.write_text(args.out / "maskunet.md", text := tables(trained, searched))
    draw_curve(trained, args.steps, args.out / "training.png")
    print(text)


if __name__ == "__main__":
    run_command(main)
