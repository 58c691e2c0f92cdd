"""Several captions of one picture, end to end: build, update, kill, verify, inspect, export, subset."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from build_fixtures import FLAGS, assert_as_fresh, contents, index, made, options, read, write_photos
from safetensors.torch import load
from wording import lines_naming, numbers

from fluxdit_jax.dataset import captions as stored
from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.manifest import INDEX, REJECTS, load_manifest
from preprocess.build.build import build
from preprocess.build.items import Items
from preprocess.build.plan import make_plan
from preprocess.encoders import load_text_encoder
from preprocess.input import captions
from preprocess.input.scan import scan
from preprocess.inspect.export import export
from preprocess.inspect.forecast import dry_run, forecast
from preprocess.inspect.report import inspect
from preprocess.inspect.verify import repair, verify
from preprocess.subset.candidates import SubsetOptions
from preprocess.subset.subset import subset

SEVERAL = {
    "set0/p00.png": ["a dog", "ein Hund in „Anführung“\nund zwei Zeilen", "a dog" + " that barks" * 20],
    "set1/p03.png": ["second of two comes here", "it is longer than the first of both"],
    "set1/p11.png": [f"caption number {k}" for k in range(12)],
    "set0/p16.png": ["a dog", "another"],
}
ALL = 20 + sum(map(len, SEVERAL.values()))


def caption(photos: Path, key: str, texts: list[str] | str) -> None:
    """Gives a photograph other captions."""
    (photos / key).with_suffix(".json").write_text(json.dumps({"caption": texts}))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, draw_photo) -> Path:
    """24 photographs, 4 of them with 2 to 12 captions, and their dataset; read only."""
    folder = tmp_path_factory.mktemp("captions")
    write_photos(folder / "photos", 24, draw_photo)
    for key, texts in SEVERAL.items():
        caption(folder / "photos", key, texts)
    build(options(folder / "photos", folder / "data"))
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(photos, dataset) of one's own."""
    for name in ("photos", "data"):
        shutil.copytree(built / name, tmp_path / name)
    return tmp_path / "photos", tmp_path / "data"


def test_records_hold_what_the_encoder_says_of_each_caption(built: Path) -> None:
    found, text = read(built / "data"), load_text_encoder("builtin:hash")
    assert len(found) == 24
    for key, record in found.items():
        expected = SEVERAL.get(key, [record.caption])
        assert list(record.captions) == expected
        for one, tokens in zip(text.encode(expected), record.texts, strict=True):
            np.testing.assert_array_equal(one, tokens)
    rows = {row["key"]: row for row in index(built / "data")}
    for key, record in found.items():
        assert rows[key]["caption"] == record.caption
        assert rows[key]["tokens"] == max(len(tokens) for tokens in record.texts)
    longest = max(len(tokens) for record in found.values() for tokens in record.texts)
    assert load_manifest(built / "data").text_tokens == longest == len(found["set0/p00.png"].texts[2])
    assert verify(built / "data") == []


def test_records_of_one_caption_are_the_same_bytes_beside_others(built: Path, tmp_path: Path, draw_photo) -> None:
    """A shard without a picture of several captions is that of a dataset that has none, and so is features.json."""
    photos = write_photos(tmp_path / "photos", 24, draw_photo)
    build(options(photos, tmp_path / "data"))
    one, several = contents(tmp_path / "data"), contents(built / "data")
    assert one["features.json"] == several["features.json"]
    of_one, of_several = read(tmp_path / "data"), read(built / "data")
    same = {key for key in of_one if records.encode_record(of_one[key]) == records.encode_record(of_several[key])}
    assert same == of_one.keys() - SEVERAL.keys()
    assert b"several" not in one[INDEX] and b"others" not in one[INDEX]


def test_a_list_of_one_caption_is_one_caption(built: Path, tmp_path: Path, draw_photo) -> None:
    photos = write_photos(tmp_path / "photos", 8, draw_photo)
    build(options(photos, tmp_path / "a" / "data", holdout=0.0))
    for path in photos.rglob("*.json"):
        words = json.loads(path.read_text())["caption"]
        path.write_text(json.dumps({"caption": [words, f" {words} "]}))
    build(options(photos, tmp_path / "b" / "data", holdout=0.0))
    assert contents(tmp_path / "a" / "data") == contents(tmp_path / "b" / "data")


