"""MaskUNet: zeros and ones that multiply single weights of the U-Net's attention, by time and image. The weights stay.

Start at `Gumbel.mask`, which turns logits into zeros and ones, and `MaskPass.of`, which gives `linear` in `unet.py` a
masked weight. A source gives the logits: a trained network (`DynamicMasks`), one number per weight (`StaticMasks`), or
chance (`RandomMasks`). `Masks` says how a run draws masks from a source. `train.py` trains sources on pictures.
`MaskSearch` needs no training: before each denoising step, it raises a reward by gradient ascent on the logits.

    python train.py masks --data FOLDER --out masks.safetensors
    python txt2img.py "a red circle" --masks masks.safetensors

Shapes: B rows of a batch, R different masks for them; o i outputs and inputs of a linear layer; C channels; E width of
the time embedding. Source: MaskUNet, arXiv 2505.03097. Checked against outputs of the official classes. What the paper
leaves open follows the released code, with one exception: the released mask network can't learn, see `DynamicMasks`.
"""
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint import check_names, open_safetensors
from command import InputError, replacing
from unet import UNet

# The layers that are masked, by the ends of their names in the up blocks: 72 in SD 1.x, 5.7 % of the weights
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = tuple(f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in LINEARS)
MODES = ("sample", "threshold", "expected")


def masked_layers(unet: UNet, layers: tuple[str, ...] = LAYERS) -> dict[str, nn.Linear]:
    """The linear layers of the up blocks whose names have one of these ends, by name."""
    return {name: layer for name, layer in unet.up_blocks.named_modules(prefix="up_blocks")
            if isinstance(layer, nn.Linear) and name.endswith(tuple(layers))}


# --------------------------------------------------------------------------------------------------- logits to masks

