"""What `fuzz.py` feeds: each parser of ours with valid examples to damage and the errors that it may raise."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bad_inputs
import numpy as np
import training_helpers as helpers
from fuzz_inputs import damaged, json_text, odd_tree, written
from hypothesis import strategies as st

from fluxdit_jax.dataset import fields, records
from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError, Manifest, json_checksum, load_manifest
from fluxdit_jax.gate.requirement import GateError, encoder_summary, family, require_report
from fluxdit_jax.run import metrics, run_directory
from fluxdit_jax.sampling import prompts
from fluxdit_jax.vae import files
from preprocess import PreprocessError
from preprocess.build import options, units
from preprocess.decoding import images
from preprocess.decoding.images import Rejected
from preprocess.input import captions, precomputed, scan, tables

SCRATCH = Path(tempfile.gettempdir()) / "unset"  # a folder of its own for each target, while it is fed


@dataclasses.dataclass
class Target:
    """A parser.

    Attributes:
      what: in words.
      inputs: what it is fed with; examples: what it is fed with first.
      call: feeds it; raises `AssertionError` if what it accepts is wrong.
      errors: what it may raise.
    """

    what: str
    inputs: st.SearchStrategy
    call: Callable[[Any], object]
    errors: type[Exception] | tuple[type[Exception], ...]
    examples: tuple[Any, ...] = ()

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        global SCRATCH
        SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            yield
        finally:
            shutil.rmtree(SCRATCH, ignore_errors=True)


def scratch(name: str, content: bytes) -> Path:
    """A file with this content in the target's folder."""
    path = SCRATCH / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


# --------------------------------------------------------------------------------------------- the targets


def manifest_tree() -> dict:
    with tempfile.TemporaryDirectory() as name:
        helpers.write_dataset(Path(name) / "data")
        tree = json.loads((Path(name) / "data" / MANIFEST).read_text())
    del tree["checksum"]
    return tree


TREE = manifest_tree()


FURTHER = {"pose": {"encoder": TREE["vision"]}}  # a condition that is not among the declared ones


def parse_manifest(tree: dict) -> None:
    """A manifest whose checksum is right: what a careless or hostile writer could make."""
    whole = dict(tree)
    whole["checksum"] = json_checksum(whole)
    manifest = Manifest.from_json(written(whole))
    sizes = manifest.latent_sizes()
    assert max(max(size) for size in sizes) <= 2**16, "sides that no picture has"
    assert manifest.records("train") >= 0
    assert Manifest.from_json(manifest.to_json()) == manifest


def load_folder(content: bytes) -> None:
    load_manifest(scratch("data/" + MANIFEST, content).parent)


RECORD, SEVERAL = helpers.make_record(0), helpers.make_record(1, captions=4)


def decode_record(data: bytes) -> None:
    record = records.decode_record(data, helpers.LAYOUT)
    held = record.latent.nbytes + sum(text.nbytes for text in record.texts) + record.vision.nbytes
    assert held <= len(data), "arrays larger than their bytes"
    records.check_record(record)
    again = records.decode_record(records.encode_record(record), helpers.LAYOUT)
    assert again.key == record.key and np.array_equal(again.latent, record.latent)
    assert again.captions == record.captions and all(map(np.array_equal, again.texts, record.texts))


def raw_record(record: records.Record, **changes: Any) -> bytes:
    """A record that says other things than `encode_record` would let it."""
    example = records.tf_example_pb2.Example.FromString(records.encode_record(record))
    for name, value in changes.items():
        feature = example.features.feature[name.replace("__", "/")]
        feature.Clear()
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.extend(value)
    return example.SerializeToString()


def read_table(suffix: str) -> Callable[[bytes], None]:
    def call(content: bytes) -> None:
        with contextlib.suppress(Rejected):  # no column of paths
            for number, row in tables.read_table(io.BytesIO(content), suffix, captions.fields()):
                assert number >= 1
                if isinstance(row, dict):
                    with contextlib.suppress(Rejected):
                        tables.path_in(row)
                    with contextlib.suppress(Rejected):
                        assert all(text.encode() for text in captions.from_mapping(row, captions.fields()))

    return call


def read_image(content: bytes) -> None:
    limits = images.Limits(max_pixels=4_000_000)
    header = images.read_header(content, limits)
    assert header.width * header.height <= limits.max_pixels
    picture = images.decode(content, header, (64, 64), "pad", "key")
    assert picture.pixels.shape == (64, 64, 3) and picture.pixels.dtype == np.uint8


