"""What FreeScale needs: memory and operations of every stage, planned from shapes, or measured with random weights.

    python -m benchmarks.freescale --plan --family sdxl --resolutions 1024x1024,4096x4096,8192x8192 --low-memory
    python -m benchmarks.freescale --family tiny --resolutions 64x64,128x128,256x256

The plan needs no GPU and no weights. Without --plan, one step of every stage runs on the device, plain and with
FreeScale, and its peak of memory is printed beside the plan's: on a GPU what tensors take there, on a CPU what the
process has grown by (a step smaller than one before it can't be seen there; let the sizes rise).
"""
import argparse
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:                                # Windows
    resource = None

from command import ArgumentParser, InputError, check_device, run_command
from convert_weights import FAMILIES
from folder import TINY, ModelConfig, read_config
from freescale import FreeScale, Size
from freeu import PRESETS, FreeU
from memory import StagePlan, plan_stages
from sampler import Condition, generate, plan
from unet import UNet
from vae import tile_side

GB = 1e9


def show_plan(plans: list[StagePlan], steps: int, restart: int) -> None:
    """One line per stage; a stage after the first runs from step `restart`."""
    print("stage         memory GB | U-Net step: peak GB   TFLOP | VAE: peak GB   TFLOP | stage in all PFLOP")
    for number, stage in enumerate(plans):
        flops = (steps - (restart if number else 0)) * stage.unet.flops + stage.vae.flops
        print(f"{stage.width}x{stage.height:<8} {stage.memory / GB:9.3f} {stage.unet.peak / GB:20.3f} "
              f"{stage.unet.flops / 1e12:8.2f} {stage.vae.peak / GB:14.3f} {stage.vae.flops / 1e12:8.2f} "
              f"{flops / 1e15:16.3f}", flush=True)


def resident(device: str) -> int:
    """Bytes in use now; on a CPU of this process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device: str) -> int:
    """The most bytes in use: on a GPU since `resident`, on a CPU ever."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()         # getrusage's would begin with the starter's
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@torch.no_grad()
def measure_stages(args: argparse.Namespace, config: ModelConfig, freescale: FreeScale, plans: list[StagePlan],
                   freeu: FreeU | None) -> None:
    """One step with random weights at each stage, plain and with FreeScale."""
    with torch.device(args.device):
        unet = UNet(config.unet).to(args.dtype)
        text = torch.randn(1, config.text_encoder.length, config.unet.context_dim, dtype=args.dtype)
        said = Condition(text, torch.zeros(1, config.unet.add_dim, dtype=args.dtype) if config.unet.add_dim else None)
    print("stage         plain s  FreeScale s | peak GB of its U-Net step: measured  planned")
    for number, (height, width) in enumerate(freescale.resolutions):
        x = torch.randn(1, 4, height // config.vae.factor, width // config.vae.factor).to(args.device)
        seconds, before = [], resident(args.device)
        for more in ({}, {"freescale": freescale} if number else {}):
            started = time.perf_counter()
            next(generate(unet, x, said, said, plan("ddim", 1), init=x, low_memory=args.low_memory, freeu=freeu,
                          generators=[torch.Generator().manual_seed(0)], **more))
            most = peak(args.device) - before
            seconds.append(time.perf_counter() - started)
        print(f"{width}x{height:<8} {seconds[0]:8.2f} {seconds[1]:10.2f} {most / GB:34.3f} "
              f"{plans[number].unet.peak / GB:8.3f}", flush=True)


def main() -> None:
    parser = ArgumentParser(description="What FreeScale's stages need.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--family", default="tiny", choices=[*FAMILIES, "tiny"])
    parser.add_argument("--resolutions", default="64x64,128x128", metavar="WxH,WxH")
    parser.add_argument("--plan", action="store_true", help="from shapes alone, nothing is run")
    parser.add_argument("--low-memory", action="store_true", help="as in txt2img.py")
    parser.add_argument("--fast", action="store_true", help="global attention on interleaved parts")
    parser.add_argument("--blur", default="spatial", help="spatial or official")
    parser.add_argument("--freeu", action="store_true", help="with the official FreeU, version 1")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    if args.steps < 1:
        raise InputError("--steps must be 1 or more")
    if not args.plan:
        check_device(args.device)
        if args.device == "cpu" and (resource is None or not Path("/proc/self/statm").is_file()):
            raise InputError("what a process takes can be measured on Linux only: add --plan")
    config = read_config(TINY) if args.family == "tiny" else FAMILIES[args.family]
    args.dtype = getattr(torch, args.dtype)
    try:
        sizes = tuple(map(Size.read, args.resolutions.split(",")))
    except ValueError:
        raise InputError(f"--resolutions takes sizes such as 512x512,1024x1024, not {args.resolutions!r}") from None
    try:
        freescale = FreeScale(sizes, native=config.size // config.vae.factor, fast=args.fast, blur=args.blur)
    except ValueError as error:
        raise InputError(str(error)) from None
    freeu = FreeU(*PRESETS[1][args.family], version=1) if args.freeu else None
    plans = plan_stages(config, freescale, dtype=args.dtype, low_memory=args.low_memory, freeu=freeu,
                        tile=lambda latents: tile_side(None, latents))
    print(f"{args.family}, {str(args.dtype).removeprefix('torch.')}, one picture, guidance in "
          f"{'two passes' if args.low_memory else 'one batch'}{', fast' if args.fast else ''}, blur {args.blur}")
    show_plan(plans, args.steps, freescale.first_step(args.steps))
    if not args.plan:
        measure_stages(args, config, freescale, plans, freeu)


if __name__ == "__main__":
    run_command(main)
