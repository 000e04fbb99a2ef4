"""benchmarks/freescale.py: a plan for every stage, what is measured beside it, and bad flags named."""
import re
import sys

import pytest

from benchmarks import freescale


def stages(out: str) -> dict[str, list[float]]:
    """The numbers after each size, from the lines that begin with one."""
    rows: dict[str, list[float]] = {}
    for line in out.splitlines():
        if re.match(r"\d+x\d+ ", line):
            size, *numbers = line.split()
            rows.setdefault(size, []).extend(map(float, numbers))
    return rows


def test_the_plan_has_a_line_for_every_stage_and_runs_nothing(command, monkeypatch):
    monkeypatch.setattr(freescale, "measure_stages", None)
    code, out, err = command(freescale.main, "--plan", "--resolutions", "96x96,128x96", "--steps", 10, "--freeu")
    assert code == 0 and not err and out.startswith("tiny, float16, one picture, guidance in one batch, blur spatial")
    rows = stages(out)
    assert list(rows) == ["96x96", "128x96"] and all(len(numbers) == 6 for numbers in rows.values())
    low = stages(command(freescale.main, "--plan", "--resolutions", "96x96,128x96", "--low-memory")[1])
    for size in rows:
        assert low[size][1] < rows[size][1]                            # the peak of a step
        assert low[size][5] == pytest.approx(rows[size][5], rel=0.02, abs=0.001)         # a stage's operations in all


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's memory is read as Linux tells it")
def test_what_is_measured_stands_beside_the_plan(command):
    code, out, _ = command(freescale.main, "--resolutions", "64x64,96x96", "--dtype", "float32", "--device", "cpu",
                           "--low-memory")
    rows = stages(out)
    assert code == 0 and all(len(numbers) == 6 + 4 for numbers in rows.values())
    for *planned, plain, scaled, measured, again in rows.values():
        assert plain > 0 and scaled > 0 and measured >= 0
        assert again == planned[1]


@pytest.mark.parametrize("flags,words", [
    (["--steps", 0], "--steps must be 1 or more"), (["--device", "cuda"], "--device cuda can't be used here"),
    (["--resolutions", "64"], "--resolutions takes sizes"), (["--resolutions", "64x64,9"], "--resolutions takes sizes"),
    (["--resolutions", "64x60"], "not of multiples of 8"), (["--resolutions", "64x64,32x32"], "must not fall"),
    (["--blur", "box"], "spatial or official")])
def test_bad_flags_end_in_one_clear_line(flags, words, command, monkeypatch):
    if "cuda" in flags:
        monkeypatch.setattr("torch.empty", no_gpu)
    code, out, err = command(freescale.main, "--plan" if "cuda" not in flags else "--steps=1", *flags)
    assert code == 2 and not out and words in err and err.startswith("error: ") and err.count("\n") == 1


def no_gpu(*_, **__):
    raise AssertionError("Torch not compiled with CUDA enabled")


def test_where_a_processs_memory_is_not_told_the_plan_still_is(command, monkeypatch):
    monkeypatch.setattr(freescale, "resource", None)                   # as on Windows
    code, _, err = command(freescale.main, "--device", "cpu")
    assert code == 2 and "add --plan" in err
    assert command(freescale.main, "--plan", "--resolutions", "64x64")[0] == 0
