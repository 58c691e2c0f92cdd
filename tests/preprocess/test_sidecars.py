"""Which caption file belongs to which picture, by name."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preprocess.input.byte_source import ByteSource
from preprocess.input.sidecars import Sidecars


def names(
    pictures: list[str], files: list[str], first_dot: bool = False, others: tuple[str, ...] = ()
) -> dict[str, list[list[str]]]:
    """Of each picture the paths of its caption files, in groups, in order; the unused ones are under ""."""
    sidecars = Sidecars(pictures, [(file, ByteSource(file)) for file in files], others, first_dot)
    result = {}
    for picture in pictures:
        groups = itertools.groupby(sidecars.sources(picture), key=lambda source: source.group)
        result[picture] = [[source.place.path if source.place else source.texts.reason for source in group]
                           for _, group in groups]  # fmt: skip
    result[""] = [[name for name, _ in sidecars.unused()]]
    return result


@pytest.mark.parametrize(
    ("pictures", "files", "expected"),
    [
        (["a.png"], ["a.caption", "a.txt", "a.json"], {"a.png": [["a.json"], ["a.txt"], ["a.caption"]]}),
        (["a.png"], ["a.TXT"], {"a.png": [["a.TXT"]]}),
        (["a.PNG"], ["a.Json"], {"a.PNG": [["a.Json"]]}),
        (["a.png"], ["a.TXT", "a.txt"], {"a.png": [["a.txt"]]}),
        (["a.png"], ["a.png.txt"], {"a.png": [["a.png.txt"]]}),
        (["a.jpg", "a.png"], ["a.png.txt", "a.txt"], {"a.jpg": [["a.txt"]], "a.png": [["a.png.txt"], ["a.txt"]]}),
        (["a.png"], ["a.txt", "a.1.txt", "a.2.txt"], {"a.png": [["a.txt", "a.1.txt", "a.2.txt"]]}),
        (["a.png"], ["a.10.txt", *(f"a.{n}.txt" for n in range(10))], {"a.png": [[f"a.{n}.txt" for n in range(11)]]}),
        (["a.png", "a.1.png"], ["a.1.txt"], {"a.png": [], "a.1.png": [["a.1.txt"]]}),
        (["v1.png"], ["v1.2.txt"], {"v1.png": []}),
        (["v1.png"], ["v1.02.txt", "v1.01.txt"], {"v1.png": []}),
        (["at 10.15.png"], ["at 10.15.30.txt"], {"at 10.15.png": []}),
        (["at 10.15.30"], ["at 10.15.30.txt"], {"at 10.15.30": [["at 10.15.30.txt"]]}),
        (["IMG.JPG"], ["IMG.JPG.txt"], {"IMG.JPG": [["IMG.JPG.txt"]]}),
        (["b.Png"], ["b.PNG.CAPTION"], {"b.Png": [["b.PNG.CAPTION"]]}),
        (["C.JPG"], ["C.JPG.1.txt", "C.jpg.2.TXT"], {"C.JPG": [["C.JPG.1.txt", "C.jpg.2.TXT"]]}),
        (["p.jpg_large"], ["p.txt"], {"p.jpg_large": [["p.txt"]]}),
        (["q.jpg!d"], ["q.jpg.txt"], {"q.jpg!d": [["q.jpg.txt"]]}),
        (["e\u0301.png"], ["\u00e9.txt"], {"e\u0301.png": [["\u00e9.txt"]]}),
        (["\u00e9.png"], ["e\u0301.txt"], {"\u00e9.png": [["e\u0301.txt"]]}),
        (
            ["\u00e9.png", "e\u0301.png"],
            ["e\u0301.txt", "\u00e9.txt"],
            {"\u00e9.png": [["\u00e9.txt"]], "e\u0301.png": [["e\u0301.txt"]]},
        ),
    ],
)  # fmt: skip
def test_in_a_folder(pictures: list[str], files: list[str], expected: dict) -> None:
    found = names(pictures, files)
    assert {name: found[name] for name in pictures} == expected


SHOTS = [f"Screenshot 2026-01-01 at 10.15.{second}" for second in (30, 31, 32)]


@pytest.mark.parametrize(
    ("pictures", "files", "expected"),
    [
        ([s + ".png" for s in SHOTS], [s + ".txt" for s in SHOTS], {s + ".png": [[s + ".txt"]] for s in SHOTS}),
        ([s + ".png" for s in SHOTS], [SHOTS[0] + ".txt"], {
            SHOTS[0] + ".png": [[SHOTS[0] + ".txt"]],
            SHOTS[1] + ".png": [["several pictures of one name"]],
            SHOTS[2] + ".png": [["several pictures of one name"]],
        }),
        (["d/1.mask.png"], ["d/1.json"], {"d/1.mask.png": [["d/1.json"]]}),
        (["d/1.mask.png"], ["d/1.json", "d/1.txt"], {"d/1.mask.png": [["d/1.json", "d/1.txt"]]}),
        (["d/1.mask.png"], ["d/1.a.json", "d/1.b.json"], {"d/1.mask.png": [["d/1.a.json", "d/1.b.json"]]}),
        (["1.mask.png", "1.jpg"], ["1.json"], {
            "1.mask.png": [["several pictures of one name"]],
            "1.jpg": [["1.json"]],
        }),
        (["a/1.mask.png"], ["b/1.json"], {"a/1.mask.png": []}),
        (["1.x.png"], ["1.json"], {"1.x.png": [["1.json"]]}),
        (["1.jpg"], ["1.txt", "1.caption.json"], {"1.jpg": [["1.txt"], ["1.caption.json"]]}),
    ],
)  # fmt: skip
def test_in_an_archive(pictures: list[str], files: list[str], expected: dict) -> None:
    found = names(pictures, files, first_dot=True)
    assert {name: found[name] for name in pictures} == expected


@pytest.mark.parametrize(
    ("others", "files", "expected"),
    [
        (["shot.1.heic"], ["shot.txt", "shot.1.txt"], ["shot.txt"]),
        (["shot.1.mp4"], ["shot.1.txt"], []),
        (["shot.1"], ["shot.1.txt"], []),
        (["shot.2.GIF"], ["shot.1.txt", "shot.2.txt"], ["shot.1.txt"]),
        (["other.1.heic"], ["shot.1.txt"], ["shot.1.txt"]),
    ],
)
def test_a_caption_of_another_file_is_no_further_one(others: list, files: list, expected: list) -> None:
    assert names(["shot.png"], files, others=tuple(others))["shot.png"] == ([expected] if expected else [])


def test_a_caption_of_a_picture_that_is_not_read_is_not_its_samples() -> None:
    found = names(["s 10.15.31.png"], ["s 10.15.30.txt"], first_dot=True, others=("s 10.15.30.gif",))
    assert found["s 10.15.31.png"] == [["several pictures of one name"]]
    assert names(["1.mask.png"], ["1.json"], first_dot=True, others=("1.cls",))["1.mask.png"] == [["1.json"]]


def test_the_files_that_belong_to_no_picture() -> None:
    assert names(["a.png"], ["a.txt", "a.json", "b.txt", "a.2.txt"])[""] == [["b.txt", "a.2.txt"]]
    sidecars = Sidecars(["a.png"], [(name, ByteSource(name)) for name in ("a.txt", "a.TXT", "a.Txt")])
    assert len(sidecars.sources("a.png")) == 1
    assert sidecars.repeated() == 2 and list(sidecars.unused()) == []


NAME = st.from_regex(r"[ab]{1,2}(\.[ab1]{1,2}){0,2}", fullmatch=True)


@given(st.lists(NAME, min_size=1, max_size=6, unique=True), st.booleans())
@example(["a", "a.1", "a.1.1"], True)
@settings(max_examples=300, deadline=None)
def test_a_caption_of_its_very_name_wins(stems: list[str], first_dot: bool) -> None:
    """Each picture has a caption of its own name: it gets this one and none of another's, whatever the dots."""
    found = names([f"{stem}.png" for stem in stems], [f"{stem}.txt" for stem in stems], first_dot)
    for stem in stems:
        assert found[f"{stem}.png"] == [[f"{stem}.txt"]]