@dataclass(frozen=True)
class Gumbel:
    """The Gumbel-sigmoid: 1 where sigmoid((logit + noise) / temperature) is above the threshold, 0 elsewhere.

    form: 1: the noise is one Gumbel variable, as in the paper's eq. 5 and the released code: P(1) = 1 - exp(-e^logit).
        2: it is the difference of two, as in the definition that the paper cites: P(1) = sigmoid(logit).
    """
    form: int = 1
    temperature: float = 1.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.form not in (1, 2):
            raise ValueError(f"the Gumbel-sigmoid has 1 or 2 Gumbels, not {self.form!r}")
        if not self.temperature > 0 or not 0 < self.threshold < 1:
            raise ValueError(f"the Gumbel-sigmoid needs a temperature above 0 and a threshold between 0 and 1, not "
                             f"{self.temperature:g} and {self.threshold:g}")

    def mask(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Exactly 0 or 1, with the gradient of the sigmoid (straight-through). noise: exponential, of mean 1, above 0.

        Exponential noise E serves both forms: -log E is a Gumbel variable, -log(e^E - 1) the difference of two. Its
        median, ln 2, gives a deterministic mask: at threshold 0.5, 1 where P(1) is above a half.
        """
        gumbel = -(noise if self.form == 1 else torch.expm1(noise)).log()
        soft = torch.sigmoid((logits + gumbel) / self.temperature)
        hard = (soft > self.threshold).to(soft.dtype)
        return hard + (soft - soft.detach())                           # the bracket is exactly 0

    def probability(self, logits: Tensor) -> Tensor:
        """P(mask = 1)"""
        logits = logits - self.temperature * math.log(self.threshold / (1 - self.threshold))
        return -torch.expm1(-logits.exp()) if self.form == 1 else logits.sigmoid()


@torch.library.custom_op("maskunet::uniform", mutates_args=())
def uniform(shape: list[int], seeds: Tensor) -> Tensor:
    """Numbers in [0, 1), (R, *shape): row k from a generator with seeds[k], on the CPU in float32.

    It is one operator in a compiled graph, which can hold neither generators nor numbers that change with each call.
    """
    generator = torch.Generator()
    return torch.stack([torch.rand(shape, generator=generator.manual_seed(seed)) for seed in seeds.tolist()])


uniform.register_fake(lambda shape, seeds: torch.empty(len(seeds), *shape))


def exponential(shape: list[int], seeds: Tensor) -> Tensor:
    """Noise of mean 1, (R, *shape), from `uniform` numbers.

    Drawing on the CPU takes time even if the model runs on a GPU: 0.17 s per step, image and branch of guidance for the
    49 million masked weights of SD 1.5 (one thread, AMD EPYC Zen 5). SDXL has 483 million. The modes "threshold" and
    "expected" draw nothing.
    """
    noise = -torch.log1p(-uniform(list(shape), seeds))
    return noise.clamp_(min=2.0 ** -25)            # one draw in 2^24 is 0; its logarithm would turn logit -inf into NaN


def mix(*numbers: int) -> int:
    """A seed made of several numbers: noise is a function of its purpose, so the order of drawing doesn't matter."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# --------------------------------------------------------------------------------------------- where logits come from

class MaskGenerator(nn.Module):
    """What enters an up block, h and skip (B, C', H, W), and the time (B or 1, E) to the core of its masks (B, o', i').

    time, sample: whether the core depends on the time, and on h and skip.
    """

    def __init__(self, channels: int, channels_out: int, emb_dim: int, init: str, time: bool, sample: bool):
        super().__init__()
        self.core = (channels_out // 4, channels // 4)
        self.sample = sample
        self.time = nn.Linear(emb_dim, channels, bias=False) if time else None
        self.fc1 = nn.Linear(channels, 64)
        self.fc2 = nn.Linear(64, self.core[0] * self.core[1])
        nn.init.kaiming_normal_(self.fc1.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)
        if init == "official":                                         # zero before a ReLU: its gradient stays zero
            nn.init.zeros_(self.fc2.weight)

    def forward(self, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        z = torch.cat([h.mean(dim=(2, 3)), skip.mean(dim=(2, 3))], dim=1).float()
        z = z if self.sample else torch.zeros_like(z)
        z = z if self.time is None else z + self.time(emb.float())
        return F.relu(self.fc2(F.relu(self.fc1(z)))).unflatten(1, self.core)


class Lift(nn.Module):
    """The core of a block's masks to the logits of one layer, (B, o', i') -> (B, o, i): two linear maps."""

    def __init__(self, core: tuple[int, int], layer: nn.Linear, initial: float):
        super().__init__()
        self.rows = nn.Linear(core[0], layer.out_features)
        self.columns = nn.Linear(core[1], layer.in_features)
        for p in (self.rows.weight, self.columns.weight):
            nn.init.zeros_(p)
        nn.init.constant_(self.rows.bias, 5.0)                         # not `initial`: at 0 nothing could learn
        nn.init.constant_(self.columns.bias, initial)

    def forward(self, core: Tensor) -> Tensor:
        return self.columns(self.rows.weight @ core + self.rows.bias[:, None])


class DynamicMasks(nn.Module):
    """Logits by a network, from the time and from what enters each up block: the training-based approach.

    init: "official": the last layer before a ReLU and the factor after it start at 0. Their gradients stay 0, so that
        masks never depend on time or image. "working": that layer starts with the usual random weights.
    initial: the first value of every logit; 5 keeps every weight (form 1: P(0) = 3.5e-65).
    time, sample: whether masks depend on the time, and on the image (the paper's ablation, table 4).
    """

    def __init__(self, unet: UNet, layers: tuple[str, ...] = LAYERS, init: str = "working", initial: float = 5.0,
                 time: bool = True, sample: bool = True, gumbel: Gumbel = Gumbel(), seed: int = 0):
        super().__init__()
        if init not in ("working", "official"):
            raise ValueError(f"init is working or official, not {init!r}")
        self.layers, self.gumbel = tuple(layers), gumbel
        self.settings = dict(layers=self.layers, init=init, initial=initial, time=time, sample=sample)
        self.generators, self.lifts = nn.ModuleDict(), nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)
            for name, layer in masked_layers(unet, layers).items():
                level = name.split(".")[1]
                if level not in self.generators:
                    conv = unet.up_blocks[int(level)].resnets[0].conv1
                    self.generators[level] = MaskGenerator(conv.in_channels, conv.out_channels,
                                                           4 * unet.config.channels[0], init, time, sample)
                self.lifts[key(name)] = Lift(self.generators[level].core, layer, initial)
        self.to(unet.conv_in.weight.device)

    def logits(self, name: str, layer: nn.Linear, core: Tensor, seeds: Tensor | None) -> Tensor:
        return self.lifts[key(name)](core)                             # (B, o, i)


class StaticMasks(nn.Module):
    """One logit per weight, the same at all times: (o, i) for all images, or (images, o, i)."""

    def __init__(self, unet: UNet, layers: tuple[str, ...] = LAYERS, initial: float = 1.0, gumbel: Gumbel = Gumbel(),
                 images: int | None = None):
        super().__init__()
        self.layers, self.gumbel = tuple(layers), gumbel
        self.settings = dict(layers=self.layers, initial=initial)
        shape = () if images is None else (images,)
        self.values = nn.ParameterDict({
            key(name): torch.full((*shape, *layer.weight.shape), initial, device=layer.weight.device)
            for name, layer in masked_layers(unet, layers).items()})

    def logits(self, name: str, layer: nn.Linear, core: None, seeds: Tensor | None) -> Tensor:
        return self.values[key(name)]


@dataclass(frozen=True)
class RandomMasks:
    """Random masks: the paper's fig. 1, an analysis and no improvement. Both branches of guidance have the same masks.

    ratio: the fraction of the weights that is dropped, 0 to 1.
    window: no: chance decides for each weight. yes: the dropped weights of a layer are neighbours in the order of their
        values, from a random place on. (The paper doesn't say which. Its histograms show narrow windows.)
    mode: "sample"; "expected": nothing is drawn, and every weight is multiplied by 1 - ratio.
    fixed: the same masks at every step.
    """
    ratio: float
    window: bool = False
    mode: Literal["sample", "expected"] = "sample"
    fixed: bool = False
    layers, gumbel = LAYERS, Gumbel()

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"the ratio of dropped weights must be between 0 and 1, not {self.ratio:g}")
        if self.mode not in ("sample", "expected"):
            raise ValueError(f"the mode of random masks is sample or expected, not {self.mode!r}")
        for name in ("window", "fixed"):
            if getattr(self, name) and self.mode == "expected":
                raise ValueError(f"random masks: {name} does nothing with expected, which draws nothing")

    def check(self, config: Any, steps: int, guided: bool = True) -> None:
        check_fixed(self, steps)

    def start(self, run: Any) -> "MaskRun":
        return Masks(self, self.mode, self.fixed, shared=True).start(run)

    def logits(self, name: str, layer: nn.Linear, core: None, seeds: Tensor | None) -> Tensor:
        w = layer.weight
        if not self.window:                                            # exp(-exp(logit)) = ratio
            return torch.full_like(w, math.log(-math.log(self.ratio)) if 0 < self.ratio < 1 else
                                   math.inf if self.ratio == 0 else -math.inf, dtype=torch.float32)
        order, count = w.flatten().argsort(), round(self.ratio * w.numel())
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(w.numel(), device=w.device)).view_as(w)
        start = (uniform([], seeds).double() * (w.numel() - count + 1)).long().to(w.device)[:, None, None]
        return torch.where((start <= rank) & (rank < start + count), -math.inf, math.inf)


