"""maskunet.py: against outputs of the official code, the odds of every mask, what can learn, and what stays."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, NARROW, ROOT, UNETS, XL, baseline, digest, official, randn, rms, seeded, weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import txt2img
from cache import DeepCache, FasterDiffusion, Inherit, TGate
from command import InputError
from folder import TINY
from freescale import FreeScale
from freeu import FreeU, SkipTuning
from maskunet import (
    LAYERS,
    DynamicMasks,
    Gumbel,
    Lift,
    MaskFile,
    MaskGenerator,
    MaskRun,
    Masks,
    MaskSearch,
    RandomMasks,
    Search,
    SearchRun,
    StaticMasks,
    exponential,
    load_masks,
    masked_layers,
    save_masks,
    weight_digest,
)
from reward import load_reward
from sampler import SAMPLERS, Condition, begin, generate, plan
from stable_diffusion import StableDiffusion
from unet import CONFIGS, OFF, Techniques, UNet, linear, sinusoid

GOLDEN = load_file(DATA / "maskunet.safetensors")


def draws(*seeds: int, shape: tuple[int, ...] = (1000, 1000)) -> torch.Tensor:
    """Exponential noise, a row for each seed."""
    return exponential(shape, torch.tensor(seeds))


def random_dynamic(unet: UNet, **settings) -> DynamicMasks:
    """Masks as after a training: every tensor random, about half of the weights kept."""
    masks = DynamicMasks(unet, **settings).requires_grad_(False)
    for k, p in enumerate(masks.parameters()):
        p.copy_(0.3 * randn(*p.shape, seed=k))
    return masks


def masked(layer: nn.Linear, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The layer with this mask on its weight."""
    class Given:
        def of(self, layer: nn.Linear) -> torch.Tensor:
            return layer.weight * mask
    return linear(layer, x, Techniques(masks=Given()))


def call(masks: Masks | None, unet: UNet = UNETS[NARROW], batch: int = 2, step: int = 0) -> torch.Tensor:
    """One pass of the U-Net under these masks (None: without)."""
    on = OFF if masks is None else Techniques(masks=MaskRun(masks, unet, list(range(batch))).at((step,), (0,)))
    return unet(randn(batch, 4, 8, 8), torch.full((batch,), 500), randn(batch, 5, 8, seed=1), on=on)


def arguments(masks, unet: UNet = UNETS[NARROW], seeds: tuple[int, ...] = (0, 1), steps: int = 6, sampler: str = "ddim",
              size: tuple[int, int] = (8, 8), **more) -> dict:
    """The arguments of a guided run, for `generate`."""
    rows = lambda first, *shape: torch.cat([randn(1, *shape, seed=seed + first) for seed in seeds])
    context, added = rows(10, 5, 8), rows(20, unet.config.add_dim) if unet.config.add_dim else None
    return dict(unet=unet, noise=rows(0, 4, *size), prompt=Condition(context, added),
                negative=Condition(0 * context, added), plan=plan(sampler, steps), masks=masks,
                **{"generators": seeded(*seeds), "cfg_scale": 3} | more)


def trajectory(masks, *how, **more) -> list[torch.Tensor]:
    """The latents after every step of a guided run."""
    return [x for _, x in generate(**arguments(masks, *how, **more))]


# -------------------------------------------------------------------------------------------------- official outputs

def released(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): p for name, p in GOLDEN.items() if name.startswith(prefix)}


def official_parts() -> tuple[MaskGenerator, Lift, nn.Linear]:
    """The official generator, adapter and layer in our classes: 1x1 convolutions are matrices."""
    generator, layer = MaskGenerator(24, 16, 1280, "working", True, True), nn.Linear(12, 20).requires_grad_(False)
    lift = Lift(generator.core, layer, 5.0)
    g, a = released("A.gen."), released("A.adapter.")
    names = {"time": "proj_temb", "fc1": "conv_kernel_mask.0", "fc2": "conv_kernel_mask.2", "rows": "conv_in",
             "columns": "conv_out"}
    for module, theirs in ((generator, g), (lift, a)):
        for name, p in module.named_parameters():
            part, kind = name.split(".")
            p.data.copy_(theirs[f"{names[part]}.{kind}"].view_as(p))
    layer.load_state_dict(released("A.linear."))
    return generator, lift, layer


def test_generator_lift_mask_and_layer_equal_the_official_ones_and_so_do_all_gradients():
    generator, lift, layer = official_parts()
    values = released("A.in.")
    core = generator(values["sample"], values["res_sample"], values["temb"])
    logits = lift(core)
    logits.retain_grad()
    mask = Gumbel().mask(logits, GOLDEN["A.noise.exp"])
    y = masked(layer, values["x"], mask)
    for got, name in ((core, "gen"), (logits, "logits"), (y, "y")):
        assert (got - GOLDEN[f"A.out.{name}"]).abs().max() <= 2e-6
    assert torch.equal(mask.detach(), GOLDEN["A.out.mask"])
    (y * values["grad_y"]).sum().backward()
    want = released("A.grad.")
    pairs = [(logits.grad, want["logits"]), (lift.rows.weight.grad, want["adapter.conv_in.weight"]),
             (lift.rows.bias.grad, want["adapter.conv_in.bias"]),
             (lift.columns.weight.grad, want["adapter.conv_out.weight"]),
             (lift.columns.bias.grad, want["adapter.conv_out.bias"]),
             (generator.fc1.weight.grad, want["gen.conv_kernel_mask.0.weight"]),
             (generator.fc1.bias.grad, want["gen.conv_kernel_mask.0.bias"]),
             (generator.fc2.weight.grad, want["gen.conv_kernel_mask.2.weight"]),
             (generator.fc2.bias.grad, want["gen.conv_kernel_mask.2.bias"]),
             (generator.time.weight.grad.abs().max(), want["gen.proj_temb.weight_absmax"])]
    for got, theirs in pairs:
        assert (got.flatten() - theirs.flatten()).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_shared_mask_equals_the_official_one():
    layer = nn.Linear(12, 20)
    layer.load_state_dict(released("C.linear."))
    logits = GOLDEN["C.logits"].clone().requires_grad_()
    mask = Gumbel().mask(logits, GOLDEN["C.noise.exp"])
    y = masked(layer, GOLDEN["A.in.x"], mask)
    (y * GOLDEN["A.in.grad_y"]).sum().backward()
    assert torch.equal(mask.detach(), GOLDEN["C.out.mask"]) and (y - GOLDEN["C.out.y"]).abs().max() <= 1e-6
    assert (logits.grad - GOLDEN["C.grad.logits"]).abs().max() <= 1e-6


