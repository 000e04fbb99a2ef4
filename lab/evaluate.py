"""How often a model draws what was asked: the benchmark's prompts, its pictures, the exact scorer's verdicts.

    python -m lab.evaluate --n-per-prompt 4 --out result.json --sheet sheet.png       # any flag of txt2img.py besides
    python -m lab.evaluate --cache deepcache --out cached.json
    python -m lab.evaluate --compare result.json cached.json                          # paired differences

GenEval's six categories (arXiv 2310.11513); overall is their unweighted mean. Intervals are 95 %, by the bootstrap over
prompts. Beside the score: the cosine of picture and prompt in the model's own CLIP, and the Frechet distance (arXiv
1706.08500) to drawn pictures in the features of its image tower. Start at `evaluate`; `measure` runs the benchmark.
Work goes on where it was stopped, and processes under `torchrun` share it. Only a model trained on the world of
`lab/shapes.py` can be judged; of any other this measures time and memory.
"""
import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from clip_image import ImageEncoder
from flags import parse_arguments, sample_settings
from folder import InputError, read_config, replacing, run_command
from lab import shapes
from reward import ClipReward
from txt2img import StableDiffusion, peak_memory

BENCH = Path(__file__).with_name("bench.jsonl")


# --------------------------------------------------------------------------------------------------------- prompts

def make_prompts(kind: str, n: int, seed: int = 1000) -> list[str]:
    """n captions of one of GenEval's categories (`shapes.KINDS`), held-out looks and pairs included."""
    rng = np.random.default_rng(seed)
    return [shapes.caption(shapes.random_scene(rng, kind), rng, kind) for _ in range(n)]


def read_rows(path: Path) -> list[dict]:
    """Rows {"kind", "seen", "prompt"} of a .jsonl file such as lab/bench.jsonl, or of a text file with one prompt a
    line (of kind "file"). Every prompt must be a sentence of the world's grammar."""
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{path}, line {number}"
            if line.strip():
                row = json.loads(line) if path.suffix == ".jsonl" else {"kind": "file", "prompt": line.strip()}
                shapes.verdict((), "white", shapes.parse(row["prompt"]), 64, 64)       # can it be judged?
                rows.append({"kind": str(row["kind"]), "seen": row.get("seen"), "prompt": row["prompt"]})
    except OSError as error:
        raise InputError(f"can't read the prompts in {path} ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}); a row is like "
                         '{"kind": "colors", "prompt": "a red circle"}') from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file; give one prompt a line, or a .jsonl of rows") from None
    except (AttributeError, KeyError, TypeError):
        raise InputError(f'{where} needs a "kind" and a "prompt"') from None
    except ValueError as error:
        raise InputError(f"{where} can't be judged: {error}") from None
    if not rows:
        raise InputError(f"{path} has no prompts; write one on each line")
    return rows


# -------------------------------------------------------------------------------------------------------- sampling

def evaluate(sd: StableDiffusion, prompts: list[str], batch: int = 25, seed: int = 0,
             **settings) -> tuple[list[shapes.Verdict], list[np.ndarray]]:
    """Verdicts and pictures (H, W, 3) bytes, one a prompt; picture k has seed + k. settings: of `sd.sample`."""
    verdicts, pictures = [], []
    for start in tqdm(range(0, len(prompts), batch), unit="batch", leave=False):
        images = sample(sd, prompts[start:start + batch], list(range(seed + start, seed + len(prompts)))[:batch],
                        settings)
        pictures += to_bytes(images)
        verdicts += [shapes.judge(image, prompt) for image, prompt in zip(pictures[start:], prompts[start:])]
    return verdicts, pictures


def sample(sd: StableDiffusion, prompts: list[str], seeds: list[int], settings: dict[str, Any]) -> Tensor:
    """(B, 3, H, W) in [0, 1]"""
    return sd.decode(sd.sample(prompts, seed=seeds, **settings))


