"""The flags of txt2img.py: what they mean, what is wrong with them, and the objects that they ask for.

Start at `parse_arguments`. What can be known to be wrong is said by it, before gigabytes are loaded; each `read_...`
turns the flags of one technique into the object that `StableDiffusion.sample` takes. Everything wrong is an InputError.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cache import DeepCache, FasterDiffusion, Inherit, TGate, notes
from command import HelpFormatter, InputError, check_device
from folder import TINY, ModelConfig, check_size
from freescale import FreeScale
from freeu import PRESETS, FreeU, scale_long, skip_tuning
from highres_baselines import Model, demo_fusion, hidiffusion, scale_crafter
from maskunet import MODES, Masks, MaskSearch, RandomMasks, load_masks, score_latents
from reward import add_rewards, load_reward
from sampler import SAMPLERS, plan
from unet import UNet
from vae import VAE, tile_side

if TYPE_CHECKING:
    from txt2img import StableDiffusion

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)    # what Pillow raises for bad pictures
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From a prompt to a picture with Stable Diffusion.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("prompt", nargs="?", help="what the picture should show")
    parser.add_argument("--from-file", type=Path, metavar="FILE", help="one prompt a line, instead of PROMPT")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what it should not show")
    parser.add_argument("--model", type=Path, default=TINY, help="model folder written by convert_weights.py")
    parser.add_argument("--out", type=Path,
                        help="a .png, or a folder for 00000_SEED.png, ... (default: out.png; out with --from-file)")
    parser.add_argument("--n", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; picture k has seed + k")
    parser.add_argument("--steps", type=int, default=30, help="U-Net evaluations per picture")
    parser.add_argument("--sampler", default="ddim", help=", ".join(SAMPLERS))
    parser.add_argument("--spacing", help="of the times: leading, linspace or trailing (default: the model's)")
    parser.add_argument("--eta", type=float, default=0.0, help="noise added at every step: 0 none, 1 as in DDPM")
    parser.add_argument("--cfg-scale", type=float, default=7.5, help="guidance; 1: none, 0: the negative prompt alone")
    parser.add_argument("--width", "-W", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--height", "-H", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--init-image", type=Path, metavar="FILE", help="start from this picture")
    parser.add_argument("--strength", type=float, help="how much of --init-image is redrawn, 0 to 1 (default: 0.8)")
    parser.add_argument("--grid", action="store_true", help="also write all pictures as one sheet")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures at a time: faster, more memory")
    parser.add_argument("--vae-tile", type=int, help="side of VAE tiles in latent pixels, 0: none (default: by size)")
    parser.add_argument("--low-memory", action="store_true",
                        help="less memory on the device, slower: guidance in two passes, only the U-Net stays there")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the U-Net: minutes at first, and again for every other size or batch")
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 elsewhere")
    group = parser.add_argument_group("FreeU and skip scaling (freeu.py)")
    group.add_argument("--freeu", nargs="?", const="preset", metavar="B1,B2,S1,S2",
                       help="four factors, or nothing for the published ones of the model's family")
    group.add_argument("--freeu-version", type=int, default=2, help="2: the paper's; 1: constant factors")
    group.add_argument("--freeu-rule", default="channels", help="channels: the authors' layers; level: diffusers'")
    group.add_argument("--freeu-window", default="2x2", help="of the skip filter: 2x2 as released, dc as in the paper")
    group.add_argument("--freeu-backbone", default="0:1", metavar="FROM:TO", help="part of the steps in which b acts")
    group.add_argument("--freeu-skip", default="0:1", metavar="FROM:TO", help="part of the steps in which s acts")
    group.add_argument("--skip-tuning", metavar="BOTTOM[,TOP]", help="scale skips, linearly by depth (TOP is 1)")
    group.add_argument("--scale-long", type=float, metavar="KAPPA", help="scale skips by powers of KAPPA by depth")
    group = parser.add_argument_group("caches (cache.py)")
    group.add_argument("--cache", choices=["deepcache", "faster", "inherit"],
                       help="run only a part of the U-Net at most steps")
    # None where nothing is given, so that a flag of another technique can be refused: see FLAGS_OF
    group.add_argument("--cache-interval", type=int, metavar="N",
                       help="deepcache, inherit: every N-th step in full (default: 3)")
    group.add_argument("--cache-branch", type=int, metavar="B",
                       help="deepcache: 0 fastest; the paper's is 1 (default: 0)")
    group.add_argument("--cache-center", type=int, metavar="STEP", help="deepcache: more full steps around this one")
    group.add_argument("--cache-power", type=float, metavar="P",
                       help="deepcache: how much more of them around --cache-center (default: 1.4)")
    group.add_argument("--cache-schedule", metavar="RULE", help="deepcache: with --cache-center, the full steps as "
                       "released, or by the paper's formula (default: released)")
    group.add_argument("--cache-keys", metavar="KEYS", help="faster: full steps: paper (the default), rescaled, "
                       "square, every:N, or a list such as 0,2,5; inherit: likewise, in place of --cache-interval")
    group.add_argument("--cache-units", metavar="UNITS", help="inherit: the units whose outputs are reused, such "
                       "as mid,u0-u2, of conv_in, d1, d2, ..., mid, u0, u1, ...")
    group.add_argument("--cache-parallel", action="store_true", help="faster: decode the steps between in one batch")
    group.add_argument("--cache-max-batch", type=int, metavar="ROWS",
                       help="faster: of that batch at most, but those of one step at least")
    group.add_argument("--cache-noise", type=float, metavar="ALPHA",
                       help="faster: prior noise injected in the second half (default: 0.003)")
    group.add_argument("--cache-tau", type=float, metavar="TIME",
                       help="faster: inject it at times below this, of 1000 (default: 500)")
    group.add_argument("--cache-official-order", action="store_true",
                       help="faster: with --cache-parallel, inject it behind the prediction, as released")
    group.add_argument("--tgate", type=int, metavar="STEP", help="T-GATE: so many steps with text, then as follows")
    group.add_argument("--tgate-text", metavar="HOW",
                       help="what attention to the text gave: reuse it, or compute (default: reuse)")
    group.add_argument("--tgate-guidance", metavar="HOW",
                       help="drop: one pass instead of two; or keep (default: drop)")
    group.add_argument("--compare", action="store_true",
                       help="also draw each picture without cache and T-GATE, for a sheet of both and the speed-up")
    group = parser.add_argument_group("weight masks (maskunet.py)")
    group.add_argument("--masks", type=Path, metavar="FILE", help="learned ones, written by python train.py masks")
    group.add_argument("--mask-random", type=float, metavar="RATIO", help="drop this part of the weights by chance")
    group.add_argument("--mask-window", action="store_true", help="random: drop those in a random window of values")
    group.add_argument("--mask-mode", choices=MODES, default="sample",
                       help="threshold, expected: without chance; expected: weights times their probability")
    group.add_argument("--mask-fixed", action="store_true", help="the same chance at every step")
    group.add_argument("--mask-shared", action="store_true", help="the same chance with and without the prompt")
    group.add_argument("--mask-reward", metavar="clip|FOLDER[,...]",
                       help="search for masks at every step, by the CLIP in the model's folder clip, or by what "
                            "convert_weights.py --reward wrote; as published: IMAGEREWARD_FOLDER,HPS_FOLDER")
    group.add_argument("--mask-iterations", type=int, metavar="N",
                       help="reward: updates at every step (default: 15, or as released)")
    group.add_argument("--mask-schedule", default="paper", help="reward: paper, N at every step; or released")
    group.add_argument("--mask-keep", default="last", help="reward: last, the mask after N updates; or best, of all")
    group.add_argument("--mask-checkpoint", action="store_true", help="reward: less memory, a third more time")
    group = parser.add_argument_group("FreeScale (freescale.py): pictures beyond the training size")
    group.add_argument("--freescale", type=int, choices=[2, 4, 8], metavar="N",
                       help="draw at the model's size (or -W, -H), double it up to N = 2, 4 or 8 times")
    group.add_argument("--resolutions", metavar="WxH,WxH", help="of all stages instead, the last is the picture's")
    group.add_argument("--freescale-official", action="store_true",
                       help="the official defaults: N 4, blur official, FreeU version 1, 50 Euler steps, leading times "
                            "and a negative prompt")
    group.add_argument("--detail", default="2", metavar="ALPHA[,OUTSIDE]",
                       help="larger: later stages are freer; 0.5 to 2, at most 1 for N 8")
    group.add_argument("--detail-map", type=Path, metavar="FILE",
                       help="gray picture as large as a stage: ALPHA where it isn't black, OUTSIDE where it is")
    group.add_argument("--freescale-fast", action="store_true", help="global attention on interleaved parts of the map")
    group.add_argument("--freescale-blur", default="spatial", help="spatial: the paper's; official: channels too")
    group.add_argument("--freescale-upsample", default="rgb", help="between stages: rgb, through the VAE; or latent")
    group.add_argument("--freescale-restart", type=float, default=0.3, metavar="PART",
                       help="of the steps that later stages skip")
    group.add_argument("--freescale-dilate", type=float, default=0.7, metavar="PART",
                       help="of the steps up to which deep convolutions are dilated")
    group.add_argument("--baseline", choices=["scalecrafter", "hidiffusion", "demofusion"],
                       help="another way to -W, -H beyond the model's size, to compare with (highres_baselines.py)")
    args = parser.parse_args(argv)
    if args.freescale_official:                                        # as defaults: flags that are given still count
        parser.set_defaults(steps=50, sampler="euler", spacing="leading", freeu="preset", freeu_version=1, vae_tile=128,
                            freescale_blur="official", freescale=None if args.resolutions else 4,
                            negative_prompt="blurry, ugly, duplicate, poorly drawn, deformed, mosaic")
        args = parser.parse_args(argv)
    check_belongings(args)
    refuse_idle_flags(parser, args)
    return check_arguments(args)


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with what follows from others filled in; InputError for what can be known to be wrong already."""
    read_freeu(args, "tiny")
    if read_cache(args) is None and read_tgate(args) is None and args.compare:
        raise InputError("--compare needs something to compare: add --cache or --tgate")
    read_masks(args)
    if args.mask_reward is not None and args.cache == "faster" and args.cache_parallel:
        raise InputError("a search for masks needs every step's latents: leave out --cache-parallel")
    read_resolutions(args)
    check_baseline(args)
    if args.strength is not None and args.stages is not None:
        raise InputError("--strength is for a picture of the same size; FreeScale's stages take --freescale-restart")
    args.strength = 0.8 if args.strength is None else args.strength
    try:                                                               # before gigabytes are loaded
        plan(args.sampler, args.steps, spacing=args.spacing)
    except ValueError as error:
        raise InputError(str(error)) from None
    for flag, ok, legal in (("--n", args.n >= 1, "1 or more"), ("--batch-size", args.batch_size >= 1, "1 or more"),
                            ("--strength", 0 <= args.strength <= 1, "between 0 and 1"),
                            ("--seed", 0 <= args.seed < 2 ** 63, "0 or more"),
                            ("--cfg-scale", math.isfinite(args.cfg_scale), "a finite number"),
                            ("--eta", 0 <= args.eta <= 1, "between 0 and 1"),
                            ("--eta", args.eta == 0 or args.sampler in ("ddim", "euler"), f"0 with {args.sampler}"),
                            ("--vae-tile", args.vae_tile in (None, 0) or args.vae_tile >= 8, "0, or 8 or more")):
        if not ok:
            raise InputError(f"{flag} must be {legal}")
    check_size(8 if args.height is None else args.height, 8 if args.width is None else args.width)
    for name, text in (("the prompt", args.prompt), ("--negative-prompt", args.negative_prompt)):
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise InputError(f"{name} has bytes that are no UTF-8 text: {text!r}") from None
    if (args.prompt is None) == (args.from_file is None):
        raise InputError("give a prompt, or a file of prompts with --from-file (and not both)")
    args.out = args.out or Path("out" if args.from_file else "out.png")
    args.one_file = args.out.suffix.lower() == ".png" and not args.out.is_dir()
    if args.out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise InputError(f"only PNG files are written: --out can't be {args.out}")
    if args.from_file and args.one_file:
        raise InputError(f"--from-file writes many pictures: --out must be a folder, not {args.out}")
    if args.grid and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--grid needs all pictures in one process: run again without torchrun, finished ones are kept")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = check_device(args.device).type
    args.dtype = DTYPES[args.dtype or ("float32" if kind == "cpu" else "float16")]
    return args


