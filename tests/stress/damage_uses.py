"""The programs that read a dataset or a run directory, as functions that give something to compare.

`resume` and `read_for_training` are what `train` does with the files before its first step; the others are the
whole programs. Each gives the same result whenever it is called on undamaged files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from build_fixtures import contents
from damage_scene import Scene, draw_one
from PIL import Image
from safetensors.numpy import load_file

from fluxdit_jax import export, sample, validate
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.device.sharding import make_mesh
from fluxdit_jax.gate.requirement import require_report
from fluxdit_jax.loader import reader
from fluxdit_jax.objective import patch_statistics
from fluxdit_jax.program import Program
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.run.differences import check_resume
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.metrics import MetricsWriter
from fluxdit_jax.run.run_directory import RunLock
from fluxdit_jax.settings import resolve
from fluxdit_jax.train import USER_ERRORS, train
from preprocess.__main__ import main as preprocess_main
from preprocess.build.rows import Rows

BUILD = [
    "--resolution",
    "64",
    "--modulus",
    "16",
    "--holdout",
    "0.2",
    "--shard-size",
    "40",
    "--batch-size",
    "3",
]
BUILD += ["--vae", "builtin:dct", "--text-encoder", "builtin:hash", "--vision-encoder", "builtin:tone"]


class Refused(Exception):
    """A program ended with an error; the message is what it printed."""


@dataclasses.dataclass(frozen=True)
class Use:
    """A program and what it reads.

    Attributes:
      name: in the table.
      of: the part of the scene that it is given a damaged copy of, "data" or "run".
      call: (scene, the copy) -> the result. Raises `Refused` or one of `USER_ERRORS`.
      may_be: whether a result that is not the expected one is right all the same, if the log named the damage:
        (expected, result, the copy).
      errors: that the program turns into one line; anything else is a traceback.
    """

    name: str
    of: str
    call: Callable[[Scene, Path], Any]
    may_be: Callable[[Any, Any, Path], bool] = lambda expected, result, folder: False
    errors: tuple[type[Exception], ...] = USER_ERRORS


# ------------------------------------------------------------------------------------------------ training


def _read(scene: Scene, folder: Path, on_corrupt: str) -> dict[str, Any]:
    """Digest of every sample of an epoch by position, and of the held-out records."""
    config = scene.config(folder)
    manifest = load_manifest(folder)
    settings = resolve(config, manifest)
    source = reader.RecordSource(folder, manifest, "train", on_corrupt)
    holdout = reader.RecordSource(folder, manifest, "holdout", on_corrupt)
    batches = reader.batches(source, seed=0, start=0, batch_size=8, layout=settings.batch, threads=1, prefetch=2)
    rows, replaced = [], []
    for batch in itertools.islice(batches, -(-len(source) // 8)):
        names = sorted(name for name in batch if name not in ("index", "replaced"))
        rows += [_digest([batch[name][row] for name in names]) for row in range(8)]
        replaced += batch["replaced"].tolist()
    held = {
        number: _digest([r.latent, *r.conditions.values()]) for number, r in holdout.iter_valid(range(len(holdout)))
    }
    return {
        "rows": rows,
        "replaced": replaced,
        "holdout": held,
        "statistics": (manifest.latent_mean, manifest.latent_std),
        "identity": [shard.sha256 for shard in manifest.shards["train"]],
    }


def _digest(arrays: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _passed_over(expected: dict, result: dict, folder: Path) -> bool:
    """Whether the results differ only where another record was said to stand in or was left out."""
    same = all(
        replaced or old == new for old, new, replaced in zip(expected["rows"], result["rows"], result["replaced"])
    )
    known = set(result["rows"]) <= set(expected["rows"])
    held = result["holdout"].items() <= expected["holdout"].items()
    rest = all(result[name] == expected[name] for name in ("statistics", "identity"))
    return same and known and held and rest


def resume(scene: Scene, folder: Path) -> dict[str, Any]:
    """The state that a run goes on from, and its log up to there."""
    config = scene.config(run=folder)
    manifest = load_manifest(scene.data)
    lock = RunLock(folder)
    try:
        check_resume(folder, config, manifest)
        with Checkpoints(folder, 2) as checkpoints:
            restored = checkpoints.restore(_abstract(scene))
        if restored is None:
            return {"state": None}
        state, meta = restored
        writer = MetricsWriter(folder, int(state.step))
        writer.close()
    finally:
        lock.release()
    return {"step": int(state.step), "state": tree_digest(state, meta)}


_KNOWN: dict[Path, Any] = {}


def _abstract(scene: Scene) -> Any:
    if scene.root not in _KNOWN:
        config, manifest = scene.config(), load_manifest(scene.data)
        settings = resolve(config, manifest)
        statistics = patch_statistics(manifest.latent_mean, manifest.latent_std, 2)
        _KNOWN[scene.root] = Program(settings, make_mesh(1, 1, 4), statistics).abstract
    return _KNOWN[scene.root]


def _one_step_before(expected: dict, result: dict, folder: Path) -> bool:
    """The checkpoint before: its digest is checked by what restores it."""
    return result.get("step") == expected["step"] - 1


def train_on(scene: Scene, folder: Path) -> dict[str, Any]:
    """A whole resumed run, two steps further: its EMA."""
    config = scene.config(run=folder)
    config.train.steps += 2
    status = train(config)
    if status:
        raise Refused(f"status {status}")
    return {"ema": tree_digest(restore_ema(folder)[1])}


# ------------------------------------------------------------------------------------------------ the run's readers


def export_run(scene: Scene, folder: Path) -> dict[str, str]:
    out = scene.root / "out"
    shutil.rmtree(out, ignore_errors=True)
    weights = load_file(export.export(folder, out))  # its header's order is safetensors' and changes
    texts = {name: (out / name).read_text() for name in ("README.md", "config.json")}
    return texts | {"weights": _digest([weights[name] for name in sorted(weights)])}


def _not_validated(expected: dict[str, str], result: dict[str, str], folder: Path) -> bool:
    """Without a report the card says so, and also where a report's own damage makes it one of other weights."""
    verdicts = re.compile(r"\| validation \| (passed|failed|not validated.*) \|")
    if "| validation | not validated" not in result["README.md"]:
        return False
    return {name: verdicts.sub("", text) for name, text in expected.items()} == {
        name: verdicts.sub("", text) for name, text in result.items()
    }


