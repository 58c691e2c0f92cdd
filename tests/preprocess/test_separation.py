"""Whether lights are read from vision vectors, and whether latents differ enough: arrays with a known answer."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import options, read, write_photos
from subset_fixtures import small
from wording import lines_naming

from fluxdit_jax.dataset.grid import GRID_FILE, Place, read_grid, write_grid
from fluxdit_jax.dataset.manifest import DatasetError, load_manifest
from preprocess.build.build import build
from preprocess.inspect.report import inspect
from preprocess.inspect.separation import latent_lines, light_lines, separate_latents, separate_lights
from preprocess.subset.subset import subset

LIGHTS = ("none", "warm", "cool", "dim", "right")
WIDTH = 64


def places(photographs: int, lights: int = 5, views: int = 2) -> list[Place]:
    names = itertools.product(range(photographs), ("original", "mirrored")[:views], LIGHTS[:lights])
    return [Place(f"p{number}", view, light) for number, view, light in names]


def directions(rng: np.random.Generator, count: int) -> np.ndarray:
    """Unit vectors [count, WIDTH] that are orthogonal to each other."""
    return np.linalg.qr(rng.normal(size=(WIDTH, count)))[0].T


def vectors(grid: list[Place], light: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Unit vectors: one direction for each row of the grid, one of this length for each light, and noise."""
    rng = np.random.default_rng(seed)
    rows = list(dict.fromkeys(place.row for place in grid))
    axes = directions(rng, len(rows) + len(LIGHTS))
    content, lights = axes[: len(rows)], axes[len(rows) :]
    made = np.array([content[rows.index(p.row)] + light * lights[LIGHTS.index(p.light)] for p in grid])
    made += noise * rng.normal(size=made.shape)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ lights


@pytest.mark.parametrize("seed", range(5))
def test_an_encoder_that_sees_no_light_is_at_chance_and_warned_of(seed: int) -> None:
    grid = places(20)
    found = separate_lights(vectors(grid, light=0.0, noise=1e-4, seed=seed), grid)
    assert found is not None and found.chance == 0.2
    assert abs(np.mean(list(found.retrieved.values())) - 0.2) < 0.1, found
    assert found.unseen == list(LIGHTS) and found.strength < 0.01
    (_, warning) = light_lines(found, "someone/encoder")
    assert all(word in warning for word in ("warning", "someone/encoder", *LIGHTS))


