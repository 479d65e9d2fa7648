#!/usr/bin/env bash
# Runs all tests in an environment of their own, after the linter and the type checker.
#
#   bash launch/test.sh [arguments of pytest]
#
# launch/environment.sh says which variables it heeds.
set -euo pipefail
PACKAGES="python3-venv python3-dev ffmpeg gcc slurmctld slurmd slurm-client munge"
EXTRAS=dev
source "$(dirname "$(realpath "$0")")/environment.sh"

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
# A file at a time on each core: files share what is dear to set up. In their order, so that the long end-to-end tests
# come first and no core waits for another one's last file.
"$VENV/bin/python" -m pytest -n "$(nproc)" --dist loadfile --no-loadscope-reorder "$@"
