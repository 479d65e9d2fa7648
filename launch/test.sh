#!/usr/bin/env bash
# Runs all tests in an environment of their own, after the linter and the type checker.
#
#   bash launch/test.sh [arguments of pytest]
#
# launch/environment.sh says which variables it heeds.
set -euo pipefail
PACKAGES="python3-venv python3-dev ffmpeg gcc slurmctld slurmd slurm-client munge"
EXTRAS=dev
export PIP_COMPILE=0 # pip would compile to bytecode on one core, before anything else
source "$(dirname "$(realpath "$0")")/environment.sh"

# Beside the type checker, which has one core too. The tests start many processes, each of which would compile what it
# imports. Some files in libraries are for other versions of Python. librosa compiles to machine code, and keeps, what it
# needs of itself when it is first imported.
libraries=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
{
    "$VENV/bin/python" -m compileall -qq -j "$(nproc)" "$libraries" batch_tokenizer
    "$VENV/bin/python" -c "import librosa.core.pitch, librosa.util.utils"
} || true &

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
wait
# A file at a time on each core: files share what is dear to set up. In their order, so that the long end-to-end tests
# come first and no core waits for another one's last file.
"$VENV/bin/python" -m pytest -n "$(nproc)" --dist loadfile --no-loadscope-reorder "$@"
