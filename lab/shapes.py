"""A captioned world of drawn shapes, and the exact scorer that reads its pictures back.

    scene --caption--> "a red circle left of a blue square" --parse--> Request --.
      '-----draw-----> (H, W, 3) uint8 ------------------------read--> Things --judge--> right or wrong

`judge` says right or wrong; `measure` says how good, in numbers from 0 to 1. Nothing here is learned, so a score
measures the model under study and not a detector. The six kinds of scene and the rules of `judge` are those of GenEval
(arXiv 2310.11513), made strict. Start at `random_scene`, `caption`, `draw`, `judge`.
Coordinates: x and y are fractions of width and height, y points down; radii are fractions of the image's SHORT
side, so that one scene can be drawn at any size and aspect ratio.

    python -m lab.shapes show --out sheet.png     # a contact sheet with captions
    python -m lab.shapes check --n 1000           # how many ground truths the scorer reads right
    python -m lab.shapes bench                    # writes lab/bench.jsonl again
    python -m lab.shapes calibrate                # what the judge finds in drawings and in a model's pictures
"""

import json
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {"red": (225, 30, 35), "orange": (255, 135, 0), "yellow": (250, 230, 30), "green": (25, 155, 60),
          "blue": (30, 80, 230), "purple": (150, 40, 200), "white": (255, 255, 255), "black": (0, 0, 0)}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}

# GenEval's categories, and how often each is drawn if the caller names none. Models learn sides last, so "position" is
# drawn most.
KINDS = {"single": 0.15, "two": 0.13, "counting": 0.17, "colors": 0.15, "position": 0.27, "color_attr": 0.13}
RADII = {1: (0.17, 0.34), 2: (0.15, 0.22), 3: (0.14, 0.18), 4: (0.13, 0.16)}     # by the number of objects
MARGIN = 0.02                                                                   # between an object and the frame

# What split "train" never shows: every shape lacks one colour, one place, one number and one partner. The benchmark's
# unseen half asks for these combinations.
HELD_OUT_LOOKS = frozenset({("circle", "purple"), ("square", "orange"), ("triangle", "blue"), ("star", "green"),
                            ("ring", "yellow"), ("cross", "red")})
HELD_OUT_PLACES = frozenset({("circle", "on the left"), ("square", "at the top"), ("triangle", "on the right"),
                             ("star", "at the bottom"), ("ring", "in the centre"), ("cross", "at the top")})
HELD_OUT_COUNTS = frozenset({("circle", 4), ("square", 2), ("triangle", 3), ("star", 2), ("ring", 3), ("cross", 4)})
HELD_OUT_PAIRS = frozenset({("circle", "star"), ("ring", "square"), ("cross", "triangle")})      # in alphabetic order


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


# -------------------------------------------------------------------------------------------------------- scenes

def is_held_out(scene: Scene) -> bool:
    """Whether split "train" leaves this scene out."""
    things = scene.things
    names = sorted({t.shape for t in things})
    alone = len(things) == 1 and any(is_at(things[0], place) and (names[0], place) in HELD_OUT_PLACES
                                     for place in PLACES)
    alike = len(names) == 1 and (names[0], len(things)) in HELD_OUT_COUNTS
    return (alone or alike or any((t.shape, t.color) in HELD_OUT_LOOKS for t in things)
            or any(pair in HELD_OUT_PAIRS for pair in combinations(names, 2)))


def random_scene(rng: np.random.Generator, kind: str | None = None, split: str = "all", neat: bool = False,
                 numbers: tuple[int, ...] = (2, 3, 4)) -> Scene:
    """A scene of one of the `KINDS`; split "train" shows nothing held out, "unseen" only that, "all" both.

    neat: one object lies in the middle of the picture or of a side, two lie on opposite sides.
    numbers: what the number of a counting scene is drawn from; one that is listed twice is drawn twice as often.
    """
    if split not in ("train", "unseen", "all"):
        raise ValueError(f"split is 'train', 'unseen' or 'all', not {split!r}")
    if kind is None:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    elif kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    while True:
        background = _pick(rng, BACKGROUNDS)
        colors = [c for c in COLORS if c != background]
        if kind in ("single", "colors"):
            looks = [(_pick(rng, SHAPES), _pick(rng, colors))]
        elif kind == "counting":
            looks = [(_pick(rng, SHAPES), _pick(rng, colors))] * _pick(rng, numbers)
        else:
            looks = list(zip(rng.permutation(SHAPES)[:2].tolist(), (_pick(rng, colors), _pick(rng, colors))))
        radii = rng.uniform(*RADII[len(looks)], len(looks))
        things = _line_up(rng, looks, radii) if neat else _spread(rng, looks, radii)
        scene = Scene(things, background)
        if (len(things) == len(looks) and split in ("all", "unseen" if is_held_out(scene) else "train")
                and not (kind == "color_attr" and things[0].color == things[1].color)
                and not (kind == "position" and clear_relation(*things) is None)):
            return scene


def dense_scene(rng: np.random.Generator) -> Scene:
    """6 to 12 small objects of any look: an autoencoder learns most from edges, and these pictures have many."""
    while True:
        background = _pick(rng, BACKGROUNDS)
        colors = [c for c in COLORS if c != background]
        looks = [(_pick(rng, SHAPES), _pick(rng, colors)) for _ in range(12)]
        radii = 0.08 + 0.08 * np.sort(rng.random(12) ** 2)[::-1]        # mostly small ones, the large ones first
        things = _spread(rng, looks, radii)
        if len(things) >= 6:
            return Scene(things, background)


