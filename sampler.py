"""Samplers: from noise to a latent, in as many U-Net calls as there are steps.

Start at `generate`, the loop; it owns the step number. A solver (`ddim`, `dpm_solver`) is a small function that keeps
what it remembers to itself. `Plan` says which times a run visits and how much noise is left at each.
Everywhere x is what the U-Net was trained on, x = sqrt(alpha) x0 + sqrt(1 - alpha) eps, with alpha the "alpha-bar" of
DDPM. In these coordinates Euler's method is DDIM at other times, and ancestral Euler is DDIM with eta = 1: one formula
serves the three. (Elsewhere Euler runs on x / sqrt(alpha), whose noise level is sigma = sqrt((1 - alpha) / alpha).)
Sources: DDIM, arXiv 2010.02502; DPM-Solver++, arXiv 2211.01095; Euler and Karras' sigmas, arXiv 2206.00364; guidance,
arXiv 2207.12598. Checked against diffusers 0.42.1, whose times, betas and last steps are those of the published models.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from cache import DeepCache, FasterDiffusion, Features, Inherit, TextGate, TGate
    from freescale import FreeScale
    from freeu import FreeU
    from maskunet import Masks, MaskSearch
    from unet import PerUnit

SAMPLERS = ("ddim", "dpm++2m", "dpm++2m-karras", "euler", "euler-karras", "euler-a")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise that a model was trained with, and how its authors' samplers step through it."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    steps_offset: int = 1              # added to "leading" times
    set_alpha_to_one: bool = False     # DDIM's last step ends at alpha = 1, or (False) at the smallest trained noise
    spacing: str | None = None         # "leading", "linspace" or "trailing"; None: each sampler's own default

    def alphas(self) -> Tensor:
        """alpha-bar of every training timestep, (train_steps,) float32: square roots of the betas are evenly spaced."""
        betas = torch.linspace(self.beta_start ** 0.5, self.beta_end ** 0.5, self.train_steps, dtype=torch.float32) ** 2
        return torch.cumprod(1 - betas, dim=0)


@dataclass(frozen=True)
class Plan:
    """The times of a run of S steps: step i calls the U-Net at times[i] and leads from now[i] to after[i]."""
    sampler: str
    spacing: str
    times: tuple[float, ...]           # falling; times can repeat, so nothing is ever looked up by its time
    now: tuple[float, ...]             # alpha at each step
    after: tuple[float, ...]           # alpha behind it: the next step's, or near it (DDIM counts back a fixed stride)
    start_scale: float                 # the pure noise of step 0 is multiplied by this


def plan(sampler: str, steps: int, schedule: NoiseSchedule = NoiseSchedule(), spacing: str | None = None) -> Plan:
    """Which times to visit. spacing None: the schedule's own, else diffusers' default for the sampler.

    ValueError for an unknown sampler or spacing, and for steps outside 1..train_steps.
    """
    T = schedule.train_steps
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1 to {T}, not {steps}; 20 to 50 are usual")
    spacing = spacing or schedule.spacing or ("leading" if sampler == "ddim" else "linspace")
    solver, karras = sampler.removesuffix("-karras"), sampler.endswith("-karras")

    count = steps + 1 if solver == "dpm++2m" else steps                # DPM-Solver++ spaces one more and drops the last
    if spacing == "leading":
        times = np.arange(count)[::-1] * max(T // count, 1) + schedule.steps_offset
    elif spacing == "linspace":
        times = np.linspace(0, T - 1, count)[::-1]
    elif spacing == "trailing":
        times = np.round(T - np.arange(steps) * (T / steps)) - 1
    else:
        raise ValueError(f"unknown spacing {spacing!r}; there are leading, linspace, trailing")
    times = times[:steps].clip(0, T - 1)
    if not solver.startswith("euler"):
        times = times.round()                                          # Euler alone visits fractional times

    table = schedule.alphas().double().numpy()
    if solver == "ddim":
        back = times.astype(int) - T // steps
        after = np.where(back < 0, 1.0 if schedule.set_alpha_to_one else table[0], table[back.clip(0)])
        return Plan(sampler, spacing, tuple(times.tolist()), tuple(table[times.astype(int)].tolist()),
                    tuple(after.tolist()), start_scale=1.0)

    table_sigma = np.sqrt((1 - table) / table)
    sigma = np.interp(times, np.arange(T), table_sigma)
    if karras:
        high, low = (table_sigma[-1], table_sigma[0]) if solver == "dpm++2m" else (sigma[0], sigma[-1])
        sigma = karras_sigmas(low, high, steps)
        times = np.interp(np.log(sigma), np.log(table_sigma), np.arange(T))
        times = times.round() if solver == "dpm++2m" else times
    now = (1 / (1 + sigma ** 2)).tolist()
    # Euler's first x is noise without sqrt(alpha) x0, a little short of unit variance, unless the times are "leading"
    short = solver.startswith("euler") and spacing != "leading"
    return Plan(sampler, spacing, tuple(times.tolist()), tuple(now), (*now[1:], 1.0),
                start_scale=math.sqrt(1 - now[0]) if short else 1.0)


def karras_sigmas(low: float, high: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Noise levels from high to low, evenly spaced in their 1/rho-th power: eq. 5, arXiv 2206.00364."""
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


