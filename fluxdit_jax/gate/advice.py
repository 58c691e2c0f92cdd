"""Where to look when a test fails: what the numbers of all three and the training log say together, by cause."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from fluxdit_jax.gate.noise_levels import NoiseLevels
from fluxdit_jax.gate.training import LEARNED, Training, read_training
from fluxdit_jax.gate.verdict import Verdict, percent

Advice = list[tuple[str, str]]  # (cause, what was seen)

STRANGE = 0.5  # distance to the nearest picture, against that of two of the set, from which on it is none of them
RECOGNISED = 0.5  # share of drawn pictures nearest to their own original, above which they are pictures of the set
BLURRED_DB = 22.0  # median PSNR below which the pictures are blurred to the eye
LARGE_SHIFT = 10.0  # a time shift above leaves next to no samples at little noise
CLEAR = 0.85  # share of a test's pictures that have the right photograph, or light, where that path works

# What to look at, once for each cause, after what was seen.
LOOK = {
    "text path": "Look at the text path: the gate of the cross-attention, the text length mask (is padding attended "
    "to?), the RMSNorm on the text, depth, data.text_tokens (is the word within them?); raise vision in flow.drop, so "
    "that the caption must be enough alone.",
    "vision path": "Look at the vision path: vision_embed, the adaLN modulation and its gates (do they receive "
    "gradient?), vision in flow.drop; does the vision encoder see the lights (`python -m preprocess inspect`)?",
    "the noise decides": "Are the conditions used at all, and are the seeds of sampling those of training?",
    "the set": "A gate set is a grid of photographs, lights and views: `python -m preprocess subset --input IMAGES "
    "--output DIR`, then build, train and validate with the commands that it prints.",
}


@dataclasses.dataclass(frozen=True)
class Cause:
    """A likely cause of failed tests, and what to do.

    Attributes:
      name: of the cause.
      tests: titles of the failed tests that it stands behind.
      lines: what was seen and what to do, each once.
    """

    name: str
    tests: tuple[str, ...]
    lines: tuple[str, ...]


def advise(
    verdicts: Sequence[Verdict],
    log: list[dict[str, Any]],
    step: int | None = None,
    planned: int | None = None,
    levels: NoiseLevels | None = None,
) -> list[Verdict]:
    """The verdicts with advice for those that did not pass; `by_cause` is the same for people.

    Args:
      verdicts: of the three tests, in order.
      log, step, planned: see `read_training`.
      levels: of the set's lights.
    """
    memorisation, swap, edit = verdicts
    training = read_training(log, step, planned)
    general = _condition(memorisation, training)
    told = []
    edited = functools.partial(_edit, remembered=memorisation.numbers["retrieved"])
    for verdict, own in ((memorisation, _memorisation), (swap, _swap), (edit, edited)):
        found = [*_levels(verdict, levels), *_found(verdict, training, general, own)]
        causes = list(dict.fromkeys(cause for cause, _ in found))
        lines = [(cause, line) for name in causes for cause, line in found if cause == name]
        for name in causes:
            if name in LOOK:
                last = max(k for k, (cause, _) in enumerate(lines) if cause == name)
                lines.insert(last + 1, (name, LOOK[name]))
        advice, names = tuple(line for _, line in lines), tuple(cause for cause, _ in lines)
        told.append(dataclasses.replace(verdict, advice=advice, causes=names))
    return told


def _levels(verdict: Verdict, levels: NoiseLevels | None) -> Advice:
    if verdict.passed or not verdict.judged or levels is None or not levels.too_few:
        return []
    keys = f"--config.flow.shift={levels.shift:.0f}"
    if levels.shift > LARGE_SHIFT:
        keys = f"--config.flow.uniform_share=1 --config.flow.shift={levels.uniform_shift:.0f}"
    seen = (
        f"Only {100 * levels.share:.2g} % of the training's samples are so noisy (t above {levels.time:.3f}) that the "
        f"light must come from the vector; the others show it. Train with {keys}, which makes it 6 %."
    )
    return [("time shift", seen)]


def _found(
    verdict: Verdict, training: Training, general: Advice, own: Callable[[Verdict], Advice]
) -> list[tuple[str, str]]:
    if verdict.passed:
        return []
    if not verdict.judged:
        return [("the set", f"The {verdict.title.lower()} cannot be judged on this set.")]
    return [*training.findings, *(general or own(verdict))]


def by_cause(verdicts: list[Verdict]) -> list[Cause]:
    """The advice of all failed tests, each line once; the cause behind most tests first."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for verdict in verdicts:
        for cause, line in zip(verdict.causes, verdict.advice):
            tests, lines = found.setdefault(cause, ({}, {}))
            tests[verdict.title.lower()] = None
            lines[line] = None
    look = set(LOOK.values())
    causes = [
        Cause(name, tuple(tests), tuple(sorted(lines, key=lambda line: line in look)))
        for name, (tests, lines) in found.items()
    ]
    return sorted(causes, key=lambda cause: -len(cause.tests))


def _condition(memorisation: Verdict, training: Training) -> Advice:
    """A trouble that spoils every test alike; empty if the model draws pictures of the set at all."""
    numbers = memorisation.numbers
    if numbers["contrast"] < 0.3:
        seen = (
            f"The pictures are nearly plain (contrast {percent(numbers['contrast'])} of the originals'): the model has "
            "collapsed to the mean."
        )
        look = (
            "Look first at the output layer's gradient norm in TensorBoard, at the data set's latent_mean and "
            "latent_std (undone once, not twice?), and at the learning rate: too high a rate dies this way."
        )
        return [("plain pictures", seen)] + ([] if training.explains else [("plain pictures", look)])
    if memorisation.value <= RECOGNISED and numbers["distance_to_the_nearest"] > STRANGE * numbers["usual_distance"]:
        what = "noise" if numbers["roughness"] > 1.5 else "something, but no picture of this set"
        seen = f"The model draws {what}: it is untrained, or its weights are not what the sampler expects."
        return [("pictures of nothing", seen), *_where_the_loss_points(training)]
    return []


