"""Every way in which a manifest can be wrong, and the files it names."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxdit_jax.dataset.manifest import (
    DatasetError,
    EncoderIdentity,
    Manifest,
    Shard,
    load_manifest,
    sha256_file,
    shard_name,
)

VAE = EncoderIdentity("vae/id", "abc", "12", "bfloat16", 2, {"factor": 8, "mode": "mean"})
TEXT = EncoderIdentity("t5", "", "34", "bfloat16", 8)
VISION = EncoderIdentity("dino", "", "56", "bfloat16", 6)
POSE = EncoderIdentity("precomputed", "", "", "float32", 34, {"precomputed": True})
ENCODERS = {"vae": VAE, "text": TEXT, "vision": VISION}


def a_manifest(**changes) -> Manifest:
    values: dict[str, object] = dict(  # noqa: C408
        name="faces",
        resolution=256,
        modulus=64,
        fit="crop",
        encoders=ENCODERS,
        buckets=((256, 256), (192, 320)),
        latent_mean=(0.1, -0.2),
        latent_std=(1 / 3, 2.0),
        latent_count=1234567890123,
        lengths={"text": 77},
        shards={
            "train": (
                Shard("faces-train-0", "aa", 10, 3, {"256x256": 3}),
                Shard("b", "bb", 9, 2, {"1x1": 2}),
            ),
            "holdout": (Shard("c", "cc", 8, 1, {"256x256": 1}),),
        },
        rejects=4,
    )
    return Manifest(**(values | changes))


def checked(raw: dict) -> str:
    """The JSON of a manifest with the checksum of its content, as a faulty writer would make it."""
    raw = {name: value for name, value in raw.items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return json.dumps(raw | {"checksum": checksum})


def test_the_helper_makes_the_checksum_of_the_module():
    text = a_manifest().to_json()
    assert json.loads(checked(json.loads(text))) == json.loads(text)


REMOVE = object()


def test_further_conditions_stand_beside_what_every_manifest_has():
    usual, further = a_manifest(), a_manifest(encoders=ENCODERS | {"pose": POSE})
    assert Manifest.from_json(further.to_json()) == further
    assert further.further() == ["pose"] and usual.further() == []
    assert further.layout == {"text": 8, "vision": None, "pose": None} == usual.layout | {"pose": None}
    raw = json.loads(further.to_json())
    assert raw.pop("conditions") == {"pose": {"encoder": dataclasses.asdict(POSE)}}
    assert json.loads(checked(raw)) == json.loads(usual.to_json())


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 2, ["version", "2"]),
        (("version",), REMOVE, ["version", "None"]),
        (("latent_mean",), [0.0], ["latent_mean", "2 channels"]),
        (("latent_mean",), [0.0, None], ["latent_mean"]),
        (("latent_mean",), "ab", ["latent_mean"]),
        (("latent_std",), [1.0, 1.0, 1.0], ["latent_std", "2 channels"]),
        (("latent_std",), [1.0, 0.0], ["latent_std", "above 0"]),
        (("latent_std",), [1.0, -1.0], ["latent_std", "above 0"]),
        (("latent_std",), [1.0, float("nan")], ["latent_std", "finite"]),
        (("latent_mean",), [float("inf"), 0.0], ["latent_mean", "finite"]),
        (("latent_mean",), [10**400, 0.0], ["latent_mean"]),
        (("vae", "options"), {}, ["vae.options", "factor"]),
        (("vae", "options"), [], ["vae.options"]),
        (("vae", "options", "factor"), 0, ["factor"]),
        (("vae", "options", "factor"), "8", ["factor"]),
        (("vae", "options", "factor"), True, ["factor"]),
        (("vae", "width"), "2", ["vae.width"]),
        (("vae", "width"), 0, ["VAE has 0 channels"]),
        (("vae", "id"), 5, ["vae.id"]),
        (("vae", "surprise"), 1, ["surprise"]),
        (("vae",), None, ["vae is None"]),
        (("text",), [], ["text is"]),
        (("text", "width"), 1.5, ["text.width"]),
        (("vision", "sha256"), REMOVE, ["sha256"]),
        (("vision", "width"), -1, ["vision.width"]),
        (("vision", "width"), 0, ["vision.width"]),
        (("vision", "width"), 2**16 + 1, ["vision.width", "65537"]),
        (("text", "width"), 2**16 + 1, ["text.width", "65537"]),
        (("vae", "id"), "a\nb", ["encoder", "a\\nb"]),
        (("text", "id"), "a\x1b[31m", ["encoder", "a\\x1b[31m"]),
        (("vision", "id"), "a\u202eb", ["encoder", "a\\u202eb"]),
        (("name",), "a/b", ["name", "a/b"]),
        (("name",), "", ["name"]),
        (("buckets",), [], ["bucket"]),
        (("buckets",), [[0, 64]], ["bucket", "64x0"]),
        (("buckets",), [[256, 60]], ["bucket", "60x256"]),
        (("buckets",), [[60, 256]], ["bucket", "256x60"]),
        (("buckets",), [[64, 2**16 + 8]], ["bucket", "65544x64"]),
        (("buckets",), [[64]], ["buckets"]),
        (("buckets",), [[64, None]], ["buckets"]),
        (("buckets",), [[64, float("inf")]], ["buckets"]),
        (("buckets",), [["x", 64]], ["buckets"]),
        (("buckets",), 5, ["buckets"]),
        (("shards",), [], ["shards"]),
        (("shards", "train"), None, ["shards"]),
        (("shards", "train"), [{}], ["shards", "file"]),
        (("shards", "train", 0, "file"), "../x", ["shard", "../x"]),
        (("shards", "train", 0, "file"), "/etc/passwd", ["shard", "/etc/passwd"]),
        (("shards", "train", 0, "file"), "", ["shard"]),
        (("shards", "train", 0, "file"), 5, ["file"]),
        (("shards", "train", 0, "records"), 0, ["records"]),
        (("shards", "train", 0, "records"), "3", ["records"]),
        (("shards", "train", 0, "bytes"), None, ["bytes"]),
        (("text_tokens",), 0, ["text_tokens"]),
        (("text_tokens",), 2**16 + 1, ["text_tokens", "65537"]),
        (("text_tokens",), "many", ["text_tokens"]),
        (("resolution",), "256", ["resolution"]),
        (("name",), REMOVE, ["missing or unknown: name"]),
        (("conditions",), [], ["conditions is []"]),
        (("conditions", "pose"), None, ["conditions.pose is None"]),
        (("conditions", "pose", "encoder"), REMOVE, ["conditions.pose.encoder"]),
        (("conditions", "pose", "encoder"), 5, ["conditions.pose.encoder is 5"]),
        (("conditions", "pose", "encoder", "width"), 0, ["pose.width", "0"]),
        (("conditions", "pose", "encoder", "width"), 2**16 + 1, ["pose.width", "65537"]),
        (("conditions", "pose", "encoder", "id"), "a\nb", ["encoder", "a\\nb"]),
        (("conditions", "pose", "length"), 5, ["conditions.pose", "sequence", "vector"]),
        (("conditions", "pose", "surprise"), 5, ["conditions.pose.surprise"]),
        (("conditions", "text"), {"encoder": dataclasses.asdict(POSE)}, ["conditions", "'text'"]),
        (("conditions", "latent"), {"encoder": dataclasses.asdict(POSE)}, ["conditions", "'latent'", "reserved"]),
        (("conditions", "../pose"), {"encoder": dataclasses.asdict(POSE)}, ["conditions", "'../pose'"]),
    ],
)
def test_manifest_refusals_name_file_and_field(path, value, words):
    raw = json.loads(a_manifest(encoders=ENCODERS | {"pose": POSE}).to_json())
    place = raw
    for key in path[:-1]:
        place = place[key]
    if value is REMOVE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(DatasetError) as refusal:
        Manifest.from_json(checked(raw), "some/manifest.json")
    for word in ["some/manifest.json", *words]:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoders": ENCODERS | {"text": dataclasses.replace(TEXT, width=1)}, "lengths": {"text": 1}},
        {"encoders": ENCODERS | {"text": dataclasses.replace(TEXT, width=2**16)}, "lengths": {"text": 2**16}},
        {"encoders": ENCODERS | {"vision": dataclasses.replace(VISION, width=1)}},
        {"encoders": ENCODERS | {"vision": dataclasses.replace(VISION, width=2**16)}},
        {"buckets": ((8, 2**16), (2**16, 8))},
        {"encoders": ENCODERS | {"vae": dataclasses.replace(VAE, options={"factor": 1})}, "buckets": ((1, 3),)},
        {"shards": {"train": (Shard("a" * 255, "", 1, 1, {}),)}},
        {"encoders": ENCODERS | {"p" * 31: dataclasses.replace(POSE, width=1)}},
        {"encoders": ENCODERS | {"p": dataclasses.replace(POSE, width=2**16), "q": POSE}},
    ],
)
def test_the_smallest_and_the_largest_numbers_are_accepted(changes):
    manifest = a_manifest(**changes)
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', pytest.param("[" * 100_000, id="deep"), '{"version": 1}']
)
def test_text_that_is_no_manifest_is_refused(text):
    with pytest.raises(DatasetError, match=r"some/manifest\.json"):
        Manifest.from_json(text, "some/manifest.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutilated_manifest_gives_a_manifest_or_dataset_error(draw):
    raw = json.loads(a_manifest(encoders=ENCODERS | {"pose": POSE}).to_json())
    for _ in range(draw.draw(st.integers(1, 2))):
        place = raw
        while True:
            keys = range(len(place)) if isinstance(place, list) else list(place)
            if not keys:
                break
            key = draw.draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw.draw(st.booleans()):
                place = place[key]
                continue
            if isinstance(place, dict) and draw.draw(st.booleans()):
                del place[key]
            else:
                place[key] = draw.draw(json_values)
            break
    try:
        manifest = Manifest.from_json(checked(raw))
    except DatasetError:
        return
    # what is accepted can be used
    assert manifest.latent_sizes() and manifest.records("train") >= 0
    assert all(isinstance(encoder.width, int) and encoder.width > 0 for encoder in manifest.encoders.values())
    assert manifest.layout.keys() | {"vae"} == manifest.encoders.keys()


def test_load_manifest_names_the_path_and_what_to_do(tmp_path):
    with pytest.raises(DatasetError) as refusal:
        load_manifest(tmp_path)
    assert str(tmp_path / "manifest.json") in str(refusal.value)
    assert "python -m preprocess build" in str(refusal.value)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"manifest\.json"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(a_manifest().to_json())
    assert load_manifest(str(tmp_path)) == a_manifest()


def test_a_directory_in_place_of_the_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DatasetError, match=r"manifest\.json"):
        load_manifest(tmp_path)


def test_shard_names_are_those_of_tfds(tmp_path):
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=tmp_path,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name="faces",
        split="train",
        filetype_suffix="array_record",
    )
    expected = template.sharded_filepath(shard_index=3, num_shards=42)
    assert shard_name("faces", "train", 3, 42) == expected.name


def test_sha256_of_a_file_longer_than_a_buffer(tmp_path):
    data = np.random.default_rng(0).bytes(3 * 2**20 + 17)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
