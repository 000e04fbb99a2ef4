"""What many test files share: narrow models that run in milliseconds, seeded numbers, and a runner of commands.

    from conftest import NARROW, UNETS, randn        # values and functions; fixtures come by the names of arguments
"""
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import convert_weights
from clip_text import TextConfig, TextEncoder
from command import run_command
from folder import TINY, ModelConfig, read_config, write_config
from sampler import Condition, NoiseSchedule
from unet import UNet, UNetConfig, sinusoid
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"

# The shapes of SD 1.x and of SDXL, narrow. `make_folder` has its own, of two levels only.
NARROW = UNetConfig(channels=(8, 16, 16, 16), heads=(2, 2, 2, 2), context_dim=8, groups=4)
XL = UNetConfig(channels=(8, 16, 16), depth=(0, 2, 3), mid_depth=3, heads=(2, 2, 2), context_dim=8, linear_proj=True,
                add_dim=6 + 6 * 2, add_time_dim=2, groups=4)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)[0], dtype=dtype)


def make(kind: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """A frozen module with PyTorch's own initial weights, always the same."""
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return kind(*arguments).requires_grad_(False)


def weights(module: nn.Module) -> list[Tensor]:
    """Copies of all its tensors."""
    return [p.detach().clone() for p in module.state_dict().values()]


def digest(*modules: nn.Module) -> str:
    """Equal only where all tensors are."""
    return hashlib.sha256(b"".join(p.numpy().tobytes() for module in modules for p in weights(module))).hexdigest()


UNETS = {config: make(UNet, config) for config in (NARROW, XL)}


# -------------------------------------------------------------------- outputs of the official codes for large pictures

BASELINES = safe_open(DATA / "baselines.safetensors", framework="pt")
baseline = BASELINES.get_tensor


def official(kind: Callable[[Any], nn.Module], name: str) -> nn.Module:
    """The narrow model behind the official outputs: UNet "sd15.unet", "sd21.unet" or "sdxl.unet", or VAE "vae"."""
    config = json.loads(BASELINES.metadata()[f"{name.removesuffix('.unet')}.config"])
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    model = kind((UNetConfig if kind is UNet else VAEConfig)(**config)).requires_grad_(False)
    model.load_state_dict({key.removeprefix(f"{name}."): baseline(key).float() for key in BASELINES.keys()
                           if key.startswith(f"{name}.")})
    return model


@functools.cache
def official_run(family: str) -> tuple[UNet, Condition, Condition]:
    """That U-Net, its prompt and its negative prompt."""
    said = []
    for text, pooled in (("context", "pooled"), ("negative", "negative_pooled")):
        sizes = [baseline(f"sdxl.{pooled}"), sinusoid(baseline("sdxl.time_ids")[0], 32).flatten()[None]]
        said += [Condition(baseline(f"{family}.{text}"), torch.cat(sizes, dim=1) if family == "sdxl" else None)]
    return official(UNet, f"{family}.unet"), *said


def still_windows(grid: tuple[int, int], window: tuple[int, int], seeds: Tensor) -> Tensor:
    """In place of `freescale.place_windows`: the windows of these outputs don't stray."""
    axes = [torch.arange(0, n - w + w // 2, w // 2).clamp(max=n - w) + w // 8 for n, w in zip(grid, window)]
    return torch.cartesian_prod(*axes).expand(*seeds.shape, -1, -1)


def rms(a: Tensor, b: Tensor) -> float:
    """How far a is from b, relative to b."""
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


# ------------------------------------------------------------------------------------------------------- model folders

TEXT = TextConfig(vocab=8, length=6, width=16, layers=2, heads=2, hidden=32, pad=0)
TWO_LEVELS = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), context_dim=16, groups=4, layers=1)
WORDS = ["<|padding|>", "<|unknown|>", "<|startoftext|>", "a", "red", "blue", "circle", "<|endoftext|>"]


def make_folder(path: Path, sdxl: bool = False, channels: tuple[int, ...] = TWO_LEVELS.channels) -> Path:
    """A model folder with random weights, small enough to sample from in milliseconds."""
    text, unet, more = TEXT, replace(TWO_LEVELS, channels=channels), {}
    if sdxl:
        text = replace(TEXT, output="penultimate")
        more = dict(text_encoder_2=replace(text, projection=12), zero_negative=True)
        unet = replace(TWO_LEVELS, context_dim=32, add_dim=12 + 6 * 4, add_time_dim=4)
    vae = VAEConfig(channels=(8, 8, 8), layers=1, groups=4, scaling=1.0, force_upcast=sdxl)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return write_random(path, ModelConfig("sdxl" if sdxl else "tiny", "epsilon", 32, NoiseSchedule(), unet, vae, text,
                                          **more), tokenizer)


def write_random(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    """A model folder of this configuration with random weights."""
    modules = {"unet": UNet(config.unet), "vae": VAE(config.vae), "text_encoder": TextEncoder(config.text_encoder)}
    if config.text_encoder_2 is not None:
        modules["text_encoder_2"] = TextEncoder(config.text_encoder_2)
    path.mkdir(parents=True)
    generator, = seeded(0)
    for name, module in modules.items():
        state = {k: torch.randn(p.shape, generator=generator) * 0.15 for k, p in module.state_dict().items()}
        save_file(state, path / f"{name}.safetensors")
    tokenizer.save(str(path / "tokenizer.json"))
    write_config(path, config)
    return path


@pytest.fixture(scope="session")
def narrow(tmp_path_factory) -> Path:
    """A model folder that no test may change."""
    return make_folder(tmp_path_factory.mktemp("models") / "narrow")


@pytest.fixture(scope="session")
def narrow_xl(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "narrow-xl", sdxl=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A model folder for the drawn world: random weights, with the words, the size and the CLIP of models/tiny."""
    tiny, vae = read_config(TINY), VAEConfig(channels=(8, 8, 8), layers=1, groups=4, scaling=1.0)
    config = replace(tiny, unet=TWO_LEVELS, vae=vae, text_encoder=replace(
        tiny.text_encoder, width=16, layers=1, heads=2, hidden=32))
    path = write_random(tmp_path_factory.mktemp("models") / "world", config,
                        Tokenizer.from_file(str(TINY / "tokenizer.json")))
    (path / "clip").symlink_to(TINY / "clip")
    return path


# ------------------------------------------------------------------------------------------------------------ commands

@pytest.fixture()
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the main() of a command in this process with these arguments -> exit code, stdout, stderr."""
    def run(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        code = 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err
    return run


@pytest.fixture()
def refused(command, tmp_path) -> Callable[..., str]:
    """Runs convert_weights.py SOURCE OUT -> the one line that it says of bad input; it must leave nothing behind."""
    def run(source: Path, *options: object, out: Path | None = None) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, stdout, stderr = command(convert_weights.main, source, out or tmp_path / "out", *options)
        assert (code, stdout) == (2, "") and stderr.startswith("error: ") and stderr.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return stderr
    return run
