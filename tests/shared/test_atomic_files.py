"""Files that are whole or not there, and files that only grow. A limit on file sizes stands for a full disk."""

from __future__ import annotations

import contextlib
import errno
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from wording import lines_naming, numbers

from fluxdit_jax.run.summary_writer import SummaryWriter
from fluxdit_jax.shared.atomic_files import Appended, replacing, write_whole

pytest_plugins = ("training_fixtures",)


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """`room(n)`: no file of this process can grow beyond n bytes; what fits of a write is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


UNLIMITED = resource.RLIM_INFINITY


def test_lines_that_a_full_disk_refused_follow_in_order_when_there_is_room(tmp_path, room, package_log):
    file = Appended(tmp_path / "log.jsonl")
    lines = [f"line {number}\n" for number in range(40)]
    for number, line in enumerate(lines):
        room(100 if 5 <= number < 30 else UNLIMITED)
        file.write(line)
        if number == 20:
            assert (tmp_path / "log.jsonl").read_text() == "".join(lines)[:100]  # it ends in the middle of a line
    file.close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines)
    assert file.failures > 10
    assert [message.split()[0] for message in package_log] == [
        "ERROR",
        "WARNING",
    ]  # told once, not every time
    assert str(tmp_path / "log.jsonl") in package_log[0] and "memory" in package_log[0]
    assert str(tmp_path / "log.jsonl") in package_log[1] and "lost" not in package_log[1]


def test_what_is_never_written_is_counted(tmp_path, room, package_log):
    file = Appended(tmp_path / "log", limit=10)
    room(4)
    file.write("123456\n")  # 4 of 7 bytes are written
    file.write("abcdef\n")
    file.write("too many\n")
    file.close()
    file.close()
    room(UNLIMITED)  # pytest's own output may go to a file
    assert (tmp_path / "log").read_text() == "1234"
    assert package_log[-1].startswith(f"ERROR {tmp_path / 'log'} ") and re.search(numbers(19), package_log[-1])
    with pytest.raises(ValueError, match="closed"):
        file.write("x")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, room):
    path = tmp_path / "config.json"
    write_whole(path, "old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    room(3)
    with pytest.raises(OSError) as refused:  # noqa: PT011
        write_whole(path, "new and longer")
    assert refused.value.errno == errno.EFBIG and refused.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    room(UNLIMITED)
    (tmp_path / "config.json.tmp").write_text("what a killed process left")
    write_whole(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_board_counts_what_it_could_not_write_and_leaves_no_empty_files(tmp_path: Path, room, package_log):
    board = SummaryWriter(tmp_path / "tensorboard", 0)
    room(8)
    for step in range(20):
        board.scalars(step, {("loss", ""): 1.0})
    assert list((tmp_path / "tensorboard").iterdir()) == []
    room(UNLIMITED)
    board.scalars(20, {("loss", ""): 1.0})
    with contextlib.closing(board):
        assert board.failures == 20
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert len(package_log) == 2 and lines_naming(package_log[1], str(tmp_path / "tensorboard"), 20)
