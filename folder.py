"""The model folder: `convert_weights.py` and `lab/train_tiny.py` write it, `txt2img.py` loads it.

config.json                 family, prediction, schedule, size, the configs of all components, digests of the files
unet.safetensors  vae.safetensors  text_encoder.safetensors  (SDXL: text_encoder_2.safetensors)  tokenizer.json

Start at `read_config` and `load_weights`. Reading is strict: anything missing, unknown, out of range or of a wrong
shape raises InputError. `check_digests` finds damaged files. The same functions read the folder of a reward model
(`reward.py`).
"""
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoint import check_names, nearest, open_safetensors
from clip_text import TextConfig, Tokenizer
from command import InputError, replacing
from sampler import SAMPLERS, NoiseSchedule
from unet import UNetConfig
from vae import VAEConfig

FAMILIES = ("sd15", "sd21", "sdxl", "tiny")
TINY = Path(__file__).resolve().parent / "models" / "tiny"      # the embedded model

# The legal values of config fields, by the field's name: words, or the range of a number (in a list, of each number).
WORDS = {"family": FAMILIES, "prediction": ("epsilon", "v"), "betas": ("scaled_linear", "linear"),
         "spacing": (None, "leading", "linspace", "trailing"), "activation": ("quick_gelu", "gelu"),
         "output": ("final", "penultimate"), "sampler": (None, *SAMPLERS)}
RANGES = {
    "train_steps": (1, 100_000), "steps_offset": (0, 999), "beta_start": (1e-9, 0.999), "beta_end": (1e-9, 0.999),
    **dict.fromkeys(("size", "width", "text_width", "hidden", "text_hidden", "channels", "context_dim", "projection",
                     "add_time_dim", "head"), (1, 65536)),
    **dict.fromkeys(("in_channels", "latent_channels", "layers", "text_layers"), (1, 64)),
    **dict.fromkeys(("heads", "text_heads", "groups", "patch"), (1, 1024)), "add_dim": (0, 65536),
    "depth": (0, 32), "mid_depth": (0, 32), "vocab": (3, 1 << 24), "pad": (0, 1 << 24), "length": (3, 65536),
    "positions": (1, 65536), "scaling": (1e-6, 1e6), "mean": (-1e3, 1e3), "std": (1e-6, 1e3),
    "score_mean": (-1e6, 1e6), "score_std": (1e-6, 1e6), "cfg_scale": (0, 1000),
}
LEVELS = 8                                                      # the most entries that a list may have


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
    sampler: str | None = None                   # used if none is given; None: "ddim"
    cfg_scale: float | None = None               # likewise; None: 7.5
    digests: dict[str, str] = field(default_factory=dict, compare=False)       # by file, see `check_digests`

    @property
    def parts(self) -> dict[str, Any]:
        """The configurations of the components that this model has."""
        parts = {name: getattr(self, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
        return {name: config for name, config in parts.items() if config is not None}


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
    data = read_json(path)
    if not isinstance(data, dict) or "family" not in data:
        raise InputError(f"{path} doesn't describe a converted model; {convert}")
    parts = {"schedule": NoiseSchedule, "unet": UNetConfig, "vae": VAEConfig,
             "text_encoder": TextConfig, "text_encoder_2": TextConfig}
    for name, kind in parts.items():
        if name in data and (name, data[name]) != ("text_encoder_2", None):
            data[name] = from_json(kind, data[name], f"{path}, {name}")
    config = from_json(ModelConfig, data, str(path))
    if config.zero_negative and config.text_encoder_2 is None:
        raise InputError(f"{path}: zero_negative is True, but only SDXL's is; convert the model again")
    return config


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); convert the model again") from None


def from_json(kind: type, data: Any, where: str) -> Any:
    """A config dataclass from its JSON object. InputError for unknown or missing entries and for wrong types."""
    names = [entry.name for entry in fields(kind)]
    if not isinstance(data, dict):
        raise InputError(f"{where} is not a JSON object; convert the model again")
    for name in data:
        if name not in names:
            raise InputError(f"{where} has an unknown entry {name!r}{nearest(name, names)}")
    try:
        config = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})
    except TypeError as error:
        raise InputError(f"{where} is incomplete ({error}); convert the model again") from None
    return checked(config, where)


