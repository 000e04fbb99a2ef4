"""Speed and memory beside diffusers: the same work with the same random weights, in turns, in one process.

    python -m benchmarks.speed --list
    python -m benchmarks.speed --rows "unet sd15 256 bfloat16" "decode tiny" --rounds 9
    python -m benchmarks.speed --json benchmarks/speed.json --table benchmarks/README.md      # the rows of TARGETS

Start at `measure_row`. Both sides load the same weights with the code that a user runs (`StableDiffusion.load`,
`from_pretrained`). Then they take turns; every other round, diffusers begins. A row has the median of the rounds' own
ratios with the least and the greatest, CPU time, the largest error against diffusers in float32, and the peak memory of
a fresh process per side. If diffusers' seconds drift, the row is measured again; after three tries it is refused.
A U-Net step is a call of the U-Net within a run. Our loop makes the text's keys and values and the times' embeddings
once per run, so our call leaves them out; their time is reported as "once a run". The text is random embeddings, as
many as the model's prompts have tokens.
"""
import argparse
import gc
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from clip_text import TextConfig, TextEncoder
from command import ArgumentParser, InputError, check_flags, replacing, run_command
from convert_weights import FAMILIES
from folder import TINY, ModelConfig, build, load_weights, read_config, write_config
from lab.evaluate import mixed_prompts
from memory import FusedAttention, Meter, weight_bytes
from stable_diffusion import StableDiffusion
from unet import UNet
from vae import VAE

ROOT = Path(__file__).resolve().parent.parent
TRIES = 3
FEW = 4                                        # steps of "picture"; more would not raise its peak memory
STEPS = 30                                     # of "command"; the table divides "once a run" by it
PROMPT = "a red circle left of a blue square"
KINDS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder, "text_encoder_2": TextEncoder}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
GB = 1e9


@dataclass(frozen=True)
class Row:
    """One line of the table.

    what: "unet" (a step), "decode", "encode" (the VAE), "text" (two texts of random tokens), "load", "read" (load, then
        read every weight once), "picture" (4 steps with guidance, from given embeddings of the text), "command" (cold
        start to PNG), "many" (batches of 8 pictures, compared with our own single pictures, not with diffusers).
    guided: both branches of guidance in one batch; otherwise, one row.
    """
    what: str
    family: str
    size: int
    dtype: str = "float32"
    guided: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        words = [self.what, self.family, str(self.size), self.dtype]
        if self.what == "unet":
            words += ["guided" if self.guided else "alone", "compiled" if self.compiled else "eager"]
        return " ".join(words)


def rows_of(device: str) -> list[Row]:
    """All rows; those of `TARGETS` are measured without --rows."""
    sizes = [("tiny", 64), ("sd15", 256), ("sd15", 512), ("sd21", 512), ("sd21", 768), ("sdxl", 512), ("sdxl", 1024)]
    rows = [Row("unet", family, size, dtype, guided, compiled) for (family, size), dtype, guided, compiled
            in product(sizes, DTYPES[device], (True, False), (False, True))]
    rows += [Row(what, family, size, dtype) for (family, size), dtype, what in product(
        [("tiny", 64), ("sd15", 512), ("sdxl", 1024)], DTYPES[device],
        ("decode", "encode", "text", "load", "read"))]
    rows += [Row("picture", family, size, dtype, guided=True) for (family, size), dtype in product(
        [("tiny", 64), ("sd15", 512)], DTYPES[device])]
    return rows + [Row("command", "tiny", 64), Row("many", "tiny", 64)]


TARGETS = ("unet tiny guided eager", "unet sd15 256 guided", "unet sd15 512 guided eager", "decode sd15",
           "text sd15", "load sd15", "read sd15", "command", "many")


def chosen(rows: list[Row], patterns: list[str]) -> list[Row]:
    """The rows whose names have all words of one of the patterns; InputError for a pattern that chooses none."""
    def fits(row: Row, pattern: str) -> bool:
        return set(pattern.split()) <= set(row.name.split())
    for pattern in patterns:
        if not any(fits(row, pattern) for row in rows):
            raise InputError(f"no row's name has all words of {pattern!r}; --list shows the names")
    return [row for row in rows if any(fits(row, pattern) for pattern in patterns)]


# ------------------------------------------------------------------------------------------- the same weights for both