# ------------------------------------------------------------------------------------------------- the Gumbel-sigmoid

def test_a_mask_is_exactly_zero_or_one_and_compares_the_noise_with_the_logits_exponential():
    logits, noise = 2 * randn(300, 300), draws(0, shape=(300, 300))[0]
    assert torch.equal(Gumbel().mask(logits, noise), (noise < logits.exp()).float())
    assert torch.equal(Gumbel(2).mask(logits, noise), (noise < torch.log1p(logits.exp())).float())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for gumbel in (Gumbel(), Gumbel(2), Gumbel(threshold=0.3), Gumbel(temperature=0.1, threshold=0.9)):
            assert gumbel.mask(logits.to(dtype), noise.to(dtype)).unique().tolist() == [0, 1]


def binomial(p: float, n: int) -> float:
    """Four standard deviations of a frequency."""
    return max(4 * math.sqrt(p * (1 - p) / n), 1e-9)


@pytest.mark.parametrize("gumbel,odds", [
    (Gumbel(), {1: .934012, 0: .632121, -1: .307799, 5: 1.0}),
    (Gumbel(2), {1: .731059, 0: .5, -1: .268941, 5: .993307}),
    (Gumbel(1, temperature=0.7, threshold=0.8), {0.5: 1 - math.exp(-math.exp(0.5) * 0.25 ** 0.7)}),
    (Gumbel(2, temperature=0.7, threshold=0.8), {0.5: 1 / (1 + math.exp(-0.5) * 4 ** 0.7)})])
def test_the_density_is_that_of_one_gumbel_or_of_two(gumbel, odds):
    noise = draws(0)[0]
    for logit, p in odds.items():
        assert abs(gumbel.mask(torch.full_like(noise, logit), noise).mean() - p) <= binomial(p, noise.numel())
        assert torch.allclose(gumbel.probability(torch.tensor(float(logit))), torch.tensor(p), atol=1e-6)


def test_without_chance_the_likelier_value_is_taken():
    logits = torch.linspace(-2, 2, 999)
    for form in (1, 2):
        gumbel = Gumbel(form)
        likelier = (gumbel.probability(logits) > 0.5).float()
        assert torch.equal(gumbel.mask(logits, torch.full_like(logits, math.log(2))), likelier)
        assert 0.3 < likelier.mean() < 0.7


def test_the_gradient_of_a_mask_is_that_of_the_sigmoid():
    layer, x, r = nn.Linear(12, 20), randn(5, 7, 12), randn(5, 7, 20, seed=1)
    logits, noise = randn(20, 12, seed=2).requires_grad_(), draws(0, shape=(20, 12))[0]
    (masked(layer, x, Gumbel().mask(logits, noise)) * r).sum().backward()
    soft = torch.sigmoid(logits.detach() - noise.log())
    want = torch.einsum("bno,bni->oi", r, x) * layer.weight.detach() * soft * (1 - soft)
    assert (logits.grad - want).abs().max() <= 1e-6 * want.abs().max()
    for logit, scale in ((5.0, 6.56e-3), (1.0, 0.1509)):               # the two published initial logits
        logits = torch.full((1000, 1000), logit, requires_grad=True)
        Gumbel().mask(logits, draws(0)[0]).sum().backward()
        assert abs(logits.grad.mean() - scale) <= 0.01 * scale


def test_a_draw_of_zero_makes_no_mask_of_an_infinite_logit_undefined(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.zeros(shape))       # happens once in 2^24 draws
    noise = draws(0, shape=(2,))[0]
    for form in (1, 2):
        assert torch.equal(Gumbel(form).mask(torch.tensor([-math.inf, math.inf]), noise), torch.tensor([0.0, 1.0]))
    for window in (False, True):
        run = MaskRun(Masks(RandomMasks(1.0, window)), UNETS[NARROW], [0])
        assert not any(run.at((0,), (0,)).of(layer).any() for layer in run.places)


def test_noise_has_mean_one_and_comes_from_the_generators_alone():
    state = torch.random.get_rng_state()
    a, b = draws(0, 1, shape=(300, 300))
    call(Masks(random_dynamic(UNETS[NARROW])))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(a.mean() - 1) < 0.02 and abs(a.var() - 1) < 0.05 and not torch.equal(a, b)
    assert torch.equal(draws(1, shape=(300, 300))[0], b)


@pytest.mark.parametrize("settings,words", [
    (dict(form=3), "1 or 2 Gumbels"), (dict(temperature=0), "temperature above 0"),
    (dict(threshold=1), "between 0 and 1")])
def test_bad_gumbel_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Gumbel(**settings)


# --------------------------------------------------------------------------------------------- layers and their masks

def test_the_masked_layers_of_sd15_are_the_published_72_and_the_network_has_the_published_size():
    with torch.device("meta"):
        unet = UNet(CONFIGS["sd15"])
    layers = masked_layers(unet)
    masks = DynamicMasks(unet)
    assert len(layers) == 72 and sum(layer.weight.numel() for layer in layers.values()) == 49_029_120
    assert sum(p.numel() for p in masks.lifts.parameters()) == 40_934_784
    # less the fourth generator, of the block without attention, which the released code has and never calls
    assert sum(p.numel() for p in masks.generators.parameters()) == 43_616_256 - 16_752_704
    assert len(masked_layers(unet, ("attn2.to_k", "attn2.to_v"))) == 18


