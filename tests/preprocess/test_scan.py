"""What is found in a folder, a table and an archive, and every input that is not."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wording import naming

from preprocess import PreprocessError
from preprocess.decoding.images import Rejected
from preprocess.input.byte_source import ByteSource
from preprocess.input.findings import Scan
from preprocess.input.found import InputImage
from preprocess.input.scan import scan


def touch(folder: Path, *names: str | bytes) -> None:
    for name in names:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def keys(result: Scan) -> list[str]:
    return [found.key for found in result.found]


def texts(result: Scan) -> dict[str, object]:
    """What the rows of tables say of each picture: one value, or all of them."""
    rows = {found.key: [source.texts for source in found.captions] for found in result.found}
    return {key: of[0] if len(of) == 1 else tuple(of) or None for key, of in rows.items()}


def caption_file(found: InputImage) -> ByteSource | None:
    """The file that is looked at first for a picture's caption."""
    return found.captions[0].place if found.captions else None


def reasons(result: Scan) -> dict[str, str]:
    return {reject.key: reject.reason for reject in result.rejects}


def test_a_tree(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.JPG",
        "b.json",
        "a.png",
        "a.txt",
        "a.jpg",
        "deep/er/c.webp",
        "deep/er/c.json",
        "deep/er/c.txt",
    )
    touch(tmp_path, "notes.md", "README", ".hidden.png", ".git/x.png", "film.mp4", "old.gif", "lonely.json")
    result = scan(tmp_path)
    assert keys(result) == ["a.jpg", "a.png", "b.JPG", "deep/er/c.webp"]
    captions = {found.key: [source.name for source in found.captions] for found in result.found}
    assert captions == {
        "a.jpg": ["a.txt"],
        "a.png": ["a.txt"],
        "b.JPG": ["b.json"],
        "deep/er/c.webp": ["c.json", "c.txt"],
    }
    assert reasons(result) == {"old.gif": "image type is not read", "lonely.json": "caption without an image"}
    assert dict(result.ignored) == {"hidden": 2, ".md": 1, "no extension": 1, ".mp4": 1}


def test_odd_names(tmp_path: Path) -> None:
    odd = [
        "-rf.png",
        "with space.png",
        "new\nline.png",
        "ünïcödé 漢字 🐕.png",
        "a" * 251 + ".png",
        "quote'\".png",
        "%d.png",
    ]
    touch(tmp_path, *odd, b"\xff\xfe.png")
    result = scan(tmp_path)
    assert keys(result) == sorted(odd)
    assert [found.image.read(10) for found in result.found] == [b"x"] * len(odd)
    ((key, reason),) = reasons(result).items()
    assert reason == "file name is not UTF-8"
    json.dumps(key).encode("utf-8")


