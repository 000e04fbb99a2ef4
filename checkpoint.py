"""Reads common kinds of weight files as tensors by name. No code in a file is run; a tensor is read only when used.

Start at `read_checkpoint`: a .safetensors file, a pickle (.ckpt, .pt, .pth, .bin), or the folder of one component with
its file or its shards. `open_safetensors` and `check_names` are for the strict reading of this project's own files.
Checked against files of diffusers 0.42.1, transformers 5.23 and open_clip 3.3.0.
"""
import contextlib
import difflib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from command import InputError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}      # as safetensors files call them
DTYPES = FLOATS | {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass
class Checkpoint:
    """The tensors of a file or folder by name, and the names of all entries that are not tensors."""
    path: Path
    tensors: dict[str, Stored]
    others: list[str]


def read_checkpoint(path: Path) -> Checkpoint:
    """The names, shapes and dtypes of all tensors. InputError if they can't be read safely and completely."""
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}; give a Hugging Face folder or a .safetensors file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return read_pickle(path)
    raise InputError(f"{path} is neither a folder nor a .safetensors or .ckpt file; give one of these")


def read_folder(folder: Path) -> Checkpoint:
    """One component of a Hugging Face folder, from its one file or all its shards."""
    return joined(folder, [("", read_checkpoint(file)) for file in weight_files(folder)])


def joined(path: Path, parts: list[tuple[str, Checkpoint]]) -> Checkpoint:
    """Merge checkpoints into one. Each part is (a prefix for its names, the checkpoint)."""
    return Checkpoint(path, {prefix + name: tensor for prefix, part in parts for name, tensor in part.tensors.items()},
                      [prefix + name for prefix, part in parts for name in part.others])


def read_safetensors(path: Path) -> Checkpoint:
    with open_safetensors(path):                     # an InputError unless it is complete and well-formed
        pass
    # The library would map the file, and the pages read from a map count as this process's memory: read it ourselves.
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)

    def read(begin: int, end: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
        data = bytearray(end - begin)
        with path.open("rb") as file:
            file.seek(8 + size + begin)
            file.readinto(data)
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)

    tensors = {}
    for name, entry in header.items():
        shape, dtype = entry["shape"], DTYPES.get(entry["dtype"], torch.uint8)
        tensors[name] = Stored(tuple(shape), dtype, partial(read, *entry["data_offsets"], dtype, shape))
    return Checkpoint(path, tensors, [])


# Names that trainers put into pickles, such as Lightning's callbacks and NumPy's numbers: `Inert` takes their place.
HARMLESS = re.compile(r"(numpy|(pytorch_)?lightning\w*|omegaconf|torchmetrics|collections|datetime|pathlib|typing)\..+|"
                      r"argparse\.Namespace|builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|"
                      r"object|range|set|slice|str|tuple)")


class Inert:
    """Takes the place of a class or function that a pickle names: it accepts everything and does nothing."""

    def __new__(cls, *_: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


CONTAINERS = {"collections.defaultdict": lambda *_: {}, "collections.deque": lambda *_: []}    # the pickle fills them


def unpickle(path: Path) -> Any:
    """torch.load with weights_only=True, where `Inert` takes the place of HARMLESS names; others are refused."""
    names = []
    while True:
        try:
            with torch.serialization.safe_globals([(CONTAINERS.get(name, Inert), name) for name in names]):
                return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"(?i)unsupported \w+:? (?:GLOBAL )?(\S+)", str(error))
            if named is None or "TorchScript" in str(error):
                raise
            name = named[1] if "." in named[1] else f"builtins.{named[1]}"
            if not HARMLESS.fullmatch(name) or name in names:
                raise InputError(f"{path} holds code ({name}), which was not run; get this model as "
                                 ".safetensors") from None
            names.append(name)


def read_pickle(path: Path) -> Checkpoint:
    """A file of torch.save. No code in it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # torch.load warns about TorchScript before it fails: see below
            data = unpickle(path)
    except InputError:
        raise
    except Exception as error:                       # a damaged pickle can raise anything
        if "TorchScript" in str(error):              # the format of OpenAI's CLIP files
            raise InputError(f"{path} is a TorchScript program, not a weights file; get this model as a Hugging "
                             "Face folder") from None
        raise InputError(f"{path} is not a complete PyTorch weights file ({type(error).__name__}); download it again, "
                         "or get this model as .safetensors") from None
    named = data.get("state_dict", data) if isinstance(data, dict) else {}
    named = named if isinstance(named, dict) else {}
    tensors = {name: Stored(tuple(tensor.shape), tensor.dtype, tensor.detach)
               for name, tensor in named.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no tensors; give a model's checkpoint")
    outside = [name for name in data if name != "state_dict"] if named is not data else []
    return Checkpoint(path, tensors, [str(name) for name in [*outside, *named] if name not in tensors])


def weight_files(folder: Path) -> list[Path]:
    """One component's file, or its shards: safetensors before pickles, full precision before fp16."""
    for ending in (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json",
                   ".bin", ".bin.index.json", ".fp16.bin"):
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            path = folder / (stem + ending)
            if path.is_file() and path.suffix != ".json":
                return [path]
            if path.is_file():
                with json_object(path) as index:
                    shards = [folder / name for name in sorted(set(index["weight_map"].values()))]
                for shard in shards:
                    if shard.parent != folder or shard.name == "..":
                        raise InputError(f"{path} lists {shard}, which is outside the folder; download it again")
                    if not shard.is_file():
                        raise InputError(f"{path} lists {shard.name}, which isn't there; download it too")
                return shards
    raise InputError(f"{folder} has no weights (diffusion_pytorch_model or model, as .safetensors, "
                     f".fp16.safetensors or .bin); download them")


@contextlib.contextmanager
def json_object(path: Path) -> Iterator[dict[str, Any]]:
    """Gives a JSON file's contents to the block; missing entries and entries of a wrong kind become an InputError."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no {path}; get the complete Hugging Face folder") from None
    except KeyError as error:
        raise InputError(f"{path} lacks the entry {error}; download it again") from None
    except (AttributeError, IndexError, OSError, RecursionError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} can't be read as a config file ({error}); download it again") from None


@contextlib.contextmanager
def open_safetensors(path: Path, remedy: str = "convert the model again") -> Iterator[Any]:
    """Opens a safetensors file, memory-mapped; InputError if it is missing, truncated or of another format."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; {remedy}")
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error}); download or convert it again") from None
    with file:
        yield file


def check_names(have: list[str], wanted: list[str], where: str) -> None:
    """InputError for unknown or missing names. It shows the first; for an unknown one, also the most similar known."""
    missing, unknown = sorted(set(wanted) - set(have)), sorted(set(have) - set(wanted))
    if unknown:
        raise InputError(f"{where} has {len(unknown)} tensors that this model doesn't know, the first is "
                         f"{unknown[0]}{nearest(unknown[0], missing or wanted)}")
    if missing:
        raise InputError(f"{where} lacks {len(missing)} tensors of this model, the first is {missing[0]}")


def nearest(name: str, known: list[str]) -> str:
    """The most similar known name, as a hint to append to a message about an unknown name."""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""