# ------------------------------------------------------------------------------------------------------------- solvers
# solver(plan, ...) -> step(i, x, x0, eps), which leads from step i's noise level to the one behind it.

Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def ddim(plan: Plan, eta: float, noise: Callable[[], Tensor]) -> Step:
    """DDIM, eq. 12 and 16 of arXiv 2010.02502; Euler; with eta = 1 ancestral Euler. noise() draws unit noise."""
    def step(i: int, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        now, after = plan.now[i], plan.after[i]
        variance = eta ** 2 * (1 - after) / (1 - now) * (1 - now / after)
        x = math.sqrt(after) * x0 + math.sqrt(max(1 - after - variance, 0)) * eps
        return x + math.sqrt(max(variance, 0)) * noise() if eta > 0 else x
    return step


def dpm_solver(plan: Plan) -> Step:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095: extrapolates x0 from this step's and the last step's."""
    last_x0, last_h = None, 0.0

    def step(i: int, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        nonlocal last_x0, last_h
        now, after = plan.now[i], plan.after[i]
        h = half_log_snr(after) - half_log_snr(now)
        d = x0
        if last_h > 0 and h < math.inf:                                # first order: first step, and to alpha = 1
            d = x0 + 0.5 * (h / last_h) * (x0 - last_x0)
        last_x0, last_h = x0, h
        return math.sqrt((1 - after) / (1 - now)) * x - math.sqrt(after) * math.expm1(-h) * d
    return step


def half_log_snr(alpha: float) -> float:
    """lambda = log(sqrt(alpha) / sqrt(1 - alpha))"""
    return math.inf if alpha == 1 else 0.5 * math.log(alpha / (1 - alpha))


# ------------------------------------------------------------------------------------------------------------ the loop

def generate(unet: Callable[..., Tensor], noise: Tensor, context: Tensor, negative_context: Tensor | None = None,
             steps: int = 30, sampler: str = "ddim", cfg_scale: float = 7.5, prediction: str = "epsilon",
             added: Tensor | None = None, negative_added: Tensor | None = None, spacing: str | None = None,
             eta: float = 0.0, generators: list[torch.Generator] | None = None,
             *, freeu: "FreeU | None" = None, cache: "DeepCache | FasterDiffusion | Inherit | None" = None,
             tgate: "TGate | None" = None, freescale: "FreeScale | None" = None,
             masks: "Masks | MaskSearch | None" = None,
             schedule: NoiseSchedule = NoiseSchedule(), init: Tensor | None = None, strength: float = 1.0,
             low_memory: bool = False) -> Iterator[tuple[int, Tensor]]:
    """Yields (step number, latents after that step); the last latents are the result, (B, 4, h, w), VAE-scaled.

    unet: a `UNet`, or any function (x, t, context, added) -> prediction, with t a scalar tensor. Gradients are recorded
        unless the caller says torch.no_grad().
    noise: (B, 4, h, w), unit variance; its dtype is the one that the solver computes in.
    context, negative_context: text embeddings (B, L, D). Guidance: negative + cfg_scale * (positive - negative), so
        that scale 1 is no guidance (and one pass instead of two) and 0 follows the negative prompt alone; a
        negative_context of None also means no guidance.
    prediction: what the U-Net predicts, "epsilon" or "v".
    added, negative_added: SDXL's added conditions (B, add_dim); a negative_added of None: the same for both.
    eta: 0 is DDIM, 1 as much noise as DDPM; for "ddim" and the "euler" samplers ("euler-a" is "euler" with eta 1).
    generators: one CPU generator per image; needed where noise is drawn at every step (eta > 0, "euler-a").
    freeu: factors on the U-Net's backbone and skips, see `freeu.py`.
    cache: run only a part of the U-Net between key steps, see `cache.py`; needs a `UNet`.
    tgate: from a step on, reuse the attention to the text, or drop guidance, or both, see `cache.py`; needs a `UNet`.
    freescale: run as a later stage of the cascade, from `init`, an enlarged picture; the settings' `restart` takes the
        place of `strength`. See `freescale.py`; needs generators.
    masks: masks on the weights of the U-Net's attention, given or searched for at each step, see `maskunet.py`; needs a
        `UNet`, and generators where masks are drawn.
    init, strength: start from these latents (B, 4, h, w), noised, and run only the last `strength` of the steps.
    low_memory: run the two halves of guidance one after the other: the same result with half the activations.
    """
    if freescale is not None and (init is None or generators is None):
        raise ValueError("FreeScale goes on from an enlarged picture: pass it as init, and generators, one per image")
    for name, given in (("cache", cache), ("tgate", tgate), ("masks", masks)):
        if given is not None and not hasattr(unet, "up_units"):
            raise ValueError(f"{name} needs a UNet, in which it acts, and a function was given: leave it out")
    p = plan(sampler, steps, schedule, spacing)
    eta = 1.0 if sampler == "euler-a" else eta
    check_settings(sampler, prediction, eta, generators, strength)
    step = dpm_solver(p) if sampler.startswith("dpm") else ddim(p, eta, lambda: draw_noise(generators, noise))

    stage = None if freescale is None else freescale.start(noise.shape[2:], steps, generators)
    start = 0 if init is None else steps - int(steps * strength)
    if freescale is not None:
        start = freescale.first_step(steps)
    if start == steps:                                                 # strength 0: nothing to do
        yield steps - 1, init.expand_as(noise)
        return
    x = noise * p.start_scale if init is None else math.sqrt(p.now[start]) * init + math.sqrt(1 - p.now[start]) * noise

    gate_step = steps if tgate is None else tgate.start(steps, start)[0]
    # Both halves of guidance run in one batch, or in two. What doesn't depend on x is computed once, before the loop.
    guided = negative_context is not None and cfg_scale != 1
    rows = [((0,), context, added)]
    if guided:
        negative_added = added if negative_added is None else negative_added
        rows = [((0,), negative_context, negative_added), ((1,), context, added)]
        if not low_memory:
            both = None if added is None else torch.cat([negative_added, added])
            rows = [((0, 1), torch.cat([negative_context, context]), both)]
    passes = [Pass(halves, *prepare(unet, text, p, extra), extra,
                   None if cache is None else cache.start(steps, {start, gate_step}, unet),
                   None if tgate is None else tgate.start(steps, start)[1]) for halves, text, extra in rows]
    drawn = None if masks is None else masks.start(unet, generators, len(noise), 1 + guided)
    if drawn is not None and drawn.searches and cache is not None and passes[0].features.parallel:
        raise ValueError("a search for masks needs every step's latents: use the cache without its parallel mode")

    def predict(x: Tensor, i: int) -> Tensor:
        """The guided prediction at step i, by all passes of the U-Net with the techniques that act there."""
        out = []
        for run in passes:
            techniques = {}                                            # nothing by default
            if freeu is not None and (now := freeu.at(i / steps)) is not None:
                techniques["freeu"] = now
            if run.gate is not None:
                techniques["gate"] = run.gate
            if drawn is not None:
                techniques["masks"] = drawn.of(run.halves)
            if stage is not None:
                techniques["freescale"] = stage.at(i)                  # in both halves the same windows
            if run.features is not None:
                techniques["cache"] = run.features.at(i)
            x_in = torch.cat([x.to(context.dtype)] * len(run.halves))
            if run.features is not None and run.features.parallel:
                out.append(run.features.decode_ahead(unet, x_in, i, run.shifts, run.text, freeu, run.gate, drawn,
                                                     stage))
            else:
                out.append(unet(x_in, run.shifts[i], run.text, run.added, **techniques))
        out = torch.cat(out).to(x.dtype)
        if guided:
            negative, positive = out.chunk(2)
            out = negative + cfg_scale * (positive - negative)
        return out

    # The noise in x at the start, which is all of it without a picture to start from
    prior = x if init is None else math.sqrt(1 - p.now[start]) * noise
    for i in range(start, steps):
        if i == gate_step:                                             # a key step of any cache
            dropped = guided and tgate.guidance == "drop"
            first, last = passes[0], passes[-1]                        # the same where both halves are one batch
            for run in passes:
                if run.gate is not None:
                    run.gate.close(None if first is last else first.gate, average=dropped and run is last)
            if dropped:                                                # only the prompt's rows go on
                guided = False
                passes = [Pass((1,), *prepare(unet, context, p, added), added, last.features, last.gate)]
        if stage is not None and i > start:                            # at the start x is the noised picture itself
            x = stage.mix(x, init, noise, p.now[i], p.times[i], schedule.train_steps)
        if cache is not None:
            x = passes[0].features.inject(x, prior, p.times[i])
        if drawn is not None:                                          # a search tries masks on this step's x0
            drawn.at(i)
            drawn.search(lambda: x0_and_eps(x, predict(x, i), p.now[i], prediction)[0])  # noqa: B023
        out = predict(x, i)
        if cache is not None and passes[0].features.parallel:
            x = passes[0].features.inject(x, prior, p.times[i], late=True)
        x = step(i, x, *x0_and_eps(x, out, p.now[i], prediction))
        yield i, x


class Pass(NamedTuple):
    """One call of the U-Net at a step, for one half of guidance or for both in one batch."""
    halves: tuple[int, ...]                 # 0: the rows of the negative prompt (or without guidance), 1: the prompt's
    text: "Tensor | PerUnit"
    shifts: "Tensor | list[PerUnit]"
    added: Tensor | None
    features: "Features | None"             # each pass has state of its own
    gate: "TextGate | None"


def check_settings(sampler: str, prediction: str, eta: float, generators: list[torch.Generator] | None,
                   strength: float) -> None:
    """ValueError for what `generate` can't do."""
    if prediction not in ("epsilon", "v"):
        raise ValueError(f"prediction is 'epsilon' or 'v', not {prediction!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta:g}")
    if eta > 0 and sampler.startswith("dpm"):
        raise ValueError(f"{sampler} is deterministic: leave eta at 0, or use ddim or euler-a")
    if eta > 0 and generators is None:
        raise ValueError(f"{sampler} with eta {eta:g} draws noise at every step: pass generators, one per image")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, not {strength:g}")


def prepare(unet: Callable[..., Tensor], context: Tensor, plan: Plan,
            added: Tensor | None) -> tuple["Tensor | PerUnit", "Tensor | list[PerUnit]"]:
    """What doesn't depend on x: the text's keys and values, once a run, and the shifts of all its times at once.

    For a function that is no `UNet`, the context and the times as they are.
    """
    times = torch.tensor(plan.times, device=context.device)
    if not hasattr(unet, "embed_text"):
        return context, times
    return unet.embed_text(context), unet.embed_schedule(times, added)


def invert(unet: Callable[..., Tensor], latents: Tensor, context: Tensor, steps: int = 30, prediction: str = "epsilon",
           added: Tensor | None = None, spacing: str | None = None, schedule: NoiseSchedule = NoiseSchedule(),
           ) -> Iterator[tuple[int, Tensor]]:
    """DDIM backwards: from VAE-scaled latents to the noise from which `generate` (ddim, no guidance) remakes them.

    Yields (step number of the step undone, latents before it), from the last step to step 0. Exact only in the limit of
    many steps: the prediction is made at the step's own time but from the latents behind it (arXiv 2105.05233, app. F).
    """
    p = plan("ddim", steps, schedule, spacing)
    text, shifts = prepare(unet, context, p, added)
    x = latents
    for i in reversed(range(steps)):
        out = unet(x.to(context.dtype), shifts[i], text, added).to(x.dtype)
        x0, eps = x0_and_eps(x, out, p.after[i], prediction)
        x = math.sqrt(p.now[i]) * x0 + math.sqrt(1 - p.now[i]) * eps
        yield i, x


def x0_and_eps(x: Tensor, out: Tensor, alpha: float, prediction: str) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise that x = sqrt(alpha) x0 + sqrt(1 - alpha) eps consists of, by the prediction."""
    a, s = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction == "v":                                              # v = a eps - s x0, arXiv 2202.00512
        return a * x - s * out, a * out + s * x
    return (x - s * out) / a, out


def draw_noise(generators: list[torch.Generator], like: Tensor) -> Tensor:
    """Unit noise shaped like (B, ...): row k from generator k, drawn on the CPU in float32 whatever the device."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)
