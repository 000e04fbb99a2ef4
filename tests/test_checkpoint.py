"""checkpoint.py: files as people have them become the same tensors, and nothing in them is run."""
import argparse
import collections
import datetime
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randn
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint import read_checkpoint
from command import InputError

STATE = {"a.weight": randn(3, 4), "a.bias": randn(3, seed=1).half(), "b": randn(2, 2, 2, seed=2).bfloat16(),
         "none": torch.zeros(0, 4), "number": torch.tensor(7)}


def write_file(path: Path, state: dict[str, Tensor]) -> None:
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


def write_shards(folder: Path, ending: str, index: str = ".index.json") -> None:
    names, where = list(STATE), {}
    for k, some in enumerate((names[:2], names[2:])):
        write_file(folder / f"shard{k}{ending}", {name: STATE[name] for name in some})
        where |= dict.fromkeys(some, f"shard{k}{ending}")
    (folder / f"model{ending}{index}").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("make, place", [
    (lambda folder: write_file(folder / "x.safetensors", STATE), "x.safetensors"),
    (lambda folder: write_file(folder / "x.pt", STATE), "x.pt"),
    (lambda folder: torch.save({"state_dict": STATE, "epoch": 3}, folder / "x.ckpt"), "x.ckpt"),
    (lambda folder: torch.save(STATE, folder / "x.bin", _use_new_zipfile_serialization=False), "x.bin"),
    (lambda folder: write_file(folder / "diffusion_pytorch_model.fp16.safetensors", STATE), ""),
    (lambda folder: write_shards(folder, ".safetensors"), ""), (lambda folder: write_shards(folder, ".bin"), ""),
    (lambda folder: write_shards(folder, ".safetensors", ".index.fp16.json"), "")])
def test_every_layout_holds_the_same_tensors_bit_for_bit(tmp_path, make, place):
    make(tmp_path)
    found = read_checkpoint(tmp_path / place)
    assert found.tensors.keys() == STATE.keys() and found.others == (["epoch"] if place == "x.ckpt" else [])
    for name, tensor in STATE.items():
        shape, dtype, read = found.tensors[name]
        assert shape == tensor.shape and dtype == read().dtype == tensor.dtype and torch.equal(read(), tensor)


class Evil:
    def __init__(self, function, *arguments):
        self.made_by = function, arguments

    def __reduce__(self):
        return self.made_by


def pretended(name: str) -> type:
    """A class that a pickle names as if it came from this module; the module need not exist."""
    module, _, name = name.rpartition(".")
    made = type(name, (), {"__module__": module, "__init__": lambda self, **state: vars(self).update(state)})
    for depth in range(module.count(".") + 1):
        place = ".".join(module.split(".")[:depth + 1])
        sys.modules.setdefault(place, types.ModuleType(place))
    setattr(sys.modules[module], name, made)
    return made


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("function, name", [
    (open, "open"), (os.system, "system"), (exec, "exec"), (subprocess.call, "call"), (setattr, "setattr"),
    (torch.hub.load, "torch.hub.load")])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, modern, function, name):
    place = tmp_path / "ran"
    arguments = {open: (str(place), "w"), exec: (f"open({str(place)!r}, 'w')",), setattr: ({}, "a", 1)}
    arguments = arguments.get(function, (f"touch {place}",))
    data = {"state_dict": {"a": torch.zeros(2)}, "callbacks": Evil(function, *arguments)}
    torch.save(data, tmp_path / "model.ckpt", _use_new_zipfile_serialization=modern)
    with pytest.raises(InputError, match=rf"holds code \(\S*{name}\), which was not run; get this model as .safetens"):
        read_checkpoint(tmp_path / "model.ckpt")
    assert not place.exists()


@pytest.mark.parametrize("modern", [True, False])
def test_what_trainers_leave_in_a_pickle_is_read_without_running_it(tmp_path, modern):
    """NumPy's numbers, Lightning's callbacks (by class and by object) and settings, as files of SD 1.x hold them."""
    callback = pretended("pytorch_lightning.callbacks.made_up.ModelCheckpoint")
    data = {"state_dict": {"a": torch.ones(2)}, "callbacks": {callback: {"best": np.float64(1)}, 1: callback(n=1)},
            "global_step": np.int64(7), "array": np.arange(3), "hyper_parameters": argparse.Namespace(lr=1e-4),
            "counts": collections.defaultdict(int, a=1), "last": collections.deque([1, 2]),
            "dates": datetime.timedelta(1)}
    torch.save(data, tmp_path / "model.ckpt", _use_new_zipfile_serialization=modern)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning.callbacks.made_up")]:
        del sys.modules[name]                                                # nobody who reads it has it
    found = read_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(found.tensors["a"].read(), torch.ones(2)) and set(found.others) == data.keys() - {"state_dict"}


@pytest.mark.parametrize("name, content, words", [
    ("model.safetensors", b"", "safetensors"), ("model.safetensors", b"x" * 100, "safetensors"),
    ("model.ckpt", b"hello, this is no pickle", "PyTorch"), ("model.ckpt", b"", "PyTorch"),
    ("model.gguf", b"GGUF", "neither")])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_file_cut_short_is_refused(tmp_path, name):
    write_file(tmp_path / name, {"a": randn(100, 100)})
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
    with pytest.raises(InputError, match="complete"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("data", [[1, 2], {"state_dict": 3}, {"weights": [torch.zeros(2)]}, torch.zeros(3)])
def test_a_pickle_without_named_tensors_is_refused(tmp_path, data):
    torch.save(data, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match="no tensors"):
        read_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_recognised(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "ViT-L-14.pt")
    with pytest.raises(InputError, match="TorchScript"):
        read_checkpoint(tmp_path / "ViT-L-14.pt")


def test_what_is_missing_is_named(tmp_path):
    write_shards(tmp_path, ".safetensors")
    (tmp_path / "shard1.safetensors").unlink()
    with pytest.raises(InputError, match="lists shard1.safetensors, which isn't there"):
        read_checkpoint(tmp_path)
    (tmp_path / "model").mkdir()
    write_file(tmp_path / "secret.safetensors", STATE)
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "..", "in/../../secret.safetensors"):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match="outside the folder"):
            read_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="can't be read"):
        read_checkpoint(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for place, words in (("empty", "has no weights"), ("nowhere", "no file or folder")):
        with pytest.raises(InputError, match=words):
            read_checkpoint(tmp_path / place)