# Flags that do nothing without another one: that one, whether it is given, and they
IDLE = (("--freescale or --resolutions", lambda args: args.freescale is not None or args.resolutions is not None,
         ("detail", "freescale_fast", "freescale_blur", "freescale_upsample", "freescale_restart", "freescale_dilate")),
        ("--init-image", lambda args: args.init_image is not None, ("strength",)),
        ("--freeu", lambda args: args.freeu is not None,
         ("freeu_version", "freeu_rule", "freeu_window", "freeu_backbone")),
        ("--freeu, --skip-tuning or --scale-long",
         lambda args: (args.freeu, args.skip_tuning, args.scale_long) != (None, None, None), ("freeu_skip",)),
        ("--masks or --mask-random", lambda args: args.masks is not None or args.mask_random is not None,
         ("mask_mode", "mask_fixed")),
        ("--masks", lambda args: args.masks is not None, ("mask_shared",)),              # random ones are shared anyway
        ("--mask-random", lambda args: args.mask_random is not None, ("mask_window",)),
        ("--mask-reward", lambda args: args.mask_reward is not None,
         ("mask_iterations", "mask_schedule", "mask_keep", "mask_checkpoint")),
        ("--tgate", lambda args: args.tgate is not None, ("tgate_text", "tgate_guidance")),
        ("--cache-center", lambda args: args.cache_center is not None, ("cache_power", "cache_schedule")),
        ("--cache-parallel", lambda args: args.cache_parallel, ("cache_max_batch", "cache_official_order")))


