"""sampler.py: the times it visits, its solvers against exact answers, and where its noise comes from."""
import json
import math

import pytest
import torch
from conftest import DATA, randn, seeded
from safetensors import safe_open
from torch import Tensor

import sampler
from freescale import FreeScale
from sampler import Condition, NoiseSchedule, generate, invert, plan

FACTS = json.loads((DATA / "schedules.json").read_text())              # printed by diffusers 0.42.1
CASES = [(family, name) for family in FACTS for name in FACTS[family] if name != "shipped"]
ONE = torch.ones(1, 4, 2, 2)


def told(value: float | Tensor = 0.0, batch: int = 1) -> Condition:
    """A text of one number, or the numbers of a text."""
    return Condition(value if isinstance(value, Tensor) else torch.full((batch, 1, 1), value))


def last(model, noise: Tensor, plan: sampler.Plan, negative: Condition | None = None, *more, prompt=None,
         **settings) -> Tensor:
    """The result of a run, without guidance unless there is a negative prompt."""
    prompt = told(batch=len(noise)) if prompt is None else prompt
    *_, (_, x) = generate(model, noise, prompt, negative, plan, *more, **settings)
    return x


def names(case: str) -> tuple[str, int]:
    """"euler_karras_20" -> ("euler-karras", 20)"""
    name, steps = case.rsplit("_", 1)
    name = name.replace("_leading", "").replace("_trailing", "").replace("dpmpp2m", "dpm++2m")
    return name.replace("_", "-"), int(steps)


@pytest.mark.parametrize("family,case", CASES)
def test_times_and_noise_levels_are_those_of_the_published_schedulers(family, case):
    fact, shipped = FACTS[family][case], FACTS[family]["shipped"]
    schedule = NoiseSchedule(steps_offset=shipped["steps_offset"], set_alpha_to_one=shipped["set_alpha_to_one"])
    p = plan(*names(case), schedule, fact["spacing"])
    assert p.times == pytest.approx(fact["timesteps"], abs=2e-3)
    if "sigmas" in fact:
        sigmas = [math.sqrt((1 - a) / a) for a in (*p.now, p.after[-1])]
        assert sigmas == pytest.approx(fact["sigmas"], rel=2e-5, abs=1e-7)
        if not p.sampler.startswith("dpm"):       # their x is ours times sqrt(1 + sigma^2)
            assert p.start_scale * math.sqrt(1 + sigmas[0] ** 2) == pytest.approx(fact["init_noise_sigma"], rel=1e-5)


def test_spacing_defaults_to_the_models_own_then_to_the_samplers():
    assert plan("euler", 20).spacing == "linspace" and plan("ddim", 20).spacing == "leading"
    assert plan("euler", 20, NoiseSchedule(spacing="leading")).spacing == "leading"
    assert plan("euler", 20, NoiseSchedule(spacing="leading"), "trailing").spacing == "trailing"


def point_model(target: Tensor, prediction: str = "epsilon"):
    """The exact denoiser of a world with one picture in it: every solver must arrive at `target`."""
    alphas = NoiseSchedule().alphas().double()
    sigma = ((1 - alphas) / alphas).sqrt()

    def model(x, t, context, added):
        low = t.double().floor().long().clamp(max=998)
        s = torch.lerp(sigma[low], sigma[low + 1], t.double() - low)         # linear in sigma between training times
        a = 1 / (1 + s ** 2)
        eps = (x - a.sqrt() * target) / (1 - a).sqrt()
        return eps if prediction == "epsilon" else (a.sqrt() * eps - (1 - a).sqrt() * target)
    return model


@pytest.mark.parametrize("name", sampler.SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_sampler_finds_the_only_picture_there_is(name, prediction, spacing):
    target, noise = randn(2, 4, 3, 5).double(), randn(2, 4, 3, 5, seed=1).double()
    p = plan(name, 12, NoiseSchedule(set_alpha_to_one=True), spacing, prediction=prediction)
    x = last(point_model(target, prediction), noise, p, generators=seeded(0, 1))
    # DDIM with linspace or trailing times ends above t = 0; dpm++2m-karras rounds times, so its model is off by as much
    loose = name == "ddim" and spacing != "leading" or "karras" in name or name == "dpm++2m"
    assert p.steps == 12 and (x - target).abs().max() < (0.1 if loose else 1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 999, 1000])
@pytest.mark.parametrize("name", sampler.SAMPLERS)
def test_one_to_a_thousand_steps_stay_finite(name, steps):
    for spacing in ("leading", "linspace", "trailing"):
        x = last(lambda x, *_: 0.3 * x, ONE, plan(name, steps, spacing=spacing), generators=seeded(0))
        assert x.isfinite().all()


def test_guidance_scale_1_is_the_positive_pass_and_0_the_negative():
    def model(x, t, context, added):
        return 0.1 * x + context.mean(dim=(1, 2))[:, None, None, None]

    def run(prompt, negative, scale):
        return last(model, ONE, plan("ddim", 4), negative, scale, prompt=prompt)
    a, b = told(0.5), told(-0.25)
    assert torch.equal(run(a, b, 1), run(a, None, 7.5))
    assert torch.equal(run(a, b, 0), run(b, None, 7.5))
    assert torch.allclose(run(a, b, 3), run(told(2.0), None, 1), atol=1e-6)           # -0.25 + 3 * 0.75


