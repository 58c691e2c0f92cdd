"""The plan: splits by content, shards that stay put, names by what tensors are made from."""

from __future__ import annotations

import dataclasses
import hashlib
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fluxdit_jax.records import EncoderIdentity
from preprocess.images import Header
from preprocess.options import Options
from preprocess.place import Place
from preprocess.plan import Fingerprints, Item, Unit, digest, make_units, split_of

IDENTITY = EncoderIdentity("owner/model", "abc", "f" * 64, "bfloat16", 16, {"factor": 8})
OPTIONS = Options("in", "out")


def item(number: int) -> Item:
    content = hashlib.sha256(b"%d" % number).hexdigest()
    return Item(f"{number:06}.jpg", Place("x"), (f"caption {number}",), content, Header(64, 64, 1, "JPEG"), (64, 64))


def prints(options: Options = OPTIONS, **changed: EncoderIdentity) -> Fingerprints:
    return Fingerprints.of(options, *({"vae": IDENTITY, "text": IDENTITY, "vision": IDENTITY} | changed).values())


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=300), st.integers(1, 40), st.floats(0, 0.9))
@settings(deadline=None, max_examples=60)
def test_every_item_is_in_one_unit_and_no_unit_is_too_large(numbers: set[int], size: int, holdout: float) -> None:
    items = [item(n) for n in numbers]
    units = make_units(items, holdout, size)
    assert sorted(i.key for u in units for i in u.items) == sorted(i.key for i in items)
    for unit in units:
        assert 1 <= len(unit.items) <= size
        assert [i.key for i in unit.items] == sorted(i.key for i in unit.items)
        assert {split_of(i.content, holdout) for i in unit.items} == {unit.split}
    shuffled = random.Random(0).sample(items, len(items))
    assert make_units(shuffled, holdout, size) == units


def test_one_item_more_touches_one_unit() -> None:
    items = [item(n) for n in range(5000)]
    before = {u.uid(prints()) for u in make_units(items, 0.02, 100)}
    for number in range(5000, 5020):
        after = {u.uid(prints()) for u in make_units([*items, item(number)], 0.02, 100)}
        assert len(before - after) == 1 and len(after - before) in (1, 2)


def test_shards_are_well_filled() -> None:
    sizes = [len(u.items) for u in make_units([item(n) for n in range(20_000)], 0.0, 1000)]
    assert max(sizes) <= 1000 and sum(sizes) / len(sizes) > 500


def test_the_split_follows_the_content_alone() -> None:
    contents = [item(n).content for n in range(20_000)]
    held = [c for c in contents if split_of(c, 0.02) == "holdout"]
    assert 300 < len(held) < 500
    assert all(split_of(c, 0.05) == "holdout" for c in held)
    assert {split_of(c, 0.0) for c in contents} == {"train"}


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
    assert differs(prints().ids(dataclasses.replace(one, bucket=(32, 64)))) == [True, False, True]
    newer = dataclasses.replace(one, header=dataclasses.replace(one.header, version=2))
    assert differs(prints().ids(newer)) == [True, False, True]
    assert differs(prints(dataclasses.replace(OPTIONS, fit="crop")).ids(one)) == [True, False, True]
    assert differs(prints(vae=other(sha256="0")).ids(one)) == [True, False, False]
    assert differs(prints(text=other(dtype="float32")).ids(one)) == [False, True, False]
    assert differs(prints(vision=other(options={})).ids(one)) == [False, False, True]
    assert differs(prints(vae=other(id="moved", revision="")).ids(one)) == [False, False, False]
    vector = dataclasses.replace(one, vector="v")
    assert differs(prints().ids(vector)) == [False, False, True]
    assert prints().ids(dataclasses.replace(vector, content="x"))[2] == prints().ids(vector)[2]


def test_the_captions_of_an_image_name_its_texts_together() -> None:
    def text(*captions: str) -> str:
        return prints().ids(dataclasses.replace(item(1), captions=captions))[1]

    assert text("a") == digest(prints().text, "a")  # the name that datasets of one caption have
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
