"""The file of a gate set's grid: written, read again, and refused by name where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wording import naming

from fluxdit_jax.dataset.grid import GRID_FILE, INPUT_GRID, Place, read_grid, to_json, write_grid
from fluxdit_jax.dataset.manifest import DatasetError

PLACES = {
    "b/fox mirrored-dim.png": Place("fox", "mirrored", "dim"),
    'a "quoted" é\n.jpg': Place("Füchsin", "original", "none"),
    "c.png": Place("", "original", "none"),
}


@pytest.mark.parametrize("grid", [PLACES, {}, {"one": Place("a", "b", "c")}], ids=["three", "none", "one"])
def test_what_was_written_is_read(tmp_path: Path, grid: dict[str, Place]) -> None:
    path = tmp_path / "new" / "folder" / GRID_FILE
    write_grid(path, grid)
    assert read_grid(path) == grid
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left
    write_grid(path, {})
    assert read_grid(path) == {}


def test_the_file_is_readable_and_keeps_the_order(tmp_path: Path) -> None:
    for places in (PLACES, dict(reversed(PLACES.items()))):
        write_grid(tmp_path / GRID_FILE, places)
        assert list(read_grid(tmp_path / GRID_FILE).items()) == list(places.items())
    assert json.loads(to_json(PLACES))["places"]["b/fox mirrored-dim.png"] == ["fox", "mirrored", "dim"]
    assert len(to_json(PLACES).splitlines()) == 3 + 3
    assert INPUT_GRID.startswith(".") and INPUT_GRID != GRID_FILE


def test_a_dataset_without_the_file_has_no_grid(tmp_path: Path) -> None:
    assert read_grid(tmp_path / GRID_FILE) == {} and read_grid(tmp_path / "nowhere" / GRID_FILE) == {}


def test_row_and_order_of_places() -> None:
    assert Place("fox", "mirrored", "dim").row == ("fox", "mirrored")
    assert sorted(PLACES.values())[0] == Place("", "original", "none")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b'{"places": {"a.png": null}}',
        b'{"places": {"a.png": 3}}',
        b'{"places": {"a.png": ["fox", "original"]}}',
        b'{"places": {"a.png": ["fox", "original", "none", "more"]}}',
        b'{"places": {"a.png": ["fox", "original", 3]}}',
        b'{"places": {"a.png": ["fox", "original", null]}}',
        b'{"places": {"a.png": "fox"}}',
        b'{"places": {"a.png": {"photograph": 1, "view": 2, "light": 3}}}',
        b'{"places": {"a.png": ["fox", "original", "none"], "b.png": []}}',
        b'{"places": 3}',
        b'{"a.png": ["fox", "original", "none"]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / GRID_FILE
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=naming(path)):
        read_grid(path)


def test_a_folder_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / GRID_FILE).mkdir()
    with pytest.raises(DatasetError, match=naming(tmp_path / GRID_FILE)):
        read_grid(tmp_path / GRID_FILE)


def test_two_pictures_in_one_place_are_refused(tmp_path: Path) -> None:
    path = tmp_path / GRID_FILE
    for twice in (Place("ant", "original", "dim"), Place("zebra", "original", "dim")):
        write_grid(path, PLACES | {"x.png": twice, "y.png": twice, "z.png": twice})
        with pytest.raises(DatasetError, match=naming(path, 3, twice.photograph, "dim")):
            read_grid(path)


def test_a_changed_word_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / GRID_FILE
    path.write_text(to_json(PLACES).replace("fox", "fax"))
    with pytest.raises(DatasetError, match=naming(path, "checksum")):
        read_grid(path)


def test_a_file_made_by_hand_needs_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / GRID_FILE
    path.write_text('{"places": {"a.png": ["fox", "original", "none"]}}')
    assert read_grid(path) == {"a.png": Place("fox", "original", "none")}