def refuse_idle_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """InputError for a flag without the one that it belongs to."""
    for needed, there, names in IDLE:
        for name in names:
            if not there(args) and getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name.replace('_', '-')} does nothing without {needed}")


# Which flags each cache has, and the names of its settings that they give
FLAGS_OF = {
    "deepcache": {"cache_interval": "interval", "cache_branch": "branch", "cache_center": "center",
                  "cache_power": "power", "cache_schedule": "schedule"},
    "faster": {"cache_keys": "keys", "cache_parallel": "parallel", "cache_max_batch": "max_batch",
               "cache_noise": "alpha", "cache_tau": "tau", "cache_official_order": "official_order"},
    "inherit": {"cache_units": "units", "cache_keys": "keys", "cache_interval": "keys"},
}


def given(args: argparse.Namespace, name: str) -> bool:
    """Whether a flag without a default was given."""
    return getattr(args, name) is not None and getattr(args, name) is not False      # 0 is a value


def check_belongings(args: argparse.Namespace) -> None:
    """InputError for a flag of another cache than the one asked for, where it would do nothing."""
    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")
    for name in dict.fromkeys(name for names in FLAGS_OF.values() for name in names):
        owners = [cache for cache, names in FLAGS_OF.items() if name in names]
        if given(args, name) and args.cache not in owners:
            raise InputError(f"{flag(name)} belongs to --cache {' or '.join(owners)}")
    if args.cache == "inherit" and given(args, "cache_keys") and given(args, "cache_interval"):
        raise InputError("--cache-keys and --cache-interval both say which steps run in full; give one of them")
    if args.cache == "inherit" and args.cache_units is None:
        raise InputError("--cache inherit needs --cache-units, which names the units to reuse, such as mid,u0-u2")


