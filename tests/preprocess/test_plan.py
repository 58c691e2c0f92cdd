"""The plan: splits by content, shards that stay put, names by what tensors are made from."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fluxdit_jax.dataset.fields import VISION
from fluxdit_jax.dataset.manifest import EncoderIdentity
from preprocess.build.items import Item, Items, split_of
from preprocess.build.options import Options
from preprocess.build.plan import (
    Fingerprints,
    NothingToBuild,
    Unit,
    _in_threads,
    digest,
    make_plan,
    make_units,
)
from preprocess.decoding.images import Header, Rejected
from preprocess.input.byte_source import ByteSource
from preprocess.input.captions import Source
from preprocess.input.findings import Reject, Scan
from preprocess.input.found import Found, InputImage
from preprocess.input.precomputed import Folder

IDENTITY = EncoderIdentity("owner/model", "abc", "f" * 64, "bfloat16", 16, {"factor": 8})
OPTIONS = Options("in", "out").checked()


def item(number: int) -> Item:
    content = hashlib.sha256(b"%d" % number).hexdigest()
    return Item(
        f"{number:06}.jpg",
        ByteSource("x"),
        (f"caption {number}",),
        content,
        Header(64, 64, 1, "JPEG"),
        (64, 64),
        (64, 64),
    )


def prints(options: Options = OPTIONS, **changed: EncoderIdentity) -> Fingerprints:
    return Fingerprints.of(options, {"vae": IDENTITY, "text": IDENTITY, "vision": IDENTITY} | changed)


@given(st.sets(st.integers(0, 10**6 - 1), min_size=1, max_size=300), st.integers(1, 40), st.floats(0, 0.9))
@settings(deadline=None, max_examples=60)
def test_every_item_is_in_one_unit_and_no_unit_is_too_large(numbers: set[int], size: int, holdout: float) -> None:
    items = Items(dataclasses.replace(OPTIONS, holdout=holdout), map(item, sorted(numbers)))
    units = make_units(items, size)
    assert sorted(i.key for u in units for i in u.items) == [i.key for i in items]
    for unit in units:
        assert 1 <= len(unit.items) <= size
        assert [i.key for i in unit.items] == sorted(i.key for i in unit.items)
        assert {split_of(i.content, holdout) for i in unit.items} == {unit.split}


def test_one_item_more_touches_one_unit() -> None:
    items, names = [item(n) for n in range(1000)], prints()
    before = {u.uid(names) for u in make_units(Items(OPTIONS, items), 20)}
    for number in range(1000, 1010):
        after = {u.uid(names) for u in make_units(Items(OPTIONS, [*items, item(number)]), 20)}
        assert len(before - after) == 1 and len(after - before) in (1, 2)


def test_shards_are_well_filled() -> None:
    sizes = [len(u.items) for u in make_units(Items(OPTIONS, map(item, range(20_000))), 1000)]
    assert max(sizes) <= 1000 and sum(sizes) / len(sizes) > 500


def test_the_split_follows_the_content_alone() -> None:
    contents = [item(n).content for n in range(20_000)]
    held = [c for c in contents if split_of(c, 0.02) == "holdout"]
    assert 300 < len(held) < 500
    assert all(split_of(c, 0.05) == "holdout" for c in held)
    assert {split_of(c, 0.0) for c in (*contents, "0" * 64)} == {"train"}
    assert split_of("7" + "f" * 63, 0.5) == "holdout" and split_of("8" + "0" * 63, 0.5) == "train"


def test_what_each_name_depends_on() -> None:
    one = item(1)
    latent, text, vision = prints().ids(one)

    def differs(other: tuple[str, str, str]) -> list[bool]:
        return [a != b for a, b in zip((latent, text, vision), other)]

    def other(**changes: object) -> EncoderIdentity:
        return dataclasses.replace(IDENTITY, **changes)

    assert differs(prints().ids(dataclasses.replace(one, key="other.jpg"))) == [False, False, False]
    assert differs(prints().ids(dataclasses.replace(one, captions=("x",)))) == [False, True, False]
    assert differs(prints().ids(dataclasses.replace(one, content="x"))) == [True, False, True]
    assert differs(prints().ids(dataclasses.replace(one, bucket=(32, 64)))) == [True, False, False]
    assert differs(prints().ids(dataclasses.replace(one, seen=(32, 64)))) == [False, False, True]
    newer = dataclasses.replace(one, header=dataclasses.replace(one.header, version=2))
    assert differs(prints().ids(newer)) == [True, False, True]
    assert differs(prints(dataclasses.replace(OPTIONS, fit="crop")).ids(one)) == [True, False, True]
    assert differs(prints(vae=other(sha256="0")).ids(one)) == [True, False, False]
    assert differs(prints(text=other(dtype="float32")).ids(one)) == [False, True, False]
    assert differs(prints(vision=other(options={})).ids(one)) == [False, False, True]
    assert differs(prints(vae=other(id="moved", revision="")).ids(one)) == [False, False, False]
    vector = dataclasses.replace(one, files=(("vision", "v"),))
    assert differs(prints().ids(vector)) == [False, False, True]
    assert prints().ids(dataclasses.replace(vector, content="x"))[2] == prints().ids(vector)[2]


def test_the_captions_of_an_image_name_its_texts_together() -> None:
    def text(*captions: str) -> str:
        return prints().ids(dataclasses.replace(item(1), captions=captions))[1]

    assert text("a") == digest(prints().prints["text"], "a")  # the name that datasets of one caption have
    names = [text("a"), text("a", "b"), text("b", "a"), text("a", "b", "c"), text("a", "bc"), text("ab")]
    assert len(set(names)) == len(names)
    several = dataclasses.replace(item(1), captions=("a", "b"))
    assert several.caption == "a"
    assert prints().ids(several)[::2] == prints().ids(item(1))[::2]


def test_a_unit_is_named_by_its_records() -> None:
    items = (item(1), item(2))
    name = Unit("train", items).uid(prints())
    assert Unit("train", items).uid(prints()) == name
    for other in (
        Unit("holdout", items),
        Unit("train", items[:1]),
        Unit("train", (items[0], dataclasses.replace(items[1], captions=("x",)))),
        Unit("train", (items[0], dataclasses.replace(items[1], key="x"))),
    ):
        assert other.uid(prints()) != name


def test_splits_shards_and_names_are_those_of_earlier_versions() -> None:
    """Otherwise the next build moves pictures between the splits, or encodes and writes everything again."""
    units = make_units(Items(dataclasses.replace(OPTIONS, holdout=0.25), map(item, range(16))), 3)
    assert [(unit.split, [int(i.key[:6]) for i in unit.items]) for unit in units] == [
        ("train", [5, 11, 15]),
        ("train", [1, 6, 7]),
        ("train", [10]),
        ("train", [3, 4, 14]),
        ("train", [0]),
        ("train", [2, 12]),
        ("holdout", [8, 9, 13]),
    ]
    names = "31dc9a688b3e108e0c2830282581e1a2", "bbef29aa2b26d664cb35210e2848c58c", "db2c087b0811024f914b555b9c679d93"
    one = item(1)
    assert prints().ids(one) == names == prints().ids_of(one.content, one.bucket, one.seen, one.captions)
    assert Unit("train", (one, item(2))).uid(prints()) == "734ad0695712230926a5998d476a45bc"


# ---------------------------------------------------------------------------------------------- the plan of a folder


SMALL = Options("in", "out", resolution=128, modulus=16, holdout=0.0, workers=2, shard_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of several sizes, of which b.png is a JPEG and e.png a copy of a.png; and no picture."""
    folder = tmp_path_factory.mktemp("photos")
    for name, size, kind in (
        ("a.png", (100, 70), "PNG"),
        ("b.png", (64, 128), "JPEG"),
        ("c.png", (80, 80), "PNG"),
        ("d.jpg", (100, 80), "JPEG"),
    ):
        Image.new("RGB", size, (size[0], size[1], 7)).save(folder / name, kind)
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "no.png").write_bytes(b"not a picture")
    return folder


