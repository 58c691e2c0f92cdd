"""Where to look when a test fails: what the numbers of all three and the training log say together, by cause."""

from __future__ import annotations

import dataclasses
from typing import Any

from fluxdit_jax.gate.training import LEARNED, Training, read_training
from fluxdit_jax.gate.verdict import Verdict, percent

Advice = list[tuple[str, str]]  # (cause, what was seen)

# What to look at, once for each cause, after what was seen.
LOOK = {
    "text path": "Look at the text path: the gate of the cross-attention, the text length mask (is padding attended "
    "to?), the RMSNorm on the text, depth, data.text_tokens (is the word within them?); raise vision in flow.drop, so "
    "that the caption must be enough alone.",
    "vision path": "Look at the vision path: vision_embed, the adaLN modulation and its gates (do they receive "
    "gradient?), vision in flow.drop; do the vectors of equal captions differ (`python -m preprocess inspect`)?",
    "the noise decides": "Are the conditions used at all, and are the seeds of sampling those of training?",
}


@dataclasses.dataclass(frozen=True)
class Cause:
    """Attributes:
    name: of the cause.
    tests: titles of the failed tests that it stands behind.
    lines: what was seen and what to do, each once.
    """

    name: str
    tests: tuple[str, ...]
    lines: tuple[str, ...]


def advise(
    memorisation: Verdict,
    swap: Verdict,
    edit: Verdict,
    log: list[dict[str, Any]],
    step: int | None = None,
    planned: int | None = None,
) -> list[Verdict]:
    """The verdicts with advice for those that failed; `by_cause` is the same for people.

    Args:
      log, step, planned: see `read_training`.
    """
    training = read_training(log, step, planned)
    general = _condition(memorisation, training)
    told = []
    for verdict, own in ((memorisation, _memorisation), (swap, _swap), (edit, _edit)):
        found = [] if verdict.passed else [*training.findings, *(general or own(verdict))]
        causes = list(dict.fromkeys(cause for cause, _ in found))
        lines = [(cause, line) for name in causes for cause, line in found if cause == name]
        for name in causes:
            if name in LOOK:
                last = max(k for k, (cause, _) in enumerate(lines) if cause == name)
                lines.insert(last + 1, (name, LOOK[name]))
        advice, names = tuple(line for _, line in lines), tuple(cause for cause, _ in lines)
        told.append(dataclasses.replace(verdict, advice=advice, causes=names))
    return told


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
    if numbers["structure_of_the_nearest"] < 0.3:
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
    other_light = numbers["right_caption"] - numbers["retrieved"]
    if other_light > 0.7 * missed:
        seen = "Nearly all misses are pictures of the right caption in another light: the vector does not get through."
        advice.append(("vision path", seen))
    elif missed > 0.1 and numbers["tone_difference"] < 8:
        seen = "The light is right and the composition is not: the caption does not get through."
        advice.append(("text path", seen))
    if not all(control.passed for control in verdict.controls):
        seen = "Shuffled conditions still give the old picture: it comes from the noise."
        advice.append(("the noise decides", seen))
    if numbers["psnr_median_db"] < 22:
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
    if numbers["pairs"] == 0:
        return [("the set", "Choose a set with pictures of clearly different light, or a larger --limit.")]
    advice: Advice = []
    if numbers["structure_of_a"] < 0.85:
        seen = (
            "The composition follows the vector: the vision path dominates, or the text is not read. Where the vector "
            "identifies each picture, the model need not read."
        )
        advice.append(("text path", seen))
    if numbers["tone_of_b"] < 0.85:
        seen = "The light stays A's: the vector is not used, or the caption decides. Do the captions name the light?"
        advice.append(("vision path", seen))
        if numbers["shared_captions"] < 0.5:
            seen = (
                "Most captions of this set belong to one picture each: the caption says all, and nothing taught the "
                "model to look at the vector. Raise text in flow.drop, or take a set with several pictures of a "
                "caption in different light."
            )
            advice.append(("the set", seen))
    if not advice and numbers["passing"] < verdict.threshold:
        seen = (
            "Composition and light are each right in most pairs, but not together: the two conditions are tied to each "
            "other. Condition dropout (flow.drop) and more steps loosen them."
        )
        advice.append(("conditions tied together", seen))
    own, random = verdict.controls
    if not own.passed:
        advice.append(
            (
                "text path",
                "With B's own caption the structure is not B's: the noise or the vector decides it.",
            )
        )
    if not random.passed:
        seen = "A random vector brings B's light as well as B's vector does: the vector carries no light."
        advice.append(("vision path", seen))
    return advice or [("the set", "More pictures: this set has too few pairs of different caption and light.")]


def _edit(verdict: Verdict) -> Advice:
    numbers = verdict.numbers
    advice: Advice = []
    if numbers["not_measurable"] > 0.2:
        seen = (
            "Many pictures are not the scene they should be: the model is unstable, above all under a caption that it "
            "did not see with this vector. Look at the QK-norm and the gate of the cross-attention; train longer, with "
            "condition dropout."
        )
        advice.append(("unstable pictures", seen))
    if numbers["wrong_way"] > 0.2:
        seen = (
            "The subject moves the wrong way: check the direction given with --edit, and whether latents or rotary "
            "positions are mirrored (a grid is rows, columns)."
        )
        advice.append(("directions", seen))
    if numbers["right_way"] < verdict.threshold and not advice:
        seen = "The subject stays where it is: the word is not read, or the vector, which may hold the pose, wins."
        advice.append(("text path", seen))
    seeds, unrelated = verdict.controls
    if numbers["seeds_not_recognised"] > 0.1 or (not seeds.passed and seeds.value > 0.02):
        seen = (
            "Other noise moves the subject as the words do: the conditions do not yet determine the picture. Train "
            "longer; look at the loss at large t (loss_by_time)."
        )
        advice.append(("the noise decides", seen))
    if not unrelated.passed:
        seen = (
            "A word that says nothing of the picture changes it: the caption is taken as a whole. More captions that "
            "differ in single words cure that, and a text encoder that knows words; look at the RMSNorm on the text."
        )
        advice.append(("the set", seen))
    return advice or [("the set", "More captions that can be edited.")]
