"""MaskUNet: masks that switch off single weights of the U-Net's attention, by time and by image. The weights stay.

Start at `Gumbel.mask`, which turns logits into zeros and ones, and `MaskPass.of`, from which `linear` in `unet.py` gets
a masked weight. Logits come from a trained network (`DynamicMasks`), from one number per weight (`StaticMasks`), or
from chance (`RandomMasks`); `Masks` says how a run draws from them. `train.py` learns them from pictures;
`MaskSearch` finds them without training, again at every step, by climbing a reward. From the command line:

    python train.py masks --data FOLDER --out masks.safetensors
    python txt2img.py "a red circle" --masks masks.safetensors

Shapes: B rows of a batch, o i outputs and inputs of a linear layer, R different rows, C channels, E width of the time.
Source: MaskUNet, arXiv 2505.03097. Checked against outputs of the official classes. What the paper leaves open follows
the released code, except that its mask network can't learn (see `DynamicMasks`): init="official" is that one.
"""
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
    """The linear layers of the up blocks whose names end so, by name."""
    return {name: layer for name, layer in unet.up_blocks.named_modules(prefix="up_blocks")
            if isinstance(layer, nn.Linear) and name.endswith(tuple(layers))}


# --------------------------------------------------------------------------------------------------- logits to masks

@dataclass(frozen=True)
class Gumbel:
    """The Gumbel-sigmoid: 1 where sigmoid((logit + noise) / temperature) is above the threshold, 0 elsewhere.

    form: 1, the paper's eq. 5 as released: the noise is one Gumbel, P(1) = 1 - exp(-exp(logit)); 2, the definition that
        the paper cites: the difference of two, P(1) = sigmoid(logit).
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

        The same noise serves both forms: -log E is a Gumbel, -log(e^E - 1) a difference of two. Its median, ln 2, gives
        a deterministic mask: 1 where (at threshold 0.5) P(1) is above a half.
        """
        gumbel = -(noise if self.form == 1 else torch.expm1(noise)).log()
        soft = torch.sigmoid((logits + gumbel) / self.temperature)
        hard = (soft > self.threshold).to(soft.dtype)
        return hard + (soft - soft.detach())                           # the bracket is exactly 0

    def probability(self, logits: Tensor) -> Tensor:
        """P(mask = 1)"""
        logits = logits - self.temperature * math.log(self.threshold / (1 - self.threshold))
        return -torch.expm1(-logits.exp()) if self.form == 1 else logits.sigmoid()