def _pick(rng: np.random.Generator, options: Iterable) -> Any:
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def _spread(rng: np.random.Generator, looks: list[tuple[str, str]], radii: np.ndarray) -> tuple[Thing, ...]:
    """Places the objects that fit within 20 tries each, inside the frame and with a clear gap between any two."""
    things: list[Thing] = []
    for (shape, color), r in zip(looks, radii.tolist()):
        for x, y in rng.uniform(r + MARGIN, 1 - r - MARGIN, (20, 2)).tolist():
            # 1.15: a square's corner reaches 1.13 radii. A wider image only pulls the centres further apart.
            if all(np.hypot(x - t.x, y - t.y) > 1.15 * (r + t.r) + 0.03 for t in things):
                things.append(Thing(shape, color, x, y, r))
                break
    return tuple(things)


def _line_up(rng: np.random.Generator, looks: list[tuple[str, str]], radii: np.ndarray) -> tuple[Thing, ...]:
    """One or two objects near the middle of the picture or of its sides; radii are at most 0.2."""
    slots = {1: [[(0.5, 0.5)], [(0.25, 0.5)], [(0.75, 0.5)], [(0.5, 0.25)], [(0.5, 0.75)]],
             2: [[(0.25, 0.5), (0.75, 0.5)], [(0.75, 0.5), (0.25, 0.5)], [(0.5, 0.25), (0.5, 0.75)],
                 [(0.5, 0.75), (0.5, 0.25)]]}[len(looks)]
    centres = np.array(_pick(rng, slots)) + rng.uniform(-0.02, 0.02, (len(looks), 2))
    return tuple(Thing(shape, color, x, y, min(r, 0.2)) for (shape, color), (x, y), r
                 in zip(looks, centres.tolist(), radii.tolist()))


# ------------------------------------------------------------------------------------------------------ captions

COUNTS = {2: "two", 3: "three", 4: "four"}
SIZES = ("small", "large")
PLACES = ("in the centre", "on the left", "on the right", "at the top", "at the bottom")
RELATIONS = ("left of", "right of", "above", "below")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
# The plain words that `phrase` uses first, and the words that may replace them.
SYNONYMS = {"and": ("with", "next to"), "left of": ("to the left of",), "right of": ("to the right of",),
            "above": ("over",), "below": ("under",), "on the left": ("on the left side",),
            "on the right": ("on the right side",), "in the centre": ("in the middle",), "on a": ("against a",)}
PREFIX = "a picture of "
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys(" ".join(
    ["a an", *COUNTS.values(), *SIZES, *COLORS, *SHAPES, *PLURALS.values(), *RELATIONS, *PLACES,
     *BACKGROUNDS, "background", PREFIX, *SYNONYMS, *(word for words in SYNONYMS.values() for word in words)]).split()))


@dataclass(frozen=True)
class Ask:
    """One noun of a caption. None: the caption does not say."""
    shape: str
    color: str | None = None
    count: int = 1
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Request:
    """What a caption asks for; `relation` is that of the first noun to the second."""
    asks: tuple[Ask, ...]
    relation: str | None = None
    background: str | None = None


def caption(scene: Scene, rng: np.random.Generator, kind: str | None = None, where: bool = False,
            colored: float = 0.82) -> str:
    """One of many true captions; with a `kind`, the one that GenEval would ask in that category ("a circle")."""
    return phrase(describe(scene, rng, kind, where, colored), rng if kind is None else None)


def describe(scene: Scene, rng: np.random.Generator, kind: str | None = None, where: bool = False,
             colored: float = 0.82) -> Request:
    """The request of a `caption`: a random choice of true statements about the scene.

    where: always say where one or two objects lie, by places or by a relation, if that is clear.
    colored: the share of captions that name colours.
    """
    things, n = scene.things, len(scene.things)
    says = lambda p: kind is None and rng.random() < p
    color = says(colored) or kind in ("colors", "color_attr")
    background = scene.background if says(0.2) else None
    ask = lambda t, **more: Ask(t.shape, t.color if color else None, **more)
    place = lambda t: next((p for p in PLACES if is_at(t, p, clearly=True)), None)
    if n == 1:
        sizes = [s for s in SIZES if has_size(things[0], s, clearly=True) and says(0.25)]
        said = place(things[0]) if says(0.6) or where else None
        return Request((ask(things[0], size=(sizes or [None])[0], place=said),), None, background)
    if n <= 4 and len({(t.shape, t.color) for t in things}) == 1:
        return Request((ask(things[0], count=n),), None, background)
    if n == 2:
        a, b = things if rng.random() < 0.5 else things[::-1]
        relation = clear_relation(a, b) if says(0.65) or kind == "position" else None
        # without a relation, the place of each object may be said, which means the same
        places = [place(t) if relation is None and (says(0.8) or where) else None for t in (a, b)]
        return Request(tuple(ask(t, place=p if (t.shape, p) not in HELD_OUT_PLACES else None)
                             for t, p in zip((a, b), places)), relation, background)
    raise ValueError(f"the grammar has no sentence for {n} different objects")


