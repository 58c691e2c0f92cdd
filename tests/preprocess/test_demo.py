"""The demonstration set: its files, and what must hold for the gate to be shown on it."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxdit_jax.dataset.grid import INPUT_GRID, Place, read_grid
from preprocess.demo import COMPOSITIONS, LIGHTS, compose, draw_dataset
from preprocess.demo.backdrops import draw_backdrop
from preprocess.demo.scene import Scene
from preprocess.encoders.builtin import DctVae, ToneVision

SMALL = {(512, 512): (128, 128), (448, 576): (112, 144), (576, 448): (144, 112)}


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_grid_is_the_one_promised():
    assert len(COMPOSITIONS) == 20 and len(LIGHTS) == 5
    poses: dict[str, set[str]] = {}
    sizes: dict[str, set[tuple[int, int]]] = {}
    for composition in COMPOSITIONS:
        poses.setdefault(composition.character.name, set()).add(composition.looking)
        sizes.setdefault(composition.character.name, set()).add(composition.character.size)
    assert sorted(map(len, poses.values())) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert all({"left", "right"} <= pose for pose in poses.values())
    assert all(len(size) == 1 for size in sizes.values())
    assert set.union(*sizes.values()) == set(SMALL)


def test_captions_are_distinct_and_never_name_the_light():
    captions = [composition.caption for composition in COMPOSITIONS]
    assert len(set(captions)) == 20
    words = set(re.findall(r"\w+", " ".join(captions).lower()))
    assert not words & {"light", "lit", "golden", "moon", "moonlight", "sunset", "evening", "night", "day", "daylight",
                        "warm", "cold", "bright", "dim", "lamp", "shadow", "magenta", "glow"}  # fmt: skip
    for composition in COMPOSITIONS:
        if composition.looking == "left":  # the edit that the gate makes leads to another caption of the set
            assert composition.caption.replace("looking left", "looking right") in captions


def test_files_truth_and_reuse(tmp_path):
    two = COMPOSITIONS[:2]
    assert draw_dataset(tmp_path, progress=False, compositions=two) == 10
    first = read(tmp_path)
    assert len(first) == 21
    grid = read_grid(tmp_path / INPUT_GRID)
    assert first.keys() == {INPUT_GRID, *grid, *(name.replace(".png", ".json") for name in grid)}
    for name, place in grid.items():
        truth = json.loads(first[name.replace(".png", ".json")])
        assert place == Place(truth["character"], truth["looking"], truth["light"])
    truth = json.loads(first["c01_l3.json"])
    assert truth["caption"] == COMPOSITIONS[1].caption and truth["looking"] == "right"
    assert (truth["composition"], truth["lighting"], truth["light"]) == ("c01", "l3", LIGHTS[3].name)
    with Image.open(tmp_path / "c01_l3.png") as image:
        assert image.size == (512, 512) and image.mode == "RGB"

    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "c00_l2.png").write_bytes(first["c00_l2.png"][:1000])  # a torn file
    (tmp_path / "c01_l4.json").unlink()
    assert draw_dataset(tmp_path, progress=False, compositions=two) == 10
    assert read(tmp_path) == first  # the same bytes again
    redone = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert redone - {INPUT_GRID} == {"c00_l2.png", "c00_l2.json", "c01_l4.png", "c01_l4.json"}


def test_other_peoples_files_are_not_mixed_in(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"not mine")
    with pytest.raises(FileExistsError, match="holiday.jpg"):
        draw_dataset(tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@dataclasses.dataclass
class Drawn:
    """The whole set at the size the quickstart trains on; arrays have 100 rows, composition-major."""

    images: list[np.ndarray]
    composition: np.ndarray
    light: np.ndarray
    character: np.ndarray
    heads: list[float]  # per composition: centre of the head, from 0 (left edge) to 1
    errors: np.ndarray  # root mean square error of the codec, grey levels


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    images, heads = [], []
    for composition in COMPOSITIONS:
        scene = compose(composition)
        empty = Scene(scene.height, scene.width)
        draw_backdrop(empty, composition.character.place)
        subject = np.abs(scene.albedo - empty.albedo).max(-1)[: scene.height // 2] > 0.05
        heads.append(float(np.mean(np.nonzero(subject)[1]) / scene.width))
        for light in LIGHTS:
            image = Image.fromarray(scene.shade(light))
            images.append(np.asarray(image.resize(SMALL[image.size], Image.Resampling.LANCZOS)))
    vae = DctVae()
    errors = [rms(image, vae.decode(vae.encode(image[None]))[0]) for image in images]
    return Drawn(
        images,
        np.repeat(np.arange(20), 5),
        np.tile(np.arange(5), 20),
        np.repeat([ord(c.character.name) - ord("a") for c in COMPOSITIONS], 5),
        heads,
        np.array(errors),
    )


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.mark.slow  # the fixture draws everything, about 10 s
def test_the_subject_stands_where_the_caption_says(drawn):
    centre = {"left": 0.4, "front": 0.5, "right": 0.6}
    for composition, head in zip(COMPOSITIONS, drawn.heads):
        assert head == pytest.approx(centre[composition.looking], abs=0.03), composition.caption


@pytest.mark.slow  # the fixture draws everything, about 10 s
def test_the_codec_can_carry_the_set(drawn):
    psnr = 20 * np.log10(255 / drawn.errors)
    assert np.median(psnr) >= 31.5 and psnr.min() >= 29.5, (np.median(psnr), psnr.min())


@pytest.mark.slow  # the fixture draws everything, about 10 s
def test_every_image_is_its_own_nearest_by_far(drawn):
    """Retrieval means something: another image is at least 2.5 times as far as the codec's error."""
    for row, image in enumerate(drawn.images):
        distances = [
            rms(image, other)
            for column, other in enumerate(drawn.images)
            if column != row and other.shape == image.shape
        ]
        assert min(distances) > 18
        assert min(distances) > 2.5 * drawn.errors[row]