def key(name: str) -> str:
    """A layer's name where PyTorch allows no dots."""
    return name.replace(".", "/")


# ------------------------------------------------------------------------------------------------------ masks of a run

@dataclass(frozen=True)
class MaskFile:
    """Trained masks from a file that python train.py masks wrote.

    file: the file; its masks must have been trained for this very U-Net.
    mode: "sample"; "threshold": no noise, 1 where P(1) is above a half; "expected": the weights times P(1).
    fixed: the same noise at every step, instead of new noise as published.
    shared: the same noise for both branches of guidance, instead of one for each as published.
    """
    file: Path
    mode: Literal["sample", "threshold", "expected"] = "sample"
    fixed: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        check_mode(self.mode)
        for name in ("fixed", "shared"):
            if getattr(self, name) and self.mode != "sample":
                raise ValueError(f"masks: {name} does nothing with {self.mode}, which draws nothing")

    def check(self, config: Any, steps: int, guided: bool = True) -> None:
        """ValueError where there is no such file, and where a setting can have no effect."""
        if not self.file.is_file():
            raise InputError(f"there is no file {self.file}; make one: python train.py masks")
        check_fixed(self, steps)
        if self.shared and not guided:
            raise ValueError("masks: shared does nothing without guidance, which has a single branch")

    def bind(self, sd: Any) -> "Masks":
        return Masks(load_masks(self.file, sd.unet), self.mode, self.fixed, self.shared)


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"the masks' mode is one of {', '.join(MODES)}, not {mode!r}")