def has_size(thing: Thing, size: str, clearly: bool = False) -> bool:
    """clearly: with a gap between small and large, in which captions name no size."""
    small, large = (0.22, 0.29) if clearly else (0.255, 0.255)
    return thing.r < small if size == "small" else thing.r > large


def is_at(thing: Thing, place: str, clearly: bool = False) -> bool:
    """clearly: as captions need it; the judge accepts objects that are less clearly at the place."""
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if place == "in the centre":
        return max(abs(dx), abs(dy)) < (0.08 if clearly else 0.12)
    along, across = {"on the left": (-dx, dy), "on the right": (dx, dy),
                     "at the top": (-dy, dx), "at the bottom": (dy, dx)}[place]
    return along > (0.13 if clearly else 0.09) and along > (1.3 if clearly else 1.0) * abs(across)


def clear_relation(a: Thing, b: Thing) -> str | None:
    """Where a lies, seen from b, if one axis clearly dominates and the objects don't overlap on it."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > max(a.r + b.r, 1.6 * abs(dy)):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > max(a.r + b.r, 1.6 * abs(dx)):
        return "above" if dy < 0 else "below"
    return None


def phrase(request: Request, rng: np.random.Generator | None = None) -> str:
    """The caption of a request, in its plain words or, with a generator, in any of its words; `parse` undoes it."""
    def noun(ask: Ask) -> str:
        words = [ask.size, ask.color, ask.shape if ask.count == 1 else PLURALS[ask.shape], ask.place]
        rest = " ".join(w for w in words if w)
        return f"{COUNTS.get(ask.count, 'an' if rest.startswith('orange') else 'a')} {rest}"
    text = f" {request.relation or 'and'} ".join(map(noun, request.asks))
    text = text if request.background is None else f"{text} on a {request.background} background"
    if rng is not None:
        for plain, others in SYNONYMS.items():
            if f" {plain}" in text and rng.random() < 0.4:
                text = text.replace(f" {plain}", f" {_pick(rng, others)}")
        text = PREFIX * (rng.random() < 0.2) + text
    return text


def _plain(text: str) -> str:
    """A caption in its plain words."""
    for plain, others in SYNONYMS.items():
        text = re.sub(rf"\b({'|'.join(others)})\b", plain, text)
    return text.removeprefix(PREFIX)


def alter(request: Request, rng: np.random.Generator, sides: bool = False) -> Request:
    """The request with one thing changed: a colour, shape, number, size, place, side, background, or colours swapped.

    sides: change a place or the relation; if the request has neither, add one.
    The result is a hard negative for contrastive training: mostly false of a scene of which the request is true.
    """
    asks, k = list(request.asks), int(rng.integers(len(request.asks)))
    other = lambda options, not_these: _pick(rng, [o for o in options if o not in not_these])
    ways = ["shape"] + [name for name in ("color", "size", "place") if getattr(asks[k], name)]
    ways += ["count"] * (asks[k].count > 1) + ["background"] * (request.background is not None)
    ways += ["relation", "relation"] * (request.relation is not None)
    ways += ["swap", "swap"] * (len({ask.color for ask in asks}) == 2)
    if sides:
        unsaid = ["relation"] if len(asks) == 2 else ["place"] if asks[0].count == 1 else ways
        ways = [w for w in ways if w in ("place", "relation")] or unsaid
    way = _pick(rng, ways)
    if way == "swap":
        asks = [replace(asks[0], color=asks[1].color), replace(asks[1], color=asks[0].color)]
    elif way == "relation":
        return replace(request, relation=other(RELATIONS, [request.relation]))
    elif way == "background":
        return replace(request, background=other(BACKGROUNDS, [request.background]))
    else:
        options = {"shape": SHAPES, "color": COLORS, "size": SIZES, "place": PLACES, "count": COUNTS}[way]
        taken = [ask.shape for ask in asks] if way == "shape" else [getattr(asks[k], way)]
        asks[k] = replace(asks[k], **{way: other(options, taken)})
    return replace(request, asks=tuple(asks))


def hard_captions(scene: Scene, n: int, rng: np.random.Generator) -> list[str]:
    """The true caption that says most of a scene, then n - 1 false ones with the same shapes and other attributes."""
    a, b = scene.things[0], scene.things[-1]
    said = [next((s for s in SIZES if has_size(a, s, clearly=True)), None),
            next((p for p in PLACES if is_at(a, p, clearly=True)), None)] if len(scene.things) == 1 else [None, None]
    one = Ask(a.shape, a.color, 1 if a.shape != b.shape else len(scene.things), *said)
    pair = a.shape != b.shape
    truth = Request((one, Ask(b.shape, b.color)) if pair else (one,), clear_relation(a, b) if pair else None,
                    scene.background)
    captions = [phrase(truth)]
    while len(captions) < n:
        draw_new = lambda old, options: _pick(rng, options) if rng.random() < 0.4 else old
        asks = [replace(ask, color=draw_new(ask.color, COLORS)) for ask in truth.asks]
        if pair and rng.random() < 0.3:
            asks = [replace(asks[0], color=asks[1].color), replace(asks[1], color=asks[0].color)]
        if not pair and len(scene.things) > 1:
            asks = [replace(asks[0], count=draw_new(one.count, COUNTS))]
        if len(scene.things) == 1:
            asks = [replace(asks[0], size=draw_new(one.size, SIZES), place=draw_new(one.place, PLACES))]
        relation = draw_new(truth.relation, RELATIONS) if pair else None
        other = Request(tuple(asks), relation, draw_new(truth.background, BACKGROUNDS))
        if phrase(other) not in captions and not is_true(other, scene):
            captions.append(phrase(other))
    return captions


def _one_of(words: Iterable[str]) -> str:
    return "(" + "|".join(words) + ")"


_NOUN = (f"{_one_of(['a', 'an', *COUNTS.values()])} (?:{_one_of(SIZES)} )?(?:{_one_of(COLORS)} )?"
         f"{_one_of([*PLURALS.values(), *SHAPES])}(?: {_one_of(PLACES)})?")
_CAPTION = re.compile(f"{_NOUN}(?: {_one_of(['and', *RELATIONS])} {_NOUN})?"
                      f"(?: on a {_one_of(BACKGROUNDS)} background)?")


def parse(text: str) -> Request:
    """The request a caption makes. ValueError names the words it does not know, or the reading that failed."""
    if unknown := [w for w in text.split() if w not in VOCABULARY]:
        raise ValueError(f"unknown words {', '.join(map(repr, unknown))}; known are {' '.join(VOCABULARY)}")
    text = _plain(text)
    if (match := _CAPTION.fullmatch(text)) is None:
        raise ValueError(f"cannot read {text!r}; captions look like 'a red circle left of a blue square'")
    *nouns, background = match.groups()
    count_of = {word: n for n, word in COUNTS.items()}
    shape_of = {word: shape for shape, word in PLURALS.items()}
    asks = tuple(Ask(shape_of.get(shape, shape), color, count_of.get(number, 1), size, place)
                 for number, size, color, shape, place in (nouns[:5], nouns[6:]) if shape)
    request = Request(asks, None if nouns[5] == "and" else nouns[5], background)
    if phrase(request) != text:
        raise ValueError(f"cannot read {text!r}; did you mean {phrase(request)!r}?")
    return request


# ------------------------------------------------------------------------------------------------------- drawing

def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside; x and y in radii from the centre, y down. Each shape's
    centre is its centre of mass, which `read` relies on."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78) - 0.22
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - 1, y - 0.3), np.maximum(x - 0.3, y - 1))
    if shape == "triangle":
        return np.maximum(y, np.sqrt(0.75) * np.abs(x) - 0.5 * y) - 0.5
    if shape == "star":     # fold the plane onto half a ray, then it is one line from the tip (1, 0) to the notch
        turn = np.pi / 5
        angle = np.abs((np.arctan2(x, -y) + turn) % (2 * turn) - turn)
        notch_x, notch_y = 0.45 * np.cos(turn), 0.45 * np.sin(turn)
        q = np.hypot(x, y)
        along, across = q * np.cos(angle) - 1, q * np.sin(angle)
        return (along * notch_y + across * (1 - notch_x)) / np.hypot(notch_y, 1 - notch_x)
    raise ValueError(f"shape is one of {', '.join(SHAPES)}, not {shape!r}")


def draw(scene: Scene, height: int = 64, width: int = 64) -> np.ndarray:
    """(H, W, 3) uint8, anti-aliased: a pixel's share of an object falls from 1 to 0 over one pixel of distance."""
    image = np.empty((height, width, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for t in scene.things:
        cx, cy, r = t.x * width, t.y * height, t.r * min(height, width)
        x0, x1 = max(int(cx - 1.1 * r), 0), min(int(cx + 1.1 * r) + 2, width)
        y0, y1 = max(int(cy - 1.1 * r), 0), min(int(cy + 1.1 * r) + 2, height)
        x = (np.arange(x0, x1, dtype=np.float32) + 0.5 - cx) / r
        y = (np.arange(y0, y1, dtype=np.float32) + 0.5 - cy) / r
        share = np.clip(0.5 - r * distance(t.shape, x[None, :], y[:, None]), 0, 1)[..., None]
        patch = image[y0:y1, x0:x1]
        patch += share * (np.array(COLORS[t.color], np.float32) - patch)
    return np.round(image).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------- reading

_GRID = (np.arange(480) - 239.5) / 200      # pixels of 1/200 radius: areas by counting them, in squared radii
AREAS = {s: float((distance(s, _GRID[None, :], _GRID[:, None]) < 0).sum() / 200 ** 2) for s in SHAPES}


CLEAR_OVERLAP = 0.8                         # a region that is less like its best shape may be two that touch


def _border_color(image: np.ndarray) -> np.ndarray:
    return np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)


def _classes(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W): 0 for background, else 1 + the index of the palette colour that a pixel shows.

    Edges are mixtures: that of a white circle on black is gray, that of a yellow one olive. So the pixel is compared
    with all mixtures of the background and one colour; it is the object's if the nearest is more than half this colour.
    """
    background = _border_color(image)
    offset = image - background
    rays = np.array(list(COLORS.values()), np.float32) - background                       # (8, 3)
    length = (rays ** 2).sum(1)
    share = np.clip(offset @ rays.T / np.maximum(length, 1), 0, 1)                        # (H, W, 8)
    error = ((offset[..., None, :] - share[..., None] * rays) ** 2).sum(-1)
    error[..., length < 50 ** 2] = np.inf                                                 # the background's own
    best = error.argmin(-1)
    return np.where(np.take_along_axis(share, best[..., None], -1)[..., 0] > 0.5, best + 1, 0)


def _components(classes: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W): every pixel named by the least pixel index of its 4-connected region of one class."""
    names = np.arange(classes.size).reshape(classes.shape)
    down, right = classes[1:] == classes[:-1], classes[:, 1:] == classes[:, :-1]
    while True:
        before = names.copy()
        for near, far, same in ((names[:-1], names[1:], down), (names[:, :-1], names[:, 1:], right)):
            np.minimum(near, far, out=far, where=same)
            np.minimum(near, far, out=near, where=same)
        names = names.reshape(-1)[names]        # a name is a pixel of the same region: take that pixel's own
        if np.array_equal(names, before):
            return names


@dataclass(frozen=True)
class Region:
    """A patch of one colour, and the shape that it is most like at its own area and centre (pixels)."""
    mask: np.ndarray                                                    # (h, w) bool
    color: str
    shape: str
    overlaps: dict[str, float]                                          # with each shape: intersection over union
    x: float
    y: float
    r: float

    @property
    def overlap(self) -> float:
        return self.overlaps[self.shape]


def _fit(mask: np.ndarray, color: str) -> Region:
    """The region (h, w) bool with the shape that it is most like, by the mean square distance of what sticks out."""
    ys, xs = np.nonzero(mask)
    x, y, overlaps, fits = float(xs.mean()), float(ys.mean()), {}, []
    for shape in SHAPES:
        r = float(np.sqrt(len(xs) / AREAS[shape]))
        outside = r * np.maximum(distance(shape, (xs - x) / r, (ys - y) / r), 0)
        inside = float((outside == 0).mean())                           # the areas being equal
        overlaps[shape] = inside / (2 - inside)
        fits.append((float((outside ** 2).mean()), -overlaps[shape], shape, r))
    *_, shape, r = min(fits)
    return Region(mask, color, shape, overlaps, x, y, r)


def _split(mask: np.ndarray, smallest: float) -> list[np.ndarray]:
    """The touching parts of a region: eroded until it falls apart, then each pixel joins the nearest part. [mask] if it
    never falls into parts of at least a third of `smallest` pixels."""
    core = mask
    while core.any():
        names, areas = np.unique(regions := _components(core.astype(int)), return_counts=True)
        seeds = [regions == name for name, area in zip(names, areas)
                 if core.reshape(-1)[name] and area >= smallest / 3]
        if len(seeds) > 1:
            ys, xs = np.nonzero(mask)
            gaps = []
            for seed in seeds:
                sy, sx = np.nonzero(seed)
                gaps.append(((ys[:, None] - sy) ** 2 + (xs[:, None] - sx) ** 2).min(axis=1))
            parts = np.zeros((len(seeds), *mask.shape), bool)
            parts[np.argmin(gaps, axis=0), ys, xs] = True
            return list(parts)
        core = _erode(core)
    return [mask]


def _erode(mask: np.ndarray, outside: bool = False) -> np.ndarray:
    """The mask (h, w) without the pixels that have a neighbour, above, below or beside, that isn't in it."""
    p = np.pad(mask, 1, constant_values=outside)
    return mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]