def read_freeu(args: argparse.Namespace, family: str) -> FreeU | None:
    """The FreeU object that the flags ask for, with the family's preset where they give no factors."""
    def numbers(flag: str, text: str, separator: str, counts: tuple[int, ...]) -> list[float]:
        try:
            values = [float(part) for part in text.split(separator)]
        except ValueError:
            values = []
        if len(values) not in counts:
            raise InputError(f"{flag} takes {' or '.join(map(str, counts))} numbers separated by {separator!r}, not "
                             f"{text!r}; the prompt goes before it")
        return values

    try:
        skip_scale = None
        if args.skip_tuning is not None and args.scale_long is not None:
            raise InputError("--skip-tuning and --scale-long both scale every skip; give one of them")
        if args.skip_tuning is not None:
            skip_scale = skip_tuning(*numbers("--skip-tuning", args.skip_tuning, ",", (1, 2)))
        if args.scale_long is not None:
            skip_scale = scale_long(args.scale_long)
        factors = (1.0, 1.0, 1.0, 1.0)
        if args.freeu not in (None, "preset"):
            factors = numbers("--freeu", args.freeu, ",", (4,))
        freeu = FreeU(*factors, args.freeu_version, args.freeu_rule, args.freeu_window,
                      backbone=tuple(numbers("--freeu-backbone", args.freeu_backbone, ":", (2,))),
                      skip=tuple(numbers("--freeu-skip", args.freeu_skip, ":", (2,))), skip_scale=skip_scale)
    except ValueError as error:
        raise InputError(str(error)) from None
    if args.freeu == "preset":
        freeu = replace(freeu, **dict(zip(("b1", "b2", "s1", "s2"), PRESETS[args.freeu_version][family])))
    return None if args.freeu is None and skip_scale is None else freeu


