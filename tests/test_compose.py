"""All techniques in one call: any subset runs on every family, repeats itself, and treats images one by one."""
from itertools import product

import pytest
import torch
from conftest import NARROW, UNETS, XL, randn, seeded
from torch import Tensor

from cache import DeepCache, FasterDiffusion, Inherit, TGate
from freescale import FreeScale
from freeu import FreeU, SkipTuning
from highres import DemoFusion, HiDiffusion, ScaleCrafter
from maskunet import RandomMasks
from sampler import SAMPLERS, Condition, generate, plan
from unet import UNetConfig

STEPS, SIZE = 3, 8
FAMILY = pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])

# By the name of the argument: what it can be, and first that it is left out
FREEU = {"": None, "FreeU": FreeU(1.2, 1.4, 0.9, 0.4)}
SKIPS = {"": None, "Skip-Tuning": SkipTuning(0.8)}
CACHE = {"": None, "DeepCache": DeepCache(2, 1), "Faster": FasterDiffusion(2), "Inherit": Inherit("d4-u4", 2),
         "parallel": FasterDiffusion(3, parallel=True)}
TGATE = {"": None, "T-GATE": TGate(2), "T-GATE, guidance kept": TGate(2, guidance="keep")}
MASKS = {"": None, "masks": RandomMasks(0.2)}
FREESCALE = {"": None, "FreeScale": FreeScale(((32, 32), (64, 64)), native=4)}
HIGHRES = {"": None, "ScaleCrafter": ScaleCrafter(native=4), "HiDiffusion": HiDiffusion(native=4),
           "DemoFusion": DemoFusion(native=6)}
TABLES = dict(freeu=FREEU, skips=SKIPS, cache=CACHE, tgate=TGATE, masks=MASKS, freescale=FREESCALE)
LARGE = dict(freeu=FREEU, skips=SKIPS, masks=MASKS, highres=HIGHRES)
ALL, ALL_LARGE = list(product(*TABLES.values())), list(product(*LARGE.values()))
MANY = [*((TABLES, names) for names in ALL[3::11]), *((LARGE, names) for names in ALL_LARGE[3::5])]
SOME = pytest.mark.parametrize("tables,names", MANY, ids=[", ".join(filter(None, names)) for _, names in MANY])


def run(config: UNetConfig, tables: dict, names: tuple[str, ...], images: tuple[int, ...] = (0,),
        sampler: str = "ddim", low_memory: bool = False) -> Tensor:
    """Latents of these images with the techniques of these names."""
    def rows(*shape: int, seed: int) -> Tensor:
        return torch.cat([randn(1, *shape, seed=100 * seed + k) for k in images])
    techniques = {argument: tables[argument][name] for argument, name in zip(tables, names)}
    added = rows(config.add_dim, seed=3) if config.add_dim else None
    init = rows(4, SIZE, SIZE, seed=4) if techniques.get("freescale") else None
    *_, (_, latents) = generate(
        UNETS[config], rows(4, SIZE, SIZE, seed=0), Condition(rows(5, 8, seed=1), added),
        Condition(rows(5, 8, seed=2), added), plan(sampler, STEPS), 3.0, init, generators=seeded(*images),
        low_memory=low_memory, **techniques)
    return latents


@FAMILY
@pytest.mark.parametrize("tables", [TABLES, LARGE], ids=["at any size", "large"])
def test_every_subset_runs_and_each_technique_changes_the_picture(config, tables):
    pictures = {names: run(config, tables, names) for names in product(*tables.values())}
    assert all(latents.isfinite().all() for latents in pictures.values())
    for names, latents in pictures.items():
        for i in range(len(names)):
            off = (*names[:i], "", *names[i + 1:])
            assert off == names or not torch.equal(latents, pictures[off]), f"{names[i]} does nothing in {names}"


@SOME
def test_a_run_repeats_itself_and_images_do_not_see_each_other(tables, names):
    both = run(NARROW, tables, names, (0, 1))
    assert torch.equal(run(NARROW, tables, names, (0, 1)), both)
    for k in (0, 1):
        torch.testing.assert_close(run(NARROW, tables, names, (k,)), both[k:k + 1], rtol=1e-4, atol=1e-4)


@FAMILY
@SOME
def test_guidance_in_two_passes_is_that_in_one(config, tables, names):
    one, two = (run(config, tables, names, low_memory=low) for low in (False, True))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cache", CACHE)
def test_all_at_once_runs_with_every_sampler(sampler, cache):
    names = ("FreeU", "Skip-Tuning", cache, "T-GATE", "masks", "FreeScale")
    assert run(NARROW, TABLES, names, sampler=sampler).isfinite().all()


@FAMILY
@pytest.mark.parametrize("highres", ["ScaleCrafter", "HiDiffusion"])
@pytest.mark.parametrize("cache", CACHE)
def test_dilation_and_smaller_maps_run_with_every_cache_and_tgate(config, highres, cache):
    tables = LARGE | dict(cache=CACHE, tgate=TGATE)
    assert run(config, tables, ("FreeU", "Skip-Tuning", "masks", highres, cache, "T-GATE")).isfinite().all()