def shrink(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) of values 0..255 -> float32, averaged down to a short side of 64..127 pixels.

    Noise goes, and one set of thresholds serves every size.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an image of shape (H, W, 3) with values 0..255, not {image.shape}")
    f = max(min(image.shape[:2]) // 64, 1)
    h, w = image.shape[0] // f, image.shape[1] // f
    return image[:h * f, :w * f].astype(np.float32).reshape(h, f, w, f, 3).mean((1, 3))


def find_regions(small: np.ndarray, min_area: float = 0.006, min_overlap: float = 0.5) -> list[Region]:
    """The regions of a picture from `shrink`, the largest first; those below `min_area` are specks and left out.

    Objects of one colour that touch are told apart if their parts are more like shapes than the whole is.
    """
    classes = _classes(small)
    names, areas = np.unique(patches := _components(classes), return_counts=True)
    smallest = min_area * min(small.shape[:2]) ** 2
    found: list[Region] = []
    for name, area in zip(names, areas):
        label = classes.reshape(-1)[name]
        if label == 0 or area < smallest:
            continue
        color = list(COLORS)[label - 1]
        fits = [_fit(patches == name, color)]
        if fits[0].overlap < CLEAR_OVERLAP:
            parts = [_fit(part, color) for part in _split(fits[0].mask, smallest)]
            if min(part.overlap for part in parts) > max(fits[0].overlap, min_overlap):
                fits = parts
        found += [region for region in fits if region.mask.sum() >= smallest]
    return sorted(found, key=lambda region: -region.mask.sum())


def read(image: np.ndarray, min_area: float = 0.006, min_overlap: float = 0.5) -> list[Thing]:
    """The objects in a picture (H, W, 3) of values 0..255, the largest first.

    A region smaller than `min_area` (of the short side squared) is a speck; one that overlaps its best shape by
    less than `min_overlap` (intersection over union) is no object of this world.
    """
    small = shrink(image)
    return things_of(find_regions(small, min_area, min_overlap), *small.shape[:2], min_overlap)


def things_of(regions: list[Region], h: int, w: int, min_overlap: float = 0.5) -> list[Thing]:
    """The regions of an (h, w) picture that are objects, in fractions of its size."""
    return [Thing(region.shape, region.color, (region.x + 0.5) / w, (region.y + 0.5) / h, region.r / min(h, w))
            for region in regions if region.overlap >= min_overlap]


# ------------------------------------------------------------------------------------------------------- judging

@dataclass(frozen=True)
class Verdict:
    """`ok` is the judgement: the picture shows what was asked and nothing more. `loose` is GenEval's own.

    The rest says what went wrong: whether all asked shapes are there, all asked colours are there (on whatever
    shape), every shape is there as often as asked, and the relation holds.
    """
    ok: bool
    loose: bool
    shape: bool
    color: bool
    count: bool
    relation: bool

    def __bool__(self) -> bool:
        return self.ok


def relations(a: Thing, b: Thing, height: int, width: int) -> set[str]:
    """Where a lies, seen from b, by GenEval's rule; an object's box is two radii wide and high. One relation along each
    axis may hold; none does if the boxes nearly coincide."""
    short = min(height, width)
    offset = np.array([(a.x - b.x) * width, (a.y - b.y) * height])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * 2 * (a.r + b.r) * short, 0)
    if not shrunk.any():
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)          # by the length before shrinking, as in the released code
    tests = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {name for name, holds in zip(RELATIONS, tests) if holds}


