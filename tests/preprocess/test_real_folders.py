"""Folders as people have them, through `python -m preprocess build`: the records' captions, and every count."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from build_fixtures import FLAGS, read, write_image

from fluxdit_jax.dataset.manifest import MANIFEST, REJECTS
from preprocess.__main__ import main

SMALL = [*FLAGS, "--resolution", "128", "--modulus", "16", "--holdout", "0"]


class Folder:
    """An input with pictures that differ, and what a build made of it."""

    def __init__(self, root: Path, draw, capsys) -> None:  # noqa: ANN001
        self.root, self.output = root / "in", root / "out"
        self._draw, self._capsys, self._seed = draw, capsys, 0
        self.said = ""
        self.root.mkdir()

    def picture(self, *names: str, caption: str | None = None, root: Path | None = None) -> None:
        for name in names:
            path = (root or self.root) / name
            suffix = path.suffix.lower()
            write_image(
                path.with_suffix(".png") if suffix not in (".png", ".jpg") else path,
                self._seed,
                None,
                self._draw,
            )
            if suffix not in (".png", ".jpg"):
                path.with_suffix(".png").rename(path)
            self._seed += 1
            if caption is not None:
                path.with_suffix(".txt").write_text(caption)

    def png(self) -> bytes:
        self.picture("drawn.png")
        data = (self.root / "drawn.png").read_bytes()
        (self.root / "drawn.png").unlink()
        return data

    def write(self, name: str, data: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def build(self, *more: str, source: Path | None = None, status: int | None = 0) -> dict[str, tuple[str, ...]]:
        found = main(["build", "--input", str(source or self.root), "--output", str(self.output), *SMALL, *more])
        captured = self._capsys.readouterr()
        self.said = captured.out + captured.err
        assert status is None or found == status, self.said
        if not (self.output / MANIFEST).exists():
            return {}
        return {key: (record.caption, *record.other_captions) for key, record in read(self.output).items()}

    def rejects(self, counted: bool = True) -> dict[str, str]:
        lines = [json.loads(line) for line in (self.output / REJECTS).read_text().splitlines()]
        return {line["key"]: line["reason"] for line in lines if line.get("counted", True) == counted}


@pytest.fixture
def folder(tmp_path: Path, draw_photo, capsys) -> Folder:  # noqa: ANN001
    return Folder(tmp_path, draw_photo, capsys)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


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


def test_dot_members_and_system_folders_of_a_tar(folder: Folder) -> None:
    with tarfile.open(folder.root / "s.tar", "w") as archive:
        add(archive, "./a.png", folder.png())
        add(archive, "a.json", b'{"caption": "a"}')
        for name in ("._a.png", ".c.png", ".git/d.png", "__MACOSX/._a.png", "__MACOSX/e.png", "@eaDir/f.png"):
            add(archive, name, folder.png())
            add(archive, name.replace(".png", ".json"), b"\0\5\x16\7\0\2")
    assert folder.build("--max-rejects", "0") == {"s.tar/a.png": ("a",)}
    assert folder.rejects() == folder.rejects(counted=False) == {}
    assert "hidden 8" in folder.said and "system's folder 4" in folder.said


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


# --------------------------------------------------------------------------------------------------------- names


def test_extensions_in_upper_case_and_other_kinds_of_sidecars(folder: Folder) -> None:
    folder.picture("a.png", "b.PNG", "c.png", "d.png", "e.png", "f.png")
    folder.write("a.TXT", "a")
    folder.write("b.JSON", '{"caption": "b"}')
    folder.write("c.caption", "c")
    folder.write("d.png.txt", "d")
    folder.write("e.png.json", '{"title": "IMG"}')  # what Google's Takeout leaves beside a picture
    folder.write("e.Caption", "e")
    folder.write("METADATA.CSV", "file_name,text\nF.png,not this\nf.PNG,f\n")
    assert folder.build() == {
        "a.png": ("a",), "b.PNG": ("b",), "c.png": ("c",), "d.png": ("d",), "e.png": ("e",), "f.png": ("f",),
    }  # fmt: skip
    assert folder.rejects(counted=False) == {"F.png": "missing file"}


def test_paths_as_other_systems_write_them(folder: Folder) -> None:
    name = "Café Ångström"
    nfd, nfc = unicodedata.normalize("NFD", name), unicodedata.normalize("NFC", name)
    assert nfd != nfc
    folder.picture(f"{nfd}.png", f"sub/{nfd}.png", "sub/deep/b.png", "c.png", "sub/back\\slash.png")
    folder.write(f"{nfc}.txt", "beside it")
    rows = [rf"sub\{nfc}.png", r"sub\deep\b.png", r".\c.png", "sub/back\\slash.png", r"C:\photos\x.png"]
    table = [json.dumps({"file_name": row, "caption": f"row {n}"}) for n, row in enumerate(rows)]
    expected = {
        f"{nfd}.png": ("beside it",),
        f"sub/{nfd}.png": ("row 0",),
        "sub/deep/b.png": ("row 1",),
        "c.png": ("row 2",),
        "sub/back\\slash.png": ("row 3",),
    }
    folder.write("metadata.jsonl", "\n".join(table))
    assert folder.build() == expected
    assert folder.rejects(counted=False) == {"metadata.jsonl:5": "path leaves the input"}
    shutil.rmtree(folder.output)
    (folder.root / f"{nfc}.txt").unlink()
    (folder.root / "metadata.jsonl").unlink()
    folder.write("list.jsonl", "\n".join(table))
    del expected[f"{nfd}.png"]
    assert folder.build(source=folder.root / "list.jsonl", status=3) == expected
    assert folder.rejects() == {"list.jsonl:5": "path leaves the input"}


def test_pictures_by_another_name(folder: Folder) -> None:
    for name in ("a.jfif", "b.jpe", "c", "at 10.15.30", "d.jpg_large", "e.jpg?w=1200"):
        folder.picture("drawn.jpg")
        (folder.root / "drawn.jpg").rename(folder.root / name)
    for name in ("a.txt", "b.txt", "c.txt", "at 10.15.30.txt", "d.jpg_large.txt", "e.jpg?w=1200.txt"):
        folder.write(name, name)
    folder.write("README", "not a picture")
    folder.write("film.mp4", b"\xff\xd8\xff" + b"x" * 100)
    assert set(folder.build()) == {"a.jfif", "b.jpe", "c", "at 10.15.30", "d.jpg_large", "e.jpg?w=1200"}
    assert folder.rejects() == folder.rejects(counted=False) == {}


# ------------------------------------------------------------------------------- links, other files, the dataset itself


def test_links_and_paths_out_of_the_input(folder: Folder, tmp_path: Path) -> None:
    for name in ("one.png", "two.png", "sub/three.png"):
        folder.picture(name, caption=name, root=tmp_path / "library")
    chosen = folder.root
    for name in ("one.png", "one.txt"):
        (chosen / name).symlink_to(tmp_path / "library" / name)
    (chosen / "more").symlink_to(tmp_path / "library" / "sub")
    (chosen / "more again").symlink_to(tmp_path / "library" / "sub")
    (tmp_path / "library" / "sub" / "up").symlink_to(tmp_path / "library")
    with_row = {"file_name": str(tmp_path / "library" / "two.png"), "caption": "by a row"}
    folder.write("metadata.jsonl", json.dumps(with_row) + "\n")
    assert folder.build(status=1) == {}
    assert "path leaves the input: 3" in folder.said and "link to a folder: 2" in folder.said
    assert "--allow-outside" in folder.said and folder.rejects()["one.png"] == "path leaves the input"
    found = folder.build("--allow-outside", "--max-rejects", "0.9")
    two = f"outside{tmp_path}/library/two.png"
    assert found == {"one.png": ("one.png",), "more/three.png": ("sub/three.png",), two: ("by a row",),
                     "more/up/one.png": ("one.png",), "more/up/two.png": ("two.png",)}  # fmt: skip
    assert folder.rejects() == {} and "a folder that is looked into by another name 2" in folder.said
    assert main(["verify", str(folder.output)]) == 0


def test_a_list_of_absolute_paths(folder: Folder, tmp_path: Path) -> None:
    folder.picture("one.png", "two.png", root=tmp_path / "library")
    lines = [{"image_path": str(tmp_path / "library" / f"{n}.png"), "caption": n} for n in ("one", "two")]
    table = folder.write("list.jsonl", "\n".join(map(json.dumps, lines)))
    folder.build(source=table, status=1)
    assert "path leaves the input: 2" in folder.said
    assert folder.rejects() == {
        "list.jsonl:1": "path leaves the input",
        "list.jsonl:2": "path leaves the input",
    }
    found = folder.build("--allow-outside", source=table)
    assert sorted(found.values()) == [("one",), ("two",)]
    assert all(key.startswith("outside/") and ".." not in key for key in found)


@pytest.mark.parametrize("what", ["heic", "gz", "tgz-as-tar", "own", "empty"])
def test_nothing_usable_says_why(folder: Folder, what: str) -> None:
    if what == "heic":
        folder.write("a.psd", b"8BPS")
        folder.write("b.psd", b"8BPS")
        wanted, reasons = ["image type is not read: 2"], {"a.psd", "b.psd"}
    elif what == "gz":
        folder.write("a.tar.gz", b"\x1f\x8b" + b"x" * 600)
        wanted, reasons = ["compressed archive: 1"], set()
    elif what == "tgz-as-tar":
        with tarfile.open(folder.root / "a.tar", "w:gz") as archive:
            add(archive, "a.png", folder.png())
        wanted, reasons = ["compressed archive: 1", "gzip"], {"a.tar"}
    elif what == "own":
        folder.write("old/manifest.json", "{}")
        folder.write("old/index.parquet", "")
        folder.write(".x.png", "x")
        wanted, reasons = ["dataset or run of this project 1", "hidden 1"], set()
    else:
        wanted, reasons = ["no image"], set()
    folder.build(status=1)
    for words in wanted:
        assert words in folder.said
    if reasons:
        assert set(folder.rejects()) == reasons
    folder.build("--dry-run", status=1)
    for words in wanted:
        assert words in folder.said


def test_what_is_no_photograph_is_not_counted_as_a_reject(folder: Folder) -> None:
    folder.picture("a.png", caption="a")
    folder.write("Takeout.json", '{"title": "album"}')
    folder.write("gone.txt", "of a deleted picture")
    folder.write("metadata.csv", "file_name,text\ngone.png,of a deleted picture\n")
    for name in (
        "@eaDir/a.png",
        "__MACOSX/a.png",
        "#recycle/a.png",
        "$RECYCLE.BIN/b/a.png",
        "lost+found/a.png",
    ):
        folder.write(name, b"x")
    folder.build("--max-rejects", "0")
    other = folder.output
    folder.output = folder.root / "dataset"  # in the input, and a second one
    assert folder.build("--max-rejects", "0") == {"a.png": ("a",)}
    main(["inspect", str(folder.output)])
    folder.output = folder.root / "more" / "dataset"
    folder.build("--dry-run")
    assert folder.build("--max-rejects", "0") == {"a.png": ("a",)}
    assert folder.rejects() == {}
    listed = {
        "Takeout.json": "caption without an image",
        "gone.txt": "caption without an image",
        "gone.png": "missing file",
    }
    assert folder.rejects(counted=False) == listed
    assert "system's folder 5" in folder.said and "dataset or run of this project 1" in folder.said
    folder.output = other
    assert folder.build("--max-rejects", "0") == {"a.png": ("a",)}
    assert main(["inspect", str(folder.output)]) == 0 and main(["verify", str(folder.output)]) == 0


def test_the_output_is_not_the_input(folder: Folder) -> None:
    folder.picture("a.png", caption="a")
    before = sorted(folder.root.iterdir())
    folder.output = folder.root / "." / "x" / ".."
    for more in ((), ("--dry-run",)):
        folder.build(*more, status=1)
        assert "--output" in folder.said and sorted(folder.root.iterdir()) == before


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


# -------------------------------------------------------------------------------------------- what testers found


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


def test_a_plan_of_a_house_is_a_picture_and_our_plots_are_none(folder: Folder) -> None:
    folder.picture("flat1/plan.png", "flat2/plan.png", "flat1/contact.png", caption="a plan")
    folder.write("flat2/config.json", "{}")
    folder.write("flat2/dataset.json", "{}")
    assert len(folder.build("--max-rejects", "0")) == 3
    main(["inspect", str(folder.output), "--output", str(folder.root / "plots")])
    folder.output = folder.root / "other"
    folder.build("--dry-run", "--draw", str(folder.root / "plan.png"))
    folder.output = folder.root.parent / "third"
    assert len(folder.build("--max-rejects", "0")) == 3
    assert folder.rejects() == {} and "drawn by this project 4" in folder.said


def test_links_are_looked_into_behind_real_folders(folder: Folder, tmp_path: Path) -> None:
    folder.picture("real/r.png", "real/deep/d.png", caption="r")
    folder.picture("e.png", caption="e", root=tmp_path / "library")
    (folder.root / "a_link").symlink_to("real")
    (folder.root / "loop").symlink_to(".")
    (folder.root / "e.png").symlink_to(tmp_path / "library" / "e.png")  # its caption lies beside the target
    (folder.root / "dead.txt").symlink_to(tmp_path / "nothing.txt")
    (folder.root / "metadata.csv").symlink_to(tmp_path / "nothing.csv")
    found = folder.build("--allow-outside", "--max-rejects", "0")
    assert found == {"real/r.png": ("r",), "real/deep/d.png": ("r",), "e.png": ("e",)}
    assert folder.rejects() == {} and "a folder that is looked into by another name 2" in folder.said
    assert set(folder.rejects(counted=False)) == {"dead.txt", "metadata.csv"}