def read_cache(args: argparse.Namespace, unet: UNet | None = None) -> DeepCache | FasterDiffusion | Inherit | None:
    """The cache that the flags ask for, checked against the U-Net if there is one yet."""
    if args.cache is None:
        return None
    kind = {"deepcache": DeepCache, "faster": FasterDiffusion, "inherit": Inherit}[args.cache]
    settings = {"alpha": 0.003} if args.cache == "faster" else {}
    settings |= {field: getattr(args, name) for name, field in FLAGS_OF[args.cache].items() if given(args, name)}
    if isinstance(keys := settings.get("keys"), str):
        if keys.startswith("every:") and keys.removeprefix("every:").isdecimal():
            settings["keys"] = int(keys.removeprefix("every:"))
        elif all(key.isdecimal() for key in keys.split(",")):
            settings["keys"] = tuple(int(key) for key in keys.split(","))
    try:
        cache = kind(**settings)
        cache.key_steps(args.steps)
        if unet is not None:
            cache.start(args.steps, {0}, unet)
    except ValueError as error:
        raise InputError(str(error)) from None
    return cache


def read_tgate(args: argparse.Namespace) -> TGate | None:
    """The T-GATE that the flags ask for."""
    if args.tgate is None:
        return None
    try:
        tgate = TGate(args.tgate, **{field: getattr(args, f"tgate_{field}") for field in ("text", "guidance")
                                     if given(args, f"tgate_{field}")})
        tgate.start(args.steps, 0)
    except ValueError as error:
        raise InputError(str(error)) from None
    return tgate


def read_masks(args: argparse.Namespace, unet: UNet | None = None) -> Masks | None:
    """The masks that the flags ask for, those of a file only if there is a U-Net yet."""
    if sum(given is not None for given in (args.masks, args.mask_random, args.mask_reward)) > 1:
        raise InputError("--masks, --mask-random and --mask-reward all mask the weights; give one of them")
    if args.masks is not None and not args.masks.is_file():
        raise InputError(f"there is no file {args.masks}; make one: python train.py masks")
    try:
        if args.mask_random is not None:
            source = RandomMasks(args.mask_random, args.mask_window)
        elif args.masks is not None and unet is not None:
            source = load_masks(args.masks, unet)
        else:
            return None
        one_network = args.mask_shared or args.mask_random is not None
        return Masks(source, args.mask_mode, not args.mask_fixed, one_network)
    except ValueError as error:
        raise InputError(str(error)) from None


def read_mask_search(args: argparse.Namespace, device: str) -> Callable[[VAE, list[str]], MaskSearch] | None:
    """What makes the search for masks that the flags ask for, for a VAE and the prompts of a batch."""
    settings = {"iterations": args.mask_iterations, "schedule": args.mask_schedule, "keep": args.mask_keep,
                "checkpointed": args.mask_checkpoint}
    try:
        MaskSearch(lambda x: x, **settings)
    except ValueError as error:
        raise InputError(str(error)) from None
    if args.mask_reward is None:
        return None
    reward = add_rewards([load_reward(args.model / "clip" if name == "clip" else name, device)
                          for name in args.mask_reward.split(",")])
    return lambda vae, prompts: MaskSearch(
        score_latents(vae, reward, prompts, lambda latents: tile_side(args.vae_tile, latents)), **settings)


def read_resolutions(args: argparse.Namespace) -> None:
    """Sets args.stages to the (height, width) of --resolutions; to () for --freescale, known later; or to None."""
    args.stages = None if args.freescale is None else ()
    if args.resolutions is not None:
        try:
            sizes = [tuple(int(side) for side in size.split("x")) for size in args.resolutions.split(",")]
            args.stages = tuple((height, width) for width, height in sizes)
        except ValueError:
            raise InputError(f"--resolutions takes sizes such as 512x512,1024x1024, not {args.resolutions!r}") from None
        if args.freescale is not None or (args.width, args.height) != (None, None):
            raise InputError("--resolutions gives all sizes: leave out --freescale, --width and --height")
        for height, width in args.stages:
            check_size(height, width)
        args.height, args.width = args.stages[0]
        if args.init_image and len(args.stages) == 1:
            raise InputError("--init-image takes the place of the first of --resolutions: give a second, larger one")
    if args.stages is None and args.detail_map is not None:
        raise InputError("--detail-map needs the stages of FreeScale: give --freescale 2, or --resolutions")


