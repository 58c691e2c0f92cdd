"""Exports a run's EMA: `python -m fluxdit_jax.export --workdir=RUN --out=DIR`.

DIR gets `model.safetensors` (f32, names joined by dots; without what serves training alone), `config.json` (all that is
needed to use it, see `exported`) and `README.md`, a model card. `python -m fluxdit_jax.sample --model=DIR` draws from
it. Without --step the weights are the newest of `ema/` and of the resumable checkpoints.

With `--format diffusers` DIR is one for `DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)`, which needs
neither JAX nor this project: see `exporting.diffusers_folder`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from absl import logging as absl_logging
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.exporting import diffusers_folder
from fluxdit_jax.exporting.card import card, verdict_of
from fluxdit_jax.exporting.place import CARD, WORK, remove_older, require_place
from fluxdit_jax.exporting.samples import draw
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA, CheckpointError
from fluxdit_jax.run.differences import find_dataset
from fluxdit_jax.run.run_directory import RunError, RunLock, load_stage
from fluxdit_jax.run.weights import restore_weights
from fluxdit_jax.sampling.exported import DESCRIPTION, WEIGHTS, ExportError, describe, flatten
from fluxdit_jax.settings import resolve
from fluxdit_jax.shared import atomic_files, cli
from fluxdit_jax.shared.arguments import Parser
from fluxdit_jax.shared.paths import expanded, given_path
from fluxdit_jax.vae.files import DecoderError

log = logging.getLogger(__name__)

OURS, DIFFUSERS = "fluxdit_jax", "diffusers"
USAGE = """    python -m fluxdit_jax.sample --model=DIR --prompt "..." --out picture.png

