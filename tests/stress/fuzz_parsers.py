"""What `fuzz.py` feeds: each parser of ours, with what must hold of whatever it accepts."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import training_helpers as helpers
from fuzz_inputs import written

from fluxdit_jax.dataset import fields, records
from fluxdit_jax.dataset.manifest import MANIFEST, Manifest, json_checksum, load_manifest
from fluxdit_jax.gate.requirement import require_report
from fluxdit_jax.run import metrics, run_directory
from fluxdit_jax.sampling import prompts
from fluxdit_jax.vae import files
from preprocess.build import rows
from preprocess.decoding import images
from preprocess.decoding.images import Rejected
from preprocess.input import captions, precomputed, scan, tables

SCRATCH = Path(tempfile.gettempdir()) / "unset"  # a folder of its own for each target, while it is fed


@contextlib.contextmanager
def scratch_folder() -> Iterator[None]:
    """Sets `SCRATCH` to a new folder, which is removed afterwards."""
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


def decode_record(data: bytes) -> None:
    record = records.decode_record(data, helpers.LAYOUT)
    held = record.latent.nbytes + sum(text.nbytes for text in record.texts) + record.vision.nbytes
    assert held <= len(data), "arrays larger than their bytes"
    records.check_record(record)
    again = records.decode_record(records.encode_record(record), helpers.LAYOUT)
    assert again.key == record.key and np.array_equal(again.latent, record.latent)
    assert again.captions == record.captions and all(map(np.array_equal, again.texts, record.texts))


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


def read_metrics(content: bytes) -> None:
    for entry in metrics.read_metrics(scratch("metrics.jsonl", content)):
        assert isinstance(entry["step"], int)


def read_report(manifest: Manifest) -> Callable[[bytes], None]:
    def call(content: bytes) -> None:
        found = require_report(scratch("report.json", content), helpers.tiny_model(), manifest)
        assert found["passed"] is True

    return call


def read_prompts(content: bytes) -> None:
    for prompt in prompts.read_prompts(scratch("prompts.txt", content)):
        assert prompt.strip() and "\n" not in prompt and prompt.encode()


def read_run(content: bytes) -> None:
    scratch("run/dataset.json", content)
    with contextlib.suppress(run_directory.RunError):
        run_directory.load_dataset(SCRATCH / "run")
    scratch("run/config.json", content)
    run_directory.load_config(SCRATCH / "run").to_dict()


def read_vae(content: bytes) -> None:
    files.read_config(scratch("vae/config.json", content).parent)


def read_vae_index(content: bytes) -> None:
    folder = scratch("vae/" + files.INDEX, content).parent
    for name in ("a.safetensors", "b.safetensors"):
        scratch("vae/" + name, b"")
    for file in files.weight_files(folder):
        assert file.parent == folder, "weights from elsewhere"


def read_options(content: bytes) -> None:
    from preprocess.build.publish import load_options

    load_options(scratch("data/build.json", content).parent)


def read_commit(content: bytes) -> None:
    from preprocess.build.publish import _read_commit

    commit = _read_commit(scratch("commit.json", content))
    for name in (*commit["keep"], *commit["keep"].values(), *commit["place"], *commit["place"].values()):
        assert (SCRATCH / name).resolve().parent == SCRATCH, "a file that would be moved elsewhere"


def read_vector(data: bytes) -> None:
    vision = precomputed.parse(data, fields.VISION, precomputed.VISION_WIDTH)
    assert vision.shape == (1024,) and fields.VISION.fault(vision) is None
    pose = precomputed.parse(data, fields.field_named("pose"))  # of any width
    assert np.array_equal(pose, vision)


def from_json(data: bytes) -> None:
    captions.from_json(data, captions.fields())


def load_index(data: bytes) -> None:
    rows.Rows.load(scratch("index.parquet", data))