def read_freescale(args: argparse.Namespace, height: int, width: int) -> FreeScale | None:
    """The FreeScale object that the flags ask for; height and width are the first stage's. Completes args.stages."""
    if args.stages is None:
        return None
    factors = [2 ** k for k in range(4) if 2 ** k <= (args.freescale or 0)]
    args.stages = args.stages or tuple((height * factor, width * factor) for factor in factors)
    check_size(*args.stages[-1])
    try:
        alphas = [float(part) for part in args.detail.split(",")]
    except ValueError:
        alphas = []
    if len(alphas) != (1 if args.detail_map is None else 2):
        raise InputError(f"--detail takes {'one number' if args.detail_map is None else 'two numbers'} "
                         f"{'without' if args.detail_map is None else 'with'} --detail-map, such as "
                         f"{'2' if args.detail_map is None else '2,0.5'}, not {args.detail!r}")
    detail = alphas[0]
    if args.detail_map is not None:
        mask = read_mask(args.detail_map)
        if tuple(mask.shape) not in args.stages:
            sizes = ", ".join(f"{w}x{h}" for h, w in args.stages)
            raise InputError(f"{args.detail_map} is {mask.shape[1]}x{mask.shape[0]}, but must be as large as a stage "
                             f"({sizes}): resize it")
        detail = torch.where(mask, *alphas)
    try:
        return FreeScale(args.stages, restart=args.freescale_restart, detail=detail, upsample=args.freescale_upsample,
                         blur=args.freescale_blur, fast=args.freescale_fast, dilate=args.freescale_dilate)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_baseline(args: argparse.Namespace) -> None:
    """InputError for what `highres_baselines.py` doesn't compose with, or would draw otherwise."""
    for name in ("freescale", "resolutions", "cache", "tgate", "masks", "mask_random", "mask_reward", "init_image",
                 "low_memory", "compile"):
        if args.baseline is not None and getattr(args, name) not in (None, False):
            raise InputError(f"--baseline {args.baseline} can't be combined with --{name.replace('_', '-')}")
    if args.baseline is not None and args.batch_size != 1:
        raise InputError(f"--baseline {args.baseline} draws one picture at a time: leave out --batch-size")


def read_baseline(args: argparse.Namespace, sd: "StableDiffusion", seed: int) -> Model | None:
    """The function in the U-Net's place that --baseline asks for, for the picture of this seed."""
    native, generator = sd.config.size // sd.config.vae.factor, torch.Generator().manual_seed(seed)
    if args.baseline == "scalecrafter":
        until = {"until": (0.4, 0.74)} if sd.config.family == "sd21" else {}
        return scale_crafter(sd.unet, native, guided=args.cfg_scale != 1, **until)
    if args.baseline == "hidiffusion":
        return hidiffusion(sd.unet, native, generator)
    return demo_fusion(sd.unet, native, generator) if args.baseline == "demofusion" else None


def demo_fusion_stages(height: int, width: int, native: int) -> FreeScale:
    """DemoFusion's cascade from the model's own size, in pixels, to this one: once, twice, three times as large, ..."""
    r = math.ceil(max(height, width) / native)
    stages = [tuple(max(round(side * k / r / 8), 1) * 8 for side in (height, width)) for k in range(1, r + 1)]
    return FreeScale(tuple(stages), upsample="latent", restart=0.0, detail=3.0, attention="global", dilate=0.0)


def read_mask(path: Path) -> Tensor:
    """A gray picture as (H, W), true where it isn't black."""
    try:
        with Image.open(path) as file:
            mode, pixels = file.mode, np.asarray(file)
    except UNREADABLE as error:
        raise InputError(f"can't read the mask {path} ({error})") from None
    if mode not in ("1", "L"):
        raise InputError(f"{path} has mode {mode}, but a mask is black and white or gray: save it so")
    return torch.from_numpy(pixels > 0)


def sample_settings(args: argparse.Namespace, config: ModelConfig,
                    size: tuple[int, int] | None = None) -> dict[str, Any]:
    """The flags as arguments of `StableDiffusion.sample`, all but prompts, seeds and starting picture.

    size: height and width of the starting picture, None without one.
    """
    height, width = size or (config.size if side is None else side for side in (args.height, args.width))
    freescale = read_freescale(args, height, width)
    if args.baseline is not None and max(height, width) <= config.size:
        raise InputError(f"--baseline {args.baseline} is for pictures larger than the model's own {config.size} "
                         "pixels: give --width and --height")
    if args.baseline == "demofusion":
        freescale = demo_fusion_stages(height, width, config.size)
    if freescale is not None:
        height, width = freescale.resolutions[-1]
    return {"negative_prompt": args.negative_prompt, "steps": args.steps, "sampler": args.sampler,
            "cfg_scale": args.cfg_scale, "height": height, "width": width, "eta": args.eta, "spacing": args.spacing,
            "freeu": read_freeu(args, config.family), "cache": read_cache(args), "tgate": read_tgate(args),
            "freescale": freescale, "strength": args.strength, "tile": args.vae_tile}


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts in order, each as often as --n says."""
    prompts = [args.prompt]
    if args.from_file:
        try:
            lines = args.from_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"can't read the prompts in {args.from_file} ({error}); it must be a text file") from None
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"{args.from_file} has no prompts; write one on each line")
    return [prompt for prompt in prompts for _ in range(args.n)]


def open_picture(path: Path) -> Image.Image:
    """A picture as it looks: upright, in RGB, over white where it is transparent. InputError where it can't be read."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):                           # 16 bits of gray, which Pillow would clip
                picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            return picture.convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"can't read the picture {path} ({error})") from None