def _where_the_loss_points(training: Training) -> Advice:
    if training.explains or training.first is None or training.last is None:
        return []
    if training.last > (1 - LEARNED) * training.first:
        text = (
            f"The loss has hardly fallen ({training.first:.3f} to {training.last:.3f}): it has not learned. Look at "
            "the learning rate, at the latent statistics of the data set, and at the gradient norms by part in "
            "TensorBoard."
        )
    else:
        text = (
            f"The loss has come down ({training.first:.3f} to {training.last:.3f}), so the network has learned: look "
            "at what lies between it and the picture: the EMA (a decay near 1 needs many steps), the time shift "
            "(sampling reads the same one), the statistics of the data set, the QK-norm."
        )
    return [("pictures of nothing", text)]


def _memorisation(verdict: Verdict) -> Advice:
    numbers = verdict.numbers
    advice: Advice = []
    missed = 1 - numbers["retrieved"]
    if numbers["right_row"] is not None and missed > 0:
        if numbers["right_row"] - numbers["retrieved"] > 0.7 * missed:
            seen = "Nearly all misses are the right photograph in another light: the vector does not get through."
            advice.append(("vision path", seen))
        elif missed > 0.1 and numbers["right_light"] - numbers["retrieved"] > 0.7 * missed:
            seen = "The light is right and the photograph is not: the caption does not get through."
            advice.append(("text path", seen))
    kept, moved = verdict.controls
    if not kept.passed or moved.value < moved.bound * numbers["retrieved"]:
        seen = "Another noise gives another picture: it comes from the noise."
        advice.append(("the noise decides", seen))
    if numbers["psnr_median_db"] is not None and numbers["psnr_median_db"] < BLURRED_DB:
        seen = (
            f"The pictures are blurred or unfinished ({numbers['psnr_median_db']:.1f} dB): more steps, more depth or "
            "width, or more solver steps (--steps); is the loss at small t (loss_by_time) still high?"
        )
        advice.append(("unfinished pictures", seen))
    fallback = (
        "Look at the missed pictures on the page: pictures of the set that are nearly the same take the longest to "
        "tell apart. Train longer, or with more depth or width."
    )
    return advice or [("unfinished pictures", fallback)]


def _swap(verdict: Verdict) -> Advice:
    numbers = verdict.numbers
    advice: Advice = []
    if numbers["right_row"] < CLEAR:
        seen = (
            "The photograph is not the caption's: the vision path dominates, or the text is not read. Where the vector "
            "identifies each picture, the model need not read."
        )
        advice.append(("text path", seen))
    if numbers["right_light"] < CLEAR:
        seen = (
            "The light is not B's: the vector is not used, or it does not tell the lights apart."
            if numbers["right_light"] < RECOGNISED
            else f"The light is B's in {percent(numbers['right_light'])} of the pairs: the vector is used, and not yet "
            "told apart from others in all."
        )
        advice.append(("vision path", seen))
    if not advice and numbers["retrieved"] < verdict.threshold:
        seen = (
            "Photograph and light are each right in most pairs, but not together: the two conditions are tied to each "
            "other. Condition dropout (flow.drop) and more steps loosen them."
        )
        advice.append(("conditions tied together", seen))
    if not all(control.passed for control in verdict.controls):
        seen = "A random vector brings B's light as well as B's vector does: the vector carries no light."
        advice.append(("vision path", seen))
    return advice or [("conditions tied together", "More pairs are needed to judge (--pairs).")]


def _edit(verdict: Verdict, remembered: float) -> Advice:
    """remembered: share of the pictures that come from their own captions and vectors: no control can have more."""
    numbers = verdict.numbers
    advice: Advice = []
    if numbers["stayed"] > 1 - CLEAR:
        seen = "The picture stays what it was: the words are not read, or the vector, which may hold the view, wins."
        advice.append(("text path", seen))
    elif numbers["right_row"] < CLEAR:
        seen = (
            "Many pictures are neither view of their photograph: the model is unstable under a caption that it did not "
            "see with this vector. Look at the QK-norm and the gate of the cross-attention; train longer, with "
            "condition dropout."
        )
        advice.append(("unstable pictures", seen))
    if numbers["right_light"] < CLEAR:
        seen = "The edited picture is in another light: the vector does not decide the light."
        advice.append(("vision path", seen))
    noise, unrelated = verdict.controls
    if noise.value < noise.bound * remembered:
        seen = (
            "Another noise changes the picture as the words do: the conditions do not yet determine it. Train longer; "
            "look at the loss at large t (loss_by_time)."
        )
        advice.append(("the noise decides", seen))
    if unrelated.value < unrelated.bound * noise.value:
        seen = (
            "A word that says nothing of the picture changes it: the caption is taken as a whole. More captions that "
            "differ in single words cure that, and a text encoder that knows words; look at the RMSNorm on the text."
        )
        advice.append(("captions taken as a whole", seen))
    if not advice and numbers["retrieved"] < verdict.threshold:
        advice.append(
            (
                "conditions tied together",
                "View and light are each right in most cases, but not together: condition dropout and more steps.",
            )
        )
    return advice or [("conditions tied together", "More edited captions are needed to judge (--edits).")]
