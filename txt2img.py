"""The command line: from a prompt to a picture.

    python txt2img.py "a red circle left of a blue square"
    python txt2img.py "a photograph of an astronaut riding a horse" --model models/sd15 --steps 30 --seed 1

Start at `main`. `TECHNIQUES` is the table of all techniques; their flags, checks, help and metadata are made from their
dataclasses by `settings.py`. Wrong input is refused before weights are loaded.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

try:
    import resource
except ImportError:
    resource = None

from cache import DeepCache, FasterDiffusion, Inherit, TGate, notes
from checkpoint import nearest
from command import (
    ArgumentParser,
    HelpFormatter,
    InputError,
    check_device,
    check_flags,
    file_path,
    make_folder,
    refuse,
    run_command,
    say,
    target,
    typed,
)
from folder import TINY, ModelConfig, check_size, read_config
from freescale import FreeScale
from freeu import FreeU, ScaleLong, SkipTuning
from highres import DemoFusion, HiDiffusion, ScaleCrafter
from maskunet import MaskFile, MaskSearch, RandomMasks
from memory import free_memory, least_memory, plan_stages, run_macs, shape_run
from pictures import file_digest, picture_size, psnr, read_image, read_parameters, save_grid, save_png
from sampler import SAMPLERS
from settings import Kinds, describe, read, write
from stable_diffusion import StableDiffusion, plan_run
from vae import tile_side

# by flag, which is also the argument of `StableDiffusion.sample`: (title in a picture's metadata, kinds, help)
TECHNIQUES: dict[str, tuple[str, Kinds, str]] = {
    "freeu": ("FreeU", {"": FreeU}, "more of the backbone, less of the skips; without settings: published factors"),
    "skips": ("Skips", {"tuning": SkipTuning, "scalelong": ScaleLong}, "factors on skips: tuning,0.9 or scalelong,0.8"),
    "cache": ("Cache", {"deepcache": DeepCache, "faster": FasterDiffusion, "inherit": Inherit},
              "run a part of the U-Net at most steps: deepcache,3 or faster,keys=5 or inherit,mid:u0-u2"),
    "tgate": ("T-GATE", {"": TGate}, "use the text in the first steps only: 10 or 10,guidance=keep"),
    "masks": ("Masks", {"": MaskFile, "random": RandomMasks, "search": MaskSearch},
              "MaskUNet: masks.safetensors, or random,0.05 or search,clip"),
    "freescale": ("FreeScale", {"": FreeScale}, "pictures beyond the model's size: 2 or 512x512:1024x1024"),
    "highres": ("Highres", {"scalecrafter": ScaleCrafter, "hidiffusion": HiDiffusion, "demofusion": DemoFusion},
                "other ways to -W, -H beyond the model's size: scalecrafter, hidiffusion or demofusion"),
}
SAVING = ("cache", "tgate")                      # the techniques that --compare switches off in its second picture
OLD_FLAGS = {                                    # the new spelling of the last release's flags; {}: name=...
    "--freeu-": "--freeu 1.3,1.4,0.9,0.2,{}", "--skip-tuning": "--skips tuning,BOTTOM,TOP",
    "--scale-long": "--skips scalelong,KAPPA", "--cache-noise": "--cache faster,alpha=...",
    "--cache-": "--cache KIND,{}", "--tgate-": "--tgate STEP,{}", "--mask-random": "--masks random,RATIO",
    "--mask-window": "--masks random,RATIO,window", "--mask-reward": "--masks search,REWARD:REWARD",
    **{f"--mask-{name}": f"--masks search,{name}=..." for name in ("iterations", "schedule", "keep", "checkpoint")},
    "--mask-": "--masks FILE,{}", "--resolutions": "--freescale 512x512:1024x1024",
    "--detail-map": "--freescale 2,detail_map=FILE,detail=ALPHA,outside=ALPHA",
    "--detail": "--freescale 2,detail=ALPHA", "--freescale-official": "--freescale 4,blur=official, with other "
    "flags that the README lists", "--freescale-": "--freescale 2,{}", "--baseline": "--highres KIND"}


# -------------------------------------------------------------------------------------------------------------- flags

EXAMPLES = """examples:
  python txt2img.py "two green rings" --n 4 --grid --out rings
  python txt2img.py "a red circle left of a blue square" --freescale 2 --out large.png
  python txt2img.py "an astronaut riding a horse" --model models/sd15 --cache deepcache,3"""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST = 100_000                                   # pictures per command
UNREAD = re.compile(r"\([^()]*:\s*[\d.]+\)|<\w+:[^<>]*>|\bembedding:\S+")        # what other programs read in prompts


def make_parser() -> ArgumentParser:
    """All flags. The prompt is none of its arguments, so that it may stand anywhere: see `parse_arguments`."""
    parser = ArgumentParser(usage='python txt2img.py "PROMPT" [flags]', epilog=EXAMPLES, allow_abbrev=False,
                            formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to draw").add_argument
    add("--from-file", type=file_path, metavar="FILE", help="one prompt per line, instead of PROMPT")
    add("--negative-prompt", metavar="TEXT", help="what the picture should not show")
    add("--init-image", type=file_path, metavar="FILE", help="start from this picture")
    add("--strength", type=float, help="how much of --init-image is redrawn, 0 to 1 (default: 0.8)")
    add("--width", "-W", type=int, metavar="PIXELS", help="(default: the model's own)")
    add("--height", "-H", type=int, metavar="PIXELS", help="(default: the model's own)")
    add("--n", type=int, default=1, help="pictures per prompt")
    add("--seed", type=int, default=0, help="seed of the first picture; picture k has seed + k; -1: a random one")
    add("--out", type=file_path, metavar="PATH",
        help="a .png, or a folder for 00000_SEED.png, ... (default: out.png; out with --from-file)")
    add("--grid", action="store_true", help="also write all pictures as one sheet")
    add = parser.add_argument_group("how to draw it").add_argument
    add("--model", type=file_path, metavar="FOLDER", default=TINY, help="written by convert_weights.py")
    add("--steps", "-s", "--num-inference-steps", type=int, default=30, help="denoising steps per picture")
    add("--sampler", type=sampler_name, metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: the model's, or ddim)")
    add("--spacing", metavar="RULE", help="timesteps: leading, linspace or trailing (default: the model's)")
    add("--eta", type=float, default=0.0, help="noise added at every step: 0 none, 1 as in DDPM")
    add("--cfg-scale", "--scale", "--guidance-scale", type=float, metavar="SCALE",
        help="guidance; 1: none, 0: the negative prompt alone (default: the model's, or 7.5)")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", metavar="NAME", help="cpu, cuda, mps (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="(default: float16 on a GPU, float32 elsewhere)")
    add("--batch-size", type=int, metavar="N", default=1, help="pictures at a time")
    add("--low-memory", action="store_true", help="less memory on the device, slower")
    add("--vae-tile", type=int, metavar="SIDE", help="of the VAE's tiles, in latent pixels; 0: none (default: by size)")
    add("--compile", nargs="?", const="torch", choices=("torch", "openvino"), help="compile the U-Net with PyTorch's "
        "own compiler (torch, the default) or OpenVINO: minutes at first")
    add("--compile-cache", type=Path, metavar="FOLDER", help="where OpenVINO keeps compiled graphs for later runs")
    add("--verify", action="store_true", help="compare the model's files with their digests")
    add = parser.add_argument_group("techniques, with their settings: values in order, then name=value").add_argument
    for name, (_, kinds, said) in TECHNIQUES.items():
        alone = {"nargs": "?", "const": FreeU()} if name == "freeu" else {}
        add(f"--{name}", metavar="SETTINGS", type=typed(partial(read, kinds=kinds)), help=said, **alone)
    add("--compare", action="store_true", help="also draw each picture without cache and T-GATE, for a sheet of both "
        "and the speed-up")
    add("--help-technique", choices=TECHNIQUES, metavar="NAME", action=HelpTechnique,
        help=f"show all settings of {', '.join(TECHNIQUES)}")
    return parser


class HelpTechnique(argparse.Action):
    """--help-technique NAME: prints the settings of one technique, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        for kind, settings in TECHNIQUES[rest[1]][1].items():
            print(describe(kind, settings, shutil.get_terminal_size().columns))
        parser.exit()


