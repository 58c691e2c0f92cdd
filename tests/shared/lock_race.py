"""Processes that race for one lock, round after round: `python lock_race.py FOLDER ROUNDS RACERS`.

Prints a line for each round in which not exactly one process won or a refused one named another owner than the winner.
Imports neither JAX nor PyTorch, so that it can fork.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

from fluxdit_jax.shared.lock import Lock, LockError


def racer(folder: Path, rounds: int, barrier, answers) -> None:
    for _ in range(rounds):
        barrier.wait()
        try:
            lock = Lock(folder)
            answers.put((os.getpid(), ""))
        except LockError as error:
            lock = None
            answers.put((os.getpid(), str(error)))
        barrier.wait()
        if lock is not None:
            lock.release()


def main(folder: Path, rounds: int, racers: int) -> int:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(racers + 1), context.Queue()
    processes = [context.Process(target=racer, args=(folder, rounds, barrier, answers)) for _ in range(racers)]
    for process in processes:
        process.start()
    wrong = 0
    for number in range(rounds):
        # what an owner before has left: nothing, or the line of a process that lives but holds no lock
        (folder / ".lock").write_text("" if number % 2 else f"pid {os.getpid()} on elsewhere")
        barrier.wait()
        told = [answers.get() for _ in range(racers)]
        barrier.wait()
        winners = [pid for pid, message in told if not message]
        refused = [message for _, message in told if message]
        if len(winners) != 1 or not all(f"pid {winners[0]} on " in words for words in refused):
            print(f"round {number}: winners {winners}, refused {refused}")
            wrong += 1
    for process in processes:
        process.join()
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), 100))
