"""A captioned world of drawn shapes, and the exact scorer that reads its pictures back.

    scene --caption--> "a red circle left of a blue square" --parse--> Request --.
      '-----draw-----> (H, W, 3) uint8 ------------------------read--> Things --judge--> right or wrong

Nothing here is learned, so a score measures the model under study and not a detector. The six kinds of scene and
the rules of `judge` are those of GenEval (arXiv 2310.11513). Start at `random_scene`, `caption`, `draw`, `judge`.
Coordinates: x and y are fractions of width and height, y points down; radii are fractions of the image's SHORT
side, so that one scene can be drawn at any size and aspect ratio.

    python -m lab.shapes show --out sheet.png     # a contact sheet with captions
    python -m lab.shapes check --n 500            # how many ground truths the scorer reads right
"""

import argparse
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {"red": (225, 30, 35), "orange": (255, 135, 0), "yellow": (250, 230, 30), "green": (25, 155, 60),
          "blue": (30, 80, 230), "purple": (150, 40, 200), "white": (255, 255, 255), "black": (0, 0, 0)}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}

# GenEval's categories, with how often each is drawn when the caller does not name one. Sides are learned last, so
# they are shown most.
KINDS = {"single": 0.15, "two": 0.13, "counting": 0.17, "colors": 0.15, "position": 0.27, "color_attr": 0.13}
RADII = {1: (0.17, 0.34), 2: (0.15, 0.22), 3: (0.14, 0.18), 4: (0.13, 0.16)}     # by the number of objects
MARGIN = 0.02                                                                   # between an object and the frame

# What split "train" never shows, to ask later whether a model can put together what it never saw together. Every
# shape loses one colour, one place, one number and one partner.
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


def random_scene(rng: np.random.Generator, kind: str | None = None, split: str = "all") -> Scene:
    """A scene of one of the `KINDS`; split "train" shows nothing held out, "unseen" only that, "all" both."""
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
            looks = [(_pick(rng, SHAPES), _pick(rng, colors))] * int(rng.integers(2, 5))
        else:
            looks = list(zip(rng.permutation(SHAPES)[:2].tolist(), (_pick(rng, colors), _pick(rng, colors))))
        things = _spread(rng, looks, rng.uniform(*RADII[len(looks)], len(looks)))
        scene = Scene(things, background)
        if (len(things) == len(looks) and split in ("all", "unseen" if is_held_out(scene) else "train")
                and not (kind == "color_attr" and things[0].color == things[1].color)
                and not (kind == "position" and clear_relation(*things) is None)):
            return scene


def dense_scene(rng: np.random.Generator) -> Scene:
    """6 to 12 small objects of any look: many edges a picture, which is what an autoencoder learns most from."""
    while True:
        background = _pick(rng, BACKGROUNDS)
        colors = [c for c in COLORS if c != background]
        looks = [(_pick(rng, SHAPES), _pick(rng, colors)) for _ in range(12)]
        radii = 0.08 + 0.08 * np.sort(rng.random(12) ** 2)[::-1]        # mostly small ones, the large ones first
        things = _spread(rng, looks, radii)
        if len(things) >= 6:
            return Scene(things, background)


def _pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def _spread(rng: np.random.Generator, looks: list[tuple[str, str]], radii: np.ndarray) -> tuple[Thing, ...]:
    """Places what fits in 20 tries each, wholly inside the frame and with a clear gap between any two."""
    things: list[Thing] = []
    for (shape, color), r in zip(looks, radii.tolist()):
        for x, y in rng.uniform(r + MARGIN, 1 - r - MARGIN, (20, 2)).tolist():
            # 1.15: a square's corner reaches 1.13 radii. A wider image only pulls the centres further apart.
            if all(np.hypot(x - t.x, y - t.y) > 1.15 * (r + t.r) + 0.03 for t in things):
                things.append(Thing(shape, color, x, y, r))
                break
    return tuple(things)


# ------------------------------------------------------------------------------------------------------ captions

COUNTS = {2: "two", 3: "three", 4: "four"}
SIZES = ("small", "large")
PLACES = ("in the centre", "on the left", "on the right", "at the top", "at the bottom")
RELATIONS = ("left of", "right of", "above", "below")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys(" ".join(
    ["a an and", *COUNTS.values(), *SIZES, *COLORS, *SHAPES, *PLURALS.values(), *RELATIONS, *PLACES,
     *BACKGROUNDS, "background"]).split()))


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


