"""command.py: wrong input is one line, and what was written is whole or absent."""
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from command import HOST, ArgumentParser, InputError, check_device, check_flags, check_writable, file_path, replacing


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="can't write"), replacing(tmp_path / "x") as part:
        part.write_text("half")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_write_takes_the_place_of_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    with replacing(tmp_path / "x") as part:
        part.write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert (tmp_path / "x").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    old, running, elsewhere = (tmp_path / f".{host}.{pid}.x.part" for host, pid in (
        (HOST, int(ended.stdout)), (HOST, os.getppid()), ("elsewhere", int(ended.stdout))))
    old.mkdir()
    for file in (old / "half", running, elsewhere, tmp_path / f".{HOST}.mine.x.part"):
        file.write_text("half")
    with replacing(tmp_path / "y") as part:
        part.write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"y", running.name, elsewhere.name, f".{HOST}.mine.x.part"}


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "x").mkdir()
    with replacing(tmp_path / "x") as part:
        part.mkdir()
        (part / "y").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "y").read_text() == "new"
    with pytest.raises(InputError, match="can't write"), replacing(tmp_path / "x") as part:
        part.mkdir()                                                         # this one holds something
    assert (tmp_path / "x" / "y").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_and_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "real")
    with replacing(tmp_path / "x") as part:
        part.write_text("new")
    assert (tmp_path / "x").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe or a device, not a file"), replacing(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_what_no_file_can_be_called_is_refused():
    assert file_path("a b.png") == Path("a b.png")
    for text, why in (("", "is empty"), ("a\0b", "has a NUL"), ("f" * 300, "f'... can't be a file's name: it is too")):
        with pytest.raises(ArgumentTypeError, match=why):
            file_path(text)


SAYS = r"""
import sys
from command import run_command, say
run_command(lambda: [say("caf\u00e9 \u2603 \udce9"), say("more"), print("\u2603", file=sys.stderr)])
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("where,code,out,err", [
    ("", 0, b"caf\xe9 \\u2603 \\udce9\nmore\n", "\\u2603\n"),
    ("> /dev/full", 0, b"", "note: can't print any more (No space left on device); files are still written\n\\u2603\n"),
    (">&- 2>&-", 0, b"", "")])
def test_what_a_console_can_not_show_ends_no_command(where, code, out, err, tmp_path):
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    done = subprocess.run(f"{sys.executable} {script} {where}", shell=True, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr.decode()) == (code, out, err)


def test_only_devices_that_compute_are_taken():
    assert check_device("cpu") == torch.device("cpu")
    for name, words in (("abacus", "can't be used here"), ("meta", "can't hold a picture")):
        with pytest.raises(InputError, match=words):
            check_device(name)


def test_the_first_illegal_flag_is_named():
    check_flags(("--n", True, "1 or more"))
    with pytest.raises(InputError, match="--steps must be 2 or more"):
        check_flags(("--n", True, "1 or more"), ("--steps", False, "2 or more"), ("--lr", False, "0"))


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    check_writable(tmp_path)
    with pytest.raises(InputError, match="can't write to .*nowhere .* choose another --out"):
        check_writable(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error, code, words", [
    (InputError("no such file x; give another"), 2, "error: no such file x; give another"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: out of memory: try"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory: try"),
    (KeyboardInterrupt(), 130, "error: stopped")])
def test_what_ends_a_command_is_one_line(error, code, words, command):
    def main() -> None:
        raise error
    result, out, err = command(main)
    assert (result, out) == (code, "") and err.startswith(words) and err.count("\n") == 1


def test_what_a_parser_refuses_is_one_line_too(command):
    def main() -> None:
        parser = ArgumentParser()
        parser.add_subparsers().add_parser("train").add_argument("--n", type=int)
        parser.parse_args()
    assert command(main, "train", "--n", "x") == (2, "", "error: argument --n: invalid int value: 'x'\n")
    assert command(main, "--m") == (2, "", "error: unrecognized arguments: --m\n")


def test_errors_of_the_program_itself_are_not_hidden(command):
    def main() -> None:
        raise RuntimeError("shapes don't match")
    with pytest.raises(RuntimeError, match="shapes"):
        command(main)
