"""lab/study.py: intervals cover and correct, results resume and are refused when stale, sheets have their layout."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from folder import InputError
from lab.study import (
    MARGIN,
    Arm,
    Estimate,
    Results,
    bootstrap,
    choose,
    compare,
    declare,
    digest,
    holm,
    lead_cells,
    line,
    make_rows,
    markdown,
    parts,
    plot,
    remove_parts,
    says,
    sheet,
    wilson,
)

# Statistics

def test_wilsons_interval_covers_its_share_and_has_width_at_the_ends():
    x = wilson(0.7, 200)
    assert 0.63 < x.low < 0.7 < x.high < 0.76 and wilson(1.0, 50).high == 1 > wilson(1.0, 50).low > 0.9


def test_the_bootstrap_covers_the_truth_and_overall_is_the_unweighted_mean_of_kinds():
    rng, covered, kinds = np.random.default_rng(0), [], ["a"] * 100 + ["b"] * 200
    for _ in range(60):
        values = rng.random(300) < np.array([0.8] * 100 + [0.4] * 200)
        found = bootstrap(values, None, kinds, draws=300)
        covered.append(found["overall"].low <= 0.6 <= found["overall"].high)
        assert found["overall"].mean == pytest.approx((found["a"].mean + found["b"].mean) / 2)
        assert (found["a"].n, found["overall"].n) == (100, 300)
    assert np.mean(covered) > 0.85


def test_pictures_of_one_prompt_are_not_counted_as_independent():
    values, prompts = np.arange(40) % 2, list(range(40))
    alone, fourfold = bootstrap(values, prompts), bootstrap(np.repeat(values, 4), np.repeat(prompts, 4).tolist())
    assert alone["overall"].low == fourfold["overall"].low


def test_trainings_are_drawn_like_prompts():
    values = np.zeros((3, 60))
    assert bootstrap(values)["overall"].low == bootstrap(values)["overall"].high == 0
    values[0] = 1                                                      # trainings disagree, prompts don't
    x = bootstrap(values)["overall"]
    assert x.mean == pytest.approx(1 / 3) and (x.low, x.high, x.n) == (0, 1, 180)


def test_p_is_small_only_for_a_difference_and_a_paired_interval_is_narrow():
    rng = np.random.default_rng(0)
    base = rng.random(500) < 0.6
    better = base | (rng.random(500) < 0.1)
    lead = bootstrap(better - base.astype(float))["overall"]
    assert 0 < lead.low < lead.mean < lead.high < 0.08 and lead.p < 0.01
    assert bootstrap(np.zeros(500))["overall"].p == bootstrap([1, 1], None, ["a", "b"])["overall"].p == 1


def test_holm_gives_the_known_example():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06,
                                                                                "d": 0.02})


def test_only_a_whole_interval_within_the_margin_is_the_same():
    assert says(Estimate(0.01, 0.005, 0.015, 150), 0.001) == "the same"
    assert says(Estimate(0.0, 0.0, 0.0, 100), 1.0) == "not decided"    # too few, although none of them differs
    assert says(Estimate(0.01, -0.03, 0.05, 9), 0.5) == "not decided"
    assert [says(Estimate(x, x - 0.02, x + 0.02, 9), 0.001) for x in (0.1, -0.1)] == ["higher", "lower"]


def test_arms_are_compared_with_their_own_bases_and_p_is_corrected_over_all():
    scores = {"base": np.zeros(200), "a": np.ones(200), "b": np.ones(200)}
    arms = [Arm("base", "", {}), Arm("a", "", {}, primary=True), Arm("b", "", {}, base="a"),
            Arm("c", "", {}, base="absent")]
    found = compare(arms, scores | {"c": np.zeros(200)})
    assert found["a"]["over base"].mean == 1 and found["a"]["says"] == "higher" and found["b"]["says"] == "the same"
    assert found["a"]["p, Holm"] == 2 * found["a"]["over base"].p
    assert [lead_cells(found[name])[2] for name in ("a", "b")] == ["higher (primary)", "the same"]
    assert "over base" not in found["base"] and "over base" not in found["c"]


def test_what_decides_is_declared_before_the_run(capsys):
    arms = [Arm("base", "the plain model", {}), Arm("a", "a change", {}, primary=True), Arm("b", "another", {})]
    row = declare(arms, ["a circle", "a star"], 5)
    assert row["primary"] == ["a over base"] and row["margin"] == MARGIN and row["arms"]["b"] == "another"
    assert row["seeds"] == [5, 6] and row["prompts"] == ["a circle", "a star"]
    told = capsys.readouterr().out
    assert all(words in told for words in ("strict score, a over base", "exploratory", "Holm", f"{MARGIN:g}"))


def test_an_estimate_formats_all_three_numbers_alike():
    assert f"{Estimate(0.5, -0.25, 1, 9):+.2f}" == "+0.50 (-0.25 to +1.00)"


# Results

def test_an_entry_is_made_once_and_again_when_what_made_it_differs(tmp_path):
    made = []

    def entry(model: str, **more) -> dict:
        results = Results(tmp_path / "r.json", {"model": model})
        return results.entry("arms", "a", lambda: made.append(0) or {"x": 1}, **more)
    assert entry("m", size=(1, 2)) == entry("m", size=[1, 2]) and len(made) == 1
    assert entry("m", size=3)["made with"] == {"model": "m", "size": 3} and len(made) == 2
    entry("other", size=3)
    assert len(made) == 3


def test_two_results_share_a_file_and_a_damaged_one_is_not_overwritten(tmp_path):
    path = tmp_path / "r.json"
    Results(path, {}).write("a", {"x": {"mean": Estimate(1, 0, 2, 3)}})
    Results(path, {}).write("b", {"y": {}})
    assert json.loads(path.read_text()) == {"a": {"x": {"mean": {"mean": 1, "low": 0, "high": 2, "n": 3, "p": None}}},
                                            "b": {"y": {}}}
    path.write_text("{")
    with pytest.raises(InputError, match="can't read the results"):
        Results(path, {}).write("a", {"x": {}})
    assert path.read_text() == "{"


def test_rows_go_on_where_they_were_stopped_and_stale_ones_are_refused(tmp_path):
    made, path = [], tmp_path / "r.json"

    def make(numbers: list[int]) -> list[dict]:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.extend(numbers)
        return [{"k": k} for k in numbers]
    with pytest.raises(KeyboardInterrupt):
        make_rows(path, {"seed": 0}, 7, 2, make)
    with pytest.raises(InputError, match="stopped run with another model or other settings"):
        make_rows(path, {"seed": 1}, 7, 2, make)
    rest = lambda numbers: [{"k": k, "late": True} for k in numbers]
    assert [row.get("late", False) for row in make_rows(path, {"seed": 0}, 7, 2, rest)] == [False] * 4 + [True] * 3
    remove_parts(path)
    assert not parts(path)


def test_processes_share_rows_and_the_last_one_has_all(tmp_path):
    make = lambda numbers: [{"k": k} for k in numbers]
    assert make_rows(tmp_path / "r", {}, 5, 2, make, rank=1, world=2) == []
    assert make_rows(tmp_path / "r", {}, 5, 2, make, rank=0, world=2) == [{"k": k} for k in range(5)]


def test_the_digest_sees_every_weight_of_the_folder(tmp_path, world):
    shutil.copytree(world, tmp_path / "model")
    first = digest(tmp_path / "model")
    assert first == digest(world)
    for file in ("text_encoder.safetensors", "clip/image_encoder.safetensors", "tokenizer.json", "config.json"):
        before, path = (tmp_path / "model" / file).read_bytes(), tmp_path / "model" / file
        path.write_bytes(before.replace(b"1", b"2"))
        assert digest(tmp_path / "model") != first, file
        path.write_bytes(before)


# Tables, sheets, curves, flags

def test_a_table_is_markdown():
    assert markdown([["arm", "n"], ["a", "10"]]) == "| arm | n   |\n| --- | --- |\n| a   | 10  |\n"


def test_a_sheet_has_its_pictures_where_they_belong(tmp_path):
    red, blue = torch.zeros(3, 8, 8), np.zeros((16, 16, 3), np.uint8)
    red[0], blue[..., 2] = 1, 255
    sheet([("", [red, blue]), ("", [blue])], tmp_path / "plain.png", side=16)
    plain = Image.open(tmp_path / "plain.png")
    assert plain.size == (2 * 24, 2 * 24)
    assert [plain.getpixel(at) for at in ((12, 12), (36, 12), (12, 36), (36, 36))] == [
        (255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 255, 255)]
    sheet([("row", [red, blue])], tmp_path / "full.png", ["one", "two"], "a title", ["x", "y"], ["green", "red"], 64)
    full = Image.open(tmp_path / "full.png")
    assert full.width > 2 * 72 and full.height > 72 + 3 * 8
    left = full.width - 2 * 72
    column = [full.getpixel((left + 40, y)) for y in range(full.height)]
    assert (0, 128, 0) in column and (255, 0, 0) in column


def test_a_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib (requirements-dev.txt)")
    leads = line([1, 2], [Estimate(1, 0.5, 3, 9), Estimate(2, 1, 4, 9)], "a")
    assert leads["y"].tolist() == [1, 2] and leads["yerr"] == [[0.5, 1], [2, 2]]
    lines = [leads, line([1, 2], torch.tensor([0.0, 1.0]), fmt=":")]
    plot([[(dict(title="t", xscale="log"), lines)] * 2], "title", tmp_path / "p.png", legend=True)
    assert Image.open(tmp_path / "p.png").width > 500


def test_arms_are_chosen_by_name_in_the_studys_order():
    assert choose(["a", "b", "c"], "c, a") == ["a", "c"] and choose(["a", "b"], None) == ["a", "b"]
    with pytest.raises(InputError, match="there is no arm 'd'; there are a, b"):
        choose(["a", "b"], "d")
