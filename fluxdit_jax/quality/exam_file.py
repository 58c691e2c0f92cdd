"""An exam kept in RUN/score: what true and useless pictures answer is looked at once, and not at every start."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.quality.exam import Exam, Question
from fluxdit_jax.quality.eye import Eye
from fluxdit_jax.quality.measures import Reference
from fluxdit_jax.shared.atomic_files import replacing
from fluxdit_jax.vae.decoder import Decoder

log = logging.getLogger(__name__)
_ARRAYS = ("true", "again", "blurred", "noise", "train_again")
_VERSION = 1  # raised when what is kept means something else


def kept_exam(
    folder: Path,
    holdout: RecordSource,
    train: RecordSource,
    eye: Eye,
    decoder: Decoder,
    *,
    vae: str,
    count: int,
    references: int,
    progress: Callable[[int], Any] = lambda n: None,
) -> Exam:
    """`Exam.of`, from a file in `folder` if one of the same pictures, eye and VAE is there; else it is written.

    Args:
      vae: where the decoder was found, in the words of the configuration.

    Raises:
      DatasetError: a record is damaged.
    """
    manifest = holdout.manifest
    parts = {
        "version": _VERSION,
        "splits": [[shard.sha256 for shard in manifest.shards[name]] for name in ("holdout", "train")],
        "eye": [dataclasses.asdict(eye.encoder.identity), eye.own, eye.scale],
        "vae": [manifest.vae.sha256, vae],
        "amounts": [count, references],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = folder / f"exam-{digest[:16]}.npz"
    try:
        return _read(path, holdout)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, DatasetError) as error:
        log.warning("%s cannot be used and is made again: %s", path, error)
    exam = Exam.of(holdout, train, eye, decoder, count=count, references=references, progress=progress)
    try:
        _write(exam, path)
    except OSError as error:
        log.warning("%s cannot be kept: %s", path, error)
    return exam


def _write(exam: Exam, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(exam, name) for name in _ARRAYS}
    arrays |= {f"picture_{k}": picture for k, picture in enumerate(exam.pictures)}
    arrays |= {"reference": exam.reference.vectors, "rows": np.array(exam.rows), "train": np.array(exam.train)}
    arrays |= {"scalars": np.array([exam.reference.bandwidth, exam.reference.within])}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _read(path: Path, holdout: RecordSource) -> Exam:
    with np.load(path, allow_pickle=False) as stored:
        rows = tuple(stored["rows"].tolist())
        bandwidth, within = stored["scalars"].tolist()
        values = {name: stored[name] for name in _ARRAYS}
        if len({len(rows), *(len(values[name]) for name in _ARRAYS[:-1])}) != 1:
            raise ValueError("its parts are not of the same pictures")
        exam = Exam(
            questions=(),
            rows=rows,
            reference=Reference(stored["reference"], bandwidth, within),
            pictures=tuple(stored[f"picture_{k}"] for k in range(len(rows))),
            train=tuple(stored["train"].tolist()),
            **values,
        )
    return dataclasses.replace(exam, questions=tuple(Question.of(holdout[row]) for row in rows))
