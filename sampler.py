"""Samplers: from noise to a latent, one U-Net call after the other.

Start at `generate`, the loop: it counts the calls and names every technique that acts on latents. A solver (`ddim`,
`dpm_solver`, `heun`) is a small function that remembers what it needs of earlier calls. `Plan` lists a run's calls.
Everywhere x is what the U-Net was trained on, x = sqrt(alpha) x0 + sqrt(1 - alpha) eps, with alpha the "alpha-bar" of
DDPM. In these coordinates Euler's method is DDIM at other times, and ancestral Euler is DDIM with eta = 1: one formula
serves all three. (Elsewhere Euler runs on x / sqrt(alpha), whose noise level is sigma = sqrt((1 - alpha) / alpha).)
Sources: DDIM, arXiv 2010.02502; DPM-Solver++, arXiv 2211.01095; Euler, Heun and Karras' sigmas, arXiv 2206.00364;
guidance, arXiv 2207.12598. Checked against diffusers 0.42.1, whose times, betas and last steps are those of the
published models.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unet import OFF, Techniques, UNet

SAMPLERS = ("ddim", "dpm++2m", "dpm++2m-karras", "euler", "euler-karras", "euler-a", "heun", "heun-karras")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise that a model was trained with, and how its authors' samplers step through it."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    steps_offset: int = 1              # added to "leading" times
    set_alpha_to_one: bool = False     # DDIM's last step ends at alpha = 1, or (False) at the smallest trained noise
    spacing: str | None = None         # "leading", "linspace" or "trailing"; None: each sampler's own default
    betas: str = "scaled_linear"       # their square roots are evenly spaced, or ("linear") they themselves

    def alphas(self) -> Tensor:
        """alpha-bar of every training timestep, (train_steps,) float32."""
        power = 0.5 if self.betas == "scaled_linear" else 1
        betas = torch.linspace(self.beta_start ** power, self.beta_end ** power, self.train_steps, dtype=torch.float32)
        betas = betas ** 2 if self.betas == "scaled_linear" else betas
        return torch.cumprod(1 - betas, dim=0)


@dataclass(frozen=True)
class Plan:
    """The calls of a run: call i is made at times[i] and leads from noise level now[i] to after[i].

    A denoising step is one call of the U-Net, or two with Heun's method. begins[i]: does call i begin a denoising step?
    """
    sampler: str
    spacing: str
    solver: "Callable[[Plan, Callable[[], Tensor]], Step]"
    eta: float
    prediction: str                    # what the U-Net predicts, "epsilon" or "v"
    train_steps: int
    times: tuple[float, ...]           # descending; a time can repeat, so calls are looked up by number only
    now: tuple[float, ...]             # alpha at each call
    after: tuple[float, ...]           # alpha after each call: the next call's, or near it (DDIM: a fixed stride away)
    begins: tuple[bool, ...]
    start_scale: float                 # the noise that the first call begins with is multiplied by this

    @property
    def calls(self) -> int:
        return len(self.times)

    @property
    def steps(self) -> int:
        return sum(self.begins)

    def step(self, i: int) -> int:
        """The number of the step that call i belongs to."""
        return sum(self.begins[:i + 1]) - 1

    def fraction(self, i: int) -> float:
        """The fraction of all steps that come before the step of call i: from 0 to below 1."""
        return self.step(i) / self.steps

    def first_call(self, step: int) -> int:
        """The number of the call that begins a step; for the step after the last, the number of calls."""
        return [*(i for i, begins in enumerate(self.begins) if begins), self.calls][step]


def plan(sampler: str, steps: int, schedule: NoiseSchedule = NoiseSchedule(), spacing: str | None = None,
         eta: float = 0.0, prediction: str = "epsilon") -> Plan:
    """The calls of a run of `steps` denoising steps. spacing None: the schedule's, or diffusers' for the sampler.

    eta: 0 adds no noise, 1 as much as DDPM; for "ddim" and "euler" only ("euler-a" is "euler" with eta 1).
    ValueError for an unknown sampler, spacing or prediction, for steps outside 1..train_steps, for an eta outside 0..1
    and for an eta above 0 with a deterministic sampler.
    """
    T = schedule.train_steps
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1 to {T}, not {steps}; 20 to 50 are usual")
    if prediction not in ("epsilon", "v"):
        raise ValueError(f"prediction is 'epsilon' or 'v', not {prediction!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta:g}")
    if eta > 0 and sampler.startswith(("dpm", "heun")):
        raise ValueError(f"{sampler} is deterministic: leave eta at 0, or use ddim or euler-a")
    spacing = spacing or schedule.spacing or ("leading" if sampler == "ddim" else "linspace")
    name, karras = sampler.removesuffix("-karras"), sampler.endswith("-karras")
    solver, eta = SOLVERS[name], 1.0 if name == "euler-a" else eta

    count = steps + 1 if name == "dpm++2m" else steps                  # DPM-Solver++ spaces one more and drops the last
    if spacing == "leading":
        times = np.arange(count)[::-1] * max(T // count, 1) + schedule.steps_offset
    elif spacing == "linspace":
        times = np.linspace(0, T - 1, count)[::-1]
    elif spacing == "trailing":
        times = np.round(T - np.arange(steps) * (T / steps)) - 1
    else:
        raise ValueError(f"unknown spacing {spacing!r}; there are leading, linspace, trailing")
    times = times[:steps].clip(0, T - 1)
    if not name.startswith(("euler", "heun")):
        times = times.round()                                          # only Euler and Heun use fractional times

    table = schedule.alphas().double().numpy()
    if name == "ddim":
        back = times.astype(int) - T // steps
        now = table[times.astype(int)].tolist()
        after = np.where(back < 0, 1.0 if schedule.set_alpha_to_one else table[0], table[back.clip(0)]).tolist()
        start_scale = 1.0
    else:
        table_sigma = np.sqrt((1 - table) / table)
        sigma = np.interp(times, np.arange(T), table_sigma)
        if karras:
            high, low = (table_sigma[-1], table_sigma[0]) if name == "dpm++2m" else (sigma[0], sigma[-1])
            sigma = karras_sigmas(low, high, steps)
            times = np.interp(np.log(sigma), np.log(table_sigma), np.arange(T))
            times = times.round() if name == "dpm++2m" else times
        now = (1 / (1 + sigma ** 2)).tolist()
        after = [*now[1:], 1.0]
        # Euler and Heun begin with x = sqrt(1 - alpha) eps, of variance just below 1; with "leading", of variance 1
        short = name.startswith(("euler", "heun")) and spacing != "leading"
        start_scale = math.sqrt(1 - now[0]) if short else 1.0
    times, begins = times.tolist(), [True] * steps
    if solver is heun:                                                 # every step but the last has a second call
        times, now = ([x for pair in zip(row, row[1:]) for x in pair] + row[-1:] for row in (times, now))
        after, begins = [x for x in after[:-1] for _ in range(2)] + after[-1:], [i % 2 == 0 for i in range(len(now))]
    return Plan(sampler, spacing, solver, eta, prediction, T, tuple(times), tuple(now), tuple(after), tuple(begins),
                start_scale)


def karras_sigmas(low: float, high: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Noise levels from high to low, evenly spaced in their 1/rho-th power: eq. 5, arXiv 2206.00364."""
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