def draw_uniform(shape: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
    rows, after, generator = [], [], torch.Generator()
    for state in states:
        generator.set_state(state.clone())                              # a view crashes PyTorch
        rows.append(torch.rand(shape, generator=generator))
        after.append(generator.get_state())
    return torch.stack(rows), torch.stack(after)


draw_uniform_operator = torch.library.custom_op("maskunet::draw_uniform", draw_uniform, mutates_args=())
draw_uniform_operator.register_fake(lambda shape, states: (torch.empty(len(states), *shape), torch.empty_like(states)))


def uniform(shape: list[int], states: Tensor) -> Tensor:
    """Numbers in [0, 1) (R, *shape), row k from the generator in state k, on the CPU in float32. Advances the states.

    States (R, bytes) stand for generators because a compiled graph holds only tensors; there, drawing is one operator.
    """
    draw = draw_uniform_operator if torch.compiler.is_compiling() else draw_uniform
    numbers, after = draw(shape, states)
    states.copy_(after)
    return numbers


def exponential(shape: torch.Size, states: Tensor) -> Tensor:
    """Noise (R, *shape) of mean 1, from `uniform` numbers.

    Drawing on the CPU takes time even if the model runs on a GPU: 0.17 s per step, image and branch of guidance for the
    49 million masked weights of SD 1.x (one thread, AMD EPYC Zen 5); SDXL has 483 million. The modes "threshold" and
    "expected" draw nothing.
    """
    noise = -torch.log1p(-uniform(shape, states))
    return noise.clamp_(min=2.0 ** -25)            # one draw in 2^24 is 0; its logarithm would turn logit -inf to NaN


def mix(*numbers: int) -> int:
    """A seed made of several numbers: noise is a function of its purpose, so the order of drawing doesn't matter."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# --------------------------------------------------------------------------------------------- where logits come from

class MaskGenerator(nn.Module):
    """An up block's map and skip (B, C', H, W), and the time (B or 1, E), to the core of its masks (B, o', i')."""

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
        if init == "official":                                         # zero before a ReLU: no gradient ever comes back
            nn.init.zeros_(self.fc2.weight)

    def forward(self, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        z = torch.cat([h.mean(dim=(2, 3)), skip.mean(dim=(2, 3))], dim=1).float()
        z = z if self.sample else torch.zeros_like(z)
        z = z if self.time is None else z + self.time(emb.float())
        return F.relu(self.fc2(F.relu(self.fc1(z)))).unflatten(1, self.core)


class Lift(nn.Module):
    """A block's core to the logits of one layer, by its rows and its columns. (B, o', i') -> (B, o, i)"""

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

    init: "official" starts the network at 0 in two factors and after a ReLU, where its gradient stays 0: masks then
        depend on neither time nor image. "working" gives the layer before that ReLU the usual random weights.
    initial: the first value of every logit; 5 keeps every weight (form 1: P(0) = 3.5e-65).
    time, sample: what the network sees (the paper's ablation, table 4).
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

    def core(self, level: int, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        return self.generators[str(level)](h, skip, emb)

    def logits(self, name: str, layer: nn.Linear, core: Tensor, states: Tensor | None) -> Tensor:
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

    def core(self, level: int, h: Tensor, skip: Tensor, emb: Tensor) -> None:
        return None

    def logits(self, name: str, layer: nn.Linear, core: None, states: Tensor | None) -> Tensor:
        return self.values[key(name)]


@dataclass(frozen=True)
class RandomMasks:
    """Random masks: the paper's fig. 1, an analysis and no improvement. Both branches of guidance have the same.

    ratio: the fraction of the weights that is dropped, 0 to 1.
    window: no, each weight by itself; yes, those whose values lie in a window at a random place in the layer's
        distribution (the paper doesn't say which, but its histograms of removed weights show narrow windows).
    mode: "sample"; "expected", every weight times 1 - ratio.
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
        if self.fixed and self.mode == "expected":
            raise ValueError("random masks: fixed does nothing with expected, which draws nothing")

    def start(self, run: Any) -> "MaskRun":
        return Masks(self, self.mode, self.fixed, shared=True).start(run)

    def core(self, level: int, h: Tensor, skip: Tensor, emb: Tensor) -> None:
        return None

    def logits(self, name: str, layer: nn.Linear, core: None, states: Tensor | None) -> Tensor:
        w = layer.weight
        if not self.window:                                            # exp(-exp(logit)) = ratio
            return torch.full_like(w, math.log(-math.log(self.ratio)) if 0 < self.ratio < 1 else
                                   math.inf if self.ratio == 0 else -math.inf, dtype=torch.float32)
        order, count = w.flatten().argsort(), round(self.ratio * w.numel())
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(w.numel(), device=w.device)).view_as(w)
        start = (uniform([], states).double() * (w.numel() - count + 1)).long().to(w.device)[:, None, None]
        return torch.where((start <= rank) & (rank < start + count), -math.inf, math.inf)


def key(name: str) -> str:
    """A layer's name where PyTorch allows no dots."""
    return name.replace(".", "/")


# ------------------------------------------------------------------------------------------------------ masks of a run

@dataclass(frozen=True)
class MaskFile:
    """Learned masks from a file, written by python train.py masks.

    file: the file; it must have been made for this very U-Net.
    mode: "sample"; "threshold", 1 where that is likelier, without noise; "expected", the weights times P(1).
    fixed: the same noise at every step, instead of new noise as published.
    shared: one noise for both branches of guidance, instead of one for each as published.
    """
    file: Path
    mode: Literal["sample", "threshold", "expected"] = "sample"
    fixed: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        check_mode(self)

    def check(self, config: Any, steps: int, guided: bool = True) -> None:
        """InputError where there is no such file."""
        if not self.file.is_file():
            raise InputError(f"there is no file {self.file}; make one: python train.py masks")

    def bind(self, sd: Any) -> "Masks":
        return Masks(load_masks(self.file, sd.unet), self.mode, self.fixed, self.shared)


@dataclass(frozen=True)
class Masks:
    """How a run draws its masks from given logits. mode, fixed, shared: see `MaskFile`."""
    source: DynamicMasks | StaticMasks | RandomMasks
    mode: str = "sample"
    fixed: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        check_mode(self)

    def start(self, run: Any) -> "MaskRun":
        """The state for one run. Generators lend only their seeds: the noise that the loop draws does not change."""
        return MaskRun(self, run.network("masks"), seeds_of(run, self.mode))


def check_mode(masks: MaskFile | Masks) -> None:
    if masks.mode not in MODES:
        raise ValueError(f"the masks' mode is one of {', '.join(MODES)}, not {masks.mode!r}")
    for name in ("fixed", "shared"):
        if getattr(masks, name) and masks.mode != "sample" and isinstance(masks, MaskFile):
            raise ValueError(f"masks: {name} does nothing with {masks.mode}, which draws nothing")


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
    cores: dict[tuple, Tensor | None] = field(default_factory=dict)    # by level and branches; DeepCache reuses them
    kept: Tensor = field(init=False)               # the sum of all masks so far
    total: Tensor = field(init=False)              # and how many weights they were for

    def __post_init__(self) -> None:
        layers = masked_layers(self.unet, self.masks.source.layers)
        self.places = {layer: (k, name) for k, (name, layer) in enumerate(layers.items())}
        self.levels = {int(name.split(".")[1]) for name in layers}
        self.attempts = self.attempts or [0] * len(self.seeds)
        self.kept = torch.zeros((), device=self.unet.conv_in.weight.device)
        self.total = torch.zeros_like(self.kept, dtype=torch.int64)

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "MaskPass":
        """The masks of a call, or of several in one batch, which is ordered by call, then by branch, then by image.

        Generators are made here: made in the U-Net, those of each call would need a compiled graph of their own.
        """
        masks = self.masks
        images = [(image, *pair) for image, pair in enumerate(zip(self.seeds, self.attempts))]
        rows = [(image, seed, 0 if masks.fixed else i, 0 if masks.shared else half, attempt)
                for i in calls for half in halves for image, seed, attempt in images]
        different, states = list(dict.fromkeys(rows)), None
        if masks.mode == "sample" or isinstance(masks.source, RandomMasks) and masks.source.window:
            seeds = [mix(*row[1:]) for row in different]
            states = torch.stack([torch.stack([torch.Generator().manual_seed(seed + k).get_state() for seed in seeds])
                                  for k in range(len(self.places))])
        return MaskPass(self, halves, [different.index(row) for row in rows], states)

    def search(self, i: int, x: Tensor, clean: Callable[[Tensor, int], Tensor]) -> None:
        """`MaskSearch`'s place in the loop: these masks are given."""

    @property
    def density(self) -> float:
        """The fraction of the weights that was kept so far."""
        return float(self.kept) / max(int(self.total), 1)


@dataclass
class MaskPass:
    """Masks in one pass, for the U-Net.

    index: for each row of the batch, which of the R different rows it has.
    states: (layers, R, bytes), of the generators; None: nothing is drawn.
    """
    run: MaskRun
    halves: tuple[int, ...]
    index: list[int]
    states: Tensor | None
    core: Tensor | None = None

    def enter(self, unit: int, h: Tensor, skip: Tensor, emb: Tensor) -> None:
        """The place before an up unit: the first one of a level makes the core of the level's masks.

        h, skip: (B, C', H, W), what enters the unit. emb: the embedding of the time (B or 1, E).
        """
        run, unet = self.run, self.run.unet
        level, first = divmod(unit - unet.middle - 1, unet.config.layers + 1)
        if level in run.levels and first == 0:
            run.cores[level, self.halves] = run.masks.source.core(level, h, skip, emb)
        self.core = run.cores.get((level, self.halves))

    def of(self, layer: nn.Linear) -> Tensor:
        """The layer's weight times its mask, (o, i), or (B, o, i) where rows differ."""
        run = self.run
        if layer not in run.places:
            return layer.weight
        k, name = run.places[layer]
        source, mode = run.masks.source, run.masks.mode

        def spread(x: Tensor) -> Tensor:                               # (R, o, i) -> (B, o, i), or (o, i) where R is 1
            return x[0] if len(x) == 1 else x if len(x) == len(self.index) else x[self.index]

        states = None if self.states is None else self.states[k].clone()
        logits = source.logits(name, layer, self.core, states)
        if logits.dim() == 3 and self.core is None:
            logits = spread(logits)
        if mode == "expected":
            mask = source.gumbel.probability(logits)
        elif mode == "threshold":
            mask = source.gumbel.mask(logits, torch.full_like(logits, math.log(2)))
        else:
            mask = source.gumbel.mask(logits, spread(exponential(layer.weight.shape, states).to(logits.device)))
        run.kept, run.total = run.kept + mask.detach().sum(), run.total + mask.numel()
        return layer.weight * mask.to(layer.weight.dtype)


# ----------------------------------------------------------------------------------------------- the training-free path

@dataclass(frozen=True)
class MaskSearch:
    """Training-free masks: before every step, gradient ascent of a reward of the predicted x0, by the masks' logits.

    reward: names of rewards, added: "clip", the CLIP in the model's folder, or a folder written by convert_weights.py
        --reward. As published: IMAGEREWARD_FOLDER:HPS_FOLDER.
    iterations: updates per step (the paper's lambda, 15 if none); the solver takes the pass after the last one. 0: no
        search.
    schedule: "paper", the same number at every step; "released": none at the first seven steps, then 9 (1 and 10
        iterations in its code, which uses the pass before the last update); iterations then stays none, or 0.
    keep: "last", the mask after the last update, as published; "best", the one of all passes with the highest score.
    lr: of AdamW.
    weight_decay: of AdamW.
    initial: the logits that every step begins with; 1 drops 6.6 % of the weights, as released.
    reset: a new optimiser at every step; no, as released: the moments of the step before continue.
    checkpoint: compute the activations of U-Net and reward twice instead of keeping them; the noise is the same both
        times. By the sizes of what autograd keeps, SD 1.5 at 512 pixels in float16 needs 4.5 GiB with it and 7.4 GiB
        without (U-Net 4.5, autoencoder 2.8), beside the weights and 0.7 GiB for logits, gradients and optimiser.
    """
    reward: tuple[str, ...] = ("clip",)
    iterations: int | None = None
    schedule: Literal["paper", "released"] = "paper"
    keep: Literal["last", "best"] = "last"
    lr: float = 1e-2
    weight_decay: float = 1e-2
    initial: float = 1.0
    reset: bool = True
    checkpoint: bool = False
    layers, gumbel = LAYERS, Gumbel()

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("the mask search needs a reward: clip, or folders")
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(f"mask iterations must be 0 or more, not {self.iterations}")
        if self.schedule == "released" and self.iterations:
            raise ValueError(f"the mask search's released schedule has its own iterations: leave out "
                             f"{self.iterations}, or take the paper's schedule")
        for name in ("lr", "weight_decay", "initial"):
            if not math.isfinite(getattr(self, name)) or name != "initial" and getattr(self, name) < 0:
                raise ValueError(f"the mask search's {name} can't be {getattr(self, name):g}")
        for name, legal in (("schedule", ("paper", "released")), ("keep", ("last", "best"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"the mask search's {name} is {' or '.join(legal)}, not {getattr(self, name)!r}")

    def updates(self, step: int) -> int:
        if self.iterations == 0 or (self.schedule == "released" and step < 7):
            return 0
        return 9 if self.schedule == "released" else 15 if self.iterations is None else self.iterations

    def bind(self, sd: Any) -> "Search":
        """With these rewards of what sd decodes. InputError where one can't be loaded."""
        return Search(self, sd.latent_score(self.reward))


@dataclass(frozen=True)
class Search:
    """A `MaskSearch` whose score is at hand.

    score: clean latents (n, 4, h, w), VAE-scaled, and their n prompts, to one number per image, differentiable.
    """
    settings: MaskSearch
    score: Callable[[Tensor, tuple[str, ...]], Tensor]

    def start(self, run: Any) -> "SearchRun":
        """The state for one run. Each image has logits of its own, shared by both branches of guidance."""
        if getattr(run.acting.get("cache"), "parallel", False):
            raise ValueError("a search for masks needs every step's latents: use the cache without its parallel mode")
        unet, s = run.network("masks"), self.settings
        source = StaticMasks(unet, s.layers, s.initial, s.gumbel, len(run.noise)).requires_grad_(False)
        return SearchRun(Masks(source, shared=True), unet, seeds_of(run), search_settings=s,
                         score=lambda x0: self.score(x0, run.branches[-1].words))


@dataclass
class SearchRun(MaskRun):
    """A `MaskRun` whose logits are searched for at each step."""
    search_settings: MaskSearch | None = None
    score: Callable[[Tensor], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    history: list[list[list[float]]] = field(default_factory=list)     # score by step, pass and image

    def search(self, i: int, x: Tensor, clean: Callable[[Tensor, int], Tensor]) -> None:
        """Finds the masks of call i. clean(x, i): the predicted x0 (n, 4, h, w) with the masks as they are.

        InputError where memory runs out and where a score is not finite.
        """
        try:
            with torch.enable_grad():
                self.climb(i, lambda: clean(x, i))
        except FloatingPointError:
            raise InputError(f"the score of the masks, or its gradient, is not finite at step {i}: use --dtype "
                             "bfloat16 or float32, or lower --cfg-scale") from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
                raise InputError("out of memory in the search for masks: add checkpoint to --masks search, or "
                                 "--low-memory, or lower --width and --height (or --freescale), or --batch-size"
                                 ) from None
            raise

    def climb(self, i: int, predict: Callable[[], Tensor]) -> None:
        s, values = self.search_settings, list(self.masks.source.parameters())
        updates, images = s.updates(i), len(self.seeds)
        half = self.unet.conv_in.weight.dtype == torch.float16
        scale = 2.0 ** 12 if half else 1.0                             # the gradient of one pixel is 0 in float16
        for p in values:
            p.detach().fill_(s.initial)
            p.requires_grad_()
        if s.reset or self.optimizer is None:
            self.optimizer = torch.optim.AdamW(values, lr=s.lr, weight_decay=s.weight_decay)
        scores, best, kept = [], [0] * images, []
        for k in range(updates + (s.keep == "best")):
            self.attempts = [k] * images                               # fresh noise in every pass
            with torch.set_grad_enabled(k < updates):
                if s.checkpoint:
                    x0 = checkpoint(predict, use_reentrant=False, preserve_rng_state=False)
                    score = checkpoint(self.score, x0, use_reentrant=False, preserve_rng_state=False)
                else:
                    score = self.score(predict())
            if not score.isfinite().all():
                raise FloatingPointError
            scores.append(score.tolist())
            if s.keep == "best":
                better = [image for image in range(images) if k == 0 or scores[k][image] > scores[best[image]][image]]
                kept = [p.detach().clone() for p in values] if k == 0 else kept
                for image in better:
                    best[image] = k
                    for mine, p in zip(kept, values):
                        mine[image] = p.detach()[image]
            if k < updates:
                self.optimizer.zero_grad()
                (-scale * score).sum().backward()                      # a score depends on its own image's logits alone
                for grad in (p.grad for p in values if p.grad is not None):      # a cache doesn't run every layer
                    grad /= scale
                    if not grad.isfinite().all():
                        raise FloatingPointError
                self.optimizer.step()
        for p, mine in zip(values, kept):
            p.detach().copy_(mine)
        for p in values:
            p.grad = None
            p.requires_grad_(False)
        self.history.append(scores)
        self.attempts = best if s.keep == "best" else [updates] * images


# --------------------------------------------------------------------------------------------------------------- files
KINDS = {"dynamic": DynamicMasks, "static": StaticMasks}


def weight_digest(unet: UNet, layers: tuple[str, ...] = LAYERS) -> str:
    """A short name for the weights that are masked: models of one shape differ in it, dtypes of one model don't.

    Made of the signs alone: they are what no rounding to float16 or bfloat16 changes, not even to zero.
    """
    digest = hashlib.sha256()
    for layer in masked_layers(unet, layers).values():
        digest.update(np.packbits(torch.signbit(layer.weight.detach()).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def save_masks(masks: DynamicMasks | StaticMasks, path: Path, unet: UNet,
               training: dict[str, Any] | None = None) -> None:
    """One safetensors file: the masks' own tensors, and in its metadata what they are and how they were trained.

    unet: the one that they are for; `load_masks` takes them for no other.
    """
    kind = next(name for name, cls in KINDS.items() if type(masks) is cls)
    facts = {"kind": kind, "settings": masks.settings, "gumbel": asdict(masks.gumbel), "training": training or {},
             "model": weight_digest(unet, masks.layers)}
    with replacing(path) as part:
        save_file({name: p.detach().contiguous().cpu() for name, p in masks.state_dict().items()}, part,
                  metadata={"maskunet": json.dumps(facts)})


def load_masks(path: Path, unet: UNet) -> DynamicMasks | StaticMasks:
    """Masks for this very U-Net, frozen. InputError where the file is no such file, or was made for another model."""
    another = f"{path} was trained for another model"
    remedy = "train masks for this U-Net: python train.py masks"
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
        except InputError as error:
            raise InputError(f"{another} ({error}); {remedy}") from None
        for name, p in wanted.items():
            tensor = file.get_tensor(name)
            if tensor.shape != p.shape:
                raise InputError(f"{another}: {name} has shape {tuple(tensor.shape)}, but this U-Net's has "
                                 f"{tuple(p.shape)}; {remedy}")
            if not tensor.isfinite().all():
                raise InputError(f"{path} is damaged: {name} is not finite; train the masks again")
            p.copy_(tensor)
        if theirs != mine:
            raise InputError(f"{another} of the same shape: its masks are for the weights {theirs}, but this U-Net's "
                             f"are {mine}; {remedy}")
    return masks.requires_grad_(False)
