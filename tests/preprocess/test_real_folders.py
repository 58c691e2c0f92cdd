"""Folders as people have them, through `python -m preprocess build`: names, links, files that are no pictures."""

from __future__ import annotations

import json
import shutil
import tarfile
import unicodedata
from pathlib import Path

import pytest
from real_folder import Folder, add

from preprocess.__main__ import main


@pytest.fixture
def folder(tmp_path: Path, draw_photo, capsys) -> Folder:  # noqa: ANN001
    return Folder(tmp_path, draw_photo, capsys)


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


def test_a_row_that_names_a_link_in_another_case_stays_in_the_input(folder: Folder, tmp_path: Path) -> None:
    folder.picture("a.png", caption="a")
    folder.picture("x.png", root=tmp_path / "library")
    (folder.root / "c.PNG").symlink_to(tmp_path / "library" / "x.png")
    folder.write(
        "metadata.jsonl", "".join(f'{{"file_name": "{name}", "caption": "row"}}\n' for name in ("a.png", "c.png"))
    )
    assert folder.build("--max-rejects", "0.9") == {"a.png": ("a",)}
    assert set(folder.rejects().values()) == {"path leaves the input"}


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


def test_the_output_is_not_the_input(folder: Folder) -> None:
    folder.picture("a.png", caption="a")
    before = sorted(folder.root.iterdir())
    folder.output = folder.root / "." / "x" / ".."
    for more in ((), ("--dry-run",)):
        folder.build(*more, status=1)
        assert "--output" in folder.said and sorted(folder.root.iterdir()) == before