def check_fixed(masks: MaskFile | RandomMasks, steps: int) -> None:
    if masks.fixed and steps == 1:
        raise ValueError("masks: fixed does nothing with a single step")


@dataclass(frozen=True)
class Masks:
    """How a run draws its masks from given logits. mode, fixed, shared: see `MaskFile`."""
    source: DynamicMasks | StaticMasks | RandomMasks
    mode: str = "sample"
    fixed: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        check_mode(self.mode)

    def start(self, run: Any) -> "MaskRun":
        """The state for one run. Generators lend only their seeds: the noise that the loop draws does not change."""
        return MaskRun(self, run.network("masks"), seeds_of(run, self.mode))


def seeds_of(run: Any, mode: str = "sample") -> list[int]:
    if run.generators is None and mode == "sample":
        raise ValueError("masks are drawn at every step: pass generators, one per image")
    return [0] * len(run.noise) if run.generators is None else [g.initial_seed() for g in run.generators]


@dataclass
class MaskRun:
    """The masks of one run: `at` makes those of one pass."""
    masks: Masks
    unet: UNet
    seeds: list[int]                               # one per image
    attempts: list[int] = field(default_factory=list)                  # per image, where a search tries several masks
    cores: dict[tuple, Tensor] = field(default_factory=dict)           # by level and branches; DeepCache reuses them
    kept: Tensor = field(init=False)               # the sum of all masks so far
    total: Tensor = field(init=False)              # and how many weights they were for

    def __post_init__(self) -> None:
        layers = masked_layers(self.unet, self.masks.source.layers)
        self.places = {layer: (k, name) for k, (name, layer) in enumerate(layers.items())}
        self.attempts = self.attempts or [0] * len(self.seeds)
        self.kept = torch.zeros((), device=self.unet.conv_in.weight.device)
        self.total = torch.zeros_like(self.kept, dtype=torch.int64)

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "MaskPass":
        """The masks for these branches of a call, or of several calls in one batch: by call, by branch, by image."""
        masks, images = self.masks, list(enumerate(zip(self.seeds, self.attempts)))
        rows = [(image, seed, 0 if masks.fixed else i, 0 if masks.shared else half, attempt)
                for i in calls for half in halves for image, (seed, attempt) in images]
        different = list(dict.fromkeys(rows))
        return MaskPass(self, halves, [different.index(row) for row in rows],
                        torch.tensor([mix(*numbers) for _, *numbers in different]))

    def search(self, i: int, x: Tensor, clean: Callable[[Tensor, int], Tensor]) -> bool:
        """`MaskSearch`'s place in the loop. Returns whether the solver must forget the steps before this one."""
        return False

    @property
    def density(self) -> float:
        """The fraction of the weights that was kept so far."""
        return float(self.kept) / max(int(self.total), 1)


