"""What starting does not load: the encoders' libraries take seconds and gigabytes that training has no use for."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.startup import UNWANTED


def test_training_sampling_and_the_gate_start_without_the_encoders_libraries():
    code = (
        "import fluxdit_jax.train, fluxdit_jax.validate, fluxdit_jax.export, sys\n"
        f"print([name for name in {UNWANTED!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
