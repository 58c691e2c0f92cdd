"""A larger drawn set for `benchmarks.learning`: some thousands of portraits, and combinations held out from training.

    python -m benchmarks.cast --output cast      # cast/train, cast/heldout, cast/shuffled: pictures and captions

The people, places and lights of `preprocess demo`, the clothes in four colours: 8 x 8 x 4 x 3 poses x 5 lights. Held
out is every eighth combination of person, place and colour, in all poses and lights, so that each part of a held-out
picture was seen in training and no such whole. `shuffled` is train with the captions of other pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from preprocess.demo.cast import CHARACTERS, LIGHTS, Character, Composition
from preprocess.demo.portrait import compose

COLOURS = {"green": "#3f6b4c", "blue": "#425e80", "yellow": "#bd9240", "red": "#a03c3c"}
POSES = ("left", "right", "front")
GARMENTS = ("coat", "turtleneck", "cardigan", "scarf", "blouse", "coat", "dress", "sweater")
SIDE = 512


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A composition and whether it is held out."""

    composition: Composition
    stem: str
    held_out: bool


def drawings(people: int = len(CHARACTERS)) -> list[Drawing]:
    """All compositions of the first so many people, in order."""
    places = [character.place for character in CHARACTERS]
    found = []
    for p, character in enumerate(CHARACTERS[:people]):
        who = character.description.rpartition(" in a ")[0]
        for c, (colour, code) in enumerate(COLOURS.items()):
            person = dataclasses.replace(character.person, clothes=GARMENTS[p], cloth=code)
            words = f"{who} in a {colour} {GARMENTS[p].replace('scarf', 'sweater with a scarf')}"
            for q, place in enumerate(places):
                drawn = Character(character.name, words, place, (SIDE, SIDE), POSES, person)
                for pose in POSES:
                    composition = Composition(len(found), drawn, pose)
                    found.append(Drawing(composition, f"{p}{c}{q}_{pose}", (p + 3 * c + q) % 8 == 0))
    return found


def draw(drawing: Drawing, folder: Path) -> None:
    """Writes the pictures of a composition under all lights, each with its caption; not again what is there."""
    if (folder / f"{drawing.stem}_{len(LIGHTS) - 1}.json").exists():  # the last that is written
        return
    scene = compose(drawing.composition)
    for number, light in enumerate(LIGHTS):
        path = folder / f"{drawing.stem}_{number}.png"
        Image.fromarray(scene.shade(light)).save(path, compress_level=1)
        path.with_suffix(".json").write_text(json.dumps({"caption": drawing.composition.caption}))


def shuffle_captions(folder: Path, output: Path, seed: int = 0) -> None:
    """The pictures of a folder, as links, each with the caption of another composition."""
    output.mkdir(exist_ok=True)
    captions = {path.stem.rpartition("_")[0]: path.read_text() for path in sorted(folder.glob("*.json"))}
    order = np.random.default_rng(seed).permutation(list(captions))
    other = dict(zip(order, np.roll(order, 1), strict=True))
    for picture in folder.glob("*.png"):
        path = output / picture.name
        path.unlink(missing_ok=True)
        path.hardlink_to(picture)
        path.with_suffix(".json").write_text(captions[other[picture.stem.rpartition("_")[0]]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--people", type=int, default=len(CHARACTERS), help="draw only the first so many")
    a = parser.parse_args()
    wanted = drawings(a.people)
    folders = [a.output / ("heldout" if drawing.held_out else "train") for drawing in wanted]
    for folder in set(folders):
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(tqdm(pool.map(draw, wanted, folders, chunksize=4), total=len(wanted), desc="compositions", disable=None))
    shuffle_captions(a.output / "train", a.output / "shuffled")
    for folder in sorted(a.output.iterdir()):
        print(f"{len(list(folder.glob('*.png')))} pictures in {folder}")


if __name__ == "__main__":
    main()
