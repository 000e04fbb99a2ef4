"""All techniques in one call: any subset runs on every family, repeats itself, and treats images one by one."""
from itertools import product

import pytest
import torch
from conftest import NARROW, UNETS, XL, make, randn, seeded
from torch import Tensor

from cache import DeepCache, FasterDiffusion, Inherit, TGate
from freescale import FreeScale
from freeu import FreeU, SkipTuning
from highres import DemoFusion, HiDiffusion, ScaleCrafter
from maskunet import RandomMasks
from sampler import SAMPLERS, Condition, generate, plan
from unet import UNet, UNetConfig

STEPS, SIZE = 3, 8
# Two levels are enough where no technique goes by their number, as the baselines for large pictures do
SMALL = UNetConfig(channels=(8, 16), layers=1, depth=(1, 1), heads=(2, 2), context_dim=8, groups=4)
SMALL_XL = UNetConfig(channels=(8, 16), layers=1, depth=(0, 2), heads=(2, 2), context_dim=8, groups=4, linear_proj=True,
                      add_dim=6)
MODELS = UNETS | {config: make(UNet, config) for config in (SMALL, SMALL_XL)}

# By the name of the argument: what it can be, and first that it is left out
FREEU = {"": None, "FreeU": FreeU(1.2, 1.4, 0.9, 0.4)}
SKIPS = {"": None, "Skip-Tuning": SkipTuning(0.8)}
CACHE = {"": None, "DeepCache": DeepCache(2, 1), "Faster": FasterDiffusion(2), "Inherit": Inherit("d2-u1", 2),
         "parallel": FasterDiffusion(3, parallel=True)}
TGATE = {"": None, "T-GATE": TGate(2), "guidance kept": TGate(2, guidance="keep"),
         "T-GATE 2": TGate(2, version=2, warm_up=0, late_interval=3)}
MASKS = {"": None, "masks": RandomMasks(0.2)}
FREESCALE = {"": None, "FreeScale": FreeScale(((32, 32), (64, 64)), native=4)}
HIGHRES = {"": None, "ScaleCrafter": ScaleCrafter(native=4), "HiDiffusion": HiDiffusion(native=4),
           "DemoFusion": DemoFusion(native=6)}
TABLES = dict(freeu=FREEU, skips=SKIPS, cache=CACHE, tgate=TGATE, masks=MASKS, freescale=FREESCALE)
LARGE = dict(freeu=FREEU, skips=SKIPS, masks=MASKS, highres=HIGHRES)
SD, SDXL = ((SMALL, TABLES), (NARROW, LARGE)), ((SMALL_XL, TABLES), (XL, LARGE))
MANY = [(config, tables, names) for config, tables in (*SD, *SDXL)
        for names in list(product(*tables.values()))[3::23 if tables is TABLES else 10]]


def run(config: UNetConfig, tables: dict, names: tuple[str, ...], images: tuple[int, ...] = (0,),
        sampler: str = "ddim", steps: int = STEPS, low_memory: bool = False) -> Tensor:
    """Latents of these images with the techniques of these names."""
    def rows(*shape: int, seed: int) -> Tensor:
        return torch.cat([randn(1, *shape, seed=100 * seed + k) for k in images])
    techniques = {argument: tables[argument][name] for argument, name in zip(tables, names)}
    added = rows(config.add_dim, seed=3) if config.add_dim else None
    init = rows(4, SIZE, SIZE, seed=4) if techniques.get("freescale") else None
    *_, (_, latents) = generate(
        MODELS[config], rows(4, SIZE, SIZE, seed=0), Condition(rows(5, 8, seed=1), added),
        Condition(rows(5, 8, seed=2), added), plan(sampler, steps), 3.0, init, generators=seeded(*images),
        low_memory=low_memory, **techniques)
    return latents


@pytest.mark.parametrize("config,tables", [*SD, *SDXL], ids=["sd", "sd, large", "sdxl", "sdxl, large"])
def test_every_subset_runs_and_each_technique_changes_the_picture(config, tables):
    pictures = {names: run(config, tables, names) for names in product(*tables.values())}
    assert all(latents.isfinite().all() for latents in pictures.values())
    for names, latents in pictures.items():
        for i in range(len(names)):
            off = (*names[:i], "", *names[i + 1:])
            assert off == names or not torch.equal(latents, pictures[off]), f"{names[i]} does nothing in {names}"


@pytest.mark.parametrize("config,tables,names", MANY, ids=[", ".join(filter(None, names)) for _, _, names in MANY])
def test_runs_repeat_themselves_images_do_not_see_each_other_and_two_passes_of_guidance_are_one(config, tables, names):
    both = run(config, tables, names, (0, 1))
    assert torch.equal(run(config, tables, names, (0, 1)), both)
    apart = torch.cat([run(config, tables, names, (k,)) for k in (0, 1)])
    for other in (apart, run(config, tables, names, (0, 1), low_memory=True)):
        torch.testing.assert_close(other, both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cache", CACHE)
def test_all_at_once_runs_with_every_sampler(sampler, cache):
    names = ("FreeU", "Skip-Tuning", cache, "T-GATE", "masks", "FreeScale")
    assert run(SMALL, TABLES, names, sampler=sampler).isfinite().all()


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("highres", ["ScaleCrafter", "HiDiffusion"])
@pytest.mark.parametrize("cache", CACHE)
@pytest.mark.parametrize("tgate", ["T-GATE", "T-GATE 2"])
def test_dilation_and_smaller_maps_run_with_every_cache_and_tgate(config, highres, cache, tgate):
    tables = LARGE | dict(cache=CACHE, tgate=TGATE)
    assert run(config, tables, ("FreeU", "Skip-Tuning", "masks", highres, cache, tgate)).isfinite().all()


@pytest.mark.parametrize("config", [NARROW, XL], ids=["sd", "sdxl"])
def test_self_attention_is_not_reused_over_a_change_of_the_maps_size(config):
    tables = dict(tgate={"late": TGate(9, version=2, warm_up=0, interval=9)}, highres=HIGHRES)
    assert run(config, tables, ("late", "HiDiffusion"), steps=10).isfinite().all()