def caption(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> str:
    """One of many true captions; with a `kind`, the one that GenEval would ask in that category ("a circle")."""
    return phrase(describe(scene, rng, kind))


def describe(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Request:
    """The request behind `caption`: true statements about the scene, and which of them are made is drawn."""
    things, n = scene.things, len(scene.things)
    says = lambda p: kind is None and rng.random() < p
    color = says(0.82) or kind in ("colors", "color_attr")
    background = scene.background if says(0.15) else None
    ask = lambda t, **more: Ask(t.shape, t.color if color else None, **more)
    if n == 1:
        sizes = [s for s in SIZES if has_size(things[0], s, clearly=True) and says(0.25)]
        places = [p for p in PLACES if is_at(things[0], p, clearly=True) and background is None and says(0.25)]
        return Request((ask(things[0], size=(sizes or [None])[0], place=(places or [None])[0]),), None, background)
    if n <= 4 and len({(t.shape, t.color) for t in things}) == 1:
        return Request((ask(things[0], count=n),), None, background)
    if n == 2:
        a, b = things if rng.random() < 0.5 else things[::-1]
        relation = clear_relation(a, b) if says(0.5) or kind == "position" else None
        return Request((ask(a), ask(b)), relation, background)
    raise ValueError(f"the grammar has no sentence for {n} different objects")


def has_size(thing: Thing, size: str, clearly: bool = False) -> bool:
    """`clearly` leaves a band between small and large in which a caption is silent."""
    small, large = (0.22, 0.29) if clearly else (0.255, 0.255)
    return thing.r < small if size == "small" else thing.r > large


def is_at(thing: Thing, place: str, clearly: bool = False) -> bool:
    """`clearly` is what a caption needs to say so; without it a judge forgives what a caption would not say."""
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if place == "in the centre":
        return max(abs(dx), abs(dy)) < (0.08 if clearly else 0.12)
    along, across = {"on the left": (-dx, dy), "on the right": (dx, dy),
                     "at the top": (-dy, dx), "at the bottom": (dy, dx)}[place]
    return along > (0.13 if clearly else 0.09) and along > (1.3 if clearly else 1.0) * abs(across)


def clear_relation(a: Thing, b: Thing) -> str | None:
    """Where a is seen from b if one axis clearly dominates and the two are apart on it, else None."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > max(a.r + b.r, 1.6 * abs(dy)):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > max(a.r + b.r, 1.6 * abs(dx)):
        return "above" if dy < 0 else "below"
    return None


def phrase(request: Request) -> str:
    """The caption of a request; `parse` undoes it."""
    def noun(ask: Ask) -> str:
        words = [ask.size, ask.color, ask.shape if ask.count == 1 else PLURALS[ask.shape], ask.place]
        rest = " ".join(w for w in words if w)
        return f"{COUNTS.get(ask.count, 'an' if rest.startswith('orange') else 'a')} {rest}"
    text = f" {request.relation or 'and'} ".join(map(noun, request.asks))
    return text if request.background is None else f"{text} on a {request.background} background"


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


def _border_color(image: np.ndarray) -> np.ndarray:
    return np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)


def _classes(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W): 0 for background, else 1 + the index of the palette colour that a pixel shows.

    The soft edge of a white circle on black is gray and that of a yellow one is olive, so a pixel is compared with
    all mixtures of the background with a colour; it is the object's if the nearest holds more than half of that.
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


def read(image: np.ndarray, min_area: float = 0.006, min_overlap: float = 0.5) -> list[Thing]:
    """The objects in a picture (H, W, 3) of values 0..255, the largest first.

    A region smaller than `min_area` (of the short side squared) is a speck; one that overlaps its best shape by
    less than `min_overlap` (intersection over union) is no object of this world.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an image of shape (H, W, 3) with values 0..255, not {image.shape}")
    # Large pictures are averaged down to 64..127 pixels: noise goes, and one set of thresholds serves every size.
    f = max(min(image.shape[:2]) // 64, 1)
    h, w = image.shape[0] // f, image.shape[1] // f
    small = image[:h * f, :w * f].astype(np.float32).reshape(h, f, w, f, 3).mean((1, 3))
    classes = _classes(small)
    names, areas = np.unique(regions := _components(classes), return_counts=True)
    side = min(h, w)
    found: list[tuple[int, Thing]] = []
    for name, area in zip(names, areas):
        color = classes.reshape(-1)[name]
        if color == 0 or area < min_area * side ** 2:
            continue
        ys, xs = np.nonzero(regions == name)
        x, y = float(xs.mean()), float(ys.mean())
        fits = []
        for shape in SHAPES:        # at the region's own area; what sticks out far counts more than a wobbly edge
            r = float(np.sqrt(area / AREAS[shape]))
            outside = r * np.maximum(distance(shape, (xs - x) / r, (ys - y) / r), 0)
            fits.append((float((outside ** 2).mean()), shape, r, float((outside == 0).mean())))
        _, shape, r, inside = min(fits)
        if inside / (2 - inside) >= min_overlap:          # intersection over union, the areas being equal
            found.append((area, Thing(shape, list(COLORS)[color - 1], (x + 0.5) / w, (y + 0.5) / h, r / side)))
    return [thing for _, thing in sorted(found, key=lambda pair: -pair[0])]


# ------------------------------------------------------------------------------------------------------- judging

@dataclass(frozen=True)
class Verdict:
    """`ok` is the judgement. The rest says what went wrong: whether all asked shapes are there, all asked colours
    are there (on whatever shape), every shape is there as often as asked, and the relation holds."""
    ok: bool
    shape: bool
    color: bool
    count: bool
    relation: bool

    def __bool__(self) -> bool:
        return self.ok


def relations(a: Thing, b: Thing, height: int, width: int) -> set[str]:
    """Where a is seen from b by GenEval's rule, an object's box being two radii wide and high. One relation along
    each axis may hold; none does for boxes that nearly coincide."""
    short = min(height, width)
    offset = np.array([(a.x - b.x) * width, (a.y - b.y) * height])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * 2 * (a.r + b.r) * short, 0)
    if not shrunk.any():
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)          # by the length before shrinking, as in the released code
    tests = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {name for name, holds in zip(RELATIONS, tests) if holds}


def judge(image: np.ndarray, request: Request | str, strict: bool = False) -> Verdict:
    """Does the picture show what the caption asks for?

    GenEval's rules: every named shape is there, and from two on exactly as often as asked; of each shape only the
    first `count` objects are inspected (the largest, where GenEval takes the most confident), which must all have
    the colour and the relation. Objects of other shapes do not matter, nor does a second circle for "a circle".
    `strict` also wants the sizes, places and background that the caption names, and not one object more.
    """
    request = parse(request) if isinstance(request, str) else request
    if len({ask.shape for ask in request.asks}) < len(request.asks):
        raise ValueError(f"GenEval's rules cannot tell two objects of one shape apart: {phrase(request)!r}")
    things = read(image)
    groups = [[t for t in things if t.shape == ask.shape] for ask in request.asks]
    tops = [group[:ask.count] for group, ask in zip(groups, request.asks)]
    counts = [len(g) == a.count if a.count > 1 else len(g) >= 1 for g, a in zip(groups, request.asks)]
    bound = all(t.color == a.color for top, a in zip(tops, request.asks) for t in top if a.color)
    relation = request.relation is None or (all(tops) and all(
        request.relation in relations(a, b, *image.shape[:2]) for a in tops[0] for b in tops[1]))
    ok = all(counts) and bound and relation
    if strict:
        ok = (ok and len(things) == sum(ask.count for ask in request.asks)
              and all((a.size is None or has_size(t, a.size)) and (a.place is None or is_at(t, a.place))
                      for top, a in zip(tops, request.asks) for t in top)
              and request.background in (None, read_background(image)))
    return Verdict(ok, shape=all(groups), count=all(counts), relation=relation,
                   color=all(any(a.color in (None, t.color) for t in things) for a in request.asks))


def read_background(image: np.ndarray) -> str:
    """The name nearest to the colour of the picture's border."""
    border = _border_color(image)
    return min(BACKGROUNDS, key=lambda name: np.abs(border - BACKGROUNDS[name]).sum())


def same_things(found: list[Thing], truth: tuple[Thing, ...], tolerance: float = 0.03) -> bool:
    """Whether two lists hold the same looks at the same places, in any order."""
    near = [[f for f in found if (f.shape, f.color) == (t.shape, t.color)
             and max(abs(f.x - t.x), abs(f.y - t.y), abs(f.r - t.r)) < tolerance] for t in truth]
    return len(found) == len(truth) and all(len(n) == 1 for n in near)


# -------------------------------------------------------------------------------------------------- command line

def show(path: str, columns: int = 6, size: int = 128) -> None:
    """Writes a contact sheet: one row per kind, each picture over its caption."""
    from PIL import Image, ImageDraw  # only here, so that training needs numpy alone
    rng = np.random.default_rng(0)
    sheet = Image.new("RGB", (columns * (size + 8), len(KINDS) * (size + 40)), "lavender")
    for row, kind in enumerate(KINDS):
        for column in range(columns):
            scene, corner = random_scene(rng, kind), (column * (size + 8) + 4, row * (size + 40) + 4)
            sheet.paste(Image.fromarray(draw(scene, size, size)), corner)
            text = textwrap.fill(caption(scene, rng), 22)
            ImageDraw.Draw(sheet).text((corner[0], corner[1] + size), text, fill="black", spacing=0)
    sheet.save(path)


def check(n: int) -> None:
    """Prints, per kind and size, the share of drawings whose objects are read back right and judged to fit."""
    for kind in KINDS:
        for size in (64, 128):
            rng = np.random.default_rng(0)
            scenes = [random_scene(rng, kind) for _ in range(n)]
            images = [draw(scene, size, size) for scene in scenes]
            right = [same_things(read(image), scene.things) and judge(image, caption(scene, rng), strict=True).ok
                     for image, scene in zip(images, scenes)]
            print(f"{kind:12s}{size:4d} px  {np.mean(right):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A captioned world of drawn shapes, and its exact scorer.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="draw a contact sheet").add_argument("--out", default="sheet.png")
    commands.add_parser("check", help="read ground truths back").add_argument("--n", type=int, default=500)
    args = parser.parse_args()
    if args.command == "show":
        show(args.out)
    else:
        check(args.n)


if __name__ == "__main__":
    main()
