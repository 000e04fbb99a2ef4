"""settings.py: every technique's settings as text, on the command line, in --help and in a picture's metadata."""
import json
import math
import random
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from PIL import Image

from cache import DeepCache, FasterDiffusion, Inherit, TGate
from command import InputError
from freescale import FreeScale, Size
from freeu import FreeU
from maskunet import MaskFile, MaskSearch, RandomMasks, StaticMasks, save_masks
from pictures import file_digest
from settings import convert, describe, read, spell, write
from stable_diffusion import StableDiffusion
from txt2img import TECHNIQUES, main, parse_arguments

KINDS = [pytest.param(name, kind, id=f"{name}-{kind}" if kind else name)
         for name, (_, kinds, _) in TECHNIQUES.items() for kind in kinds]
PATHS = ("masks.safetensors", "a,b.png", "a=b", "mode=sample", "random", "search,clip", "none", "yes", "a:b", "C:\\x,y",
         "two words", "0.5", "/")
WORDS = ("clip", "mid:u0-u2", "x=1", "a,b", "d:1,2", "deepcache", "none", "C:\\x")


def some(hint: Any, rng: random.Random) -> Any:
    """A value of a field's type; whether it is legal is for the settings to say."""
    if get_origin(hint) in (Union, UnionType):
        return some(rng.choice(get_args(hint)), rng)
    if get_origin(hint) is Literal:
        return rng.choice(get_args(hint))
    if get_origin(hint) is tuple:
        kind, *more = get_args(hint)
        values = [some(kind, rng) for _ in range(rng.choice((0, 1, 2, 4)) if more[0] is ... else 1 + len(more))]
        return tuple(values) if kind is str else tuple(sorted(values))
    return {int: lambda: rng.choice((0, 0, 1, 2, 3, 4, 8, 17, 50)), bool: lambda: rng.random() < 0.5,
            float: lambda: rng.choice((0.0, 0.1, 1 / 3, 0.6, 1.0, 2.5, 1e-7, 900.0, math.inf)),
            str: lambda: rng.choice(WORDS), Path: lambda: Path(rng.choice(PATHS)), NoneType: lambda: None,
            Size: lambda: Size(8 * rng.randint(1, 20), 8 * rng.randint(1, 20))}[hint]()


def legal_settings(cls: type, rng: random.Random) -> Any:
    """Settings with some of the fields given; what `__post_init__` refuses is drawn again."""
    hints = get_type_hints(cls)
    while True:
        given = {field.name: some(hints[field.name], rng) for field in fields(cls)
                 if field.default is MISSING or rng.random() < 0.4}
        try:
            return cls(**given)
        except ValueError:
            pass


@pytest.mark.parametrize("name,kind", KINDS)
def test_what_is_written_is_read_again(name, kind):
    kinds, rng = TECHNIQUES[name][1], random.Random(f"{name} {kind}")
    made = [legal_settings(kinds[kind], rng) for _ in range(500)]
    for settings in made:
        assert read(write(settings, kind), kinds) == settings, write(settings, kind)
    for field in fields(kinds[kind]):                                  # each was not always the same
        assert len({getattr(settings, field.name) for settings in made}) > 1, field.name


def test_the_text_is_what_a_call_in_python_has():
    for name, text, settings in (
            ("freeu", "1.3,1.4,0.9,0.2,backbone=0:0.6", FreeU(1.3, 1.4, 0.9, 0.2, backbone=(0.0, 0.6))),
            ("cache", "deepcache,3,branch=1", DeepCache(3, branch=1)), ("tgate", "5,compute", TGate(5, "compute")),
            ("cache", "faster,keys=0:2:5,parallel", FasterDiffusion((0, 2, 5), parallel=True)),
            ("cache", "faster,0:", FasterDiffusion((0,))), ("cache", "faster,5,no,none", FasterDiffusion(5)),
            ("cache", "inherit,mid\\,u0", Inherit("mid:u0")), ("masks", "a.file", MaskFile(Path("a.file"))),
            ("masks", "a\\,b=c,threshold", MaskFile(Path("a,b=c"), "threshold")),
            ("masks", "random,0.1,window", RandomMasks(0.1, window=True)),
            ("masks", "file=random", MaskFile(Path("random"))),
            ("masks", "search,clip:C\\:/hps,reset=off", MaskSearch(("clip", "C:/hps"), reset=False)),
            ("freescale", "2", FreeScale(2)), ("freescale", "2,inf", FreeScale(2, math.inf)),
            ("freescale", "48x32:96x64,fast", FreeScale(((32, 48), (64, 96)), fast=True)), ("freeu", "", FreeU())):
        assert read(text, TECHNIQUES[name][1]) == settings