def found(folder: Path, name: str, *captions: str, offset: int = 0, size: int = -1) -> InputImage:
    sources = (Source("t.csv:2", 0, texts=captions or Rejected("empty caption", f"of {name}")),)
    return InputImage(name, ByteSource(str(folder / name), offset, size), sources)


def pictures(folder: Path) -> list[InputImage]:
    return [found(folder, f"{name}.png", f"caption {name}", *more) for name, *more in ("a", "bb", "c", "e")]


def test_everything_that_is_found_is_read_and_judged(folder: Path) -> None:
    listing = Scan(folder, Found(pictures(folder)), [Reject("x.gif", "x.gif", "image type is not read")])
    twice = (Source("t.csv:2", 0, texts=("one", "one")), Source("t.csv:3", 1, texts=("behind",)))
    listing.take(InputImage("d.jpg", ByteSource(str(folder / "d.jpg")), twice))
    for other in (found(folder, "d2.jpg"), found(folder, "no.png", "no")):
        listing.take(other)
    listing.passed_over["the same caption again"] = 4
    done: list[int] = []
    plan = make_plan(listing, SMALL, progress=done.append)
    assert done == [1] * 7

    read = {name: (folder / name).read_bytes() for name in ("a.png", "b.png", "c.png", "d.jpg", "e.png")}
    assert [i.key for i in plan.items] == list(read)
    assert [i.content for i in plan.items] == [hashlib.sha256(data).hexdigest() for data in read.values()]
    assert plan.bytes_read == sum(map(len, read.values()))
    first = [plan.items[position] for position in range(3)]
    assert [i.captions for i in first[:2]] == [("caption a",), ("caption b", "b")]
    assert [(i.header.height, i.header.width) for i in first[:2]] == [(70, 100), (128, 64)]
    assert [i.bucket for i in first] == [(112, 144), (144, 112), (128, 128)]
    assert {i.files for i in plan.items} == {()}
    assert plan.units == make_units(plan.items, 3) and len(plan.units) > 1

    assert [(r.key, r.reason) for r in plan.rejects] == [
        ("x.gif", "image type is not read"),
        ("d2.jpg", "empty caption"),
        ("no.png", "not an image"),
    ]
    assert plan.rejects[1].file == str(folder / "d2.jpg")
    assert plan.duplicates == [("a.png", "e.png")] and plan.items.wrong_extension == 1
    assert plan.passed_over == {"the same caption again": 5, "a row for a picture that has a caption": 1}
    assert (
        listing.passed_over == {"the same caption again": 4} and len(listing.rejects) == 1
    )  # nothing of it is changed


