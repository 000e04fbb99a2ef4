"""What the caches save: multiply-adds by torch's FLOP counter, seconds by the clock.

    python -m benchmarks.cache                                                 # everything, SD 1.5's shapes, on the CPU
    python -m benchmarks.cache --parts macs --family sdxl --size 1024
    python -m benchmarks.cache --parts parallel --schedule-size 512 --group 15
    python -m benchmarks.cache --parts passes schedules --device cuda --dtype bfloat16 --schedule-size 512 --rounds 20

Four parts, each a function whose rows are printed as a table: `macs`, of one pass of one latent (no weights are made
for it); `passes`, the time of a key step and of cheap ones; `schedules`, of whole runs of the sampling loop;
`parallel`, time and memory of one group of parallel Faster Diffusion by its decoder's batch. Weights are random;
`lab/cache_study.py` measures the pictures of a trained model. Times are medians of rounds in one process. Each round
times everything once, in an order that turns from round to round; speed-ups are medians of each round's own ratio.
"""
import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cache import DeepCache, FasterDiffusion, Inherit, TGate
from command import ArgumentParser, InputError, replacing, run_command
from memory import measure, run_macs, shape_run, unit_macs
from sampler import Condition, Run, begin, generate, plan
from unet import CONFIGS, OFF, Techniques, UNet, UNetConfig, sinusoid

Settings = dict[str, Any]              # of a run, by the names of techniques: cache and tgate
BOTH = (0, 1)                          # the branches of guidance


def schedules_of(steps: int, config: UNetConfig, only: list[str] | None = None) -> dict[str, Settings]:
    """What is compared, by name; the first is what the others are compared with. only: texts, of which one is in it."""
    gate, center, units = max(2 * steps // 5, 1), 3 * steps // 10, len(config.channels) * (config.layers + 1)
    table = {}
    for keys in ("paper", "rescaled", 2, 4, 5, 10):
        for parallel in (False, True):
            name = f"Faster Diffusion, {keys if isinstance(keys, str) else f'every {keys}'}"
            table[name + (", parallel" if parallel else "")] = {"cache": FasterDiffusion(keys, parallel, alpha=0.0)}
    table |= {f"DeepCache b{b}, N = {n}": {"cache": DeepCache(n, b)} for b in (0, 1, 2) for n in (2, 3, 5, 10)}
    table |= {f"DeepCache b1, N = {n}, around {center}": {"cache": DeepCache(n, 1, center)} for n in (3, 5)}
    table |= {f"inherit d4-u{units - 5}, every 3": {"cache": Inherit(f"d4-u{units - 5}", 3)}}
    table |= {f"T-GATE {gate}": {"tgate": TGate(gate)},
              f"T-GATE {gate}, guidance kept": {"tgate": TGate(gate, guidance="keep")},
              f"T-GATE {gate}, text computed": {"tgate": TGate(gate, text="compute")},
              f"DeepCache b1, N = 3, T-GATE {gate}": {"cache": DeepCache(3, 1), "tgate": TGate(gate)}}
    return {"full": {}} | {name: settings for name, settings in table.items() if fits(settings, config, steps) and (
        only is None or any(part in name for part in only))}


def fits(settings: Settings, config: UNetConfig, steps: int) -> bool:
    """Whether a run of this number of steps can have this schedule."""
    try:
        for technique in settings.values():
            technique.check(config, steps)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------- arithmetic

def pass_macs(unet: UNet, x: Tensor, t: Tensor, context: Tensor, added: Tensor | None, on: Techniques = OFF) -> int:
    """Multiply-adds of a pass as torch counts them (half its FLOPs), with the time and text projections that it needs.

    The sampling loop projects once for all units and steps; here, the projections of the units that run count. It needs
    the meta device, because torch's counter misses the attention of CPUs.
    """
    shifts, text = unet.embed_time(t, added), unet.embed_text(context)
    with FlopCounterMode(display=False) as counter:
        unet(x, shifts, text, on=on)
        emb = unet.time_embedding(sinusoid(t.reshape(-1), unet.config.channels[0]).to(x.dtype))
        if added is not None:
            unet.add_embedding(added)
        for k, unit in enumerate(unet.units()):
            if on.cache is None or on.cache.runs(k):
                for resnet in unit.resnets:
                    resnet.time_emb_proj(emb)
                for block in [] if unit.attention is None else unit.attention.transformer_blocks:
                    block.attn2.keys_values(context)
    return counter.get_total_flops() // 2


def macs(family: str, side: int) -> list[dict[str, Any]]:
    """One pass of one row, in full, encoder, decoder, and each branch: counted by torch, and by `unit_macs`."""
    config = CONFIGS[family]
    with torch.device("meta"):
        unet = UNet(config)
        x, t, context = torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, config.context_dim)
        added = torch.empty(1, config.add_dim) if config.add_dim else None
    units = [sum(unit) for unit in unit_macs(unet, side, side)]
    full = pass_macs(unet, x, t, context, added)
    rows = [{"pass": "full", "G": full / 1e9, "of full": 1.0, "by unit_macs": sum(units) / 1e9}]

    def cheap(name: str, cache: FasterDiffusion | DeepCache) -> int:
        run = shape_run(unet, side, side, 2, guided=False, cache=cache)
        unet(x, t, context, added, run.on((0,), (0,)))
        features, count = run.acting["cache"], pass_macs(unet, x, t, context, added, run.on((1,), (0,)))
        rows.append({"pass": name, "G": count / 1e9, "of full": count / full,
                     "by unit_macs": sum(units[k] for k in features.units(1)) / 1e9,
                     "cache, elements per row": sum(h.numel() for h in features.kept[0,].values())})
        return count
    decoder = cheap("decoder", FasterDiffusion(2))
    rows.insert(1, {"pass": "encoder and middle", "G": (full - decoder) / 1e9, "of full": 1 - decoder / full,
                    "by unit_macs": sum(units[:unet.middle + 1]) / 1e9})
    for branch in range(unet.middle):
        cheap(f"branch {branch}", DeepCache(2, branch))
    return rows