def make_folders(family: str, work: Path) -> tuple[Path, Path]:
    """Our folder and diffusers', made if missing: the tiny model, or random weights (SDXL's in float16)."""
    ours, theirs = work / family, work / f"{family}-diffusers"
    if not theirs.is_dir():
        config = config_of(family)
        shutil.rmtree(ours, ignore_errors=True)
        ours.mkdir(parents=True)
        part = work / f"{family}-part"
        shutil.rmtree(part, ignore_errors=True)
        for name, settings in config.parts.items():
            if family == "tiny":
                state = load_file(TINY / f"{name}.safetensors")
            else:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    state = KINDS[name](settings).to(torch.float16 if family == "sdxl" else torch.float32).state_dict()
            save_file(state, ours / f"{name}.safetensors", metadata={"format": "pt"})
        shutil.copy(TINY / "tokenizer.json", ours)
        write_config(ours, config)
        write_theirs(config, ours, part)
        part.rename(theirs)
    return ours, theirs


def config_of(family: str) -> ModelConfig:
    return read_config(TINY) if family == "tiny" else FAMILIES[family]


def write_theirs(config: ModelConfig, ours: Path, out: Path) -> None:
    """A folder for diffusers' `from_pretrained`. Its weights are links to ours: the parameters have the same names."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, PreTrainedTokenizerFast
    u, v, levels = config.unet, config.vae, len(config.vae.channels)
    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": u.add_time_dim,
            "projection_class_embeddings_input_dim": u.add_dim} if u.add_dim else {}
    with torch.device("meta"):
        UNet2DConditionModel(
            sample_size=config.size // v.factor, block_out_channels=u.channels, layers_per_block=u.layers,
            norm_num_groups=u.groups, cross_attention_dim=u.context_dim, attention_head_dim=u.heads,
            upcast_attention=u.upcast_attention, use_linear_projection=u.linear_proj,
            down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in u.depth),
            up_block_types=tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(u.depth)),
            transformer_layers_per_block=tuple(max(d, 1) for d in u.depth), **sdxl).save_config(out / "unet")
        AutoencoderKL(
            block_out_channels=v.channels, layers_per_block=v.layers, norm_num_groups=v.groups,
            scaling_factor=v.scaling, force_upcast=v.force_upcast, down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels).save_config(out / "vae")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
                  set_alpha_to_one=False).save_pretrained(out / "scheduler")
    tokenizer = Tokenizer.from_file(str(ours / "tokenizer.json"))
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=[
        (token, tokenizer.token_to_id(token)) for token in (start, end)])

    def text(name: str, c: TextConfig) -> None:
        CLIPTextConfig(vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
                       num_attention_heads=c.heads, max_position_embeddings=c.length, hidden_act=c.activation,
                       projection_dim=c.projection or 8).save_pretrained(out / name)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=c.length, bos_token=start, eos_token=end,
            pad_token=tokenizer.id_to_token(0)).save_pretrained(out / name.replace("text_encoder", "tokenizer"))
    text("text_encoder", config.text_encoder)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "PreTrainedTokenizerFast"], "scheduler": ["diffusers", "DDIMScheduler"],
             "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    if config.text_encoder_2 is not None:
        text("text_encoder_2", config.text_encoder_2)
        for name in ("safety_checker", "feature_extractor", "requires_safety_checker"):
            del index[name]
        index |= {"_class_name": "StableDiffusionXLPipeline", "tokenizer_2": index["tokenizer"],
                  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    (out / "model_index.json").write_text(json.dumps(index))
    for name in config.parts:
        file = "model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors"
        (out / name / file).hardlink_to(ours / f"{name}.safetensors")


# ------------------------------------------------------------------------------------------------------ the two sides
# Each returns a call, whose result is a tensor (None for those that only load), and the modules whose weights it uses.

Side = tuple[Callable[[], Tensor | None], list[nn.Module]]


def inputs(row: Row, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What both sides get, by name, from one CPU generator."""
    config = config_of(row.family)
    generator, rows = torch.Generator().manual_seed(0), 2 if row.guided else 1
    side, tokens = row.size // config.vae.factor, config.text_encoder.length

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)
    given = {"x": random(rows, 4, side, side), "context": random(rows, tokens, config.unet.context_dim),
             "t": torch.tensor(500.0, device=device), "image": random(1, 3, row.size, row.size).clamp(-1, 1),
             "ids": torch.randint(1, config.text_encoder.vocab, (2, tokens), generator=generator).to(device)}
    if config.unet.add_dim:
        given["pooled"] = random(rows, config.text_encoder_2.projection)
        given["sizes"] = torch.tensor([[row.size, row.size, 0, 0, row.size, row.size]] * rows, device=device)
    return given


