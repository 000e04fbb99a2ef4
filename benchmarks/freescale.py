"""What FreeScale needs: memory and operations of every stage, planned from shapes, or measured with random weights.

    python -m benchmarks.freescale --plan --family sdxl --resolutions 1024x1024,4096x4096,8192x8192 --low-memory
    python -m benchmarks.freescale --family tiny --resolutions 64x64,128x128,256x256

The plan needs no GPU and no weights. Without --plan, one U-Net call of every stage runs on the device, plain and with
FreeScale, and its peak of memory is printed beside the plan's: on a GPU what tensors take there, on a CPU what the
process has grown by (a call smaller than one before it can't be seen there; let the sizes rise).
"""
import argparse
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:                                # Windows
    resource = None

from command import InputError, check_device, run_command
from convert_weights import FAMILIES
from folder import TINY, read_config
from freescale import FreeScale
from freeu import PRESETS, FreeU
from memory import StagePlan, plan_stages
from unet import UNet
from vae import tile_side

GB = 1e9


def show_plan(plans: list[StagePlan], steps: int, restart: int, passes: int) -> None:
    """One line a stage; a stage behind the first runs from step `restart`. passes: calls of the U-Net a step."""
    print("stage         memory GB | U-Net call: peak GB   TFLOP | VAE: peak GB   TFLOP | stage in all PFLOP")
    for number, plan in enumerate(plans):
        calls = passes * (steps - (restart if number else 0))
        print(f"{plan.width}x{plan.height:<8} {plan.memory / GB:9.3f} {plan.unet.peak / GB:20.3f} "
              f"{plan.unet.flops / 1e12:8.2f} {plan.vae.peak / GB:14.3f} {plan.vae.flops / 1e12:8.2f} "
              f"{(calls * plan.unet.flops + plan.vae.flops) / 1e15:16.3f}", flush=True)


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
def measure_stages(args: argparse.Namespace, config, freescale: FreeScale, plans: list[StagePlan], freeu) -> None:
    """One call of the U-Net with random weights at each stage, plain and with FreeScale."""
    with torch.device(args.device):
        unet = UNet(config.unet).to(args.dtype)
        rows = 1 if args.low_memory else 2
        text = unet.embed_text(torch.randn(rows, 77, config.unet.context_dim, dtype=args.dtype))
        added = torch.zeros(rows, config.unet.add_dim, dtype=args.dtype) if config.unet.add_dim else None
        shifts = unet.embed_time(torch.tensor(500), added)
    print("stage         plain s  FreeScale s | peak GB of its U-Net call: measured  planned")
    for number, (height, width) in enumerate(freescale.resolutions):
        x = torch.randn(rows, 4, height // config.vae.factor, width // config.vae.factor).to(args.device, args.dtype)
        stage = freescale.start(x.shape[2:], 1, [torch.Generator().manual_seed(0)])
        seconds, before = [], resident(args.device)
        for scale in (None, stage.at(0) if number else None):
            started = time.perf_counter()
            unet(x, shifts, text, freeu=freeu, freescale=scale)
            most = peak(args.device) - before
            seconds.append(time.perf_counter() - started)
        print(f"{width}x{height:<8} {seconds[0]:8.2f} {seconds[1]:10.2f} {most / GB:34.3f} "
              f"{plans[number].unet.peak / GB:8.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What FreeScale's stages need.",
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
        sizes = [tuple(int(side) for side in size.split("x")) for size in args.resolutions.split(",")]
        sizes = tuple((height, width) for width, height in sizes)
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
    show_plan(plans, args.steps, freescale.first_step(args.steps), passes=2 if args.low_memory else 1)
    if not args.plan:
        measure_stages(args, config, freescale, plans, freeu)


if __name__ == "__main__":
    run_command(main)
