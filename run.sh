#!/bin/sh
# sh run.sh "a prompt" [flags of txt2img.py]    draws a picture
# sh run.sh --tests [arguments of pytest]       runs the tests
#
# The first run makes .venv beside this file and installs what requirements.txt names; later runs start at once.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/.venv

if ! cmp -s "$here/requirements.txt" "$venv/installed"; then
    python=
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then python=$name; break; fi
    done
    if [ -z "$python" ]; then
        echo "error: no Python 3.10 or newer was found; install it from python.org or by your system's packages" >&2
        exit 2
    fi
    if ! [ -x "$venv/bin/pip" ] && ! "$python" -m venv --clear "$venv" >&2; then
        echo "error: $python can't make a virtual environment; on Debian and Ubuntu: sudo apt install python3-venv" >&2
        exit 2
    fi
    echo "installing PyTorch and a few small packages into $venv: once, some minutes" >&2
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null; then      # without gigabytes of CUDA
        torch=$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' "$here/requirements.txt")
        "$venv/bin/pip" install -q --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu" >&2
    fi
    "$venv/bin/pip" install -q -r "$here/requirements.txt" >&2
    cp "$here/requirements.txt" "$venv/installed"
fi

if [ "${1-}" = --tests ]; then
    shift
    cd "$here"
    exec "$venv/bin/python" -m pytest "$@"
fi
exec "$venv/bin/python" "$here/txt2img.py" "$@"