def test_per_step_noise_belongs_to_the_image_not_to_the_batch():
    def run(*seeds):
        generators = seeded(*seeds)
        noise = sampler.draw_noise(generators, torch.empty(len(seeds), 4, 3, 3))
        return last(lambda x, *_: 0.3 * x, noise, plan("euler-a", 5), generators=generators)
    assert torch.equal(run(3, 4)[1], run(4)[0])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta_is_the_share_of_ddpms_deviation_in_the_noise_of_every_step(eta):
    p, zero = plan("ddim", 10, eta=eta), torch.zeros(1).double()
    step = p.solver(p, lambda: torch.ones(1).double())
    for i, (a, b) in enumerate(zip(p.now, p.after)):
        assert step(i, zero, zero, zero).item() == pytest.approx(eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b)))


def test_a_run_keeps_no_memory_of_the_one_before():
    p = plan("dpm++2m", 6)
    once, twice = (list(generate(lambda x, *_: torch.sin(3 * x), ONE, told(), None, p)) for _ in range(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(once, twice))


def test_inversion_leads_back_to_the_latents_as_steps_grow():
    def model(x, t, context, added):
        return torch.tanh(x) * (0.5 + t / 2000)
    latents, errors = torch.linspace(-2, 2, 16).reshape(1, 4, 2, 2).double(), []
    said = told(torch.zeros(1, 1, 1, dtype=torch.float64))
    for steps in (20, 200):
        *_, (first, noise) = invert(model, latents, said, plan("ddim", steps))
        again = last(model, noise, plan("ddim", steps), prompt=said)
        errors.append((again - latents).abs().max().item())
        assert first == 0
    assert errors[1] < 0.2 * errors[0] < 0.1


def test_img2img_runs_the_last_part_of_the_steps():
    noise, p, seen = torch.zeros(1, 4, 2, 2), plan("ddim", 10), []

    def model(x, t, context, added):
        seen.append(float(t))
        return torch.zeros_like(x)
    calls = [i for i, _ in generate(model, noise, told(), None, p, init=ONE, strength=0.3)]
    assert calls == [7, 8, 9] and seen == list(p.times[7:])
    assert torch.equal(last(model, noise, p, init=ONE, strength=0.0), ONE)


# --------------------------------------------------------------------------------------------------- Heun's two calls

@pytest.mark.parametrize("source", ["diffusers", "k-diffusion"])
def test_heuns_method_equals_other_implementations_at_every_step(source):
    with safe_open(DATA / "heun.safetensors", framework="pt") as file:
        want, seed = file.get_tensor(source), json.loads(file.metadata()["manifest"])[source]["seed"]
    noise, p = sampler.draw_noise(seeded(seed, seed + 1), want[0]), plan("heun-karras", 8)
    calls = [x for _, x in generate(lambda x, t, *_: torch.tanh(0.3 * x + torch.cos(t.double() / 150)), noise,
                                    told(torch.zeros(2, 1, 1, dtype=torch.float64)), None, p)]
    ends = [x for x, begins in zip(calls, [*p.begins[1:], True]) if begins]
    assert (p.calls, p.steps, len(ends)) == (15, 8, 8)
    assert (torch.stack(ends) - want).abs().max() < 1e-6          # times are float32 here, and alphas there


def test_every_step_of_heuns_method_but_the_last_has_a_second_call_where_the_first_led_to():
    p = plan("heun", 4)
    assert p.begins == (True, False) * 3 + (True,) and [p.first_call(step) for step in range(5)] == [0, 2, 4, 6, 7]
    assert [p.fraction(i) for i in range(7)] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75]
    for i in (1, 3, 5):
        assert (p.times[i], p.now[i]) == (p.times[i + 1], p.after[i - 1]) and p.now[i] == p.after[i]


class Noted:
    """In the place of a technique that acts on latents: notes the calls at which the loop asks it to."""
    parallel = False

    def __init__(self):
        self.calls = {"mix": [], "inject": [], "inject after": [], "search": []}

    def start(self, run) -> "Noted":
        return self

    def at(self, calls, halves) -> None:
        return None

    def mix(self, i: int, x: Tensor) -> Tensor:
        self.calls["mix"].append(i)
        return x

    def inject(self, i: int, x: Tensor, predicted: bool = False) -> Tensor:
        self.calls["inject after" if predicted else "inject"].append(i)
        return x

    def search(self, i: int, x: Tensor, clean) -> None:
        self.calls["search"].append(i)


@pytest.mark.parametrize("strength,steps", [(1.0, [0, 1, 2, 3]), (0.5, [2, 3])])
@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_what_acts_on_latents_acts_once_per_step_at_its_first_call(name, strength, steps):
    noted, p = Noted(), plan(name, 4)
    last(lambda x, *_: 0.3 * x, ONE, p, init=ONE, strength=strength, freescale=noted, cache=noted, masks=noted)
    assert all(calls == [p.first_call(step) for step in steps] for calls in noted.calls.values()), noted.calls


@pytest.mark.parametrize("settings,words", [
    (dict(sampler="plms"), "ddim, dpm"), (dict(steps=0), "1 to 1000"), (dict(steps=1001), "1 to 1000"),
    (dict(spacing="even"), "trailing"), (dict(prediction="x0"), "epsilon"), (dict(eta=1.5), "between 0 and 1"),
    (dict(sampler="dpm++2m", eta=0.5), "deterministic"), (dict(sampler="heun", eta=0.5), "deterministic")])
def test_bad_plans_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        plan(**{"sampler": "ddim", "steps": 10} | settings)


@pytest.mark.parametrize("eta,settings,error,words", [
    (0.5, {}, ValueError, "generators"), (0, dict(strength=1.5), ValueError, "between 0 and 1"),
    (0, dict(freescale=FreeScale(2)), ValueError, "pass it as init"), (0, dict(freeyou=1), TypeError, "'freeyou'")])
def test_bad_runs_are_named(eta, settings, error, words):
    with pytest.raises(error, match=words):
        last(lambda x, *_: x, ONE, plan("ddim", 10, eta=eta), **settings)
