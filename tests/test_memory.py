"""memory.py: the meter counts what lives, and the plan from shapes agrees with what real tensors need."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import randn
from torch import nn

import unet as unet_file
from convert_weights import FAMILIES
from folder import TINY, read_config
from freescale import FreeScale
from memory import Meter, free_memory, measure, plan_stages
from sampler import Condition, generate, plan
from unet import FeedForward, UNet
from vae import tile_side

KB = 1024


def test_the_meter_counts_memory_not_views_and_knows_when_it_ends():
    with Meter() as meter:
        x = torch.zeros(256)                                           # 1 KB
        y = x.reshape(16, 16).T[3:]
        assert (meter.alive, meter.peak) == (KB, KB)
        z = x + 1
        del x
        assert meter.alive == 2 * KB                                   # y still looks at it
        del y, z
        assert (meter.alive, meter.peak) == (0, 2 * KB)
        torch.ones(256).add_(1)
    assert (meter.alive, meter.peak) == (0, 2 * KB)


def test_weights_do_not_count_and_products_count_two_operations_per_multiply_and_add():
    linear = nn.Linear(32, 8)
    cost = measure(lambda: linear(torch.zeros(4, 32)), linear)
    assert cost.peak == 4 * 4 * (32 + 8) and cost.flops == 2 * 4 * 32 * 8
    q, k = torch.empty(2, 3, 5, 8, device="meta"), torch.empty(2, 3, 7, 8, device="meta")
    cost = measure(lambda: F.scaled_dot_product_attention(q, k, k))
    assert cost.peak == q.numel() * 4 and cost.flops == 2 * 2 * (2 * 3 * 5 * 7 * 8)     # no (5, 7) scores


@pytest.mark.parametrize("blur", ["spatial", "official"])
def test_the_plan_of_a_step_is_what_real_tensors_need(blur):
    config = read_config(TINY)
    free = FreeScale(((64, 64), (128, 96)), native=16, blur=blur)
    planned = plan_stages(config, free, dtype=torch.float32, stages=[1])[0]
    unet, said, x = UNet(config.unet), Condition(torch.zeros(1, 24, 128)), torch.zeros(1, 4, 32, 24)
    real = measure(lambda: next(generate(unet, x, said, said, plan("ddim", 1), init=x, freescale=free,
                                         generators=[torch.Generator().manual_seed(0)])), unet)
    assert real.peak == pytest.approx(planned.unet.peak, rel=0.02)


def test_low_memory_and_small_batches_need_less_and_larger_stages_more():
    config, free = read_config(TINY), FreeScale(((64, 64), (128, 128)), native=16)
    first, second = plan_stages(config, free)
    low, four = (plan_stages(config, free, stages=[1], **more)[0] for more in (dict(low_memory=True), dict(images=4)))
    assert first.memory < second.memory < four.memory and low.memory < second.memory
    assert 0.45 < low.unet.peak / second.unet.peak < 0.55
    assert low.unet.flops == pytest.approx(second.unet.flops, rel=1e-3)
    assert (first.height, second.width) == (64, 128) and first.vae.peak == 0 < second.vae.peak


def test_tiles_bound_the_vaes_memory_and_fast_mode_saves_operations(monkeypatch):
    config, free = read_config(TINY), FreeScale(((64, 64), (256, 256)), native=16)
    whole = plan_stages(config, free, stages=[1])[0]
    tiled = plan_stages(config, replace(free, fast=True), stages=[1], tile=lambda z: 32)[0]
    assert tiled.vae.peak < 0.6 * whole.vae.peak and tiled.unet.flops < 0.9 * whole.unet.flops
    monkeypatch.setattr(Meter, "once_per_shape", lambda self, module: setattr(module, "forward", module.forward))
    every = plan_stages(config, replace(free, fast=True), stages=[1], tile=lambda z: 32)[0]   # all tiles are run
    assert every.vae.peak == pytest.approx(tiled.vae.peak, rel=1e-3)
    assert every.vae.flops == pytest.approx(tiled.vae.flops, rel=1e-3)


def test_sdxls_operations_at_its_own_size_are_the_known_ones():
    config = FAMILIES["sdxl"]
    planned = plan_stages(config, FreeScale(((1024, 1024),), native=128), tile=lambda z: 64)[0]
    assert planned.unet.flops == pytest.approx(13.5e12, rel=0.01)      # both branches of guidance
    assert planned.memory < 12e9


def test_sdxl_draws_4096_pixels_within_12_gigabytes_and_8192_within_24():
    sizes = tuple((side, side) for side in (1024, 2048, 4096, 8192))
    four, eight = plan_stages(FAMILIES["sdxl"], FreeScale(sizes, native=128), low_memory=True,
                              tile=lambda z: tile_side(None, z), stages=[2, 3])
    assert four.memory < 12e9 and eight.memory < 24e9


def test_feed_forward_layers_take_large_maps_in_pieces(monkeypatch):
    ff, x = FeedForward(8).requires_grad_(False), randn(2, 100, 8)
    whole = ff(x)
    costs = []
    for chunk in (100, 25):
        monkeypatch.setattr(unet_file, "CHUNK", chunk)
        assert (ff(x) - whole).abs().max() < 1e-6
        costs.append(measure(lambda: ff(x), ff).peak)
    assert costs[1] < 0.6 * costs[0]


def test_free_memory_is_a_number_or_unknown():
    free = free_memory(torch.device("cpu"))
    assert free is None or 1e6 < free < 1e15
    assert free_memory(torch.device("meta")) is None
