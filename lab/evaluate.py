"""How often a model draws what was asked: prompts, pictures, and the exact scorer's verdicts.

    python -m lab.evaluate --n-per-prompt 4 --out result.json --sheet sheet.png       # takes txt2img.py's flags
    python -m lab.evaluate --cache deepcache --out cached.json
    python -m lab.evaluate --compare result.json cached.json                          # paired differences

GenEval's six categories (arXiv 2310.11513); overall is their unweighted mean. The strict judgement of `lab/shapes.py`
decides; quality and the loose judgement, GenEval's own, are only reported. Intervals are 95 %, by the bootstrap over
prompts. The CLIP score is the cosine of picture and prompt in the model's own CLIP; the Frechet distance (arXiv
1706.08500) to drawn pictures is measured in the features of its image tower. Start at `measure`; a study with several
arms is `measure_arms`. A stopped run resumes, and processes under `torchrun` share the work. Only a model trained on
the world of `lab/shapes.py` can be judged; for any other model this measures time and memory.
"""
import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from command import ArgumentParser, HelpFormatter, InputError, check_flags, run_command
from folder import read_config
from lab import shapes, study
from lab.study import Arm, Estimate, Results, Row, bootstrap
from pictures import file_digest
from reward import ClipReward, ImageEncoder, load_reward
from settings import write
from stable_diffusion import StableDiffusion
from txt2img import TECHNIQUES, bind_techniques, parse_arguments, peak_memory

BENCH = Path(__file__).with_name("bench.jsonl")


# --------------------------------------------------------------------------------------------------------- prompts

def make_scenes(kind: str, n: int, seed: int = 1000) -> tuple[list[str], list[shapes.Scene]]:
    """n captions of one of GenEval's categories (`shapes.KINDS`), held-out looks and pairs included; their scenes."""
    rng, captions, scenes = np.random.default_rng(seed), [], []
    for _ in range(n):
        scenes.append(shapes.random_scene(rng, kind))
        captions.append(shapes.caption(scenes[-1], rng, kind))
    return captions, scenes


def mixed_prompts(n: int, seed: int) -> list[str]:
    """n captions, the six kinds of scene in turn."""
    kinds = [make_scenes(kind, math.ceil(n / len(shapes.KINDS)), seed + k)[0] for k, kind in enumerate(shapes.KINDS)]
    return [prompt for turn in zip(*kinds) for prompt in turn][:n]


def read_rows(path: Path) -> list[Row]:
    """Rows {"kind", "seen", "prompt"} of a .jsonl file such as lab/bench.jsonl, or of a text file with one prompt per
    line (of kind "file"). Every prompt must be a sentence of the world's grammar."""
    rows, where = [], str(path)
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{path}, line {number}"
            if line.strip():
                row = json.loads(line) if path.suffix == ".jsonl" else {"kind": "file", "prompt": line.strip()}
                rows.append({"kind": str(row["kind"]), "seen": row.get("seen"), "prompt": row["prompt"]})
                shapes.verdict((), "white", shapes.parse(row["prompt"]), 64, 64)       # can it be judged?
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read the prompts in {path} ({error}); it must be a text file, or a .jsonl of rows"
                         ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}); a row is like "
                         '{"kind": "colors", "prompt": "a red circle"}') from None
    except (AttributeError, KeyError, TypeError):
        raise InputError(f'{where} needs a "kind" and a "prompt"') from None
    except ValueError as error:
        raise InputError(f"{where} can't be judged: {error}") from None
    if not rows:
        raise InputError(f"{path} has no prompts; write one on each line")
    return rows


# -------------------------------------------------------------------------------------------------------- sampling

def draw(sd: StableDiffusion, prompts: list[str], batch: int, seed: int, settings: Row) -> list[np.ndarray]:
    """One picture (H, W, 3) of bytes per prompt; picture k has seed + k. settings: of `sd.sample`."""
    return [picture for start in tqdm(range(0, len(prompts), batch), unit="batch", leave=False)
            for picture in to_bytes(sample(sd, prompts[start:start + batch], seed + start, settings))]


