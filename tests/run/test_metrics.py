"""metrics.jsonl and TensorBoard: the same numbers, each step once, whatever was killed in between."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import resource
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wording import naming, numbers

from fluxdit_jax.run.metrics import MetricsWriter, pack, read_metrics, unpack
from fluxdit_jax.run.scalars import LAYOUT, SCALARS, on_board
from fluxdit_jax.run.summary_writer import SummaryWriter

pytest_plugins = ("training_fixtures",)


def board(workdir):
    accumulator = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


# ------------------------------------------------------------------------------------------------ packing


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.lists(st.integers(0, 3), max_size=2),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=50, deadline=None)
def test_unpack_is_the_inverse_of_pack(shapes):
    rng = np.random.default_rng(0)
    tree = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    tree["nested"] = {"flag": jnp.asarray(True), "count": jnp.asarray(7, jnp.int32)}
    packed = pack(tree)
    assert packed.dtype == jnp.float32 and packed.ndim == 1
    found = unpack(np.asarray(packed), jax.eval_shape(lambda: tree))
    assert found["nested"] == {"flag": 1.0, "count": 7.0}
    for name in shapes:
        np.testing.assert_array_equal(found[name], tree[name])


# ------------------------------------------------------------------------------------------------ writing


def test_json_and_tensorboard_agree(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": 1 / step, "by/group": step * 10.0})
    writer.text(2, "health/spiked", "the gradient norm rose")
    writer.image(3, "samples", np.full((4, 6, 3), 200, np.uint8))
    writer.close()
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry for entry in entries if "loss" in entry] == [
        {"step": step, "loss": 1 / step, "by/group": step * 10.0} for step in (1, 2, 3)
    ]
    assert {"step": 2, "health/spiked": "the gradient norm rose"} in entries
    events = board(tmp_path)
    for name in ("loss", "by/group"):
        shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars(on_board(name)[0])]
        assert shown == [(entry["step"], entry[name]) for entry in entries if name in entry]
    assert len(events.Images("samples")) == 1
    assert "health/spiked/text_summary" in events.Tags()["tensors"]


def test_the_page_of_custom_scalars_shows_what_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.close()
    assert "custom_scalars__config__" in board(tmp_path).Tags()["tensors"]
    patterns = [tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags]
    tags = {on_board(name)[0] for name in (*SCALARS, "loss_by_time/0.125", "gradient_norm_by_group/x")}
    tags |= {on_board("short_ema/heldout_loss")[0]}
    for pattern in patterns:
        assert any(re.search(pattern, tag) for tag in tags), pattern


def test_the_configuration_is_a_row_of_the_hparams_page(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.hyperparameters({"optim.lr": 1e-4, "optim.name": "muon", "gate.required": True, "workdir": None})
    writer.close()
    events = board(tmp_path)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["optim.lr"].number_value == 1e-4
    assert found["optim.name"].string_value == "muon"
    assert found["gate.required"].bool_value
    table = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| optim.name | muon |" in table and "| workdir | None |" in table


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_stays_json_where_a_value_is_not_finite(tmp_path, value):
    writer = MetricsWriter(tmp_path, 0)
    writer.scalars(1, {"loss": value, "other": 1.0})
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": None,
        "other": 1.0,
    }


def test_each_line_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.scalars(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1  # a killed process loses nothing
    writer.close()


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, 0, enabled=False)
    writer.scalars(1, {"loss": 1.0})
    writer.text(1, "a", "b")
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_fine(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.text(1, "a", "b")
    writer.close()
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": "b"}]


# ------------------------------------------------------------------------------------------------ resuming


def write_run(workdir, steps, at):
    writer = MetricsWriter(workdir, at)
    for step in steps:
        writer.scalars(step, {"loss": float(step)})
    writer.close()


def test_what_was_logged_beyond_the_checkpoint_is_dropped_in_both(tmp_path):
    write_run(tmp_path, range(1, 8), at=0)
    time.sleep(1.1)  # TensorBoard's files are named by the second
    write_run(tmp_path, range(5, 10), at=4)  # killed after step 7, resumed from the checkpoint at 4
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    assert [event.step for event in board(tmp_path).Scalars("1_learning/loss")] == list(range(1, 10))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_killed_before_its_first_checkpoint_starts_a_clean_log(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.text(0, "config", "{}")
    writer.scalars(1, {"loss": 1.0})
    writer.close()
    time.sleep(1.1)
    writer = MetricsWriter(tmp_path, 0)
    writer.text(0, "config", "{}")
    writer.scalars(1, {"loss": 1.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "config": "{}"}, {"step": 1, "loss": 1.0}]
    assert [event.step for event in board(tmp_path).Scalars("1_learning/loss")] == [1]


def test_a_half_written_last_line_is_dropped(tmp_path):
    write_run(tmp_path, range(1, 4), at=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write_run(tmp_path, [4], at=3)
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_is_told_by_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl\b.*\b2\b.*JSON"):
        read_metrics(path)


# ------------------------------------------------------------------------------------------------ TensorBoard's files


def test_what_is_written_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.scalars(1, {"loss": 0.5})
    assert [event.value for event in board(tmp_path).Scalars("1_learning/loss")] == [0.5]  # the writer is not closed
    writer.close()


def test_a_picture_comes_back_with_its_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        writer.image(4, "samples", image)
    (event,) = board(tmp_path).Images("samples")
    assert (event.step, event.height, event.width) == (4, 5, 7)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), image)


def test_a_full_disk_costs_the_board_a_record_and_not_the_run(tmp_path, package_log):
    writer = SummaryWriter(tmp_path / "tensorboard")
    writer.scalars(1, {("loss", ""): 1.0})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (next((tmp_path / "tensorboard").iterdir()).stat().st_size + 9, limit[1]))
    try:
        writer.scalars(2, {("loss", ""): 2.0})
        writer.scalars(3, {("loss", ""): 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    writer.scalars(4, {("loss", ""): 4.0})
    writer.close()
    assert [event.step for event in board(tmp_path).Scalars("loss")] == [1, 3, 4]  # the limit is per file
    told = [line for line in package_log if line.startswith("ERROR") and str(tmp_path / "tensorboard") in line]
    assert ["metrics.jsonl" in line for line in told] == [True, False]  # that it goes on; at the end, what is missing


def test_a_damaged_line_is_set_aside_and_the_run_goes_on(tmp_path, package_log):
    path = tmp_path / "metrics.jsonl"
    torn = b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\x00\xff\n{"step": 3, "loss": 1.0}\n'
    path.write_bytes(torn)
    with contextlib.closing(MetricsWriter(tmp_path, 3)) as writer:
        writer.scalars(4, {"loss": 0.5})
    assert [entry["step"] for entry in read_metrics(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.damaged-4.jsonl").read_bytes() == torn
    (message,) = [message for message in package_log if "damaged" in message]
    assert re.search(naming("line 2", "metrics.damaged-4.jsonl"), message) and re.search(numbers(2, 1), message)
