#!/usr/bin/env bash
# Installs if needed, lints, checks types, and runs every test. Arguments go to pytest: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
exec python -m pytest --numprocesses=auto --dist=loadfile "$@"