draws from this directory. `config.json` holds or names everything that sampling needs. The VAE, the text encoder and,
for a reference, the vision encoder are not in here: they are looked for under the names above, or where `--vae`,
`--text-encoder` and `--vision-encoder` say, and are checked by their digests."""

USER_ERRORS = (RunError, CheckpointError, ConfigError, DatasetError, DecoderError, ExportError, OSError)


def export(
    workdir: Path,
    out: Path,
    step: int | None = None,
    folder: str = EMA,
    *,
    form: str = OURS,
    dtype: str = "float32",
    license: str | None = None,
    bundle: str = "none",
    samples: int = 0,
    data: Path | None = None,
    vae: str | None = None,
) -> Path:
    """Writes the EMA of `step` (None: the newest) and says which; returns the path of what describes the export.

    Args:
      folder: which average, see `restore_weights`.
      form: `OURS` or `DIFFUSERS`. dtype, bundle: of the latter, see `diffusers_folder.write`.
      license: identifier of the Hub, for the card. samples: pictures in the card.
      data: directory of the dataset, for these; None: where it was when the run was trained.
      vae: directory of the dataset's VAE, for these; None: that of the run's previews.

    Raises:
      ExportError: it cannot be written; a licence is missing that others would need.
    """
    if form == DIFFUSERS and not license:
        raise ExportError(
            "--license is missing: who loads the model has to know what it may be used for, which the licences of your "
            "training images decide; give an identifier of the Hub, as apache-2.0, cc-by-nc-4.0 or other"
        )
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ExportError(f"--license {license!r}: must be an identifier of the Hub, as apache-2.0 or other")
    require_place(out, workdir)
    atomic_files.require_writable(out)
    weights = restore_weights(workdir, step, folder)
    stage, manifest = load_stage(workdir, weights.step)
    settings = resolve(stage.config, manifest, stage.first)
    source = find_dataset(workdir, stage, data) if samples else None
    print(f"weights: {weights}")
    verdict = verdict_of(workdir, weights)
    weights = weights.without_projector()
    tensors = flatten(weights.ema)
    ours = form == OURS

    def write(work: Path) -> None:
        if ours:
            metadata = {"format": "fluxdit_jax", "ema_step": str(weights.step)}
            save_file(tensors, work / WEIGHTS, metadata=metadata)
            description = json.dumps(describe(stage.config, settings, manifest, weights), indent=1)
            atomic_files.write_whole(work / DESCRIPTION, description + "\n")
        else:
            diffusers_folder.write(work, settings, manifest, weights, dtype=dtype, bundle=bundle)
        decoder = vae or stage.config.log.vae
        drawn = draw(work, settings, manifest, weights, source, samples, decoder) if source else []
        text = card(
            settings, manifest, weights, tensors, workdir, verdict=verdict, license=license, dtype=dtype,
            usage=USAGE if ours else diffusers_folder.USAGE, library=form, samples=drawn,
        )  # fmt: skip
        atomic_files.write_whole(work / CARD, text)

    marker = DESCRIPTION if ours else diffusers_folder.INDEX
    _replace(out, write, marker)
    return out / (WEIGHTS if ours else marker)


def _replace(out: Path, write: Callable[[Path], None], marker: str) -> None:
    """Lets `write` fill a folder, and moves what is in it to `out`, the marker last.

    While the marker is missing nobody takes new files beside old ones for an export.
    """
    lock, work = RunLock(out, f"{WORK}/lock", temporary=True, option="--out"), out / WORK
    files = work / "files"
    try:
        with cli.undoing(lambda: shutil.rmtree(work, ignore_errors=True)):
            shutil.rmtree(files, ignore_errors=True)  # of what a killed process left
            files.mkdir()
            try:
                write(files)
            except SafetensorError as error:
                raise ExportError(f"{out}: {error}") from error
            remove_older(out)
            (out / marker).unlink(missing_ok=True)
            found = [path for path in sorted(files.rglob("*")) if path.is_file()]
            for path in sorted(found, key=lambda path: path == files / marker):
                target = out / path.relative_to(files)
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".safetensors":  # safetensors makes its file for the owner alone
                    shutil.copymode(files / marker, path)
                path.replace(target)
    finally:
        shutil.rmtree(files, ignore_errors=True)
        lock.release()
        with contextlib.suppress(OSError):  # the next one is in it already
            work.rmdir()


def main() -> None:
    parser = Parser(prog="python -m fluxdit_jax.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workdir", type=given_path, required=True, help="run directory of fluxdit_jax.train (required)")
    add("--out", type=given_path, required=True, help="directory to write (required)")
    add("--step", type=int, help="weights of this step; default: the newest, of ema/ or of a checkpoint")
    add("--weights", choices=(EMA, SHORT_EMA), default=EMA, help="which average; default: ema")
    add("--format", choices=(OURS, DIFFUSERS), default=OURS, help="diffusers: a folder for DiffusionPipeline, which "
        f"needs no JAX; default: {OURS}")  # fmt: skip
    add("--dtype", choices=tuple(diffusers_folder.DTYPES), default="float32", help="of the weights for diffusers; "
        "default: float32")  # fmt: skip
    add("--license", metavar="ID", help="for the card, as apache-2.0 or other; diffusers needs it; default: not said")
    add("--bundle", choices=tuple(diffusers_folder.BUNDLES), default="none", help="encoders that are copied into a "
        "folder for diffusers: none, the vae, or all; others are fetched by their names; default: none")  # fmt: skip
    add("--samples", type=int, default=0, metavar="N", help="pictures drawn for the card, of captions of the dataset, "
        "which the card then shows; default: 0")  # fmt: skip
    add("--data", type=given_path, help="dataset directory, for --samples; default: where it was when the run was "
        "trained")  # fmt: skip
    add("--vae", type=expanded, help="directory of the VAE, for --samples; default: config.log.vae, or where the data "
        "set found it")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.samples < 0:
        parser.error("--samples must be 0 or more")
    if arguments.format == OURS and (arguments.dtype != "float32" or arguments.bundle != "none"):
        parser.error("--dtype and --bundle go with --format diffusers")
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, force=True)

    def work() -> None:
        path = export(
            arguments.workdir, arguments.out, arguments.step, arguments.weights, form=arguments.format,
            dtype=arguments.dtype, license=arguments.license, bundle=arguments.bundle, samples=arguments.samples,
            data=arguments.data, vae=arguments.vae,
        )  # fmt: skip
        print(path)
        out = str(arguments.out)
        if arguments.format == OURS:
            print(f"Draw from it: python -m fluxdit_jax.sample --model {shlex.quote(out)} --prompt TEXT --out FILE.png")
        else:
            print(f"Draw from it: DiffusionPipeline.from_pretrained({out!r}, trust_remote_code=True)(TEXT).images[0]")

    cli.run(work, USER_ERRORS)


if __name__ == "__main__":
    main()