def judge(image: np.ndarray, request: Request | str) -> Verdict:
    """Does the picture show what the caption asks for?

    `loose` follows GenEval's rules: every named shape is there, and from two on exactly as often as asked; of each
    shape only the first `count` objects are inspected (the largest, where GenEval takes the most confident), which
    must all have the colour and the relation. Objects of other shapes do not matter, nor does a second circle for
    "a circle". `ok` also wants the sizes, places and background that the caption names, and nothing more in the
    picture: no further object, no region that is like no shape, no `clutter`.
    """
    things, more = look(image)
    return verdict(things, read_background(image), parse(request) if isinstance(request, str) else request,
                   *image.shape[:2], more)


def look(image: np.ndarray) -> tuple[list[Thing], bool]:
    """The objects in a picture, the largest first, and whether it shows anything else."""
    small = shrink(image)
    regions = find_regions(small)
    things = things_of(regions, *small.shape[:2])
    return things, len(things) < len(regions) or clutter(small, regions) >= 0.01


def verdict(things: list[Thing] | tuple[Thing, ...], background: str, request: Request, height: int, width: int,
            more: bool = False) -> Verdict:
    """`judge` for known objects, in the order of a detector's confidence.

    more: whether the picture shows something beside these objects.
    """
    if len({ask.shape for ask in request.asks}) < len(request.asks):
        raise ValueError(f"GenEval's rules cannot tell two objects of one shape apart: {phrase(request)!r}")
    groups = [[t for t in things if t.shape == ask.shape] for ask in request.asks]
    tops = [group[:ask.count] for group, ask in zip(groups, request.asks)]
    counts = [len(g) == a.count if a.count > 1 else len(g) >= 1 for g, a in zip(groups, request.asks)]
    bound = all(t.color == a.color for top, a in zip(tops, request.asks) for t in top if a.color)
    relation = request.relation is None or (all(tops) and all(
        request.relation in relations(a, b, height, width) for a in tops[0] for b in tops[1]))
    loose = all(counts) and bound and relation
    ok = (loose and not more and len(things) == sum(ask.count for ask in request.asks)
          and all((a.size is None or has_size(t, a.size)) and (a.place is None or is_at(t, a.place))
                  for top, a in zip(tops, request.asks) for t in top)
          and request.background in (None, background))
    return Verdict(ok, loose, shape=all(groups), count=all(counts), relation=relation,
                   color=all(any(a.color in (None, t.color) for t in things) for a in request.asks))


