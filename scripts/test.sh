#!/usr/bin/env bash
# Installs if needed, checks style and types, and runs every test. Arguments go to pytest: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh --all
venv="${VENV:-.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
export PATH="$venv/bin:$PATH"
ruff check .
ruff format --check .
mypy & types=$!
# More processes than cores: many tests wait for a process that they have started. Then threads of OpenMP and BLAS only
# take each other's core, and spin while they wait. nproc goes by the first of these.
processes="$(($(nproc) * 3 / 2))"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
status=0
python -m pytest --numprocesses="$processes" --dist=loadfile "$@" || status=$?
wait "$types" || { status=$?; echo "error: mypy found faults, see above" >&2; }
exit "$status"