def read_archive(content: bytes) -> None:
    path = scratch("in/a.tar", content)
    found = scan.scan(path.parent)
    sources = [source.place for each in found.found for source in each.captions]
    for place in [p for p in (*(each.image for each in found.found), *sources) if p]:
        assert Path(place.path) == path.resolve()
        with contextlib.suppress(Rejected):
            assert len(place.read(100_000)) <= 100_000
    for each in found.found:
        assert ".." not in Path(each.key).parts and not each.key.startswith("/")


def archive(**changes: Any) -> bytes:
    """A tar of a picture and its caption; `changes` go into the first member's header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=changes.pop("format", tarfile.GNU_FORMAT)) as tar:
        for name, content in (("sample.png", bad_inputs.PNG), ("sample.json", b'{"caption": "x"}')):
            member = tarfile.TarInfo(name)
            for key, value in changes.items():
                setattr(member, key, value)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            changes = {}
    return file.getvalue()


def negative_size() -> bytes:
    """A member whose size, in base 256, is below zero."""
    data = bytearray(archive())
    data[124:136] = b"\xff" + (-4096).to_bytes(11, "big", signed=True)
    checksum = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = b"%06o\0 " % checksum
    return bytes(data)


def huge_name() -> bytes:
    """A GNU long name that claims 2**60 bytes."""
    data = bytearray(archive(name="n" * 300 + ".png"))
    data[124:136] = b"\x80" + (2**60).to_bytes(11, "big")
    checksum = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = b"%06o\0 " % checksum
    return bytes(data)


ARCHIVES = [
    archive(),
    archive(name="x" * 300 + ".png"),
    archive(format=tarfile.PAX_FORMAT, name="ü" * 200 + ".png", pax_headers={"comment": "c" * 300}),
    archive(format=tarfile.PAX_FORMAT, pax_headers={"size": "99999999999999"}),
    archive(format=tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
]


def read_metrics(content: bytes) -> None:
    for entry in metrics.read_metrics(scratch("metrics.jsonl", content)):
        assert isinstance(entry["step"], int)


LOG = [{"step": 0, "config": "{}"}, {"step": 1, "loss": 1.0, "skipped": 0}, {"step": 2, "loss": None}]
LOG_TEXT = "".join(json.dumps(entry) + "\n" for entry in LOG).encode()

GATED = Manifest.from_json(written(TREE | {"checksum": json_checksum(TREE)}))
REPORT = {
    "passed": True,
    "metrics": {"memorisation": {"passed": True, "value": 1.0}},
    "model": {"family": family(helpers.tiny_model()), "width": 32},
    "encoders": {name: encoder_summary(encoder) for name, encoder in GATED.encoders.items()},
    "dataset": {"format_version": GATED.version},
}


def read_report(content: bytes) -> None:
    found = require_report(scratch("report.json", content), helpers.tiny_model(), GATED)
    assert found["passed"] is True


def read_prompts(content: bytes) -> None:
    for prompt in prompts.read_prompts(scratch("prompts.txt", content)):
        assert prompt.strip() and "\n" not in prompt and prompt.encode()


def read_run(content: bytes) -> None:
    scratch("run/dataset.json", content)
    with contextlib.suppress(DatasetError):
        run_directory.load_dataset(SCRATCH / "run")
    scratch("run/config.json", content)
    run_directory.load_config(SCRATCH / "run").to_dict()


# One of today, and one of before keys were renamed, which has no checksum.
CONFIG = json.loads(json.dumps(helpers.tiny_config(Path("data"), Path("run")).to_dict()))
EARLIER = CONFIG | {
    "flow": {"drop_text": 0.1, "drop_vision": 0.3, "drop_both": 0.1},
    "model": CONFIG["model"] | {"channels": 4, "text_width": 8, "vision_width": 6},
    "optim": {"effective_batch": 8, "clip": 1.0},
}
VAE = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "act_fn": "silu",
    "scaling_factor": 0.36,
    "shift_factor": 0.1,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
VAE_INDEX = {"metadata": {}, "weight_map": {"decoder.conv_in.weight": "a.safetensors", "x": "b.safetensors"}}


def read_vae(content: bytes) -> None:
    files.read_config(scratch("vae/config.json", content).parent)


def read_vae_index(content: bytes) -> None:
    folder = scratch("vae/" + files.INDEX, content).parent
    for name in ("a.safetensors", "b.safetensors"):
        scratch("vae/" + name, b"")
    for file in files.weight_files(folder):
        assert file.parent == folder, "weights from elsewhere"


def vector(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def index_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        info = units.UnitInfo("u" * 8, "train", "", 0, 0, helpers.LAYOUT | {"pose": None}, None, ())
        units.Rows(units.rows_schema(["latent", *info.layout]).empty_table(), [info]).save(Path(name) / "index.parquet")
        return (Path(name) / "index.parquet").read_bytes()


def read_options(content: bytes) -> None:
    from preprocess.build.publish import load_options

    load_options(scratch("data/build.json", content).parent)


def read_commit(content: bytes) -> None:
    from preprocess.build.publish import _read_commit

    commit = _read_commit(scratch("commit.json", content))
    for name in (*commit["keep"], *commit["keep"].values(), *commit["place"], *commit["place"].values()):
        assert (SCRATCH / name).resolve().parent == SCRATCH, "a file that would be moved elsewhere"


COMMIT = {
    "phase": 1,
    "keep": {"a-train.array_record-0-of-1": "0" * 8},
    "place": {"0" * 8: "a-train.array_record-0-of-1"},
}
HOSTILE_COMMITS = tuple(
    json.dumps(COMMIT | {"place": {"0" * 8: name}}).encode() for name in ("../../x", "/etc/x", "..")
)
OPTIONS = {"options": options.Options(input="in", output="out").checked().to_dict()}
CAPTION = {"caption": "a dog", "text": "a cat"}
JSONL = b'{"file_name": "a.png", "caption": "a dog"}\n{"image_path": "b.png", "text": "b"}\n\n'
CSV = b'file_name,caption\na.png,"a dog, ""big"""\nb.png,"two\nlines"\n'
IMAGES = [
    bad_inputs.PNG, bad_inputs.JPEG, bad_inputs.TEXT_BOMB[:2000], bad_inputs.FLOATS, bad_inputs.MILLIONS,
    *(bad_inputs.coded(bad_inputs.picture(), name) for name in ("WEBP", "AVIF", "TIFF", "BMP")),
    bad_inputs.coded(bad_inputs.picture(), "JPEG", exif=bad_inputs.ORIENTATION_99),
    bad_inputs.STATEMENTS, bad_inputs.JPEG[:-2], bad_inputs.coded(bad_inputs.picture(), "JPEG", progressive=True)[:-2],
    bad_inputs.coded(bad_inputs.picture(), "WEBP", exif=bad_inputs.ORIENTATION_99, icc_profile=bad_inputs.SRGB),
]  # fmt: skip
HUGE_IMAGE = bad_inputs.png(100_000, 100_000, b"\0" * 100)
HOSTILE_RECORDS = (
    raw_record(RECORD, latent__shape=[2**40, 2**40, 1]),
    raw_record(RECORD, latent__shape=[-4, -4, 4]),
    raw_record(RECORD, latent__shape=[2**62] * 5000),
    raw_record(RECORD, text=b"x"),
    raw_record(RECORD, caption=b"\xff"),
    raw_record(RECORD, other_text=b"xx"),
    raw_record(SEVERAL, other_lengths=[2**62, 2**62, 2**63 - 1]),
    raw_record(SEVERAL, other_lengths=[1] * 5000),
    raw_record(SEVERAL, other_captions=b"[" * 100_000),
    raw_record(SEVERAL, other_captions=b'["\\ud800", {}, 1e999]'),
    raw_record(SEVERAL, other_captions=b"9" * 10_000),
    b"\x0a" * 100_000,
)
HOSTILE_MANIFESTS = (
    TREE | {"buckets": [[2**40, 2**40]]},
    TREE | {"buckets": [[1e308, 8]]},
    TREE | {"text_tokens": 2**62},
    TREE | {"latent_mean": [float("nan")] * 4},
    TREE | {"rejects": 10**400},
    TREE | {"name": "../../x"},
    TREE | {"shards": {"train": [TREE["shards"]["train"][0] | {"file": ".."}]}},
    TREE | {"vae": TREE["vae"] | {"width": 2**40}},
    TREE | {"conditions": {"pose": {"encoder": TREE["vision"], "length": 2**62}}},
    TREE | {"conditions": {"pose": {"encoder": TREE["vision"] | {"width": 2**40}}}},
    TREE | {"conditions": dict.fromkeys(("../../x", "text", "latent", "all", "keep_text", ""), FURTHER["pose"])},
    TREE | {"conditions": [FURTHER]},
)
HOSTILE_CAPTIONS = (
    b"[" * 100_000,
    b'{"caption": ' + b"9" * 10_000 + b"}",
    b'{"caption": NaN}',
    b"{" * 4_000_000,
)
HOSTILE_LOGS = (
    b"[1]\n" * 2,
    b'{"loss": 1}\n' * 2,
    b'{"step": "x"}\n' * 2,
    b"[" * 100_000 + b"\n{}\n",
    b"\xff\n\n",
)
HOSTILE_INDEXES = tuple(json.dumps({"weight_map": {"x": x}}).encode() for x in ("/etc/passwd", "../vae/a.safetensors"))
HOSTILE_SHARES = (10**400, float("nan"), "0.1", [], {}, None, True)
CAPTION_FILES = [b"a dog", "ein Hündchen".encode()]
PROMPTS = [b"a dog\na cat\n", "\ufeffein Hund\r\n\r\n".encode()]
VECTORS = [vector(np.ones(1024, np.float32)), vector(np.array([{}], object))]
JSON_TOKENS = (b"NaN", b"[" * 3000, b"9" * 5000, b"\\ud800", b"\0", b"\n", b'"step"')
CSV_TOKENS = (b'"', b",", b"\0", b"\r", b'"' * 5000)
ENDLESS = (b"x" * 9_000_000, b"a,b\n" + b"," * 9_000_000)


