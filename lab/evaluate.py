"""How often a model draws what was asked: prompts of the drawn world, its pictures, the exact scorer's verdicts.

    python -m lab.evaluate --n 200                      # single objects with a colour, the tiny model
    python -m lab.evaluate --from-file lab/prompts.txt --sheet models/tiny/pictures.png      # the README's picture

Start at `evaluate`. Only models that were trained on the world of `lab/shapes.py` can be judged.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from folder import InputError, replacing, run_command
from lab import shapes
from sampler import SAMPLERS, plan
from txt2img import TINY, StableDiffusion


def make_prompts(kind: str, n: int, seed: int = 1000) -> list[str]:
    """n captions of one of GenEval's categories (`shapes.KINDS`), held-out looks and pairs included."""
    rng = np.random.default_rng(seed)
    return [shapes.caption(shapes.random_scene(rng, kind), rng, kind) for _ in range(n)]


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, each of which must be a sentence of the world's grammar."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for prompt in prompts:
            shapes.parse(prompt)
    except (OSError, ValueError) as error:
        raise InputError(f"can't judge the prompts in {path}: {error}") from None
    if not prompts:
        raise InputError(f"{path} has no prompts; write one on each line")
    return prompts


def evaluate(sd: StableDiffusion, prompts: list[str], batch: int = 25, seed: int = 0,
             **settings) -> tuple[list[shapes.Verdict], list[np.ndarray]]:
    """Verdicts and pictures (H, W, 3) bytes, one a prompt; picture k has seed + k. settings: of `sd.sample`."""
    verdicts, pictures = [], []
    for start in tqdm(range(0, len(prompts), batch), unit="batch", leave=False):
        latents = sd.sample(prompts[start:start + batch], seed=seed + start, **settings)
        images = (sd.decode(latents) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        verdicts += [shapes.judge(image, prompt) for image, prompt in zip(images, prompts[start:])]
        pictures += list(images)
    return verdicts, pictures


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n trials."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def contact_sheet(prompts: list[str], verdicts: list[shapes.Verdict], pictures: list[np.ndarray], path: Path,
                  columns: int = 8, side: int = 128) -> None:
    """The pictures over their prompts, right ones framed green and wrong ones red."""
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 40)), "white")
    for i, (prompt, verdict, picture) in enumerate(zip(prompts, verdicts, pictures)):
        x, y = i % columns * (side + 8), i // columns * (side + 40)
        sheet.paste("seagreen" if verdict.ok else "crimson", (x + 1, y + 1, x + side + 7, y + side + 7))
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x + 4, y + 4))
        words, half = prompt.split(), math.ceil(len(prompt.split()) / 2)
        text = prompt if len(prompt) < 22 else " ".join(words[:half]) + "\n" + " ".join(words[half:])
        ImageDraw.Draw(sheet).text((x + 4, y + side + 8), text, fill="black")
    with replacing(path) as part:
        sheet.save(part, format="PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description="How often a model draws what was asked, by the exact scorer.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="model folder")
    parser.add_argument("--kind", default="colors", help=", ".join(shapes.KINDS))
    parser.add_argument("--n", type=int, default=200, help="prompts of that kind")
    parser.add_argument("--from-file", type=Path, metavar="FILE", help="one prompt a line, instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sampler", default="ddim", help=", ".join(SAMPLERS))
    parser.add_argument("--cfg-scale", type=float, default=7.5)
    parser.add_argument("--sheet", type=Path, help="also draw all pictures on this PNG")
    args = parser.parse_args()
    if args.kind not in shapes.KINDS or args.n < 1:
        raise InputError(f"--kind is one of {', '.join(shapes.KINDS)}, and --n at least 1")
    try:
        plan(args.sampler, args.steps)
    except ValueError as error:
        raise InputError(str(error)) from None
    prompts = read_prompts(args.from_file) if args.from_file else make_prompts(args.kind, args.n)
    sd, started = StableDiffusion.load(args.model), time.time()
    if sd.config.family != "tiny":
        raise InputError(f"{args.model} wasn't trained on the drawn world, so its pictures can't be judged")
    verdicts, pictures = evaluate(sd, prompts, seed=args.seed, steps=args.steps, sampler=args.sampler,
                                  cfg_scale=args.cfg_scale)
    for name, what in (("ok", "right"), ("color", "colours"), ("shape", "shapes")):
        share = float(np.mean([getattr(v, name) for v in verdicts]))
        low, high = wilson(share, len(prompts))
        print(f"{what:8s} {share:.3f}  (95 % interval {low:.3f} to {high:.3f}, n = {len(prompts)})")
    print(f"{(time.time() - started) / len(prompts):.2f} s a picture")
    if args.sheet:
        contact_sheet(prompts, verdicts, pictures, args.sheet)


if __name__ == "__main__":
    run_command(main)
