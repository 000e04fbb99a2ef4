"""`--compile openvino`: the graphs that torch.compile makes run in OpenVINO, with the techniques inside."""
from pathlib import Path

import pytest
import torch
from conftest import make, randn, seeded

import openvino_backend
from cache import DeepCache, FasterDiffusion, TGate
from command import InputError
from folder import TINY
from freescale import FreeScale
from freeu import FreeU
from maskunet import DynamicMasks, Masks
from openvino_backend import backend
from sampler import Condition, generate, plan
from stable_diffusion import StableDiffusion
from txt2img import parse_arguments
from unet import UNet, UNetConfig

SMALL = UNetConfig(channels=(8,), layers=1, depth=(1,), heads=(2,), context_dim=8, groups=4)
needs_openvino = pytest.mark.skipif(openvino_backend.openvino is None, reason="needs requirements-openvino.txt")


def sample(backend=None, dtype: torch.dtype = torch.float32, masks: bool = False, steps: int = 2,
           shift: float = 0.0, **techniques) -> torch.Tensor:
    """Latents of one picture by a U-Net of one level. shift: of a bias of its own."""
    unet = make(UNet, SMALL).to(dtype)
    unet.conv_out.bias.add_(shift)
    if masks:
        techniques["masks"] = Masks(make(DynamicMasks, unet), "sample")
    if backend is not None:
        torch.compiler.reset()
        unet.compile(backend=backend, fullgraph=True, dynamic=False)
    text, no_text = (Condition(randn(1, 5, 8, seed=seed).to(dtype)) for seed in (1, 2))
    *_, (_, latents) = generate(unet, randn(1, 4, 16, 16), text, no_text, plan("ddim", steps), 3.0,
                                randn(1, 4, 16, 16, seed=3), 1.0, seeded(0), **techniques)
    return latents


def difference(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out - want).abs().max() / want.abs().max())


@needs_openvino
@pytest.mark.parametrize("techniques", [
    {"masks": True, "freescale": FreeScale(((64, 64), (128, 128)), native=8), "freeu": FreeU(1.2, 1.1, 0.9, 0.8)},
    {"cache": DeepCache(2), "tgate": TGate(2), "steps": 3},
    {"cache": FasterDiffusion((0, 1), parallel=True), "steps": 4}], ids=["masks", "caches", "halves"])
@pytest.mark.filterwarnings("error:OpenVINO can't run")
def test_graphs_with_techniques_run_in_openvino_with_equal_results(techniques):
    assert difference(sample(backend(), **techniques), sample(**techniques)) < 2e-6


@needs_openvino
def test_bfloat16_is_as_near_as_pytorchs_own():
    exact = sample()
    own = difference(sample(dtype=torch.bfloat16), exact)
    assert difference(sample(backend("bf16"), torch.bfloat16), exact) < 2 * own


@needs_openvino
def test_a_compiled_graph_is_found_again_unless_a_weight_or_the_graph_differs(tmp_path, monkeypatch):
    first = sample(backend(cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    compiled = []
    monkeypatch.setattr(openvino_backend.openvino, "convert_model",
                        lambda graph: compiled.append(graph) or 1 / 0)
    assert torch.equal(sample(backend(cache=tmp_path)), first) and not compiled
    with pytest.warns(UserWarning, match="OpenVINO can't run a graph"):
        other = sample(backend(cache=tmp_path), cache=DeepCache(2))
    assert compiled and not torch.equal(other, first)
    with pytest.warns(UserWarning, match="OpenVINO can't run a graph"):
        sample(backend(cache=tmp_path), shift=1.0)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=f"{file.name} can't be read and is made again"):
        sample(backend(cache=tmp_path))


@needs_openvino
def test_a_folder_that_cannot_be_made_is_named_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        backend(cache=tmp_path / "file" / "kept")


@needs_openvino
def test_what_openvino_cannot_run_is_run_by_pytorch_with_a_warning(monkeypatch):
    monkeypatch.setattr(openvino_backend.openvino, "convert_model", lambda graph: 1 / 0)
    with pytest.warns(UserWarning, match="OpenVINO can't run a graph of this network, PyTorch does: division by zero"):
        assert torch.equal(sample(backend()), sample())


def test_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(openvino_backend, "openvino", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-openvino.txt"):
        backend()


def test_the_requirement_is_of_its_own():
    here = Path(__file__).resolve().parent.parent
    assert "openvino" in (here / "requirements-openvino.txt").read_text()
    assert "openvino" not in (here / "requirements.txt").read_text()


def test_the_command_takes_the_backend_and_refuses_its_folder_alone():
    args = parse_arguments(["a circle", "--compile", "openvino", "--compile-cache", "kept"])
    assert (args.compile, args.compile_cache) == ("openvino", Path("kept"))
    assert parse_arguments(["--compile", "a circle", "--n", "2"]).compile == "torch"
    assert parse_arguments(["a circle", "--compile", "--grid"]).compile == "torch"
    with pytest.raises(InputError, match="--compile-cache does nothing without --compile openvino"):
        parse_arguments(["a circle", "--compile-cache", "kept"])


@needs_openvino
def test_a_loaded_model_is_compiled_with_the_precision_of_its_dtype(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(openvino_backend, "backend", lambda *how: asked.append(how) or (lambda graph, inputs: graph))
    for dtype in (torch.float32, torch.bfloat16):
        StableDiffusion.load(TINY, dtype=dtype, compiled="openvino", compile_cache=tmp_path)
    assert asked == [("f32", tmp_path), ("bf16", tmp_path)]