def read_vector(data: bytes) -> None:
    vision = precomputed.parse(data, fields.VISION, precomputed.VISION_WIDTH)
    assert vision.shape == (1024,) and fields.VISION.fault(vision) is None
    pose = precomputed.parse(data, fields.field_named("pose"))  # of any width
    assert np.array_equal(pose, vision)


def from_json(data: bytes) -> None:
    captions.from_json(data, captions.fields())


def load_index(data: bytes) -> None:
    units.Rows.load(scratch("index.parquet", data))


SUMMED = TREE | {"checksum": json_checksum(TREE)}
_TABLE: list[tuple] = [
    # name, what it is, inputs, what reads it, what it may raise, what is tried first
    (
        "record",
        "records",
        damaged([records.encode_record(RECORD), records.encode_record(SEVERAL)]),
        decode_record,
        DatasetError,
        HOSTILE_RECORDS,
    ),
    (
        "manifest",
        "manifests with a right checksum",
        odd_tree(TREE) | odd_tree(TREE | {"conditions": FURTHER}),
        parse_manifest,
        DatasetError,
        HOSTILE_MANIFESTS,
    ),
    ("manifest-file", "manifest files", json_text(SUMMED), load_folder, DatasetError, ()),
    ("caption-json", "captions in JSON", json_text(CAPTION), from_json, Rejected, HOSTILE_CAPTIONS),
    ("caption-text", "captions in text", damaged(CAPTION_FILES), captions.from_text, Rejected, ()),
    ("jsonl", "metadata.jsonl", damaged([JSONL], JSON_TOKENS), read_table(".jsonl"), (), ENDLESS),
    ("csv", "metadata.csv", damaged([CSV], CSV_TOKENS), read_table(".csv"), (), ENDLESS),
    ("image", "pictures", damaged(IMAGES), read_image, Rejected, (HUGE_IMAGE,)),
    (
        "archive",
        "tar archives",
        damaged(ARCHIVES),
        read_archive,
        PreprocessError,
        (negative_size(), huge_name()),
    ),
    ("vector", "vision vectors", damaged(VECTORS), read_vector, Rejected, ()),
    ("index", "index.parquet", damaged([index_bytes()]), load_index, DatasetError, ()),
    ("options", "build.json", json_text(OPTIONS), read_options, PreprocessError, ()),
    (
        "metrics",
        "metrics.jsonl",
        damaged([LOG_TEXT], JSON_TOKENS),
        read_metrics,
        metrics.LogError,
        HOSTILE_LOGS,
    ),
    ("commit", "commit.json of a build", json_text(COMMIT), read_commit, PreprocessError, HOSTILE_COMMITS),
    ("report", "validation reports", json_text(REPORT), read_report, GateError, ()),
    ("prompts", "prompt files", damaged(PROMPTS), read_prompts, prompts.SampleError, ()),
    ("run", "config.json and dataset.json of a run", json_text(CONFIG), read_run, run_directory.RunError, ()),
    (
        "run-earlier",
        "config.json of an earlier run",
        json_text(EARLIER),
        read_run,
        run_directory.RunError,
        tuple(json.dumps(EARLIER | {"flow": EARLIER["flow"] | {"drop_both": x}}).encode() for x in HOSTILE_SHARES),
    ),
    ("vae", "config.json of a VAE", json_text(VAE), read_vae, files.DecoderError, ()),
    (
        "vae-index",
        "weights' index of a VAE",
        json_text(VAE_INDEX),
        read_vae_index,
        files.DecoderError,
        HOSTILE_INDEXES,
    ),
]
TARGETS: dict[str, Target] = {name: Target(*rest) for name, *rest in _TABLE}