def read_image(args: argparse.Namespace) -> Tensor:
    """--init-image as (1, 3, H, W) in [0, 1], at --width and --height or its own size, rounded to multiples of 8."""
    picture = open_picture(args.init_image)
    width, height = (side or max(round(own / 8) * 8, 8) for side, own in zip((args.width, args.height), picture.size))
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def check_memory(args: argparse.Namespace, config: ModelConfig, freescale: FreeScale, freeu: FreeU | None,
                 images: int, device: torch.device) -> None:
    """InputError for a last stage that the device's free memory can't hold, with the flags that help.

    Only what is sure not to fit is refused. The plan has no margin for what a device's libraries take for themselves,
    and leaves out masks, what a search keeps for its gradients, and the features that caches and T-GATE reuse. (The
    models that reward a search are on the device already: they count as taken.)
    """
    from memory import free_memory, least_memory, plan_stages  # it reaches into PyTorch: not where nobody needs it

    free = free_memory(device)
    if free is None:
        return
    freescale, (height, width) = replace(freescale, native=config.size // config.vae.factor), freescale.resolutions[-1]
    guided = args.cfg_scale != 1
    needed = least_memory(config, height, width, images, guided, args.dtype, args.low_memory)
    if needed <= free:
        if height * width > 2 ** 20:
            print("planning the memory of the last stage: up to a minute", file=sys.stderr)
        needed = plan_stages(config, freescale, images, guided, args.dtype, args.low_memory, freeu,
                             lambda latents: tile_side(args.vae_tile, latents),
                             stages=[len(freescale.resolutions) - 1])[0].memory
    if needed > free:
        flags = [flag for flag, helps in (
            ("--low-memory", not args.low_memory), ("--batch-size 1", images > 1),
            ("--vae-tile 64", args.vae_tile is not None and not 0 < args.vae_tile <= 64),
            ("--dtype bfloat16", args.dtype == torch.float32), ("smaller --resolutions", True)) if helps]
        raise InputError(f"the stage {width}x{height} needs about {needed / 1e9:.2g} GB or more, but there are "
                         f"{free / 1e9:.2g} GB free on {device}: use {' or '.join(flags)}")


def report(args: argparse.Namespace, sd: "StableDiffusion", settings: dict[str, Any], from_picture: bool) -> None:
    """Prints how much of the U-Net runs with the flags' cache and T-GATE, and what speaks against them."""
    cache, tgate, freescale = read_cache(args, sd.unet), settings["tgate"], settings["freescale"]
    if cache is None and tgate is None:
        return
    from memory import run_macs

    steps, factor, units, ran, whole = args.steps, sd.config.vae.factor, [], 0, 0
    runs = [(settings["height"], settings["width"], steps - int(steps * args.strength) if from_picture else 0)]
    if freescale is not None:
        runs = [(*size, freescale.first_step(steps) if k else 0) for k, size in enumerate(freescale.resolutions)]
        runs = runs[from_picture:]
    for height, width, first in runs:
        gate_step = first if tgate is None else tgate.start(steps, first)[0]
        if cache is not None and first < steps:
            features = cache.start(steps, {first, gate_step}, sd.unet)
            units.append(features.units_run(first))
            for note in notes([key for key in sorted(features.keys) if first <= key < steps], steps):
                warnings.warn(note, stacklevel=2)
        with_them, without = (run_macs(sd.unet, height // factor, width // factor, steps, first, args.cfg_scale != 1,
                                       *techniques, sd.config.text_encoder.length)
                              for techniques in ((cache, tgate), (None, None)))
        ran, whole = ran + with_them, whole + without
    names = " and ".join([args.cache] * (cache is not None) + ["T-GATE"] * (tgate is not None))
    told = ["{} of {} units".format(*map(sum, zip(*units)))] if units else []
    if whole and freescale is None:                                    # FreeScale's attention is not in the count
        told.append(f"{ran / 1e9:.4g} of {whole / 1e9:.4g} billion multiply-adds")
    if told:
        fewer = f", {whole / ran:.2f} times fewer" if freescale is None else ""
        print(f"{names}: {' and '.join(told)} of the U-Net run per picture{fewer}", file=sys.stderr)


def file_digest(path: Path) -> str:
    """A file's name and the first digits of its contents' SHA-256."""
    try:
        return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror})") from None


