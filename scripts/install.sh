#!/usr/bin/env bash
# Makes .venv and installs this project into it, at the versions of requirements.txt. Does nothing if that is done.
#
#   bash scripts/install.sh [--train | --encoders | --all] [--cpu] [--dry-run]
#
#   --train      (default) training, sampling and the built-in encoders; no PyTorch
#   --encoders   and PyTorch, transformers, diffusers: real encoders, so `preprocess build`, prompts, the gate's edits
#   --all        and what tests and linters need
#   --cpu        no CUDA build of JAX, although there is a card
#   --dry-run    only says what would be installed
#
# With an NVIDIA card the CUDA build of JAX is added, by the driver's version. A torch that is in .venv already (ROCm,
# CUDA or CPU) is kept if it is new enough.
# PYTHON=/path/to/python chooses the interpreter, VENV=DIR another place than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
extras="" cpu="" dry=""
for option in "$@"; do
  case "$option" in
    --train) extras="" ;;
    --encoders) extras="encoders" ;;
    --all) extras="encoders,dev" ;;
    --cpu) cpu=1 ;;
    --dry-run) dry=1 ;;
    *) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
  esac
done

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1; }
makes_venvs() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }  # Debian and Ubuntu package these apart

# 1. the interpreter
if fits "$venv/bin/python"; then
  python="$venv/bin/python"
  if [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -V)" != "$("$python" -V)" ]; then
    echo "error: $venv is $("$python" -V), PYTHON is $("$PYTHON" -V): remove $venv, or unset PYTHON" >&2; exit 1
  fi
elif [ -e "$venv" ]; then
  echo "error: $venv exists, and its Python does not start or is not 3.11 to 3.14: rm -r $venv" >&2; exit 1
elif [ -n "${PYTHON:-}" ]; then
  python="$PYTHON"
  if ! fits "$python" || ! makes_venvs "$python"; then
    echo "error: PYTHON=$PYTHON is not a Python 3.11 to 3.14 that can make virtual environments" >&2; exit 1
  fi
else
  python=""
  for candidate in python3.12 python3.13 python3.11 python3.14 python3; do
    if fits "$candidate" && makes_venvs "$candidate"; then python="$candidate"; break; fi
  done
  if [ -z "$python" ] && command -v uv >/dev/null; then
    python="$(uv python find '>=3.11,<3.15' 2>/dev/null || { uv python install 3.12 >&2 && uv python find 3.12; })" || true
  fi
  if [ -z "$python" ]; then
    cat >&2 <<'END'
error: no Python 3.11 to 3.14 that can make virtual environments was found. One of these, then the same command again:
  sudo apt install python3 python3-venv             # or your system's package manager: dnf, pacman, brew install python@3.12
  curl -LsSf https://astral.sh/uv/install.sh | sh   # uv, which fetches a Python by itself
  PYTHON=/path/to/python bash scripts/install.sh    # an interpreter that is somewhere else
END
    exit 1
  fi
fi

# 2. what to install: see fluxdit_jax/device/cuda_stack.py
installed="$(cat "$venv/installed" 2>/dev/null || true)"  # a checksum, the build of JAX, the extras
case "$installed" in  # what was installed before stays, at the new versions
  *" encoders,dev") extras="encoders,dev" ;;
  *" encoders") extras="${extras:-encoders}" ;;
esac
case "$installed" in *" cpu "*) cpu=1 ;; esac
stack() { "$python" ${outside:+-S} -m fluxdit_jax.device.cuda_stack "$@"; }  # -S: what lies beside another Python is not meant
outside=1
if [ -e "$venv" ]; then outside=""; fi
cuda=""
if [ -z "$cpu" ]; then cuda="$(stack ${extras:+--encoders})"; fi
wanted="$(cat requirements.txt pyproject.toml scripts/install.sh | cksum) ${cpu:+cpu}$cuda $extras"
if [ "$installed" = "$wanted" ]; then
  if [ -n "$dry" ]; then echo "nothing to do: $venv has it" >&2; fi
  exit 0
fi
kept="$(stack --kept)"
all="$extras${cuda:+${extras:+,}$cuda}"
echo "installing into $venv: $("$python" -V), fluxdit_jax${all:+[$all]}${kept:+, torch $kept is kept}" >&2
if [ -z "$cuda$kept" ] && [ -n "$extras" ] && [ "$(uname -sm)" = "Linux x86_64" ]; then
  echo "note: PyPI's torch brings 3 GB of CUDA, and there is no NVIDIA card here; for the CPU or ROCm build put it into" \
    "$venv first (docs/installing.md), then give the same command again" >&2
fi
if [ -n "$dry" ]; then exit 0; fi

# 3. installing: one pip call, so that JAX and PyTorch agree on the versions of CUDA's libraries
started=$SECONDS
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
python="$venv/bin/python"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null
rm -f "$venv/installed"
grep -v ${kept:+-e '^torch=='} -e '^#' requirements.txt > "$venv/constraints.txt"
"$python" -m pip install --quiet --disable-pip-version-check ${CI:+--no-compile} -c "$venv/constraints.txt" \
  -e ".${all:+[$all]}"
echo "$wanted" > "$venv/installed"
echo "installed in $((SECONDS - started)) s; $venv is $(du -sm "$venv" | cut -f1) MB" >&2
