"""The targets of `fuzz.py`: each parser with valid examples to damage and the errors that it may raise."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_inputs
import fuzz_parsers as parsers
import numpy as np
import training_helpers as helpers
from fuzz_inputs import damaged, json_text, odd_tree, written
from hypothesis import strategies as st

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError, Manifest, json_checksum
from fluxdit_jax.gate.requirement import GateError, encoder_summary, family
from fluxdit_jax.run import metrics, run_directory
from fluxdit_jax.sampling import prompts
from fluxdit_jax.vae import files
from preprocess import PreprocessError
from preprocess.build import options, rows
from preprocess.decoding.images import Rejected
from preprocess.input import captions


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

    def prepared(self) -> contextlib.AbstractContextManager[None]:
        return parsers.scratch_folder()


# --------------------------------------------------------------------------------------------- the examples


def manifest_tree() -> dict:
    with tempfile.TemporaryDirectory() as name:
        helpers.write_dataset(Path(name) / "data")
        tree = json.loads((Path(name) / "data" / MANIFEST).read_text())
    del tree["checksum"]
    return tree


TREE = manifest_tree()
FURTHER = {"pose": {"encoder": TREE["vision"]}}  # a condition that is not among the declared ones
RECORD, SEVERAL = helpers.make_record(0), helpers.make_record(1, captions=4)


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


def vector(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def index_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        info = rows.UnitInfo("u" * 8, "train", "", 0, 0, helpers.LAYOUT | {"pose": None}, None, ())
        rows.Rows(rows.rows_schema(["latent", *info.layout]).empty_table(), [info]).save(Path(name) / "index.parquet")
        return (Path(name) / "index.parquet").read_bytes()


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


# --------------------------------------------------------------------------------------------- the targets

SUMMED = TREE | {"checksum": json_checksum(TREE)}
_TABLE: list[tuple] = [
    # name, what it is, inputs, what reads it, what it may raise, what is tried first
    (
        "record",
        "records",
        damaged([records.encode_record(RECORD), records.encode_record(SEVERAL)]),
        parsers.decode_record,
        DatasetError,
        HOSTILE_RECORDS,
    ),
    (
        "manifest",
        "manifests with a right checksum",
        odd_tree(TREE) | odd_tree(TREE | {"conditions": FURTHER}),
        parsers.parse_manifest,
        DatasetError,
        HOSTILE_MANIFESTS,
    ),
    ("manifest-file", "manifest files", json_text(SUMMED), parsers.load_folder, DatasetError, ()),
    ("caption-json", "captions in JSON", json_text(CAPTION), parsers.from_json, Rejected, HOSTILE_CAPTIONS),
    ("caption-text", "captions in text", damaged(CAPTION_FILES), captions.from_text, Rejected, ()),
    ("jsonl", "metadata.jsonl", damaged([JSONL], JSON_TOKENS), parsers.read_table(".jsonl"), (), ENDLESS),
    ("csv", "metadata.csv", damaged([CSV], CSV_TOKENS), parsers.read_table(".csv"), (), ENDLESS),
    ("image", "pictures", damaged(IMAGES), parsers.read_image, Rejected, (HUGE_IMAGE,)),
    (
        "archive",
        "tar archives",
        damaged(ARCHIVES),
        parsers.read_archive,
        PreprocessError,
        (negative_size(), huge_name()),
    ),
    ("vector", "vision vectors", damaged(VECTORS), parsers.read_vector, Rejected, ()),
    ("index", "index.parquet", damaged([index_bytes()]), parsers.load_index, DatasetError, ()),
    ("options", "build.json", json_text(OPTIONS), parsers.read_options, PreprocessError, ()),
    (
        "metrics",
        "metrics.jsonl",
        damaged([LOG_TEXT], JSON_TOKENS),
        parsers.read_metrics,
        metrics.LogError,
        HOSTILE_LOGS,
    ),
    ("commit", "commit.json of a build", json_text(COMMIT), parsers.read_commit, PreprocessError, HOSTILE_COMMITS),
    ("report", "validation reports", json_text(REPORT), parsers.read_report(GATED), GateError, ()),
    ("prompts", "prompt files", damaged(PROMPTS), parsers.read_prompts, prompts.SampleError, ()),
    ("run", "config.json and dataset.json of a run", json_text(CONFIG), parsers.read_run, run_directory.RunError, ()),
    (
        "run-earlier",
        "config.json of an earlier run",
        json_text(EARLIER),
        parsers.read_run,
        run_directory.RunError,
        tuple(json.dumps(EARLIER | {"flow": EARLIER["flow"] | {"drop_both": x}}).encode() for x in HOSTILE_SHARES),
    ),
    ("vae", "config.json of a VAE", json_text(VAE), parsers.read_vae, files.DecoderError, ()),
    (
        "vae-index",
        "weights' index of a VAE",
        json_text(VAE_INDEX),
        parsers.read_vae_index,
        files.DecoderError,
        HOSTILE_INDEXES,
    ),
]
TARGETS: dict[str, Target] = {name: Target(*rest) for name, *rest in _TABLE}
