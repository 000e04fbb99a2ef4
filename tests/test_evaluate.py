"""`lab/evaluate.py`: its numbers, that runs resume and share their work, and its one-line errors."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from folder import TINY
from lab import shapes
from lab.evaluate import frechet_distance, judged, main, make_scenes, read_rows

QUICK = ("--steps", "2", "--drawn", "0")


def run(*flags: object, ranks: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([sys.executable, *launcher, "-m", "lab.evaluate", *map(str, flags)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """Six rows, one of each kind."""
    path = tmp_path_factory.mktemp("bench") / "six.jsonl"
    rows = {row["kind"]: row for row in shapes.make_bench()}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return path


@pytest.fixture(scope="module")
def result(bench) -> Path:
    run("--bench", bench, "--n-per-prompt", 20, "--out", bench.with_name("one.json"), "--sheet",
        bench.with_name("sheet.png"), "--steps", 2, "--drawn", 100, ranks=1)
    return bench.with_name("one.json")


# Numbers

def test_the_frechet_distance_is_that_of_known_normal_distributions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200_000, 3)), rng.normal(2, 3, (200_000, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(3 * (2 ** 2 + (3 - 1) ** 2), rel=0.02)


def test_pictures_that_take_no_notice_of_their_prompt_score_0():
    """That of all six shapes, an empty one, and what the prompt before asked for."""
    made = [make_scenes(kind, 5) for kind in shapes.KINDS]
    prompts = [prompt for captions, _ in made for prompt in captions]
    pictures = [shapes.draw(scene) for _, scenes in made for scene in scenes]
    six = shapes.draw(shapes.Scene(tuple(shapes.Thing(shape, "blue", (k % 3 + 0.5) / 3, (k // 3 + 0.5) / 2, 0.14)
                                         for k, shape in enumerate(shapes.SHAPES)), "white"))
    empty = shapes.draw(shapes.Scene((), "white"))
    for others in ([six] * len(prompts), [empty] * len(prompts), pictures[-1:] + pictures[:-1]):
        found = list(map(judged, others, prompts))
        assert not any(row["strict"] for row in found) and np.mean([row["quality"] for row in found]) < 0.4
    found = list(map(judged, pictures, prompts))
    assert all(row["strict"] and row["loose"] and row["quality"] > 0.9 for row in found)


# Runs

def test_a_result_has_every_number_and_row(result):
    data = json.loads(result.read_text())
    assert set(data["all"]) == {*shapes.KINDS, "overall"} and len(data["rows"]) == 120
    assert [row["seed"] for row in data["rows"]] == list(range(120))
    assert set(data["all"]["single"]) >= {"mean", "low", "high", "n"} and data["frechet"]["drawn"] == 100
    means = {name: np.mean([np.mean([row[of] for row in data["rows"] if row["kind"] == kind]) for kind in shapes.KINDS])
             for name, of in (("all", "strict"), ("quality", "quality"), ("loose", "loose"))}
    assert all(data[name]["overall"]["mean"] == pytest.approx(mean) for name, mean in means.items())
    assert data["frechet"]["distance"] > data["frechet"]["floor"] > 0
    assert -1 <= data["clip_score"]["mean"] <= 1 and data["seconds_per_image"] > 0 and data["peak_memory_gb"] > 0
    assert not list(result.parent.glob(".one.json*"))                  # the parts are gone
    with Image.open(result.with_name("sheet.png")) as sheet:
        assert sheet.width == 8 * 136


def test_a_stopped_run_goes_on_where_it_was(bench, command):
    first = [*QUICK, "--bench", bench, "--out", bench.with_name("again.json")]
    assert command(main, *first)[0] == 0
    part, made = bench.with_name(".again.json part 0 of 1.json"), json.loads(bench.with_name("again.json").read_text())
    made_with = {name: made[name] for name in ("model", "dtype", "PyTorch", "lab", "bench", "seed", "settings")}
    kept = [{"k": k, "seed": k, "seconds": 1.0, "strict": True, "loose": True, "quality": 1.0, "clip": 0.5,
             "features": []} for k in range(4)]
    part.write_text(json.dumps({"made with": made_with, "rows": kept}))
    assert command(main, *first)[0] == 0
    rows = json.loads(bench.with_name("again.json").read_text())["rows"]
    assert [row["clip"] == 0.5 for row in rows] == [True] * 4 + [False] * 2


def test_two_processes_share_the_work_and_find_the_same(bench, command):
    flags = [*QUICK, "--bench", bench, "--batch-size", 1, "--out"]
    assert command(main, *flags, bench.with_name("serial.json"))[0] == 0
    run(*flags, bench.with_name("two.json"), ranks=2)
    one, two = (json.loads(bench.with_name(name).read_text()) for name in ("serial.json", "two.json"))
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(one["rows"]) == drop(two["rows"]) and one["all"] == two["all"]


def test_compare_gives_paired_differences(result, command):
    other = json.loads(result.read_text())
    for row in other["rows"]:
        row["strict"] = row["kind"] == "colors"
    result.with_name("other.json").write_text(json.dumps(other))
    code, out, _ = command(main, "--compare", result, result.with_name("other.json"))
    assert code == 0 and all(name in out for name in ("overall", "quality", "clip score"))
    same = command(main, "--compare", result, result)[1]
    assert all(line.split()[1] == "0.000" for line in same.splitlines()[1:9])


@pytest.mark.parametrize("flags, text", [
    (["--freeu", "--sampler", "euler"], {"sampler": "euler", "freeu": "b1=1.3,b2=1.4,s1=0.9,s2=0.2"}),
    (["--cache", "deepcache,2"], {"cache": "deepcache,interval=2"}),
    (["--freescale", "2"], {"freescale": "resolutions=64x64:128x128,native=16", "width": 128}),
    (["--highres", "hidiffusion", "-W", "128"], {"highres": "hidiffusion,native=16", "height": 64, "width": 128}),
    (["--masks", "random,0.1"], {"masks": "random,ratio=0.1"})])
def test_the_flags_of_txt2img_reach_the_sampler_and_the_result(tmp_path, command, flags, text, bench):
    code, _, err = command(main, "--bench", bench, *QUICK, *flags, "--kinds", "colors", "--out", tmp_path / "r.json")
    assert code == 0, err
    assert json.loads((tmp_path / "r.json").read_text())["settings"].items() >= text.items()


@pytest.mark.parametrize("text, message", [
    ("", "no prompts"), ("a pink circle", "line 1 can't be judged: unknown words 'pink'"),
    ("a red circle\na circle and a circle", "line 2 can't be judged")])
def test_a_file_that_cannot_be_judged_is_one_clear_sentence(tmp_path, command, text, message):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    code, _, err = command(main, "--bench", path)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("line, message", [("{", "is not JSON"), ('{"prompt": "a circle"}', 'needs a "kind"'),
                                           ("[]", 'needs a "kind"')])
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"kind": "single", "prompt": "a circle"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"line 2 .*{message}"):
        read_rows(path)


@pytest.mark.parametrize("flags, message", [
    (["--bench", "none.jsonl"], "none.jsonl"), (["--kinds", "colour"], "no rows of kind colour"),
    (["--n-per-prompt", "0"], "--n-per-prompt"), (["--out", "nowhere/x.json"], "nowhere"),
    (["--steps", "0"], "step"), (["--compare", ROOT / "README.md", ROOT / "README.md"], "no result"),
    (["--init-image", "x.png"], "--init-image"),
    (["--highres", "demofusion", "-W", 128, "--cache", "deepcache"], "demofusion can't be combined with --cache")])
def test_bad_flags_are_one_clear_sentence(flags, message, command, tmp_path):
    code, _, err = command(main, "--out", tmp_path / "r.json", *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_results_of_other_prompts_cannot_be_paired(result, bench, command):
    command(main, "--bench", bench, *QUICK, "--seed", 5, "--out", bench.with_name("seed.json"))
    code, _, err = command(main, "--compare", result, bench.with_name("seed.json"))
    assert code == 2 and "can't be paired" in err


def test_a_model_without_a_clip_is_judged_without_clip_and_says_so(tmp_path, bench, command):
    for file in TINY.iterdir():
        if file.name != "clip":
            (tmp_path / file.name).symlink_to(file)
    code, out, _ = command(main, "--model", tmp_path, "--bench", bench, *QUICK, "--out", tmp_path / "r.json")
    assert code == 0 and "no CLIP score" in out
    data = json.loads((tmp_path / "r.json").read_text())
    assert "all" in data and "clip_score" not in data


def test_a_model_of_another_world_is_timed_only_and_says_so(tmp_path, bench, command):
    for file in TINY.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((TINY / "config.json").read_text()) | {"family": "sd15"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = command(main, "--model", tmp_path, "--bench", bench, *QUICK, "--out", tmp_path / "r.json")
    assert code == 0 and "wasn't trained on the drawn world" in out
    data = json.loads((tmp_path / "r.json").read_text())
    assert "all" not in data and data["seconds_per_image"] > 0


def test_prompts_of_a_kind_are_reproducible_sentences_of_the_grammar():
    prompts, scenes = make_scenes("position", 5)
    assert (prompts, scenes) == make_scenes("position", 5)
    assert all(shapes.parse(prompt).relation for prompt in prompts)