@pytest.mark.parametrize("name,kind", KINDS)
def test_the_help_of_a_technique_has_every_setting_with_its_default_and_its_own_words(name, kind):
    cls = TECHNIQUES[name][1][kind]
    lines, hints = describe(kind, cls, width=10_000).splitlines(), get_type_hints(cls)
    assert len(lines) == 1 + len(fields(cls)) and lines[0].startswith(kind) and lines[0].endswith(".")
    for field, line in zip(fields(cls), lines[1:]):
        default, words, said = re.fullmatch(rf"  {field.name} \(([^ )]+)( or .+?)?\)  (\S.*[.)])", line).groups()
        assert cls.__doc__.count(f"\n    {field.name}: ") == 1 and said[:20] in cls.__doc__
        assert default == "required" if field.default is MISSING else \
            convert(default, hints[field.name], field.name) == field.default
        assert (words is not None) == (get_origin(hints[field.name]) is Literal)


@pytest.mark.parametrize("name,kind", KINDS)
def test_every_wrong_part_of_a_text_is_named_in_one_sentence(name, kind):
    kinds, cls = TECHNIQUES[name][1], TECHNIQUES[name][1][kind]
    hints, example = get_type_hints(cls), legal_settings(cls, random.Random(0))
    needed = {field.name: f"{field.name}={spell(getattr(example, field.name))}" for field in fields(cls)
              if field.default is MISSING}

    def complaint(*parts: str, without: str = "") -> str:
        rest = [part for field, part in needed.items() if field != without]
        with pytest.raises(ValueError) as error:
            read(",".join([kind] * bool(kind) + rest + list(parts)), kinds)
        assert "\n" not in str(error.value) and ". " not in str(error.value)
        return str(error.value)
    for field in fields(cls):
        if hints[field.name] not in (str, Path, tuple[str, ...], Path | None):           # any text is one of these
            for wrong in ("wrong", "", "1:x", "nope"):
                assert f"{field.name} must be " in complaint(f"{field.name}={wrong}", without=field.name)
                assert f"not {wrong!r}" in complaint(f"{field.name}={wrong}", without=field.name)
        twice = f"{field.name}={spell(getattr(example, field.name))}".replace(",", "\\,")
        assert f"{field.name}=" in complaint(twice, twice, without=field.name)           # given twice
        assert f"did you mean {field.name}?" in complaint(f"{field.name}_=1")
    assert "'strange=1' is none of its settings" in complaint("strange=1")
    if kind != "search":                                               # it may be the name of a reward
        assert "'a red circle'" in complaint("a red circle")
    for field in needed:
        assert f"needs {field}, such as {field}=..." in complaint(without=field)


def test_a_text_of_no_kind_names_the_kinds():
    for text in ("", "deepcash,3", "3"):
        with pytest.raises(ValueError, match="begins with deepcache or faster or inherit, not "):
            read(text, TECHNIQUES["cache"][1])


# ---------------------------------------------------------------------------------------------------- the command line

OLD = """--freeu-version --freeu-rule --freeu-window --freeu-backbone --freeu-skip --skip-tuning --scale-long
--cache-interval --cache-branch --cache-center --cache-power --cache-schedule --cache-keys --cache-units
--cache-parallel --cache-max-batch --cache-noise --cache-tau --cache-official-order --tgate-text --tgate-guidance
--mask-random --mask-window --mask-mode --mask-fixed --mask-shared --mask-reward --mask-iterations --mask-schedule
--mask-keep --mask-checkpoint --resolutions --freescale-official --detail --detail-map --freescale-fast
--freescale-blur --freescale-upsample --freescale-restart --freescale-dilate --baseline""".split()


@pytest.mark.parametrize("flag", OLD)
def test_every_flag_of_the_last_release_ends_in_one_line_with_the_new_spelling(flag):
    for arguments in (["a circle", flag], [flag, "1", "a circle", "--cache", "inherit"], [f"{flag}=1"]):
        with pytest.raises(InputError, match=f"^{flag} is now written --.*see --help-technique ") as error:
            parse_arguments(arguments)
    new, text = re.search(r"now written --(\w+) (\S+)", str(error.value)).groups()
    kinds = TECHNIQUES[new][1].values()
    for named in re.findall(r"(\w+)=", text):                          # each is a setting of this technique
        assert any(named in [field.name for field in fields(cls)] for cls in kinds), named
    assert "\n" not in str(error.value)
    parse_arguments(["--", flag])                                      # but a prompt may look like one


