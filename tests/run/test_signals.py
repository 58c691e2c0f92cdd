"""Signals that ask a run to stop, really raised."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fluxdit_jax.run import signals
from fluxdit_jax.run.signals import Signals

pytest_plugins = ("training_fixtures",)
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_the_first_signal_asks_and_its_echo_is_the_same_one(number: int, package_log):
    with Signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), number)  # a launcher passes it on
        assert signals.received == number
    assert len(package_log) == 1 and f"{signal.Signals(number).name}: saving" in package_log[0]


def test_a_second_interrupt_stops_at_once(monkeypatch):
    monkeypatch.setattr(signals, "_ECHO_SECONDS", -1.0)
    before = signal.getsignal(INT)
    with Signals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), INT)
        os.kill(os.getpid(), INT)
    assert signal.getsignal(INT) is before


def test_who_insists():
    """SIGTERM after SIGINT or SIGTERM ends it; SIGHUP asks and never insists."""
    code = """
import os
from fluxdit_jax.run import signals

signals._ECHO_SECONDS = -1.0
for numbers in ((15, 15), (2, 15), (1, 1), (15, 1), (1, 15)):
    child = os.fork()
    if not child:
        with signals.Signals():
            for number in numbers:
                os.kill(os.getpid(), number)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.split() == ["-15", "-15", "0", "0", "0"], done.stderr
