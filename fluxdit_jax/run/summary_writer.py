"""TensorBoard's event files, written with TensorBoard's own protocol buffers and record writer.

Not with tensorboardX: it imports PyTorch where that is installed, and keeps events for up to two minutes, which a
killed run loses.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import plugin_data_pb2 as hparams_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger(__name__)


class SummaryWriter:
    """One event file of a folder. What is written is in the file when the call returns.

    A disk that is full, or gone, is logged and costs TensorBoard's curves only: `metrics.jsonl` is the record.

    Attributes:
      failures: events that could not be written.
    """

    def __init__(self, folder: Path, first: int | None = None, suffix: str = ""):
        """
        Args:
          first: what files before this one show of this step and later ones is hidden.
          suffix: of the file's name.
        """
        self._folder, self._suffix, self._first = folder, suffix, first
        self._file: Any = None
        self._described: set[str] = set()  # tags whose description is written
        self._closed = False
        self.failures = 0

    def __enter__(self) -> SummaryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalars(self, step: int, values: dict[tuple[str, str], float]) -> None:
        """Values by (tag, description); the first event of a tag carries its description."""
        shown = []
        for (tag, description), value in values.items():
            new = tag not in self._described
            metadata = SummaryMetadata(summary_description=description) if new else None
            shown.append(Summary.Value(tag=tag, simple_value=value, metadata=metadata))
            self._described.add(tag)
        self._summary(step, shown)

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown, on the page of texts."""
        self._summary(step, [_strings(f"{name}/text_summary", "text", [text.encode()])])

    def image(self, step: int, name: str, image_HxWx3: np.ndarray) -> None:
        """A picture, uint8."""
        height, width, _ = image_HxWx3.shape
        png = io.BytesIO()
        Image.fromarray(image_HxWx3).save(png, "png")
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.getvalue())
        self._summary(step, [Summary.Value(tag=name, image=image)])

    def layout(self, charts: dict[str, dict[str, list[str]]]) -> None:
        """The page of custom scalars: {category: {title of a chart: regular expressions of names}}."""
        layout = layout_pb2.Layout(
            category=[
                layout_pb2.Category(
                    title=category,
                    chart=[
                        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
                        for title, tags in of_category.items()
                    ],
                )
                for category, of_category in charts.items()
            ]
        )
        value = _strings("custom_scalars__config__", "custom_scalars", [layout.SerializeToString()])
        value.tensor.ClearField("tensor_shape")  # a scalar
        self._summary(0, [value])

    def hyperparameters(self, values: dict[str, Any], metrics: list[str]) -> None:
        """A row of the HParams page, beside the last values of the named scalars. None is left out."""
        start, columns = hparams_pb2.SessionStartInfo(), []
        for name, value in values.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value, kind = value, api_pb2.DATA_TYPE_BOOL
            elif isinstance(value, (int, float)):
                start.hparams[name].number_value, kind = value, api_pb2.DATA_TYPE_FLOAT64
            elif value is not None:
                start.hparams[name].string_value, kind = str(value), api_pb2.DATA_TYPE_STRING
            else:
                continue
            columns.append(api_pb2.HParamInfo(name=name, type=kind))
        shown = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
        experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=shown)
        data = hparams_pb2.HParamsPluginData
        for tag, content in (
            (hparams_metadata.EXPERIMENT_TAG, data(experiment=experiment)),
            (hparams_metadata.SESSION_START_INFO_TAG, data(session_start_info=start)),
        ):
            metadata = SummaryMetadata(
                plugin_data=SummaryMetadata.PluginData(
                    plugin_name=hparams_metadata.PLUGIN_NAME, content=content.SerializeToString()
                )
            )
            self._summary(0, [Summary.Value(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)])

    def close(self) -> None:
        """Nothing can be written any more. May be called twice."""
        if self.failures and not self._closed:
            log.error("%d events are missing in %s: it could not be written", self.failures, self._folder)
        self._closed = True
        self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written was counted
                self._file.close()
            self._file = None

    def _summary(self, step: int, values: list[Summary.Value]) -> None:
        if self._closed:
            raise ValueError(f"the TensorBoard writer of {self._folder} is closed")
        try:
            if self._file is None:
                self._open()
            self._write(Event(step=step, summary=Summary(value=values)))
        except OSError as error:
            if not self.failures:
                log.error(
                    "cannot write to %s: %s. The run goes on; metrics.jsonl holds the same numbers",
                    self._folder,
                    error.strerror or error,
                )
            self.failures += 1
            self._end_file()  # half a record hides what follows it: go on in a file of its own

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names
        second, nanosecond = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{second}.{nanosecond:09d}.{socket.gethostname()}.{os.getpid()}{self._suffix}"
        self._file = RecordWriter((self._folder / name).open("xb"))
        try:
            self._write(Event(file_version="brain.Event:2", step=self._first or 0))
            if self._first is not None:
                self._write(Event(step=self._first, session_log=SessionLog(status=SessionLog.START)))
        except OSError:  # on a full disk each event tries a new file: they must not pile up
            (self._folder / name).unlink(missing_ok=True)
            raise
        self._first = None

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
        self._file.flush()


def _strings(name: str, plugin: str, values: list[bytes]) -> Summary.Value:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(values))])
    tensor = TensorProto(dtype=DT_STRING, string_val=values, tensor_shape=shape)
    return Summary.Value(tag=name, metadata=metadata, tensor=tensor)