@pytest.mark.parametrize("size", [(2, 7, 12, 20), (3, 64, 16, 16), (1, 5, 8, 16)])
def test_a_mask_of_ones_changes_nothing_and_rows_have_their_own(size):
    b, n, i, o = size
    x, mask = randn(b, n, i), (randn(b, o, i, seed=1) > 0).float()
    for layer in (nn.Linear(i, o), nn.Linear(i, o, bias=False)):
        assert torch.equal(masked(layer, x, torch.ones(o, i)), layer(x))
        assert (masked(layer, x, torch.ones(b, o, i)) - layer(x)).abs().max() <= 1e-6
        want = torch.stack([F.linear(x[k], layer.weight * mask[k], layer.bias) for k in range(b)])
        assert (masked(layer, x, mask) - want).abs().max() <= 1e-6
        assert torch.equal(masked(layer, x, mask[0])[0], F.linear(x, layer.weight * mask[0], layer.bias)[0])


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "xl"])
def test_off_is_off_and_fresh_masks_keep_everything(config):
    unet = UNETS[config]
    plain = trajectory(None, unet, steps=2)[-1]
    assert torch.equal(trajectory(Masks(StaticMasks(unet, initial=5.0), "threshold"), unet, steps=2)[-1], plain)
    for init in ("official", "working"):
        got = trajectory(Masks(DynamicMasks(unet, init=init).requires_grad_(False)), unet, steps=2)[-1]
        assert (got - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert torch.equal(trajectory(None, unet, steps=2)[-1], plain)


def test_every_masked_layer_acts_and_only_those():
    unet = UNETS[NARROW]
    plain = call(None)
    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
                 "attn2.to_out.0"):
        masks = Masks(StaticMasks(unet, (name,), initial=-math.inf), "threshold")    # the whole layer is dropped
        other = UNet(NARROW).requires_grad_(False)
        other.load_state_dict({key: p * (not key.startswith("up_blocks") or not key.endswith(f"{name}.weight"))
                               for key, p in unet.state_dict().items()})
        assert torch.equal(call(masks), call(None, other)) and not torch.equal(call(masks), plain)


def test_the_density_is_set_by_the_initial_logits():
    unet = UNETS[NARROW]
    for initial, p in ((0.0, 0.632121), (5.0, 1.0)):
        for masks in (StaticMasks(unet, initial=initial), DynamicMasks(unet, initial=initial)):
            run = MaskRun(Masks(masks), unet, [0, 1])
            unet(randn(2, 4, 8, 8), torch.tensor(500), randn(2, 5, 8), on=Techniques(masks=run.at((0,), (0,))))
            assert run.total == 2 * sum(layer.weight.numel() for layer in masked_layers(unet).values())
            assert abs(run.density - p) <= binomial(p, run.total)


def test_the_expected_weights_are_the_mean_over_many_draws():
    layer, x, logits = nn.Linear(12, 20), randn(1, 7, 12), randn(20, 12, seed=1)
    with torch.no_grad():
        mean = torch.stack([masked(layer, x, Gumbel().mask(logits, e))
                            for e in draws(*range(2000), shape=(20, 12))]).mean(dim=0)
        assert (mean - masked(layer, x, Gumbel().probability(logits))).abs().max() < 0.05


def test_modes_without_chance_need_no_generators_and_repeat():
    unet = UNETS[NARROW]
    for mode in ("threshold", "expected"):
        masks = Masks(random_dynamic(unet), mode)
        a, b = (trajectory(masks, steps=2, generators=g)[-1] for g in (None, seeded(7, 8)))
        assert torch.equal(a, b) and not torch.equal(a, trajectory(None, steps=2)[-1])
    with pytest.raises(ValueError, match="pass generators, one per image"):
        trajectory(Masks(random_dynamic(unet)), generators=None)
    with pytest.raises(ValueError, match="sample, threshold, expected"):
        Masks(random_dynamic(unet), "often")


def test_noise_is_that_of_seed_step_branch_attempt_and_layer_unless_it_is_fixed_or_shared():
    unet = UNETS[NARROW]
    masks, layers = StaticMasks(unet, initial=0.0), [
        layer for layer in masked_layers(unet).values() if layer.weight.shape == (16, 16)]

    def drawn(step: int, layer: nn.Linear = layers[0], attempts: tuple[int, ...] = (), **how) -> torch.Tensor:
        run = MaskRun(Masks(masks, **how), unet, [0, 1], list(attempts))
        return run.at((step,), (0, 1)).of(layer).detach()              # rows: branch, then image
    m = drawn(0)
    assert all(not torch.equal(m[j] != 0, m[k] != 0) for j in range(4) for k in range(j))
    assert torch.equal(drawn(0), m) and not torch.equal(drawn(1), m)
    assert not torch.equal(drawn(0, layers[1]) != 0, m != 0)
    tried = drawn(0, attempts=(0, 1))
    assert torch.equal(tried[::2], m[::2]) and not torch.equal(tried[1], m[1]) and not torch.equal(tried[3], m[3])
    assert torch.equal(drawn(1, fixed=True), drawn(0, fixed=True))
    shared = drawn(1, shared=True)
    assert torch.equal(shared[:2], shared[2:]) and not torch.equal(shared[0], shared[1])


def test_noise_does_not_depend_on_what_else_is_drawn():
    """One image or two, one branch or two, one call or two in a batch, all layers or one: the same masks."""
    unet, masks = UNETS[NARROW], StaticMasks(UNETS[NARROW], initial=0.0)
    layer = list(masked_layers(unet).values())[20]
    whole = MaskRun(Masks(masks), unet, [3, 4]).at((5, 6), (0, 1))
    rows = [(call, half, seed) for call in (5, 6) for half in (0, 1) for seed in (3, 4)]
    for _ in range(2):                                                 # nor on how often
        for (i, half, seed), weight in zip(rows, whole.of(layer)):
            assert torch.equal(MaskRun(Masks(masks), unet, [seed]).at((i,), (half,)).of(layer), weight)


def test_masks_take_nothing_from_the_loops_noise():
    plain, masked = (trajectory(masks, sampler="euler-a", steps=3)[-1] for masks in (
        None, Masks(DynamicMasks(UNETS[NARROW]).requires_grad_(False))))
    assert (plain - masked).abs().max() <= 1e-5 * plain.abs().max()


