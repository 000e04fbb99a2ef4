"""What every command of this project needs. It imports no other module of the project.

Wrong input raises `InputError`; `run_command` shows it as one line. Output files are written through `replacing`, so
that a stopped command leaves no broken file.
"""
import argparse
import contextlib
import ctypes
import errno
import functools
import glob
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

UMASK = os.umask(0)                              # the only way to read it is to set it
os.umask(UMASK)
HOST = platform.node()[:20]                      # several can share a folder
OUT_OF_MEMORY = ("out of memory: try --dtype bfloat16 (or float16 on a GPU), a smaller --width and --height, "
                 "--batch-size 1, --low-memory, or --vae-tile 64")


class InputError(ValueError):
    """The user's input is wrong. The message is one sentence: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """Shows an error like `run_command`: one line without the usage, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        sys.exit(complain(re.sub(r"^(argument -[^/:]+)/[^:]+", r"\1", message), 2))         # without its other names


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default except None, which the help texts explain, and False; a flag's short name comes first."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        return action.help if default is None or default is False else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(sorted(action.option_strings, key=lambda name: name.startswith("--"))[:2])
        if not names or action.nargs == 0:
            return names or super()._format_action_invocation(action)
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


def typed(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse's `type` from a function whose ValueError says what is wrong."""
    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return read


@typed
def file_path(text: str) -> Path:
    """argparse's `type` of a file or folder: refuses what can't be a name of either."""
    try:
        os.stat(text)
    except (OSError, ValueError) as error:
        if not text or isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            why = "it is too long" if isinstance(error, OSError) and text else "it is empty or has a NUL"
            raise ValueError(f"{text[:40]!r}{'...' * (len(text) > 40)} can't be a file's name: {why}") from None
    return Path(text)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main(). Wrong input: one line on stderr and exit code 2; Ctrl-C: exit code 130."""
    reuse_memory()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                                 # closed by who started the command
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")      # names and prompts can have any character
    try:
        main()
        print(end="", flush=True)
    except InputError as error:
        sys.exit(complain(str(error), 2))
    except torch.OutOfMemoryError:
        sys.exit(complain(OUT_OF_MEMORY, 2))
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(complain(f"torch.compile fails here ({str(error).splitlines()[0]}): leave out --compile", 2))
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(complain(OUT_OF_MEMORY, 2))
    except KeyboardInterrupt:
        sys.exit(complain("stopped; finished files are kept", 130))
    except OSError as error:
        if error.filename is not None:                                 # not of stdout
            raise
        silence()
        if isinstance(error, BrokenPipeError):                         # its reader closed it, as `head` does
            sys.exit(1)
        sys.exit(complain(f"can't print any more ({error.strerror})", 2))


def say(text: str) -> None:
    """Print a line. Where that fails, as on a full disk, a note on stderr says so and the work goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence()
        print(f"note: can't print any more ({error.strerror}); files are still written", file=sys.stderr)


def silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def reuse_memory() -> None:
    """On Linux, keep freed memory in this process and give tensors large pages; elsewhere, do nothing.

    By default, most tensors of several MB get new memory, which the system fills with zeros in pages of 4 KB. That
    takes a sixth of the time of SD 1.5's U-Net and a quarter of its VAE decoder's, see benchmarks/README.md. Call this
    function before PyTorch makes the first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")                 # PyTorch's switch for large pages
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim, mapped = -1, -3                                          # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(mapped, 32 << 20)                                 # a higher threshold raises the decoder's peak
        libc.mallopt(trim, 256 << 20)


def check_device(name: str) -> torch.device:
    """The device of --device; InputError if it is missing or can't compute."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name} can't be used here ({str(error).splitlines()[0].split('. ')[0]})") from None
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise InputError(f"--device {name} can't hold a picture; use cpu, cuda, mps or xpu")
    return device


def check_flags(*rows: tuple[str, bool, str]) -> None:
    """InputError for the first flag with an illegal value. A row: the flag, whether it is legal, the legal values."""
    for flag, ok, legal in rows:
        if not ok:
            raise InputError(f"{flag} must be {legal}")


def refuse(*rows: tuple[Any, str]) -> None:
    """InputError for the first row that applies. A row: does it apply, and what is wrong."""
    for wrong, message in rows:
        if wrong:
            raise InputError(message)


def check_writable(folder: Path) -> None:
    """InputError if files can't be written to the folder: called before hours of work, not after them."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"can't write to {folder} ({error.strerror}); choose another --out") from None


def make_folder(folder: Path) -> None:
    """A folder for results, if it isn't there. InputError if files can't be written to it: before work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {folder} ({error.strerror}); choose another --out") from None
    check_writable(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name next to `path`, for a file or a folder. It becomes `path` if the block ends without an error."""
    path = target(path)
    remove_leftovers(path.parent)
    part = path.with_name(f".{HOST}.{os.getpid()}.{path.name[-40:]}.part")   # file systems limit the length of names
    try:
        yield part
        if part.is_file():
            part.chmod(0o666 & ~UMASK)           # safetensors makes its files readable by their owner only
        elif path.is_dir():
            path.rmdir()                         # it is empty; some systems can't rename onto a folder
        part.replace(path)
    except OSError as error:
        raise InputError(f"can't write {path} ({error.strerror or error}); choose another place") from None
    finally:
        remove(part)


def target(path: Path) -> Path:
    """The file that a path leads to, through links, which stay. InputError for a pipe or a device."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is a pipe or a device, not a file; choose another place")
    return path


def remove(part: Path) -> None:
    """Delete a file or a folder, if it is there and can be deleted."""
    shutil.rmtree(part, ignore_errors=True)      # leaves files alone
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)


@functools.cache                                 # once per folder and process
def remove_leftovers(folder: Path) -> None:
    """Delete what `replacing` left in a folder when its process was killed: those that no longer run on this host."""
    for part in folder.glob(f".{glob.escape(HOST)}.*.part"):
        pid = part.name.removeprefix(f".{HOST}.").partition(".")[0]
        if pid.isdecimal() and has_ended(int(pid)):
            remove(part)


def has_ended(pid: int) -> bool:
    """Is there no process of this number? On Windows, where asking would stop it, always False."""
    try:
        if os.name == "posix":
            os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):             # another user's, or no number of a process
        pass
    return False
