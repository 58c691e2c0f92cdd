"""Which photographs a set is made of: as different as can be, no two alike under any light, no caption twice.

The candidates are read from files, as `subset` reads them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from subset_fixtures import save, small

from preprocess.build.journal import Journal
from preprocess.input.findings import Reject
from preprocess.subset.candidates import Candidate, SubsetOptions, gather
from preprocess.subset.choice import ALIKE, choose, distances, structures
from preprocess.subset.lights import LIGHTS, lit

SIDE = 96


def found_in(folder: Path, **more: Any) -> tuple[list[Candidate], SubsetOptions]:
    """The candidates of a folder, for the choice of these options."""
    options = small(folder, folder.parent / "out", **({"lights": 5, "count": 20} | more)).checked()
    return gather(options, Journal(None)).candidates, options


def chosen_of(folder: Path, **more: Any) -> tuple[list[str], dict[str, Reject]]:
    """Keys that are chosen, and the others' reasons."""
    candidates, options = found_in(folder, **more)
    chosen, left_out = choose(candidates, options)
    assert len(chosen) + len(left_out) <= len(candidates)
    return [one.item.key for one in chosen], {reject.key: reject for reject in left_out}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "photos"


def test_distances_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    by_hand = np.sqrt(((a[:, None] - b[None]) ** 2).mean(-1))
    np.testing.assert_allclose(distances(a, b), by_hand, atol=1e-6)
    greys = np.array([[10.0] * 6, [13.0] * 6, [200.0] * 6])
    np.testing.assert_allclose(distances(greys, greys), [[0, 3, 190], [3, 0, 187], [190, 187, 0]], atol=1e-6)


def test_structures_are_of_what_is_shown_and_not_of_its_brightness(draw_photo) -> None:
    thumbnails = np.array([draw_photo(32, 32, seed) for seed in range(6)])
    space = structures(thumbnails)
    assert space.shape == (6, 256)
    np.testing.assert_allclose(space.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(space, axis=1), 1)
    dim = next(light for light in LIGHTS if light.name == "dim")
    darker = structures(np.array([lit(picture, dim) for picture in thumbnails]))
    assert (distances(darker, space).argmin(1) == np.arange(6)).all()
    assert structures(np.full((1, 32, 32, 3), 90, np.uint8)).max() < 1e-9, "a flat picture is no structure"


def test_structures_by_hand() -> None:
    """Half is black, a quarter red, a quarter white; luma of red is 0.299 x 255."""
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[:, :16, :16], picture[:, :16, 16:] = (255, 0, 0), 255
    stops = np.log2([4, 4 + 0.299 * 255, 259])
    by_hand = stops - (2 * stops[0] + stops[1] + stops[2]) / 4
    by_hand /= np.sqrt(64 * (2 * by_hand[0] ** 2 + by_hand[1] ** 2 + by_hand[2] ** 2))
    found = structures(picture)[0].reshape(16, 16)
    np.testing.assert_allclose([found[15, 3], found[2, 2], found[2, 12]], by_hand, atol=1e-9)


def test_of_copies_and_lookalikes_the_one_with_most_pixels_stays(folder: Path, draw_photo) -> None:
    photos = [draw_photo(SIDE, SIDE, seed) for seed in range(3)]
    for name, photo in zip(("a", "d", "g"), photos):
        save(folder / f"{name}.png", photo, f"photograph {name}")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "b.json").write_text('{"caption": "another caption"}')
    buffer = io.BytesIO()
    Image.fromarray(photos[1]).save(buffer, "JPEG", quality=60)
    save(folder / "e.png", np.asarray(Image.open(buffer)), "a JPEG")
    large = Image.fromarray(photos[1]).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    save(folder / "f.png", np.asarray(large), "larger")
    chosen, left_out = chosen_of(folder)
    assert set(chosen) == {"a.png", "f.png", "g.png"}
    assert {key: (reject.reason, reject.detail) for key, reject in left_out.items()} == {
        "b.png": ("copy of another, byte by byte", "a.png"),
        "d.png": ("looks like another", "f.png"),
        "e.png": ("looks like another", "f.png"),
    }
    assert left_out["b.png"].file == str(folder / "b.png")


def test_what_looks_like_another_mirrored_or_under_a_light_is_left_out(folder: Path, draw_photo) -> None:
    photo, reason = draw_photo(SIDE, SIDE, 0), "looks like another under some light"
    save(folder / "a.png", photo, "photograph a")
    save(folder / "b.png", photo[:, ::-1], "photograph b")
    save(folder / "c.png", lit(photo, LIGHTS[1]), "photograph c")
    save(folder / "d.png", lit(photo[:, ::-1], LIGHTS[2]), "photograph d")
    save(folder / "e.png", draw_photo(SIDE, SIDE, 1), "photograph e")
    chosen, left_out = chosen_of(folder)
    assert len(chosen) == 2 and "e.png" in chosen
    assert {reject.reason for reject in left_out.values()} == {reason} and len(left_out) == 3
    chosen, left_out = chosen_of(folder, lights=1)
    assert len(chosen) == 4 and [reject.reason for reject in left_out.values()] == [reason], "one of a and b"
    chosen, left_out = chosen_of(folder, lights=1, mirror=False)
    assert len(chosen) == 5 and not left_out


