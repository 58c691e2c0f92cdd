"""The other processes of a run: which of them is gone, told by name and before a collective would wait for ever.

Every process writes its name and a count into the key-value store of JAX's coordination service, which process 0
holds, and looks whether the counts of the others go on. The store is reached over the network that gradients cross, so
a cut cable, a dead host and a suspended process look alike: silent. Collectives by themselves notice a process that
died, not which one, and wait for one that is silent for as long as their library likes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from fluxdit_jax.device.sharding import MeshError

_EVERY = 1.0  # seconds between two looks
_ALIVE, _ENDED = "fluxdit_jax/alive/", "fluxdit_jax/ended/"


class Hosts:
    """Watches the other processes in a thread of its own, and ends this one if one of them is lost.

    A run of one process watches nothing.
    """

    def __init__(self, patience: float):
        """Begins to watch.

        Args:
          patience: seconds of silence after which a process is given up.
        """
        self._patience, self._own = patience, jax.process_index()
        self._name = f"process {self._own} on {socket.gethostname()}"
        self._store: Any = None
        if jax.process_count() > 1:
            from jax._src import distributed  # the service has no public name; Orbax takes it from there as well

            self._store = distributed.global_state.client
            now = time.monotonic()
            self._counts: dict[str, str] = {}
            self._heard = {str(process): now for process in range(jax.process_count()) if process != self._own}
            self._answered = now
            self._lost = ""
            for work in (self._write, self._look):
                threading.Thread(target=work, name="hosts", daemon=True).start()

    def explain(self, error: Exception) -> str:
        """Who is gone, if that is why an error came: waits until it is known, at most for the patience of the watch.

        "" if nobody is, or the error is none that another process can cause.
        """
        if not of_a_collective(error) or "RESOURCE_EXHAUSTED" in str(error):  # this device's memory
            return ""
        deadline = time.monotonic() + self._patience + 2 * _EVERY
        while not self._lost and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._lost

    def leave(self, code: int, message: str) -> NoReturn:
        """Ends this process at once; the others learn why and end too, instead of waiting for it."""
        telling = threading.Thread(target=self._tell_end, args=(message,), daemon=True)
        telling.start()
        telling.join(4 * _EVERY)  # the store may be out of reach
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self._store is not None

    def _tell_end(self, message: str) -> None:
        with contextlib.suppress(Exception):
            self._store.key_value_set(f"{_ENDED}{self._own}", f"{self._name}\n{message}", allow_overwrite=True)
            if not self._own:
                time.sleep(3 * _EVERY)  # the store ends with this process: the others must have read it

    def _write(self) -> None:
        beats, told = 0, False
        while True:
            with contextlib.suppress(Exception):  # a service that is gone: `_look` tells by its silence
                self._store.key_value_set(f"{_ALIVE}{self._own}", f"{self._name}\n{beats}", allow_overwrite=True)
                counts, ended = (_read(self._store, prefix) for prefix in (_ALIVE, _ENDED))
                now = self._answered = time.monotonic()
                for process in self._heard:
                    if counts.get(process) != self._counts.get(process):
                        self._heard[process] = now
                self._counts = counts
                if not told and len(counts) > len(self._heard):
                    told = True
                    names = [counts[process].partition("\n")[0] for process in sorted(counts, key=int)]
                    print(f"{', '.join(names)}. If process 0 dies, JAX ends the others at once", file=sys.stderr)
                for process, message in ended.items():
                    if process in self._heard and not self._lost:
                        name, _, why = message.partition("\n")
                        self._lost = f"{name} has ended: {why}"
            beats += 1
            time.sleep(_EVERY)

    def _look(self) -> None:
        while not self._lost:
            time.sleep(_EVERY / 4)
            now = time.monotonic()
            if now - self._answered > self._patience:
                self._lost = self._silent("0", now - self._answered)
            elif silent := [process for process, heard in self._heard.items() if now - heard > self._patience]:
                self._lost = self._silent(silent[0], now - self._heard[silent[0]])
        print(f"error: {self._lost}. The same command on all hosts goes on from the last checkpoint", file=sys.stderr)
        self.leave(1, f"it lost {self._lost}")

    def _silent(self, process: str, seconds: float) -> str:
        name = self._counts.get(process, "").partition("\n")[0] or f"process {process}"
        return f"{name} is silent for {seconds:.0f} s (config.mesh.patience): dead, suspended, or its link is cut"


_IN_WORDS = re.compile(r"\bGloo \w+ failed|\bNCCL (operation|error)|\bnccl[A-Z]\w+\(")


def of_a_collective(error: Exception) -> bool:
    """Whether several processes may have failed to compute together, as one of them is gone."""
    if jax.process_count() == 1:
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(_IN_WORDS.search(str(error)))


def _read(store: Any, prefix: str) -> dict[str, str]:
    """The keys under a prefix without it."""
    return {key.rpartition("/")[2]: value for key, value in store.key_value_dir_get(prefix)}


def require_reachable(coordinator: str) -> None:
    """Checks that processes on other hosts can reach this one where the CPU's collectives listen: at its host's name.

    Raises:
      MeshError: the coordinator is elsewhere on a network, and this host's name resolves to its loopback.
    """
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        far = not _loopback(coordinator.rpartition(":")[0])
        if far and _loopback(name):
            raise MeshError(
                f"this host's name, {name!r}, resolves to {socket.gethostbyname(name)}, where other hosts cannot reach "
                "it: put its address on the network into /etc/hosts in place of that"
            )


def _loopback(name: str) -> bool:
    return ipaddress.ip_address(socket.gethostbyname(name.strip("[]"))).is_loopback