def test_a_limit_takes_the_first(folder: Path) -> None:
    listing = Scan(folder, Found(pictures(folder)))
    plan = make_plan(listing, dataclasses.replace(SMALL, limit=2))
    beyond = listing.found.beyond(2)
    assert sorted(beyond) == ["c.png", "e.png"] and len(beyond) == 2
    assert "c.png" in beyond and "a.png" not in beyond and "b.png" not in beyond and "d.png" not in beyond
    assert not listing.found.beyond(4) and not listing.found.beyond(10**20)
    assert [i.key for i in plan.items] == ["a.png", "b.png"]


def test_more_inputs_than_threads_stay_in_order(folder: Path) -> None:
    names = [f"{number:03}.png" for number in range(100)]
    members = [dataclasses.replace(pictures(folder)[0], key=name) for name in names]
    assert [i.key for i in make_plan(Scan(folder, Found(members)), SMALL).items] == names


def test_all_threads_work_at_once_and_a_bounded_number_of_inputs_ahead() -> None:
    together = threading.Barrier(8)
    assert len(list(_in_threads(lambda _: together.wait(20), collections.deque([None] * 32), 8))) == 32
    begun: list[int] = []
    results = _in_threads(lambda number: begun.append(number) or number, collections.deque(range(1000)), 2)
    assert next(results) == 0 and len(begun) <= 32
    assert list(results) == list(range(1, 1000))


def test_vectors_are_part_of_an_item_and_one_that_is_missing_rejects_it(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.png.npy", np.ones(1024, np.float32))
    members = pictures(folder)[:2]
    vectors = Folder(VISION, str(tmp_path), lambda: [member.key for member in members])
    plan = make_plan(Scan(folder, Found(members)), SMALL, [vectors])
    vector = hashlib.sha256((tmp_path / "a.png.npy").read_bytes()).hexdigest()
    assert [(i.key, i.files) for i in plan.items] == [("a.png", (("vision", vector),))]
    assert [(r.key, r.reason) for r in plan.rejects] == [("b.png", "no vector")]


def test_the_largest_file_that_is_read(folder: Path) -> None:
    sizes = {"c.png": 512_000_000, "b.png": 512_000_001}  # claimed, as members of an archive
    members = [found(folder, name, "caption", size=size) for name, size in sizes.items()]
    plan = make_plan(Scan(folder, Found([*pictures(folder)[:1], *members])), SMALL)
    assert {r.key: r.reason for r in plan.rejects} == {"c.png": "unreadable file", "b.png": "file too large"}


def nothing(listing: Scan, options: Options = SMALL) -> NothingToBuild:
    with pytest.raises(NothingToBuild) as caught:
        make_plan(listing, options)
    return caught.value


def test_a_holdout_of_everything_is_refused_by_its_option(folder: Path) -> None:
    error = nothing(Scan(folder, Found(pictures(folder))), dataclasses.replace(SMALL, holdout=0.999999))
    assert "--holdout 0.999999" in str(error) and "4 images" in str(error) and error.rejects == []


def test_a_folder_without_a_picture_says_what_else_is_there(folder: Path) -> None:
    other = collections.Counter({".md": 2, ".mp4": 7})
    error = nothing(Scan(folder, ignored=other))
    assert str(folder) in str(error) and ".mp4 7, .md 2" in str(error) and error.rejects == []
    assert str(nothing(Scan(folder))).endswith(str(folder))


def test_pictures_that_all_are_refused_are_told_by_the_most_common_reason(folder: Path) -> None:
    lone = Reject("lone.txt", "lone.txt", "not an image", "this is not counted", counted=False)
    members = [found(folder, "a.png"), found(folder, "b.png"), found(folder, "no.png", "no")]
    error = nothing(Scan(folder, Found(members), [lone, lone]))
    assert "3 images" in str(error) and "not an image: 3; empty caption: 2" in str(error)
    assert f"{folder / 'no.png'}: " in str(error) and [r.key for r in error.rejects[2:]] == ["a.png", "b.png", "no.png"]
    error = nothing(Scan(folder, Found(members), ignored=collections.Counter({".md": 2})))
    assert "empty caption: 2; not an image: 1" in str(error) and ".md 2" in str(error)
    assert f"{folder / 'a.png'}: " in str(error) and "of a.png" in str(error)
    error = nothing(Scan(folder, rejects=[Reject("x.gif", "x.gif", "image type is not read")]))
    assert "x.gif: image type is not read" in str(error) and f"in {folder} " in str(error)
