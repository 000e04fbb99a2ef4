"""What FreeU costs: its share of one U-Net step, on the shapes of a real model with random weights.

    python -m benchmarks.freeu --family sd15 --size 512

Times FreeU's calls in the decoder, and whole steps with and without FreeU in turns, in one process; prints medians. The
calls' share is the exact number: the difference of whole steps is smaller than their noise.
"""
import argparse
import time
from statistics import median

import torch
from torch import Tensor

from benchmarks.cache import alternate
from command import ArgumentParser, run_command
from freeu import PRESETS, FreeU
from unet import CONFIGS, Techniques, UNet, UNetConfig


class Noting(FreeU):
    """FreeU that also notes how long each of its calls took."""
    seconds: list[float] = []

    def __call__(self, h: Tensor, skip: Tensor, layer: int, config: UNetConfig) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        out = super().__call__(h, skip, layer, config)
        if h.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        return out


@torch.no_grad()
def main() -> None:
    parser = ArgumentParser(description="FreeU's share of a U-Net step.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--family", default="sd15", choices=CONFIGS, help="architecture, with random weights")
    parser.add_argument("--size", type=int, default=512, help="pixels (8 per latent pixel)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    config, dtype = CONFIGS[args.family], getattr(torch, args.dtype)
    with torch.device(args.device):
        unet = UNet(config).to(dtype)
        x = torch.randn(2, 4, args.size // 8, args.size // 8, dtype=dtype)                # both branches of guidance
        text = unet.embed_text(torch.randn(2, 77, config.context_dim, dtype=dtype))
        added = torch.zeros(2, config.add_dim, dtype=dtype) if config.add_dim else None
        shifts = unet.embed_time(torch.tensor(500), added)
    freeu = Noting(*PRESETS[2][args.family])
    seconds = alternate({"plain": lambda: unet(x, shifts, text),
                         "freeu": lambda: unet(x, shifts, text, on=Techniques(freeu=freeu))}, args.rounds, args.device)
    plain, with_freeu = seconds.values()
    calls = len(freeu.seconds) // (args.rounds + 1)                    # per step; the first step was the warm-up
    alone = [sum(freeu.seconds[k * calls:(k + 1) * calls]) for k in range(1, args.rounds + 1)]
    share, ratio = [100 * a / p for a, p in zip(alone, plain)], [w / p for w, p in zip(with_freeu, plain)]
    print(f"{args.family} {args.size} px, batch 2, {args.dtype}, {args.device}, {args.rounds} rounds, "
          f"{torch.get_num_threads()} threads")
    print(f"step {median(plain):.3f} s; FreeU's calls {median(alone):.4f} s: {median(share):.2f} % of it "
          f"({min(share):.2f} to {max(share):.2f})")
    print(f"step with FreeU / without: {median(ratio):.4f} ({min(ratio):.4f} to {max(ratio):.4f})")


if __name__ == "__main__":
    run_command(main)
