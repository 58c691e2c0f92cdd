"""What the tests of `subset` share: its options, the files that it writes, and photographs with a known fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocess.subset.candidates import SubsetOptions
from preprocess.subset.subset import ABOUT


def small(source: Path, output: Path, **more: Any) -> SubsetOptions:
    """Four photographs under two lights, mirrored as well: 16 pictures."""
    values = {"count": 4, "lights": 2, "resolution": 128, "workers": 2}
    return SubsetOptions(str(source), str(output), **(values | more))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def about(output: Path) -> dict[str, Any]:
    """What a set says of itself."""
    return json.loads((output / ABOUT).read_text())


def left_out(told: dict[str, Any]) -> dict[str, str]:
    """Why each picture that is not in a set was left out, by key."""
    return {entry["key"]: entry["reason"] for entry in told["left_out"]}


def keys(told: dict[str, Any]) -> list[str]:
    """Of the chosen photographs, in their order."""
    return [one["key"] for one in told["chosen"]]


def sidecar(output: Path, name: str) -> dict[str, Any]:
    """What stands beside a picture of a set."""
    return json.loads((output / name).with_suffix(".json").read_text())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def save(path: Path, picture: np.ndarray, caption: str) -> None:
    """A picture uint8 [H, W, 3] with its caption in a .json beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    path.with_suffix(".json").write_text(json.dumps({"caption": caption}))
