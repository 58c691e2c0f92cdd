"""A gate that was passed on drawn portraits: what the report knows of them, and what a real run is told."""

import dataclasses

from build_fixtures import options
from PIL import Image
from test_gate_requirement import report_on
from training_helpers import tiny_config
from wording import lines_naming

from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.settings import resolve
from fluxdit_jax.shared.json_files import write_json
from fluxdit_jax.train import train
from fluxdit_jax.validate import count_drawn
from preprocess.build.build import build
from preprocess.demo import draw_dataset
from preprocess.demo.cast import COMPOSITIONS

pytest_plugins = ("training_fixtures",)


def test_the_report_knows_the_drawn_portraits(tmp_path):
    drawn = draw_dataset(tmp_path / "photos", progress=False, compositions=COMPOSITIONS[:1])
    Image.new("RGB", (96, 96), "red").save(tmp_path / "photos" / "own.png")
    (tmp_path / "photos" / "own.txt").write_text("a red wall")
    build(options(tmp_path / "photos", tmp_path / "data", resolution=64, holdout=0.0))
    source = RecordSource(tmp_path / "data", load_manifest(tmp_path / "data"), "train", "stop")
    records = [record for _, record in source.iter_valid(range(len(source)))]
    assert (len(records), count_drawn(records)) == (drawn + 1, drawn)


def test_production_after_a_gate_of_drawings_is_warned(tiny_dataset, tmp_path, quick_compile):
    """By the start of a real run."""
    config, of = tiny_config(tiny_dataset, tmp_path / "run"), load_manifest(tiny_dataset)
    config.gate.required, config.train.steps = True, 1
    there = dataclasses.replace(of, shards={"train": of.shards["holdout"]})
    write_json(report_on(100, 100, resolve(config, of).model, there), tmp_path / "report.json")
    config.gate.report = str(tmp_path / "report.json")
    assert train(config) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert lines_naming(log, " W ", "config.gate.report", "preprocess demo", "preprocess subset")
