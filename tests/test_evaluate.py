"""`lab/evaluate.py`: its numbers, that runs resume and share their work, and its one-line errors."""
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from lab import shapes
from lab.evaluate import frechet_distance, judged, main, make_scenes, read_rows

QUICK = ("--steps", "2", "--drawn", "0")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """Six rows, one of each kind."""
    path = tmp_path_factory.mktemp("bench") / "six.jsonl"
    rows = {row["kind"]: row for row in shapes.make_bench()}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return path


@pytest.fixture()
def run(command, bench, world, tmp_path):
    """Runs the command on the six rows -> exit code, stdout, stderr, and its result's file."""
    def run(*flags: object, out: str = "r.json", model: Path = world) -> tuple[int, str, str, Path]:
        path = tmp_path / out
        return *command(main, "--model", model, "--bench", bench, *QUICK, "--out", path, *flags), path
    return run


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

def test_a_result_has_every_number_and_row(run, tmp_path):
    """66 pictures: the Frechet distance needs more than it has features, 64."""
    code, out, err, path = run("--n-per-prompt", 11, "--drawn", 100, "--sheet", tmp_path / "sheet.png", "--steps", 1)
    assert code == 0 and "strict, all" in out and "clip_score: " in out, err
    data = json.loads(path.read_text())
    assert set(data["all"]) == {*shapes.KINDS, "overall"} and len(data["rows"]) == 66
    assert [row["seed"] for row in data["rows"]] == list(range(66))
    assert set(data["all"]["single"]) >= {"mean", "low", "high", "n"} and data["frechet"]["drawn"] == 100
    means = {name: np.mean([np.mean([row[of] for row in data["rows"] if row["kind"] == kind]) for kind in shapes.KINDS])
             for name, of in (("all", "strict"), ("quality", "quality"), ("loose", "loose"))}
    assert all(data[name]["overall"]["mean"] == pytest.approx(mean) for name, mean in means.items())
    assert data["frechet"]["distance"] > data["frechet"]["floor"] > 0
    assert -1 <= data["clip_score"]["mean"] <= 1 and data["seconds_per_image"] > 0 and data["peak_memory_gb"] > 0
    assert not list(tmp_path.glob(".r.json*"))                         # the parts are gone
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * 136


def test_a_stopped_run_goes_on_where_it_was(run):
    *_, path = run()
    made = json.loads(path.read_text())
    made_with = {name: made[name] for name in ("model", "dtype", "PyTorch", "lab", "bench", "seed", "settings")}
    kept = [{"k": k, "seed": k, "seconds": 1.0, "strict": True, "loose": True, "quality": 1.0, "clip": 0.5,
             "features": []} for k in range(4)]
    path.with_name(".r.json part 0.json").write_text(json.dumps({"made with": made_with, "rows": kept}))
    assert run()[0] == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["clip"] == 0.5 for row in rows] == [True] * 4 + [False] * 2


def test_two_processes_share_the_work_and_find_the_same(run, monkeypatch):
    *_, serial = run("--batch-size", 1, out="serial.json")
    for rank in (1, 0):                                                # as torchrun would start them
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, out, err, path = run("--batch-size", 1)
        assert code == 0 and ("still at work" in out) == (not path.exists()) == (rank == 1), err
    one, two = (json.loads(path.read_text()) for path in (serial, path))
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(one["rows"]) == drop(two["rows"]) and one["all"] == two["all"]


def test_compare_gives_paired_differences_of_the_same_prompts_and_seeds(run, command):
    *_, result = run()
    other = json.loads(result.read_text())
    for row in other["rows"]:
        row["strict"] = row["kind"] == "colors"
    result.with_name("other.json").write_text(json.dumps(other))
    code, out, _ = command(main, "--compare", result, result.with_name("other.json"))
    assert code == 0 and all(name in out for name in ("overall", "quality", "clip score"))
    same = command(main, "--compare", result, result)[1]
    assert all(line.split()[1] == "0.000" for line in same.splitlines()[1:9])
    *_, seed = run("--seed", 5, out="seed.json")
    code, _, err = command(main, "--compare", result, seed)
    assert code == 2 and "can't be paired" in err


@pytest.mark.parametrize("flags, text", [
    (["--freeu", "--sampler", "euler"], {"sampler": "euler", "freeu": "b1=1.3,b2=1.4,s1=0.9,s2=0.2"}),
    (["--cache", "deepcache,2"], {"cache": "deepcache,interval=2"}),
    (["--freescale", "2"], {"freescale": "resolutions=64x64:128x128,native=16", "width": 128}),
    (["--highres", "hidiffusion", "-W", "128"], {"highres": "hidiffusion,native=16", "height": 64, "width": 128}),
    (["--masks", "random,0.1"], {"masks": "random,ratio=0.1"})])
def test_the_flags_of_txt2img_reach_the_sampler_and_the_result(run, flags, text):
    code, _, err, path = run(*flags, "--kinds", "colors")
    assert code == 0, err
    assert json.loads(path.read_text())["settings"].items() >= text.items()


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


@pytest.mark.parametrize("without, config, words, absent", [
    ("clip", {}, "no CLIP score", "clip_score"),
    ("config.json", {"family": "sd15"}, "wasn't trained on the drawn world", "all")])
def test_what_a_model_lacks_is_left_out_and_named(tmp_path, run, world, without, config, words, absent):
    model = tmp_path / "model"
    model.mkdir()
    for file in world.iterdir():
        if file.name != without:
            (model / file.name).symlink_to(file)
    if config:
        (model / "config.json").write_text(json.dumps(json.loads((world / "config.json").read_text()) | config))
    code, out, _, path = run(model=model)
    data = json.loads(path.read_text())
    assert code == 0 and words in out and data["seconds_per_image"] > 0
    assert absent not in data and ("all" in data) == (without == "clip")


def test_prompts_of_a_kind_are_reproducible_sentences_of_the_grammar():
    prompts, scenes = make_scenes("position", 5)
    assert (prompts, scenes) == make_scenes("position", 5)
    assert all(shapes.parse(prompt).relation for prompt in prompts)