def sample(sd: StableDiffusion, prompts: list[str], seed: int | list[int], settings: Row) -> Tensor:
    """(B, 3, H, W) in [0, 1]. settings: of `sd.sample`."""
    return sd.decode(sd.sample(prompts, seed=seed, **settings))


def to_bytes(images: Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [0, 1] -> B pictures (H, W, 3) of bytes"""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def judged(picture: np.ndarray, prompt: str) -> Row:
    """A picture's scores: strict, the primary one; how good it is, from 0 to 1; loose, GenEval's."""
    verdict = shapes.judge(picture, prompt)
    return {"strict": verdict.ok, "quality": round(shapes.measure(picture, prompt).quality, 5), "loose": verdict.loose}


def measure(sd: StableDiffusion, prompts: list[str], seed: int, batch: int, settings: Row, path: Path, made_with: Row,
            more: Callable[[list[int], Tensor, list[np.ndarray]], list[Row]] | None = None,
            shared: bool = False) -> list[Row]:
    """A row per prompt: number k, seed (seed + k), seconds, scores if the model can be judged, and what `more` adds.

    settings: of `sd.sample`. more: (numbers, images, pictures in bytes) -> entries for the rows of a batch.
    path, made_with: as in `study.make_rows`. shared: the processes of `torchrun` share the work.
    """
    def make(batch: list[int]) -> list[Row]:
        started = time.perf_counter()
        with torch.no_grad():
            images = sample(sd, [prompts[k] for k in batch], [seed + k for k in batch], settings)
            seconds, pictures = (time.perf_counter() - started) / len(batch), to_bytes(images)
            rows = [{"k": k, "seed": seed + k, "seconds": round(seconds, 4)} |
                    (judged(picture, prompts[k]) if sd.config.family == "tiny" else {})
                    for k, picture in zip(batch, pictures)]
            return [row | added for row, added in zip(rows, more(batch, images, pictures))] if more else rows
    place = (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))) if shared else (0, 1)
    return study.make_rows(path, made_with, len(prompts), batch, make, *place)


def measure_arms(sd: StableDiffusion, results: Results, known: Iterable[Arm], run: Iterable[Arm], prompts: list[str],
                 seed: int, batch: int, settings: Row, more: Callable[..., list[Row]] | None = None,
                 summary: Callable[[Arm, list[Row]], Row] = lambda arm, rows: {},
                 facts: Callable[[Arm, Row], Row] = lambda arm, row: {}, columns: Row | None = None) -> dict[str, Row]:
    """A study: each arm draws the same prompts from the same noise. Prints the table and returns its rows by arm.

    known: all arms of the study; those measured by earlier runs with the same settings count when p is corrected.
    run: those to measure now, unless the results have them. settings: those that all arms have.
    more: (arm, numbers, images, pictures in bytes) -> entries for the rows of a batch.
    summary: what the entry of an arm takes from its rows, beside the verdicts (a 0 or 1 per picture) and mean quality.
    facts: what the entry takes from the comparison, made anew in every run.
    columns: of the table, after score and lead: the head, then the name of a fact and how it is formatted.
    """
    known, run, common = list(known), list(run), {"seed": seed, "n": len(prompts), **settings}
    results.write("design", {"declared": study.declare(known, prompts, seed)})
    made = {arm.name: {"what": arm.text, **common, "arm": arm.settings} for arm in known}
    for arm in tqdm(run, desc="arms", unit="arm"):
        path = results.path.with_name(f"{results.path.name} {arm.name}")

        def make(arm: Arm = arm, path: Path = path) -> Row:
            rows = measure(sd, prompts, seed, batch, settings | arm.settings, path,
                           results.made_with | made[arm.name], None if more is None else partial(more, arm))
            found: Row = {name: "".join(str(int(row[name])) for row in rows) for name in ("strict", "loose")}
            return found | {"quality": bootstrap([row["quality"] for row in rows], prompts)["overall"],
                            **summary(arm, rows)}
        results.entry("measure", arm.name, make, **made[arm.name])
        study.remove_parts(path)
    kept = results.section("measure")
    same = [arm for arm in known if kept.get(arm.name, {}).get("made with") == study.to_json(
        results.made_with | made[arm.name])]
    right = {arm.name: np.array(list(kept[arm.name]["strict"]), float) for arm in same}
    found = {name: kept[name] | row for name, row in study.compare(same, right, prompts).items()}
    found = {arm.name: found[arm.name] | {"group": arm.group} | facts(arm, found[arm.name]) for arm in same}
    results.write("measure", found)
    columns = columns or {}
    table = [["arm", "strict score", "base", *study.LEAD, "quality", "loose", *columns]]
    for arm in run:
        x = found[arm.name]
        table.append([arm.name, f"{x['score']:.3f}", arm.base, *study.lead_cells(x), f"{x['quality']['mean']:.3f}",
                      f"{np.mean(list(map(int, x['loose']))):.3f}",
                      *(format(x[name], form) for name, form in columns.values())])
    print(f"n = {len(prompts)} pictures per arm; intervals are 95 %\n\n{study.markdown(table)}", flush=True)
    return found


# --------------------------------------------------------------------------------------------------------- numbers

def estimates(rows: list[Row], numbers: list[float]) -> dict[str, Estimate]:
    """Means of one number per row, by kind and overall."""
    return bootstrap(numbers, [row["prompt"] for row in rows], [row["kind"] for row in rows])


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


def summarize(sd: StableDiffusion, reward: ClipReward | None, rows: list[Row], size: tuple[int, int],
              drawn: int) -> Row:
    """All numbers of a run, from its rows. size: height and width of its pictures."""
    result: Row = {}
    if "strict" in rows[0]:
        for name, chosen in (("all", rows), ("seen", [r for r in rows if r["seen"]]),
                             ("unseen", [r for r in rows if r["seen"] is False])):
            if chosen:
                result[name] = estimates(chosen, [row["strict"] for row in chosen])
        for name in ("quality", "loose"):
            result[name] = estimates(rows, [row[name] for row in rows])
    if "clip" in rows[0]:
        result["clip_score"] = bootstrap([row["clip"] for row in rows], [row["prompt"] for row in rows])["overall"]
    if "strict" in rows[0] and "clip" in rows[0] and drawn and len(rows) > len(rows[0]["features"]):
        real = drawn_features(reward.image, drawn, *size, seed=1)
        again = drawn_features(reward.image, len(rows), *size, seed=2)
        own = np.array([row["features"] for row in rows])
        result["frechet"] = {"distance": round(frechet_distance(own, real), 4), "n": len(rows), "drawn": drawn,
                             "floor": round(frechet_distance(again, real), 4)}
    return result | {"seconds_per_image": round(float(np.mean([row["seconds"] for row in rows])), 4),
                     "peak_memory_gb": round(peak_memory(sd.device), 3)}


def retrieval(reward: ClipReward, n: int, split: str, candidates: int = 64) -> dict[str, Estimate]:
    """How often CLIP finds the true caption of n scenes per kind among hard ones: the same shapes, other attributes."""
    rng, hits, kinds = np.random.default_rng(4), [], [kind for kind in shapes.KINDS for _ in range(n)]
    for kind in tqdm(kinds, desc=f"retrieval, {split}", leave=False):
        scene = shapes.random_scene(rng, kind, split)
        captions = shapes.hard_captions(scene, candidates, rng)
        picture = torch.from_numpy(shapes.draw(scene)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            cosines = torch.cosine_similarity(reward.image(picture), reward.embed_text(captions))
        hits.append(float(cosines.argmax() == 0))
    return bootstrap(hits, None, kinds)


def compare(paths: list[Path]) -> dict[str, Estimate]:
    """Differences second minus first, paired picture by picture: same prompts and same seeds, or InputError."""
    results = []
    for path in paths:
        try:
            results.append(json.loads(path.read_text(encoding="utf-8"))["rows"])
            rows = [(row["kind"], row["prompt"], row["seed"], row["strict"], row["quality"]) for row in results[-1]]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path} is no result of lab.evaluate with verdicts; run it with --out {path}") from None
        if [row[:3] for row in rows] != [(r["kind"], r["prompt"], r["seed"]) for r in results[0]]:
            raise InputError(f"{paths[0]} and {path} have other prompts or seeds, so they can't be paired; run both "
                             "with the same --bench, --n-per-prompt and --seed")
    first, second = results
    differences = lambda name: [b[name] - float(a[name]) for a, b in zip(first, second)]
    found = estimates(first, differences("strict"))
    found["quality"] = estimates(first, differences("quality"))["overall"]
    if "clip" in first[0] and "clip" in second[0]:
        found["clip score"] = bootstrap(differences("clip"), [row["prompt"] for row in first])["overall"]
    return found


# ---------------------------------------------------------------------------------------------------------- output

def draw_sheet(sd: StableDiffusion, rows: list[Row], settings: Row, path: Path, most: int = 24) -> None:
    """Up to `most` right pictures (framed green) and wrong ones (red), spread over the benchmark; of a file, all."""
    chosen = rows
    if rows[0]["kind"] != "file":
        groups = [[row for row in rows if row["strict"] == ok] for ok in (True, False)]
        chosen = [row for group in groups for row in group[::max(len(group) // most, 1)][:most]]
    prompts, pictures = [row["prompt"] for row in chosen], []
    for start in range(0, len(chosen), 24):
        pictures += to_bytes(sample(sd, prompts[start:start + 24], [r["seed"] for r in chosen[start:start + 24]],
                                    settings))
    study.sheet([("", pictures[k:k + 8]) for k in range(0, len(pictures), 8)], path, captions=prompts, frames=[
        "seagreen" if judged(*pair)["strict"] else "crimson" for pair in zip(pictures, prompts)])


def show(table: dict[str, Estimate], title: str) -> None:
    print(f"{title}, with 95 % intervals")
    for kind, x in table.items():
        print(f"  {kind:12s} {x:.3f}  n = {x.n}")


def read_flags(args: argparse.Namespace) -> tuple[Row, Row]:
    """txt2img.py's flags as arguments of `sd.sample`, with the pictures' size, and as text for the result."""
    config = read_config(args.model)
    size = args.height or config.size, args.width or config.size
    techniques = bind_techniques(args, config, *size)
    text = {name: write(of, next(kind for kind, made in TECHNIQUES[name][1].items() if type(of) is made), file_digest)
            for name, of in techniques.items()}
    size = techniques["freescale"].resolutions[-1] if "freescale" in techniques else size
    settings = {name: getattr(args, name) for name in ("negative_prompt", "steps", "sampler", "cfg_scale", "eta",
                                                       "spacing")} | {"height": size[0], "width": size[1]}
    return settings | techniques, settings | text | {"vae_tile": args.vae_tile}


def main() -> None:
    parser = ArgumentParser(description="How often a model draws what was asked, by the exact scorer. Takes "
                            "all flags of txt2img.py (--model, --steps, --freeu, ...) too.",
                            formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--bench", type=Path, default=BENCH, help="rows in .jsonl, or a text file of prompts")
    add("--kinds", help="only these of the rows' kinds, separated by commas")
    add("--n-per-prompt", type=int, default=1, help="pictures of each row")
    add("--out", type=Path, default=Path("result.json"), help="all numbers and rows; JSON")
    add("--sheet", type=Path, help="also draw right and wrong pictures on this PNG")
    add("--drawn", type=int, default=5000, help="ground truths for the Frechet distance; 0: none")
    add("--retrieval", type=int, metavar="N", help="instead: how well the model's CLIP finds captions")
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two results instead: B minus A")
    own, rest = parser.parse_known_args()
    if own.compare:
        return show(compare(own.compare), f"{own.compare[1]} minus {own.compare[0]}")
    args = parse_arguments(["the benchmark", *rest])
    if own.retrieval:
        for split in ("train", "unseen"):
            show(retrieval(load_reward(args.model / "clip"), own.retrieval, split),
                 f"the true caption first among 64 hard ones, {split}")
        return None
    check_flags(("--n-per-prompt", own.n_per_prompt >= 1, "1 or more"),
                ("--drawn", own.drawn == 0 or own.drawn >= 100, "0, or 100 or more"),
                ("--init-image", args.init_image is None, "left out: every prompt would start from one picture"),
                ("--out", own.out.parent.is_dir(), f"in a folder, and there is no {own.out.parent}"))
    return judge_model(own, args, args.batch_size if "--batch-size" in rest else 50)


def judge_model(own: argparse.Namespace, args: argparse.Namespace, batch: int) -> None:
    """Draws and judges the benchmark's pictures. own: this command's flags. args: those of txt2img.py."""
    rows = read_rows(own.bench)
    wanted = {row["kind"] for row in rows} if own.kinds is None else set(own.kinds.split(","))
    if unknown := wanted - {row["kind"] for row in rows}:
        raise InputError(f"--kinds: {own.bench} has no rows of kind {', '.join(sorted(unknown))}")
    rows = [row for row in rows if row["kind"] in wanted for _ in range(own.n_per_prompt)]
    prompts, (settings, text) = [row["prompt"] for row in rows], read_flags(args)
    made_with = {"model": study.digest(args.model), "dtype": str(args.dtype), "PyTorch": torch.__version__,
                 "lab": study.VERSION, "bench": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
                 "seed": args.seed, "settings": text}
    sd = StableDiffusion.load(args.model, args.device, args.dtype, args.low_memory, args.compile)
    sd.tile, clip = args.vae_tile, args.model / "clip"
    if sd.config.family != "tiny":
        print(f"note: {args.model} wasn't trained on the drawn world: no verdicts, no Frechet distance, only time and "
              "memory")
    elif not clip.exists():
        print(f"note: there is no {clip}, a CLIP of the drawn world: no CLIP score and no Frechet distance")
    reward = load_reward(clip, args.device, args.dtype) if clip.exists() else None

    def clip_facts(batch: list[int], images: Tensor, _: list[np.ndarray]) -> list[Row]:
        features = reward.image(images)
        cosines = torch.cosine_similarity(features, reward.embed_text([prompts[k] for k in batch]))
        return [{"clip": round(cosine, 5), "features": [round(f, 5) for f in row]}
                for cosine, row in zip(cosines.tolist(), features.tolist())]
    try:
        settings = {name: of.bind(sd) if hasattr(of, "bind") else of for name, of in settings.items()}
        found = measure(sd, prompts, args.seed, batch, settings, own.out, made_with,
                        None if reward is None else clip_facts, shared=True)
    except ValueError as error:                                        # techniques that don't go together
        raise InputError(str(error)) from None
    if not found:
        return print("the other processes are still at work; the last one writes the result")
    rows = [row | more for row, more in zip(rows, found)]
    result = summarize(sd, reward, rows, (settings["height"], settings["width"]), own.drawn)
    for row in rows:
        row.pop("features", None)
    study.write_text(own.out, json.dumps(study.to_json(made_with | result | {"rows": rows})) + "\n")
    study.remove_parts(own.out)
    for name, number in result.items():
        if isinstance(number, dict) and "overall" in number:
            show(number, f"strict, {name}" if name in ("all", "seen", "unseen") else name)
        else:
            print(f"{name}: {number:.3f}" if isinstance(number, Estimate) else f"{name}: {number}")
    if own.sheet and "strict" in rows[0]:
        draw_sheet(sd, rows, settings, own.sheet)


if __name__ == "__main__":
    run_command(main)
