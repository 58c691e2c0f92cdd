"""A quick share of the faults of training; the scripts beside this file run them whole."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_table import through_script  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, int, int, int]]:
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler: interposer.c cannot be built")
    return through_script(str(Path(__file__).with_name("training_quick.py")), quick=True)


@pytest.mark.parametrize(
    ("words", "least"),
    [("killed", 8), ("disk is full", 8), ("cannot be read", 6), ("SIGTERM", 1), ("reader is gone", 1),
     ("a second one", 1), ("a lock left", 2), ("same bits", 1)],
)  # fmt: skip
def test_nothing_is_lost(rows, words: str, least: int) -> None:
    met = [row for row in rows if words in row[0]]
    assert sum(tried for _, tried, _, _ in met) >= least
    assert [row for row in met if row[3]] == []