# --------------------------------------------------------------------------------------------------- random masks

def test_random_masks_drop_the_asked_ratio_by_chance_or_a_window_of_neighbouring_values():
    w, noise, both = nn.Linear(400, 300), draws(0, shape=(300, 400))[0], torch.tensor([0, 1])
    for ratio in (0.0, 0.001, 0.05, 0.5, 1.0):
        scattered = Gumbel().mask(RandomMasks(ratio).logits("", w, None, None), noise) == 0
        windows = Gumbel().mask(RandomMasks(ratio, window=True).logits("", w, None, both), torch.ones(())) == 0
        assert abs(scattered.float().mean() - ratio) <= binomial(ratio, 120_000)
        assert windows.sum(dim=(1, 2)).tolist() == [round(ratio * 120_000)] * 2
        if ratio == 0.05:
            dropped, every = [w.weight[window] for window in windows], w.weight.max() - w.weight.min()
            assert all(d.max() - d.min() < 0.2 * every for d in dropped)
            assert abs(dropped[0].mean() - dropped[1].mean()) > 0.01
            assert w.weight[scattered].max() - w.weight[scattered].min() > 0.9 * every
    places = RandomMasks(0.4, window=True).logits("", nn.Linear(2, 2), None, torch.arange(100)).unique(dim=0)
    assert [int((place == -math.inf).sum()) for place in places] == [2] * 3      # all two neighbours among four values


def test_random_masks_are_the_same_for_both_branches_and_new_in_each_layer_and_at_each_step_unless_fixed():
    run = SimpleNamespace(network=lambda name: UNETS[NARROW], generators=seeded(0))
    for masks in (RandomMasks(0.1), RandomMasks(0.1, window=True), RandomMasks(0.1, window=True, fixed=True)):
        state = masks.start(run)
        layers = [layer for layer in state.places if layer.weight.shape == (16, 16)]
        first, other, later = (state.at((i,), (half,)) for i, half in ((0, 0), (0, 1), (1, 0)))
        assert torch.equal(first.of(layers[0]), other.of(layers[0]))
        assert torch.equal(first.of(layers[0]), later.of(layers[0])) == masks.fixed
        lowest = [layer.weight[first.of(layer) == 0].min() for layer in layers]
        assert len({int((layer.weight < low).sum()) for layer, low in zip(layers, lowest)}) > 5


# ------------------------------------------------------------------------------------------------------ what can learn

def test_the_lift_is_two_convolutions_and_of_low_rank():
    generator, lift, _ = official_parts()
    core = randn(2, 4, 6)
    rows, columns = nn.Conv2d(4, 20, 1), nn.Conv2d(6, 12, 1)
    rows.load_state_dict({"weight": lift.rows.weight[..., None, None], "bias": lift.rows.bias})
    columns.load_state_dict({"weight": lift.columns.weight[..., None, None], "bias": lift.columns.bias})
    want = columns(rows(core[..., None]).squeeze(3).transpose(1, 2)[..., None]).squeeze(3).transpose(1, 2)
    assert (lift(core) - want).abs().max() <= 1e-6
    lift = Lift((4, 6), nn.Linear(40, 50), 5.0).double()
    for k, p in enumerate(lift.parameters()):
        nn.init.normal_(p, generator=seeded(k)[0])
    assert torch.linalg.matrix_rank(lift(core.double())[0]) == 4 + 2
    network = MaskGenerator(256, 64, 32, "working", True, True)        # Kaiming's normal weights, as released
    assert abs(network.fc1.weight.std() / math.sqrt(2 / 256) - 1) < 0.05
    assert not network.fc1.bias.any() and not network.fc2.bias.any()


def gradient_steps(init: str) -> dict[str, int]:
    """At which of four optimiser steps each tensor of block 1 first has a gradient that is not exactly zero."""
    unet = UNETS[NARROW]
    masks = DynamicMasks(unet, init=init, initial=0.0)
    optimizer, first = torch.optim.AdamW(masks.parameters(), lr=1e-2), {}
    for step in range(4):
        optimizer.zero_grad()
        call(Masks(masks), step=step).square().mean().backward()
        for name, p in masks.named_parameters():
            if "/1/attentions/0" in name or name.startswith("generators.1"):
                if p.grad.abs().max() > 0:
                    first.setdefault(name.replace("up_blocks/1/attentions/0/transformer_blocks/0/", ""), step)
        optimizer.step()
    assert all(p.grad is None for p in unet.parameters())
    return first


