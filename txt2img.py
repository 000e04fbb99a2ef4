"""The command line: from a prompt to a picture.

    python txt2img.py "a red circle left of a blue square"
    python txt2img.py "a photograph of an astronaut riding a horse" --model models/sd15 --steps 30 --seed 1

Start at `main`. `TECHNIQUES` is the table of all techniques; their flags, checks, help and metadata are made from their
dataclasses by `settings.py`. What can be known to be wrong is said before gigabytes are loaded.
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
import warnings
from itertools import takewhile
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
from command import ArgumentParser, HelpFormatter, InputError, check_device, check_flags, check_writable, run_command
from folder import TINY, ModelConfig, check_size, read_config
from freescale import FreeScale
from freeu import FreeU, ScaleLong, SkipTuning
from highres import DemoFusion, HiDiffusion, ScaleCrafter
from maskunet import MaskFile, MaskSearch, RandomMasks
from pictures import file_digest, psnr, read_image, read_parameters, save_grid, save_png
from sampler import SAMPLERS, plan
from settings import Kinds, describe, read, write
from stable_diffusion import StableDiffusion
from vae import tile_side

# flag and argument of `StableDiffusion.sample`: (name in a picture's metadata, kinds, what --help says)
TECHNIQUES: dict[str, tuple[str, Kinds, str]] = {
    "freeu": ("FreeU", {"": FreeU}, "more of the backbone, less of the skips; alone: the published factors"),
    "skips": ("Skips", {"tuning": SkipTuning, "scalelong": ScaleLong}, "factors on skips: tuning,0.9 or scalelong,0.8"),
    "cache": ("Cache", {"deepcache": DeepCache, "faster": FasterDiffusion, "inherit": Inherit},
              "run a part of the U-Net at most steps: deepcache,3 or faster,keys=5 or inherit,mid:u0-u2"),
    "tgate": ("T-GATE", {"": TGate}, "the text acts in the first steps alone: 10 or 10,guidance=keep"),
    "masks": ("Masks", {"": MaskFile, "random": RandomMasks, "search": MaskSearch},
              "MaskUNet: masks.safetensors, or random,0.05 or search,clip"),
    "freescale": ("FreeScale", {"": FreeScale}, "pictures beyond the model's size: 2 or 512x512:1024x1024"),
    "highres": ("Highres", {"scalecrafter": ScaleCrafter, "hidiffusion": HiDiffusion, "demofusion": DemoFusion},
                "other ways to -W, -H beyond the model's size: scalecrafter, hidiffusion or demofusion"),
}
SAVING = ("cache", "tgate")                      # what --compare leaves out of the picture that it compares with
OLD_FLAGS = {                                    # how flags of the last release are written now; {}: name=...
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

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    refuse_old_flags(argv)
    parser = ArgumentParser(description="From a prompt to a picture with Stable Diffusion.",
                            formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("prompt", nargs="?", help="what the picture should show")
    parser.add_argument("--from-file", type=Path, metavar="FILE", help="one prompt per line, instead of PROMPT")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what it should not show")
    parser.add_argument("--model", type=Path, metavar="FOLDER", default=TINY, help="written by convert_weights.py")
    parser.add_argument("--out", type=Path, metavar="PATH",
                        help="a .png, or a folder for 00000_SEED.png, ... (default: out.png; out with --from-file)")
    parser.add_argument("--n", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; picture k has seed + k")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps per picture")
    parser.add_argument("--sampler", metavar="NAME", default="ddim", help=", ".join(SAMPLERS))
    parser.add_argument("--spacing", metavar="RULE", help="of the times: leading, linspace or trailing (default: the "
                        "model's)")
    parser.add_argument("--eta", type=float, default=0.0, help="noise added at every step: 0 none, 1 as in DDPM")
    parser.add_argument("--cfg-scale", type=float, metavar="SCALE", default=7.5,
                        help="guidance; 1: none, 0: the negative prompt alone")
    parser.add_argument("--width", "-W", type=int, metavar="PIXELS", help="(default: the model's own)")
    parser.add_argument("--height", "-H", type=int, metavar="PIXELS", help="(default: the model's own)")
    parser.add_argument("--init-image", type=Path, metavar="FILE", help="start from this picture")
    parser.add_argument("--strength", type=float, help="how much of --init-image is redrawn, 0 to 1 (default: 0.8)")
    parser.add_argument("--grid", action="store_true", help="also write all pictures as one sheet")
    parser.add_argument("--batch-size", type=int, metavar="N", default=1, help="pictures at a time")
    parser.add_argument("--vae-tile", type=int, metavar="SIDE", help="of VAE tiles in latent pixels, 0: none (default: "
                        "by size)")
    parser.add_argument("--low-memory", action="store_true", help="less memory on the device, slower")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net: minutes at first")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float16 on a GPU, float32 elsewhere)")
    group = parser.add_argument_group("techniques, with their settings: values in order, then name=value")
    for name, (_, kinds, said) in TECHNIQUES.items():
        alone = {"nargs": "?", "const": FreeU()} if name == "freeu" else {}
        group.add_argument(f"--{name}", metavar="SETTINGS", type=reader(kinds), help=said, **alone)
    group.add_argument("--compare", action="store_true", help="also draw each picture without cache and T-GATE, for a "
                       "sheet of both and the speed-up")
    group.add_argument("--help-technique", choices=TECHNIQUES, metavar="NAME", action=HelpTechnique,
                       help=f"show all settings of {', '.join(TECHNIQUES)}")
    return check_arguments(parser.parse_args(argv))


def refuse_old_flags(argv: list[str]) -> None:
    """InputError for a flag of the last release, with what is written now."""
    for flag in (argument.partition("=")[0] for argument in takewhile(lambda argument: argument != "--", argv)):
        old = next((old for old in OLD_FLAGS if flag.startswith(old)), None)
        if old is not None:
            new = OLD_FLAGS[old].format(flag.removeprefix(old).replace("-", "_") + "=...")
            raise InputError(f"{flag} is now written {new} (see --help-technique {new.split()[0].removeprefix('--')})")


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class HelpTechnique(argparse.Action):
    """--help-technique NAME: prints the settings of one technique, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        for kind, settings in TECHNIQUES[rest[1]][1].items():
            print(describe(kind, settings, shutil.get_terminal_size().columns))
        parser.exit()