def our_call(row: Row, given: dict[str, Tensor], module: Callable[[str], nn.Module]) -> Side:
    """One of our components with these `inputs`. module: from the component's name to the module."""
    if row.what == "unet":
        unet = module("unet")
        text, shifts = unet.embed_text(given["context"]), unet.embed_time(given["t"], given.get("added"))
        return lambda: unet(given["x"], shifts, text), [unet]
    if row.what == "text":
        text = module(list(config_of(row.family).parts)[-1])
        return lambda: text(given["ids"])[0], [text]
    vae = module("vae")
    return (lambda: vae.decode(given["x"])) if row.what == "decode" else lambda: vae.encode(given["image"])[0], [vae]


def our_side(row: Row, folder: Path, work: Path, device: str, dtype: torch.dtype) -> Side:
    if row.what in ("load", "read"):
        return lambda: weights_of(StableDiffusion.load(folder, device, dtype), row.what == "read"), []
    if row.what == "command":
        arguments = [ROOT / "txt2img.py", PROMPT, "--model", folder, "--steps", STEPS, "--out", work / "ours.png",
                     "--device", device, "--dtype", "float32"]
        return lambda: run_script([*map(str, arguments)], work / "ours.png"), []
    given = inputs(row, device, dtype)
    if row.what not in ("many", "picture", "unet"):
        def load(name: str) -> nn.Module:
            """As `StableDiffusion.load` does it."""
            module = build(KINDS[name], read_config(folder).parts[name])
            return load_weights(module, folder / f"{name}.safetensors", device, dtype)
        return our_call(row, given, load)
    sd = StableDiffusion.load(folder, device, dtype, compiled=row.compiled)
    if row.what == "unet":
        if "pooled" in given:
            given["added"] = sd.size_conditioning(given["pooled"], given["sizes"])
        return our_call(row, given, lambda name: sd.unet)
    modules = [sd.unet, sd.vae, *sd.text_encoders]
    if row.what == "many":
        return lambda: draw_many(sd, 8), modules
    negative, positive = given["context"].chunk(2)
    noise = given["x"][:1].float()
    return lambda: sd.decode(sd.sample(positive, negative, FEW, cfg_scale=7.5, noise=noise)), modules


def their_side(row: Row, folder: Path, work: Path, device: str, dtype: torch.dtype) -> Side:
    import diffusers
    import transformers
    if row.what in ("load", "read"):
        def load() -> None:
            pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
            weights_of(pipe, row.what == "read")
        return load, []
    if row.what == "command":
        script = ("import sys, torch\nfrom diffusers import StableDiffusionPipeline\n"
                  "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32).to(sys.argv[5])\n"
                  "image = pipe(sys.argv[2], num_inference_steps=int(sys.argv[3]), guidance_scale=7.5, "
                  "generator=torch.Generator().manual_seed(0)).images[0]\nimage.save(sys.argv[4])\n")
        return lambda: run_script(["-c", script, str(folder), PROMPT, str(STEPS), str(work / "theirs.png"), device],
                                  work / "theirs.png"), []
    given = inputs(row, device, dtype)
    x = given["x"]
    if row.what == "picture":
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        negative, positive = given["context"].chunk(2)
        return lambda: pipe(prompt_embeds=positive, negative_prompt_embeds=negative, num_inference_steps=FEW,
                            guidance_scale=7.5, latents=x[:1], height=row.size, width=row.size,
                            output_type="pt").images, [pipe.unet, pipe.vae, pipe.text_encoder]
    if row.what == "unet":
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype).to(device)
        if row.compiled:
            unet.compile(options={"freezing": True} if device == "cpu" else {"max_autotune": True,
                                                                            "triton.cudagraphs": True})
        kwargs = {"text_embeds": given["pooled"], "time_ids": given["sizes"]} if "pooled" in given else None
        return lambda: unet(x, given["t"], given["context"], added_cond_kwargs=kwargs).sample, [unet]
    if row.what in ("decode", "encode"):
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype).to(device)
        if row.what == "decode":
            return lambda: vae.decode(x).sample, [vae]
        return lambda: vae.encode(given["image"]).latent_dist.mean, [vae]
    last = "text_encoder_2" if (folder / "text_encoder_2").is_dir() else "text_encoder"
    kind = transformers.CLIPTextModelWithProjection if last == "text_encoder_2" else transformers.CLIPTextModel
    text = kind.from_pretrained(folder / last, dtype=dtype).to(device)
    if last == "text_encoder_2":
        return lambda: text(given["ids"], output_hidden_states=True).hidden_states[-2], [text]
    return lambda: text(given["ids"]).last_hidden_state, [text]


