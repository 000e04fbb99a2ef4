"""The imports among the top-level files run one way. Imports inside functions and for type checkers count too."""
import ast

import pytest
from conftest import ROOT

FILES = {path.stem: path for path in ROOT.glob("*.py")}
TECHNIQUES = ("cache", "freeu", "freescale", "maskunet")


def imports(path) -> set[str]:
    """The names of the files of ours that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return names & set(FILES)


GRAPH = {name: imports(path) for name, path in FILES.items()}


def test_imports_are_found_wherever_they_stand(tmp_path):
    (tmp_path / "some.py").write_text("import vae\nif TYPE_CHECKING:\n    import unet\n"
                                      "def f():\n    from sampler import plan\n    import os, cache as c\n")
    assert imports(tmp_path / "some.py") == {"vae", "unet", "sampler", "cache"}
    assert {"unet", "sampler", "freescale"} <= GRAPH["stable_diffusion"]


def test_no_imports_form_a_circle():
    left = {name: set(needed) for name, needed in GRAPH.items()}
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert not left, f"in a circle, or above one: {left}"


@pytest.mark.parametrize("name", ["unet", "vae", "clip_text", "command", "settings"])
def test_these_files_import_none_of_ours(name):
    assert not GRAPH[name]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_knows_neither_other_techniques_nor_the_loop(name):
    assert not GRAPH[name] & {*TECHNIQUES, "highres", "sampler", "stable_diffusion", "txt2img"}