def test_the_help_fits_three_screens_and_names_every_technique_and_default(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, stdout, _ = command(main, "--help")
    lines = stdout.splitlines()
    assert code == 0 and len(lines) <= 66 and max(map(len, lines)) <= 100
    assert all(line.startswith("  python txt2img.py ") for line in lines[-3:]) and "-s, --steps STEPS " in stdout
    assert all(text in " ".join(stdout.split()) for text in ("(default: 30)", "or 7.5)", "or ddim)", "models/tiny)"))
    assert "(default: None)" not in stdout and "(default: False)" not in stdout
    for name, (_, kinds, _) in TECHNIQUES.items():
        code, said, _ = command(main, "--help-technique", name)
        assert code == 0 and f"--{name} " in stdout
        assert said == "".join(describe(kind, cls) + "\n" for kind, cls in kinds.items())
        assert max(map(len, said.splitlines())) <= 100
    for example in lines[-3:]:
        args = shlex.split(example)[2:]
        assert parse_arguments([text.replace("models/sd15", "models/tiny") for text in args])


# ---------------------------------------------------------------------------------------------------------- metadata

def settings_in(path: Path, title: str) -> str:
    """What a picture's metadata says of a technique."""
    entry = re.search(rf', {title}: ("(?:[^"\\]|\\.)*"|[^,]*)', Image.open(path).text["parameters"])
    return json.loads(entry[1]) if entry[1].startswith('"') else entry[1]


@pytest.mark.parametrize("name,text", [
    ("freeu", None), ("freeu", "2,3,0,0.5,version=1,backbone=0:0.6,skip=0.4:1"), ("freeu", "window=dc,rule=level"),
    ("skips", "tuning,0.5"), ("skips", "scalelong,0.7,steps=0:0.5"), ("cache", "deepcache,branch=1"),
    ("cache", "deepcache,2,center=2,power=1.2,schedule=paper"), ("cache", "faster,parallel,official_order,tau=900"),
    ("cache", "faster,0:2,alpha=0.3"), ("cache", "inherit,mid:u0"), ("tgate", "2,compute"), ("tgate", "2"),
    ("masks", "random,0.1,window,fixed"), ("masks", "random,0.1,mode=expected"),
    ("freescale", "2,inf,restart=0.4,blur=official,fast"), ("freescale", "32x32:64x48,attention=local"),
    ("highres", "scalecrafter,0.5"), ("highres", "hidiffusion"), ("highres", "demofusion,0.5")])
def test_what_a_picture_says_of_a_technique_makes_the_same_picture(name, text, narrow, tmp_path, command):
    out = tmp_path / "p.png"

    def draw(*flag: str) -> tuple[np.ndarray, str]:
        size = ["-W", 64] if name == "highres" else []
        steps = 3 if name == "freescale" else 5
        code, _, stderr = command(main, "a circle", "--model", narrow, "--steps", steps, "--out", out, *size, *flag)
        assert code == 0, stderr
        return np.asarray(Image.open(out)), Image.open(out).text["parameters"]
    title, (plain, _) = TECHNIQUES[name][0], draw()
    picture, said = draw(f"--{name}", *([] if text is None else [text]))
    again, repeated = draw(f"--{name}", settings_in(out, title))
    assert np.array_equal(again, picture) and repeated == said
    assert picture.shape != plain.shape or not np.array_equal(picture, plain)


def test_a_picture_names_files_with_a_digest_of_their_contents(narrow, tmp_path, command):
    file, out = tmp_path / "masks.safetensors", tmp_path / "p.png"
    save_masks(StaticMasks(StableDiffusion.load(narrow).unet, initial=1.0), file, StableDiffusion.load(narrow).unet)
    assert command(main, "a circle", "--model", narrow, "--steps", 2, "--out", out, "--masks", f"{file},fixed")[0] == 0
    assert settings_in(out, "Masks") == f"file={file_digest(file)},fixed"


def test_settings_that_change_nothing_draw_the_plain_picture(narrow, tmp_path, command):
    made = []
    for k, flags in enumerate(([], ["--freeu", "1,1,1,1"], ["--cache", "deepcache,1"], ["--cache", "faster,1,alpha=0"],
                               ["--masks", "random,0"], ["--skips", "scalelong,1"], ["--freescale", "32x32"])):
        out = tmp_path / f"{k}.png"
        assert command(main, "a circle", "--model", narrow, "--steps", 4, "--out", out, *flags)[0] == 0
        made.append(np.asarray(Image.open(out)))
    assert all(np.array_equal(picture, made[0]) for picture in made)
