"""README.md: its commands run as they stand, it is short, and what CI runs is what it says."""
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from freescale import FreeScale
from freeu import FreeU
from txt2img import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.strip().splitlines()]
# these install packages, need a checkpoint, or run this test; CI runs those of run.sh
ELSEWHERE = ("pip install", "sh run.sh", "hf download", "python convert_weights.py sd15", "--model models/sd15")


def test_the_readme_is_at_most_700_words_and_begins_with_a_picture_that_exists():
    assert len(README.split()) <= 700
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert README.index("![") < README.index("Stable Diffusion") and all((ROOT / p).is_file() for p in pictures)


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|txt))`", README):
        assert (ROOT / name).is_file() or name == "merges.txt", name         # merges.txt is the user's


def test_ci_runs_the_readmes_own_commands():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in ('sh run.sh "a red circle left of a blue square"', "sh run.sh --tests"):
        assert command in SHELL and command in ci


@pytest.mark.parametrize("command", [c for c in SHELL if not any(part in c for part in ELSEWHERE)])
def test_every_other_command_of_the_readme_runs(command, tmp_path, monkeypatch):
    program, file, *arguments = shlex.split(command)
    assert program == "python"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    runpy.run_path(str(ROOT / file), run_name="__main__")
    assert list(tmp_path.glob("*.png"))


def test_the_readmes_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        names: dict = {}
        exec(block, names)
        assert names["images"].shape == (2, 3, 64, 64)


def test_the_readme_has_the_official_settings_of_freescale():
    flags = re.search(r"FreeScale's official settings: `(.+?)`", README, re.S)[1]
    args = parse_arguments(["a circle", *shlex.split(flags)])
    assert (args.steps, args.sampler, args.spacing, args.vae_tile) == (50, "euler", "leading", 128)
    assert args.freescale == FreeScale(4, blur="official") and args.freeu == FreeU(version=1)
    assert args.negative_prompt == "blurry, ugly, duplicate, poorly drawn, deformed, mosaic"