def test_more_captions_than_a_record_holds_are_counted(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    assert captions.MAX_CAPTIONS == stored.MAX_CAPTIONS
    photos, data = copied
    caption(photos, "set0/p02.png", [f"caption {k}" for k in range(103)])
    build(options(photos, data))
    assert "more than 100 captions 3" in capsys.readouterr().out
    assert read(data)["set0/p02.png"].captions == tuple(f"caption {k}" for k in range(100))
    assert verify(data) == []


@pytest.mark.parametrize("source", ["rows", "numbered"])
def test_captions_of_other_sources_make_the_same_dataset(
    source: str, built: Path, copied: tuple[Path, Path], tmp_path: Path
) -> None:
    photos, _ = copied
    rows = []
    for key, texts in SEVERAL.items():
        path = photos / key
        path.with_suffix(".json").unlink()
        rows += [json.dumps({"file_name": key, "caption": text}) for text in texts]
        if source == "numbered":
            for number, text in enumerate(texts):
                path.with_name(f"{path.stem}.{number}.txt").write_text(text, encoding="utf-8")
    if source == "rows":
        (photos / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    build(options(photos, tmp_path / "other" / "data"))
    assert contents(tmp_path / "other" / "data") == contents(built / "data")


def test_plain_tfds_reads_the_first_caption(built: Path) -> None:
    code = (
        "import sys, json, ml_dtypes\n"
        "import tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "for split in ('train', 'holdout'):\n"
        "    for one in builder.as_data_source(split):\n"
        "        print(json.dumps([one['key'].decode(), one['caption'].decode(), len(one['text']), sorted(one)]))\n"
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(built / "data")], capture_output=True, text=True, check=True)
    found, rows = read(built / "data"), [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 24
    for key, words, tokens, names in rows:
        assert words == found[key].caption and tokens == len(found[key].text)
        assert not any(name.startswith("other") for name in names)


# ------------------------------------------------------------------------------------------------ updates


@pytest.mark.parametrize(
    "texts",
    [
        ["a dog", "EDITED", SEVERAL["set0/p00.png"][2]],
        [*SEVERAL["set0/p00.png"], "one more"],
        SEVERAL["set0/p00.png"][:2],
        SEVERAL["set0/p00.png"][::-1],
        ["a dog"],
    ],
    ids=["changed", "added", "removed", "another order", "one left"],
)
def test_a_change_of_captions_encodes_the_texts_of_one_record(
    texts: list[str], copied: tuple[Path, Path], tmp_path: Path
) -> None:
    photos, data = copied
    caption(photos, "set0/p00.png", texts)
    counts = build(options(photos, data)).counts
    assert (counts.pictures, *made(counts)) == (0, 0, len(texts), 0)
    assert read(data)["set0/p00.png"].captions == tuple(texts)
    assert_as_fresh(photos, data, tmp_path)


def test_the_first_further_caption_and_the_last(copied: tuple[Path, Path], tmp_path: Path) -> None:
    photos, data = copied
    before = json.loads((photos / "set0/p02.json").read_text())["caption"]
    caption(photos, "set0/p02.png", [before, "a further one"])
    counts = build(options(photos, data)).counts
    assert (counts.pictures, made(counts)[1]) == (0, 2)
    assert_as_fresh(photos, data, tmp_path)
    for key, texts in SEVERAL.items():
        caption(photos, key, texts[0])
    caption(photos, "set0/p02.png", before)
    assert build(options(photos, data)).counts.pictures == 0
    assert b"several" not in (data / INDEX).read_bytes()
    assert_as_fresh(photos, data, tmp_path)


def test_all_texts_of_a_record_are_taken_over(copied: tuple[Path, Path], tmp_path: Path, draw_photo) -> None:
    """A neighbour changes, a picture of several captions is renamed, and all pictures get another resolution."""
    photos, data = copied
    for suffix in (".png", ".json"):
        (photos / "set1/p11.png").with_suffix(suffix).rename((photos / "renamed.png").with_suffix(suffix))
    counts = build(options(photos, data)).counts
    assert (counts.pictures, *made(counts)) == (0, 0, 0, 0)
    assert_as_fresh(photos, data, tmp_path)
    counts = build(options(photos, data, resolution=96), replace=True).counts
    assert (*made(counts)[:2], counts.reused) == (24, 0, ALL)
    assert_as_fresh(photos, data, tmp_path, resolution=96)
    assert not build(options(photos, data, resolution=96)).changed


def test_a_killed_build_goes_on_to_the_same_bytes(built: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed" / "data"
    command = [sys.executable, "-m", "preprocess", "build", "--input", str(built / "photos"), *FLAGS]
    command += ["--output", str(output), "--resolution", "128", "--modulus", "16", "--holdout", "0.2"]
    command += ["--shard-size", "3", "--batch-size", "3", "--workers", "2"]
    kills = 0
    for wanted in (1, 3, 5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(output.glob(".build/*.parquet"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    build(options(built / "photos", output, shard_size=3))
    assert_as_fresh(built / "photos", output, tmp_path, shard_size=3)


def test_real_text_encoder(built: Path, tmp_path: Path, tiny_t5_dir: Path) -> None:
    more = {"text_encoder": str(tiny_t5_dir), "device": "cpu", "holdout": 0.0}
    build(options(built / "photos", tmp_path / "data", **more))
    text = load_text_encoder(str(tiny_t5_dir), "cpu")
    for record in read(tmp_path / "data").values():
        for one, tokens in zip(record.captions, record.texts, strict=True):
            expected = text.encode([one])[0]
            assert tokens.shape == expected.shape
            np.testing.assert_allclose(tokens.astype("f4"), expected.astype("f4"), rtol=2**-5, atol=2e-2)
    assert verify(tmp_path / "data") == []


def test_a_further_caption_that_becomes_nan_rejects_its_picture(built: Path, tmp_path: Path, tiny_t5_dir: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = tmp_path / "t5"
    shutil.copytree(tiny_t5_dir, model)
    tensors = load_file(model / "model.safetensors")
    tensors["shared.weight"][2] = np.nan  # of the token <unk>: only the quotation marks are not in the vocabulary
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    more = {"text_encoder": str(model), "device": "cpu", "max_rejects": 0.5, "holdout": 0.0}
    build(options(built / "photos", tmp_path / "data", **more))
    (line,) = map(json.loads, (tmp_path / "data" / REJECTS).read_text().splitlines())
    assert (line["key"], line["reason"]) == ("set0/p00.png", "the text encoder returned NaN")
    assert read(tmp_path / "data").keys() == read(built / "data").keys() - {"set0/p00.png"}
    assert verify(tmp_path / "data") == []


# ------------------------------------------------------------------------------------------------ verify


@pytest.mark.parametrize("part", ["other_captions", "other_text"])
def test_damage_in_a_further_caption_is_found_and_one_record_made_again(
    part: str, built: Path, copied: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    _, data = copied
    record, row = read(data)["set1/p11.png"], next(r for r in index(data) if r["key"] == "set1/p11.png")
    shard = data / row["shard"]
    content = bytearray(shard.read_bytes())
    needle = b"caption number 7" if part == "other_captions" else record.texts[9].tobytes()
    content[content.index(needle)] ^= 1
    shard.write_bytes(content)
    findings = verify(data)
    assert [f.row for f in findings if f.row >= 0] == [row["row"]]
    capsys.readouterr()
    repair(data, {data: findings})
    assert "encoded 1 latents, 12 captions, 1 vision vectors" in capsys.readouterr().out
    assert verify(data) == [] and contents(data) == contents(built / "data")


def test_a_lost_index_is_salvaged_with_its_counts(
    built: Path, copied: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    _, data = copied
    (data / INDEX).unlink()
    repair(data, {data: verify(data)})
    assert "encoded 0 latents, 0 captions, 0 vision vectors" in capsys.readouterr().out
    assert verify(data) == [] and contents(data) == contents(built / "data")


def test_a_record_whose_longest_caption_is_not_that_of_the_index_is_named(
    built: Path, copied: tuple[Path, Path]
) -> None:
    """The index says what a record with one text less would be: both are sound by themselves."""
    from training_helpers import write_shard

    from preprocess.build.units import read_rows

    _, data = copied
    row = next(r for r in index(data) if r["key"] == "set0/p00.png")
    shard = data / row["shard"]
    count = sum(r["shard"] == row["shard"] for r in index(data))
    written = [content for _, content in read_rows(shard, list(range(count)))]
    record = records.decode_record(written[row["row"]], {"text": 1024, "vision": None})
    others = {"text": record.texts[1:2]}
    shorter = dataclasses.replace(record, other_captions=record.other_captions[:1], other_conditions=others)
    written[row["row"]] = records.encode_record(shorter)
    write_shard(shard, written)
    assert any(f.row == row["row"] and "tokens" in f.what for f in verify(data))


# ------------------------------------------------------------------------------------------------ what is told


def test_build_dry_run_and_inspect_count_them(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    build(options(built / "photos", built / "data"))
    told = capsys.readouterr().out
    assert len(re.findall(numbers(4, ALL), told)) == 2, "of the input, of the dataset"
    inspect(built / "data", tmp_path / "pictures", cells=2)
    assert re.search(numbers(4, ALL), capsys.readouterr().out)
    dry_run(options(built / "photos", tmp_path / "dry"))
    told = capsys.readouterr().out
    assert re.search(numbers(4, ALL), told) and lines_naming(told, f"{ALL / 24:.2f} captions")


def test_a_set_of_one_caption_each_is_not_told_of_several(
    tmp_path: Path, draw_photo, capsys: pytest.CaptureFixture
) -> None:
    photos = write_photos(tmp_path / "photos", 6, draw_photo)
    build(options(photos, tmp_path / "data", holdout=0.0))
    inspect(tmp_path / "data", tmp_path / "pictures", cells=2)
    dry_run(options(photos, tmp_path / "dry", holdout=0.0))
    told = capsys.readouterr().out
    assert "several" not in told and "1.00 captions" not in told


def test_the_forecast_counts_all_captions(built: Path) -> None:
    chosen = options(built / "photos", built / "x").checked()
    plan = make_plan(scan(built / "photos"), chosen)
    one_each = (dataclasses.replace(item, captions=item.captions[:1]) for item in plan.items)
    one = dataclasses.replace(plan, items=Items(chosen, one_each))
    many, few = forecast(plan), forecast(one)
    assert (many.captions, few.captions) == (ALL / 24, 1)
    more = [c for item in plan.items for c in item.captions[1:]]
    tokens = sum(min(chosen.max_tokens, len(c) / 4.2 + 1) for c in more)
    grown = (2 * 1024 * tokens + sum(len(c.encode()) for c in more)) / 24
    assert many.record_bytes - few.record_bytes == pytest.approx(grown)


# ------------------------------------------------------------------------------------------------ export, subset


def test_export_writes_all_captions(built: Path, tmp_path: Path) -> None:
    expected, seen = read(built / "data"), 0
    for path in export(built / "data", tmp_path / "tars"):
        with tarfile.open(path) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive}
        for name in (name for name in members if name.endswith(".json")):
            about = json.loads(members[name])
            tensors = load(members[name.replace(".json", ".safetensors")])
            record = expected[about["key"]]
            seen += 1
            if len(record.captions) == 1:
                assert "other_captions" not in about and sorted(tensors) == ["latent", "text", "vision"]
                continue
            assert (about["caption"], *about["other_captions"]) == record.captions
            bits = tensors["other_text"].view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            ends = np.cumsum(tensors["other_lengths"].numpy())
            for one, tokens in zip(np.split(bits, ends[:-1]), record.texts[1:], strict=True):
                np.testing.assert_array_equal(one, tokens)
    assert seen == 24


@pytest.mark.parametrize("source", ["photos", "data"])
def test_subset_takes_the_first_caption(source: str, built: Path, tmp_path: Path, capsys) -> None:  # noqa: ANN001
    """Pictures of a photograph have the caption of one view each."""
    given = (str(built / source), str(tmp_path / "subset"))
    wanted = SubsetOptions(*given, count=24, lights=1, resolution=128, allow_fewer=True)
    result = subset(wanted)
    captions = {one["key"]: one["captions"]["original"] for one in result.about["chosen"]}
    several = SEVERAL.keys() & captions.keys()
    assert len(several) >= 3 and result.about["several_captions"] == len(several)
    assert lines_naming(capsys.readouterr().out, len(several), "several captions")
    for key in several:
        assert captions[key] == f"{SEVERAL[key][0]}, looking left"
    build(options(result.output, tmp_path / "gate", holdout=0.0, min_side=64))
    found = read(tmp_path / "gate")
    assert len(found) == 2 * len(captions) and {len(record.captions) for record in found.values()} == {1}
    assert not subset(wanted).changed


def test_the_command_line_tells_of_them(built: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "preprocess", "build", "--input", str(built / "photos"), "--output"]
    command += [str(tmp_path / "data"), "--resolution", "128", "--modulus", "16", "--holdout", "0", *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert re.search(numbers(4, ALL), done.stdout)