def test_links_and_special_files(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    inside = tmp_path / "in"
    touch(outside, "secret.png")
    touch(inside, "real.png", "sub/x.png")
    (inside / "alias.png").symlink_to(inside / "real.png")
    (inside / "out.png").symlink_to(outside / "secret.png")
    (inside / "broken.png").symlink_to(inside / "nothing.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "sub" / "up").symlink_to(inside)
    (inside / "elsewhere").symlink_to(outside)
    os.mkfifo(inside / "pipe.png")
    os.mkfifo(inside / "plan.png")  # as a plot of ours is named
    result = scan(inside)
    assert keys(result) == ["alias.png", "real.png", "sub/x.png"]
    assert reasons(result) == {
        "out.png": "path leaves the input",
        "broken.png": "broken link",
        "loop.png": "broken link",
        "sub/up": "link to a folder",
        "elsewhere": "link to a folder",
        "pipe.png": "not a regular file",
        "plan.png": "not a regular file",
    }


def test_the_input_itself_may_be_a_link(tmp_path: Path) -> None:
    touch(tmp_path / "real", "a.png")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    assert keys(scan(tmp_path / "alias")) == ["a.png"]


def test_metadata_jsonl(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png", "c.json", "sub/d.png", "e.png", "f.png")
    rows = [
        {"file_name": "a.png", "caption": "an a"},
        {"file_name": "./b.png", "text": "a b"},
        {"file_name": "c.png", "caption": "its own file wins"},
        {"file_name": "sub/d.png", "caption": "from above"},
        {"file_name": "e.png", "caption": 7},
        {"file_name": "missing.png", "caption": "nobody"},
        {"file_name": "../../etc/passwd", "caption": "out"},
        {"file_name": "/etc/passwd", "caption": "out"},
        {"caption": "no name"},
        [1, 2],
    ]
    lines = [json.dumps(row) for row in rows] + ["{broken", "", "\udcff"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), errors="surrogateescape")
    result = scan(tmp_path)
    captions = texts(result)
    assert captions.pop("e.png").reason == "caption is not a string"
    assert captions == {
        "a.png": ("an a",),
        "b.png": ("a b",),
        "c.png": ((), ("its own file wins",)),
        "sub/d.png": ("from above",),
        "f.png": None,
    }
    assert caption_file(list(result.found)[2]) is not None
    assert reasons(result) == {
        "missing.png": "missing file",
        "metadata.jsonl:7": "path leaves the input",
        "metadata.jsonl:8": "path leaves the input",
        "metadata.jsonl:9": "no image path",
        "metadata.jsonl:10": "broken JSON",
        "metadata.jsonl:11": "broken JSON",
        "metadata.jsonl:13": "invalid UTF-8",
    }


def test_metadata_csv_and_the_deepest_table_wins(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "sub/b.png", "sub/c.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"one, two"\nsub/b.png,from above\nsub/c.png,c\n')
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,caption\nb.png,from beside\n")
    assert texts(scan(tmp_path)) == {
        "a.png": ("one, two",),
        "sub/b.png": (("from beside",), ("from above",)),
        "sub/c.png": ("c",),
    }


def test_a_row_of_a_csv_that_cannot_be_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\xff\nb.png,b\n")
    result = scan(tmp_path)
    assert reasons(result) == {"metadata.csv:2": "invalid UTF-8"}
    assert texts(result) == {"a.png": None, "b.png": ("b",)}
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png," + "x" * 200_000 + "\nb.png,b\n")
    result = scan(tmp_path)
    assert reasons(result) == {} and texts(result)["b.png"] == ("b",)
    assert texts(result)["a.png"].reason == "caption too long"


def test_one_jsonl(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.png", "b.png")
    rows = [
        {"image_path": "images/a.png", "caption": "an a"},
        {"image_path": str(tmp_path / "images" / "b.png"), "mine": "a b"},
        {"image_path": "images/a.png", "caption": "again"},
        {"image_path": "../x.png", "caption": "out"},
        {"image_path": "images/none.png", "caption": "none"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    result = scan(tmp_path / "list.jsonl", caption_field="mine")
    assert texts(result) == {
        "images/a.png": (("an a",), ("again",)),
        "images/b.png": ("a b",),
        "images/none.png": ("none",),
    }
    assert reasons(result) == {"list.jsonl:4": "path leaves the input"}
    with pytest.raises(Rejected, match="missing file"):
        list(result.found)[2].image.read(100)


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **more) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for attribute, value in more.items():
        setattr(member, attribute, value)
    archive.addfile(member, io.BytesIO(data))


def test_webdataset_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s-0.tar", "w") as archive:
        add(archive, "0001.jpg", b"first")
        add(archive, "0001.json", b'{"caption": "one"}')
        add(archive, "0002.txt", b"{two}")
        add(archive, "0002.png", b"second picture")
        add(archive, "0003.mask.png", b"third")
        add(archive, "0003.json", b'{"caption": "three"}')
        add(archive, "0004.cls", b"7")
        add(archive, "../evil.png", b"evil")
        add(archive, "/abs.png", b"evil")
        add(archive, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "dir/0001.webp", b"deep")
        add(archive, "0001.jpg", b"twice")
    for source, prefix in ((tmp_path, "s-0.tar"), (tmp_path / "s-0.tar", "s-0.tar")):
        result = scan(source)
        data = {f.key: (f.image.read(100), caption_file(f) and caption_file(f).read(100)) for f in result.found}
        assert data == {
            f"{prefix}/0001.jpg": (b"first", b'{"caption": "one"}'),
            f"{prefix}/0002.png": (b"second picture", b"{two}"),
            f"{prefix}/0003.mask.png": (b"third", b'{"caption": "three"}'),
            f"{prefix}/dir/0001.webp": (b"deep", None),
        }
        assert reasons(result) == {
            f"{prefix}/../evil.png": "path leaves the input",
            f"{prefix}//abs.png": "path leaves the input",
            f"{prefix}/link.png": "not a regular file",
            f"{prefix}/0001.jpg": "name used twice",
        }
        assert dict(result.ignored) == {".cls": 1}
        types = [[source.type for source in found.captions] for found in result.found]
        assert types == [[".json"], [".txt"], [".json"], []]


def test_hard_links_in_a_tar_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png", "in/a.txt")
    (tmp_path / "in" / "b.png").hardlink_to(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.txt").hardlink_to(tmp_path / "in" / "a.txt")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "in", "in")
        add(archive, "in/c.png", type=tarfile.LNKTYPE, linkname="in/not there.png")
        add(archive, "in/c.txt", type=tarfile.LNKTYPE, linkname="in/not there.txt")
    result = scan(tmp_path / "t.tar")
    found = {each.key: (each.image.read(10), caption_file(each).read(10)) for each in result.found}
    assert found == {f"t.tar/in/{name}.png": (b"x", b"x") for name in "ab"}
    assert [(reject.key, reject.counted) for reject in result.rejects] == [
        ("t.tar/in/c.png", True),
        ("t.tar/in/c.txt", False),
    ]


@pytest.mark.parametrize("format_", ["gnu", "pax"])
def test_a_sparse_file_in_a_tar_is_refused(tmp_path: Path, format_: str) -> None:
    """Its holes are left out, so its bytes would be those of the files behind it."""
    with (tmp_path / "a.bmp").open("wb") as file:
        file.truncate(1_000_000)
    touch(tmp_path, "b.bmp")
    subprocess.run(["tar", f"--format={format_}", "-S", "-cf", "t.tar", "a.bmp", "b.bmp"], cwd=tmp_path, check=True)
    result = scan(tmp_path / "t.tar")
    assert keys(result) == ["t.tar/b.bmp"] and [reject.reason for reject in result.rejects] == ["not a regular file"]
    assert "-S" in result.rejects[0].detail


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_tar_that_must_not_be_read_costs_its_own_pictures(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.tar")
    (tmp_path / "b.tar").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        result = scan(tmp_path)
    finally:
        os.seteuid(0)
    assert keys(result) == ["a.png"] and reasons(result) == {"b.tar": "unreadable file"}


def test_a_tar_that_is_cut_short_or_none(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.png", bytes([number]) * 5000)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:13_000])
    (tmp_path / "b.tar").write_bytes(b"not a tar at all" * 100)
    result = scan(tmp_path)
    assert keys(result) == ["a.tar/0.png", "a.tar/1.png", "a.tar/2.png"]
    assert reasons(result) == {"a.tar": "damaged archive", "b.tar": "damaged archive"}
    with pytest.raises(Rejected, match="cut short"):
        list(result.found)[2].image.read(10_000)


@pytest.mark.parametrize("name", ["nothing", "file.zip"])
def test_what_is_no_input(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.zip").write_bytes(b"PK")
    with pytest.raises(PreprocessError, match=naming("--input", str(tmp_path / name))):
        scan(tmp_path / name)


def test_place_refuses_what_is_too_large_or_gone(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    place = next(iter(scan(tmp_path).found)).image
    (tmp_path / "a.png").write_bytes(b"0123456789")
    with pytest.raises(Rejected, match=naming("file too large", 10, 5)):
        place.read(5)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Rejected, match="missing file") as caught:
        place.read(5)
    assert caught.value.transient
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(Rejected, match="not a regular file"):
        place.read(5)


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=80)


def usable(name: str) -> bool:
    return not name.startswith(".") and len(name.encode()) <= 250


@given(st.sets(NAMES.filter(usable), min_size=1, max_size=6), st.sampled_from(["", "sub", "a b", "-rf", "Ü\n"]))
@example({"-rf", "a b", "new\nline", "ö" * 125, "x.tar", "a.b.c", "\u202e", "%2e%2e", "\\..\\x", "CON"}, "")
@settings(max_examples=60, deadline=None)
def test_whatever_a_file_is_called(names: set[str], folder: str) -> None:
    """Any name that the file system takes, in any folder: the key is the path, and the caption is its own."""
    with tempfile.TemporaryDirectory() as root:
        place = Path(root) / folder
        place.mkdir(exist_ok=True)
        for name in names:
            (place / f"{name}.png").write_bytes(b"x")
            (place / f"{name}.txt").write_text(name, encoding="utf-8")
        result = scan(root)
        assert result.rejects == []
        prefix = f"{folder}/" if folder else ""
        assert sorted(keys(result)) == sorted(f"{prefix}{name}.png" for name in names)
        for found in result.found:
            name = found.key.removeprefix(prefix).removesuffix(".png")
            assert caption_file(found).read(1000).decode() == name