def clutter(small: np.ndarray, regions: list[Region]) -> float:
    """What is neither background nor within two pixels of a region, as a share of the short side squared."""
    away = np.linalg.norm(small - _border_color(small), axis=-1) > 42
    return float((away & ~_grow(regions, small.shape[:2])).sum() / min(small.shape[:2]) ** 2)


def _grow(regions: list[Region], size: tuple[int, int], pixels: int = 2) -> np.ndarray:
    """(h, w) bool: the pixels of all regions, and those within this distance, in steps."""
    rest = ~np.logical_or.reduce([np.zeros(size, bool), *(region.mask for region in regions)])
    for _ in range(pixels):
        rest = _erode(rest, outside=True)
    return ~rest


@dataclass(frozen=True)
class Quality:
    """How well a picture shows what was asked, continuously: numbers in [0, 1], near 1 for a drawing."""
    quality: float          # overlap of the asked objects with their shapes, over the objects asked or found
    overlap: float          # mean overlap of the regions with the shape that each is most like
    sharpness: float        # mean steepness of the regions' edges, in parts of a drawing's
    color: float            # nearness of the regions' inner pixels to their palette colour
    background: float       # nearness of all pixels away from regions to the background's palette colour


def measure(image: np.ndarray, request: Request | str) -> Quality:
    """Measures a picture (H, W, 3) of values 0..255 at the scale of `shrink`.

    `quality` matches asked objects and regions one to one, so that the sum of overlaps is largest. A match counts the
    region's overlap with the asked shape, or 0 where a named colour is wrong. The sum is divided by the number of
    asked objects, or of regions if there are more.
    """
    request = parse(request) if isinstance(request, str) else request
    small = shrink(image)
    regions = find_regions(small)
    best = {(0,) * len(request.asks): 0.0}                              # regions used for each noun: largest sum
    for region in regions:
        for used, total in list(best.items()):
            for i, ask in enumerate(request.asks):
                if used[i] < ask.count and ask.color in (None, region.color):
                    one_more = (*used[:i], used[i] + 1, *used[i + 1:])
                    best[one_more] = max(best.get(one_more, 0.0), total + region.overlaps[ask.shape])
    rest = small[~_grow(regions, small.shape[:2])]
    mean = lambda numbers: float(np.mean(numbers)) if numbers else 0.0
    core = lambda mask: inner if (inner := _erode(mask)).any() else mask
    return Quality(quality=max(best.values()) / max(sum(ask.count for ask in request.asks), len(regions)),
                   overlap=mean([region.overlap for region in regions]),
                   sharpness=mean([_sharpness(small, region) for region in regions]),
                   color=mean([_nearness(small[core(region.mask)], COLORS[region.color]) for region in regions]),
                   background=_nearness(rest, BACKGROUNDS[read_background(image)]) if len(rest) else 0.0)


