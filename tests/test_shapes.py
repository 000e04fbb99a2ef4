"""The captioned world of `lab/shapes.py`: its captions are true and invertible, and its scorer is right."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from lab.shapes import (
    BACKGROUNDS,
    BENCH_SIZES,
    COLORS,
    COUNTS,
    HELD_OUT_COUNTS,
    HELD_OUT_LOOKS,
    HELD_OUT_PAIRS,
    HELD_OUT_PLACES,
    KINDS,
    PLACES,
    PREFIX,
    RELATIONS,
    SHAPES,
    SYNONYMS,
    VOCABULARY,
    Scene,
    Thing,
    alter,
    asks_held_out,
    caption,
    clear_relation,
    dense_scene,
    describe,
    draw,
    hard_captions,
    is_at,
    is_held_out,
    is_true,
    judge,
    look,
    make_bench,
    measure,
    parse,
    phrase,
    random_scene,
    read,
    read_background,
    same_things,
    verdict,
)

BENCH_HASH = "c1dac64b7861c8799f3263aba4a1abd10df2d8bc94c4fbf560d488287136a679"
MIRRORED = dict(zip(RELATIONS, ("right of", "left of", "below", "above")))


def scenes(kind: str | None, n: int, seed: int = 0, split: str = "all") -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, kind, split) for _ in range(n)]


def blur(image: np.ndarray) -> np.ndarray:
    """One binomial 3x3 pass."""
    x = np.pad(image.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    x = (x[:-2] + 2 * x[1:-1] + x[2:]) / 4
    return (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4


# Scenes

def test_the_same_generator_state_gives_the_same_scene_caption_and_picture():
    one, two = np.random.default_rng(7), np.random.default_rng(7)
    for _ in range(50):
        a, b = random_scene(one), random_scene(two)
        assert a == b and caption(a, one) == caption(b, two)
        assert np.array_equal(draw(a), draw(b))
    assert dense_scene(one) == dense_scene(two)


@pytest.mark.parametrize("make", [random_scene, dense_scene])
def test_objects_lie_inside_the_frame_apart_from_each_other_and_differ_from_the_background(make):
    rng = np.random.default_rng(0)
    for _ in range(150):
        scene = make(rng)
        for t in scene.things:
            assert t.r < min(t.x, t.y, 1 - t.x, 1 - t.y) and t.color != scene.background
        for a, b in combinations(scene.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > 1.13 * (a.r + b.r)      # a square's corner is at 1.13 radii


def test_kinds_hold_what_they_name():
    for kind in KINDS:
        for scene in scenes(kind, 100):
            looks = {(t.shape, t.color) for t in scene.things}
            shapes, n = {t.shape for t in scene.things}, len(scene.things)
            assert n in {"counting": (2, 3, 4), "single": (1,), "colors": (1,)}.get(kind, (2,))
            assert len(looks) == 1 if kind == "counting" else len(shapes) == n
            assert kind != "color_attr" or len({t.color for t in scene.things}) == 2
            assert kind != "position" or clear_relation(*scene.things)
            assert min(t.r for t in scene.things) >= 0.13


def test_the_train_split_never_shows_what_is_held_out_and_the_unseen_split_always_does():
    for kind in KINDS:
        for scene in scenes(kind, 400, split="train"):
            names = sorted({t.shape for t in scene.things})
            assert not any((t.shape, t.color) in HELD_OUT_LOOKS for t in scene.things)
            assert tuple(names) not in HELD_OUT_PAIRS
            assert len(names) > 1 or (names[0], len(scene.things)) not in HELD_OUT_COUNTS
            assert len(scene.things) > 1 or not any(is_at(scene.things[0], place) for shape, place in HELD_OUT_PLACES
                                                    if shape == names[0])
        assert all(map(is_held_out, scenes(kind, 100, split="unseen")))
        mixed = [is_held_out(scene) for scene in scenes(kind, 300)]
        assert any(mixed) and not all(mixed)


def test_training_captions_never_name_what_is_held_out():
    rng = np.random.default_rng(0)
    for scene in scenes(None, 2000, split="train"):
        assert not asks_held_out(describe(scene, rng))


def test_every_shape_loses_one_color_one_place_one_number_and_one_partner():
    for pairs, options in ((HELD_OUT_LOOKS, COLORS), (HELD_OUT_PLACES, PLACES), (HELD_OUT_COUNTS, COUNTS)):
        assert sorted(shape for shape, _ in pairs) == sorted(SHAPES) and {other for _, other in pairs} <= set(options)
    assert sorted(shape for pair in HELD_OUT_PAIRS for shape in pair) == sorted(SHAPES)
    assert all(pair == tuple(sorted(pair)) for pair in HELD_OUT_PAIRS)


def test_unknown_kind_split_and_shape_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="kind is one of"):
        random_scene(rng, "colour")
    with pytest.raises(ValueError, match="split"):
        random_scene(rng, None, "test")
    with pytest.raises(ValueError, match="shape is one of"):
        draw(Scene((Thing("hexagon", "red", 0.5, 0.5, 0.2),), "white"))


# Captions

def test_a_caption_parses_back_to_true_statements_about_its_scene():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for scene in scenes(kind, 300):
            text = caption(scene, rng)
            request = parse(text)
            assert parse(phrase(request)) == request and set(text.split()) <= set(VOCABULARY)
            assert sum(ask.count for ask in request.asks) == len(scene.things)
            assert request.background in (None, scene.background)
            told = [[t for t in scene.things if t.shape == ask.shape] for ask in request.asks]
            for ask, things in zip(request.asks, told):
                assert len(things) == ask.count and all(ask.color in (None, t.color) for t in things)
                assert ask.size is None or (things[0].r > 0.29) == (ask.size == "large") != (things[0].r < 0.22)
            if request.relation:
                a, b = told[0][0], told[1][0]
                gap = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
                assert gap[request.relation] == max(gap.values()) > a.r + b.r


def test_place_words_match_the_side_of_the_picture():
    rng = np.random.default_rng(0)
    offsets = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
    seen = set()
    for scene in scenes("single", 1500):
        place = parse(caption(scene, rng)).asks[0].place
        thing = scene.things[0]
        if place == "in the centre":
            assert max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.08
        elif place:
            sx, sy = offsets[place]
            assert sx * (thing.x - 0.5) + sy * (thing.y - 0.5) > 0.13
        seen.add(place)
    assert len(seen) == 6           # the five places, and none


def test_every_phrasing_of_a_request_is_used_and_parses_back_to_it():
    rng, used = np.random.default_rng(0), set()
    for scene in scenes(None, 1500):
        request = describe(scene, rng)
        text = phrase(request, rng)
        assert parse(text) == request
        used |= {words for others in SYNONYMS.values() for words in others if f" {words} " in f" {text} "}
        used |= {PREFIX} if text.startswith(PREFIX) else set()
    assert used == {PREFIX, *(words for others in SYNONYMS.values() for words in others)}


def test_an_altered_request_is_sayable_and_false_of_its_scene():
    rng = np.random.default_rng(0)
    for scene in scenes(None, 1000):
        request = describe(scene, rng)
        other = alter(request, rng)
        assert parse(phrase(other)) == other
        assert verdict(scene.things, scene.background, request, 64, 64)
        assert not verdict(scene.things, scene.background, other, 64, 64)


def test_asked_to_say_where_a_caption_of_a_neat_scene_does_and_an_alteration_of_sides_changes_only_that():
    rng = np.random.default_rng(0)
    where = lambda request: (request.relation, *(ask.place for ask in request.asks))
    silent = 0
    for kind in ("single", "position", "color_attr"):
        for _ in range(200):
            scene = random_scene(rng, kind, "train", neat=True)
            request = describe(scene, rng, where=True)
            silent += not any(where(request))
            if any(where(request)):
                others = [alter(request, rng, sides=True) for _ in range(5)]
                blank = lambda r: replace(r, relation=None, asks=tuple(replace(ask, place=None) for ask in r.asks))
                sides = [other for other in others if where(other) != where(request)]
                assert sides and all(blank(other) == blank(request) for other in sides)
    assert silent < 30              # 5 %: a place that is held out isn't said


def test_an_alteration_of_sides_makes_one_up_where_none_is_said():
    rng = np.random.default_rng(0)
    one, two = parse("a red circle"), parse("a red circle and a blue ring")
    assert {alter(one, rng, sides=True).asks[0].place for _ in range(100)} == set(PLACES)
    assert {alter(two, rng, sides=True).relation for _ in range(100)} == set(RELATIONS)
    assert alter(parse("three red circles"), rng, sides=True).asks[0].place is None


def test_hard_captions_are_one_true_one_and_distinct_false_ones_with_the_same_shapes():
    rng = np.random.default_rng(0)
    for scene in scenes(None, 30, split="train"):
        captions = hard_captions(scene, 64, rng)
        truths = [is_true(parse(text), scene) for text in captions]
        assert len(set(captions)) == 64 and truths[0] and not any(truths[1:])
        assert all({ask.shape for ask in parse(text).asks} == {t.shape for t in scene.things} for text in captions)


# The benchmark

def test_the_committed_benchmark_is_the_generators_and_has_genevals_sizes():
    path = Path(__file__).parent.parent / "lab" / "bench.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == make_bench()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == BENCH_HASH
    assert {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS} == BENCH_SIZES
    assert sum(BENCH_SIZES.values()) == len(rows) == 553


def test_each_half_of_each_category_asks_what_it_says():
    for row in make_bench():
        request = parse(row["prompt"])
        assert asks_held_out(request) != row["seen"]
        assert (request.relation is not None) == (row["kind"] == "position")
        assert len(request.asks) == (2 if row["kind"] in ("two", "position", "color_attr") else 1)
        assert (request.asks[0].count > 1) == (row["kind"] == "counting")
    halves = [[row["seen"] for row in make_bench() if row["kind"] == kind] for kind in KINDS]
    assert all(abs(2 * sum(half) - len(half)) <= 1 for half in halves)


def test_naming_the_kind_gives_the_prompts_of_geneval():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for scene in scenes(kind, 50):
            request = parse(caption(scene, rng, kind))
            assert all((ask.color is not None) == (kind in ("colors", "color_attr")) for ask in request.asks)
            assert (request.relation is not None) == (kind == "position")
            assert request.background is None and not any(ask.size or ask.place for ask in request.asks)


@pytest.mark.parametrize("text, message", [
    ("a pink circle", "'pink'"), ("a red dog and a hat", "'dog', 'hat'"), ("", "cannot read"),
    ("a circle red", "cannot read"), ("a red circle left of", "cannot read"), ("a red circles", "did you mean"),
    ("a orange circle", "did you mean 'an orange circle'"), ("two circle", "did you mean 'two circles'")])
def test_what_the_grammar_does_not_have_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


# Drawing and reading

def test_a_drawing_has_the_asked_size_and_shows_the_background_and_the_color():
    image = draw(Scene((Thing("circle", "red", 0.25, 0.5, 0.2),), "gray"), height=48, width=96)
    assert image.shape == (48, 96, 3) and image.dtype == np.uint8
    assert tuple(image[24, 24]) == COLORS["red"] and tuple(image[24, 72]) == BACKGROUNDS["gray"]


@pytest.mark.parametrize("height, width, n", [(64, 64, 40), (128, 128, 15), (256, 256, 6), (64, 96, 15),
                                              (96, 64, 15)])
def test_ground_truths_are_read_back_and_judged_right(height, width, n):
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for scene in scenes(kind, n, seed=height + width):
            image = draw(scene, height, width)
            assert same_things(read(image), scene.things)
            assert judge(image, caption(scene, rng, kind)) and judge(image, caption(scene, rng))


def test_every_look_is_read_right_on_every_background_at_the_smallest_size():
    for background in BACKGROUNDS:
        for color in COLORS.keys() - {background}:
            for shape in SHAPES:
                scene = Scene((Thing(shape, color, 0.41, 0.57, 0.13),), background)
                assert same_things(read(draw(scene)), scene.things), scene


@pytest.mark.parametrize("harm", ["blur", "noise", "both"])
def test_reading_survives_mild_blur_and_noise(harm):
    rng = np.random.default_rng(0)
    right = []
    for scene in scenes(None, 150):
        image = draw(scene)
        image = blur(blur(image)) if harm != "noise" else image
        image = np.clip(image + rng.normal(0, 12, image.shape), 0, 255) if harm != "blur" else image
        right.append(same_things(read(image), scene.things))
    assert np.mean(right) >= 0.99


def test_touching_objects_of_different_colors_are_read_apart():
    scene = Scene((Thing("square", "red", 0.35, 0.5, 0.2), Thing("circle", "blue", 0.7, 0.5, 0.2)), "white")
    assert same_things(read(draw(scene)), scene.things)


@pytest.mark.parametrize("shapes", [("circle", "circle"), ("square", "circle"), ("circle", "triangle")])
def test_touching_objects_of_one_color_are_read_apart(shapes):
    for color, background in (("red", "white"), ("white", "black"), ("blue", "gray")):
        left, right = Thing(shapes[0], color, 0.28, 0.5, 0.18), Thing(shapes[1], color, 0.62, 0.52, 0.17)
        assert sorted(t.shape for t in read(draw(Scene((left, right), background)))) == sorted(shapes)


def test_specks_and_scribbles_are_no_objects():
    image = draw(Scene((Thing("circle", "red", 0.6, 0.6, 0.2),), "white"))
    image[5:8, 5:8] = COLORS["blue"]
    image[2, :60] = image[:60, 2] = COLORS["black"]
    assert [t.shape for t in read(image)] == ["circle"]


def test_an_array_that_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="H, W, 3"):
        read(np.zeros((3, 64, 64)))


# What must be judged wrong

@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_picture_is_always_wrong(kind):
    rng = np.random.default_rng(0)
    for scene in scenes(kind, 50):
        verdict = judge(draw(replace(scene, things=())), caption(scene, rng, kind))
        assert not (verdict.ok or verdict.loose or verdict.shape or verdict.color or verdict.count)


def test_swapped_colors_fail_color_attribution_and_nothing_else():
    rng = np.random.default_rng(0)
    for scene in scenes("color_attr", 40):
        a, b = scene.things
        image = draw(Scene((replace(a, color=b.color), replace(b, color=a.color)), scene.background))
        verdict = judge(image, caption(scene, rng, "color_attr"))
        assert not verdict.ok and verdict.shape and verdict.color and verdict.count
        assert judge(image, caption(scene, rng, "two"))


def test_another_color_or_shape_is_wrong():
    rng = np.random.default_rng(0)
    for scene in scenes("colors", 20):
        thing, text = scene.things[0], caption(scene, rng, "colors")
        for color in COLORS.keys() - {thing.color, scene.background}:
            assert not judge(draw(replace(scene, things=(replace(thing, color=color),))), text)
        for shape in set(SHAPES) - {thing.shape}:
            assert not judge(draw(replace(scene, things=(replace(thing, shape=shape),))), text)


def test_one_object_more_or_less_fails_counting():
    rng = np.random.default_rng(0)
    words = ["one", "two", "three", "four"]
    for scene in scenes("counting", 40):
        image, (word, *rest) = draw(scene), caption(scene, rng, "counting").split()
        for other in set(words[1:]) - {word}:
            assert not judge(image, " ".join([other, *rest]))
        assert not judge(draw(replace(scene, things=scene.things[1:])), " ".join([word, *rest]))


def test_the_wrong_side_is_wrong():
    rng = np.random.default_rng(0)
    for scene in scenes("position", 30):
        request = parse(caption(scene, rng, "position"))
        for height, width in ((64, 64), (64, 96), (96, 64)):
            image = draw(scene, height, width)
            assert judge(image, request)
            assert not judge(image, replace(request, relation=MIRRORED[request.relation]))
            assert not judge(image, replace(request, asks=request.asks[::-1]))


def test_nearly_coinciding_centres_have_no_relation():
    image = draw(Scene((Thing("ring", "red", 0.5, 0.5, 0.4), Thing("circle", "blue", 0.53, 0.5, 0.12)), "white"))
    assert {t.shape for t in read(image)} == {"ring", "circle"}
    for relation in RELATIONS:
        assert not judge(image, f"a circle {relation} a ring")


def test_the_loose_judgement_ignores_extra_objects():
    image = draw(Scene((Thing("circle", "red", 0.3, 0.3, 0.2), Thing("star", "blue", 0.7, 0.7, 0.2)), "white"))
    assert judge(image, "a red circle").loose and not judge(image, "a red circle")
    assert judge(image, "a red circle and a blue star")


def test_the_loose_judgement_ignores_the_size_the_place_and_the_background():
    image = draw(Scene((Thing("circle", "red", 0.25, 0.5, 0.18),), "white"))
    for right, wrong in (("a small red circle", "a large red circle"),
                         ("a red circle on the left", "a red circle on the right"),
                         ("a red circle on a white background", "a red circle on a black background")):
        assert judge(image, right)
        assert judge(image, wrong).loose and not judge(image, wrong)


def all_shapes(height: int, width: int, color: str = "blue") -> np.ndarray:
    """All six shapes in one picture: the loose judgement calls it right for many captions."""
    places = [((i % 3 + 0.5) / 3, (i // 3 + 0.5) / 2) for i in range(6)]
    return draw(Scene(tuple(Thing(s, color, x, y, 0.14) for s, (x, y) in zip(SHAPES, places)), "white"), height, width)


SIDES = [(64, 64), (128, 128), (256, 256), (64, 96)]


@pytest.mark.parametrize("height, width", SIDES)
def test_pictures_that_know_no_prompt_score_0_on_the_benchmark(height, width):
    rng = np.random.default_rng(0)
    pictures = [all_shapes(height, width), draw(dense_scene(rng), height, width),
                rng.integers(0, 256, (height, width, 3)).astype(np.uint8),                      # noise
                np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((height // 8, width // 8)))[..., None] * [0, 0, 255]]
    pictures += [draw(Scene((), background), height, width) for background in BACKGROUNDS]
    requests = [parse(prompt) for prompt in {row["prompt"] for row in make_bench()}]
    for picture in pictures:
        (things, more), background = look(picture), read_background(picture)
        verdicts = [verdict(things, background, request, height, width, more) for request in requests]
        assert not any(verdicts) and judge(picture, requests[0]) == verdicts[0]
        assert picture is not pictures[0] or any(verdict.loose for verdict in verdicts)


def add_scribble(image: np.ndarray, color: np.ndarray) -> np.ndarray:
    """A frame of two pixels, like no shape of this world."""
    k = len(image) // 32
    image[k:2 * k, k:-k] = image[-2 * k:-k, k:-k] = image[k:-k, k:2 * k] = image[k:-k, -2 * k:-k] = color
    return image


def add_ghosts(image: np.ndarray, color: np.ndarray) -> np.ndarray:
    """All six shapes over the whole picture, too faint to be read."""
    faint = all_shapes(*image.shape[:2])[..., :1] < 128
    return np.where(faint, 0.6 * image + 0.4 * color, image)


def add_confetti(image: np.ndarray, color: np.ndarray) -> np.ndarray:
    """A grid of specks, each too small to be read."""
    k = len(image) // 32
    y, x = np.indices(image.shape[:2]) // k
    return np.where(((y % 4 == 1) & (x % 4 == 1))[..., None], color, image)


def add_stripes(image: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Objects of two colours, in stripes."""
    stripes = np.arange(len(image))[:, None, None] * 8 // len(image) % 2 == 1
    return np.where(stripes & (image != image[0, 0]).any(-1, keepdims=True), color, image)