def checked(config: Any, where: str, remedy: str = "convert the model again") -> Any:
    """Returns the config; InputError if a field has a wrong type or an illegal value. where: the file, for messages"""
    for entry in fields(config):
        name, value = entry.name, getattr(config, entry.name)
        if not is_of(value, entry.type):
            raise InputError(f"{where}: {name} can't be {short(value)}; {remedy}")
        if name in WORDS and value not in WORDS[name]:
            raise InputError(f"{where}: {name} is {short(value)}, not one of {', '.join(map(str, WORDS[name]))}; "
                             f"{remedy}")
        numbers = value if isinstance(value, tuple) else (value,)
        if name in RANGES and value is not None:
            low, high = RANGES[name]
            if not all(low <= number <= high for number in numbers) or not 1 <= len(numbers) <= LEVELS:
                several = f", 1 to {LEVELS} of them" if isinstance(value, tuple) else ""
                raise InputError(f"{where}: {name} is {short(value)}, not {low:g} to {high:g}{several}; {remedy}")
    if isinstance(config, TextConfig) and config.pad >= config.vocab:
        raise InputError(f"{where}: pad is {config.pad}, but the vocabulary ends at {config.vocab - 1}; {remedy}")
    return config


def short(value: Any) -> str:
    """A value for a message: long ones are cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_of(value: Any, kind: Any) -> bool:
    """Has a value the type of a config field, such as int, float (an int is one too), tuple[int, ...] or str | None?"""
    if get_origin(kind) is UnionType:
        return any(is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(is_of(entry, get_args(kind)[1]) for entry in value.values())
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_of(entry, get_args(kind)[0]) for entry in value)
    if isinstance(value, bool) or kind is bool:                        # to Python, true is an int
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def write_config(folder: Path, config: Any) -> None:
    """Write config.json, as the folder's last file: it holds the digests of the others.

    config: a `ModelConfig`, which `read_config` reads back, or a dict of configs.
    """
    data = json.loads(json.dumps(config, default=asdict))
    data["digests"] = digests(folder, data)
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def digests(folder: Path, data: dict[str, Any]) -> dict[str, str]:
    """SHA-256 by file, of the weights, the tokenizer and `data`, the entries of config.json."""
    def of_json(entries: Any) -> str:                                  # spaces and line ends make no difference
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    settings = {name: entry for name, entry in data.items() if name != "digests"}
    found = {"config.json": of_json(settings)}
    if (folder / "tokenizer.json").is_file():
        found["tokenizer.json"] = of_json(read_json(folder / "tokenizer.json"))
    for path in [folder / f"{part}.safetensors" for part in settings]:
        if path.is_file():
            contents = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    contents.update(block)
            found[path.name] = contents.hexdigest()
    return found


def check_digests(folder: Path) -> None:
    """InputError if a file of a model, of the CLIP in its folder, or of a reward differs from its digest."""
    for place in [folder, folder / "clip"] if (folder / "clip").is_dir() else [folder]:
        data = read_json(place / "config.json")
        stored = data.get("digests") if isinstance(data, dict) else None
        if not isinstance(stored, dict):
            raise InputError(f"{place} has no digests, which older versions did not write; convert the model again")
        now = digests(place, data)
        for name in sorted(stored.keys() | now.keys()):
            if stored.get(name) != now.get(name):
                raise InputError(f"{place / name} is not the file that was written with this model: it is damaged or "
                                 "was changed; convert the model again")


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

    Skipping it is faster: on the meta device, the initialisation of an embedding imports torch.compile for a second.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


def build(kind: Callable[[Any], nn.Module], config: Any, remedy: str = "convert the model again") -> nn.Module:
    """A module on the meta device: it has only shapes, until `load_weights` gives it weights."""
    try:
        with torch.device("meta"), NoStart():
            return kind(config)
    except (LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"no {kind.__name__} can be built from its configuration ({error}); {remedy}") from None


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


def load_tokenizer(path: Path, vocab: int, kind: Callable[[Path], Any] = Tokenizer, whose: str = "a CLIP") -> Any:
    """tokenizer.json, checked against the size of the text encoder's vocabulary."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; convert the model again")
    try:
        tokenizer = kind(path)
    except Exception as error:                   # the tokenizers library raises nothing narrower
        raise InputError(f"{path} is not {whose} tokenizer ({error}); convert the model again") from None
    size = max(tokenizer.end + 1, tokenizer.model.get_vocab_size())
    if size > vocab:
        raise InputError(f"{path} has {size} tokens, but the text encoder knows {vocab}; convert the model again with "
                         "the tokenizer that belongs to it")
    return tokenizer
