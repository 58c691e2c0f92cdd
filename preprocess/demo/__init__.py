"""The demonstration data set: 100 drawn portraits, 20 compositions under 5 lights, a full grid.

Eight people, each before a background; four of them look left, right and to the front, four left and right.
Every composition is drawn once and lit five times (`preprocess.demo.scene`), so that the truth is known where a
model is asked to take the composition of one picture and the light of another. Captions name the composition
and never the light.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from fluxdit_jax.dataset.grid import INPUT_GRID, Place, write_grid
from preprocess.demo.cast import COMPOSITIONS, LIGHTS, Composition
from preprocess.demo.portrait import compose


def draw_dataset(output: Path, progress: bool = True, compositions: Sequence[Composition] = COMPOSITIONS) -> int:
    """Writes the set into `output` as `cNN_lM.png` with `cNN_lM.json` beside it; returns its number of images.

    The JSON has `caption`, and as ground truth `composition`, `character`, `looking`, `lighting` and `light`.
    Where each stands in the grid is in `.grid.json`.
    The same code writes the same bytes. What is there already and was drawn by this code is kept.

    Args:
      output: folder, made if it is not there.
      progress: show a progress bar.
      compositions: the rows of the grid to draw, all 20 unless told otherwise.

    Raises:
      FileExistsError: `output` holds files that are not of this set.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    stems = [f"{c.name}_l{m}" for c in compositions for m in range(len(LIGHTS))]
    expected = {stem + end for stem in stems for end in (".png", ".json")}
    present = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    if strangers := sorted(present - expected):
        raise FileExistsError(
            f"{output} holds {len(strangers)} files that are not of the demonstration set, the first is "
            f"{strangers[0]!r}; give an empty folder"
        )
    total = len(stems)
    with tqdm(total=total, desc="drawing", unit="image", disable=not progress) as bar:
        for composition in compositions:
            missing = [m for m in range(len(LIGHTS)) if not _is_drawn(output, composition, m)]
            bar.update(len(LIGHTS) - len(missing))
            if not missing:
                continue
            drawing = compose(composition)
            for lighting in missing:
                buffer = io.BytesIO()
                Image.fromarray(drawing.shade(LIGHTS[lighting])).save(buffer, "PNG", compress_level=4)
                image = output / f"{composition.name}_l{lighting}.png"
                _write(image, buffer.getvalue())
                truth = _truth(composition, lighting, buffer.getvalue())
                _write(image.with_suffix(".json"), (json.dumps(truth, indent=1) + "\n").encode())
                bar.update()
    write_grid(
        output / INPUT_GRID,
        {
            f"{c.name}_l{m}.png": Place(c.character.name, c.looking, light.name)
            for c in compositions
            for m, light in enumerate(LIGHTS)
        },
    )
    return total


def _truth(composition: Composition, lighting: int, image: bytes) -> dict[str, str]:
    return {
        "caption": composition.caption,
        "composition": composition.name,
        "character": composition.character.name,
        "looking": composition.looking,
        "lighting": f"l{lighting}",
        "light": LIGHTS[lighting].name,
        "image_sha256": hashlib.sha256(image).hexdigest(),
        "drawn_by": _drawn_by(),
    }


@functools.cache
def _drawn_by() -> str:
    """Digest of the code of this folder, so that a changed drawing is drawn anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_drawn(output: Path, composition: Composition, lighting: int) -> bool:
    """True when both files are there, whole, and of this code."""
    image = output / f"{composition.name}_l{lighting}.png"
    try:
        truth = json.loads(image.with_suffix(".json").read_text(encoding="utf-8"))
        return truth == _truth(composition, lighting, image.read_bytes())
    except (OSError, ValueError):
        return False


def _write(path: Path, data: bytes) -> None:
    """Atomically: an interrupted run leaves no half file under its final name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