def single_side(row: Row, folder: Path, work: Path, device: str, dtype: torch.dtype) -> Side:
    """The other side of "many": our own loop of single pictures."""
    sd = StableDiffusion.load(folder, device, dtype)
    return lambda: draw_many(sd, 1), [sd.unet, sd.vae, *sd.text_encoders]


def draw_many(sd: StableDiffusion, batch: int, n: int = 16) -> Tensor:
    """n pictures of mixed prompts, `batch` at a time, in 10 steps."""
    prompts = mixed_prompts(n, seed=40_000)
    return torch.cat([sd.decode(sd.sample(prompts[k:k + batch], steps=10, seed=k)) for k in range(0, n, batch)])


def weights_of(loaded: Any, read: bool) -> None:
    """With read, reads every weight of a pipeline once, so that files that are only mapped come into memory."""
    modules = [m for value in vars(loaded).values() for m in (value if isinstance(value, list) else [value])
               if isinstance(m, nn.Module)]
    for p in (p for module in modules for p in module.parameters() if read):
        p.max()


def run_script(arguments: list[str], picture: Path) -> Tensor:
    """A fresh Python with these arguments -> the picture that it wrote, (H, W, 3) in [0, 1]."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"the command {arguments[0]} ended with code {done.returncode}: {done.stderr[-500:]}")
    return torch.from_numpy(np.asarray(Image.open(picture)).astype(np.float32) / 255)


# ------------------------------------------------------------------------------------------------------- measurements

def clock() -> tuple[float, float]:
    """Seconds by the wall, and of the CPU: of all threads, and of child processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def timed(call: Callable[[], Any], repeat: int, device: str) -> tuple[float, float]:
    """(wall, CPU) seconds of one call, the mean of `repeat`; on a GPU the wall's are by its own events."""
    gc.collect()                               # the other side's garbage must not cost this side time
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    wall, cpu = clock()
    for _ in range(repeat):
        call()
    if device == "cuda":
        end.record()
        end.synchronize()
    now = clock()
    wall = start.elapsed_time(end) / 1e3 if device == "cuda" else now[0] - wall
    return wall / repeat, (now[1] - cpu) / repeat


Seconds = tuple[float, float]                  # by the wall, and of the CPU