@dataclass
class MaskPass:
    """The masks of one pass, for the U-Net.

    index: for each row of the batch, which of the R different masks it has. seeds: (R,), of the masks of layer 0.
    """
    run: MaskRun
    halves: tuple[int, ...]
    index: list[int]
    seeds: Tensor
    core: Tensor | None = None

    def enter(self, unit: int, h: Tensor, skip: Tensor, emb: Tensor) -> None:
        """The place before an up unit: the first unit of a level makes the core of the level's masks.

        h, skip: (B, C', H, W), what enters the unit. emb: the embedding of the time (B or 1, E).
        """
        run, unet, generators = self.run, self.run.unet, getattr(self.run.masks.source, "generators", {})
        level, first = divmod(unit - unet.middle - 1, unet.config.layers + 1)
        if str(level) in generators and first == 0:
            run.cores[level, self.halves] = generators[str(level)](h, skip, emb)
        self.core = run.cores.get((level, self.halves))

    def of(self, layer: nn.Linear) -> Tensor:
        """The layer's weight times its mask, (o, i), or (B, o, i) where rows differ."""
        run, masks = self.run, self.run.masks
        if layer not in run.places:
            return layer.weight
        k, name = run.places[layer]
        seeds, gumbel = self.seeds + k, masks.source.gumbel            # noise of its own for each layer

        def spread(x: Tensor) -> Tensor:                               # (R, o, i) -> (B, o, i), or (o, i) where R is 1
            return x[0] if len(x) == 1 else x if len(x) == len(self.index) else x[self.index]

        logits = masks.source.logits(name, layer, self.core, seeds)
        if logits.dim() == 3 and self.core is None:
            logits = spread(logits)
        if masks.mode == "expected":
            mask = gumbel.probability(logits)
        elif masks.mode == "threshold":
            mask = gumbel.mask(logits, torch.full_like(logits, math.log(2)))
        else:
            mask = gumbel.mask(logits, spread(exponential(layer.weight.shape, seeds).to(logits.device)))
        run.kept, run.total = run.kept + mask.detach().sum(), run.total + mask.numel()
        return layer.weight * mask.to(layer.weight.dtype)


# ----------------------------------------------------------------------------------------------- the training-free path

