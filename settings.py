"""Settings as text: `--freeu 1.3,1.4,0.9,0.2,version=1` on a command line, in a picture's metadata, and in --help.

A technique's dataclass is the only place that knows its settings: names, types, defaults, legal values
(`__post_init__`), and what they mean (the lines "name: ..." of its docstring). Start at `read`; `write` is its inverse.
The text is what stands between the brackets of the call in Python, without quotation marks: values in the order of the
fields, then name=value. Where a flag has several kinds, the kind comes first. A name alone switches a bool on. Colons
separate the entries of a list. A backslash protects a comma or, in a list, a colon inside a value.

    --freeu                                   --cache deepcache,3,branch=1         --freescale 512x512:1024x1024
    --freeu 1.3,1.4,0.9,0.2,backbone=0:0.6    --cache faster,keys=0:2:5,parallel   --masks masks.safetensors,threshold
"""
import difflib
import re
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Kinds = dict[str, type]                          # the dataclasses of a flag, by the word that the text begins with
BOOL = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


def read(text: str, kinds: Kinds) -> Any:
    """The settings that a text names, of one of these kinds; the kind "" has no word. ValueError: what is wrong."""
    word, *rest = split(text)
    kind, parts = (word, rest) if word in kinds else ("", [word, *rest] if text else [])
    if kind not in kinds:
        raise ValueError(f"begins with {' or '.join(kinds)}, not {word!r}")
    hints, given = get_type_hints(kinds[kind]), {}
    names = [field.name for field in fields(kinds[kind])]
    for place, part in enumerate(parts):
        name, equals, value = part.partition("=")
        if not equals and name in names and bool in (hints[name], *get_args(hints[name])):
            value = "yes"
        elif not equals or name not in names and place < len(names) and hints[names[place]] in (Path, str):
            name, value = names[place] if place < len(names) else "", part               # by its place, as in a call
        if name not in names or name in given:
            near = difflib.get_close_matches(part.partition("=")[0], names, n=1)
            raise ValueError(f"{part!r} is none of its settings (" + (f"did you mean {near[0]}?" if near else
                             ", ".join(names)) + ")")
        given[name] = convert(value, hints[name], name)
    lacking = [field.name for field in fields(kinds[kind]) if field.default is MISSING and field.name not in given]
    if lacking:
        raise ValueError(f"needs {lacking[0]}, such as {lacking[0]}=...")
    return kinds[kind](**given)


def split(text: str, mark: str = ",") -> list[str]:
    """The parts between commas (or colons); a backslash before one makes it a part of the value."""
    return [part.replace("\\" + mark, mark) for part in re.split(rf"(?<!\\){mark}", text)]


def convert(text: str, hint: Any, name: str) -> Any:
    """A value of a field's type: number, word, path, size, Literal, a tuple of these, or what fits of a union."""
    if get_origin(hint) in (Union, UnionType):
        for one in sorted(get_args(hint), key=lambda one: one in (str, Path)):           # a word only if nothing fits
            try:
                return convert(text, one, name)
            except ValueError:
                pass
        raise ValueError(f"{name} must be {legal(hint)}, not {text!r}")
    if get_origin(hint) is tuple:
        kinds, parts = get_args(hint), split(text, ":")
        parts = parts[:-1] if len(parts) > 1 and not parts[-1] else parts                # 5: is a list of one
        kinds = kinds[:1] * len(parts) if kinds[-1] is ... else kinds
        try:
            return tuple(convert(part, kind, name) for part, kind in zip(parts, kinds, strict=True))
        except ValueError:
            raise ValueError(f"{name} must be {legal(hint)}, not {text!r}") from None
    words = {str(word): word for word in get_args(hint)} if get_origin(hint) is Literal else \
        BOOL if hint is bool else {"none": None} if hint is NoneType else None
    try:
        return words[text] if words is not None else getattr(hint, "read", hint)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be {legal(hint)}, not {text!r}") from None


def legal(hint: Any) -> str:
    """What a value of this type looks like as text."""
    if get_origin(hint) in (Union, UnionType, Literal):
        return " or ".join(map(legal, get_args(hint)))
    if get_origin(hint) is tuple:
        kind, *more = get_args(hint)
        return f"{legal(kind)}, or several with colons" if more[0] is ... else ":".join(map(legal, (kind, *more)))
    names = {int: "a whole number", float: "a number", str: "a word", Path: "a file", bool: "yes or no",
             NoneType: "none"}
    return names.get(hint, hint if isinstance(hint, str) else str(hint) if isinstance(hint, int) else "a size")


def write(settings: Any, kind: str = "", of_file: Callable[[Path], str] = str) -> str:
    """The text from which `read` makes the same settings: all that differs from the defaults.

    of_file: what stands for a path, such as a name with a digest for a picture's metadata.
    """
    parts = [kind] if kind else []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default or field.default is MISSING:
            text = spell(value, of_file).replace(",", "\\,")
            parts.append(field.name if value is True else f"{field.name}={text}")
    return ",".join(parts)


def spell(value: Any, of_file: Callable[[Path], str] = str) -> str:
    """A value as text; the inverse of `convert`."""
    if isinstance(value, tuple) and not hasattr(value, "read"):
        return ":".join(spell(entry, of_file).replace(":", "\\:") for entry in value) + ":" * (len(value) == 1)
    if isinstance(value, Path):
        return "./none" if of_file(value) == "none" else of_file(value)                  # none alone is None
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def describe(kind: str, settings: type, width: int = 100) -> str:
    """A dataclass as help: its first line, then every field with its default, legal words and docstring entry."""
    text, hints = settings.__doc__ or "", get_type_hints(settings)
    said = dict(re.findall(r"^    (\w+): (.+?)(?=^    \S|\Z)", text, re.M | re.S))
    title = f"{kind}: {text.splitlines()[0]}" if kind else text.splitlines()[0]
    lines = [textwrap.fill(title, width, subsequent_indent=" " * 4)]
    for field in fields(settings):
        default = "required" if field.default is MISSING else spell(field.default)
        words = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
        others = "".join(f" or {word}" for word in words if str(word) != default)
        entry = " ".join(said.get(field.name, "").split())
        lines.append(textwrap.fill(f"  {field.name} ({default}{others})  {entry}", width, subsequent_indent=" " * 6))
    return "\n".join(lines)
