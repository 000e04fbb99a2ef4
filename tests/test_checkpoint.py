"""checkpoint.py: files as people have them become the same tensors, and nothing in them is run."""
import json
from pathlib import Path

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


def write_shards(folder: Path, ending: str) -> None:
    names, where = list(STATE), {}
    for k, some in enumerate((names[:2], names[2:])):
        write_file(folder / f"shard{k}{ending}", {name: STATE[name] for name in some})
        where |= dict.fromkeys(some, f"shard{k}{ending}")
    (folder / f"model{ending}.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("make, place", [
    (lambda folder: write_file(folder / "x.safetensors", STATE), "x.safetensors"),
    (lambda folder: write_file(folder / "x.pt", STATE), "x.pt"),
    (lambda folder: torch.save({"state_dict": STATE, "epoch": 3}, folder / "x.ckpt"), "x.ckpt"),
    (lambda folder: torch.save(STATE, folder / "x.bin", _use_new_zipfile_serialization=False), "x.bin"),
    (lambda folder: write_file(folder / "diffusion_pytorch_model.fp16.safetensors", STATE), ""),
    (lambda folder: write_shards(folder, ".safetensors"), ""), (lambda folder: write_shards(folder, ".bin"), "")])
def test_every_layout_holds_the_same_tensors_bit_for_bit(tmp_path, make, place):
    make(tmp_path)
    found = read_checkpoint(tmp_path / place)
    assert found.tensors.keys() == STATE.keys() and found.others == (["epoch"] if place == "x.ckpt" else [])
    for name, tensor in STATE.items():
        shape, dtype, read = found.tensors[name]
        assert shape == tensor.shape and dtype == read().dtype == tensor.dtype and torch.equal(read(), tensor)


class Evil:
    def __reduce__(self):
        return open, ("/".join([str(Evil.place), "ran"]), "w")


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_that_holds_more_than_weights_is_refused_unrun(tmp_path, modern):
    Evil.place = tmp_path
    data = {"state_dict": {"a": torch.zeros(2)}, "callbacks": Evil()}
    torch.save(data, tmp_path / "model.ckpt", _use_new_zipfile_serialization=modern)
    with pytest.raises(InputError, match="more than tensors .*open.* get this model as .safetensors"):
        read_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "ran").exists()


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
    (tmp_path / "empty").mkdir()
    for place, words in (("empty", "has no weights"), ("nowhere", "no file or folder")):
        with pytest.raises(InputError, match=words):
            read_checkpoint(tmp_path / place)