def _nearness(pixels: np.ndarray, color: tuple[int, int, int]) -> float:
    """1 for pixels (N, 3) of just this colour, 0 where they are 128 or more away on average."""
    return max(0.0, 1 - float(np.linalg.norm(pixels - np.array(color, np.float32), axis=-1).mean()) / 128)


def _sharpness(small: np.ndarray, region: Region) -> float:
    """How steep the region's edge is, in parts of that of a drawing of its shape, at most 1.

    Along a line across an edge, the sum of slopes is 1 and the sum of their squares is one over the edge's width. So
    the quotient of both sums is a steepness that does not depend on the outline's length. Both are smoothed first:
    otherwise it would matter much whether an edge falls between two pixels or on one.
    """
    h, w = small.shape[:2]
    background = _border_color(small)
    ray = np.array(COLORS[region.color], np.float32) - background
    near = _grow([region], (h, w))
    outline = distance(region.shape, (np.arange(w) - region.x)[None] / region.r,
                       (np.arange(h) - region.y)[:, None] / region.r)
    steepness = []
    for share in ((small - background) @ ray / (ray @ ray), 0.5 - region.r * outline):
        p = np.pad(np.clip(share, 0, 1), 1, mode="edge")
        p = p[:-2] + 2 * p[1:-1] + p[2:]
        share = (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) / 16
        slope = np.hypot(np.diff(share, axis=0, append=share[-1:]), np.diff(share, axis=1, append=share[:, -1:]))[near]
        steepness.append((slope ** 2).sum() / max(slope.sum(), 1e-6))
    return float(min(1.0, steepness[0] / steepness[1]))


def is_true(request: Request, scene: Scene) -> bool:
    """Whether a square drawing of the scene would be right for the request, strictly."""
    if sorted(t.shape for t in scene.things) != sorted(ask.shape for ask in request.asks for _ in range(ask.count)):
        return False                                  # nearly always, and much faster
    return verdict(scene.things, scene.background, request, 64, 64).ok


def read_background(image: np.ndarray) -> str:
    """The name nearest to the colour of the picture's border."""
    border = _border_color(image)
    return min(BACKGROUNDS, key=lambda name: np.abs(border - BACKGROUNDS[name]).sum())


def same_things(found: list[Thing], truth: tuple[Thing, ...], tolerance: float = 0.03) -> bool:
    """Whether two lists hold the same looks at the same places, in any order."""
    near = [[f for f in found if (f.shape, f.color) == (t.shape, t.color)
             and max(abs(f.x - t.x), abs(f.y - t.y), abs(f.r - t.r)) < tolerance] for t in truth]
    return len(found) == len(truth) and all(len(n) == 1 for n in near)


# ----------------------------------------------------------------------------------------------------- benchmark

BENCH_SIZES = {"single": 80, "two": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}   # GenEval's


def asks_held_out(request: Request) -> bool:
    """Whether a request names a look, place, number or pair that split "train" never shows."""
    names = tuple(sorted(ask.shape for ask in request.asks))
    return names in HELD_OUT_PAIRS or any(
        (ask.shape, ask.color) in HELD_OUT_LOOKS or (ask.shape, ask.place) in HELD_OUT_PLACES
        or (ask.shape, ask.count) in HELD_OUT_COUNTS for ask in request.asks)


def all_requests(kind: str) -> list[Request]:
    """Everything that one of GenEval's categories can ask in this world.

    GenEval's rule for a single object is its presence; the place is named to have more than six sentences.
    """
    looks = [Ask(s, c) for s in SHAPES for c in COLORS]
    if kind == "single":
        return [Request((Ask(s, place=p),)) for s in SHAPES for p in PLACES]
    if kind == "counting":
        return [Request((Ask(s, count=n),)) for s in SHAPES for n in COUNTS]
    if kind == "colors":
        return [Request((look,)) for look in looks]
    if kind in ("two", "position"):
        return [Request((Ask(a), Ask(b)), relation) for a, b in permutations(SHAPES, 2)
                for relation in (RELATIONS if kind == "position" else (None,))]
    return [Request((a, b)) for a, b in permutations(looks, 2) if a.shape != b.shape and a.color != b.color]