@dataclass(frozen=True)
class MaskSearch:
    """Training-free masks: before each step, gradient ascent on the masks' logits raises a reward of the predicted x0.

    reward: names of rewards, added: "clip", the CLIP in the model's folder, or a folder written by convert_weights.py
        --reward. As published: IMAGEREWARD_FOLDER:HPS_FOLDER.
    iterations: updates per step (the paper's lambda; none: 15). 0: no search, the masks are drawn from `initial`.
    schedule: "paper": the same number of updates at every step. "released": 1 at each of the first seven steps, 10 at
        each later one. The solver takes the masks before the last of them, which only the optimiser's moments feel, and
        forgets the steps before (so that dpm++2m is of first order). Each step costs a pass more than in that code.
    keep: "last": the mask after the last update, as published. "best": each image's mask with the highest score.
    lr: the learning rate of AdamW.
    weight_decay: the weight decay of AdamW.
    initial: the logits that every step begins with; 1, as released, drops 6.6 % of the weights.
    reset: yes: a new optimiser at every step; no: it keeps its moments; none: yes for "paper", no for "released".
    checkpoint: compute the activations of U-Net and reward twice instead of keeping them; the noise is the same both
        times. By the sizes of what autograd keeps, SD 1.5 at 512 pixels in float16 needs 4.5 GiB with it and 7.4 GiB
        without (U-Net 4.5, autoencoder 2.8), plus the weights and 0.7 GiB for logits, gradients and optimiser.
    """
    reward: tuple[str, ...] = ("clip",)
    iterations: int | None = None
    schedule: Literal["paper", "released"] = "paper"
    keep: Literal["last", "best"] = "last"
    lr: float = 1e-2
    weight_decay: float = 1e-2
    initial: float = 1.0
    reset: bool | None = None
    checkpoint: bool = False
    layers, gumbel = LAYERS, Gumbel()

    def __post_init__(self) -> None:
        if not self.reward or not all(self.reward):
            raise ValueError("the mask search needs a reward: clip, or folders")
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(f"mask iterations must be 0 or more, not {self.iterations}")
        for name in ("lr", "weight_decay", "initial"):
            if not math.isfinite(getattr(self, name)) or name != "initial" and getattr(self, name) < 0:
                raise ValueError(f"the mask search's {name} can't be {getattr(self, name):g}")
        for name, legal in (("schedule", ("paper", "released")), ("keep", ("last", "best"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"the mask search's {name} is {' or '.join(legal)}, not {getattr(self, name)!r}")
        if self.schedule == "released" and self.iterations is not None:
            raise ValueError(f"the mask search's released schedule has its own iterations: leave out "
                             f"{self.iterations}, or take the paper's schedule")
        for one in fields(self) if self.iterations == 0 else ():
            if one.name not in ("iterations", "initial") and getattr(self, one.name) != one.default:
                raise ValueError(f"the mask search's {one.name} does nothing with 0 iterations")

    def check(self, config: Any, steps: int, guided: bool = True) -> None:
        """ValueError where a setting can have no effect."""
        if self.schedule == "released" and steps < 8:
            raise ValueError("the mask search's released schedule changes no mask in the first 7 steps: give more than "
                             f"{steps} --steps, or schedule=paper")
        if self.reset is not None and steps == 1:
            raise ValueError("the mask search's reset does nothing with a single step")

    def canonical(self) -> "MaskSearch":
        """The settings of the same pictures, without what only saves memory: for a picture's metadata."""
        return replace(self, checkpoint=False)

    def updates(self, step: int) -> int:
        if self.schedule == "released":
            return 1 if step < 7 else 10
        return 15 if self.iterations is None else self.iterations

    def bind(self, sd: Any) -> "Search":
        """The search with these rewards of what sd decodes. InputError where one can't be loaded."""
        return Search(self, sd.latent_score(self.reward))


@dataclass(frozen=True)
class Search:
    """A `MaskSearch` with its score.

    score: a differentiable function of clean latents (n, 4, h, w), VAE-scaled, and their n prompts; one number per
        image, larger is better.
    """
    settings: MaskSearch
    score: Callable[[Tensor, tuple[str, ...]], Tensor]

    def start(self, run: Any) -> "SearchRun":
        """The state for one run. Each image has its own logits, shared by both branches of guidance."""
        if getattr(run.acting.get("cache"), "parallel", False):
            raise ValueError("a search for masks needs every step's latents: use the cache without its parallel mode")
        unet, s = run.network("masks"), self.settings
        source = StaticMasks(unet, s.layers, s.initial, s.gumbel, len(run.noise)).requires_grad_(False)
        return SearchRun(Masks(source, shared=True), unet, seeds_of(run), settings=s, step_of=run.plan.step,
                         score=lambda x0: self.score(x0, run.branches[-1].words))


@dataclass
class SearchRun(MaskRun):
    """A `MaskRun` whose logits are searched for at each step."""
    settings: MaskSearch | None = None
    step_of: Callable[[int], int] | None = None    # the denoising step that a call belongs to
    score: Callable[[Tensor], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    history: list[list[list[float]]] = field(default_factory=list)     # score by step, pass and image

    def search(self, i: int, x: Tensor, clean: Callable[[Tensor, int], Tensor]) -> bool:
        """Finds the masks of call i. clean(x, i): the predicted x0 (n, 4, h, w) with the present masks.

        InputError where memory runs out and where a score is not finite.
        """
        try:
            with torch.enable_grad():
                self.climb(self.step_of(i), lambda: clean(x, i))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
                raise InputError("out of memory in the search for masks: add checkpoint to --masks search, or "
                                 "--low-memory, or lower --width and --height (or --freescale), or --batch-size"
                                 ) from None
            raise
        return self.settings.schedule == "released"

    def climb(self, step: int, predict: Callable[[], Tensor]) -> None:
        s, values, images = self.settings, list(self.masks.source.parameters()), range(len(self.seeds))
        updates, released, best, kept = s.updates(step), s.schedule == "released", [0] * len(images), []
        half = self.unet.conv_in.weight.dtype == torch.float16
        scale = 2.0 ** 12 if half else 1.0                             # the gradient of one pixel is 0 in float16

        def check_finite(x: Tensor) -> None:
            if not x.isfinite().all():
                raise InputError(f"the score of the masks, or its gradient, is not finite at step {step}: use --dtype "
                                 "bfloat16 or float32, or lower --cfg-scale")

        for p in values:
            p.detach().fill_(s.initial)
            p.requires_grad_()
        if self.optimizer is None or (not released if s.reset is None else s.reset):
            self.optimizer = torch.optim.AdamW(values, weight_decay=s.weight_decay)
        self.history.append(scores := [])
        for k in range(updates + (s.keep == "best" and not released)):
            self.attempts = [k] * len(images)                          # fresh noise in every pass
            with torch.set_grad_enabled(k < updates):
                if s.checkpoint:
                    x0 = checkpoint(predict, use_reentrant=False, preserve_rng_state=False)
                    score = checkpoint(self.score, x0, use_reentrant=False, preserve_rng_state=False)
                else:
                    score = self.score(predict())
            check_finite(score)
            scores.append(score.tolist())
            if s.keep == "best":
                kept = kept or [p.detach().clone() for p in values]
                for image in images:
                    if scores[k][image] > scores[best[image]][image]:
                        best[image] = k
                        for mine, p in zip(kept, values):
                            mine[image] = p.detach()[image]
            if k < updates:
                self.optimizer.zero_grad()
                (-scale * score).sum().backward()                      # a score depends on its own image's logits alone
                for grad in (p.grad for p in values if p.grad is not None):      # a cache doesn't run every layer
                    grad /= scale
                    check_finite(grad)
                last = released and k == updates - 1                   # only the moments take it
                self.optimizer.param_groups[0]["lr"] = 0.0 if last else s.lr
                self.optimizer.step()
        for p, mine in zip(values, kept):
            p.detach().copy_(mine)
        for p in values:
            p.grad = None
            p.requires_grad_(False)
        self.attempts = best if s.keep == "best" else [updates - released] * len(images)


# --------------------------------------------------------------------------------------------------------------- files
KINDS = {"dynamic": DynamicMasks, "static": StaticMasks}


def weight_digest(unet: UNet, layers: tuple[str, ...] = LAYERS) -> str:
    """A short name of the masked weights: it tells models of one shape apart, but not dtypes of one model.

    It is made of the signs alone: rounding to float16 or bfloat16 changes no sign, not even where it gives zero.
    """
    digest = hashlib.sha256()
    for layer in masked_layers(unet, layers).values():
        digest.update(np.packbits(torch.signbit(layer.weight.detach()).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def save_masks(masks: DynamicMasks | StaticMasks, path: Path, unet: UNet,
               training: dict[str, Any] | None = None) -> None:
    """One safetensors file: the tensors, and in its metadata what they are and how they were trained.

    unet: the U-Net that the masks were trained for; `load_masks` takes them for no other.
    """
    kind = next(name for name, cls in KINDS.items() if type(masks) is cls)
    facts = {"kind": kind, "settings": masks.settings, "gumbel": asdict(masks.gumbel), "training": training or {},
             "model": weight_digest(unet, masks.layers)}
    with replacing(path) as part:
        save_file({name: p.detach().contiguous().cpu() for name, p in masks.state_dict().items()}, part,
                  metadata={"maskunet": json.dumps(facts)})


def load_masks(path: Path, unet: UNet) -> DynamicMasks | StaticMasks:
    """Masks for this very U-Net, frozen. InputError for a file of another kind, or of masks for another model."""
    with open_safetensors(path, "train the masks again") as file:
        try:
            facts = json.loads((file.metadata() or {})["maskunet"])
            masks = KINDS[facts["kind"]](unet, gumbel=Gumbel(**facts["gumbel"]), **facts["settings"])
            theirs, mine = facts["model"], weight_digest(unet, masks.layers)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a file of masks ({error}); make one: python train.py masks") from None
        wanted = masks.state_dict()
        try:
            check_names(list(file.keys()), list(wanted), "it")
            for name, p in wanted.items():
                tensor = file.get_tensor(name)
                if tensor.shape != p.shape:
                    raise InputError(f"its {name} has shape {tuple(tensor.shape)}, but this U-Net's has "
                                     f"{tuple(p.shape)}")
                p.copy_(tensor)
            if theirs != mine:
                raise InputError(f"of the same shape, but with the weights {theirs}, not {mine}")
        except InputError as error:
            raise InputError(f"{path} was trained for another model ({error}); train masks for this U-Net: python "
                             "train.py masks") from None
    for name, p in wanted.items():
        if not p.isfinite().all():
            raise InputError(f"{path} is damaged: {name} is not finite; train the masks again")
    return masks.requires_grad_(False)