# --------------------------------------------------------------------------------------------------------------- time

def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds, of the device's work too."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def alternate(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call in every round, after a warm-up; each round begins with the next call."""
    seconds, names = {name: [] for name in calls}, list(calls)
    for name in names:
        calls[name]()
    for k in range(rounds):
        for name in names[k % len(names):] + names[:k % len(names)]:
            seconds[name].append(timed(calls[name], device))
    return seconds


def against_first(seconds: dict[str, list[float]], ideal: dict[str, float]) -> list[dict[str, Any]]:
    """Rows: median seconds, speed-up over the first (median, least and greatest of the rounds), ideal, their ratio."""
    base, rows = next(iter(seconds.values())), []
    for name, values in seconds.items():
        ratios = [b / v for b, v in zip(base, values)]
        rows.append({"what": name, "seconds": median(values), "speed-up": median(ratios), "least": min(ratios),
                     "greatest": max(ratios), "by arithmetic": ideal[name], "reached": median(ratios) / ideal[name]})
    return rows


def inputs(args: argparse.Namespace, size: int, device: str | None = None) -> dict[str, Any]:
    """Arguments of `generate` and `begin`: a U-Net with random weights, noise, prompt and negative prompt.

    device: None: that of args. "meta": only shapes.
    """
    config, dtype, device = CONFIGS[args.family], getattr(torch, args.dtype), device or args.device
    generator = torch.Generator().manual_seed(0)
    with torch.device(device), torch.random.fork_rng():
        torch.random.manual_seed(0)
        unet = UNet(config).to(dtype).requires_grad_(False)
    if dtype != torch.float32:
        unet.to(memory_format=torch.channels_last)

    def random(*shape: int) -> Tensor:
        return torch.randn(args.batch, *shape, generator=generator).to(device)

    def condition() -> Condition:
        return Condition(random(77, config.context_dim).to(dtype),
                         random(config.add_dim).to(dtype) if config.add_dim else None)
    return dict(unet=unet, noise=random(4, size // 8, size // 8), negative=condition(), prompt=condition())


def begun(given: dict[str, Any], steps: int, **settings: Any) -> Run:
    """A run of these `inputs` before its first call."""
    return begin(**given, plan=plan("ddim", steps), cfg_scale=7.5, init=None, strength=1.0, generators=None,
                 techniques=settings)


def first_call(run: Run) -> None:
    """Runs the first call with both branches of guidance, after which the techniques hold what later calls reuse."""
    times, text, added = run.inputs(BOTH)
    run.unet(run.noise.repeat(2, 1, 1, 1).to(text.source.dtype), times[0], text, added, run.on((0,), BOTH))


def passes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One pass with both branches of guidance: in full, a key step, and the steps that reuse features."""
    given = inputs(args, args.size)
    unet, (times, text, added) = given["unet"], begun(given, 2).inputs(BOTH)
    x = given["noise"].repeat(2, 1, 1, 1).to(text.source.dtype)
    network = torch.compile(unet, recompile_limit=64) if args.compile else unet
    units = unit_macs(unet, args.size // 8, args.size // 8)
    full, cross = sum(map(sum, units)), sum(text for *_, text in units)
    calls, ideal = {}, {}

    def add(name: str, on: Techniques, macs: int = full) -> None:
        calls[name], ideal[name] = lambda: network(x, times[0], text, added, on), full / macs

    def cheap(**settings: Any) -> Run:
        """A run after its first call."""
        run = begun(given, 2, **settings)
        first_call(run)
        return run
    add("full", OFF)
    caches = {"Faster Diffusion, decoder": FasterDiffusion(2)} | {
        f"DeepCache, branch {b}": DeepCache(2, b) for b in args.branches or range(unet.middle) if b < unet.middle}
    for name, cache in caches.items():
        run = cheap(cache=cache)
        add(name, run.on((1,), BOTH), sum(sum(units[k]) for k in run.acting["cache"].units(1)))
        if cache == FasterDiffusion(2):
            add("Faster Diffusion, key step", begun(given, 2, cache=cache).on((0,), BOTH))
    add("T-GATE, guidance kept", cheap(tgate=TGate(1, guidance="keep")).on((1,), BOTH), full - cross)
    rows = against_first(alternate(calls, args.rounds, args.device), ideal)
    if args.profile:
        for row in rows:
            row["share of time by operation"] = profile(calls[row["what"]])
    return rows


def profile(call: Callable[[], Any], count: int = 8) -> dict[str, float]:
    """The operations that take most of the time, with their shares of it."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=kinds) as seen:
        call()
    on_gpu = any(event.self_device_time_total for event in seen.key_averages())
    spent = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
             for event in seen.key_averages()}
    most = sorted(spent, key=spent.get, reverse=True)[:count]
    return {key: round(spent[key] / sum(spent.values()), 4) for key in most}


def schedules(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole runs of the loop with guidance, at --schedule-size."""
    given, side = inputs(args, args.schedule_size), args.schedule_size // 8
    unet, shapes = given["unet"], inputs(args, args.schedule_size, "meta")
    table = schedules_of(args.steps, unet.config, args.only)

    def run(settings: Settings) -> None:
        for _ in generate(**given, plan=plan("ddim", args.steps), **settings):
            pass
    counts = {name: run_macs(unet, side, side, args.steps, **settings) for name, settings in table.items()}
    calls = {name: lambda settings=settings: run(settings) for name, settings in table.items()}
    rows = against_first(alternate(calls, args.rounds, args.device), {k: counts["full"] / v for k, v in counts.items()})
    for row, settings in zip(rows, table.values()):
        row["G per picture"] = counts[row["what"]] / 1e9
        row["cache, MB"] = kept_bytes(begun(shapes, args.steps, **settings)) / 1e6
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run(settings)
            row["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return rows


def kept_bytes(run: Run) -> int:
    """Bytes that cache and T-GATE keep between calls. Parallel Faster Diffusion keeps none: it reuses in one call."""
    first_call(run)
    return sum(x.nbytes for x in tree_leaves([state.kept for state in run.acting.values()]))


def parallel(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A key step and the steps after it, decoded one by one and several in one batch.

    Memory is the peak of all tensors without weights and inputs, from shapes alone: see `memory.py`.
    """
    given, shapes = (inputs(args, args.schedule_size, device) for device in (None, "meta"))
    rows = 2 * args.batch
    counts = [n for n in (2, 4, 8, 16, 32) if n < args.group] + [args.group]
    caches = {"serial": FasterDiffusion((0,), alpha=0.0)} | {f"{n} steps a batch": FasterDiffusion(
        (0,), parallel=True, max_batch=n * rows, alpha=0.0) for n in counts}

    def run(given: dict[str, Any], cache: FasterDiffusion) -> None:
        for _ in generate(**given, plan=plan("ddim", args.group), cache=cache):
            pass
    calls = {name: lambda cache=cache: run(given, cache) for name, cache in caches.items()}
    results = against_first(alternate(calls, args.rounds, args.device), dict.fromkeys(caches, 1.0))
    for row, cache in zip(results, caches.values()):
        row["peak of tensors, MB"] = measure(lambda: run(shapes, cache), shapes["unet"]).peak / 1e6  # noqa: B023
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run(given, cache)
            row["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return results


# ------------------------------------------------------------------------------------------------------ command line

def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a Markdown table; a column for every entry."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "share of time by operation"]
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def text(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return " to ".join(map(text, value))
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    for row in rows:
        print(f"| {' | '.join(text(row.get(column)) for column in columns)} |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = ArgumentParser(description="What the caches save, counted and timed.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["macs", "passes", "schedules", "parallel"],
                        choices=["macs", "passes", "schedules", "parallel"])
    parser.add_argument("--family", default="sd15", choices=CONFIGS, help="architecture, with random weights")
    parser.add_argument("--size", type=int, default=512, help="pixels of macs and passes (8 per latent pixel)")
    parser.add_argument("--schedule-size", type=int, default=128, help="pixels of schedules and parallel")
    parser.add_argument("--group", type=int, default=15, help="steps of parallel (15: the longest of the paper's 50)")
    parser.add_argument("--steps", type=int, default=50, help="of schedules")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="pictures of passes and schedules, each with guidance")
    parser.add_argument("--branches", type=int, nargs="+", help="of passes (default: all)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="schedules whose names contain one of these")
    parser.add_argument("--profile", action="store_true", help="passes: also which operations the time goes to (JSON)")
    parser.add_argument("--compile", action="store_true", help="passes: with torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows here; parts that it has stay")
    args = parser.parse_args()
    counts = (args.rounds, args.group, args.batch, args.steps, args.size, args.schedule_size)
    if min(counts) < 1 or args.size % 64 or args.schedule_size % 64:
        raise InputError("counts must be 1 or more, and sizes multiples of 64")
    where = (f"{args.device}, {args.dtype}{', compiled' if args.compile else ''}, {torch.get_num_threads()} threads, "
             f"{args.rounds} rounds, batch {args.batch}")
    titles = {"macs": f"{args.family}, {args.size} px: multiply-adds of one pass and row",
              "passes": f"{args.family}, {args.size} px, {where}: one pass with guidance",
              "schedules": f"{args.family}, {args.schedule_size} px, {args.steps} steps, {where}: a run with guidance",
              "parallel": f"{args.family}, {args.schedule_size} px, {where}: a group of {args.group} steps, Faster "
                          "Diffusion, with guidance"}
    parts = {"macs": lambda: macs(args.family, args.size // 8), "passes": lambda: passes(args),
             "schedules": lambda: schedules(args), "parallel": lambda: parallel(args)}
    for part in args.parts:
        rows = parts[part]()
        show(titles[part], rows)
        if args.json:
            results = json.loads(args.json.read_text()) if args.json.exists() else {}
            with replacing(args.json) as file:
                file.write_text(json.dumps({**results, titles[part]: rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
