"""MaskUNet: masks that switch off single weights of the U-Net's attention, by time and by image. The weights stay.

Start at `Gumbel.mask`, which turns logits into zeros and ones, and `MaskRun.unit`, which `UNet.decode` asks for the
masks of an up unit. Logits come from a trained network (`DynamicMasks`), from one number a weight (`StaticMasks`), or
from chance (`RandomMasks`); `Masks` says how a run draws from them. `train.py` learns them from pictures;
`MaskSearch` finds them without training, at every step anew, by climbing a reward. From the command line:

    python train.py masks --data FOLDER --out masks.safetensors
    python txt2img.py "a red circle" --masks masks.safetensors

Shapes: B rows of a batch, o i outputs and inputs of a linear layer, R rows of masks, C channels, E width of the time.
Source: MaskUNet, arXiv 2505.03097. Checked against outputs of the official classes. What the paper leaves open follows
the released code, but its mask network can't learn (see `DynamicMasks`): init="official" is that one.
"""
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint import check_names, open_safetensors
from command import InputError, replacing
from unet import AttentionMasks, UNet

if TYPE_CHECKING:
    from vae import VAE

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
    """The Gumbel-sigmoid: 1 where sigmoid((logit + noise) / temperature) is above the threshold, else 0.

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

        The same noise serves both forms: -log E is a Gumbel, -log(e^E - 1) a difference of two. Its median, ln 2, makes
        a mask without chance: 1 where (at threshold 0.5) P(1) is above a half.
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
    """Numbers in [0, 1) (R, *shape), row k from the generator in state k, on the CPU in float32; the states go on.

    States (R, bytes) instead of generators, because a compiled graph holds tensors: there drawing is one operator.
    """
    draw = draw_uniform_operator if torch.compiler.is_compiling() else draw_uniform
    numbers, after = draw(shape, states)
    states.copy_(after)
    return numbers


def exponential(shape: torch.Size, states: Tensor) -> Tensor:
    """Noise (R, *shape) of mean 1, from `uniform` numbers.

    They cost time, beside a GPU too: 0.17 s on one thread of an AMD EPYC (Zen 5), otherwise idle, for the 49 million
    weights that SD 1.x masks (SDXL: 483), at every step, for each image and half of guidance. The modes "threshold" and
    "expected" draw none.
    """
    noise = -torch.log1p(-uniform(shape, states))
    return noise.clamp_(min=2.0 ** -25)            # once in 2^24 draws it is 0, whose logarithm makes NaN of logit -inf


def mix(*numbers: int) -> int:
    """A seed made of several numbers: noise is a function of what it is for, so nothing depends on who draws first."""
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

    init: "official" starts the network at 0 in two factors and behind a ReLU, so that it stays there: masks then depend
        on neither time nor image. "working" gives the layer before that ReLU the usual random weights.
    initial: the logit that all begin with; 5 keeps every weight (form 1: P(0) = 3.5e-65).
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
    """One logit a weight, the same at all times: (o, i) for all images, or (images, o, i)."""

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
    """A fraction `ratio` of the weights is dropped by chance: the paper's fig. 1, an analysis and no improvement.

    window: False, each weight by itself; True, those whose values lie in a window at a random place in the layer's
        distribution (the paper doesn't say which, but its histograms of removed weights show narrow windows).
    """
    ratio: float
    window: bool = False
    layers: tuple[str, ...] = LAYERS
    gumbel: Gumbel = Gumbel()

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"the ratio of dropped weights must be between 0 and 1, not {self.ratio:g}")

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
class Masks:
    """How a run draws its masks.

    mode: "sample"; "threshold", 1 where that is likelier, without noise; "expected", the weights times P(1).
    fresh: new noise at every step (as published), or the same at all.
    shared: one noise for both halves of guidance, or (as published) one for each.
    """
    source: DynamicMasks | StaticMasks | RandomMasks
    mode: str = "sample"
    fresh: bool = True
    shared: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"the masks' mode is one of {', '.join(MODES)}, not {self.mode!r}")

    def start(self, unet: UNet, generators: list[torch.Generator] | None, images: int, halves: int = 1) -> "MaskRun":
        """What the sampling loop makes for a run. The generators only lend their seeds: the loop's own noise stays."""
        return MaskRun(self, unet, seeds_of(generators, images, self.mode), tuple(range(halves)))


def seeds_of(generators: list[torch.Generator] | None, images: int, mode: str = "sample") -> list[int]:
    if generators is None and mode == "sample":
        raise ValueError("masks are drawn at every step: pass generators, one per image")
    return [0] * images if generators is None else [g.initial_seed() for g in generators]


@dataclass
class MaskRun:
    """What one run knows of its masks: a local variable of the sampling loop, thrown away afterwards."""
    masks: Masks
    unet: UNet
    seeds: list[int]                               # one an image
    halves: tuple[int, ...]                        # with guidance 0, the rows without the prompt, and 1, those with it
    layers: dict[str, nn.Linear] = field(init=False)                   # that are masked, and the up blocks they are in
    levels: set[int] = field(init=False)
    cores: dict[tuple, Tensor | None] = field(default_factory=dict)    # by up block and halves; DeepCache reuses them
    kept: Tensor = field(init=False)               # sum of all masks so far, and how many
    total: Tensor = field(init=False)
    step: int = 0
    steps: tuple[int, ...] = (0,)                  # the present one, or those of a batch
    passes: list[int] = field(default_factory=list)
    index: list[int] | None = None                 # of each row's generator; None: all rows have one of their own
    states: Tensor | None = None                   # of all generators, for each up unit; None: nothing is drawn
    searches = False

    def __post_init__(self) -> None:
        self.layers = masked_layers(self.unet, self.masks.source.layers)
        self.levels = {int(name.split(".")[1]) for name in self.layers}
        self.kept = torch.zeros((), device=self.unet.conv_in.weight.device)
        self.total = torch.zeros_like(self.kept, dtype=torch.int64)

    def at(self, *steps: int, passes: list[int] | None = None) -> "MaskRun":
        """Set for this step, or for several in one batch. passes: each image's, where a search tries many."""
        self.step, self.steps, self.passes = steps[0], steps, [0] * len(self.seeds) if passes is None else passes
        self.make_states()
        return self

    def of(self, halves: tuple[int, ...]) -> "MaskRun":
        """Set for a batch of these halves of guidance."""
        if halves != self.halves:
            self.halves = halves
            self.make_states()
        return self

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """Of the batch: image, and what makes its noise."""
        return [(image, seed, step if self.masks.fresh else 0, 0 if self.masks.shared else half, k)
                for step in self.steps for half in self.halves
                for image, (seed, k) in enumerate(zip(self.seeds, self.passes))]

    def make_states(self) -> None:
        """This step's generators. Made in the U-Net, each step's would make a compiled graph of their own."""
        rows = self.rows
        different = list(dict.fromkeys(rows))
        self.index = None if len(different) == len(rows) else [different.index(row) for row in rows]
        if self.masks.mode == "sample" or isinstance(self.masks.source, RandomMasks):
            self.states = torch.stack([torch.stack([
                torch.Generator().manual_seed(mix(*row[1:], i)).get_state() for row in different])
                for i in range(len(self.unet.up_units()))])

    def search(self, predict: Callable[[], Tensor]) -> None:
        """`MaskSearch`'s place in the loop: these masks are given."""

    @property
    def density(self) -> float:
        """The part of the weights that was kept so far."""
        return float(self.kept) / max(int(self.total), 1)

    def unit(self, i: int, h: Tensor, skip: Tensor,
             emb: Tensor) -> Iterator[tuple[AttentionMasks, AttentionMasks]] | None:
        """The masks of up unit i, a pair for each TransformerBlock, made when asked for; None: nothing is masked.

        h, skip: (B, C', H, W), what enters the unit; only a block's first unit looks at it. emb: the time (B or 1, E).
        """
        config = self.unet.config
        level, j = divmod(i, config.layers + 1)
        prefix = f"up_blocks.{level}.attentions.{j}."
        if level not in self.levels:
            return None
        if j == 0:
            self.cores[level, self.halves] = self.masks.source.core(level, h, skip, emb)
        return self.blocks(prefix, config.depth[::-1][level], self.cores[level, self.halves], i)

    def blocks(self, prefix: str, depth: int, core: Tensor | None,
               i: int) -> Iterator[tuple[AttentionMasks, AttentionMasks]]:
        states = None if self.states is None else self.states[i].clone()
        for b in range(depth):
            names = [[f"{prefix}transformer_blocks.{b}.{attention}.{linear}" for linear in LINEARS]
                     for attention in ("attn1", "attn2")]
            yield tuple(AttentionMasks(*(self.mask(name, core, states) for name in four)) for four in names)

    def mask(self, name: str, core: Tensor | None, states: Tensor | None) -> Tensor | None:
        """One layer's mask (B, o, i), or (o, i) where all rows have the same; None: the layer is not masked."""
        if name not in self.layers:
            return None
        layer, source, mode = self.layers[name], self.masks.source, self.masks.mode

        def spread(x: Tensor) -> Tensor:                               # one row a generator -> one row of the batch
            return x[0] if len(x) == 1 else x if self.index is None else x[self.index]

        logits = source.logits(name, layer, core, states)
        if logits.dim() == 3 and core is None:
            logits = spread(logits)
        if mode == "expected":
            m = source.gumbel.probability(logits)
        elif mode == "threshold":
            m = source.gumbel.mask(logits, torch.full_like(logits, math.log(2)))
        else:
            noise = exponential(layer.weight.shape, states).to(logits.device)
            m = source.gumbel.mask(logits, spread(noise))
        self.kept, self.total = self.kept + m.detach().sum(), self.total + m.numel()
        return m


# ----------------------------------------------------------------------------------------------- the training-free path

@dataclass(frozen=True)
class MaskSearch:
    """At every step, before it is taken: gradient ascent of a score of the predicted x0, by the logits of the masks.

    score: clean latents (n, 4, h, w), VAE-scaled, to one number an image, differentiable: see `score_latents`.
    iterations: updates a step (the paper's lambda, 15 if None); the pass behind the last one goes on to the solver. 0:
        no search.
    schedule: "paper", so many at every step; "released": none at the first seven steps, 9 from then on (its 1 and 10
        iterations, since it uses the pass before its last update), so that `iterations` stays None, or 0.
    keep: "last", the mask after the last update, as published; "best", the one of all passes with the highest score.
    initial: the logits that every step begins with; 1 drops 6.6 % of the weights, as released.
    reset: a new optimiser at every step; False, as released: the moments of the step before go on acting.
    checkpointed: keep no activations of U-Net and score but compute them twice; the noise is the same both times. By
        the sizes of what autograd keeps, SD 1.5 at 512 pixels in float16 needs 7.4 GiB (U-Net 4.5, autoencoder 2.8)
        without it and 4.5 with it, beside 0.7 GiB for logits, gradients and optimiser, the weights, and the reward's.
    """
    score: Callable[[Tensor], Tensor]
    iterations: int | None = None
    schedule: str = "paper"
    keep: str = "last"
    lr: float = 1e-2
    weight_decay: float = 1e-2
    initial: float = 1.0
    reset: bool = True
    checkpointed: bool = False
    layers: tuple[str, ...] = LAYERS
    gumbel: Gumbel = Gumbel()

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(f"mask iterations must be 0 or more, not {self.iterations}")
        if self.schedule == "released" and self.iterations:
            raise ValueError(f"the mask search's released schedule has its own iterations: leave out "
                             f"{self.iterations}, or take the paper's schedule")
        for name, legal in (("schedule", ("paper", "released")), ("keep", ("last", "best"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"the mask search's {name} is {' or '.join(legal)}, not {getattr(self, name)!r}")

    def updates(self, step: int) -> int:
        if self.iterations == 0 or (self.schedule == "released" and step < 7):
            return 0
        return 9 if self.schedule == "released" else 15 if self.iterations is None else self.iterations

    def start(self, unet: UNet, generators: list[torch.Generator] | None, images: int, halves: int = 1) -> "SearchRun":
        """What the sampling loop makes for a run. Each image has logits of its own, for both halves of guidance."""
        source = StaticMasks(unet, self.layers, self.initial, self.gumbel, images).requires_grad_(False)
        return SearchRun(Masks(source, shared=True), unet, seeds_of(generators, images), tuple(range(halves)),
                         settings=self)


@dataclass
class SearchRun(MaskRun):
    """A `MaskRun` whose logits are looked for at each step."""
    settings: MaskSearch | None = None
    optimizer: torch.optim.Optimizer | None = None
    history: list[list[list[float]]] = field(default_factory=list)     # score by step, pass and image
    searches = True

    def search(self, predict: Callable[[], Tensor]) -> None:
        """Leaves the masks of this step behind. predict: x0 (n, 4, h, w) with the masks as they are set.

        InputError where memory runs out and where a score is not finite.
        """
        try:
            with torch.enable_grad():
                self.climb(predict)
        except FloatingPointError:
            raise InputError(f"the score of the masks, or its gradient, is not finite at step {self.step}: use "
                             "--dtype bfloat16 or float32, or lower --cfg-scale") from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
                raise InputError("out of memory in the search for masks: add --mask-checkpoint or --low-memory, or "
                                 "lower --width and --height (or --resolutions, --freescale), or --batch-size"
                                 ) from None
            raise

    def climb(self, predict: Callable[[], Tensor]) -> None:
        s, step, values = self.settings, self.step, list(self.masks.source.parameters())
        updates, images = s.updates(step), len(self.seeds)
        half = self.unet.conv_in.weight.dtype == torch.float16
        scale = 2.0 ** 12 if half else 1.0                             # the gradient of one pixel is 0 in float16
        for p in values:
            p.detach().fill_(s.initial)
            p.requires_grad_()
        if s.reset or self.optimizer is None:
            self.optimizer = torch.optim.AdamW(values, lr=s.lr, weight_decay=s.weight_decay)
        scores, best, kept = [], [0] * images, []
        for k in range(updates + (s.keep == "best")):
            self.at(step, passes=[k] * images)                         # fresh noise in every pass
            with torch.set_grad_enabled(k < updates):
                if s.checkpointed:
                    x0 = checkpoint(predict, use_reentrant=False, preserve_rng_state=False)
                    score = checkpoint(s.score, x0, use_reentrant=False, preserve_rng_state=False)
                else:
                    score = s.score(predict())
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
                (-scale * score).sum().backward()                      # of each image only its own logits know
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
        self.at(step, passes=best if s.keep == "best" else [updates] * images)


def score_latents(vae: "VAE", reward: Callable[[Tensor, list[str]], Tensor], prompts: list[str],
                  tile: Callable[[Tensor], int | None] = lambda latents: None) -> Callable[[Tensor], Tensor]:
    """A `MaskSearch`'s score by a reward of pictures (n, 3, H, W) in [0, 1] and their n prompts: larger is better.

    tile: of the VAE, by the latents that it is for.
    """
    def score(x0: Tensor) -> Tensor:
        z = x0 / vae.config.scaling
        images = vae.to(x0.device).decode(z, tile(z)).float() / 2 + 0.5                   # it may wait in main memory
        return reward(images.clamp(0, 1), prompts)
    return score


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
