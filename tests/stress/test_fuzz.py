"""A quick share of the fuzzing; `fuzz.py` beside this file runs it for as long as is wished.

One process does it all, since most of the time is its start: four planted targets first, of which the fuzzing must
see three, and then every parser.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
import fuzz, fuzz_targets as t
from hypothesis import strategies as st
fuzz.PATIENCE = 1.0

def crash(data):
    if len(data) > 3 and data[0] & 1:
        raise KeyError("a bug")

def hog(data):
    bytearray(3 * fuzz.MEMORY if data else 1)

def hang(data):
    while data:
        pass

def named(data):
    raise ValueError("as announced")

for call in (crash, hog, hang, named):
    tally = fuzz.explore(t.Target("planted", st.binary(), call, ValueError), 0.1)
    print(call.__name__, tally.lost)

fuzz.PATIENCE = 5.0
sys.argv = ["fuzz.py", "--seconds", "0"]
sys.exit(fuzz.main())
"""


def test_no_parser_falls_and_the_fuzzing_would_see_it() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(FOLDER)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    planted = dict(line.split(" ", 1) for line in lines[:4])
    assert "KeyError" in planted["crash"] and "MemoryError" in planted["hog"] and "TooSlow" in planted["hang"]
    assert planted["named"] == "[]"
    parsers, total = lines[4:-1], lines[-1]
    assert len(parsers) > 15 and all(line.endswith("lost 0") for line in parsers)
    tried, accepted, lost = map(int, total.split())
    assert tried >= 30 * len(parsers) and accepted > 100 and lost == 0
