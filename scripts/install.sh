#!/usr/bin/env bash
# Makes .venv and installs requirements.txt into it; does nothing if that is already done.
# With an NVIDIA GPU, the CUDA build of JAX is added.  PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

cuda=""
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then cuda="cuda12"; fi

wanted="$(cat requirements.txt scripts/install.sh | sha256sum | cut -d' ' -f1) $cuda"
if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi

python="${PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in python3.11 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
      python="$candidate"; break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "error: Python 3.11 is needed and was not found; install it, or set PYTHON=/path/to/python3.11" >&2; exit 1
fi

echo "installing into .venv (requirements.txt${cuda:+, jax[$cuda]}) ..."
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
if [ -n "$cuda" ]; then
  jax="$(grep '^jax==' requirements.txt)"
  .venv/bin/pip install --quiet --disable-pip-version-check "${jax/jax/jax[$cuda]}"
fi
echo "$wanted" > .venv/installed
