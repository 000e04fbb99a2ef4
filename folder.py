"""The model folder: `convert_weights.py` and `lab/train_tiny.py` write it, `txt2img.py` loads it.

config.json                 family, prediction, schedule, native size, and the config of every component
unet.safetensors  vae.safetensors  text_encoder.safetensors  (SDXL: text_encoder_2.safetensors)  tokenizer.json

Start at `read_config` and `load_weights`. Reading is strict: anything missing, unknown or of a wrong shape raises
InputError. The same functions read the folder of a reward model (`reward.py`).
"""
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoint import check_names, nearest, open_safetensors
from clip_text import TextConfig, Tokenizer
from command import InputError, replacing
from sampler import NoiseSchedule
from unet import UNetConfig
from vae import VAEConfig

FAMILIES = ("sd15", "sd21", "sdxl", "tiny")
TINY = Path(__file__).resolve().parent / "models" / "tiny"      # the embedded model


@dataclass(frozen=True)
class ModelConfig:
    """config.json, as data."""
    family: str                                  # one of FAMILIES
    prediction: str                              # what the U-Net predicts: "epsilon" or "v"
    size: int                                    # native width and height in pixels
    schedule: NoiseSchedule
    unet: UNetConfig
    vae: VAEConfig
    text_encoder: TextConfig
    text_encoder_2: TextConfig | None = None     # SDXL only
    zero_negative: bool = False                  # SDXL: without a negative prompt (None), use zeros instead of ""


def read_config(folder: Path) -> ModelConfig:
    """Read config.json of a model folder. InputError if it is missing, of another kind or has wrong entries."""
    path = folder / "config.json"
    convert = f"convert it first: python convert_weights.py {folder} OUT_DIR"
    if folder.is_file():
        raise InputError(f"{folder} is a file, not a converted model folder; {convert}")
    if not folder.is_dir():
        raise InputError(f"there is no model folder {folder}; make one: python convert_weights.py SOURCE {folder}")
    if not path.is_file():
        raise InputError(f"{folder} is not a converted model folder (it has no config.json); {convert}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); convert the model again") from None
    if not isinstance(data, dict) or "family" not in data:
        raise InputError(f"{path} doesn't describe a converted model; {convert}")
    parts = {"schedule": NoiseSchedule, "unet": UNetConfig, "vae": VAEConfig,
             "text_encoder": TextConfig, "text_encoder_2": TextConfig}
    for name, kind in parts.items():
        if name in data and (name, data[name]) != ("text_encoder_2", None):
            data[name] = from_json(kind, data[name], f"{path}, {name}")
    config = from_json(ModelConfig, data, str(path))
    texts = [text for text in (config.text_encoder, config.text_encoder_2) if text is not None]
    for name, part, values in (
            ("family", config, FAMILIES), ("prediction", config, ("epsilon", "v")),
            ("spacing", config.schedule, (None, "leading", "linspace", "trailing")),
            *(("activation", text, ("quick_gelu", "gelu")) for text in texts),
            *(("output", text, ("final", "penultimate")) for text in texts),
            ("zero_negative", config, (False, config.text_encoder_2 is not None))):
        if getattr(part, name) not in values:
            raise InputError(f"{path}: {name} is {getattr(part, name)!r}, not one of {', '.join(map(str, values))}")
    return config


def from_json(kind: type, data: Any, where: str) -> Any:
    """A config dataclass from its JSON object. InputError for unknown or missing entries and for wrong types."""
    names, types = [field.name for field in fields(kind)], {field.name: field.type for field in fields(kind)}
    if not isinstance(data, dict):
        raise InputError(f"{where} is not a JSON object; convert the model again")
    for name in data:
        if name not in names:
            raise InputError(f"{where} has an unknown entry {name!r}{nearest(name, names)}")
    data = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    for name, value in data.items():
        if not is_of(value, types[name]):
            raise InputError(f"{where}: {name} can't be {value!r}; convert the model again")
    try:
        return kind(**data)
    except TypeError as error:
        raise InputError(f"{where} is incomplete ({error}); convert the model again") from None


def is_of(value: Any, kind: Any) -> bool:
    """Does a value have a config field's type: int, float (ints count too), tuple[int, ...], str | None or the like?"""
    if get_origin(kind) is UnionType:
        return any(is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_of(entry, get_args(kind)[0]) for entry in value)
    if isinstance(value, bool) or kind is bool:                        # to Python, true is an int
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def write_config(folder: Path, config: Any) -> None:
    """Write config.json. config: a `ModelConfig`, which `read_config` reads back, or a dict of configs."""
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(config, default=asdict, indent=1) + "\n", encoding="utf-8")


def check_size(height: int, width: int) -> tuple[int, int]:
    """InputError for a side above 65536, or not a positive multiple of 8; the message names the nearest multiples."""
    for name, side in (("height", height), ("width", width)):
        if side > 65536:
            raise InputError(f"{name} {side} is beyond all memory; the largest is 65536")
        if side <= 0 or side % 8:
            near = max(side // 8 * 8, 8)
            raise InputError(f"{name} {side} is not a multiple of 8; the nearest are {near} and {near + 8}")
    return height, width


class NoStart(TorchFunctionMode):
    """Inside the block, modules skip their random initialisation: `load_weights` replaces the weights anyway.

    This is faster. Initialising an embedding on the meta device would even import torch.compile, which takes a second.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


def build(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """A module on the meta device: it has only shapes, until `load_weights` gives it weights."""
    try:
        with torch.device("meta"), NoStart():
            return kind(config)
    except (LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"no {kind.__name__} can be built from config.json ({error}); "
                         "convert the model again") from None


def load_weights(module: nn.Module, path: Path, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Give a module made on the meta device the tensors of a safetensors file: every name and shape must match.

    Tensors are read one by one from the mapped file, so memory never holds two copies of the weights. Except in
    float32, convolutions get PyTorch's channels_last layout, which is faster there.
    """
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state = {}
    with open_safetensors(path) as file:
        check_names(list(file.keys()), list(wanted), str(path))
        for name in wanted:
            tensor = file.get_tensor(name)
            if tensor.shape != wanted[name]:
                raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, but the model's config.json says "
                                 f"{tuple(wanted[name])}; convert the model again")
            layout = torch.channels_last if tensor.dim() == 4 and dtype != torch.float32 else torch.contiguous_format
            state[name] = tensor.to(device=device, dtype=dtype).contiguous(memory_format=layout)   # faster in two steps
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def load_tokenizer(path: Path, vocab: int) -> Tokenizer:
    """tokenizer.json, checked against the size of the text encoder's vocabulary."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; convert the model again")
    try:
        tokenizer = Tokenizer(path)
    except Exception as error:                   # the tokenizers library raises nothing narrower
        raise InputError(f"{path} is not a CLIP tokenizer ({error}); convert the model again") from None
    if tokenizer.end >= vocab:
        raise InputError(f"{path} has {tokenizer.end + 1} tokens, but the text encoder knows {vocab}; convert the "
                         "model again with the tokenizer that belongs to it")
    return tokenizer