@pytest.mark.slow  # the fixture draws everything, about 10 s
def test_the_tone_vector_knows_the_light_and_hardly_the_scene(drawn):
    vectors = np.concatenate([ToneVision().encode(image[None]) for image in drawn.images]).astype(np.float64)

    def accuracy(label: np.ndarray, left_out: np.ndarray) -> float:
        """Nearest centroid, with the classes of `left_out` taken away one at a time."""
        right = 0
        for group in np.unique(left_out):
            seen, names = left_out != group, np.unique(label)
            centres = np.stack([vectors[seen & (label == name)].mean(0) for name in names])
            nearest = ((vectors[~seen][:, None] - centres) ** 2).sum(-1).argmin(1)
            right += int((names[nearest] == label[~seen]).sum())
        return right / len(label)

    def between(label: np.ndarray) -> float:
        centres = np.stack([vectors[label == name].mean(0) for name in np.unique(label)])
        return float(((centres - vectors.mean(0)) ** 2).sum(-1).mean())

    total = float(((vectors - vectors.mean(0)) ** 2).sum(-1).mean())
    by_light = between(drawn.light)
    assert accuracy(drawn.light, left_out=drawn.character) == 1.0
    assert by_light > 3 * (total - by_light)
    assert between(drawn.composition) < 0.2 * total
    assert accuracy(drawn.composition, left_out=drawn.light) < 0.3
    # Least of all does it know the pose, which the text alone is to decide: pictures of a person looking left
    # and right lie close to each other next to those under different lights.
    pose = np.repeat([c.looking for c in COMPOSITIONS], 5)
    lights = np.stack([vectors[drawn.light == light].mean(0) for light in range(5)])
    apart = np.linalg.norm(lights[:, None] - lights, axis=-1)[~np.eye(5, dtype=bool)].min()
    moved = np.linalg.norm(vectors[pose == "left"] - vectors[pose == "right"], axis=1)
    assert np.median(moved) < 0.15 * apart, (np.median(moved), apart)


@pytest.mark.slow  # the fixture draws everything, about 10 s
def test_structure_survives_the_light(drawn):
    """Locally normalised gradients of log luminance: a composition is closer to itself under another light
    than to another composition under its own light."""

    def smooth(plane: np.ndarray, passes: int) -> np.ndarray:
        for _ in range(passes):
            p = np.pad(plane, 1, mode="edge")
            p = 0.25 * (p[:-2] + 2 * p[1:-1] + p[2:])
            plane = 0.25 * (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:])
        return plane

    def structure(image: np.ndarray) -> np.ndarray:
        light = np.log(image.astype(np.float64) @ [0.299, 0.587, 0.114] + 16)
        small = Image.fromarray(light.astype(np.float32)).resize((64, 64), Image.Resampling.BOX)
        dy, dx = np.gradient(smooth(np.asarray(small, np.float64), 2))
        local = np.sqrt(smooth(dx**2 + dy**2, 60)) + 0.03
        vector = np.stack([dx / local, dy / local]).ravel()
        return vector / np.linalg.norm(vector)

    vectors = np.stack([structure(image) for image in drawn.images])
    likeness = vectors @ vectors.T
    won = []
    for row in range(100):
        same = (drawn.composition == drawn.composition[row]) & (drawn.light != drawn.light[row])
        rival = (drawn.composition != drawn.composition[row]) & (drawn.light == drawn.light[row])
        won.append((likeness[row, same][:, None] > likeness[row, rival][None]).mean())
    assert np.mean(won) > 0.985, np.mean(won)
