"""Choosing a set: duplicates, one light, couples, poses; on numbers whose right answer is known."""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from fluxdit_jax.shared.edit_rules import DEFAULT_RULES
from preprocess.subset.choice import (
    THUMBNAIL,
    Candidates,
    choose,
    couples,
    distances,
    distinct,
    figures,
    neighbourhood,
    poses,
    side_of,
    spacing,
    spread,
)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def candidates(captions: list[str], light: np.ndarray, seed: int = 0, **more) -> Candidates:
    """Random poses and thumbnails; text is one random direction for every word."""
    rng = np.random.default_rng(seed)
    words = sorted({word for caption in captions for word in caption.split()})
    vectors = dict(zip(words, rng.normal(size=(len(words), 64))))
    text = unit(np.array([np.mean([vectors[w] for w in c.split()], axis=0) for c in captions]))
    values = {
        "captions": captions,
        "contents": [f"{n:064x}" for n in range(len(captions))],
        "pixels": [1000] * len(captions),
        "text": text,
        "vision": unit(rng.normal(size=(len(captions), 32))),
        "light": light,
        "thumbnails": rng.integers(0, 256, (len(captions), THUMBNAIL, THUMBNAIL, 3), np.uint8),
    }
    return Candidates(**(values | more))


def lights(sizes: list[int], noise: list[float], seed: int = 1) -> np.ndarray:
    """Unit vectors round one direction for each cluster."""
    rng = np.random.default_rng(seed)
    rows = [
        np.eye(16)[number] + scale * rng.normal(size=(size, 16)) / 4
        for number, (size, scale) in enumerate(zip(sizes, noise))
    ]
    return unit(np.concatenate(rows))


def test_distances_are_those_of_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    np.testing.assert_allclose(distances(a, b), np.linalg.norm(a[:, None] - b[None], axis=-1), atol=1e-6)


def test_side_of_a_caption():
    left_right = DEFAULT_RULES[0]
    assert side_of("a man looking left", left_right) == "old"
    assert side_of("A man Looking Right, smiling", left_right) == "new"
    assert side_of("a man looking leftwards", left_right) == ""
    assert side_of("one looking left, one looking right", left_right) == ""


def test_copies_and_lookalikes_are_left_out_and_the_largest_stays(draw_photo):
    def thumbnail(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))

    photos = [Image.fromarray(draw_photo(256, 256, seed)) for seed in range(3)]
    buffer = io.BytesIO()
    photos[1].save(buffer, "JPEG", quality=60)
    versions = [photos[0], photos[0], photos[1], Image.open(buffer), photos[1].resize((512, 512)), photos[2]]
    given = candidates(
        ["a"] * 6,
        lights([6], [1]),
        contents=["p", "p", "q", "r", "s", "t"],
        pixels=[9, 9, 9, 9, 20, 9],
        thumbnails=np.array([thumbnail(version) for version in versions]),
    )
    kept, instead, copies = distinct(given, DEFAULT_RULES)
    assert kept == [0, 4, 5]
    assert instead == {1: 0, 2: 4, 3: 4}
    assert copies == 1


def test_lookalikes_with_opposite_captions_are_both_kept():
    thumbnails = np.full((3, THUMBNAIL, THUMBNAIL, 3), 100, np.uint8)
    given = candidates(["a man looking left", "a man looking right", "a man"], lights([3], [1]), thumbnails=thumbnails)
    kept, instead, _ = distinct(given, DEFAULT_RULES)
    assert kept == [0, 1, 2] and not instead
    kept, instead, _ = distinct(dataclasses.replace(given, captions=["a man"] * 3), DEFAULT_RULES)
    assert kept == [0] and instead == {1: 0, 2: 0}


def test_the_tightest_light_is_found():
    light = lights([30, 20, 30], [1.0, 0.2, 1.0])
    centre, far = neighbourhood(light, 20)
    assert 30 <= centre < 50
    assert sorted(np.argsort(far)[:20]) == list(range(30, 50))


def test_couples_are_twins_in_one_light():
    people = ["a man", "a woman", "a girl", "a boy"]
    captions = [f"{who} looking {way}" for way in ("left", "right") for who in people for _ in range(2)]
    light = np.array([np.eye(16)[n % 2] for n in range(len(captions))])
    found = couples(candidates(captions, light), DEFAULT_RULES)
    assert len(found) == 8 and all(couple.twins for couple in found)
    for couple in found:
        assert captions[couple.old].replace("left", "right") == captions[couple.new]
        assert couple.old % 2 == couple.new % 2
    assert len({row for couple in found for row in (couple.old, couple.new)}) == 16