def test_gradients_reach_every_tensor_in_three_steps_and_never_the_official_network():
    parts = (("columns.weight", 0), ("columns.bias", 0), ("rows.bias", 1), ("rows.weight", 1))
    tail = {f"lifts.{layer}.{p}".replace(".to_out.0.", ".to_out/0.").replace(".to_", "/to_"): step
            for layer in LAYERS for p, step in parts}
    network = {f"generators.1.{p}": 2 for p in ("time.weight", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    assert gradient_steps("working") == tail | network
    assert gradient_steps("official") == {name: step for name, step in tail.items() if not name.endswith("rows.weight")}


def learn_which_half(init: str, form: int, steps: int = 150) -> float:
    """The mean loss of the last steps of a task that only a mask that depends on the time can solve.

    At time 0 a layer's first inputs count and at time 900 its last ones.
    """
    with torch.random.fork_rng():
        torch.random.manual_seed(1)
        generator = MaskGenerator(16, 16, 32, init, True, True)
        layer = nn.Linear(16, 8, bias=False).requires_grad_(False)
        lift = Lift(generator.core, layer, 1.0)
    optimizer, g = torch.optim.AdamW([*generator.parameters(), *lift.parameters()], lr=2e-2), seeded(1)[0]
    losses, h = [], torch.zeros(32, 8, 1, 1)
    for _ in range(steps):
        late, x = torch.randint(2, (32,), generator=g), torch.randn(32, 4, 16, generator=g)
        keep = torch.stack([torch.arange(16) < 8, torch.arange(16) >= 8])[late].float()
        noise = exponential((8, 16), torch.randint(2 ** 31, (32,), generator=g))
        mask = Gumbel(form).mask(lift(generator(h, h, sinusoid(900.0 * late, 32))), noise)
        loss = (masked(layer, x, mask) - layer(x * keep[:, None])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize("form", [1, 2])
def test_only_the_working_network_learns_a_mask_that_depends_on_the_time(form):
    assert learn_which_half("working", form) < 0.02
    assert learn_which_half("official", form) > 0.12


def test_what_the_network_does_not_see_does_not_matter():
    unet = UNETS[NARROW]

    def core(masks: DynamicMasks, image: int, time: int) -> torch.Tensor:
        return masks.generators["1"](randn(1, 16, 2, 2, seed=image), randn(1, 16, 2, 2), randn(1, 32, seed=time))
    both, no_time, no_sample = (random_dynamic(unet, **s) for s in ({}, dict(time=False), dict(sample=False)))
    for masks, image_acts, time_acts in ((both, True, True), (no_time, True, False), (no_sample, False, True)):
        assert torch.equal(core(masks, 0, 0), core(masks, 1, 0)) != image_acts
        assert torch.equal(core(masks, 0, 0), core(masks, 0, 1)) != time_acts


# ---------------------------------------------------------------------------------------------------------- together

def nearness(x0: torch.Tensor, words: tuple[str, ...] = ()) -> torch.Tensor:
    """A score: how near each image's latents are to fixed ones."""
    return -(x0 - randn(1, *x0.shape[1:], seed=9)).square().mean(dim=(1, 2, 3))


def constant(x0: torch.Tensor, words: tuple[str, ...]) -> torch.Tensor:
    return 0 * x0.sum(dim=(1, 2, 3))


def climb(iterations: int | None, score=nearness, **more) -> Search:
    return Search(MaskSearch(iterations=iterations, **more), score)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masks_and_a_search_work_with_every_sampler_and_leave_its_history_and_noise_alone(sampler):
    def run(masks) -> list[torch.Tensor]:
        return trajectory(masks, sampler=sampler, steps=3)
    plain, drawn, searched = run(None), run(climb(0)), run(climb(1))
    for found in (run(Masks(random_dynamic(UNETS[NARROW]))), drawn, searched):
        assert found[-1].isfinite().all() and not torch.equal(found[-1], plain[-1])
    assert not torch.equal(searched[-1], drawn[-1])
    idle = run(climb(1, constant, keep="best"))                        # its first pass stays best
    assert all(torch.equal(a, b) for a, b in zip(idle, drawn))


LARGER, FACTORS = FreeScale(((64, 64), (96, 128)), native=8, restart=0.5), FreeU(1.3, 1.4, 0.9, 0.2)
COMPANIONS = {"nothing": {}, "FreeScale": dict(freescale=LARGER), "T-GATE": dict(tgate=TGate(2)),
              "all with DeepCache": dict(freescale=LARGER, tgate=TGate(2), cache=DeepCache(2, 4), freeu=FACTORS),
              "Faster Diffusion": dict(cache=FasterDiffusion((0, 2)), freeu=FACTORS, skips=SkipTuning(0.8)),
              "DeepCache": dict(cache=DeepCache(2, 0)), "Inherit": dict(cache=Inherit("mid:u0-u2", 2))}


@pytest.mark.parametrize("config,companions", [*((NARROW, name) for name in COMPANIONS), (XL, "all with DeepCache"),
                                               (XL, "Faster Diffusion")])
@pytest.mark.parametrize("kind", ["learned", "windows", "search"])
def test_every_kind_of_masks_composes_with_everything_in_one_batch_and_in_two_passes(kind, config, companions):
    more, unet = COMPANIONS[companions], UNETS[config]
    size = (12, 16) if "freescale" in more else (8, 8)
    masks = {"learned": Masks(random_dynamic(unet)), "windows": RandomMasks(0.3, window=True), "search": climb(1)}[kind]

    def draw(masks, seeds: tuple[int, ...] = (0, 1), more=more, **rest) -> torch.Tensor:
        given = arguments(masks, unet, seeds=seeds, steps=3, size=size, **more, **rest)
        *_, (_, x) = generate(**given, init=0.5 * given["noise"] if "freescale" in more else None)
        return x
    whole = draw(masks)
    assert whole.isfinite().all() and not torch.allclose(whole, draw(None), atol=1e-3)
    if companions != "nothing":
        assert not torch.equal(draw(masks, more={}), whole)            # the companions act too
    assert torch.allclose(draw(masks, seeds=(0,))[0], whole[0], atol=1e-3)                # whoever is drawn beside it
    assert torch.allclose(draw(masks, low_memory=True), whole, atol=1e-3)


def test_a_cache_that_reuses_nothing_changes_nothing_under_masks():
    masks = Masks(random_dynamic(UNETS[NARROW]))
    plain = trajectory(masks, steps=3)[-1]
    for cache in (DeepCache(1, 3), FasterDiffusion(1, alpha=0.0)):
        assert torch.equal(trajectory(masks, steps=3, cache=cache)[-1], plain)


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "xl"])
def test_parallel_faster_diffusion_draws_the_same_masks_as_the_serial_one(config):
    unet = UNETS[config]
    masks = Masks(random_dynamic(unet))
    one, many = (trajectory(masks, unet, cache=FasterDiffusion((0, 1, 4), parallel=p))[-1] for p in (False, True))
    assert (one - many).abs().max() <= 1e-4 * one.abs().max()


# --------------------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("make", [
    random_dynamic, lambda unet: StaticMasks(unet, ("attn2.to_k",), initial=0.5),
    lambda unet: random_dynamic(unet, time=False, sample=False, gumbel=Gumbel(2, 0.5, 0.4))])
