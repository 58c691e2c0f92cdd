"""A quick share of `damage.py`. Of the numbers of `numerics.py`, tests/loader/test_reader_damage.py has the most."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_table import through_script  # noqa: E402


@pytest.mark.slow
def test_nothing_is_lost():
    rows = through_script(str(Path(__file__).with_name("damage.py")), quick=True)
    assert sum(tried for _, tried, _, _ in rows) >= 6
    assert [row for row in rows if row[3]] == []