@pytest.mark.parametrize("harm", [add_scribble, add_ghosts, add_confetti, add_stripes])
@pytest.mark.parametrize("height, width", SIDES)
def test_a_right_picture_with_something_more_is_wrong(harm: Callable, height: int, width: int):
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for scene in scenes(kind, 4 if height == width == 64 else 1):
            unlike = {t.color for t in scene.things} | {scene.background}
            color = np.array(COLORS[next(c for c in ("blue", "red", "green", "orange") if c not in unlike)])
            image = draw(scene, height, width)
            assert judge(image, text := caption(scene, rng, kind)) and not judge(harm(image.copy(), color), text)


# The continuous measure

@pytest.mark.parametrize("height, width", SIDES)
def test_drawings_measure_near_1(height, width):
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for scene in scenes(kind, 5):
            measured = measure(draw(scene, height, width), caption(scene, rng))
            assert min(astuple(measured)) > 0.85 and measured.quality == pytest.approx(measured.overlap)


def test_quality_counts_what_is_missing_more_or_wrong():
    circle, star = Thing("circle", "red", 0.3, 0.3, 0.2), Thing("star", "blue", 0.7, 0.7, 0.2)
    image = draw(Scene((circle, star), "white"))
    both = measure(image, "a circle and a star").quality
    assert both > 0.95 and measure(image, "a red circle and a blue star").quality == both
    assert measure(image, "a circle").quality == pytest.approx(both / 2, abs=0.02)                   # one more
    assert measure(image, "two circles").quality == pytest.approx(both * 0.8, abs=0.1)               # a wrong shape
    assert measure(image, "a blue circle").quality < measure(image, "a circle").quality              # a wrong colour
    assert measure(image, "three blue stars").quality == pytest.approx(both / 3, abs=0.02)           # two missing
    assert measure(draw(Scene((), "gray")), "a circle").quality == 0


def test_every_measure_falls_with_its_own_fault():
    image = draw(Scene((Thing("square", "red", 0.4, 0.4, 0.25),), "gray")).astype(np.float32)
    whole = measure(image, "a square")
    wobbly = image.copy()
    wobbly[20:30, 12:18] = BACKGROUNDS["gray"]
    assert measure(wobbly, "a square").overlap < whole.overlap - 0.05
    blurred = measure(blur(blur(blur(image))), "a square")
    assert blurred.sharpness < whole.sharpness - 0.2 and blurred.overlap == pytest.approx(whole.overlap, abs=0.03)
    pale = image.copy()
    pale[(image != BACKGROUNDS["gray"]).any(-1)] = (225, 80, 80)
    assert measure(pale, "a square").color < whole.color - 0.3
    uneven = np.where((image == BACKGROUNDS["gray"]).all(-1, keepdims=True), np.linspace(98, 158, 64)[:, None], image)
    assert measure(uneven, "a square").background < whole.background - 0.1


def test_two_objects_of_one_shape_cannot_be_asked_for_by_name():
    with pytest.raises(ValueError, match="one shape"):
        judge(np.zeros((64, 64, 3), np.uint8), "a red circle and a blue circle")