def test_masks_survive_a_file(make, tmp_path):
    masks = make(UNETS[NARROW])
    save_masks(masks, tmp_path / "m.safetensors", UNETS[NARROW], {"steps": 7})
    again = load_masks(tmp_path / "m.safetensors", UNETS[NARROW])
    bound = MaskFile(tmp_path / "m.safetensors", fixed=True, shared=True).bind(SimpleNamespace(unet=UNETS[NARROW]))
    assert (bound.mode, bound.fixed, bound.shared) == ("sample", True, True)
    assert again.settings == masks.settings and again.gumbel == masks.gumbel and again.layers == masks.layers
    assert torch.equal(call(Masks(masks)), call(Masks(again)))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_file_of_another_kind_for_another_model_or_with_nan_is_refused_by_name(tmp_path):
    path, unet = tmp_path / "m.safetensors", UNETS[NARROW]
    save_masks(DynamicMasks(unet), path, unet)
    with pytest.raises(InputError, match=r"another model .its lifts.up_blocks/1/.*to_k.columns.* \(8,.* has \(12,"):
        load_masks(path, UNet(replace(NARROW, context_dim=12)))
    with pytest.raises(InputError, match="doesn't know, the first is (generators|lifts).*: python train.py masks"):
        load_masks(path, UNETS[XL])
    masks = StaticMasks(unet)
    next(masks.parameters()).data[0, 0] = math.nan
    save_masks(masks, path, unet)
    with pytest.raises(InputError, match="is damaged: .* is not finite"):
        load_masks(path, unet)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match="not a file of masks"):
        load_masks(path, unet)
    with pytest.raises(InputError, match="there is no file .*train the masks"):
        load_masks(tmp_path / "none.safetensors", unet)


def test_masks_fit_their_model_in_every_dtype_and_no_other_of_its_shape(tmp_path):
    path, unet = tmp_path / "m.safetensors", UNETS[NARROW]
    save_masks(StaticMasks(unet), path, unet)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        same = UNet(NARROW).requires_grad_(False).to(dtype)
        same.load_state_dict(unet.state_dict())
        load_masks(path, same)
    tiny = {name: p * 1e-9 for name, p in unet.state_dict().items()}   # rounds to zeros, and zeros have signs as well
    whole, half = UNet(NARROW), UNet(NARROW).half()
    for other in (whole, half):
        other.load_state_dict(tiny)
    assert weight_digest(whole) == weight_digest(half) and not half.up_blocks[1].attentions[0].\
        transformer_blocks[0].attn1.to_q.weight.any()
    next(iter(masked_layers(whole).values())).weight.data[0, 0] *= -1
    with pytest.raises(InputError, match=f"another model .of the same shape, but with the weights {weight_digest(unet)}"
                                         f", not {weight_digest(whole)}.; train masks for this U-Net"):
        load_masks(path, whole)


# ---------------------------------------------------------------------------------------------- the training-free path

def one_step(found: Search, step: int = 0, unet: UNet = UNETS[NARROW], sampler: str = "ddim"):
    """A run after its search at one step, and the function (x, step) that predicts x0 with the masks it left."""
    x, context = (z.to(unet.conv_in.weight.dtype) for z in (randn(2, 4, 8, 8), randn(2, 5, 8, seed=1)))
    run = begin(unet, x, Condition(context), None, plan(sampler, 15), 1.0, None, 1.0, seeded(0, 1),
                {"masks": found}).acting["masks"]

    def predict(x: torch.Tensor = x, i: int = step) -> torch.Tensor:
        return 3 * unet(x, torch.tensor(500), context, on=Techniques(masks=run.at((i,), (0,)))).float()
    run.search(step, x, predict)
    return run, predict


def test_the_search_climbs_its_score_at_every_step_anew():
    run, predict = one_step(climb(9, lr=0.1))
    run.search(1, randn(2, 4, 8, 8), predict)
    assert [len(scores) for scores in run.history] == [9, 9]
    for scores in map(torch.tensor, run.history):
        assert (scores[-3:].mean(dim=0) > scores[:3].mean(dim=0)).all()
    assert all(p.grad is None for p in UNETS[NARROW].parameters())


def test_the_released_search_is_that_of_the_released_code(monkeypatch):
    """Its loss at each of 27 passes, its logits after each update and its latents after each step, in float64."""
    with safe_open(DATA / "masksearch.safetensors", "pt") as file:
        golden = {name: file.get_tensor(name).double() for name in file.keys()}
        search = json.loads(file.metadata()["search"])
    unet = official(UNet, "sd15.unet").double()
    texts = [baseline(f"sd15.{kind}").double() for kind in ("context", "negative")]

    def score(x0: torch.Tensor, words: tuple[str, ...]) -> torch.Tensor:
        picture = (torch.einsum("ck,bkhw->bchw", golden["W"], x0) / 2 + 0.5).clamp(0, 1)
        reward, distance = (picture * golden["A"]).mean(dim=(1, 2, 3)), (picture - golden["B"]).square()
        return -(F.relu(2 - 4 * reward) + 5 * distance.mean(dim=(1, 2, 3)))

    names, found, logits, update = [], [], StaticMasks.logits, torch.optim.AdamW.step

    def named_logits(self, name: str, *rest) -> torch.Tensor:
        names.append(name)
        return logits(self, name, *rest)

    def noted_update(self) -> None:
        update(self)
        found.append([p.detach().clone()[0] for p in self.param_groups[0]["params"]])
    monkeypatch.setattr(StaticMasks, "logits", named_logits)
    monkeypatch.setattr("maskunet.exponential", lambda shape, seeds: golden[f"noise.{names[-1]}"][None])
    monkeypatch.setattr(torch.optim.AdamW, "step", noted_update)
    history, calls = [], plan("dpm++2m", 9)

    class Watched(Search):
        def start(self, run) -> SearchRun:
            return replace(super().start(run), history=history)
    assert list(calls.times) == search["timesteps"]
    latents = [x[0] for _, x in generate(unet, golden["noise0"], *map(Condition, texts), calls, generators=seeded(0),
                                         masks=Watched(MaskSearch(schedule="released"), score))]
    assert all(rms(x, want) <= 5e-7 for x, want in zip(latents, golden["latents"], strict=True))
    assert [len(scores) for scores in history] == [1] * 7 + [10] * 2
    losses = -torch.tensor([score for scores in history for score, in scores])
    assert (losses - golden["loss"]).abs().max() <= 1e-6
    wanted = {sorted(masked_layers(unet)).index(name.removeprefix("logits.")): p for name, p in golden.items()
              if name.startswith("logits.")}
    for k, step in enumerate(search["step_of_update"]):                # here, a step's last update is of moments alone
        if step == 7 and k < 16 or step == 8 and k < 26:
            assert max(rms(found[k][layer] - 1, p[k] - 1) for layer, p in wanted.items()) <= 1e-3
    assert len(found) == 27 and len(wanted) == 2