def reader(kinds: Kinds) -> Any:
    """What argparse makes of a technique's text."""
    def read_settings(text: str) -> Any:
        try:
            return read(text, kinds)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return read_settings


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with what follows from others filled in; InputError for what can be known to be wrong already."""
    if args.compare and all(getattr(args, name) is None for name in SAVING):
        raise InputError("--compare needs something to compare: add --cache or --tgate")
    if args.highres is not None and args.freescale is not None:
        raise InputError("--highres and --freescale are two ways to large pictures; give one of them")
    if isinstance(args.highres, DemoFusion):
        for name in (*SAVING, "init_image"):
            if getattr(args, name) is not None:
                raise InputError(f"--highres demofusion can't be combined with --{name.replace('_', '-')}")
    if isinstance(args.masks, MaskSearch) and getattr(args.cache, "parallel", False):
        raise InputError("a search for masks needs every step's latents: leave out the parallel of --cache")
    if args.strength is not None and args.init_image is None:
        raise InputError("--strength does nothing without --init-image")
    if args.strength is not None and args.freescale is not None:
        raise InputError("--strength is for a picture of the same size; FreeScale's stages take restart instead")
    args.strength = 0.8 if args.strength is None else args.strength
    sizes = getattr(args.freescale, "resolutions", None)
    if isinstance(sizes, tuple):
        if (args.width, args.height) != (None, None):
            raise InputError("--freescale gives all sizes: leave out --width and --height")
        if args.init_image and len(sizes) == 1:
            raise InputError("--init-image takes the place of FreeScale's first stage: give a second, larger one")
        args.height, args.width = sizes[0]
    try:
        plan(args.sampler, args.steps, spacing=args.spacing, eta=args.eta)
    except ValueError as error:
        raise InputError(str(error)) from None
    check_flags(("--n", args.n >= 1, "1 or more"), ("--batch-size", args.batch_size >= 1, "1 or more"),
                ("--strength", 0 <= args.strength <= 1, "between 0 and 1"),
                ("--seed", 0 <= args.seed < 2 ** 63, "0 or more"),
                ("--cfg-scale", math.isfinite(args.cfg_scale), "a finite number"),
                ("--vae-tile", args.vae_tile in (None, 0) or args.vae_tile >= 8, "0, or 8 or more"))
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


def bind_techniques(args: argparse.Namespace, config: ModelConfig, height: int, width: int) -> dict[str, Any]:
    """The techniques that the flags ask for, with all that the model's config says; InputError where they don't fit it.

    height, width: the picture's without FreeScale, and of FreeScale's first stage.
    """
    techniques = {name: getattr(args, name) for name in TECHNIQUES if getattr(args, name) is not None}
    native, unloaded = config.size // config.vae.factor, SimpleNamespace(config=config)
    for folder in (args.model / "clip" if name == "clip" else Path(name) for name in getattr(args.masks, "reward", ())):
        if not folder.exists():
            raise InputError(f"there is no folder {folder} with a reward; make one: python convert_weights.py SOURCE "
                             f"{folder} --reward clip (or hps, imagereward)")
    try:
        for name, settings in techniques.items():
            if name in ("freeu", "highres"):
                techniques[name] = settings.bind(unloaded)
            if hasattr(settings, "check"):
                settings.check(config.unet, args.steps, guided=args.cfg_scale != 1)
        if args.freescale is not None:
            techniques["freescale"] = args.freescale.fit(native, height, width)
            check_size(*techniques["freescale"].resolutions[-1])
    except ValueError as error:
        raise InputError(str(error)) from None
    if args.highres is not None and max(height, width) <= config.size:
        raise InputError(f"--highres is for pictures larger than the model's own {config.size} pixels: give --width "
                         "and --height")
    return techniques


def check_memory(args: argparse.Namespace, config: ModelConfig, techniques: dict[str, Any], images: int,
                 device: torch.device) -> None:
    """InputError for a last stage that the device's free memory can't hold, with the flags that help.

    Only what is sure not to fit is refused. The plan leaves out what a device's libraries take for themselves, masks,
    what a search keeps for its gradients, and the features that caches and T-GATE reuse.
    """
    from memory import free_memory, least_memory, plan_stages  # it reaches into PyTorch: slow to import

    free, freescale = free_memory(device), techniques["freescale"]
    if free is None:
        return
    (height, width), guided = freescale.resolutions[-1], args.cfg_scale != 1
    needed = least_memory(config, height, width, images, guided, args.dtype, args.low_memory)
    if needed <= free:
        if height * width > 2 ** 20:
            print("planning the memory of the last stage: up to a minute", file=sys.stderr)
        freeu = {name: techniques[name] for name in ("freeu", "skips") if name in techniques}
        needed = plan_stages(config, freescale, images, guided, args.dtype, args.low_memory,
                             lambda latents: tile_side(args.vae_tile, latents), [len(freescale.resolutions) - 1],
                             **freeu)[0].memory
    if needed > free:
        flags = [flag for flag, helps in (
            ("--low-memory", not args.low_memory), ("--batch-size 1", images > 1),
            ("--vae-tile 64", args.vae_tile is not None and not 0 < args.vae_tile <= 64),
            ("--dtype bfloat16", args.dtype == torch.float32), ("a smaller --freescale", True)) if helps]
        raise InputError(f"the stage {width}x{height} needs about {needed / 1e9:.2g} GB or more, but there are "
                         f"{free / 1e9:.2g} GB free on {device}: use {' or '.join(flags)}")


# ------------------------------------------------------------------------------------------------------------ pictures

def picture_paths(args: argparse.Namespace, count: int) -> list[Path]:
    """Where each picture goes: out.png; out_SEED.png for several; 00000_SEED.png, ... in a folder. Makes the folder."""
    seeds = range(args.seed, args.seed + count)
    if args.one_file:
        folder = args.out.parent
        paths = [args.out] if count == 1 else [args.out.with_stem(f"{args.out.stem}_{seed}") for seed in seeds]
    else:
        folder = args.out
        paths = [folder / f"{k:05d}_{seed}.png" for k, seed in enumerate(seeds)]
    if len(os.fsencode(compared(paths[-1]).name)) > 255:
        raise InputError(f"the name {paths[-1].name} is too long; choose a shorter --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {folder} ({error.strerror}); choose another --out") from None
    check_writable(folder)
    return paths


def compared(path: Path) -> Path:
    """Where --compare puts a picture beside the one without techniques."""
    return path.with_stem(f"{path.stem}_compare")


def finished(path: Path, parameters: str) -> bool:
    """Whether an earlier run made this picture, by its text of settings; InputError for another one in its place.

    The text has only the name of the model's folder, and digests of other files.
    """
    if not path.exists():
        return False
    if read_parameters(path) != parameters:
        raise InputError(f"{path} is there already, made with another prompt or other settings; choose another --out")
    return True


def parameters_texts(args: argparse.Namespace, prompts: list[str], techniques: dict[str, Any], height: int,
                     width: int) -> list[str]:
    """The settings of each picture, in the format that A1111's web UI began and most tools read.

    A technique's entry is the text of its flag; files are written as name and digest.
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
        pairs[title] = write(settings, kind, file_digest)
    negative = f"\nNegative prompt: {args.negative_prompt}" if args.negative_prompt is not None else ""
    texts = {name: str(value) for name, value in {**pairs, "RNG": "CPU"}.items()}
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
    from memory import run_macs, shape_run  # it reaches into PyTorch: slow to import

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