# ------------------------------------------------------------------------------------------------------------- solvers
# solver(plan, noise) -> step(i, x, x0, eps), which leads from noise level now[i] to after[i]; noise() draws unit noise.

Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def ddim(plan: Plan, noise: Callable[[], Tensor]) -> Step:
    """DDIM, eq. 12 and 16 of arXiv 2010.02502. Also Euler's method and, with eta = 1, ancestral Euler."""
    def step(i: int, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        now, after = plan.now[i], plan.after[i]
        variance = plan.eta ** 2 * (1 - after) / (1 - now) * (1 - now / after)
        x = math.sqrt(after) * x0 + math.sqrt(max(1 - after - variance, 0)) * eps
        return x + math.sqrt(max(variance, 0)) * noise() if plan.eta > 0 else x
    return step


def dpm_solver(plan: Plan, noise: Callable[[], Tensor]) -> Step:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095: extrapolates from the x0 of this and of the previous step."""
    last_x0, last_h = None, 0.0

    def step(i: int, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        nonlocal last_x0, last_h
        now, after = plan.now[i], plan.after[i]
        h = half_log_snr(after) - half_log_snr(now)
        d = x0
        if last_h > 0 and h < math.inf:                                # first order: in the first step, or to alpha = 1
            d = x0 + 0.5 * (h / last_h) * (x0 - last_x0)
        last_x0, last_h = x0, h
        return math.sqrt((1 - after) / (1 - now)) * x - math.sqrt(after) * math.expm1(-h) * d
    return step


def heun(plan: Plan, noise: Callable[[], Tensor]) -> Step:
    """Heun's method, algorithm 1 of arXiv 2206.00364: Euler's step, redone with the mean slope of its two ends."""
    start = None                                                       # x, alpha and slope at the start of the step

    def step(i: int, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        nonlocal start
        now, after = plan.now[i], plan.after[i]
        if plan.begins[i]:
            start = x, now, eps
            return math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
        x, now, slope = start
        return math.sqrt(after) * (x / math.sqrt(now) + (sigma_of(after) - sigma_of(now)) * (slope + eps) / 2)
    return step


SOLVERS = {"ddim": ddim, "dpm++2m": dpm_solver, "euler": ddim, "euler-a": ddim, "heun": heun}


def sigma_of(alpha: float) -> float:
    """The noise level of x / sqrt(alpha)."""
    return math.sqrt((1 - alpha) / alpha)


def half_log_snr(alpha: float) -> float:
    """lambda = log(sqrt(alpha) / sqrt(1 - alpha))"""
    return math.inf if alpha == 1 else 0.5 * math.log(alpha / (1 - alpha))


# ------------------------------------------------------------------------------------------------------------ the loop

class Condition(NamedTuple):
    """The U-Net's inputs besides latents and time: text (B, L, D) and, for SDXL, pooled text and sizes (B, add_dim).

    words: the B texts themselves, for techniques that read them.
    """
    context: Tensor
    added: Tensor | None = None
    words: tuple[str, ...] = ()


@dataclass
class Run:
    """What is known when a run begins. From it, `settings.start(run)` makes the state of a technique for this run.

    acting: these states, by the name of their field in `Techniques`. A state's method at(calls, halves) returns the
    value of that field for one call, or for several calls that are decoded in one batch; halves are the numbers of the
    branches in it. Optional are halves(i, halves), the branches that call i needs, and alike(i, j), see below.
    """
    unet: Callable[..., Tensor]
    plan: Plan
    first: int                                 # the first call that is made; above 0 in img2img
    noise: Tensor                              # (B, 4, h, w), unit variance
    init: Tensor | None
    branches: tuple[Condition, ...]            # the negative prompt and the prompt, or only the prompt
    generators: list[torch.Generator] | None
    turns: set[int] = field(default_factory=set)                       # calls that must not reuse anything older
    acting: dict[str, Any] = field(default_factory=dict)
    known: dict[tuple[int, ...], tuple] = field(default_factory=dict)  # see `inputs`

    def network(self, technique: str) -> UNet:
        """The U-Net, for a technique that needs its layers. ValueError if `unet` is a plain function."""
        if not hasattr(self.unet, "units"):
            raise ValueError(f"{technique} needs a UNet, but a plain function was given: leave the technique out")
        return self.unet

    def halves(self, i: int) -> tuple[int, ...]:
        """The numbers of the branches that call i needs: all, unless a technique drops one."""
        halves = tuple(range(len(self.branches)))
        for state in self.acting.values():
            halves = state.halves(i, halves) if hasattr(state, "halves") else halves
        return halves

    def on(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> Techniques:
        """The techniques that act in the U-Net in one call of these branches, or in several calls in one batch."""
        now = {name: state.at(calls, halves) for name, state in self.acting.items()}
        return Techniques(**now) if any(acts is not None for acts in now.values()) else OFF

    def alike(self, i: int, j: int) -> bool:
        """Can calls i and j be decoded in one batch?"""
        return all(state.alike(i, j) for state in self.acting.values() if hasattr(state, "alike"))

    def inputs(self, halves: tuple[int, ...]) -> tuple[Any, Any, Tensor | None]:
        """Times per call, text and added condition for a batch of these branches. Made once: they don't depend on x."""
        if halves not in self.known:
            contexts, added, _ = zip(*(self.branches[half] for half in halves))
            context, added = torch.cat(contexts), None if added[0] is None else torch.cat(added)
            self.known[halves] = (*prepare(self.unet, context, self.plan, added), added)
        return self.known[halves]


def generate(unet: Callable[..., Tensor], noise: Tensor, prompt: Condition, negative: Condition | None, plan: Plan,
             cfg_scale: float = 7.5, init: Tensor | None = None, strength: float = 1.0,
             generators: list[torch.Generator] | None = None, low_memory: bool = False,
             **techniques: Any) -> Iterator[tuple[int, Tensor]]:
    """Yields (number of the call, latents after it); the last latents are the result, (B, 4, h, w), VAE-scaled.

    unet: a `UNet`, or any function (x, t, context, added) -> prediction, with t a scalar tensor. Gradients are recorded
        unless the caller uses torch.no_grad().
    noise: (B, 4, h, w), unit variance; the solver computes in its dtype.
    negative, cfg_scale: guidance is negative + cfg_scale * (prompt - negative). A scale of 1, or None as negative,
        means no guidance, with one branch instead of two; 0 follows only the negative prompt.
    init, strength: add noise to these latents (B, 4, h, w) and run only the last steps, `strength` (0..1) of them all.
    generators: one CPU generator per image; needed if noise is drawn at every step (eta > 0, "euler-a").
    low_memory: run the branches of guidance one after the other: the same result with half the activations.
    techniques: settings by the name of their field in `unet.Techniques`, such as freeu=FreeU(1.3, 1.4, 0.9, 0.2).
    """
    run = begin(unet, noise, prompt, negative, plan, cfg_scale, init, strength, generators, techniques)
    if run.first == plan.calls:                                        # strength 0: nothing to do
        yield plan.calls - 1, init.expand_as(noise)
        return
    freescale, highres, cache, masks = (run.acting.get(name) for name in ("freescale", "highres", "cache", "masks"))

    def call(x: Tensor, i: int, halves: tuple[int, ...]) -> Tensor:
        """One pass of the U-Net for these branches."""
        times, text, added = run.inputs(halves)
        on = run.on((i,), halves)
        rows = torch.cat([x.to(prompt.context.dtype)] * len(halves))
        return unet(rows, times[i], text, added, **({} if on is OFF else {"on": on}))

    if cache is not None and cache.parallel:                           # Faster Diffusion: several calls in one batch
        call = cache.ahead
    if highres is not None:                                            # DemoFusion: windows and parts of the latent
        call = highres.around(call)

    def predict(x: Tensor, i: int) -> Tensor:
        """The guided prediction of call i, arXiv 2207.12598: both branches in one batch, or one after the other."""
        halves = run.halves(i)
        out = torch.cat([call(x, i, some) for some in ([(half,) for half in halves] if low_memory else [halves])])
        if len(halves) == 1:
            return out.to(x.dtype)
        without, with_prompt = out.to(x.dtype).chunk(2)
        base = without if highres is None else highres.base(x, i, without)     # ScaleCrafter: with fewer dilated layers
        return base + cfg_scale * (with_prompt - without)

    def clean(x: Tensor, i: int) -> Tensor:
        return x0_and_eps(x, predict(x, i), plan.now[i], plan.prediction)[0]

    unit = lambda: draw_noise(generators, noise)
    step = plan.solver(plan, unit)
    x = noise * plan.start_scale if init is None else add_noise(init, noise, plan.now[run.first])
    for i in range(run.first, plan.calls):
        if plan.begins[i]:
            if freescale is not None:                                  # detail control: mixed with the enlarged picture
                x = freescale.mix(i, x)
            if cache is not None:                                      # Faster Diffusion: prior noise injection
                x = cache.inject(i, x)
            if masks is not None and masks.search(i, x, clean):        # training-free masks: searched for by its x0
                step = plan.solver(plan, unit)                         # as released: the solver forgets earlier steps
        out = predict(x, i)
        if cache is not None and plan.begins[i]:                       # the same injection, in the released order
            x = cache.inject(i, x, predicted=True)
        x = step(i, x, *x0_and_eps(x, out, plan.now[i], plan.prediction))
        yield i, x


def begin(unet: Callable[..., Tensor], noise: Tensor, prompt: Condition, negative: Condition | None, plan: Plan,
          cfg_scale: float, init: Tensor | None, strength: float, generators: list[torch.Generator] | None,
          techniques: dict[str, Any]) -> Run:
    """A run with the states of its techniques, before its first call. ValueError for arguments that don't fit."""
    if plan.eta > 0 and generators is None:
        raise ValueError(f"{plan.sampler} with eta {plan.eta:g} draws noise at every step: pass generators, one per "
                         "image")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, not {strength:g}")
    for name in techniques:
        if name not in Techniques._fields:
            raise TypeError(f"there is no technique {name!r}; there are {', '.join(Techniques._fields)}")
    techniques = {name: techniques[name] for name in Techniques._fields if techniques.get(name) is not None}
    step = 0 if init is None else plan.steps - int(plan.steps * strength)
    for settings in techniques.values():
        if hasattr(settings, "first_step"):                            # FreeScale's later stages
            step = settings.first_step(plan.steps)
    branches = (prompt,) if negative is None or cfg_scale == 1 else (negative, prompt)
    run = Run(unet, plan, plan.first_call(step), noise, init, branches, generators)
    if run.first < plan.calls:                                         # strength 0: there is no call
        ask = [settings for settings in techniques.values() if hasattr(settings, "turns")]
        run.turns.update({run.first}, *(settings.turns(plan, run.first, tuple(noise.shape[2:])) for settings in ask))
        for name, settings in techniques.items():
            run.acting[name] = settings.start(run)
    return run


def prepare(unet: Callable[..., Tensor], context: Tensor, plan: Plan, added: Tensor | None) -> tuple[Any, Any]:
    """The shifts per call, and the text's keys and values; for a plain function, the times and the text unchanged."""
    times = torch.tensor(plan.times, device=context.device)
    if not hasattr(unet, "units"):
        return times, context
    return unet.embed_schedule(times, added), unet.embed_text(context)


def invert(unet: Callable[..., Tensor], latents: Tensor, prompt: Condition, plan: Plan) -> Iterator[tuple[int, Tensor]]:
    """DDIM inversion: from VAE-scaled latents to the noise that `generate`, without guidance, turns back into them.

    plan: one for "ddim". Yields (number of the inverted call, latents before it), from the last call to call 0. Exact
    only in the limit of many steps: each prediction is made at the time of the call, but from the latents after it
    (arXiv 2105.05233, app. F).
    """
    times, text = prepare(unet, prompt.context, plan, prompt.added)
    x = latents
    for i in reversed(range(plan.calls)):
        out = unet(x.to(prompt.context.dtype), times[i], text, prompt.added).to(x.dtype)
        x0, eps = x0_and_eps(x, out, plan.after[i], plan.prediction)
        x = add_noise(x0, eps, plan.now[i])
        yield i, x


def add_noise(x0: Tensor, noise: Tensor, alpha: float) -> Tensor:
    return math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * noise


def x0_and_eps(x: Tensor, out: Tensor, alpha: float, prediction: str) -> tuple[Tensor, Tensor]:
    """The clean latent x0 and the noise eps of x = sqrt(alpha) x0 + sqrt(1 - alpha) eps, from the U-Net's output."""
    a, s = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction == "v":                                              # v = a eps - s x0, arXiv 2202.00512
        return a * x - s * out, a * out + s * x
    return (x - s * out) / a, out


def draw_noise(generators: list[torch.Generator], like: Tensor) -> Tensor:
    """Unit noise shaped like (B, ...): row k from generator k, always drawn on the CPU in float32."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)
