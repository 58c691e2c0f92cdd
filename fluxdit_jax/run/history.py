"""`history.jsonl` of a run directory: a line for each start, and one for the first checkpoint after it.

A start: `time`, `step` that it begins with and what that comes `from`, the `changes` that config.resume.allow_changes
accepted, `other_changes` of keys that may change, and what was `set_aside` (see `continuation`). A checkpoint: `time`
and `saved`, its step.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

from fluxdit_jax.shared.atomic_files import write_whole

HISTORY = "history.jsonl"


def append(workdir: Path, entry: dict[str, Any]) -> None:
    """Adds a line with the time of now; what is in the file stays as it is. Raises `OSError`."""
    path = workdir / HISTORY
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_whole(path, before + json.dumps({"time": now, **entry}) + "\n")


def has_saved(workdir: Path) -> bool:
    """Whether a checkpoint of this run was ever complete. A line that cannot be read may have said so: True."""
    path = workdir / HISTORY
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line.decode("utf-8"))
            if "saved" in entry or re.fullmatch(r"checkpoints/\d+", str(entry["from"])):
                return True
        except (ValueError, KeyError, TypeError, RecursionError):
            return True
    return False
