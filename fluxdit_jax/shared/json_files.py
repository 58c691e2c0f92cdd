"""Numbers as JSON files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.shared.atomic_files import write_whole


def write_json(report: dict[str, Any], path: Path) -> None:
    """Writes atomically; a number that is not finite becomes null, because JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(_finite(report), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
