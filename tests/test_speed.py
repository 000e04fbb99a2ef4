"""benchmarks/speed.py: what it reports and refuses; and what speed rests on: batches, and graphs that don't break.

No time is asserted here.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import make, randn, seeded, write_random
from tokenizers import Tokenizer

from benchmarks import speed
from benchmarks.speed import Row, chosen, drift, error, insert, other_rows, reached, rows_of, table, take_turns
from cache import DeepCache, FasterDiffusion, TGate
from command import InputError, run_command
from folder import read_config
from freescale import FreeScale
from freeu import FreeU
from maskunet import DynamicMasks, Masks, RandomMasks, StaticMasks
from sampler import Condition, generate, plan
from stable_diffusion import StableDiffusion
from unet import WIDE, UNet, UNetConfig, project

NUMBERS = {"row": "unet tiny 64 float32 guided eager", "seconds": 0.02, "base seconds": 0.03, "ratio": 1.5,
           "least": 1.4, "greatest": 1.6, "cpu ratio": 1.45, "error": 1e-7, "base error": 0.0, "flops": 5e9,
           "bytes": 1e9, "of peak": 0.5, "base of peak": 0.25, "peak": {"peak": 4e8}, "base peak": {"peak": 6e8}}
FREEU = FreeU(1.3, 1.4, 0.9, 0.2, rule="level")
SCALE = FreeScale(((32, 32), (64, 64)), native=4, dilate=0.0)
SMALL = UNetConfig(channels=(8,), layers=1, depth=(1,), mid_depth=0, heads=(2,), context_dim=8, groups=4)


def test_every_row_has_a_name_of_its_own_and_words_choose_rows():
    for device in ("cpu", "cuda"):
        names = [row.name for row in rows_of(device)]
        assert len(set(names)) == len(names) > 50
        assert chosen(rows_of(device), list(speed.TARGETS))
    assert [row.name for row in chosen(rows_of("cpu"), ["decode tiny bfloat16"])] == ["decode tiny 64 bfloat16"]
    with pytest.raises(InputError, match="no row's name has all words of 'decode sd3'"):
        chosen(rows_of("cpu"), ["unet", "decode sd3"])


def test_drift_is_the_farthest_rounds_distance_from_the_median():
    assert drift([1.0, 1.0, 1.1, 0.95, 1.0]) == pytest.approx(0.1)
    assert drift([1.0, 1.0, 1.0, 1.0, 0.8]) == pytest.approx(0.2)


def test_turns_alternate_and_every_round_has_both(monkeypatch):
    said, ticks = [], iter(range(10 ** 6))
    monkeypatch.setattr(speed, "clock", lambda: (1e-3 * next(ticks), 0.0))     # so that every round has 50 calls
    seconds, first = take_turns([lambda: said.append("a"), lambda: said.append("b")], 3, "cpu")
    assert said[:4] == ["a", "b", "a", "b"]                            # two warm-ups
    rounds = [said[4 + 100 * k:4 + 100 * (k + 1)] for k in range(3)]
    assert [r[0] + r[-1] for r in rounds] == ["ab", "ba", "ab"] and len(said) == 304
    assert [len(s) for s in seconds] == [3, 3] and len(first) == 2


def test_errors_are_relative_to_the_largest_value():
    assert error(torch.tensor([1.0, 3.9]), torch.tensor([1.0, 4.0])) == pytest.approx(0.025)


def measure(monkeypatch, tmp_path, *tries: list[float]) -> dict:
    """`measure_row` where diffusers' rounds took these seconds, the first try's, the second's, ..., and ours one each.

    The first calls of a try took as many seconds as tries were left.
    """
    left = [*tries, *[tries[-1]] * (speed.TRIES - len(tries))]

    def turns(calls, rounds, device):
        seconds = left.pop(0)
        return [[(1.0, 1.0)] * len(seconds), [(s, s) for s in seconds]], [(float(len(left)), 1.0)] * 2
    side = lambda *_: ((lambda: torch.ones(1)), [])
    monkeypatch.setattr(speed, "make_folders", lambda family, work: (tmp_path, tmp_path))
    monkeypatch.setattr(speed, "our_side", side)
    monkeypatch.setattr(speed, "their_side", side)
    monkeypatch.setattr(speed, "take_turns", turns)
    args = argparse.Namespace(work=tmp_path, device="cpu", rounds=len(tries[0]), drift=0.15, memory=False)
    return speed.measure_row(Row("decode", "tiny", 64), args, {"float32": 1e12, "bandwidth": 1e10})


def test_a_row_is_refused_without_a_ratio_when_diffusers_own_seconds_drift(monkeypatch, tmp_path):
    result = measure(monkeypatch, tmp_path, [2.0, 2.0, 2.0, 2.0, 2.4])
    assert result["refused"] == "diffusers' own seconds drift by 20 %"
    assert not {"seconds", "ratio", "of peak"} & set(result)
    assert "refused: diffusers' own seconds drift by 20 %" in table([result])


def test_a_steady_row_reports_the_median_of_the_rounds_own_ratios(monkeypatch, tmp_path):
    result = measure(monkeypatch, tmp_path, [2.0, 2.1, 2.2, 1.9, 2.0])
    assert "refused" not in result and (result["ratio"], result["least"], result["greatest"]) == (2.0, 1.9, 2.2)
    assert result["flops"] > 1e8 and result["of peak"] == pytest.approx(max(
        result["flops"] / 1e12, result["bytes"] / 1e10))


def test_a_row_measured_again_keeps_the_first_call_of_all_which_alone_compiles(monkeypatch, tmp_path):
    result = measure(monkeypatch, tmp_path, [2.0, 2.0, 2.4], [2.0, 2.1, 2.2])
    assert (result["ratio"], result["first call"], result["base first call"]) == (2.1, 2.0, 2.0)


def test_a_table_line_has_ratio_error_memory_and_distance_from_the_peak():
    head, _, line = table([NUMBERS]).splitlines()
    assert head.count("|") == line.count("|")
    for cell in ("1.50 (1.40 to 1.60)", "1.0e-07 / 0.0e+00", "0.40 / 0.60", "50% / 25%", "0.005"):
        assert f"| {cell} |" in line
    compiled = NUMBERS | {"compiled": True, "first call": 31.0, "base first call": 64.25}
    assert "s /" not in line and "| 31 / 64.2 s |" in table([compiled]).splitlines()[2]
    refused = table([{"row": "a", "refused": "why"}]).splitlines()[2]
    assert refused.count("|") == head.count("|")


def test_the_machines_peaks_are_those_of_all_rows_from_least_to_greatest():
    rows = [{"machine": {"peak": peak}} for peak in (
        {"float32": "480 GFLOP/s", "bandwidth": "67 GB/s"}, {"float32": "99 GFLOP/s"}, {"float32": "435 GFLOP/s"})]
    assert reached(rows) == "bandwidth 67 GB/s, float32 99 GFLOP/s to 480 GFLOP/s"


def test_a_files_rows_stay_and_those_of_other_settings_are_not_lost_without_a_word(tmp_path):
    path, here = tmp_path / "speed.json", {"threads": 2, "rounds": 7, "peak": {"float32": "480 GFLOP/s"}}
    rows = [{"row": "a", "machine": here}, {"row": "b", "machine": here | {"peak": {}}}]
    path.write_text(json.dumps({"rows": rows}))
    assert other_rows(path, here, {"a"}) == rows[1:]
    with pytest.raises(InputError, match="measured with another rounds; choose another file"):
        other_rows(path, here | {"rounds": 9}, {"a"})
    assert other_rows(path, here | {"rounds": 9}, {"a", "b"}) == []
    path.write_text("[]")
    with pytest.raises(InputError, match="no file of this benchmark"):
        other_rows(path, here, set())


def test_the_table_goes_between_its_marks_and_nowhere_else():
    text = "before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n"
    assert insert(text, "new") == "before\n<!-- speed -->\nnew\n<!-- /speed -->\nafter\n"
    with pytest.raises(InputError, match="<!-- speed -->"):
        insert("no marks", "new")


@pytest.mark.parametrize("arguments,words", [
    (["--rounds", "3"], "--rounds must be 7 or more"), (["--rows", "nothing"], "no row's name"),
    (["--table", "no/such.md"], "needs a line <!-- speed -->")])
def test_bad_flags_are_one_sentence(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(speed.main)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_without_diffusers_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "cpu", "--rows", "command"])
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit) as stop:
        run_command(speed.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "requirements-dev.txt" in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------- what speed rests on

def test_a_prompts_picture_is_the_same_whatever_its_batch(narrow):
    sd = StableDiffusion.load(narrow)
    prompts = ["a red circle", "a blue circle", "a red circle", "blue", "a"]
    alone = torch.cat([sd.decode(sd.sample(p, steps=3, seed=k)) for k, p in enumerate(prompts)])
    for size in (2, 5):
        batched = torch.cat([sd.decode(sd.sample(prompts[k:k + size], steps=3, seed=k)) for k in range(0, 5, size)])
        assert (batched - alone).abs().max() <= 1e-5


def test_a_text_that_stands_twice_in_a_batch_is_encoded_once(narrow_xl, monkeypatch):
    sd, seen = StableDiffusion.load(narrow_xl), []
    plain = sd.tokenizer
    monkeypatch.setattr(sd, "tokenizer", lambda prompts, *rest: (seen.append(prompts), plain(prompts, *rest))[1])
    context, pooled = sd.encode_prompt(["a", "red", "a"])
    assert seen == [["a", "red"]] * 2
    assert torch.equal(context[0], context[2]) and torch.equal(pooled[0], pooled[2])
    assert not torch.equal(context[0], context[1])


def test_convolutions_are_laid_out_for_their_precision_as_they_are_loaded(narrow):
    for dtype, last in ((torch.bfloat16, True), (torch.float32, False)):
        sd = StableDiffusion.load(narrow, dtype=dtype)
        for weight in (sd.unet.mid_block.resnets[0].conv1.weight, sd.vae.decoder.mid_block.resnets[0].conv1.weight):
            assert weight.is_contiguous(memory_format=torch.channels_last) == last != weight.is_contiguous()


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="it is glibc that is asked")
def test_a_command_uses_its_freed_memory_again():
    """120 MB of tensors, freed and made again: without `reuse_memory` every page of them is a new one.

    The first rounds aren't counted: until freed pieces fit, some tensors still get new memory.
    """
    script = ("import resource, torch\nfrom command import run_command\n"
              "def touch():\n    for x in [torch.empty(5 << 20) for _ in range(6)]: x.fill_(1)\n"
              "def faults():\n    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
              "def main():\n    for _ in range(8): touch()\n    before = faults()\n    touch(), touch(), touch()\n"
              "    print(faults() - before)\n")
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    ours, plain = (int(subprocess.run([sys.executable, "-c", script + call], capture_output=True, text=True, check=True,
                                      cwd=speed.ROOT, env=env).stdout) for call in ("run_command(main)", "main()"))
    if plain < 1000:
        pytest.skip("this system counts no new pages, or gives large ones to everybody")
    assert ours < 100


def test_wide_layers_are_the_same_as_convolutions():
    x, weight, bias = randn(2, 7, 320), randn(320, 320, seed=1), randn(320, seed=2)
    assert weight.numel() == WIDE
    for b in (bias, None):
        out, want = project(x, weight, b), torch.nn.functional.linear(x, weight, b)
        assert out.is_contiguous() and (out - want).abs().max() <= 1e-5 * want.abs().max()


def small_run(techniques: dict, compiled: list | None, low_memory: bool, translate: bool = False) -> torch.Tensor:
    """Latents of two pictures by a U-Net of one level, whose graphs go into the list `compiled` unless it is None.

    translate: PyTorch's compiler makes C++ of the graphs; otherwise they run as they are.
    """
    unet = make(UNet, SMALL)
    if callable(techniques.get("masks")):
        techniques = techniques | {"masks": techniques["masks"](unet)}
    if compiled is not None:
        torch.compiler.reset()
        unet.compile(backend="inductor" if translate else noting(compiled), fullgraph=True, dynamic=False,
                     recompile_limit=64)
    init = randn(2, 4, 8, 8, seed=3) if "freescale" in techniques else None
    *_, (_, latents) = generate(unet, randn(2, 4, 8, 8), Condition(randn(2, 5, 8, seed=1)),
                                Condition(randn(2, 5, 8, seed=2)), plan("ddim", 8), 3.0, init, 1.0, seeded(0, 1),
                                low_memory, **techniques)
    return latents


def noting(compiled: list) -> Callable:
    """A backend that notes each graph and runs it as it is: no C++ compiler is needed."""
    def note(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compiled.append(graph)
        return graph.forward
    return note


def static(unet: UNet) -> Masks:
    return Masks(StaticMasks(unet).requires_grad_(False))


def dynamic(mode: str, **how) -> Callable[[UNet], Masks]:
    return lambda unet: Masks(DynamicMasks(unet, initial=0.5).requires_grad_(False), mode, **how)


ALL = {"masks": dynamic("sample"), "freescale": SCALE, "freeu": FREEU, "cache": DeepCache(2, 1), "tgate": TGate(3)}


@pytest.mark.parametrize("graphs, techniques", [
    (1, {}), (4, {"cache": FasterDiffusion(2)}),
    (4, {"cache": FasterDiffusion((0, 1, 5), parallel=True)}),         # an encoder, and decoders of 1, 3 and 4 steps
    (6, {"freeu": FREEU, "cache": DeepCache(2, 1), "tgate": TGate(3)}),
    (2, {"masks": dynamic("threshold"), "freescale": replace(SCALE, fast=True, blur="official")}),
    (2, {"masks": dynamic("expected"), "freescale": replace(SCALE, attention="local")}),
    (3, {"masks": RandomMasks(0.2, window=True, fixed=True), "freescale": replace(SCALE, dilate=0.7)}),
    (8, {"masks": static, "freescale": SCALE, "freeu": FREEU, "cache": FasterDiffusion(3, parallel=True)}),
    (8, ALL), (4, {"low_memory": True, "masks": dynamic("sample")})],
    ids=["plain", "faster", "parallel", "caches", "threshold", "expected", "random", "parallel masks", "all", "halves"])
def test_the_u_net_is_one_graph_whatever_acts_in_it_and_compiles_but_a_few_times(graphs, techniques):
    """A graph for each kind of step, not for each step."""
    compiled, low_memory = [], "low_memory" in techniques
    techniques = {name: of for name, of in techniques.items() if name != "low_memory"}
    plain = small_run(techniques, None, low_memory)
    assert torch.equal(small_run(techniques, compiled, low_memory), plain)
    assert 1 <= len(compiled) <= graphs


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs g++")
def test_compiled_masks_are_drawn_from_the_same_noise():
    plain = small_run({"masks": static}, None, False)
    assert (small_run({"masks": static}, [], False, translate=True) - plain).abs().max() < 1e-5 * plain.abs().max()


def test_a_command_that_compiles_has_room_for_more_kinds_of_steps_than_pytorchs_eight(narrow, tmp_path, monkeypatch):
    compiled, plain = [], UNet.compile
    # beyond the limit, a full graph is an error
    monkeypatch.setattr(UNet, "compile", lambda self, options, **more: plain(
        self, backend=noting(compiled), fullgraph=True, **more))
    torch.compiler.reset()
    config = replace(read_config(narrow), unet=replace(SMALL, depth=(0,), context_dim=16))
    sd = StableDiffusion.load(write_random(tmp_path / "least", config, Tokenizer.from_file(
        str(narrow / "tokenizer.json"))), compiled=True)
    for batch in range(1, 10):
        sd.sample(["a"] * batch, steps=1)
    assert len(compiled) == 9
