"""A tracker of the user's own that gets the scalars and pictures of TensorBoard: `config.log.tracker`."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.config import ConfigError

log = logging.getLogger(__name__)


class Tracker:
    """Calls an object of the user's; what it raises is logged once for each of its methods, and the run goes on."""

    def __init__(self, spec: str):
        """
        Args:
          spec: "module:object"; object(workdir=Path, config={"group.key": value}, step=int) makes the tracker, which
            has scalars(step, {name: float}), image(step, name, uint8 [H, W, 3]) and close().

        Raises:
          ConfigError: there is no such object.
        """
        self._spec = spec
        self._told: set[str] = set()
        module, _, name = spec.partition(":")
        with self._refused():
            if not (module and name):
                raise ValueError("it must be MODULE:OBJECT, as my_trackers:WandB")
            self._make = getattr(importlib.import_module(module), name)

    def begin(self, workdir: Path, config: dict[str, Any], step: int) -> None:
        """Makes the user's object. Raises `ConfigError` if that fails."""
        with self._refused():
            self._tracker = self._make(workdir=workdir, config=config, step=step)

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  of the user's module
            raise ConfigError(f"config.log.tracker is {self._spec!r}: {type(error).__name__}: {error}") from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._call("scalars", step, values)

    def image(self, step: int, name: str, image_HxWx3: np.ndarray) -> None:
        self._call("image", step, name, image_HxWx3)

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:  # noqa: BLE001  a tracker must not stop a run
            if method not in self._told:
                self._told.add(method)
                log.warning(
                    "config.log.tracker %s: %s: %s: %s. The run goes on, further errors of it are not told",
                    self._spec, method, type(error).__name__, error,
                )  # fmt: skip
