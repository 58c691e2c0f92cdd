"""Captions as people have them, through `python -m preprocess build`: which picture gets which, and every count."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from real_folder import Folder, add

from fluxdit_jax.dataset.manifest import REJECTS


@pytest.fixture
def folder(tmp_path: Path, draw_photo, capsys) -> Folder:  # noqa: ANN001
    return Folder(tmp_path, draw_photo, capsys)


# -------------------------------------------------------------------------------------- captions of other pictures


def test_dots_in_the_names_of_a_tar(folder: Folder) -> None:
    shots = [f"Screenshot at 10.15.{second}" for second in (30, 31, 32)]
    folder.root.joinpath("x").mkdir()
    with tarfile.open(folder.root / "x" / "s.tar", "w") as archive:
        for shot in shots:
            add(archive, f"{shot}.png", folder.png())
        for shot in shots[:2]:
            add(archive, f"{shot}.txt", shot.encode())
    assert folder.build(status=3) == {f"x/s.tar/{shot}.png": (shot,) for shot in shots[:2]}
    assert folder.rejects() == {f"x/s.tar/{shots[2]}.png": "several pictures of one name"}


def test_an_unclosed_quote_gives_no_picture_the_rows_of_others(folder: Folder) -> None:
    folder.picture("a.png", "b.png", "c.png", "d.png")
    folder.write("metadata.csv", 'file_name,text\na.png,"not closed\nb.png,b\nc.png,"c, quoted"\nd.png,d\n')
    assert folder.build(status=3) == {"b.png": ("b",), "c.png": ("c, quoted",), "d.png": ("d",)}
    assert folder.rejects() == {"a.png": "no caption"}
    assert folder.rejects(counted=False) == {"metadata.csv:2": "broken CSV"}


def test_several_rows_for_one_picture(folder: Folder) -> None:
    folder.picture("a.png", "b.png", "c.png")
    rows = ["a.png,first", "a.png,", "b.png,", "b.png,second", "a.png,again", "a.png,first", "c.png,c"]
    folder.write("metadata.csv", "\n".join(["file_name,text", *rows]) + "\n")
    assert folder.build() == {"a.png": ("first", "again"), "b.png": ("second",), "c.png": ("c",)}
    assert folder.rejects() == {}
    assert "empty caption 2" in folder.said and "the same caption again 1" in folder.said
    lines = [json.dumps({"image_path": row.split(",")[0], "text": row.split(",")[1]}) for row in rows]
    folder.write("list.jsonl", "\n".join(lines))
    again = folder.build(source=folder.root / "list.jsonl")
    assert again == {"a.png": ("first", "again"), "b.png": ("second",), "c.png": ("c",)}
    assert "empty caption 2" in folder.said and folder.rejects() == {}


def test_a_source_without_a_caption_hides_none_behind_it(folder: Folder) -> None:
    folder.picture(*(f"{name}.png" for name in "abcdefg"))
    folder.write("a.json", '{"width": 3}')
    folder.write("a.txt", "from the text")
    folder.write("b.json", '{"caption": ')
    folder.write("c.json", '{"caption": "  ", "text": "another field"}')
    folder.write("d.txt", " \n")
    folder.write("e.json", "[1, 2]")
    folder.write("e.txt", b"caf\xe9")
    folder.write("f.json", '{"caption": "its own"}')
    folder.write("g.txt", "g")
    table = [{"file_name": f"{name}.png", "caption": f"row of {name}"} for name in "bdf"]
    folder.write("metadata.jsonl", "\n".join(map(json.dumps, table)))
    assert folder.build(status=3) == {
        "a.png": ("from the text",),
        "b.png": ("row of b",),
        "c.png": ("another field",),
        "d.png": ("row of d",),
        "f.png": ("its own",),
        "g.png": ("g",),
    }
    assert folder.rejects() == {"e.png": "invalid UTF-8"}
    (line,) = (json.loads(line) for line in (folder.output / REJECTS).read_text().splitlines())
    assert "e.json" in line["detail"] and "e.txt" in line["detail"]
    for count in (
        "broken JSON 1",
        "no caption 1",
        "empty caption 2",
        "a row for a picture that has a caption 1",
    ):
        assert count in folder.said


def test_captions_of_pictures_that_are_not_read_go_to_no_other(folder: Folder, tmp_path: Path) -> None:
    folder.picture("shot.png", "clip.png")
    folder.write("shot.txt", "own")
    folder.write("shot.1.heic", b"x")
    folder.write("shot.1.txt", "of the heic")
    folder.write("clip.1.mp4", b"x")
    folder.write("clip.1.txt", "of the video")
    (folder.root / "clip.2.png").symlink_to(tmp_path / "nowhere.png")
    folder.write("clip.2.txt", "of a broken link")
    folder.write("clip.txt", "clip")
    assert folder.build("--max-rejects", "1") == {"shot.png": ("own",), "clip.png": ("clip",)}
    lone = {"shot.1.txt", "clip.1.txt", "clip.2.txt"}
    assert folder.rejects(counted=False) == dict.fromkeys(lone, "caption without an image")


def test_captions_of_a_tar_by_the_first_dot_alone(folder: Folder) -> None:
    with tarfile.open(folder.root / "s.tar", "w") as archive:
        for name in ("1.jpg", "2.jpg", "3.mask.png", "4.jpg", "s 10.15.31.png"):
            add(archive, name, folder.png())
        add(archive, "1.txt", b"")
        add(archive, "1.caption.json", b'{"caption": "one"}')
        add(archive, "2.json", b'{"width": 3}')
        add(archive, "2.prompt.txt", b"two")
        add(archive, "3.caption.txt", b"three")
        add(archive, "3.meta.json", b'{"width": 3}')
        add(archive, "3.cls", b"7")
        add(archive, "4.a.txt", b"four")
        add(archive, "4.b.txt", b"or this")
        add(archive, "s 10.15.30.gif", b"GIF89a")
        add(archive, "s 10.15.30.txt", b"of the gif")
    found = folder.build("--max-rejects", "1")
    assert found == {"s.tar/1.jpg": ("one",), "s.tar/2.jpg": ("two",), "s.tar/3.mask.png": ("three",)}
    assert folder.rejects() == {
        "s.tar/4.jpg": "several captions of one name",
        "s.tar/s 10.15.31.png": "several pictures of one name",
        "s.tar/s 10.15.30.gif": "image type is not read",
    }


# ----------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("ein Hündchen 犬", "utf-16", "ein Hündchen 犬"),
        ("\ufeffein Hündchen", "utf-16-be", "ein Hündchen"),
        ("ein Hündchen", "utf-32", "ein Hündchen"),
        ("ein Hündchen", "utf-8-sig", "ein Hündchen"),
        ("a dog", "utf-16-le", "NUL in the caption"),
        ("a dog", "utf-16-be", "NUL in the caption"),
        ("ein Hündchen", "cp1252", "invalid UTF-8"),
        ("犬の写真", "shift-jis", "invalid UTF-8"),
        ("\u200b", "utf-8", "empty caption"),
        (" \u00ad\u2060\u200d\ufeff", "utf-8", "empty caption"),
        ("\u3164\u2800", "utf-8", "empty caption"),
        ("\u0301", "utf-8", "empty caption"),
        ("\u200bword\u200d", "utf-8", "\u200bword\u200d"),
        ("🐕", "utf-8", "🐕"),
        ("👨\u200d👩\u200d👧", "utf-8", "👨\u200d👩\u200d👧"),
        ("!", "utf-8", "!"),
    ],
)
@pytest.mark.parametrize("kind", [".txt", ".json"])
def test_encodings_of_captions(folder: Folder, text: str, encoding: str, expected: str, kind: str) -> None:
    folder.picture("a.png", "b.png")
    folder.write("b.txt", "b")
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    whole = mark + '{"caption": "' + text.removeprefix(mark) + '"}' if kind == ".json" else text
    folder.write("a" + kind, whole.encode(encoding))
    found = folder.build(status=None)
    if expected in ("NUL in the caption", "invalid UTF-8", "empty caption"):
        assert found == {"b.png": ("b",)} and folder.rejects() == {"a.png": expected}
    else:
        assert found["a.png"] == (expected,)


def test_a_nul_written_as_an_escape(folder: Folder) -> None:
    folder.picture("a.png", "b.png")
    folder.write("a.json", '{"caption": "a\\u0000dog"}')
    folder.write("b.txt", "b")
    folder.build(status=3)
    assert folder.rejects() == {"a.png": "NUL in the caption"}


# ------------------------------------------------------------------------------------------------------ tables


def test_captions_in_a_parquet_and_in_a_list(folder: Folder) -> None:
    folder.picture("a.png", "b.png", "sub/c.png", "d.png")
    table = pa.table({"file_name": ["a.png", "b.png", "sub/c.png"], "prompt": ["a", "b", None]})
    pq.write_table(table, folder.root / "metadata.parquet")
    folder.write("d.txt", "d")
    folder.build(status=1 if not (folder.root / "d.txt").exists() else 3)
    assert "no column of captions" in str(folder.rejects().values())
    found = folder.build("--caption-field", "prompt", status=3)
    assert found == {"a.png": ("a",), "b.png": ("b",), "d.png": ("d",)}
    folder.write("sub/c.json", '{"prompt": ["one", " ", "two", "one"]}')
    assert folder.build("--caption-field", "prompt")["sub/c.png"] == ("one", "two")


def test_one_bad_row_costs_one_row(folder: Folder) -> None:
    folder.picture(*(f"{n}.png" for n in range(6)))
    rows = [b"%d.png,caption %d,x" % (n, n) for n in range(6)]
    rows[1] = b"1.png,caf\xe9,x"
    rows[3] = b"3.png,caption 3," + b"y" * 140_000
    folder.write("metadata.csv", b"\n".join([b"file_name,text,unused", *rows]) + b"\n")
    assert folder.build(status=3) == {f"{n}.png": (f"caption {n}",) for n in (0, 2, 3, 4, 5)}
    assert folder.rejects() == {"1.png": "no caption"}
    assert folder.rejects(counted=False) == {"metadata.csv:3": "invalid UTF-8"}


def test_a_row_that_is_no_path_costs_one_row(folder: Folder) -> None:
    folder.picture("a.jpg", "b.PNG")
    rows = [
        ("A" * 5000, "x"),
        ("a/" * 3000, "x"),
        ("a.JPG", "a"),
        ("b.png", "b"),
        ("https://x.org/c.png", "c"),
    ]
    lines = "\n".join(json.dumps({"image": name, "text": text}) for name, text in rows)
    folder.write("list.jsonl", lines)
    expected = {"a.jpg": ("a",), "b.PNG": ("b",)}
    assert folder.build("--max-rejects", "1", source=folder.root / "list.jsonl") == expected
    assert set(folder.rejects().values()) == {"missing file", "path leaves the input"} and len(folder.rejects()) == 3
    (folder.root / "list.jsonl").rename(folder.root / "metadata.jsonl")
    assert folder.build() == expected
    assert len(folder.said) < 20_000


def test_rows_of_pictures_outside(folder: Folder, tmp_path: Path) -> None:
    library = tmp_path / "library"
    folder.picture("p0.png", "p1.png", "p2.png", "p3.png", root=library)
    folder.picture("a.png", caption="a")
    rows = [(f"{library}/p0.png", "one"), (f"{library}/p0.png", "two"), (f"{library}/p1.png", ""),
            (f"{library}/p1.png", "good"), (r"..\library\p2.png", "two"), ("../library/p3.PNG", "three"),
            ("gone.png", "x"), ("gone.png", "y")]  # fmt: skip
    folder.write("metadata.jsonl", "\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows))
    (folder.root / "outside" / str(library)[1:]).mkdir(parents=True)
    shutil.copy(library / "p0.png", folder.root / "outside" / str(library)[1:] / "p0.png")
    (folder.root / "outside" / str(library)[1:] / "p0.txt").write_text("another picture of that path")
    found = folder.build("--allow-outside")
    at, real = f"outside_{library}", f"outside{library}"
    assert found == {"a.png": ("a",), f"{real}/p0.png": ("another picture of that path",),
                     f"{at}/p0.png": ("one", "two"), f"{at}/p1.png": ("good",), f"{at}/p2.png": ("two",),
                     f"{at}/p3.png": ("three",)}  # fmt: skip
    assert "a row for a picture that is missing or was rejected 1" in folder.said
    assert folder.rejects(counted=False) == {"gone.png": "missing file"}
