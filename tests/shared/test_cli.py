"""What the programs do alike, each in a process of its own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fluxdit_jax.shared.cli import explain, thread_error

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, pathlib, sys, time
from fluxdit_jax.shared import atomic_files, cli

def work():
    {body}

cli.run(work, (OSError,), failure=7)
"""


def run(body: str, shell: str = "", **more) -> subprocess.CompletedProcess:
    """A program whose work is `body`, started by a shell with these redirections."""
    code = PROGRAM.format(body=body.replace("\n", "\n    "))
    command = ["sh", "-c", f'exec "$0" "$@" {shell}', sys.executable, "-u", "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, **more)


def test_an_error_is_one_line_and_its_status(tmp_path):
    done = run(f"open({str(tmp_path / 'no' / 'file')!r})")
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr == f"error: {tmp_path / 'no' / 'file'}: {os.strerror(errno.ENOENT)}\n"
    assert run("return 3").returncode == 3 and run("pass").returncode == 0


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EACCES, "permissions"), (errno.ENOENT, "")],
)
def test_errors_of_the_disk_name_the_file_and_say_what_to_do(number: int, advice: str):
    begins, _, rest = explain(OSError(number, os.strerror(number), "a/b")).partition(os.strerror(number))
    assert begins == "a/b: " and advice in rest and bool(advice) == bool(rest)


@pytest.mark.parametrize("shell", ["| head -0", "2>&1 | head -0", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_it_goes_on_when_nobody_reads(tmp_path, shell: str):
    done = run(
        "[print(n, file=f, flush=True) for n in range(9999) for f in (sys.stdout, sys.stderr)]\n"
        f"pathlib.Path({str(tmp_path / 'end')!r}).write_text('whole')\n"
        f"os.fstat(0), os.fstat(1), os.fstat(2)",
        shell,
    )
    assert (tmp_path / "end").read_text() == "whole"
    assert "Error" not in done.stderr and done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_what_is_half_written_and_exits_with_its_number(tmp_path, number: int):
    path = tmp_path / "picture.png"
    # many short sleeps: a signal just before a long one is only handled after it
    work = "t.write_text('x'), print('begun'), [time.sleep(0.05) for _ in range(1200)]"
    body = f"with atomic_files.replacing(pathlib.Path({str(path)!r})) as t: {work}"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM.format(body=body)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.strip().startswith("stopped") and err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_only_a_closed_event_loop_is_not_reported():
    body = (
        "def fall(words):\n"
        "    class Falls:\n"
        "        def __del__(self): raise RuntimeError(words)\n"
        "    Falls()\n"
        "fall('Event loop is closed'), fall('something else')"
    )
    err = run(body).stderr
    assert "something else" in err and "Event loop" not in err


def test_a_failed_thread_is_reported_in_one_line(capsys):
    for value, words in ((ValueError("so it is"), "so it is"), (None, "ValueError")):
        thread_error(threading.ExceptHookArgs((ValueError, value, None, threading.current_thread())))
        assert capsys.readouterr().err == f"thread MainThread: {words}\n"


def test_progress_bars_make_no_semaphore():
    """tqdm's own lock is one in /dev/shm, and stays there if the process is killed while it is made."""
    code = "from tqdm import tqdm; tqdm(range(3), file=sys.stderr); print(hasattr(tqdm.get_lock(), 'mp_lock'))"
    for before, expected in (("cli.outlive_readers()", "False"), ("", "True")):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; from fluxdit_jax.shared import cli; {before or 0}; {code}"],
            cwd=REPOSITORY, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.strip() == expected, done.stderr
