"""The demonstration data set: 100 drawn portraits, 20 compositions under 5 lights, a full grid.

Eight people, each before a background; four of them look left, right and to the front, four left and right.
Every composition is drawn once and lit five times (`preprocess.scene`), so that the truth is known where a
model is asked to take the composition of one picture and the light of another. Captions name the composition
and never the light.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from preprocess import backdrops, portrait, scene
from preprocess.portrait import Person, draw_person
from preprocess.scene import Light, Scene

LIGHTS = (
    Light("golden", (-0.85, -0.25, 0.55), (2.6, 1.45, 0.55), (0.22, 0.20, 0.26), 0.45, 0.75),
    Light("moon", (0.75, -0.55, 0.5), (0.42, 0.72, 1.35), (0.07, 0.10, 0.20), 0.40, 0.75),
    Light("daylight", (0.05, -0.25, 1.0), (1.35, 1.32, 1.28), (0.62, 0.64, 0.68), 0.10, 0.35),
    Light("sunset", (0.45, -1.0, 0.35), (2.0, 0.42, 0.62), (0.30, 0.13, 0.30), 0.45, 0.7),
    Light("aquarium", (-0.15, 0.95, 0.45), (0.18, 0.95, 0.62), (0.03, 0.11, 0.11), 0.50, 0.6),
)


@dataclasses.dataclass(frozen=True)
class Character:
    name: str
    description: str
    place: str
    person: Person
    size: tuple[int, int]  # (width, height), pixels
    poses: tuple[str, ...]


_ALL, _TWO = ("left", "right", "front"), ("left", "right")
_SQUARE, _TALL, _WIDE = (512, 512), (448, 576), (576, 448)

CHARACTERS = (
    Character("a", "a woman with red curly hair in a green coat", "a brick wall",
              Person("woman", "#e9b797", "curls", "#a8432a", "coat", "#3f6b4c", "#e6dcc8", "#4d7a56"), _SQUARE, _ALL),
    Character("b", "a man with short black hair and a beard in a blue turtleneck", "a window",
              Person("man", "#c98f68", "short", "#2a211f", "turtleneck", "#33527a", "#33527a", beard=True), _TALL, _ALL),
    Character("c", "an old man with white hair and round glasses in a yellow cardigan", "a bookshelf",
              Person("old man", "#e3b096", "fringe", "#d9d5cf", "cardigan", "#c2963e", "#ded5c6", "#5b7286", glasses=True), _WIDE, _ALL),
    Character("d", "a girl with blond braids in a white sweater with a red scarf", "the sea",
              Person("girl", "#efc3a4", "braids", "#d3a552", "scarf", "#dcd6ca", "#b23a3a", "#4f7ea3"), _WIDE, _ALL),
    Character("e", "a woman with a black hair bun and earrings in an orange blouse", "a garden",
              Person("woman", "#d9a57e", "bun", "#2b2226", "blouse", "#cf7a3c", "#e8c9a0", earrings=True), _TALL, _TWO),
    Character("f", "a man with a grey hat in a brown jacket", "green hills",
              Person("man", "#d8a283", "short", "#5a3d2b", "coat", "#7a5638", "#d8cdb8", "#5f7561", hat="fedora", hat_colour="#7d7d80"), _SQUARE, _TWO),
    Character("g", "a woman with a dark afro and gold earrings in a yellow dress", "a teal wall with pictures",
              Person("woman", "#8f5a3f", "afro", "#2c1f1b", "dress", "#d8ad3f", "#f0dfae", "#3a2418", earrings=True), _TALL, _TWO),
    Character("h", "a boy with a blue beanie in a striped sweater", "a town in winter",
              Person("boy", "#ecbd9f", "short", "#8a5a34", "sweater", "#d9d2c4", "#b5533f", "#5f7fa0", hat="beanie", hat_colour="#3d6a9a"), _SQUARE, _TWO),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Composition:
    """One cell of the grid's first axis: who, where, and which way they look.

    Attributes:
      index: 0 to 19.
      character: who.
      looking: "left", "right" (the viewer's) or "front".
    """

    index: int
    character: Character
    looking: str

    @property
    def name(self) -> str:
        return f"c{self.index:02d}"

    @property
    def caption(self) -> str:
        """What the picture shows; the light is not mentioned."""
        pose = "facing front" if self.looking == "front" else f"looking {self.looking}"
        return f"portrait of {self.character.description}, {pose}, in front of {self.character.place}"


COMPOSITIONS = tuple(
    Composition(index, character, looking)
    for index, (character, looking) in enumerate((c, pose) for c in CHARACTERS for pose in c.poses)
)


def compose(composition: Composition) -> Scene:
    """Draws a composition without light; `Scene.shade` lights it."""
    width, height = composition.character.size
    drawing = Scene(height, width)
    backdrops.BACKDROPS[composition.character.place](drawing)
    draw_person(drawing, composition.character.person, composition.looking)
    return drawing


def draw_dataset(output: Path, progress: bool = True) -> int:
    """Writes the set into `output` as `cNN_lM.png` with `cNN_lM.json` beside it, and returns 100.

    The JSON has `caption`, and as ground truth `composition`, `character`, `looking`, `lighting` and `light`.
    The same code writes the same bytes. What is there already and was drawn by this code is kept.

    Raises:
      FileExistsError: `output` holds images or captions that are not of this set.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    expected = {
        f"{c.name}_l{m}{end}" for c in COMPOSITIONS for m in range(len(LIGHTS)) for end in (".png", ".json")
    }
    strangers = sorted(
        p.name for p in output.iterdir() if not p.name.startswith(".") and p.name not in expected
    )
    if strangers:
        raise FileExistsError(
            f"{output} holds {len(strangers)} files that are not of the demonstration set, the first is "
            f"{strangers[0]!r}; give an empty folder"
        )
    total = len(COMPOSITIONS) * len(LIGHTS)
    with tqdm(total=total, desc="drawing", unit="image", disable=not progress) as bar:
        for composition in COMPOSITIONS:
            missing = [m for m in range(len(LIGHTS)) if not _is_drawn(output, composition, m)]
            bar.update(len(LIGHTS) - len(missing))
            drawing = compose(composition) if missing else None
            for lighting in missing:
                buffer = io.BytesIO()
                Image.fromarray(drawing.shade(LIGHTS[lighting])).save(buffer, "PNG", compress_level=4)
                image = output / f"{composition.name}_l{lighting}.png"
                _write(image, buffer.getvalue())
                truth = _truth(composition, lighting, buffer.getvalue())
                _write(image.with_suffix(".json"), (json.dumps(truth, indent=1) + "\n").encode())
                bar.update()
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
    """Digest of the code that draws, so that a changed drawing is drawn anew."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *(Path(module.__file__) for module in (backdrops, portrait, scene))):
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
    os.replace(temporary, path)
