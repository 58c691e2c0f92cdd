#!/usr/bin/env bash
# Plants small faults in modules, one at a time, and lists those that no test notices: benchmarks/mutants.py.
#   bash scripts/mutants.sh [--report] [MODULE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh --all
exec "${VENV:-.venv}/bin/python" -m benchmarks.mutants "$@"