def sampler_name(text: str) -> str:
    """The name here of a sampler as other programs call it: k_euler_ancestral, dpmpp_2m, "DPM++ 2M Karras"."""
    name = re.sub(r"^k_|[^a-z0-9+]", "", text.lower()).replace("dpmpp", "dpm++").replace("ancestral", "a")
    return next((own for own in SAMPLERS if own.replace("-", "") == name), text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; see `check_arguments` for what is filled in. The prompt may stand anywhere."""
    argv = sys.argv[1:] if argv is None else argv
    flags = argv[:argv.index("--")] if "--" in argv else argv
    prompts, flags = argv[len(flags) + 1:], [re.sub(r"^--\w+", lambda name: name[0].replace("_", "-"), text)
                                             for text in flags]
    for flag in (text.partition("=")[0] for text in flags):
        old = next((old for old in OLD_FLAGS if flag.startswith(old)), None)
        if old is not None:
            new = OLD_FLAGS[old].format(flag.removeprefix(old).replace("-", "_") + "=...")
            raise InputError(f"{flag} is now written {new} (see --help-technique {new.split()[0].removeprefix('--')})")
    for k, (flag, text) in enumerate(zip(flags, flags[1:])):
        if flag == "--freeu" and (" " in text or text.isalpha() and text != "none") or (
                flag == "--compile" and text not in ("torch", "openvino") and not text.startswith("-")):
            prompts = [flags.pop(k + 1), *prompts]                     # no settings, but the prompt
            break
    parser = make_parser()
    args, others = parser.parse_known_args(flags)
    for text in others:
        if text.startswith("-") and " " not in text:
            raise InputError(f"there is no flag {text}" + nearest(text, re.findall(r"--[\w-]+", parser.format_help())))
    prompts = others + prompts
    if len(prompts) + (args.from_file is not None) != 1:
        given = [*map(repr, prompts), *([f"--from-file {args.from_file}"] if args.from_file else [])]
        raise InputError("give one prompt, in quotation marks, or a file of prompts with --from-file"
                         + f", not {' and '.join(given)}" * bool(given))
    args.prompt = prompts[0] if prompts else None
    return check_arguments(args)


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in the defaults, the model's config and the plan of the run. InputError for what can't be obeyed."""
    check_flags(("--n", 1 <= args.n <= MOST, f"1 to {MOST}"), ("--batch-size", args.batch_size >= 1, "1 or more"),
                ("--strength", args.strength is None or 0 <= args.strength <= 1, "between 0 and 1"),
                ("--seed", -1 <= args.seed <= 2 ** 63 - args.n, f"0 to {2 ** 63 - args.n}, or -1 for a random one"),
                ("--cfg-scale", args.cfg_scale is None or math.isfinite(args.cfg_scale), "a finite number"),
                ("--vae-tile", args.vae_tile in (None, 0) or args.vae_tile >= 8, "0, or 8 or more"))
    if args.compile_cache is not None and args.compile != "openvino":
        raise InputError("--compile-cache does nothing without --compile openvino")
    config = args.config = read_config(args.model)
    sizes, world = getattr(args.freescale, "resolutions", None), int(os.environ.get("WORLD_SIZE", 1))
    sizes = sizes if isinstance(sizes, tuple) else ()
    args.out = args.out or Path("out" if args.from_file else "out.png")
    is_folder, ending = args.out.is_dir(), args.out.suffix.lower()
    args.one_file = ending == ".png" and not is_folder
    refuse(
        (args.compare and all(getattr(args, name) is None for name in SAVING),
         "--compare needs something to compare: add --cache or --tgate"),
        (args.highres and args.freescale, "--highres and --freescale are two ways to large pictures; give one of them"),
        *((isinstance(args.highres, DemoFusion) and getattr(args, name.replace("-", "_")) is not None,
           f"--highres demofusion can't be combined with --{name}") for name in (*SAVING, "init-image")),
        (isinstance(args.masks, MaskSearch) and getattr(args.cache, "parallel", False),
         "a search for masks needs every step's latents: leave out the parallel of --cache"),
        (args.strength is not None and args.init_image is None, "--strength does nothing without --init-image"),
        (args.strength is not None and args.freescale,
         "--strength is for a picture of the same size; FreeScale's stages take restart instead"),
        (sizes and (args.width or args.height), "--freescale gives all sizes: leave out --width and --height"),
        (args.init_image and len(sizes) == 1,
         "--init-image takes the place of FreeScale's first stage: give a second, larger one"),
        (not args.one_file and not is_folder and re.fullmatch(r"\.[a-z][a-z0-9]{1,4}", ending),
         f"only PNG files are written: --out can't be {args.out} (for a folder of this name, make it first)"),
        (args.from_file and args.one_file,
         f"--from-file writes many pictures: --out must be a folder, not {args.out}"),
        (world > 1 and args.grid,
         "--grid needs all pictures in one process: run again without torchrun, finished ones are kept"),
        (world > 1 and args.seed < 0, "--seed -1 draws another seed in every process of torchrun: give one"))
    args.height, args.width = sizes[0] if sizes else (args.height, args.width)
    check_size(8 if args.height is None else args.height, 8 if args.width is None else args.width)
    args.strength = 0.8 if args.strength is None else args.strength
    refuse(*((re.search(r"[\0\ud800-\udfff]", text or ""), f"{name} has a NUL or bytes that are no UTF-8: {text!r}")
             for name, text in (("the prompt", args.prompt), ("--negative-prompt", args.negative_prompt))))
    redrawn = args.strength if args.init_image and args.freescale is None else None
    args.plan, args.cfg_scale = plan_run(config, args.steps, args.sampler, args.cfg_scale, args.negative_prompt,
                                         args.eta, args.spacing, redrawn)
    args.sampler = args.plan.sampler
    args.seed = random.SystemRandom().randrange(2 ** 32) if args.seed < 0 else args.seed
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = check_device(args.device).type
    args.dtype = DTYPES[args.dtype or ("float32" if kind == "cpu" else "float16")]
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts in order, each as often as --n says. Warns of what other programs would read in them."""
    prompts = [args.prompt]
    if args.from_file:
        try:
            with args.from_file.open("rb") as file:
                data = file.read(10 ** 7 + 1)                          # a device has no end
            text = data.decode("utf-8-sig")
            refuse((b"\0" in data, "it has a NUL"), (len(data) > 10 ** 7, "it has more than 10 MB"))
        except (OSError, ValueError) as error:
            raise InputError(f"can't read the prompts in {args.from_file} ({error}); it must be a text file") from None
        prompts = [line.strip() for line in re.split(r"\r\n?|\n", text) if line.strip()]
    refuse((not prompts, f"{args.from_file} has no prompts; write one on each line"),
           (len(prompts) * args.n > MOST, f"{len(prompts) * args.n} pictures are too many; at most {MOST} per command"))
    unread = list(dict.fromkeys(UNREAD.findall("\n".join([*prompts, args.negative_prompt or ""]))))
    if unread:
        warnings.warn(f"read as plain words: {', '.join(unread[:3])}; prompt weights, LoRA and embeddings are not "
                      "supported", stacklevel=2)
    return [prompt for prompt in prompts for _ in range(args.n)]


def bind_techniques(args: argparse.Namespace, config: ModelConfig, height: int, width: int) -> dict[str, Any]:
    """The techniques of the flags, completed from the model's config. InputError if they don't fit this model or run.

    height, width: of the picture or, with FreeScale, of its first stage.
    """
    techniques = {name: getattr(args, name) for name in TECHNIQUES if getattr(args, name) is not None}
    native, unloaded = config.size // config.vae.factor, SimpleNamespace(config=config)
    try:
        for folder in reward_folders(args):
            refuse((not folder.exists(), f"there is no folder {folder} with a reward; make one: python "
                    f"convert_weights.py SOURCE {folder} --reward clip (or hps, imagereward)"))
        for name, settings in techniques.items():
            if name in ("freeu", "highres"):
                techniques[name] = settings.bind(unloaded)
            if hasattr(settings, "check"):
                settings.check(config.unet, args.steps, guided=args.cfg_scale != 1)
        if args.freescale is not None:
            techniques["freescale"] = args.freescale.fit(native, height, width)
            check_size(*techniques["freescale"].resolutions[-1])
    except (OSError, ValueError) as error:                             # OSError: a name that is too long
        raise InputError(str(error)) from None
    refuse((args.highres is not None and max(height, width) <= config.size, "--highres is for pictures larger than the "
            f"model's own {config.size} pixels: give --width and --height"))
    return techniques


def reward_folders(args: argparse.Namespace) -> list[Path]:
    return [args.model / "clip" if name == "clip" else Path(name) for name in getattr(args.masks, "reward", ())]


def check_memory(args: argparse.Namespace, techniques: dict[str, Any], height: int, width: int, images: int,
                 device: torch.device) -> None:
    """InputError, with the flags that help, if the device's free memory can't hold pictures of this size.

    Rough bounds come first: the least that is needed; and the most, 40 times as much, plus a VAE without tiles. If the
    free memory lies between them, `plan_stages` decides. Not counted: the memory of the device's libraries, masks, what
    a search keeps for its gradients, and what caches and T-GATE keep. So what is refused would certainly not fit.
    """
    free, config, guided = free_memory(device), args.config, args.cfg_scale != 1
    if free is None:
        return
    rewards, weights = (sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
                        for folders in (reward_folders(args), [args.model]))
    least = 24 * images * height * width                               # the pictures, twice
    if not isinstance(args.highres, DemoFusion):                       # it never runs the whole picture
        least = least_memory(config, height, width, images, guided, args.dtype, args.low_memory)
    needed, most = least + rewards, 40 * least + 32 * config.vae.channels[0] * height * width + 2 * weights + rewards
    if needed <= free < most and args.highres is None:
        if height * width > 2 ** 22:
            print("planning the memory: some seconds", file=sys.stderr)
        freescale = techniques.get("freescale") or FreeScale(((height, width),), native=1)
        acting = {name: techniques[name] for name in ("freeu", "skips") if name in techniques}
        needed = rewards + plan_stages(config, freescale, images, guided, args.dtype, args.low_memory,
                                       partial(tile_side, args.vae_tile), [len(freescale.resolutions) - 1],
                                       **acting)[0].memory
    smaller = "a smaller --freescale" if args.freescale else "smaller --width and --height"
    flags = [flag for flag, helps in (
        ("--low-memory", not args.low_memory), ("--batch-size 1", images > 1),
        ("--vae-tile 64", args.vae_tile is not None and not 0 < args.vae_tile <= 64),
        ("--dtype bfloat16", args.dtype == torch.float32), (smaller, True)) if helps]
    refuse((needed > free, f"{width}x{height} pixels{f', {images} pictures at a time,' * (images > 1)} need about "
            f"{needed / 1e9:.2g} GB or more, but there are {free / 1e9:.2g} GB free on {device}: use "
            f"{' or '.join(flags)}"))


# ------------------------------------------------------------------------------------------------------------ pictures

def picture_paths(args: argparse.Namespace, count: int) -> list[Path]:
    """Where each picture goes: out.png; out_SEED.png for several; 00000_SEED.png, ... in a folder."""
    seeds = range(args.seed, args.seed + count)
    if not args.one_file:
        paths = [args.out / f"{k:05d}_{seed}.png" for k, seed in enumerate(seeds)]
    else:
        paths = [args.out] if count == 1 else [args.out.with_stem(f"{args.out.stem}_{seed}") for seed in seeds]
        for path in paths:
            target(path)
    refuse((len(os.fsencode(compared(paths[-1]).name)) > 255,
            f"the name {paths[-1].name} is too long; choose a shorter --out"))
    return paths


def compared(path: Path) -> Path:
    """Where --compare puts a picture beside the one without techniques."""
    return path.with_stem(f"{path.stem}_compare")


def finished(path: Path, parameters: str) -> bool:
    """Did an earlier run make this picture with these settings? InputError if another picture is in its place.

    The settings contain only the name of the model's folder, but digests of other files.
    """
    there = path.exists()
    refuse((there and read_parameters(path) != parameters,
            f"{path} is there already, made with another prompt or other settings; choose another --out"))
    return there


def parameters_texts(args: argparse.Namespace, prompts: list[str], techniques: dict[str, Any], height: int,
                     width: int) -> list[str]:
    """The settings of each picture, in the format that A1111's web UI began and most tools read.

    A technique's entry is the text of its flag, without what changes no picture; files are written as name and digest.
    """
    solver = {"ddim": "DDIM", "dpm++2m": "DPM++ 2M", "euler": "Euler", "euler-a": "Euler a", "heun": "Heun"}
    pairs = {"Steps": args.steps, "Sampler": solver[args.sampler.removesuffix("-karras")],
             "Schedule type": "Karras" if args.sampler.endswith("-karras") else "Automatic",
             "CFG scale": f"{args.cfg_scale:g}", "Seed": args.seed, "Size": f"{width}x{height}",
             "Model": args.model.name}
    for name, value, default in (("Spacing", args.spacing, None), ("Eta", args.eta, 0.0),
                                 ("Precision", str(args.dtype).removeprefix("torch."), "float32"),
                                 ("VAE tile", args.vae_tile, None)):
        if value != default:
            pairs[name] = value
    if args.init_image:
        pairs["Init image"] = file_digest(args.init_image)
    if args.init_image and args.freescale is None:
        pairs["Denoising strength"] = f"{args.strength:g}"
    for name, settings in techniques.items():
        title, kinds, _ = TECHNIQUES[name]
        kind = next(kind for kind, settings_type in kinds.items() if type(settings) is settings_type)
        pairs[title] = write(settings.canonical() if hasattr(settings, "canonical") else settings, kind, file_digest)
    negative = f"\nNegative prompt: {args.negative_prompt}" if args.negative_prompt is not None else ""
    texts = {name: str(value).encode(errors="backslashreplace").decode() for name, value in {
        **pairs, "RNG": "CPU"}.items()}                                # names of files can be no UTF-8
    quoted = {name: json.dumps(text) if any(c in text for c in ",:\n") else text for name, text in texts.items()}
    return [f"{prompt}{negative}\n" + ", ".join(f"{name}: {text}" for name, text in {
        **quoted, "Seed": args.seed + k}.items()) for k, prompt in enumerate(prompts)]


def report(sd: StableDiffusion, args: argparse.Namespace, techniques: dict[str, Any],
           sizes: list[tuple[int, int, int]]) -> None:
    """Prints how much of the U-Net runs with a cache and T-GATE, and warns of unusual settings.

    sizes: of every stage height, width, and the first step.
    """
    saving, steps = {name: techniques[name] for name in SAVING if name in techniques}, args.steps
    if not saving:
        return
    units, ran, whole = [], 0, 0
    for height, width, first in sizes:
        shape, guided = (height // sd.config.vae.factor, width // sd.config.vae.factor), args.cfg_scale != 1
        run = shape_run(sd.unet, *shape, steps, first, guided, args.sampler, **saving)
        tokens = sd.config.text_encoder.length
        cache, calls = run.acting.get("cache"), range(run.first, run.plan.calls)
        if cache is not None:
            units.append((sum(len(cache.units(i)) for i in calls), (2 * sd.unet.middle + 1) * len(calls)))
            for note in notes(sorted({run.plan.step(i) for i in calls if i in cache.keys}), steps):
                warnings.warn(note, stacklevel=2)
        ran += run_macs(sd.unet, *shape, steps, first, guided, tokens, args.sampler, **saving)
        whole += run_macs(sd.unet, *shape, steps, first, guided, tokens, args.sampler)
    told = ["{} of {} units".format(*map(sum, zip(*units)))] if units else []
    if whole and args.freescale is None:                               # FreeScale's attention is not in the count
        told.append(f"{ran / 1e9:.4g} of {whole / 1e9:.4g} billion multiply-adds")
    if told:
        fewer = f", {whole / ran:.2f} times fewer" if args.freescale is None else ""
        names = " and ".join(TECHNIQUES[name][0] for name in saving)
        print(f"{names}: {' and '.join(told)} of the U-Net run per picture{fewer}", file=sys.stderr)


def peak_memory(device: torch.device) -> float:
    """Gigabytes: of the GPU's memory by tensors, or of main memory by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:                           # not getrusage's maximum, which includes the starting process
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    if resource is None:                                               # Windows keeps no such record
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def note_busy_cores() -> None:
    """On Linux, warns where other programs use cores that PyTorch's threads would wait for."""
    status = Path("/proc/loadavg")
    if status.is_file() and "OMP_NUM_THREADS" not in os.environ:
        load, _, _, running, _ = status.read_text().split()            # over the last minute, and now
        cores, others = os.cpu_count() or 1, round(min(float(load), int(running.split("/")[0]) - 1))
        if torch.get_num_threads() > max(cores - others, 1):
            warnings.warn(f"other programs keep {min(others, cores)} of {cores} cores busy, and threads wait for each "
                          f"other: OMP_NUM_THREADS={max(cores - others, 1)} is often twice as fast", stacklevel=2)


# ------------------------------------------------------------------------------------------------------------ the work

def main() -> None:
    warnings.showwarning = lambda message, *_: tqdm.write(f"note: {message}", file=sys.stderr)
    args = parse_arguments()
    prompts, config = read_prompts(args), args.config
    own = picture_size(args.init_image) if args.init_image else (config.size, config.size)
    height, width = args.height or own[0], args.width or own[1]
    techniques = bind_techniques(args, config, height, width)
    first = args.steps - int(args.steps * args.strength)
    cascade, sizes = techniques.get("freescale"), [(height, width, first if args.init_image else 0)]
    if isinstance(args.highres, DemoFusion):
        cascade = args.highres.stages(config.size, height, width)
    if cascade is not None:
        later = cascade.first_step(args.steps)
        sizes = [(*size, later if k else 0) for k, size in enumerate(cascade.resolutions)][args.init_image is not None:]
    paths = picture_paths(args, len(prompts))
    parameters = parameters_texts(args, prompts, techniques, *sizes[-1][:2])

    # Under torchrun each process takes every world-th picture; nothing is exchanged: a picture depends on its seed only
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = range(rank, len(prompts), world)
    todo = [k for k in mine if args.one_file or not finished(paths[k], parameters[k])
            or args.compare and not compared(paths[k]).exists()]
    if todo:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and args.device == "cuda" else args.device
        check_memory(args, techniques, *sizes[-1][:2], min(args.batch_size, len(todo)), torch.device(device))
        init_image = read_image(args.init_image, height, width) if args.init_image else None
        make_folder(paths[0].parent)
        sd = StableDiffusion.load(args.model, device, args.dtype, args.low_memory, args.compile, args.verify,
                                  args.compile_cache)
        sd.tile, sd.known = args.vae_tile, {}
        try:
            techniques = {name: settings.bind(sd) if hasattr(settings, "bind") else settings
                          for name, settings in techniques.items()}
            report(sd, args, techniques, sizes)
        except ValueError as error:
            raise InputError(str(error)) from None
        if sd.device.type == "cpu":
            note_busy_cores()
        draw_pictures(sd, args, techniques, prompts, paths, parameters, todo, init_image,
                      len(sizes) if rank == 0 else 0)
    if len(todo) < len(mine):
        say(f"{len(mine) - len(todo)} of {len(mine)} were there already in {args.out}")
    if args.grid:
        sheet = args.out.with_stem(f"{args.out.stem}_grid") if args.one_file else args.out / "grid.png"
        save_grid(paths, sheet)
        say(str(sheet))


def draw_pictures(sd: StableDiffusion, args: argparse.Namespace, techniques: dict[str, Any], prompts: list[str],
                  paths: list[Path], parameters: list[str], todo: list[int], init_image: Tensor | None,
                  stages: int) -> None:
    """Draws and writes the pictures with these numbers. stages: for the progress bar; 0: no bar."""
    init = None if init_image is None else sd.encode(init_image)
    size = {} if args.freescale is not None else {"height": args.height, "width": args.width}
    plain_techniques = {name: settings for name, settings in techniques.items() if name not in SAVING}

    def draw(batch: list[int], techniques: dict = techniques) -> tuple[Tensor, float]:
        """The latents of these pictures, and the seconds that sampling took."""
        with tqdm(total=stages * args.plan.calls, desc=f"picture {batch[-1] + 1} of {len(prompts)}", unit="call",
                  leave=False, disable=not stages) as bar:
            started = time.perf_counter()
            try:
                latents = sd.sample(
                    [prompts[k] for k in batch], args.negative_prompt, args.steps, args.sampler, args.cfg_scale,
                    [args.seed + k for k in batch], eta=args.eta, spacing=args.spacing, init=init,
                    strength=args.strength, callback=lambda i, _: bar.update(i + 1 - bar.n), **size, **techniques)
            except ValueError as error:                                # techniques that don't go together
                raise InputError(str(error)) from None
            return latents, time.perf_counter() - started              # `sample` has looked at the result: it is there

    for start in range(0, len(todo), args.batch_size):
        batch, plain, started = todo[start:start + args.batch_size], None, time.time()
        if args.compare:
            if args.compile and (start == 0 or len(batch) < args.batch_size):
                draw(batch, plain_techniques)                          # makes the graphs of every kind of step
                draw(batch)
            elif start == 0:                                           # the first pass of a process is a slow one
                sd.sample([prompts[k] for k in batch], args.negative_prompt, 1, cfg_scale=args.cfg_scale, **size)
            plain, seconds_plain = draw(batch, plain_techniques)
            plain = sd.decode(plain)
        latents, seconds_sampling = draw(batch)
        images = sd.decode(latents)
        seconds = (time.time() - started) / len(batch)
        for i, (k, image) in enumerate(zip(batch, images)):
            save_png(image, paths[k], parameters[k])
            say(f"{paths[k]}  seed {args.seed + k}  {seconds:.1f} s  peak memory {peak_memory(sd.device):.2f} GB")
            if plain is not None:
                both = compared(paths[k])
                save_png(torch.cat([plain[i], image], dim=2), both, f"left: without cache and T-GATE\n{parameters[k]}")
                say(f"{both}  PSNR {psnr(image, plain[i]):.1f} dB")
        if plain is not None:
            say(f"sampling {seconds_sampling:.2f} s, {seconds_plain:.2f} s without cache and T-GATE: "
                f"{seconds_plain / seconds_sampling:.2f} times as fast")


if __name__ == "__main__":
    run_command(main)
