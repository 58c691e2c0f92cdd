"""Scoring a model while it trains: the same questions and noise at every visit, so that its points compare."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.quality import files
from fluxdit_jax.quality.answers import Amounts, Pupil
from fluxdit_jax.quality.exam import DECODED, Exam
from fluxdit_jax.quality.exam_file import kept_exam
from fluxdit_jax.quality.eye import Eye
from fluxdit_jax.quality.page import write_page
from fluxdit_jax.quality.scores import Scores, judge, scalars
from fluxdit_jax.sampling.pipeline import Generator
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.settings import Settings
from fluxdit_jax.shared.cli import explain
from fluxdit_jax.vae.decoder import Decoder, load_decoder
from fluxdit_jax.vae.files import DecoderError

log = logging.getLogger(__name__)
BATCH = 16  # pictures drawn at once at most


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Scores the EMA of a run while it trains.

    Attributes:
      config, settings: of the stage. directory: of its dataset.
      workdir: of the run. exam: what is asked at every visit.
    """

    config: ConfigDict
    settings: Settings
    directory: Path
    workdir: Path
    exam: Exam
    train: RecordSource
    decoder: Decoder
    eye: Eye
    generator: Generator

    @classmethod
    def make(cls, config: ConfigDict, manifest: Manifest, settings: Settings, workdir: Path) -> Scorer | None:
        """None, with a warning, where there is no holdout split or no decoder.

        Raises:
          ConfigError: `score.vision_encoder` or `score.device` cannot be had.
          DatasetError: a record is damaged.
        """
        from preprocess import PreprocessError

        if (held := manifest.records("holdout")) < 2:
            log.warning(
                "no score while training: the dataset has %d records held out, two are needed (build --holdout)", held
            )
            return None
        try:
            decoder = load_decoder(manifest.vae, config.log.vae)
        except DecoderError as error:
            log.warning("no score while training: %s", error)
            return None
        begin = time.monotonic()
        directory = Path(config.data.path)
        holdout, train = (
            RecordSource(directory, manifest, split, config.data.on_corrupt) for split in ("holdout", "train")
        )
        try:
            eye = Eye.open(manifest, config.score.vision_encoder, config.score.device)
        except (PreprocessError, SampleError) as error:
            raise ConfigError(f"config.score.vision_encoder and config.score.device: {error}") from error
        if eye.note:
            log.warning("score: %s", eye.note)
        references = config.score.references if eye.own else min(config.score.references, DECODED)
        amount = {"count": config.score.count, "references": references}
        folder = workdir / files.FOLDER
        exam = kept_exam(folder, holdout, train, eye, decoder, vae=str(config.log.vae), **amount)
        batch = min(BATCH, max(1, config.data.micro_batch_size // jax.device_count()))  # training's own size fits
        generator = Generator.of(settings, manifest, steps=config.score.steps, batch_size=batch, method="heun")
        log.info("score: %d captions and %d training pictures ready after %.0f s", len(exam.questions),
                 len(exam.train), time.monotonic() - begin)  # fmt: skip
        return cls(config, settings, directory, workdir, exam, train, decoder, eye, generator)

    def visit(self, ema: Any, step: int, epochs: float) -> dict[str, float]:
        """Scores and logs; returns scalars by name. Whatever goes wrong is logged, and does not stop the run."""
        begin = time.monotonic()
        try:
            scores = self.score(ema, step, epochs)
        except Exception as error:  # noqa: BLE001  disk, device memory, a damaged record: the run is worth more
            log.error("no score of this step, the run goes on: %s: %s", type(error).__name__, explain(error))
            return {}
        told = ", ".join(f"{name} {one.value:.3g}" for name, one in scores.numbers.items())
        log.info("step %d: score: %s (%.0f s)", step, told, time.monotonic() - begin)
        return scalars(scores)

    def score(self, ema: Any, step: int, epochs: float) -> Scores:
        """Draws by f32 EMA weights, measures, and writes RUN/score."""
        begin = time.monotonic()
        guidance = float(self.config.log.preview_guidance)
        pupil = Pupil(self.generator, ema, self.decoder, self.eye, self.settings.text_limit, guidance)
        amounts = Amounts(64, 8, 4)
        answers = pupil.answer(self.exam, self.settings.model.patch, amounts, lambda n: None)
        scores = judge(self.exam, answers)
        how = {"steps": self.config.score.steps, "method": "heun", "batch": self.generator.batch_size,
               "guidance_text": guidance}  # fmt: skip
        report = {
            **scores.to_json(),
            "workdir": str(self.workdir.absolute()),
            "step": step,
            "epochs": epochs,
            **files.circumstances(self.directory, self.exam, self.eye, how, amounts),
            "notes": [self.eye.note] if self.eye.note else [],
            "seconds": {"all": round(time.monotonic() - begin, 2)},
        }
        folder = self.workdir / files.FOLDER
        files.write(report, folder)
        write_page(self.exam, answers, scores, report, self.train, self.decoder, folder)
        return scores