def make_bench(seed: int = 553) -> list[dict]:
    """The rows of `lab/bench.jsonl`: {"kind", "seen", "prompt"}, half of each kind held out of training.

    Where a category has fewer sentences than rows, sentences come again (with other noise, when sampled).
    """
    rng, rows = np.random.default_rng(seed), []
    for kind, size in BENCH_SIZES.items():
        for seen, n in ((True, (size + 1) // 2), (False, size // 2)):
            requests = [request for request in all_requests(kind) if asks_held_out(request) != seen]
            order = np.concatenate([rng.permutation(len(requests)) for _ in range(-(-n // len(requests)))])
            rows += [{"kind": kind, "seen": seen, "prompt": phrase(requests[i], rng)} for i in order[:n]]
    return rows


# -------------------------------------------------------------------------------------------------- command line

def show(path: str, columns: int = 6, size: int = 128) -> None:
    """Writes a contact sheet: one row per kind, each picture over its caption."""
    from lab.study import sheet  # only here: it needs torch
    rng = np.random.default_rng(0)
    scenes = {kind: [random_scene(rng, kind) for _ in range(columns)] for kind in KINDS}
    sheet([(kind, [draw(scene, size, size) for scene in row]) for kind, row in scenes.items()], Path(path),
          captions=[caption(scene, rng) for row in scenes.values() for scene in row])


def check(n: int) -> None:
    """Prints, per kind and size, the share of drawings whose objects are read back right and judged to fit."""
    for kind in KINDS:
        for height, width in ((64, 64), (128, 128), (256, 256), (64, 96)):
            rng = np.random.default_rng(0)
            scenes = [random_scene(rng, kind) for _ in range(n)]
            images = [draw(scene, height, width) for scene in scenes]
            right = [same_things(read(image), scene.things) and judge(image, caption(scene, rng)).ok
                     for image, scene in zip(images, scenes)]
            print(f"{kind:12s}{width:4d}x{height:<4d}  {np.mean(right):.4f}", flush=True)


def calibrate(model: str, n: int) -> None:
    """Prints what the judge finds in drawings, in the autoencoder's reconstructions of these, and in a model's own.

    Then, per number: its deviation between pictures of one kind, how many pictures give its mean within 0.01 (95 %),
    and how many per arm show a difference of 0.01 between two arms of different prompts (power 0.8). The model's own
    pictures are made in 20 steps with guidance 3.
    """
    import torch  # only here, so that the judge needs numpy alone

    from lab.evaluate import draw as draw_pictures
    from lab.evaluate import make_scenes, to_bytes
    from lab.study import markdown
    from stable_diffusion import StableDiffusion
    sd, rng = StableDiffusion.load(model), np.random.default_rng(0)
    names, found = ("strict", "loose", *(field.name for field in fields(Quality))), {}
    for k, kind in enumerate(KINDS):
        scenes = [random_scene(rng, kind) for _ in range(n)]
        prompts, drawn = [caption(scene, rng, kind) for scene in scenes], [draw(scene) for scene in scenes]
        with torch.no_grad():
            images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
            again = [picture for part in images.split(50) for picture in to_bytes(sd.decode(sd.encode(part)))]
            asked, _ = make_scenes(kind, n, seed=2000 + k)
            made = draw_pictures(sd, asked, 50, 2_000_000 + 1000 * k, dict(steps=20, cfg_scale=3.0))
        for source, pictures, texts in (("drawn", drawn, prompts), ("reconstructed", again, prompts),
                                        ("generated", made, asked)):
            for picture, text in zip(pictures, texts):
                judged = judge(picture, text)
                found.setdefault(source, []).append((judged.ok, judged.loose, *astuple(measure(picture, text))))
    within = np.sqrt(np.mean(np.var(np.array(found["generated"], float).reshape(len(KINDS), n, -1), axis=1), axis=0))
    rows = [(source, np.mean(rows, axis=0), ".3f") for source, rows in found.items()] + [
        ("deviation of generated pictures within a kind", within, ".3f"),
        ("pictures for a mean within 0.01 (95 %)", np.ceil((1.96 * within / 0.01) ** 2), ".0f"),
        ("pictures per arm to see a difference of 0.01 (power 0.8)",
         np.ceil(2 * ((1.96 + 0.84) * within / 0.01) ** 2), ".0f")]
    print(markdown([["", *names], *([title, *(f"{x:{form}}" for x in numbers)] for title, numbers, form in rows)]))


def main() -> None:
    from command import ArgumentParser  # only here: it needs torch
    parser = ArgumentParser(description="A captioned world of drawn shapes, and its exact scorer.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="draw a contact sheet").add_argument("--out", default="sheet.png")
    commands.add_parser("check", help="read ground truths back").add_argument("--n", type=int, default=500)
    commands.add_parser("bench", help="write the benchmark's prompts").add_argument("--out", default="lab/bench.jsonl")
    calibrator = commands.add_parser("calibrate", help="what the judge finds in drawings and in a model's pictures")
    calibrator.add_argument("--model", default="models/tiny")
    calibrator.add_argument("--n", type=int, default=50, help="pictures of each kind")
    args = parser.parse_args()
    if args.command == "show":
        show(args.out)
    elif args.command == "bench":
        Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in make_bench()), encoding="utf-8")
    elif args.command == "calibrate":
        calibrate(args.model, args.n)
    else:
        check(args.n)


if __name__ == "__main__":
    from command import run_command
    run_command(main)
