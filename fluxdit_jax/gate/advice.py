"""Where to look when a test fails: what the numbers of all three say together, in words."""

from __future__ import annotations

import dataclasses

import numpy as np

from fluxdit_jax.gate.verdict import Verdict, percent


def advise(
    memorisation: Verdict, swap: Verdict, edit: Verdict, loss: list[tuple[int, float]]
) -> list[Verdict]:
    """The verdicts with advice for those that failed.

    Args:
      loss: (step, loss) as logged, oldest first.
    """
    general, training = _condition(memorisation), _training(loss)
    return [
        dataclasses.replace(verdict, advice=() if verdict.passed else (*(general or own(verdict)), *training))
        for verdict, own in ((memorisation, _memorisation), (swap, _swap), (edit, _edit))
    ]


def _condition(memorisation: Verdict) -> list[str]:
    """Troubles that spoil every test alike; empty if the model draws pictures of the set at all."""
    numbers = memorisation.numbers
    if numbers["contrast"] < 0.3:
        return [
            f"The pictures are nearly plain (contrast {percent(numbers['contrast'])} of the originals'): the "
            "model has collapsed to the mean.",
            "Look first at the output layer's gradient norm in TensorBoard, at the data set's latent_mean and "
            "latent_std (undone once, not twice?), and at the learning rate: too high a rate dies this way.",
        ]
    if numbers["structure_of_the_nearest"] < 0.3:
        what = "noise" if numbers["roughness"] > 1.5 else "something, but no picture of this set"
        return [
            f"The model draws {what}: it is untrained, or its weights are not what the sampler expects.",
            "Look first at the loss curve (below 0.3?), at the EMA (is ema_distance small? a decay near 1 needs "
            "many steps), at the time shift (sampling reads the same one), and at normalisation: the QK-norm, "
            "and the statistics of the data set.",
        ]
    return []


def _training(loss: list[tuple[int, float]]) -> list[str]:
    if len(loss) < 8:
        return ["The run has logged almost no losses: was it trained at all?"]
    values = [value for _, value in loss]
    eighth = len(values) // 8
    last, before = np.mean(values[-eighth:]), np.mean(values[-3 * eighth : -2 * eighth])
    if last < 0.75 * before:  # a schedule that ends low takes off less than that
        return [
            f"The loss still falls ({before:.3f} to {last:.3f} over the last quarter): train longer first."
        ]
    return []


def _memorisation(verdict: Verdict) -> list[str]:
    numbers = verdict.numbers
    advice = []
    missed = 1 - numbers["retrieved"]
    other_light = numbers["right_caption"] - numbers["retrieved"]
    if missed > 0 and other_light > 0.7 * missed:
        advice.append(
            "Nearly all misses are pictures of the right caption in another light: the vision vector does not "
            "get through. Look at the vision path: vision_embed, the adaLN modulation and its gates, "
            "flow.drop_vision; do the vectors of equal captions differ (`python -m preprocess inspect`)?"
        )
    elif missed > 0.1 and numbers["tone_difference"] < 8:
        advice.append(
            "The light is right and the composition is not: the caption does not get through. Look at the text "
            "path: the gate of the cross-attention, the text length mask (is padding attended to?), the "
            "RMSNorm on the text, flow.drop_text."
        )
    if not all(control.passed for control in verdict.controls):
        advice.append(
            "Shuffled conditions still give the old picture: it comes from the noise. Are the conditions used "
            "at all, and are the seeds of sampling those of training?"
        )
    if numbers["psnr_median_db"] < 22:
        advice.append(
            f"The pictures are blurred or unfinished ({numbers['psnr_median_db']:.1f} dB): more steps, more "
            "depth or width, or more solver steps (--steps); is the loss at small t (loss_by_time) still high?"
        )
    return advice or [
        "Look at the missed pictures on the page: pictures of the set that are nearly the same take the longest to "
        "tell apart. Train longer, or with more depth or width."
    ]


def _swap(verdict: Verdict) -> list[str]:
    numbers = verdict.numbers
    if numbers["pairs"] == 0:
        return ["Choose a set with pictures of clearly different light, or a larger --limit."]
    advice = []
    if numbers["structure_of_a"] < 0.85:
        advice.append(
            "The composition follows the vector: the vision path dominates, or the text is not read. Look at "
            "the text path (gate of the cross-attention, text length mask, RMSNorm on the text, depth); raise "
            "flow.drop_vision so that the caption must be enough alone; and ask what the vector knows: where it "
            "identifies each picture, the model need not read."
        )
    if numbers["tone_of_b"] < 0.85:
        advice.append(
            "The light stays A's: the vector is not used, or the caption alone decides. Look at the vision path "
            "(vision_embed, adaLN modulation and gates: do they receive gradient?), and at the captions: do "
            "they name the light?"
        )
        if numbers["shared_captions"] < 0.5:
            advice.append(
                "Most captions of this set belong to one picture each: the caption says all, and nothing taught the "
                "model to look at the vector. Raise flow.drop_text, or take a set with several pictures of a caption "
                "in different light."
            )
    if not advice and numbers["passing"] < verdict.threshold:
        advice.append(
            "Composition and light are each right in most pairs, but not together: the two conditions are tied "
            "to each other. Condition dropout (flow.drop_text, flow.drop_vision) and more steps loosen them."
        )
    own, random = verdict.controls
    if not own.passed:
        advice.append(
            "With B's own caption the structure is not B's: see the text path, or the noise decides."
        )
    if not random.passed:
        advice.append(
            "A random vector brings B's light as well as B's vector does: the vector carries no light. See the "
            "vision path."
        )
    return advice or ["More pictures: this set has too few pairs of different caption and light."]


def _edit(verdict: Verdict) -> list[str]:
    numbers = verdict.numbers
    advice = []
    if numbers["not_measurable"] > 0.2:
        advice.append(
            "Many pictures are not the scene they should be: the model is unstable, above all under a caption "
            "that it did not see with this vector. Look at the QK-norm and the gate of the cross-attention; "
            "train longer, with condition dropout."
        )
    if numbers["wrong_way"] > 0.2:
        advice.append(
            "The subject moves the wrong way: check the direction given with --edit, and whether latents or "
            "rotary positions are mirrored (a grid is rows, columns)."
        )
    if numbers["right_way"] < verdict.threshold and not advice:
        advice.append(
            "The subject stays where it is: the edited word is not read, or the vector overrides it. Look at the "
            "text path (depth and gate of the cross-attention, text length mask, is the word within "
            "data.text_tokens?) and at what the vector knows of the pose; flow.drop_vision makes captions count."
        )
    seeds, unrelated = verdict.controls
    if numbers["seeds_not_recognised"] > 0.1 or (not seeds.passed and seeds.value > 0.02):
        advice.append(
            "Other noise moves the subject as the words do: the conditions do not yet determine the picture. "
            "Train longer; look at the loss at large t (loss_by_time)."
        )
    if not unrelated.passed:
        advice.append(
            "A word that says nothing of the picture changes it: the caption is taken as a whole. More captions "
            "that differ in single words cure that, and a text encoder that knows words; look at the RMSNorm on "
            "the text."
        )
    return advice or ["More captions that can be edited."]