def to_bytes(images: Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [0, 1] -> B pictures (H, W, 3) of bytes"""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def measure(sd: StableDiffusion, reward: ClipReward | None, rows: list[dict], seed: int, batch: int,
            settings: dict[str, Any], path: Path, made_with: dict) -> list[dict]:
    """The rows with what was found, in order; row k is sampled with seed + k.

    Every process works on its share and notes each batch in a file beside `path`, from which a stopped run goes on.
    Gives an empty list to a process that others still work beside: whoever ends last has all rows.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = path.with_name(f".{path.name}.{rank}-of-{world}.jsonl")
    done = read_notes(path, made_with)
    if mine.exists():                                                  # without a last line that was cut short
        text = mine.read_text(encoding="utf-8")
        mine.write_text(text[:text.rfind("\n") + 1], encoding="utf-8")
    todo = [k for k in range(rank, len(rows), world) if k not in done]
    with mine.open("a", encoding="utf-8") as notes, tqdm(total=len(todo), unit="picture", disable=rank > 0) as bar:
        if not notes.tell():
            notes.write(json.dumps(made_with) + "\n")
        for start in range(0, len(todo), batch):
            share, started = todo[start:start + batch], time.perf_counter()
            prompts = [rows[k]["prompt"] for k in share]
            with torch.no_grad():
                images = sample(sd, prompts, [seed + k for k in share], settings)
                seconds = (time.perf_counter() - started) / len(share)
                features = [] if reward is None else reward.image(images)
                cosines = [] if reward is None else torch.cosine_similarity(features, reward.embed_text(prompts))
            for j, (k, picture) in enumerate(zip(share, to_bytes(images))):
                found = {"k": k, "seed": seed + k, "seconds": round(seconds, 4)}
                if sd.config.family == "tiny":
                    found |= {"ok": shapes.judge(picture, prompts[j]).loose,
                              "strict": shapes.judge(picture, prompts[j]).ok}
                if reward is not None:
                    found |= {"clip": round(cosines[j].item(), 5),
                              "features": [round(f, 5) for f in features[j].tolist()]}
                notes.write(json.dumps(found) + "\n")
            notes.flush()
            bar.update(len(share))
    done = read_notes(path, made_with)
    return [rows[k] | done[k] for k in range(len(rows))] if len(done) == len(rows) else []


def read_notes(path: Path, made_with: dict) -> dict[int, dict]:
    """What all processes, of this run and of stopped ones, have noted so far."""
    done: dict[int, dict] = {}
    for file in note_files(path):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and lines[0].strip() != json.dumps(made_with):
            raise InputError(f"{file} is from a stopped run with another model or other settings; delete it, or choose "
                             "another --out")
        for line in lines[1:]:
            if line.endswith("\n"):                                    # the last one may have been cut short
                found = json.loads(line)
                done[found["k"]] = found
    return done


def note_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f".{path.name}.*-of-*.jsonl"))


# --------------------------------------------------------------------------------------------------------- numbers

def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n trials."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def bootstrap(values: dict[str, dict[str, list[float]]], draws: int = 2000) -> dict[str, dict[str, Any]]:
    """values[kind][prompt]: one number a picture -> {kind: {"mean", "low", "high", "n"}}, and "overall".

    Prompts are drawn with replacement within each kind, all pictures of a prompt together: they are not independent.
    """
    rng, out, all_draws = np.random.default_rng(0), {}, []
    for kind, prompts in values.items():
        sums = np.array([[sum(v), len(v)] for v in prompts.values()], float)                     # (prompts, 2)
        drawn = sums[rng.integers(len(sums), size=(draws, len(sums)))].sum(axis=1)
        all_draws.append(drawn[:, 0] / drawn[:, 1])
        out[kind] = summary(sums[:, 0].sum() / sums[:, 1].sum(), all_draws[-1], int(sums[:, 1].sum()))
    if len(values) > 1:
        out["overall"] = summary(float(np.mean([x["mean"] for x in out.values()])), np.mean(all_draws, axis=0),
                                 sum(x["n"] for x in out.values()))
    return out


