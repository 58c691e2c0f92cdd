"""Hosts of a cluster on this machine: network namespaces with addresses of their own, on a bridge; needs root, `ip`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "10.177.23."


def possible() -> bool:
    """Whether namespaces can be made here."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"fluxdit-try-{os.getpid()}"  # of this process: several ask at once
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


class Host:
    """A network namespace with one link to the bridge and a loopback of its own.

    Attributes:
      name, address: its own; the name resolves to the address.
    """

    def __init__(self, number: int):
        self.address = f"{_PREFIX}{number + 1}"
        self._namespace, self._link = f"fluxdit{number}", f"fluxdit-v{number}"
        self.name = f"host{number}"
        self._files = Path("/etc/netns") / self._namespace  # `ip netns exec` puts them in the place of /etc's
        self._files.mkdir(parents=True, exist_ok=True)
        (self._files / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        _ip("netns", "add", self._namespace)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._namespace)
        _ip("link", "set", self._link, "master", "fluxdit-br")
        _ip("link", "set", self._link, "up")
        self._inside("addr", "add", f"{self.address}/24", "dev", "eth0")
        self._inside("link", "set", "eth0", "up")
        self._inside("link", "set", "lo", "up")

    def start(self, *arguments: object, env: dict[str, str], cwd: Path) -> subprocess.Popen:
        """`python ARGUMENTS` on this host, stdout and stderr together."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        command = ["ip", "netns", "exec", self._namespace, *named, sys.executable, *map(str, arguments)]
        return subprocess.Popen(
            command, env=os.environ | env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def cut(self) -> None:
        """Takes its link away; packets vanish without a word, as when a cable is pulled."""
        _ip("link", "set", self._link, "nomaster")

    def mend(self) -> None:
        _ip("link", "set", self._link, "master", "fluxdit-br")

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self._namespace], capture_output=True)
        subprocess.run(["ip", "link", "del", self._link], capture_output=True)
        shutil.rmtree(self._files, ignore_errors=True)

    def _inside(self, *arguments: str) -> None:
        _ip("-n", self._namespace, *arguments)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts on one bridge, which go when the block ends."""
    _remove(count)
    made: list[Host] = []
    _ip("link", "add", "fluxdit-br", "type", "bridge")
    try:
        _ip("link", "set", "fluxdit-br", "up")
        for number in range(count):
            made.append(Host(number))
        yield made
    finally:
        for host in made:
            host.remove()
        _remove(count)


def _remove(count: int) -> None:
    for number in range(count):
        subprocess.run(["ip", "netns", "del", f"fluxdit{number}"], capture_output=True)
    subprocess.run(["ip", "link", "del", "fluxdit-br"], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
