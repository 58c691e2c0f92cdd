"""What a build tells: lines for a person, and `log.jsonl` for a machine. A closed terminal stops neither."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fluxdit_jax.shared.cli import Quiet
from fluxdit_jax.shared.sanitize import shown


class Journal:
    """Writes to the terminal and appends to a log.

    Args:
      path: of the log; None for no log.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._out, self._err = Quiet(sys.stdout), Quiet(sys.stderr)

    def say(self, text: str) -> None:
        """A line on stdout, above a progress bar if there is one."""
        tqdm.write(shown(text, lines=True), file=self._out)
        self._out.flush()

    def event(self, kind: str, **values: Any) -> None:
        """One JSON object in the log. A log that cannot be written is no reason to stop."""
        if self._path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values}, ensure_ascii=True)
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def bar(self, total: int, what: str, unit: str = "image") -> tqdm:
        """A progress bar with rate and time left on stderr; without a terminal, a line every 30 seconds."""
        terminal = self._err.isatty()
        return tqdm(
            total=total,
            desc=what,
            unit=unit,
            file=self._err,
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else 30,
            smoothing=0.05,
        )