def summary(mean: float, draws: np.ndarray, n: int) -> dict[str, Any]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"mean": round(float(mean), 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": n}


def by_kind(rows: list[dict], numbers: list[float]) -> dict[str, dict[str, list[float]]]:
    """One number a row, sorted by kind and prompt for `bootstrap`."""
    values: dict[str, dict[str, list[float]]] = {}
    for row, number in zip(rows, numbers):
        values.setdefault(row["kind"], {}).setdefault(row["prompt"], []).append(number)
    return values


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Wasserstein distance of the normal distributions that fit two sets of features (N, P), (M, P)."""
    mean = a.mean(0) - b.mean(0)
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()                   # trace of (s t)^(1/2)
    return float(mean @ mean + np.trace(s) + np.trace(t) - 2 * cross)


def drawn_features(tower: ImageEncoder, n: int, height: int, width: int, seed: int) -> np.ndarray:
    """Features (n, P) of ground truths of the benchmark's kinds, in its proportions."""
    rng, weight = np.random.default_rng(seed), tower.visual_projection.weight
    kinds = rng.choice(list(shapes.BENCH_SIZES), n, p=np.array(list(shapes.BENCH_SIZES.values())) / 553)
    features = []
    for start in tqdm(range(0, n, 100), desc="drawing", leave=False):
        pictures = np.stack([shapes.draw(shapes.random_scene(rng, str(kind)), height, width)
                             for kind in kinds[start:start + 100]])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(weight) / 255
        with torch.no_grad():
            features.append(tower(images).float().cpu().numpy())
    return np.concatenate(features)


def summarize(sd: StableDiffusion, reward: ClipReward | None, rows: list[dict], settings: dict[str, Any],
              drawn: int) -> dict[str, Any]:
    """All numbers of a run, from its rows."""
    result: dict[str, Any] = {"seconds_per_image": round(float(np.mean([row["seconds"] for row in rows])), 4),
                              "peak_memory_gb": round(peak_memory(sd.device), 3)}
    if "ok" in rows[0]:
        for name, chosen in (("all", rows), ("seen", [r for r in rows if r["seen"]]),
                             ("unseen", [r for r in rows if r["seen"] is False])):
            if chosen:
                result[name] = bootstrap(by_kind(chosen, [row["ok"] for row in chosen]))
        result["strict"] = bootstrap(by_kind(rows, [row["strict"] for row in rows]))
    if "clip" in rows[0]:
        clip = bootstrap({"clip": by_kind([row | {"kind": "clip"} for row in rows], [r["clip"] for r in rows])["clip"]})
        result["clip_score"] = clip["clip"]
    if "ok" in rows[0] and "clip" in rows[0] and drawn and len(rows) > len(rows[0]["features"]):
        size = settings["height"], settings["width"]
        real = drawn_features(reward.image, drawn, *size, seed=1)
        again = drawn_features(reward.image, len(rows), *size, seed=2)
        own = np.array([row["features"] for row in rows])
        result["frechet"] = {"distance": round(frechet_distance(own, real), 4), "n": len(rows), "drawn": drawn,
                             "floor": round(frechet_distance(again, real), 4)}
    return result


def retrieval(reward: ClipReward, n: int, split: str, candidates: int = 64) -> dict[str, dict[str, Any]]:
    """How often CLIP finds the true caption among hard ones: the same shapes with other attributes. n scenes a kind."""
    rng, values = np.random.default_rng(4), {}
    for kind in tqdm(shapes.KINDS, desc=f"retrieval, {split}", leave=False):
        hits = []
        for _ in range(n):
            scene = shapes.random_scene(rng, kind, split)
            captions = shapes.hard_captions(scene, candidates, rng)
            picture = torch.from_numpy(shapes.draw(scene)).permute(2, 0, 1)[None] / 255
            with torch.no_grad():
                cosines = torch.cosine_similarity(reward.image(picture), reward.embed_text(captions))
            hits.append(float(cosines.argmax() == 0))
        values[kind] = {str(i): [hit] for i, hit in enumerate(hits)}
    return bootstrap(values)


def compare(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Differences second minus first, paired picture by picture: same prompts and same seeds, or InputError."""
    results = []
    for path in paths:
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
            rows = [(row["kind"], row["prompt"], row["seed"], row["ok"]) for row in results[-1]["rows"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path} is no result of lab.evaluate with verdicts; run it with --out {path}") from None
        if [row[:3] for row in rows] != [(r["kind"], r["prompt"], r["seed"]) for r in results[0]["rows"]]:
            raise InputError(f"{paths[0]} and {path} have other prompts or seeds, so they can't be paired; run both "
                             "with the same --bench, --n-per-prompt and --seed")
    first, second = (result["rows"] for result in results)
    out = bootstrap(by_kind(first, [b["ok"] - float(a["ok"]) for a, b in zip(first, second)]))
    if "clip" in first[0] and "clip" in second[0]:
        whole = [row | {"kind": "clip score"} for row in first]
        out |= bootstrap(by_kind(whole, [b["clip"] - a["clip"] for a, b in zip(first, second)]))
    return out


# ---------------------------------------------------------------------------------------------------------- output

def contact_sheet(prompts: list[str], right: list[bool], pictures: list[np.ndarray], path: Path,
                  columns: int = 8, side: int = 128) -> None:
    """The pictures over their prompts, right ones framed green and wrong ones red."""
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 40)), "white")
    for i, (prompt, ok, picture) in enumerate(zip(prompts, right, pictures)):
        x, y = i % columns * (side + 8), i // columns * (side + 40)
        sheet.paste("seagreen" if ok else "crimson", (x + 1, y + 1, x + side + 7, y + side + 7))
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x + 4, y + 4))
        words, half = prompt.split(), math.ceil(len(prompt.split()) / 2)
        text = prompt if len(prompt) < 22 else " ".join(words[:half]) + "\n" + " ".join(words[half:])
        ImageDraw.Draw(sheet).text((x + 4, y + side + 8), text, fill="black")
    with replacing(path) as part:
        sheet.save(part, format="PNG")


def draw_sheet(sd: StableDiffusion, rows: list[dict], settings: dict[str, Any], path: Path, most: int = 24) -> None:
    """Up to `most` right and `most` wrong pictures, evenly over the benchmark (files of prompts: all), made again."""
    if rows[0]["kind"] == "file":
        chosen = rows
    else:
        groups = [[row for row in rows if row["ok"] == ok] for ok in (True, False)]
        chosen = [row for group in groups for row in group[::max(len(group) // most, 1)][:most]]
    pictures = [picture for start in range(0, len(chosen), 24)
                for picture in to_bytes(sample(sd, [r["prompt"] for r in chosen[start:start + 24]],
                                               [r["seed"] for r in chosen[start:start + 24]], settings))]
    prompts = [row["prompt"] for row in chosen]
    contact_sheet(prompts, [bool(shapes.judge(p, t)) for p, t in zip(pictures, prompts)], pictures, path)


def show(table: dict[str, dict[str, Any]], title: str) -> None:
    print(title)
    for kind, x in table.items():
        print(f"  {kind:12s} {x['mean']:7.3f}  (95 % interval {x['low']:.3f} to {x['high']:.3f}, n = {x['n']})")


def fingerprint(folder: Path) -> str:
    """A short name for the weights and settings of a model folder."""
    digest = hashlib.sha256()
    for file in sorted([*folder.rglob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]):
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description="How often a model draws what was asked, by the exact scorer. Flags "
                                     "of txt2img.py (--model, --steps, --freeu, ...) are understood as well.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--bench", type=Path, default=BENCH, help="rows in .jsonl, or a text file of prompts")
    parser.add_argument("--kinds", help="only these of the rows' kinds, separated by commas")
    parser.add_argument("--n-per-prompt", type=int, default=1, help="pictures of each row")
    parser.add_argument("--out", type=Path, default=Path("result.json"), help="all numbers and rows; JSON")
    parser.add_argument("--sheet", type=Path, help="also draw right and wrong pictures on this PNG")
    parser.add_argument("--drawn", type=int, default=5000, help="ground truths for the Frechet distance; 0: none")
    parser.add_argument("--retrieval", type=int, metavar="N", help="instead: how well the model's CLIP finds captions")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two results instead: B minus A")
    own, rest = parser.parse_known_args()
    if own.compare:
        return show(compare(own.compare), f"{own.compare[1]} minus {own.compare[0]}")
    args = parse_arguments(["the benchmark", *rest])
    if own.retrieval:
        reward = ClipReward.load(args.model / "clip")
        for split in ("train", "unseen"):
            show(retrieval(reward, own.retrieval, split), f"the true caption first among 64 hard ones, {split}")
        return None
    if own.n_per_prompt < 1 or (own.drawn and own.drawn < 100):
        raise InputError("--n-per-prompt must be 1 or more, and --drawn 0, or 100 or more")
    if args.init_image:
        raise InputError("--init-image would start every prompt from one picture; leave it out")
    if not own.out.parent.is_dir():
        raise InputError(f"there is no folder {own.out.parent} for --out")
    rows = read_rows(own.bench)
    if own.kinds:
        wanted = own.kinds.split(",")
        if unknown := set(wanted) - {row["kind"] for row in rows}:
            raise InputError(f"--kinds: {own.bench} has no rows of kind {', '.join(sorted(unknown))}")
        rows = [row for row in rows if row["kind"] in wanted]
    rows = [row for row in rows for _ in range(own.n_per_prompt)]

    config, clip = read_config(args.model), args.model / "clip"
    settings = sample_settings(args, config)
    if config.family != "tiny":
        print(f"note: {args.model} wasn't trained on the drawn world: no verdicts, no Frechet distance, only time and "
              "memory")
    elif not clip.exists():
        print(f"note: there is no {clip}, a CLIP of the drawn world: no CLIP score and no Frechet distance")
    made_with = {"model": fingerprint(args.model), "dtype": str(args.dtype),
                 "bench": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16], "seed": args.seed,
                 "settings": {name: value if isinstance(value, (int, float, str, type(None))) else repr(value)
                              for name, value in settings.items()}}
    sd = StableDiffusion.load(args.model, args.device, args.dtype)
    reward = ClipReward.load(clip, args.device, args.dtype) if clip.exists() else None
    batch = args.batch_size if "--batch-size" in rest else 50
    rows = measure(sd, reward, rows, args.seed, batch, settings, own.out, made_with)
    if not rows:
        return print("the other processes are still at work; the last one writes the result")
    result = made_with | summarize(sd, reward, rows, settings, own.drawn)
    for row in rows:
        row.pop("features", None)
    with replacing(own.out) as part:
        part.write_text(json.dumps(result | {"rows": rows}) + "\n", encoding="utf-8")
    for file in note_files(own.out):
        file.unlink(missing_ok=True)
    for name in ("all", "seen", "unseen", "strict"):
        if name in result:
            show(result[name], name)
    for name in ("clip_score", "frechet", "seconds_per_image", "peak_memory_gb"):
        if name in result:
            print(f"{name}: {result[name]}")
    if own.sheet and "ok" in rows[0]:
        draw_sheet(sd, rows, settings, own.sheet)


if __name__ == "__main__":
    run_command(main)
