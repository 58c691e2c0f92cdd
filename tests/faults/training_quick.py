"""A share of the faults of training in one go: one data set, one compiled program, two dozen faults.

    python tests/faults/training_quick.py

What CI runs; each of the modules below runs whole by itself.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import forked
import signals
import training_disk
import training_kills
import two_at_once
from fault_table import Row, as_script


def work(quick: bool) -> list[Row]:
    from training_scene import make

    with tempfile.TemporaryDirectory(prefix="training-quick-") as folder:
        scene = make(Path(folder))
        parts = (training_kills, training_disk, signals, two_at_once)
        return [row for part in parts for row in part.work_on(scene, True)]


if __name__ == "__main__":
    forked.enter("training_scene")
    sys.exit(as_script(__doc__, work))
