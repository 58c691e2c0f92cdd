"""Who is in the demonstration set, how they look, and the five lights. Data only."""

from __future__ import annotations

import dataclasses

from preprocess.demo.scene import Light

# Strengths are chosen so that every light keeps detail in its shadows: a picture that is black over half its
# area says nothing about its composition. Ambient light is a fourth to a half of the key.
LIGHTS = (
    Light("golden evening from the left", (-0.85, -0.25, 0.65), (2.10, 1.22, 0.50), (0.34, 0.29, 0.33), 0.40, 0.60),
    Light("moonlight from the right", (0.80, -0.45, 0.60), (0.34, 0.62, 1.30), (0.08, 0.12, 0.25), 0.40, 0.60),
    Light("daylight from the front", (0.05, -0.25, 1.00), (1.10, 1.08, 1.06), (0.56, 0.58, 0.62), 0.08, 0.35),
    Light("magenta sunset from above", (0.40, -0.90, 0.55), (1.70, 0.50, 0.80), (0.42, 0.18, 0.42), 0.35, 0.55),
    Light("green lamp from below", (-0.25, 0.70, 0.75), (0.22, 0.85, 0.50), (0.05, 0.19, 0.15), 0.45, 0.45),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Person:
    """What one character looks like; colours as "#rrggbb".

    Attributes:
      kind: "woman", "man", "old man", "girl" or "boy": build and features.
      skin, eyes, hair_colour, cloth, second, hat_colour: colours; `second` is the shirt, trim or scarf.
      hair: "curls", "bun", "afro", "braids" or "short".
      clothes: "coat", "turtleneck", "cardigan", "scarf", "blouse", "dress" or "sweater".
      beard: "", "full" or "moustache".
      hat: "", "beanie" or "fedora".
    """

    kind: str
    skin: str
    eyes: str
    hair: str
    hair_colour: str
    clothes: str
    cloth: str
    second: str
    beard: str = ""
    hat: str = ""
    hat_colour: str = "#808080"
    glasses: bool = False
    earrings: bool = False

    @property
    def young(self) -> bool:
        return self.kind in ("girl", "boy")

    @property
    def female(self) -> bool:
        return self.kind in ("woman", "girl")


@dataclasses.dataclass(frozen=True)
class Character:
    """A person in a place.

    Attributes:
      name: "a" to "h".
      description: the person in words, for the caption.
      place: a key of `backdrops.BACKDROPS`, and its words in the caption.
      size: (width, height) of the pictures, pixels; all poses of a character share it.
      poses: where the person looks: "left", "right" (the viewer's), "front".
    """

    name: str
    description: str
    place: str
    size: tuple[int, int]
    poses: tuple[str, ...]
    person: Person


@dataclasses.dataclass(frozen=True)
class Composition:
    """One row of the grid: who, where, and which way they look.

    Attributes:
      index: 0 to 19.
      looking: "left", "right" or "front".
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


_SQUARE, _TALL, _WIDE = (512, 512), (448, 576), (576, 448)
_ALL, _TWO = ("left", "right", "front"), ("left", "right")

CHARACTERS = (
    Character(
        "a", "a woman with red curly hair in a green coat", "a brick wall", _SQUARE, _ALL,
        Person("woman", "#e9b797", "#4d7a56", "curls", "#a8482f", "coat", "#3f6b4c", "#ded3be"),
    ),
    Character(
        "b", "a man with short black hair and a beard in a blue turtleneck", "a window", _TALL, _ALL,
        Person("man", "#c98f68", "#5a4632", "short", "#3a2e2a", "turtleneck", "#425e80", "#425e80", "full"),
    ),
    Character(
        "c", "an old man with white hair and round glasses in a yellow cardigan", "a bookshelf", _WIDE, _ALL,
        Person("old man", "#dda98e", "#5b7286", "short", "#cfcbc4", "cardigan", "#bd9240", "#d8cfc0", "moustache",
               glasses=True),
    ),
    Character(
        "d", "a girl with blond braids in a white sweater with a red scarf", "the sea", _WIDE, _ALL,
        Person("girl", "#ecbf9f", "#4f7ea3", "braids", "#cfa052", "scarf", "#d2ccc0", "#ad3f3c"),
    ),
    Character(
        "e", "a woman with a black hair bun and pearl earrings in a purple blouse", "a garden", _TALL, _TWO,
        Person("woman", "#d6a27c", "#4a3526", "bun", "#3b3034", "blouse", "#8a6a9a", "#dccbd0", earrings=True),
    ),
    Character(
        "f", "a man with a grey hat in a brown jacket", "green hills", _SQUARE, _TWO,
        Person("man", "#d8a283", "#5f7561", "short", "#5f432f", "coat", "#7a5a3e", "#d2c7b2", hat="fedora",
               hat_colour="#83817f"),
    ),
    Character(
        "g", "a woman with a dark afro in a yellow dress", "a teal wall with pictures", _TALL, _TWO,
        Person("woman", "#96624a", "#3a2418", "afro", "#43322b", "dress", "#d0a83f", "#ead9aa", earrings=True),
    ),
    Character(
        "h", "a boy with a blue beanie in a striped sweater", "a town in winter", _SQUARE, _TWO,
        Person("boy", "#e8b99b", "#5f7fa0", "short", "#8a5a34", "sweater", "#cfc8ba", "#a8584a", hat="beanie",
               hat_colour="#3f6a98"),
    ),
)  # fmt: skip

COMPOSITIONS = tuple(
    Composition(index, character, looking)
    for index, (character, looking) in enumerate((c, pose) for c in CHARACTERS for pose in c.poses)
)