def sample_run(scene: Scene, folder: Path) -> str:
    out = scene.root / "out.png"
    arguments = ["--prompt", "fox number 3 looking left", "--steps", "1", "--out", str(out)]
    sample.sample(sample.parse_arguments(["--workdir", str(folder), *arguments]))
    return _digest([np.asarray(Image.open(out))])


def validate_run(scene: Scene, folder: Path) -> dict:
    """The verdict and its numbers."""
    options = ["--limit", "6", "--steps", "1", "--method", "euler", "--pairs", "4", "--edits", "2"]
    options += ["--unrelated", "fox=>cat"]
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        status = validate.command(["--workdir", str(folder), "--data", str(scene.data), *options])
    if status == 2:
        raise Refused(printed.getvalue())
    report = json.loads((folder / "validation" / "report.json").read_text())
    return {"passed": report["passed"], "metrics": {n: m["numbers"] for n, m in report["metrics"].items()}}


def gate(scene: Scene, folder: Path) -> bool:
    manifest = load_manifest(scene.data)
    return require_report(folder, resolve(scene.config(), manifest).model, manifest)["passed"]


# ------------------------------------------------------------------------------------------------ preprocess


def _preprocess(*arguments: str) -> str:
    """What `python -m preprocess ...` printed; raises `Refused` with it if the status is not 0."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        status = preprocess_main(list(arguments))
    if status:
        raise Refused(printed.getvalue())
    return printed.getvalue()


def verify(scene: Scene, folder: Path) -> dict[str, Any]:
    """It has nothing to say: then everything that it stands for must be what it was."""
    _preprocess("verify", str(folder))
    rows = Rows.load(folder / "index.parquet")
    files = contents(folder)
    del files["index.parquet"], files["manifest.json"]
    return {
        "manifest": load_manifest(folder),
        "index": rows.table,
        "units": [json.dumps(u.to_dict()) for u in rows.units],
        "files": files,
    }


def export_data(scene: Scene, folder: Path) -> dict[str, str]:
    out = scene.root / "tars"
    shutil.rmtree(out, ignore_errors=True)
    _preprocess("export", str(folder), "--output", str(out))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def inspect(scene: Scene, folder: Path) -> str:
    return _preprocess(
        "inspect", str(folder), "--output", str(scene.root / "inspect"), "--cells", "2", "--device", "cpu"
    )


def repair(scene: Scene, folder: Path) -> dict[str, bytes]:
    _preprocess("verify", str(folder), "--repair")
    return contents(folder)


def build_again(scene: Scene, folder: Path) -> dict[str, bytes]:
    """What it does not read may stay as it is, as long as `verify` names it."""
    _preprocess("build", "--input", str(scene.root / "photos"), "--output", str(folder), *BUILD)
    return contents(folder)


def build_more(scene: Scene, folder: Path) -> dict[str, bytes]:
    """With one more picture, so that tensors are taken over from the shards that there are."""
    more = scene.root / "more"
    if not more.exists():
        shutil.copytree(scene.root / "photos", more)
        draw_one(more, 999)
    _preprocess("build", "--input", str(more), "--output", str(folder), *BUILD)
    return contents(folder)


def _verify_names_the_rest(expected: dict[str, bytes], result: dict[str, bytes], folder: Path) -> bool:
    """Whether `verify` names every file that is not what it should be."""
    wrong = {name for name in expected.keys() | result.keys() if expected.get(name) != result.get(name)}
    try:
        _preprocess("verify", str(folder))
    except Refused as told:
        return all(name in str(told) for name in wrong)
    return False


USES = {
    use.name: use
    for use in (
        Use("train, stop", "data", lambda scene, folder: _read(scene, folder, "stop")),
        Use("train, skip", "data", lambda scene, folder: _read(scene, folder, "skip"), _passed_over),
        Use("preprocess verify", "data", verify),
        Use("preprocess export", "data", export_data),
        Use("preprocess inspect", "data", inspect, lambda expected, result, folder: "build.json" in result),
        Use("verify --repair", "data", repair),
        Use("build again", "data", build_again, _verify_names_the_rest),
        Use("build more", "data", build_more, _verify_names_the_rest),
        Use("resume", "run", resume, _one_step_before),
        Use("train on", "run", train_on),
        Use("export", "run", export_run, _not_validated, errors=export.USER_ERRORS),
        Use("sample", "run", sample_run, errors=sample.USER_ERRORS),
        Use("validate", "run", validate_run),
        Use("gate", "run", gate),
    )
}