def parameters_texts(args: argparse.Namespace, prompts: list[str], height: int, width: int) -> list[str]:
    """Each picture's settings, in the format that A1111's web UI began and most tools read."""
    solver = {"ddim": "DDIM", "dpm++2m": "DPM++ 2M", "euler": "Euler", "euler-a": "Euler a"}
    pairs = {"Steps": args.steps, "Sampler": solver[args.sampler.removesuffix("-karras")],
             "Schedule type": "Karras" if args.sampler.endswith("-karras") else "Automatic",
             "CFG scale": f"{args.cfg_scale:g}", "Seed": args.seed, "Size": f"{width}x{height}",
             "Model": args.model.name}
    for name, value, default in (("Spacing", args.spacing, None), ("Eta", args.eta, 0.0),
                                 ("Precision", str(args.dtype).removeprefix("torch."), "float32"),
                                 ("Baseline", args.baseline, None), ("VAE tile", args.vae_tile, None)):
        if value != default:
            pairs[name] = value
    if args.init_image:
        pairs["Init image"] = file_digest(args.init_image)
    if args.init_image and args.stages is None:
        pairs["Denoising strength"] = f"{args.strength:g}"
    if args.stages is not None:
        sizes = " ".join(f"{w}x{h}" for h, w in args.stages)
        pairs["FreeScale"] = (f"{sizes} restart {args.freescale_restart:g} dilate {args.freescale_dilate:g} blur "
                              f"{args.freescale_blur} upsample {args.freescale_upsample}"
                              f"{' fast' if args.freescale_fast else ''}")
        pairs["Detail"] = args.detail if args.detail_map is None else f"{args.detail} by {file_digest(args.detail_map)}"
    cache, tgate = read_cache(args), read_tgate(args)
    if args.cache == "deepcache":
        center = "" if cache.center is None else f" center {cache.center}"
        power = "" if cache.power == DeepCache.power else f" power {cache.power:g}"
        schedule = "" if cache.schedule == DeepCache.schedule else f" schedule {cache.schedule}"
        pairs["DeepCache"] = f"interval {cache.interval} branch {cache.branch}{center}{power}{schedule}"
    if args.cache == "faster":                                         # parallel or not, it is the same picture
        below = "" if cache.tau == FasterDiffusion.tau else f" below {cache.tau:g}"
        order = " official order" if cache.official_order else ""
        pairs["Faster Diffusion"] = f"keys {args.cache_keys or cache.keys} noise {cache.alpha:g}{below}{order}"
    if args.cache == "inherit":
        pairs["Inheritance"] = f"units {cache.units} keys {args.cache_keys or f'every:{cache.keys}'}"
    if tgate is not None:
        pairs["T-GATE"] = f"step {tgate.step} text {tgate.text} guidance {tgate.guidance}"
    if args.freeu is not None:
        pairs["FreeU"] = (f"{args.freeu} version {args.freeu_version} {args.freeu_rule} {args.freeu_window} "
                          f"backbone {args.freeu_backbone} skip {args.freeu_skip}")
    if args.skip_tuning is not None:
        pairs["Skip-Tuning"] = args.skip_tuning
    if args.scale_long is not None:
        pairs["ScaleLong"] = args.scale_long
    if args.mask_reward is not None:
        count = 15 if args.mask_iterations is None and args.mask_schedule == "paper" else args.mask_iterations
        count = "" if count is None else f"iterations {count} "
        pairs["Mask search"] = f"{args.mask_reward} {count}{args.mask_schedule} {args.mask_keep}"
    if args.masks is not None or args.mask_random is not None:
        chosen = [flag for flag in ("window", "fixed", "shared") if getattr(args, f"mask_{flag}")]
        what = f"random {args.mask_random:g}" if args.masks is None else file_digest(args.masks)
        pairs["Masks"] = " ".join([what, args.mask_mode, *chosen])
    negative = f"\nNegative prompt: {args.negative_prompt}" if args.negative_prompt is not None else ""
    texts = {name: str(value) for name, value in {**pairs, "RNG": "CPU"}.items()}
    quoted = {name: json.dumps(text) if any(c in text for c in ",:\n") else text for name, text in texts.items()}
    return [f"{prompt}{negative}\n" + ", ".join(f"{name}: {text}" for name, text in {
        **quoted, "Seed": args.seed + k}.items()) for k, prompt in enumerate(prompts)]
