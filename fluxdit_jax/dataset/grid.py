"""The gate set's grid: of every picture which photograph it shows, which view of it, and under which light.

`preprocess subset` and `preprocess demo` write it beside their pictures (`INPUT_GRID`), `preprocess build` takes it
into the dataset directory (`GRID_FILE`). A dataset without it is none that the gate can ask about lights and views.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from fluxdit_jax.dataset.manifest import DatasetError, json_checksum
from fluxdit_jax.shared.atomic_files import write_whole

INPUT_GRID = ".grid.json"  # hidden: in a folder of images a .json file is a caption
GRID_FILE = "grid.json"


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where a picture stands in the grid.

    Attributes:
      photograph: what it shows; pictures of one photograph are the same scene.
      view: which picture of the scene, "original" or "mirrored"; the captions of two views differ in few words.
      light: the light change; captions do not name it.
    """

    photograph: str
    view: str
    light: str

    @property
    def row(self) -> tuple[str, str]:
        """Photograph and view: what the caption names."""
        return self.photograph, self.view


Grid = Mapping[str, Place]  # by record key


def write_grid(path: Path, grid: Grid) -> None:
    """Writes the file atomically, in the order of the grid: reports show rows and columns in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_json(grid))


def to_json(grid: Grid) -> str:
    """The content of the file: "places" has [photograph, view, light] by key."""
    places = {key: list(dataclasses.astuple(grid[key])) for key in grid}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(place)}" for key, place in places.items())
    return f'{{"checksum": "{json_checksum(places)}",\n"places": {{\n{lines}\n}}}}\n'


def read_grid(path: Path) -> dict[str, Place]:
    """The grid; empty if there is no such file. The checksum may be missing, as in a file made by hand.

    Raises:
      DatasetError: the file is damaged, or gives one place to two pictures.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        raw = content["places"]
        if content.get("checksum", json_checksum(raw)) != json_checksum(raw):
            raise ValueError("its checksum is not that of its content: it is damaged, or was edited by hand")
        if not all(isinstance(p, list) and len(p) == 3 and all(isinstance(w, str) for w in p) for p in raw.values()):
            raise ValueError("expected [photograph, view, light] by key")
        grid = {key: Place(*place) for key, place in raw.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path} is not the grid of a gate set: {error}") from error
    place, count = max(collections.Counter(grid.values()).items(), key=lambda item: item[1], default=(None, 0))
    if count > 1:
        raise DatasetError(f"{path} gives {count} pictures the same place, {place}")
    return grid