@pytest.mark.parametrize("light", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("photographs", [2, 3, 10])
def test_one_that_sees_them_names_all_even_where_they_move_little(light: float, photographs: int) -> None:
    """0.05: twenty times less than another photograph does."""
    grid = places(photographs)
    found = separate_lights(vectors(grid, light, noise=light / 100), grid)
    assert found is not None and found.retrieved == dict.fromkeys(LIGHTS, 1.0) and found.unseen == []
    # Changes by a light: light * sqrt(1 - 1/5); means of rows are unit vectors round their mean.
    ratio = light * np.sqrt(0.8) / np.sqrt(1 - 1 / (2 * photographs))
    assert found.strength == pytest.approx(ratio, rel=0.1)
    lines = light_lines(found, "someone/encoder")
    assert "none 100%, warm 100%" in lines[0] and "chance 20%" in lines[0] and f"{found.strength:.2f}" in lines[0]
    assert len(lines) == 1 + (found.strength < 0.05), "a light that is only faint is warned of"


def test_only_lights_that_are_not_seen_are_named() -> None:
    """What is under "dim" looks as without a light, but for a little noise."""
    grid = places(12)
    made = vectors(grid, light=0.5, noise=1e-3)
    whole = separate_lights(made, grid)
    assert whole is not None and whole.unseen == []
    for row, place in enumerate(grid):
        if place.light == "dim":
            made[row] = made[row - LIGHTS.index("dim")]
    made += 1e-5 * np.random.default_rng(1).normal(size=made.shape).astype(np.float32)
    found = separate_lights(made, grid)
    assert found is not None and [light for light, share in found.retrieved.items() if share == 1.0] == [
        "warm", "cool", "right"
    ]  # fmt: skip
    assert found.unseen and set(found.unseen) <= {"none", "dim"}
    (_, warning) = light_lines(found, "x")
    assert "warm" not in warning and ", ".join(found.unseen) in warning


def test_what_one_photograph_alone_shows_is_not_learned_from_itself() -> None:
    """Each photograph has directions of its own for its lights: it could be read only by having seen it."""
    grid = places(12)
    rng = np.random.default_rng(0)
    made = vectors(grid, 0.0)
    for number in range(12):
        rows = [row for row, place in enumerate(grid) if place.photograph == f"p{number}"]
        own = directions(rng, 5)
        made[rows] += np.array([own[LIGHTS.index(grid[row].light)] for row in rows], np.float32)
    found = separate_lights(made, grid)
    assert found is not None and np.mean(list(found.retrieved.values())) < 0.4 and found.strength > 0.5


def test_lights_of_photographs_that_have_a_light_of_their_own() -> None:
    """What is changed tells the light; the vector as it is tells it only if no photograph looks as if lit already."""
    grid, rng = places(20), np.random.default_rng(0)
    own, lights = rng.normal(size=(20, WIDTH)), directions(rng, 5)
    numbers = [int(place.photograph[1:]) for place in grid]
    found = []
    for content in (own / 50, own):
        made = np.array([content[n] + lights[LIGHTS.index(p.light)] for n, p in zip(numbers, grid)])
        found.append(separate_lights(made, grid))
    plain, mixed = found
    assert plain is not None and plain.unaided == 1.0 == min(plain.retrieved.values())
    assert mixed is not None and mixed.unaided < 0.7 and min(mixed.retrieved.values()) == 1.0
    assert mixed.unseen == [] and len(light_lines(mixed, "x")) == 1
    assert f"as they are {mixed.unaided:.0%}" in light_lines(mixed, "x")[0]


def test_many_photographs_teach_more_than_one() -> None:
    """Of noisy vectors: with two photographs one is taught by the other alone, with twenty by nineteen."""
    means = []
    for count in (2, 20):
        grid = places(count)
        found = [separate_lights(vectors(grid, 0.3, 0.1, seed), grid) for seed in range(5)]
        means.append(np.mean([share for one in found if one for share in one.retrieved.values()]))
    assert means[0] < 0.8 and means[1] > 0.85, means


def test_an_encoder_that_says_the_same_of_everything() -> None:
    grid = places(4)
    found = separate_lights(np.tile(np.eye(1, WIDTH, dtype=np.float32), (len(grid), 1)), grid)
    assert found is not None and found.strength == 0 and np.mean(list(found.retrieved.values())) == pytest.approx(0.2)
    assert len(light_lines(found, "x")) == 2


def test_lights_that_a_photograph_lacks_and_any_order() -> None:
    grid = places(6)
    made = vectors(grid, 0.3, 1e-3)
    order = np.random.default_rng(2).permutation(len(grid))[:-7]
    found = separate_lights(made[order], [grid[row] for row in order])
    assert found is not None and sorted(found.retrieved) == sorted(LIGHTS) and min(found.retrieved.values()) > 0.8


@pytest.mark.parametrize("grid", [places(1), places(5, lights=1), places(1, lights=1, views=1), []])
def test_fewer_than_two_photographs_or_lights_are_not_measured(grid: list[Place]) -> None:
    made = vectors(grid, 0.3) if grid else np.zeros((0,))
    assert separate_lights(made, grid) is None
    (line,) = light_lines(None, "x")
    assert "not measured" in line and "warning" not in line


# ----------------------------------------------------------------------------------------------------- latents


def test_distances_of_latents_by_hand() -> None:
    """One channel of standard deviation 2, two of 1: differences 4, 3 and 0 are 2, 3 and 0 of them."""
    base = np.zeros((3, 1, 2), np.float32)
    other = base.copy()
    other[0, 0, 0], other[1, 0, 1] = 4, 3
    far = base + 50
    found = separate_latents([base, other, far], [2.0, 1.0, 1.0])
    nearest = np.sqrt((2**2 + 3**2) / 6) / np.sqrt(2)
    np.testing.assert_allclose(found.nearest[:2], nearest)
    by_hand = [((far - each) / np.array([2.0, 1.0, 1.0])[:, None, None]).ravel() for each in (base, other)]
    assert found.nearest[2] == pytest.approx(min(np.sqrt(np.square(d).mean() / 2) for d in by_hand))
    assert found.pair == (0, 1)


def test_one_is_the_distance_of_unrelated_latents() -> None:
    rng = np.random.default_rng(0)
    std = np.array([0.5, 1.0, 3.0, 7.0])
    latents = [(std[:, None, None] * rng.normal(size=(4, 64, 64)) + 5).astype(np.float32) for _ in range(6)]
    np.testing.assert_allclose(separate_latents(latents, std).nearest, 1, atol=0.03)


def test_latents_of_other_sizes_are_apart() -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, 4, 8), (1, 8, 4), (1, 4, 8), (1, 8, 8), (1, 8, 4)]
    latents = [rng.normal(size=size) for size in sizes]
    latents[4] = latents[1] + 0.1
    found = separate_latents(latents, [1.0])
    assert found.nearest[3] == np.inf and found.pair == (1, 4)
    assert found.nearest[0] == found.nearest[2] and np.isfinite(found.nearest[[0, 1, 2, 4]]).all()
    lines = latent_lines(found, ["a", "b", "c", "d", "e"])
    assert lines_naming("\n".join(lines), f"{np.median(found.nearest[[0, 1, 2, 4]]):.2f}", "0.07", "b and e")
    alone = separate_latents(latents[1:4], [1.0])
    assert alone.pair is None and (alone.nearest == np.inf).all()
    (line,) = latent_lines(alone, ["b", "c", "d"])
    assert "warning" not in line and separate_latents([], [1.0]).pair is None


