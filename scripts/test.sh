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
mypy
exec python -m pytest --numprocesses=auto --dist=loadfile "$@"