# ------------------------------------------------------------------------------------------------------------ the work

def main() -> None:
    warnings.showwarning = lambda message, *_: tqdm.write(f"note: {message}", file=sys.stderr)
    args = parse_arguments()
    prompts, config = read_prompts(args), read_config(args.model)
    init_image = None if args.init_image is None else read_image(args.init_image, args.height, args.width)
    height, width = ((args.height or config.size, args.width or config.size) if init_image is None else
                     init_image.shape[-2:])
    techniques = bind_techniques(args, config, height, width)
    freescale, first = techniques.get("freescale"), args.steps - int(args.steps * args.strength)
    cascade, sizes = freescale, [(height, width, 0 if init_image is None else first)]
    if isinstance(args.highres, DemoFusion):
        cascade = args.highres.stages(config.size, height, width)
    if cascade is not None:
        later = cascade.first_step(args.steps)
        sizes = [(*size, later if k else 0) for k, size in enumerate(cascade.resolutions)][init_image is not None:]
    paths = picture_paths(args, len(prompts))
    parameters = parameters_texts(args, prompts, techniques, *sizes[-1][:2])

    # Under torchrun each process takes every world-th picture; nothing is exchanged: a picture depends on its seed only
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = range(rank, len(prompts), world)
    todo = [k for k in mine if args.one_file or not finished(paths[k], parameters[k])
            or args.compare and not compared(paths[k]).exists()]
    if todo:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and args.device == "cuda" else args.device
        if freescale is not None:
            check_memory(args, config, techniques, min(args.batch_size, len(todo)), torch.device(device))
        sd = StableDiffusion.load(args.model, device, args.dtype, args.low_memory, args.compile)
        sd.tile, sd.known = args.vae_tile, {}
        try:
            techniques = {name: settings.bind(sd) if hasattr(settings, "bind") else settings
                          for name, settings in techniques.items()}
            report(sd, args, techniques, sizes)
        except ValueError as error:
            raise InputError(str(error)) from None
        draw_pictures(sd, args, techniques, prompts, paths, parameters, todo, init_image,
                      len(sizes) if rank == 0 else 0)
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} pictures were there already in {args.out}")
    if args.grid:
        sheet = args.out.with_stem(f"{args.out.stem}_grid") if args.one_file else args.out / "grid.png"
        save_grid(paths, sheet)
        print(sheet)