def test_pictures_that_are_hard_to_tell_apart_are_counted() -> None:
    rng = np.random.default_rng(0)
    latents = list(rng.normal(size=(6, 1, 16, 16)))
    keys = [f"k{row}" for row in range(6)]
    assert len(latent_lines(separate_latents(latents, [1.0]), keys)) == 1
    latents[4] = latents[1] + 0.12 * np.sqrt(2)
    latents[5] = latents[2] + 0.08 * np.sqrt(2)
    first, warning = latent_lines(separate_latents(latents, [1.0]), keys)
    assert "k2 and k5" in first and "0.08 at least" in first
    assert lines_naming(warning, "warning", 2, "0.1")
    latents[3] = latents[0].copy()
    first, warning = latent_lines(separate_latents(latents, [1.0]), keys)
    assert "k0 and k3" in first and "0.00 at least" in first and lines_naming(warning, 4)


# ----------------------------------------------------------------------------------------------------- inspect


def test_inspect_tells_it_of_a_gate_set_and_of_no_other(
    tmp_path: Path, draw_photo, capsys: pytest.CaptureFixture
) -> None:
    photos = write_photos(tmp_path / "photos", 12, draw_photo)
    subset(small(photos, tmp_path / "set", count=10, lights=3))
    build(options(tmp_path / "set", tmp_path / "data", holdout=0.0))
    capsys.readouterr()
    inspect(tmp_path / "data", tmp_path / "pictures", cells=1)
    told = capsys.readouterr().out
    assert lines_naming(told, "gate set", 60, "10 photographs", "2 views", "3 lights")
    assert "share their caption" not in told, "those of one photograph and view do so on purpose"
    grid, found = read_grid(tmp_path / "data" / GRID_FILE), read(tmp_path / "data")
    seen = separate_lights(np.array([found[key].vision for key in grid]), list(grid.values()))
    assert seen is not None and min(seen.retrieved.values()) > 0.9
    shares = [f"{light} {share:.0%}" for light, share in seen.retrieved.items()]
    assert lines_naming(told, "builtin:tone", *shares, f"{seen.strength:.2f}")
    apart = separate_latents([found[key].latent for key in grid], load_manifest(tmp_path / "data").latent_std)
    assert apart.pair is not None
    pair = [list(grid)[row] for row in apart.pair]
    assert lines_naming(told, "latents", f"{apart.nearest[np.isfinite(apart.nearest)].min():.2f}", *pair)

    build(options(photos, tmp_path / "other", holdout=0.0))
    capsys.readouterr()
    inspect(tmp_path / "other", tmp_path / "pictures", cells=1)
    told = capsys.readouterr().out
    assert not [word for word in ("gate set", "lights", "probe", "nearest other") if word in told]


def test_inspect_of_a_grid_of_some_records_and_of_a_damaged_one(
    tmp_path: Path, draw_photo, capsys: pytest.CaptureFixture
) -> None:
    photos = write_photos(tmp_path / "photos", 4, draw_photo)
    build(options(photos, tmp_path / "data", holdout=0.0))
    one = {"set0/p00.png": Place("a", "original", "none"), "gone.png": Place("b", "original", "warm")}
    write_grid(tmp_path / "data" / GRID_FILE, one)
    capsys.readouterr()
    inspect(tmp_path / "data", tmp_path / "pictures", cells=1)
    told = capsys.readouterr().out
    assert lines_naming(told, "gate set", "1 of 4 records", "1 photographs")
    assert "lights: not measured" in told and "no two pictures have the same size" in told
    (tmp_path / "data" / GRID_FILE).write_text("{")
    with pytest.raises(DatasetError, match="grid.json"):
        inspect(tmp_path / "data", tmp_path / "pictures", cells=1)
