"""What a scan of a folder passes by and counts: other files, folders, links, and what cannot be read."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from test_scan import add, keys, reasons, touch

from preprocess import PreprocessError
from preprocess.input.findings import Scan
from preprocess.input.scan import scan


def captions(result: Scan) -> dict[str, list[str]]:
    """The names of the caption files of each picture."""
    return {found.key: [source.name for source in found.captions] for found in result.found}


def not_counted(result: Scan) -> set[str]:
    """Keys of rejects that were not to become records."""
    return {reject.key for reject in result.rejects if not reject.counted}


def test_what_is_no_photograph_of_the_user_is_counted_by_kind(tmp_path: Path) -> None:
    for number in range(3):
        touch(tmp_path / f"d{number}", "manifest.json", "index.parquet", "a.png")  # datasets of this project
        touch(tmp_path / f"f{number}", "@eaDir/a.png", ".b.png", "c.png")
        (tmp_path / f"f{number}" / "plan.png").write_bytes(b"drawn by fluxdit_jax.preprocess")
    touch(tmp_path, "plan.png", "metadata.md", "other.csv", "other.md")
    result = scan(tmp_path)
    assert keys(result) == ["f0/c.png", "f1/c.png", "f2/c.png", "plan.png"] and result.rejects == []
    assert dict(result.ignored) == {
        "a dataset or run of this project": 3,
        "a system's folder": 3,
        "hidden": 3,
        "drawn by this project": 3,
        ".md": 2,
        ".csv": 1,
    }


def test_a_dataset_as_the_input_itself_is_looked_into(tmp_path: Path) -> None:
    touch(tmp_path, "manifest.json", "index.parquet", "plan.png", "a.png", "dataset/manifest.json")
    touch(tmp_path, "dataset/index.parquet", "sub/plan.png")
    result = scan(tmp_path)
    assert keys(result) == ["a.png", "sub/plan.png"]  # the plot is known by its name beside the manifest alone
    assert result.ignored["drawn by this project"] == result.ignored["a dataset or run of this project"] == 1
    assert keys(scan(tmp_path, exclude=tmp_path / "sub")) == ["a.png"]


def test_what_was_not_to_become_a_record_is_listed_and_not_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.zip", "lone.txt", "old.gif")
    for name in ("dead.txt", "dead.png", "metadata.csv"):
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    (tmp_path / "gone.png").symlink_to(tmp_path.parent / "nothing outside")
    result = scan(tmp_path)
    assert reasons(result) == {
        "a.zip": "compressed archive",
        "lone.txt": "caption without an image",
        "old.gif": "image type is not read",
        "dead.txt": "broken link",
        "dead.png": "broken link",
        "gone.png": "broken link",
        "metadata.csv": "broken link",
    }
    assert not_counted(result) == {"a.zip", "lone.txt", "dead.txt", "metadata.csv"}


@pytest.mark.parametrize(("name", "told"), [("a.tar.gz", True), ("a.zip", True), ("a.docx", False)])
def test_an_input_that_is_to_be_unpacked_is_told_so(tmp_path: Path, name: str, told: bool) -> None:
    touch(tmp_path, name)
    with pytest.raises(PreprocessError) as caught:
        scan(tmp_path / name)
    assert name in str(caught.value) and ("unpack" in str(caught.value)) == told


def test_of_members_of_one_name_the_first_is_taken(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, data in (("1.png", b"1"), ("2.png", b"first"), ("3.png", b"3"), ("2.png", b"second"), ("2.png", b"")):
            add(archive, name, data)
    result = scan(tmp_path)
    assert [found.image.read(9) for found in result.found] == [b"1", b"first", b"3"]
    assert [(reject.key, reject.reason) for reject in result.rejects] == [("s.tar/2.png", "name used twice")] * 2


# ------------------------------------------------------------------------------------------------------------ links


def test_links_to_folders_are_looked_into_last_in_order_and_once(tmp_path: Path) -> None:
    touch(tmp_path / "library", "x/x.png", "y/y.png", "z.png")
    touch(tmp_path / "in", "real/r.png", "b.png")
    for name, target in (
        ("a", "in/real"),
        ("c", "library/x"),
        ("d", "library/x"),
        ("e", "library/y"),
        ("real/up", "in"),
        ("z", "library"),
    ):
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    result = scan(tmp_path / "in", outside=True)
    assert keys(result) == ["b.png", "c/x.png", "e/y.png", "real/r.png", "z/z.png"] and result.rejects == []
    assert dict(result.ignored) == {"a folder that is looked into by another name": 5}


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    result = scan(tmp_path, outside=True)
    assert keys(result) == ["a.png"] and reasons(result) == {"loop.png": "broken link"}


def test_a_linked_picture_has_its_own_captions_or_its_targets(tmp_path: Path) -> None:
    touch(tmp_path, "all/a.png", "all/a.txt", "all/b.png", "all/b.txt", "all/b.json", "all/c.png", "y.txt", "plain.png")
    for name, target in (("x.png", "a.png"), ("y.png", "b.png"), ("z.png", "b.png"), ("none.png", "c.png")):
        (tmp_path / name).symlink_to(tmp_path / "all" / target)
    assert captions(scan(tmp_path)) == {
        "all/a.png": ["a.txt"],
        "all/b.png": ["b.json", "b.txt"],
        "all/c.png": [],
        "none.png": [],
        "plain.png": [],
        "x.png": ["a.txt"],
        "y.png": ["y.txt"],
        "z.png": ["b.json", "b.txt"],
    }


def test_captions_beside_a_target_are_of_the_input_too(tmp_path: Path) -> None:
    touch(tmp_path, "outside/secret.txt", "in/all/a.png", "in/b.png")
    (tmp_path / "in" / "x.png").symlink_to(tmp_path / "in" / "all" / "a.png")
    (tmp_path / "in" / "all" / "a.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    for outside, of_each in ((False, []), (True, ["a.txt"])):
        found = captions(scan(tmp_path / "in", outside=outside))
        assert found == {"all/a.png": of_each, "b.png": [], "x.png": of_each}


# ------------------------------------------------------------------------------------------------ what is not readable


def test_a_folder_that_cannot_be_opened_costs_what_is_in_it(tmp_path: Path) -> None:
    """Its path is longer than the system takes at once, as trees that were moved into each other may be."""
    touch(tmp_path, "a.png", "z/b.png")
    name, part = "long" * 60, os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir(name, dir_fd=part)
        inner = os.open(name, os.O_RDONLY, dir_fd=part)
        os.close(part)
        part = inner
    os.close(part)
    result = scan(tmp_path)
    (reject,) = result.rejects
    assert keys(result) == ["a.png", "z/b.png"]
    assert (reject.reason, reject.detail) == ("unreadable folder", os.strerror(errno.ENAMETOOLONG))
    assert reject.transient and reject.key.startswith(name)
    shutil.rmtree(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs a file that opens and cannot be read")
def test_a_file_without_extension_that_cannot_be_read_is_no_picture(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "mem").symlink_to("/proc/self/mem")
    result = scan(tmp_path, outside=True)
    assert keys(result) == ["a.png"] and dict(result.ignored) == {"no extension": 1} and result.rejects == []
