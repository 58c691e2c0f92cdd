"""What training asks of a validation report before it starts: that a run of the same kind passed."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax

from fluxdit_jax.dataset.fields import LATENT, PATCHES
from fluxdit_jax.dataset.manifest import EncoderIdentity, Manifest
from fluxdit_jax.model import dit
from fluxdit_jax.model.dit import ModelConfig
from fluxdit_jax.run.averages import ema_steps
from fluxdit_jax.run.checkpoint import EMA
from fluxdit_jax.run.weights import places, weights_digest
from fluxdit_jax.shared.sanitize import shown

log = logging.getLogger(__name__)
WORDS = {"parameters": "the network's structure", "patch": "model.patch", "positions": "model.positions"}
BEFORE = {"positions": "index"}  # of a family in reports of earlier versions, which do not say it
SCALING = ("factor", "scale", "shift")  # what latents of the same VAE's weights mean depends on them


class GateError(Exception):
    """Training may not start: there is no passing report of a run of this kind. The message says what to do."""


def family(config: ModelConfig) -> dict[str, Any]:
    """What two models must share for one to speak for the other, whatever their width, depth and heads.

    `parameters` is a digest of names and ranks of all parameters that draw: another kind of block is another family.
    """
    network = {name: part for name, part in dit.build(config)[1].items() if name != dit.PROJECTOR}
    leaves = jax.tree_util.tree_leaves_with_path(network)
    names = sorted(f"{jax.tree_util.keystr(path)} {len(leaf.shape)}" for path, leaf in leaves)
    return {
        "parameters": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
        "patch": config.patch,
        "channels": config.channels,
        "positions": config.positions,
    } | {f"{condition.name}_width": condition.width for condition in config.conditions}


def encoder_summary(identity: EncoderIdentity) -> dict[str, Any]:
    """What of an encoder stands in a report."""
    return {
        "id": identity.id,
        "revision": identity.revision,
        "sha256": identity.sha256,
        "width": identity.width,
    } | {name: identity.options[name] for name in SCALING if name in identity.options}


def is_of(report: dict[str, Any], step: int, digest: str | None, folder: str = EMA) -> bool:
    """Whether a report was measured on these weights: by their digest, or, where one is not known, by their step.

    Args:
      digest: of the weights (see `tree_digest`); None where it is not known.
    """
    weights = report.get("weights")
    if not isinstance(weights, dict):
        return False
    if digest and weights.get("digest"):
        return weights["digest"] == digest
    return (weights.get("ema_step"), weights.get("folder", EMA)) == (step, folder)


def require_report(path: str | Path | None, config: ModelConfig, manifest: Manifest) -> dict[str, Any]:
    """Reads a validation report and checks that it lets a run of this model and data set start.

    Args:
      path: `config.gate.report`: `validation/report.json` of a run, or that run's directory.
      config: of the model to be trained; its width, depth and heads may differ from the validated run's.
      manifest: of the data set to be trained on; its pictures may differ, its encoders and format may not.

    Returns:
      The report.

    Raises:
      GateError: there is no report, it cannot be read, it did not pass, or it is of another model family, other
        encoders or another data format; or it lies in a run's directory and is not of the newest EMA weights there.
        The message lists all of it, and how to make one or go without.
    """
    how = (
        "Train and validate a small run first:\n"
        "  python -m fluxdit_jax.train --config=configs/nano.py --config.data.path=SUBSET --config.workdir=RUN\n"
        "  python -m fluxdit_jax.validate --workdir=RUN\n"
        "and give --config.gate.report=RUN/validation/report.json; or start without: --config.gate.required=False"
    )
    if not path:
        raise GateError(f"config.gate.required is True, and config.gate.report names no report.\n{how}")
    file = Path(path)
    if file.is_dir():
        file = file / "validation" / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not isinstance(report.get("passed"), bool):
            raise ValueError("it has no boolean 'passed'")
        problems = _differences(report, config, manifest) + _other_weights(file, report)
    except FileNotFoundError as error:
        raise GateError(f"config.gate.report: {file} does not exist.\n{how}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GateError(f"config.gate.report: {file} is not a validation report: {error}.\n{how}") from error
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise GateError(f"config.gate.report: {file} does not let this run start:\n{listed}\n{how}")
    return report


def _differences(report: dict[str, Any], config: ModelConfig, manifest: Manifest) -> list[str]:
    problems = []
    if not report["passed"]:
        missed = {name: metric for name, metric in report["metrics"].items() if not metric["passed"]}
        kinds = (("failed its validation", True), ("was measured on a set that does not allow all tests", False))
        for what, judged in kinds:
            if names := [name for name, metric in missed.items() if metric.get("judged", True) is judged]:
                problems.append(f"that run {what} ({shown(', '.join(names))})")
        if not missed:
            problems.append("that run did not pass its validation")
    theirs = report["model"]["family"]
    for key, value in family(config).items():
        if (there := theirs.get(key, BEFORE.get(key))) != value:
            what = WORDS.get(key, key.replace("_", " "))
            problems.append(f"{what} was {there!r} there, is {value!r} here")
    # Of what the network is given: patches serve training alone.
    wanted, measured = {LATENT.encoder, *manifest.conditions}, report["encoders"].keys() - {PATCHES.encoder}
    if measured != wanted:
        theirs, ours = (", ".join(sorted(names)) for names in (measured, wanted))
        problems.append(f"the encoders were those of {shown(theirs)} there, are those of {ours} here")
    for name in (name for name in manifest.encoders if name in wanted & measured):
        here, there = encoder_summary(manifest.encoders[name]), report["encoders"][name]
        if (here["sha256"], here["width"]) != (there["sha256"], there["width"]):
            problems.append(
                f"the {name} encoder was {there['id']!r} (sha256 {there['sha256'][:12]}, width {there['width']}) "
                f"there, is {here['id']!r} (sha256 {here['sha256'][:12]}, width {here['width']}) here"
            )
        problems += [
            f"the {name} encoder's {option} was {there[option]!r} there, is {here.get(option)!r} here"
            for option in SCALING
            if option in there and there[option] != here.get(option)
        ]
    if report["dataset"]["format_version"] != manifest.version:
        problems.append(
            f"the data format was version {report['dataset']['format_version']} there, is {manifest.version} here"
        )
    return problems


def _other_weights(file: Path, report: dict[str, Any]) -> list[str]:
    """That the report's run has come to other weights since. A report that is kept elsewhere speaks for itself.

    The newest weights may be in `ema/` or in a checkpoint, which a run that is training replaces: both will do.
    """
    run = file.absolute().parent.parent
    found = places(run) if file.absolute().parent.name == "validation" else {}
    newest = {max(steps) for steps in (found, ema_steps(run)) if steps}
    if not found or any(is_of(report, step, weights_digest(found[step])) for step in newest):
        return []
    measured = report["weights"].get("ema_step") if isinstance(report.get("weights"), dict) else "not known"
    return [
        f"it is not of the weights that {run} has now: it was measured on those of step {measured}, the newest are of "
        f"step {max(found)}. Measure again: python -m fluxdit_jax.validate --workdir={run}"
    ]


def report_pictures(report: dict[str, Any], manifest: Manifest) -> None:
    """Logs which pictures a report was measured on, and warns where they say nothing of this data set's.

    Args:
      report: of `require_report`. manifest: of the data set to be trained on.
    """
    data = report["dataset"]
    path, tested, drawn = (data.get(name) for name in ("path", "pictures_tested", "drawn_portraits"))
    if type(tested) is not int or type(drawn) is not int:
        log.info("gate: passed on pictures of %s; an older version wrote the report: it does not say of what", path)
        return
    of_demo = f", {drawn} of them drawn portraits of `preprocess demo`" if drawn else ""
    log.info("gate: passed on %d pictures of %s%s", tested, path, of_demo)
    same = data.get("shards_sha256") == [shard.sha256 for shard in manifest.shards.get("train", ())]
    if 2 * drawn > tested and not same:
        log.warning(
            "config.gate.report: the gate was passed on the drawn portraits of `preprocess demo` (%s). That shows that "
            "the program works; it says nothing of your pictures, captions and vectors. Before a long run, pass it on "
            "your own: `python -m preprocess subset --input DATASET --output DIR`, `build`, then train configs/nano.py "
            "on it and validate",
            path,
        )
