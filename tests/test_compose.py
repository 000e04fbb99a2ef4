"""All techniques in one call: any subset runs on every family, repeats itself, and treats images one by one."""
from itertools import product

import pytest
import torch

from cache import DeepCache, FasterDiffusion, Inherit, TGate
from freescale import FreeScale
from freeu import FreeU
from maskunet import Masks, RandomMasks
from sampler import generate
from unet import UNet, UNetConfig

NARROW = UNetConfig(channels=(8, 16, 24, 24), heads=(2, 2, 2, 2), context_dim=8, groups=4)
XL = UNetConfig(channels=(8, 16, 24), depth=(0, 1, 2), heads=(1, 2, 2), context_dim=8, groups=4, linear_proj=True,
                add_dim=56, add_time_dim=4)
STEPS, SIZE = 8, 8

FREEU = {"plain": None, "FreeU": FreeU(1.2, 1.4, 0.9, 0.4)}
CACHE = {"no cache": None, "DeepCache": DeepCache(2, 1), "Faster": FasterDiffusion(2),
         "parallel": FasterDiffusion(3, parallel=True), "Inherit": Inherit("d4-u4", 2)}
TGATE = {"no gate": None, "T-GATE": TGate(3), "T-GATE, guidance kept": TGate(3, guidance="keep")}
MASKS = {"no masks": None, "masks": Masks(RandomMasks(0.2))}
SCALE = {"one size": None, "FreeScale": FreeScale(((32, 32), (64, 64)), native=4)}
ALL = list(product(FREEU, CACHE, TGATE, MASKS, SCALE))


def unet(config: UNetConfig) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        return UNet(config).requires_grad_(False).eval()


UNETS = {"sd": unet(NARROW), "sdxl": unet(XL)}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(family: str, names: tuple[str, ...], images: tuple[int, ...] = (0, 1), **more) -> torch.Tensor:
    """Latents of these images with the techniques of these names."""
    freeu, cache, tgate, masks, scale = (table[name] for table, name in zip((FREEU, CACHE, TGATE, MASKS, SCALE), names))
    rows = lambda width, seed: torch.cat([randn(1, *width, seed=100 * seed + k) for k in images])
    added = rows((56,), 3) if family == "sdxl" else None
    init = rows((4, SIZE, SIZE), 4) if scale is not None else None
    *_, (_, latents) = generate(
        UNETS[family], rows((4, SIZE, SIZE), 0), rows((5, 8), 1), rows((5, 8), 2), STEPS, cfg_scale=3.0, added=added,
        generators=[torch.Generator().manual_seed(k) for k in images], freeu=freeu, cache=cache, tgate=tgate,
        masks=masks, freescale=scale, init=init, strength=1.0, **more)
    return latents


@pytest.mark.parametrize("family", UNETS)
def test_every_subset_runs_and_each_changes_the_picture(family):
    pictures = {names: run(family, names) for names in ALL}
    assert all(latents.isfinite().all() for latents in pictures.values())
    for names, latents in pictures.items():
        for i, table in enumerate((FREEU, CACHE, TGATE, MASKS, SCALE)):
            off = (*names[:i], next(iter(table)), *names[i + 1:])
            assert off == names or not torch.equal(latents, pictures[off]), f"{names[i]} does nothing in {names}"


@pytest.mark.parametrize("names", [names for k, names in enumerate(ALL) if k % 5 == 3])
def test_a_run_repeats_itself_and_images_do_not_see_each_other(names):
    both = run("sd", names)
    assert torch.equal(run("sd", names), both)
    for k in (0, 1):
        torch.testing.assert_close(run("sd", names, (k,)), both[k:k + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize("names", ALL[::7])
def test_guidance_in_two_passes_is_that_in_one(family, names):
    torch.testing.assert_close(run(family, names, low_memory=True), run(family, names), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "dpm++2m-karras", "euler", "euler-karras", "euler-a"])
@pytest.mark.parametrize("cache", CACHE)
def test_all_at_once_runs_with_every_sampler(sampler, cache):
    assert run("sd", ("FreeU", cache, "T-GATE", "masks", "FreeScale"), sampler=sampler).isfinite().all()