def test_the_released_schedule_goes_by_denoising_steps_and_keeps_the_optimizers_moments():
    released = climb(None, schedule="released").settings
    assert [released.updates(step) for step in range(9)] == [1] * 7 + [10] * 2 and MaskSearch().updates(8) == 15
    for settings, moments in ((released, 2), (replace(released, reset=True), 1), (MaskSearch(iterations=1), 1),
                              (MaskSearch(iterations=1, reset=False), 2)):
        run, predict = one_step(Search(settings, nearness))
        assert run.search(1, randn(2, 4, 8, 8), predict) == (settings.schedule == "released")
        assert {int(state["step"]) for state in run.optimizer.state.values()} == {moments}
    for call, passes in ((12, 1), (14, 10)):                           # steps 6 and 7 of Heun's method
        run, _ = one_step(climb(None, constant, schedule="released"), call, sampler="heun")
        assert len(run.history[0]) == passes and run.attempts == [passes - 1] * 2


def test_no_iterations_are_masks_without_a_search_and_with_all_masks_on_the_plain_model():
    want = trajectory(Masks(StaticMasks(UNETS[NARROW], initial=1.0).requires_grad_(False), shared=True), steps=2)
    got, plain = trajectory(climb(0), steps=2), trajectory(None, steps=2)[-1]
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and not torch.equal(got[-1], plain)
    assert (trajectory(climb(0, initial=5.0), steps=2)[-1] - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_every_step_begins_anew_and_ten_updates_move_a_logit_by_a_tenth():
    run, predict = one_step(climb(10))
    first = weights(run.masks.source)
    run.search(1, randn(2, 4, 8, 8), predict)
    for values in (first, weights(run.masks.source)):
        moved = torch.cat([(p - 1).abs().flatten() for p in values])
        assert moved.max() <= 0.102 and moved.mean() > 0.01            # weight decay: 0.001
    run, _ = one_step(climb(1, constant, lr=0.1, weight_decay=0.5))
    assert all(torch.allclose(p, torch.tensor(0.95)) for p in run.masks.source.parameters())


def test_the_best_mask_is_the_one_that_scored_best_for_each_image_and_the_last_is_the_last():
    for lr in (0.3, 1e-2):
        run, predict = one_step(climb(6, keep="best", lr=lr))
        scores = torch.tensor(run.history[0])
        assert len(scores) == 7 and torch.equal(nearness(predict()), scores.amax(dim=0))
        assert not any(p.requires_grad or p.grad is not None for p in run.masks.source.parameters())
    run, predict = one_step(climb(None, keep="best", schedule="released", lr=0.3), 7)
    assert torch.equal(nearness(predict(i=7)), torch.tensor(run.history[0]).amax(dim=0)) and len(run.history[0]) == 10
    run, _ = one_step(climb(6))
    assert len(run.history[0]) == 6 and run.attempts == [6, 6]


def test_checkpointing_computes_the_same_with_the_same_noise():
    plain, saved = (trajectory(climb(2, checkpoint=twice), cache=DeepCache(2, 4), steps=2) for twice in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, saved))


def test_the_search_for_one_image_knows_nothing_of_the_others():
    a, b = (trajectory(climb(2, keep="best"), seeds=seeds, steps=2)[-1] for seeds in ((0, 1), (0, 2)))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_a_search_refuses_the_parallel_cache():
    with pytest.raises(ValueError, match="without its parallel mode"):
        trajectory(climb(2), cache=FasterDiffusion("paper", parallel=True))


def judged_by(sd: StableDiffusion, judge, monkeypatch):
    """Its score of latents, with this function in the place of the model's CLIP."""
    monkeypatch.setattr("stable_diffusion.load_reward", lambda folder, device: judge)
    return sd.latent_score(("clip",))


def test_a_reward_of_pictures_is_climbed_through_the_autoencoder(narrow, monkeypatch):
    sd, prompts = StableDiffusion.load(narrow), ["a red circle", "a blue circle"]
    for p in sd.unet.up_blocks.parameters():
        p *= 2
    seen = []

    def redness(images: torch.Tensor, asked: list[str]) -> torch.Tensor:
        assert asked == prompts and images.shape == (2, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
        seen.append(images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2)))
        return seen[-1]
    judged_by(sd, redness, monkeypatch)
    before = digest(sd.unet, sd.vae, *sd.text_encoders)
    latents = sd.sample(prompts, steps=1, sampler="dpm++2m", cfg_scale=1.5,
                        masks=MaskSearch(iterations=20, keep="best", lr=0.3))
    scores = torch.stack(seen).detach()
    assert all(s.requires_grad for s in seen[:20]) and not seen[20].requires_grad
    assert (scores[10:].mean(dim=0) > scores[0]).all()
    # the last step of this solver ends at x0 itself, so that the picture is the one that scored best
    assert torch.allclose(redness(sd.decode(latents), prompts), scores.amax(dim=0), atol=1e-5)
    assert digest(sd.unet, sd.vae, *sd.text_encoders) == before
    assert all(p.grad is None for module in (sd.unet, sd.vae) for p in module.parameters())


