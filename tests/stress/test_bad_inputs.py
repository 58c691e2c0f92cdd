"""Every kind of bad input gets its reason, stops nothing and leaves the sources as they were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import bad_inputs  # noqa: E402

from preprocess.inspect.verify import verify  # noqa: E402


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("bad")
    bad_inputs.write(folder / "in")

    def state() -> dict[str, tuple]:
        stats = {path.name: path.lstat() for path in (folder / "in").iterdir()}
        return {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats.items()}

    before = state()
    outcomes = bad_inputs.outcomes(folder / "in", folder / "out")
    assert state() == before, "sources are never touched"
    assert verify(folder / "out") == []
    return outcomes


def test_there_are_many() -> None:
    assert len(bad_inputs.CASES) >= 60


@pytest.mark.parametrize("case", bad_inputs.CASES, ids=lambda case: case[0])
def test_what_it_gets(case: bad_inputs.Case, found: dict[str, tuple[str, str]]) -> None:
    what, _, _, expected = case
    assert bad_inputs.right(expected, found[what][0]), found[what]