def take_turns(calls: list[Callable[[], Any]], rounds: int, device: str) -> tuple[list[list[Seconds]], list[Seconds]]:
    """Seconds of every call in every round, which the calls begin in turn; and of each call's first time, a warm-up."""
    first = [timed(call, 1, device) for call in calls]
    warm = [timed(call, 1, device) for call in calls]
    # at least 0.2 s per round on a CPU, and at least 50 calls in all rounds on a GPU
    repeat = -(-50 // rounds) if device == "cuda" else max(1, min(50, round(0.2 / min(w for w, _ in warm))))
    seconds = [[] for _ in calls]
    for k in range(rounds):
        for i in sorted(range(len(calls)), reverse=k % 2 == 1):
            seconds[i].append(timed(calls[i], repeat, device))
    return seconds, first


def drift(seconds: list[float]) -> float:
    """How far the farthest round is from the median, as a part of it."""
    return max(abs(s / median(seconds) - 1) for s in seconds)


def error(out: Tensor, reference: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    out, reference = out.float().cpu(), reference.float().cpu()
    return ((out - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def measure_row(row: Row, args: argparse.Namespace, peaks: dict[str, float]) -> dict[str, Any]:
    """All numbers of one row; a row whose seconds drift has "refused" instead of its times."""
    folders, dtype = make_folders(row.family, args.work), getattr(torch, row.dtype)
    baseline = single_side if row.what == "many" else their_side
    base_folder = folders[row.what != "many"]
    settings = (args.work, args.device)
    result: dict[str, Any] = {"row": row.name, **asdict(row)}
    if args.memory and row.what not in ("command", "many"):            # before the rest takes memory
        result |= {"peak": alone(row, "ours", args), "base peak": alone(row, "theirs", args)}

    reference = None
    if row.what not in ("load", "read"):
        call, _ = baseline(replace(row, dtype="float32", compiled=False), base_folder, *settings, torch.float32)
        reference = call()
        del call
        gc.collect()
    ours, base = our_side(row, folders[0], *settings, dtype), baseline(row, base_folder, *settings, dtype)
    firsts = []                                # of every try; only the first try compiles
    for _ in range(TRIES):
        seconds, first = take_turns([ours[0], base[0]], args.rounds, args.device)
        firsts.append(first)
        (wall, cpu), (base_wall, base_cpu) = (list(zip(*s)) for s in seconds)
        result["drift"] = drift(base_wall)
        if result["drift"] <= args.drift:
            break
    else:
        whose = "our single pictures'" if row.what == "many" else "diffusers'"
        result["refused"] = f"{whose} own seconds drift by {100 * result['drift']:.0f} %"
    ratios = [b / a for a, b in zip(wall, base_wall)]
    times = {"seconds": median(wall), "base seconds": median(base_wall), "ratio": median(ratios),
             "least": min(ratios), "greatest": max(ratios), "cpu seconds": median(cpu),
             "base cpu seconds": median(base_cpu), "cpu ratio": median(b / a for a, b in zip(cpu, base_cpu)),
             "first call": firsts[0][0][0], "base first call": firsts[0][1][0]}
    if row.what == "unet":
        times["once a run"] = once_a_run(row, ours[1][0], args.device, dtype)
    if "refused" not in result:
        result |= times
    if reference is not None:
        result |= {"error": error(ours[0](), reference), "base error": error(base[0](), reference)}
    result |= arithmetic(row)
    if "flops" in result and "refused" not in result:
        ideal = max(result["flops"] / peaks[row.dtype], result["bytes"] / peaks["bandwidth"])
        result |= {"of peak": ideal / result["seconds"], "base of peak": ideal / result["base seconds"]}
    return result


def once_a_run(row: Row, unet: UNet, device: str, dtype: torch.dtype) -> float:
    """Seconds that a run of STEPS steps takes for the text's keys and values and for all its times."""
    given = inputs(row, device, dtype)
    added = None if not unet.config.add_dim else torch.zeros(len(given["x"]), unet.config.add_dim).to(device, dtype)
    times = torch.linspace(1, 981, STEPS, device=device)

    def prepare() -> None:
        unet.embed_text(given["context"])
        unet.embed_schedule(times, added)
    prepare()
    return median(timed(prepare, 1, device)[0] for _ in range(5))


class Traffic(Meter):
    """A Meter that also adds up the bytes that convolutions and linear layers read and write, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if function._overloadpacket in flop_registry:
            self.moved += sum(x.nbytes for x in tree_leaves((args, out)) if isinstance(x, Tensor))
        return out


def arithmetic(row: Row) -> dict[str, int]:
    """FLOPs (with attention) and bytes of a row, from shapes alone; nothing for rows that do more than arithmetic."""
    if row.what not in ("unet", "decode", "encode", "text"):
        return {}
    config, dtype, meter = config_of(row.family), getattr(torch, row.dtype), Traffic()
    given = {name: x.to("meta") for name, x in inputs(row, "cpu", dtype).items()}
    if config.unet.add_dim:
        given["added"] = torch.empty(len(given["x"]), config.unet.add_dim, dtype=dtype, device="meta")
    with torch.no_grad():
        call, _ = our_call(row, given, lambda name: build(KINDS[name], config.parts[name]).to(dtype))
        with FusedAttention(meter), meter:
            call()
    return {"flops": meter.flops, "bytes": meter.moved}


def measure_peaks(dtypes: list[str], device: str) -> dict[str, float]:
    """This machine's peaks: FLOP/s per dtype, of a matrix product or a convolution, whichever is faster; and bytes/s
    of a copy (read and write)."""
    n, size = (8192, 2 ** 30) if device == "cuda" else (2048, 2 ** 28)
    peaks = {}
    for name in dtypes:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, name)) for _ in range(2))
        x, w = torch.randn(2, 512, 64, 64, device=device), torch.randn(512, 512, 3, 3, device=device)
        x, w = (v.to(a.dtype, memory_format=torch.channels_last) for v in (x, w))
        square = min(timed(lambda: a @ b, 1, device)[0] for _ in range(8))  # noqa: B023
        maps = min(timed(lambda: F.conv2d(x, w, padding=1), 1, device)[0] for _ in range(8))  # noqa: B023
        peaks[name] = max(2 * n ** 3 / square, 2 * 9 * 512 ** 2 * 2 * 64 ** 2 / maps)
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    peaks["bandwidth"] = 2 * size / min(timed(lambda: b.copy_(a), 1, device)[0] for _ in range(8))
    return peaks


def alone(row: Row, side: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a fresh process that loads one side and calls it once, and the bytes of its weights."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.speed", "--alone", side, "--rows", row.name, "--work",
                           str(args.work), "--device", args.device, "--threads", str(args.threads)],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise InputError(f"measuring the memory of {row.name} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def one_side(row: Row, args: argparse.Namespace) -> None:
    """What `alone` runs. Prints a line of JSON."""
    folders = make_folders(row.family, args.work)
    side, folder = (our_side, folders[0]) if args.alone == "ours" else (their_side, folders[1])
    call, modules = side(row, folder, args.work, args.device, getattr(torch, row.dtype))
    call()
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:       # not getrusage's maximum, which a process inherits from the one that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    print(json.dumps({"peak": peak, "weights": weight_bytes(*modules)}))


# ------------------------------------------------------------------------------------------------------------- results

COLUMNS = ("row", "ours", "diffusers", "ratio (least to greatest)", "CPU ratio", "first call, ours / theirs",
           "error, ours / theirs", "peak GB, ours / theirs", "TFLOP", "GB moved", "of peak, ours / theirs")


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table with one line per row; of a refused row, only the reason."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]

    def both(result: dict[str, Any], name: str, style: str) -> str:
        if name not in result:
            return ""
        return " / ".join(format(result[key], style) for key in (name, f"base {name}"))
    for r in results:
        if "refused" in r:
            lines.append(f"| {r['row']} | refused: {r['refused']} |" + " |" * (len(COLUMNS) - 2))
            continue
        peak = f"{r['peak']['peak'] / GB:.2f} / {r['base peak']['peak'] / GB:.2f}" if "peak" in r else ""
        ours = f"{r['seconds']:.4g} s" + (f" + {r['once a run'] / STEPS:.2g}" if "once a run" in r else "")
        first = f"{both(r, 'first call', '.3g')} s" if r.get("compiled") else ""      # compiling is nearly all of it
        cells = [r["row"], ours, f"{r['base seconds']:.4g} s",
                 f"{r['ratio']:.2f} ({r['least']:.2f} to {r['greatest']:.2f})", f"{r['cpu ratio']:.2f}", first,
                 both(r, "error", ".1e"), peak, f"{r['flops'] / 1e12:.4g}" if "flops" in r else "",
                 f"{r['bytes'] / GB:.4g}" if "bytes" in r else "", both(r, "of peak", ".0%")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(args: argparse.Namespace, peaks: dict[str, float]) -> dict[str, Any]:
    """Hardware, versions and settings, on which the numbers depend."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    if args.device == "cpu" and Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
    return {"processor": name, "CPU capability": torch.backends.cpu.get_cpu_capability(), "threads": args.threads,
            "python": platform.python_version(), **versions, "rounds": args.rounds, "drift allowed": args.drift,
            "peak": {name: f"{value / 1e9:.4g} G{'B' if name == 'bandwidth' else 'FLOP'}/s"
                     for name, value in peaks.items()}}


def reached(results: list[dict[str, Any]]) -> str:
    """The machine's peaks, the least and the greatest of those measured before these rows."""
    peaks: dict[str, set[str]] = {}
    for r in results:
        for name, value in r["machine"]["peak"].items():
            peaks.setdefault(name, set()).add(value)
    ordered = {name: sorted(values, key=lambda value: float(value.split()[0])) for name, values in peaks.items()}
    return ", ".join(f"{name} {' to '.join(dict.fromkeys((v[0], v[-1])))}" for name, v in sorted(ordered.items()))


def insert(text: str, new: str, mark: str = "speed") -> str:
    """The text, with `new` between its marks `<!-- speed -->` and `<!-- /speed -->`; InputError without them."""
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    if start not in text or end not in text:
        raise InputError(f"the file of --table needs a line {start.strip()} and after it one {end}")
    return text[:text.index(start) + len(start)] + new + "\n" + text[text.index(end):]


def other_rows(path: Path, about: dict[str, Any], again: set[str]) -> list[dict[str, Any]]:
    """A file's rows that aren't measured again; InputError if they have another machine, versions or settings."""
    try:
        rows = [r for r in json.loads(path.read_text(encoding="utf-8"))["rows"] if r["row"] not in again]
        others = {name for r in rows for name, value in about.items() if name != "peak" and r["machine"][name] != value}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no file of this benchmark; choose another for --json") from None
    if others:
        raise InputError(f"the rows of {path} were measured with another {', '.join(sorted(others))}; choose another "
                         "file for --json")
    return rows


def main() -> None:
    parser = ArgumentParser(description="Speed and memory beside diffusers.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="WORDS", default=list(TARGETS), help="rows whose names have all "
                        "words of one of these")
    parser.add_argument("--list", action="store_true", help="print the names of all rows and stop")
    parser.add_argument("--rounds", type=int, default=7, help="7 or more")
    parser.add_argument("--drift", type=float, default=0.15, help="refuse rows in which a round of diffusers is "
                        "farther from its median than this part of it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, the same for both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the random weights here (default: nowhere)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="without the fresh processes "
                        "(they need Linux)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here; the file's other "
                        "rows stay")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table between this file's marks")
    parser.add_argument("--alone", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = rows_of(args.device)
    names = [row.name for row in rows]
    if args.list:
        return print("\n".join(names))
    rows = chosen(rows, args.rows)
    check_flags(("--rounds", args.rounds >= 7 or args.alone, "7 or more: fewer say nothing about the spread"),
                ("--threads", args.threads >= 1, "1 or more"), ("--drift", args.drift > 0, "above 0"),
                ("--device", args.device == "cpu" or torch.cuda.is_available(), "cpu: there is no GPU"),
                ("--json", args.json is None or args.json.parent.is_dir(), "in a folder that exists"))
    if args.table:
        insert(args.table.read_text(encoding="utf-8") if args.table.is_file() else "", "")
    try:
        import diffusers
        import transformers
    except ImportError as missing:
        raise InputError(f"this compares with diffusers, but there is no {missing.name}: "
                         "pip install -r requirements-dev.txt") from None
    for peer in (diffusers, transformers):
        peer.utils.logging.set_verbosity_error()
        peer.utils.logging.disable_progress_bar()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)                  # for the commands that are started
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        # no compiler finds an earlier result, here and in the processes that are started
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(temporary) / "inductor")
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        if args.alone:
            return one_side(rows[0], args)
        peaks = measure_peaks(sorted({row.dtype for row in rows}), args.device)
        about, results = machine(args, peaks), []
        if args.json and args.json.is_file():
            results = other_rows(args.json, about, {row.name for row in rows})
        for row in rows:
            results.append(measure_row(row, args, peaks) | {"machine": about})
            print(table(results[-1:]).splitlines()[-1], flush=True)
            if args.json:
                with replacing(args.json) as part:
                    part.write_text(json.dumps({"rows": results}, indent=1) + "\n")
    if args.table:
        told = ", ".join(f"{name} {value}" for name, value in about.items() if name != "peak")
        ordered = table(sorted(results, key=lambda r: names.index(r["row"])))
        with replacing(args.table) as part:
            part.write_text(insert(args.table.read_text(encoding="utf-8"),
                                   f"{told}. Measured peak: {reached(results)}.\n\n{ordered}"), encoding="utf-8")
    if any("refused" in r for r in results[-len(rows):]):
        raise InputError("some rows are refused: the machine isn't quiet; measure them again with --rows")


if __name__ == "__main__":
    run_command(main)