def test_a_search_looks_at_pictures_decoded_in_tiles_and_keeps_one_tiles_activations(narrow, monkeypatch):
    sd, seen, z = StableDiffusion.load(narrow), [], randn(1, 4, 20, 20).requires_grad_()

    def judge(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append(images.detach())
        return images.square().mean(dim=(1, 2, 3))

    def decoded(tile: int) -> tuple[int, torch.Tensor]:
        """How many numbers autograd keeps, and the gradient."""
        sd.tile, kept, score = tile, [], judged_by(sd, judge, monkeypatch)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            value = score(z, ("a red circle",)).sum()
        return sum(kept), *torch.autograd.grad(value, z)
    (whole, _), (tiled, grad) = decoded(0), decoded(8)
    want = (sd.vae.decode(z.detach() / sd.config.vae.scaling, 8) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(seen[1], want, atol=1e-6) and not torch.allclose(seen[0], want, atol=1e-3)
    monkeypatch.setattr("vae.checkpoint", lambda function, *arguments, **_: function(*arguments))
    kept, direct = decoded(8)
    assert torch.allclose(grad, direct, rtol=1e-4, atol=1e-6 * direct.abs().max()) and grad.abs().max() > 0
    assert tiled < 0.5 * whole < kept


def raising(error: Exception):
    def score(x0: torch.Tensor, words: tuple[str, ...]) -> torch.Tensor:
        raise error
    return score


@pytest.mark.parametrize("score,kind,words", [
    (raising(torch.OutOfMemoryError("on the GPU")), InputError, "out of memory in the search .* add checkpoint .*"
     "--low-memory, .* --width and --height .*--freescale.* --batch-size"),
    (raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")), InputError, "out of memory in the search"),
    (raising(RuntimeError("shapes don't match")), RuntimeError, "shapes"),
    (lambda x0, words: x0.sum(dim=(1, 2, 3)) * math.nan, InputError, "not finite at step 0: use --dtype bfloat16"),
    (lambda x0, words: (x0 - x0).square().sum(dim=(1, 2, 3)).sqrt(), InputError, "gradient, is not finite at step 0")])
def test_what_stops_a_search_is_one_clear_line_and_other_errors_are_not_hidden(score, kind, words):
    with pytest.raises(kind, match=words):
        trajectory(climb(2, score))


def test_a_search_in_float16_follows_gradients_that_are_too_small_for_it():
    half = UNet(NARROW).requires_grad_(False).half()
    half.load_state_dict(UNETS[NARROW].state_dict())
    moved = []
    for unet in (UNETS[NARROW], half):
        run, _ = one_step(climb(1, lambda x0, words: 1e-5 * nearness(x0)), unet=unet)
        moved.append(torch.cat([(p - 1).flatten() for p in weights(run.masks.source)]))
    assert torch.corrcoef(torch.stack(moved))[0, 1] > 0.9


# ------------------------------------------------------------------------------------------------------------- by flags

def test_a_search_by_the_models_own_clip_runs_from_the_command_line_and_raises_the_score(tmp_path, command):
    def drawn(*flags: str) -> tuple[torch.Tensor, str]:
        """The pixels (1, 3, H, W) of a picture of the tiny model, and its text of settings."""
        code, _, err = command(txt2img.main, "a red circle", "--steps", 2, "--cfg-scale", 3, "--device", "cpu", *flags,
                               "--out", tmp_path / "o.png")
        assert code == 0, err
        with Image.open(tmp_path / "o.png") as file:
            return torch.from_numpy(np.asarray(file).copy()).permute(2, 0, 1)[None] / 255, file.info["parameters"]
    (plain, _), (none, _), (found, said) = (drawn(*flags) for flags in (
        [], ["--masks", "search,clip,0"], ["--masks", "search,clip,4,checkpoint"]))
    reward, sd = load_reward(TINY / "clip"), StableDiffusion.load(TINY)
    assert "Masks: \"search,iterations=4\"" in said
    assert reward(found, ["a red circle"]) > reward(none, ["a red circle"])
    on = Masks(StaticMasks(sd.unet, initial=1.0).requires_grad_(False), shared=True)
    want = sd.decode(sd.sample("a red circle", steps=2, cfg_scale=3, masks=on))
    assert torch.equal(none, (want * 255).round() / 255) and not torch.equal(none, plain)


@pytest.mark.parametrize("flags,words", [
    (["search,nowhere"], "nowhere"), ([f"search,{TINY}"], "not a reward model"),
    ([f"search,{ROOT / 'reward.py'}"], "is a file, not a converted reward"),
    (["search", "--cache", "faster,parallel"], "leave out the parallel of --cache"),
    (["search,clip,-1"], "0 or more"), (["search,schedule=often"], "paper or released"),
    (["search,keep=first"], "last or best"), (["search,lr=-1"], "lr can't be -1"), (["search,"], "needs a reward"),
    (["random,1.5"], "between 0 and 1, not 1.5"), (["none.safetensors"], "no file none.safetensors"),
    (["random,0.5,mode=threshold"], "sample or expected"), ([ROOT / "txt2img.py"], "not a complete safetensors file"),
    # settings that would do nothing
    (["search,clip,3,released"], "has its own iterations"), (["search,clip,0,released"], "has its own iterations"),
    (["search,clip,0,checkpoint"], "checkpoint does nothing with 0 iterations"),
    (["search,clip:other,0"], "reward does nothing with 0 iterations"),
    (["search,schedule=released", "--steps", 7], "changes no mask in the first 7 steps"),
    (["search,reset=no", "--steps", 1], "reset does nothing with a single step"),
    (["m.safetensors,threshold,fixed"], "fixed does nothing with threshold"),
    (["m.safetensors,expected,shared"], "shared does nothing with expected"),
    ([f"{ROOT / 'txt2img.py'},shared", "--cfg-scale", 1], "shared does nothing without guidance"),
    ([f"{ROOT / 'txt2img.py'},fixed", "--steps", 1], "fixed does nothing with a single step"),
    (["random,0.5,fixed", "--steps", 1], "fixed does nothing with a single step"),
    (["random,0.5,mode=expected,fixed"], "fixed does nothing with expected"),
    (["random,0.5,mode=expected,window"], "window does nothing with expected")])
def test_bad_and_idle_settings_end_in_one_clear_line(flags, words, tmp_path, command):
    code, _, err = command(txt2img.main, "a red circle", "--device", "cpu", "--out", tmp_path / "o.png", "--masks",
                           *flags)
    assert code == 2 and words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