def test_captions_that_only_resemble_make_couples_after_twins():
    captions = [
        "a tall man with a hat looking left at dusk",
        "a tall man with a hat looking right at noon",
        "a small dog on grass looking left",
        "a small dog on grass looking right",
        "a house",
    ]
    found = couples(candidates(captions, lights([5], [0.1])), DEFAULT_RULES)
    assert [(c.old, c.new, c.twins) for c in found] == [(0, 1, False), (2, 3, True)]


def test_a_twin_in_another_light_is_preferred_to_a_stranger_in_the_same():
    captions = ["a cat looking left", "a cat looking right", "a dog looking left", "a dog looking right"]
    light = np.eye(16)[[0, 1, 1, 0]]
    found = couples(candidates(captions, light), DEFAULT_RULES)
    assert [(c.old, c.new, c.twins) for c in found] == [(0, 1, True), (2, 3, True)]


def test_both_parts_of_a_pose_count_the_same_and_a_constant_one_not_at_all():
    given = candidates([f"word{n} and more" for n in range(40)], lights([40], [1]))
    given = dataclasses.replace(given, vision=1000 * given.vision)
    space = poses(given)
    for part in (space[:, :64], space[:, 64:]):
        squares = distances(part, part) ** 2
        assert squares.mean() == pytest.approx(1.0, rel=1e-3)
    constant = dataclasses.replace(given, vision=np.ones((40, 3)))
    assert poses(constant).shape == (40, 64)


def test_farthest_points_are_those_of_the_definition():
    """Against a plain loop over sets of points, with one light so that all are candidates."""
    given = candidates([f"w{n}" for n in range(30)], np.tile(np.eye(16)[:1], (30, 1)))
    choice = choose(given, 10, DEFAULT_RULES, 1.0)
    space = poses(given)
    expected = [0]
    while len(expected) < 10:
        gaps = [min(np.linalg.norm(space[row] - space[taken]) for taken in expected) for row in range(30)]
        expected.append(int(np.argmax(np.round(gaps, 6))))
    assert choice.rows == expected
    assert choice.distances[0] == np.inf
    assert choice.distances[1:] == sorted(choice.distances[1:], reverse=True)


def test_one_light_is_chosen_and_poses_stay_different():
    captions = [f"thing{n % 50} in place{n % 7}" for n in range(200)]
    given = candidates(captions, lights([100, 100], [0.5, 0.3]))
    choice, free = choose(given, 40, DEFAULT_RULES, 0.25), choose(given, 40, DEFAULT_RULES, 1.0)
    assert all(row >= 100 for row in choice.rows)
    assert len(set(choice.rows)) == 40
    told = figures(given, choice, free)
    assert told["light_spread"]["chosen"] < 0.5 * told["light_spread"]["by_chance"]
    assert told["pose_spread"]["chosen"] >= told["pose_spread"]["by_chance"]
    assert told["pose_spacing"]["chosen"] > told["pose_spacing"]["by_chance"]
    assert told["light_spread"]["any_light"] > 0.9 * told["light_spread"]["by_chance"]
    assert told["captions"]["chosen"] == len({captions[row] for row in choice.rows})


def test_more_light_is_let_in_when_one_light_is_one_subject():
    """The densest light holds thirty times the same thing; a set of it alone would be no set of poses."""
    captions = ["grass"] * 30 + [f"thing{n}" for n in range(50)]
    given = candidates(captions, lights([30, 50], [0.1, 2.0]))
    same = given.vision.copy()
    same[:30] = same[0]
    given = dataclasses.replace(given, vision=same)
    choice = choose(given, 16, DEFAULT_RULES, 0.25)
    assert choice.neighbours > 30
    assert spread(poses(given), choice.rows) >= spread(poses(given), range(80))


@pytest.mark.parametrize("count, expected", [(8, 2), (40, 10), (60, 12)])
def test_up_to_half_of_the_set_are_couples(count, expected):
    captions = [f"person{n // 2} looking {'left' if n % 2 else 'right'}" for n in range(24)]
    given = candidates(captions + [f"thing{n}" for n in range(76)], lights([24, 76], [0.5, 0.5]))
    choice = choose(given, count, DEFAULT_RULES, 0.25)
    assert len(choice.couples) == expected
    assert sorted(choice.rows) == sorted(set(choice.rows)) and len(choice.rows) == count
    flat = list(itertools.chain.from_iterable((c.old, c.new) for c in choice.couples))
    assert choice.rows[: 2 * expected] == flat


def test_figures_by_hand():
    space = np.array([[0.0], [1.0], [3.0]])
    assert spread(space, [0, 1, 2]) == pytest.approx((1 + 3 + 2) / 3)
    assert spacing(space, [0, 1, 2]) == pytest.approx((1 + 1 + 2) / 3)
    assert spread(space, [1]) == spacing(space, [1]) == 0.0