def draw_pictures(sd: StableDiffusion, args: argparse.Namespace, techniques: dict[str, Any], prompts: list[str],
                  paths: list[Path], parameters: list[str], todo: list[int], init_image: Tensor | None,
                  stages: int) -> None:
    """Draws and writes the pictures with these numbers. stages: for the progress bar; 0: no bar."""
    init = None if init_image is None else sd.encode(init_image)
    size = {} if args.freescale is not None else {"height": args.height, "width": args.width}
    plain_techniques = {name: settings for name, settings in techniques.items() if name not in SAVING}

    def draw(batch: list[int], steps: int = args.steps, techniques: dict = techniques) -> tuple[Tensor, float]:
        """The latents of these pictures, and the seconds that sampling took."""
        calls = plan(args.sampler, steps, spacing=args.spacing).calls  # two per step with Heun's method
        with tqdm(total=stages * calls, desc=f"picture {batch[-1] + 1} of {len(prompts)}", unit="call", leave=False,
                  disable=not stages) as bar:
            started = time.perf_counter()
            try:
                latents = sd.sample(
                    [prompts[k] for k in batch], args.negative_prompt, steps, args.sampler, args.cfg_scale,
                    [args.seed + k for k in batch], eta=args.eta, spacing=args.spacing, init=init,
                    strength=args.strength, callback=lambda i, _: bar.update(i + 1 - bar.n), **size, **techniques)
            except ValueError as error:                                # techniques that don't go together
                raise InputError(str(error)) from None
            return latents, time.perf_counter() - started              # `sample` has looked at the result: it is there

    for start in range(0, len(todo), args.batch_size):
        batch, plain, started = todo[start:start + args.batch_size], None, time.time()
        if args.compare:
            if start == 0 or args.compile and len(batch) < args.batch_size:
                draw(batch, steps=1, techniques=plain_techniques)      # the first pass of a process is a slow one
                if args.compile:
                    draw(batch)                                        # makes the graphs of every kind of step
            plain, seconds_plain = draw(batch, techniques=plain_techniques)
            plain = sd.decode(plain)
        latents, seconds_sampling = draw(batch)
        images = sd.decode(latents)
        seconds = (time.time() - started) / len(batch)
        for i, (k, image) in enumerate(zip(batch, images)):
            save_png(image, paths[k], parameters[k])
            memory = f"peak memory {peak_memory(sd.device):.2f} GB"
            print(f"{paths[k]}  seed {args.seed + k}  {seconds:.1f} s  {memory}", flush=True)
            if plain is not None:
                both = compared(paths[k])
                save_png(torch.cat([plain[i], image], dim=2), both, f"left: without cache and T-GATE\n{parameters[k]}")
                print(f"{both}  PSNR {psnr(image, plain[i]):.1f} dB", flush=True)
        if plain is not None:
            print(f"sampling {seconds_sampling:.2f} s, {seconds_plain:.2f} s without cache and T-GATE: "
                  f"{seconds_plain / seconds_sampling:.2f} times as fast", flush=True)


if __name__ == "__main__":
    run_command(main)