def test_photographs_whose_variants_are_alike_are_left_out(folder: Path, draw_photo) -> None:
    photo = draw_photo(SIDE, SIDE, 3)
    halves = np.concatenate([photo[:, ::2], photo[:, ::2][:, ::-1]], axis=1)
    pictures = {
        "symmetric": halves,
        "black": np.full((SIDE, SIDE, 3), 3, np.uint8),
        "flat": np.full((SIDE, SIDE, 3), 120, np.uint8),
        "good": photo,
    }
    for name, picture in pictures.items():
        save(folder / f"{name}.png", picture, f"this is {name}")
    chosen, left_out = chosen_of(folder)
    assert chosen == ["good.png"]
    assert {key: reject.reason for key, reject in left_out.items()} == {
        f"{name}.png": name for name in ("symmetric", "black", "flat")
    }
    chosen, left_out = chosen_of(folder, mirror=False)
    assert "symmetric.png" in chosen and left_out["black.png"].reason == "black"


def test_a_picture_too_dark_for_the_lights_is_left_out(folder: Path, draw_photo) -> None:
    dark = np.full((SIDE, SIDE, 3), 5, np.uint8)
    dark[: SIDE // 2, : SIDE // 2] = 60
    save(folder / "dark.png", dark, "dark")
    save(folder / "good.png", draw_photo(SIDE, SIDE, 3), "good")
    chosen, left_out = chosen_of(folder, lights=len(LIGHTS))
    assert chosen == ["good.png"] and left_out["dark.png"].reason == "too dark for the lights to be told apart"
    assert set(chosen_of(folder, lights=2)[0]) == {"dark.png", "good.png"}


@pytest.mark.parametrize(
    ("captions", "more"),
    [
        (("a dog", "A Dog"), {}),
        (("a cat looking left", "a cat looking right"), {}),
        (("a dog", "a dog, looking right"), {}),
        (("a dog.", "a dog, looking left."), {}),
        (("a man facing north", "a man facing south"), {"edit": ("facing north=>facing south",)}),
        (("a dog", "a dog"), {"mirror": False}),
    ],
)
def test_no_two_share_a_caption_of_either_view(
    folder: Path, draw_photo, captions: tuple[str, str], more: dict[str, Any]
) -> None:
    for seed, caption in enumerate(captions):
        save(folder / f"{seed}.png", draw_photo(SIDE, SIDE, seed), caption)
    save(folder / "2.png", draw_photo(SIDE, SIDE, 2), "a house")
    chosen, left_out = chosen_of(folder, **more)
    assert len(chosen) == 2 and "2.png" in chosen
    (reject,) = left_out.values()
    assert reject.reason == "has the caption of another" and {reject.key, reject.detail} == {"0.png", "1.png"}


def test_captions_of_two_views_do_not_meet_without_mirrored_pictures(folder: Path, draw_photo) -> None:
    for seed, side in enumerate(("left", "right")):
        save(folder / f"{seed}.png", draw_photo(SIDE, SIDE, seed), f"a cat looking {side}")
    assert len(chosen_of(folder, mirror=False)[0]) == 2


def by_hand(candidates: list[Candidate], options: SubsetOptions) -> list[str]:
    """The choice as its description says it, where all candidates can stand together."""
    space = structures(np.array([candidate.thumbnail for candidate in candidates]))
    chosen: list[int] = []
    while len(chosen) < min(options.count, len(candidates)):
        left = [row for row in range(len(candidates)) if row not in chosen]
        own = [row for row in left if options.has_words(candidates[row].item.caption)]
        allowed = own if own and len(chosen) < options.count / 2 else left
        gaps = [min([np.inf, *(np.linalg.norm(space[row] - space[c]) for c in chosen)]) for row in allowed]
        chosen.append(allowed[int(np.argmax(np.round(gaps, 5)))])
    return [candidates[row].item.key for row in chosen]


@pytest.mark.parametrize(("with_words", "count"), [(0, 8), (2, 8), (7, 8), (7, 5), (16, 16)])
def test_each_is_the_least_like_those_before_and_half_have_own_words(
    folder: Path, draw_photo, with_words: int, count: int
) -> None:
    for seed in range(16):
        words = "looking left" if seed >= 16 - with_words else "by the sea"
        save(folder / f"p{seed:02}.png", draw_photo(SIDE, SIDE, seed), f"photograph {seed} {words}")
    candidates, options = found_in(folder, count=count)
    chosen, left_out = choose(candidates, options)
    assert not left_out and [one.item.key for one in chosen] == by_hand(candidates, options)
    words = [options.has_words(one.item.caption) for one in chosen]
    first = min(with_words, (count + 1) // 2)
    assert all(words[:first]), "those with words of their own come first, up to half"


def test_variants_of_all_that_is_chosen_are_apart(folder: Path, draw_photo) -> None:
    for seed in range(12):
        save(folder / f"p{seed:02}.png", draw_photo(SIDE, SIDE, seed), f"photograph {seed}")
    candidates, options = found_in(folder, lights=len(LIGHTS))
    chosen, _ = choose(candidates, options)
    variants = np.concatenate([one.variants(options) for one in chosen])
    assert len(chosen) > 4 and len(variants) == 20 * len(chosen)
    between = distances(variants, variants)
    assert between[~np.eye(len(variants), dtype=bool)].min() >= ALIKE


def test_the_order_in_which_files_were_written_does_not_count(tmp_path: Path, draw_photo) -> None:
    found = []
    for name, seeds in (("a", range(12)), ("b", reversed(range(12)))):
        for seed in seeds:
            save(tmp_path / name / f"p{seed:02}.png", draw_photo(SIDE, SIDE, seed), f"photograph {seed}")
        found.append([chosen_of(tmp_path / name, count=6, workers=workers) for workers in (1, 4)])
    (one, *others) = [chosen for of_folder in found for chosen, _ in of_folder]
    assert len(one) == 6 and all(other == one for other in others)
