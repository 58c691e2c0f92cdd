"""The gate on a perfect model, and on models broken in one way each: it must fail where they are broken, only there."""

import dataclasses
import re

import numpy as np
import pytest
from gate_scenes import LIGHTS, Oracle, album, encode_words
from scipy.ndimage import gaussian_filter
from wording import naming

from fluxdit_jax.gate import edit, memorisation, swap
from fluxdit_jax.gate.advice import LOOK, advise, by_cause
from fluxdit_jax.gate.album import Album
from fluxdit_jax.gate.edit import Edit
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.painter import Wanted
from fluxdit_jax.gate.swap import Swap
from fluxdit_jax.shared.edit_rules import DEFAULT_RULES

ALBUM = album()
FALLING = [{"step": step, "loss": 1 / (1 + step)} for step in range(100)]
FLAT = [{"step": step, "loss": 0.03} for step in range(100)]
OTHER = {"left": "right", "right": "left"}


def verdicts(draw, of=ALBUM, loss=FLAT):
    return {verdict.name: verdict for verdict in advise(*measured(draw, of), loss)}


def measured(draw, of=ALBUM):
    plans = (
        Memorisation.plan(of),
        Swap.plan(of, 60),
        Edit.plan(of, list(DEFAULT_RULES), ("portrait of", "picture of"), 20, encode_words),
    )
    return [plan.measure(draw) for plan in plans]


def failed(found) -> set[str]:
    return {name for name, verdict in found.items() if not verdict.passed}


def noise_of(one: Wanted) -> np.random.Generator:
    return np.random.default_rng(one.seed)


def roughened(image: np.ndarray, one: Wanted, strength: float) -> np.ndarray:
    return np.clip(image + noise_of(one).normal(0, strength, image.shape), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------ the perfect model


def test_a_perfect_model_passes_with_full_marks():
    found = verdicts(Oracle(ALBUM))
    assert failed(found) == set()
    assert all(verdict.value == 1 and not verdict.advice for verdict in found.values())
    numbers = found["memorisation"].numbers
    assert numbers["psnr_worst_db"] == 99 and numbers["shuffled_follow_their_new_conditions"] == 1
    assert found["memorisation"].controls[0].value == 0
    numbers = found["vision_swap"].numbers
    assert numbers["pairs"] == 60 and numbers["exactly_the_true_answer"] == numbers["true_answers_passing"] == 1
    numbers = found["text_edit"].numbers
    assert numbers["effect_median"] == pytest.approx(0.25, abs=1 / 64)  # the subject stands 16 of 64 pixels apart
    assert numbers["calibration"] == {
        "true_pairs": 40,
        "right_way": 1.0,
        "median": 0.25,
        "least": 0.25,
        "most": 0.25,
    }
    assert numbers["seed_spread"] == numbers["unrelated_median"] == 0


def test_a_good_but_imperfect_model_passes():
    """Grain, a little blur and a tenth less contrast: about 25 dB."""

    class Imperfect(Oracle):
        def see(self, one):
            image = gaussian_filter(super().see(one).astype(float), (0.7, 0.7, 0))
            return roughened(128 + 0.9 * (image - 128), one, 8)

    found = verdicts(Imperfect(ALBUM))
    assert failed(found) == set()
    assert 20 < found["memorisation"].numbers["psnr_median_db"] < 30


# ------------------------------------------------------------------------------------------ broken ones


class TextIgnored(Oracle):
    """Shows the record whose vector it is given, whatever the caption says."""

    def see(self, one):
        return self.picture(*self.shown(one), self.light(one))


class VisionIgnored(Oracle):
    """Always the same light."""

    def light(self, one):
        return 1


class VisionDominating(Oracle):
    """The vector decides what is shown; of the caption only the side is read."""

    def see(self, one):
        return self.picture(self.shown(one)[0], self.words(one.caption)[1], self.light(one))


class EditsIgnored(Oracle):
    """Remembers how the vector's own record stood, and reads no more of the caption than the subject."""

    def see(self, one):
        subject, side = self.words(one.caption)
        shown_subject, shown_side = self.shown(one)
        return self.picture(subject, shown_side if subject == shown_subject else side, self.light(one))


class WrongWay(Oracle):
    """Under an edited caption the subject moves, but further the way it stood."""

    def see(self, one):
        subject, side = self.words(one.caption)
        image = super().see(one)
        if self.shown(one)[0] != subject or self.shown(one)[1] == side:
            return image
        before = self.picture(subject, OTHER[side], self.light(one))
        return np.roll(before, -10 if side == "right" else 10, axis=1)


class Untrained(Oracle):
    """Noise."""

    def see(self, one):
        return noise_of(one).integers(0, 256, (64, 64, 3)).astype(np.uint8)


class Grey(Oracle):
    """Collapsed to the mean."""

    def see(self, one):
        return np.full((64, 64, 3), 117, np.uint8)


class MeanOfAll(Oracle):
    """Collapsed to the mean of the set, which has a little structure."""

    def see(self, one):
        return np.rint(np.mean(self.album.truths, axis=0)).astype(np.uint8)


class NoiseDecides(Oracle):
    """A picture of the set, chosen by the noise."""

    def see(self, one):
        return self.album.truths[one.seed % len(self.album)]


class LightMistaken(Oracle):
    """Two pictures in forty come in another light than theirs."""

    def see(self, one):
        subject, side = self.words(one.caption)
        mistaken = (subject, side, self.light(one)) in {("fox", "left", 1), ("cactus", "right", 3)}
        return self.picture(subject, side, (self.light(one) + mistaken) % len(LIGHTS))


class UnstableUnderEdits(Oracle):
    """A caption that it has not seen with this vector comes out as rubbish of the right colours."""

    def see(self, one):
        image = super().see(one)
        if self.shown(one)[0] == self.words(one.caption)[0] and self.shown(one)[1] != self.words(one.caption)[1]:
            blobs = noise_of(one).permutation(image.reshape(-1, 3)).reshape(image.shape)
            return np.rint(gaussian_filter(blobs.astype(float), (1, 1, 0))).astype(np.uint8)
        return image


class UnstableOverSeeds(Oracle):
    """The side is what the caption says only with the record's own noise."""

    def see(self, one):
        subject, side = self.words(one.caption)
        if one.seed >= 1_000_000:
            side = OTHER[side]
        return self.picture(subject, side, self.light(one))


class AnyWordMoves(Oracle):
    """A word that it has not seen makes the subject step aside."""

    def see(self, one):
        subject, side = self.words(one.caption)
        return self.picture(subject, OTHER[side] if "picture" in one.caption else side, self.light(one))


@pytest.mark.parametrize(
    ("model", "expected", "advice"),
    [
        (TextIgnored, {"vision_swap", "text_edit"}, {"vision_swap": ["text path"], "text_edit": ["text path"]}),
        (
            VisionIgnored, {"memorisation", "vision_swap"},
            {"memorisation": ["vision path"], "vision_swap": ["vision path"]},
        ),
        (VisionDominating, {"vision_swap"}, {"vision_swap": ["text path", "vector"]}),
        (EditsIgnored, {"text_edit"}, {"text_edit": ["text path"]}),
        (WrongWay, {"text_edit"}, {"text_edit": ["directions", "--edit"]}),
        (LightMistaken, {"memorisation"}, {"memorisation": ["vision path", "light"]}),
        (UnstableUnderEdits, {"text_edit"}, {"text_edit": ["unstable pictures", "QK-norm"]}),
        (UnstableOverSeeds, {"text_edit"}, {"text_edit": ["the noise decides", "loss_by_time"]}),
        (AnyWordMoves, {"text_edit"}, {"text_edit": ["the set", "RMSNorm"]}),
        (NoiseDecides, {"memorisation", "vision_swap", "text_edit"}, {"memorisation": ["the noise decides"]}),
        (Untrained, {"memorisation", "vision_swap", "text_edit"}, {"memorisation": ["pictures of nothing", "noise"]}),
        (Grey, {"memorisation", "vision_swap", "text_edit"}, {"text_edit": ["plain pictures", "%"]}),
        (MeanOfAll, {"memorisation", "vision_swap", "text_edit"}, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_a_broken_model_fails_where_it_is_broken(model, expected, advice):
    found = verdicts(model(ALBUM))
    assert failed(found) == expected, {name: verdict.reasons for name, verdict in found.items()}
    for name, verdict in found.items():
        assert bool(verdict.advice) == bool(verdict.reasons) == (name in expected)
    for name, (cause, *words) in advice.items():
        lines = [line for of, line in zip(found[name].causes, found[name].advice, strict=True) if of == cause]
        assert lines and re.search(naming(*words), " ".join(lines)), (found[name].causes, found[name].advice)


def test_grey_and_noise_score_nothing_at_all_in_the_edit():
    for model in (Grey, Untrained):
        verdict = verdicts(model(ALBUM))["text_edit"]
        assert verdict.value == 0 and verdict.numbers["not_measurable"] == 1
        assert verdict.numbers["effect_median"] == 0


def test_moving_pictures_of_something_else_score_nothing():
    """The subject moves as it should, but it is another subject before another backdrop: not the scene asked for."""

    class SomeoneElse(Oracle):
        def see(self, one):
            subject, side = self.words(one.caption)
            order = ["fox", "teapot", "lighthouse", "cactus", "fox"]
            return self.picture(order[order.index(subject) + 1], side, self.light(one))

    verdict = verdicts(SomeoneElse(ALBUM))["text_edit"]
    assert not verdict.passed and verdict.value == 0 and verdict.numbers["not_measurable"] == 1


def test_the_advice_tells_the_text_path_from_the_vision_path():
    """Both lose four pictures in five; which condition is lost is seen in what is drawn instead."""

    class CaptionLost(Oracle):
        def see(self, one):
            return self.picture("fox", "left", self.light(one))

    for model, right, wrong in (
        (CaptionLost, "text path", "vision path"),
        (VisionIgnored, "vision path", "text path"),
    ):
        causes = verdicts(model(ALBUM))["memorisation"].causes
        assert right in causes and wrong not in causes, causes


def test_a_run_whose_loss_still_falls_is_told_to_go_on():
    found = verdicts(Untrained(ALBUM), loss=FALLING)
    assert "not trained to the end" in found["memorisation"].causes
    assert "little trained" in verdicts(Untrained(ALBUM), loss=[])["memorisation"].causes


@pytest.fixture(scope="module")
def untrained():
    return measured(Untrained(ALBUM))


def test_advice_stands_once_under_its_cause_with_the_tests_that_it_explains(untrained):
    (cause,) = by_cause(advise(*untrained, FLAT))
    assert (cause.name, cause.tests) == ("pictures of nothing", ("memorisation", "vision swap", "text edit"))
    (text,) = by_cause(list(verdicts(TextIgnored(ALBUM)).values()))
    assert text.name == "text path" and text.tests == ("vision swap", "text edit")
    assert text.lines.count(LOOK["text path"]) == 1 and text.lines[-1] == LOOK["text path"]
    causes = by_cause(list(verdicts(NoiseDecides(ALBUM)).values()))
    lines = [line for cause in causes for line in cause.lines]
    assert lines and len(lines) == len(set(lines))


def logged(losses, **more) -> list[dict]:
    return [{"step": 10 * k, "loss": loss} | more for k, loss in enumerate(losses, start=1)]


LEARNED = np.linspace(1, 0.1, 60).tolist() + [0.1] * 40


@pytest.mark.parametrize(
    ("log", "planned", "cause", "words"),
    [
        (logged(LEARNED), 5000, "not trained to the end", [1000, 5000]),
        (logged(LEARNED[:40]), 400, "not trained to the end", ["falls"]),
        (logged([]), 1000, "little trained", ["config.log.every"]),
        (logged([*LEARNED, *[0.9] * 30]), 1300, "learning rate", ["0.100", "0.900", "optim.lr"]),
        (
            [*logged(LEARNED), {"step": 1001, "health/diverged": "step 1001: lost"}, *logged([0.9] * 130)[100:]],
            1300,
            "learning rate",
            ["step 1001: lost"],
        ),
        (logged([1.0] * 100, velocity_rms_ratio=0.0003), 1000, "collapse", ["velocity_rms_ratio", 0.0003]),
        (
            logged(LEARNED, **{"gradient_norm_by_group/text_embed": 0.0, "gradient_norm_by_group/null_text": 0.0}),
            1000,
            "no gradient",
            ["text_embed"],
        ),
        (logged(LEARNED, skipped=2.0), 1000, "broken numbers", [50, "micro-batches"]),
        (logged(LEARNED, **{"heldout_loss": 0.5, "short_ema/heldout_loss": 0.3}), 1000, "the EMA lags", ["0.3000"]),
        (logged(LEARNED), 1000, "pictures of nothing", ["0.916", "0.100", "EMA"]),
        (logged([1.0] * 100), 1000, "pictures of nothing", ["1.000", "learning rate"]),
    ],
)  # fmt: skip
def test_what_the_log_knows_is_told(untrained, log, planned, cause, words):
    step = log[-1]["step"] if log else planned
    later = {"step": step + 10, "loss": 9.0}  # training has gone on since these weights
    found = {found.name: found for found in by_cause(advise(*untrained, [*log, later], step, planned))}
    assert re.search(naming(*words), " ".join(found[cause].lines)), found
    assert "null_text" not in " ".join(found[cause].lines)
    assert found[cause].tests == ("memorisation", "vision swap", "text edit")
    if cause in (
        "collapse",
        "learning rate",
        "not trained to the end",
    ):  # reason enough: nothing is guessed beside it
        assert len(found["pictures of nothing"].lines) == 1


# ------------------------------------------------------------------------------------------ controls


def test_the_shuffle_is_what_catches_a_model_that_follows_the_noise():
    """Memorised by seed: full marks in retrieval, and the control must say no."""

    class Seed(Oracle):
        def see(self, one):
            return self.album.truths[one.seed]

    verdict = Memorisation.plan(ALBUM).measure(Seed(ALBUM))
    assert verdict.value == 1 and not verdict.passed
    assert verdict.controls[0].value == 1 and "control failed" in verdict.reasons[0]


def test_the_random_vector_is_what_catches_a_light_that_is_not_the_vectors():
    """B's light by the caption alone: impossible for a model, easy for a test that draws the wrong thing."""
    plan = Swap.plan(ALBUM, 60)
    light_of = {a.key: ALBUM.places[b][1] for a, (_, b) in zip(plan.swapped, plan.pairs)}
    light_of |= {a.key: ALBUM.places[b][1] for a, (_, b) in zip(plan.random, plan.pairs)}

    class Clairvoyant(Oracle):
        def light(self, one):
            return int(light_of.get(one.key, "l0")[1:])

    verdict = plan.measure(Clairvoyant(ALBUM))
    assert verdict.value == 1 and not verdict.passed
    assert [control.passed for control in verdict.controls] == [True, False]


def test_bs_own_caption_is_what_catches_a_structure_that_is_not_the_captions():
    """A's structure comes from A's noise: the swap looks right, and B's own caption changes nothing."""

    class NoiseStructure(Oracle):
        def see(self, one):
            return self.picture(*self.words(self.album.caption(one.seed)), self.light(one))

    verdict = Swap.plan(ALBUM, 60).measure(NoiseStructure(ALBUM))
    assert verdict.value == 1 and not verdict.passed
    assert [control.passed for control in verdict.controls] == [False, True]


# ------------------------------------------------------------------------------------------ too little to judge


def test_too_small_a_set_is_not_passed():
    tiny = album(subjects=("fox",), lights=3)
    found = verdicts(Oracle(tiny), of=tiny)
    assert failed(found) == {"memorisation", "vision_swap", "text_edit"}
    assert f"at least {memorisation.MIN_PICTURES}" in found["memorisation"].reasons[0]
    assert f"at least {swap.MIN_PAIRS}" in found["vision_swap"].reasons[0]
    assert f"at least {edit.MIN_CASES}" in found["text_edit"].reasons[0]


def test_a_set_in_one_light_has_nothing_to_swap():
    dim = album(lights=1)
    found = verdicts(Oracle(dim), of=dim)
    assert "vision_swap" in failed(found)
    assert found["vision_swap"].numbers["pairs"] < swap.MIN_PAIRS


def test_the_same_picture_twice_in_a_set_is_not_held_against_the_model():
    """Under two captions, so that the model cannot but draw one picture; either original counts."""
    twin = dataclasses.replace(ALBUM.records[0], key="twin.png", caption="portrait of a vixen, looking left")
    doubled = Album((*ALBUM.records, twin), (*ALBUM.truths, ALBUM.truths[0]), ALBUM.patch)

    class Twins(Oracle):
        def words(self, text):
            return super().words(text.replace("vixen", "fox"))

    verdict = Memorisation.plan(doubled).measure(Twins(ALBUM))
    assert verdict.passed and verdict.value == 1 and verdict.numbers["twins"] == 2
    assert Memorisation.plan(ALBUM).measure(Oracle(ALBUM)).numbers["twins"] == 0


def test_a_set_whose_captions_name_one_picture_each_is_told_so():
    """Then the caption says all, the light included, and a model that never looks at the vector memorises well."""
    renamed = [
        dataclasses.replace(ALBUM.records[i], caption=f"{ALBUM.caption(i)} number {i}") for i in range(len(ALBUM))
    ]
    distinct = Album(tuple(renamed), ALBUM.truths, ALBUM.patch)

    class CaptionIsAll(Oracle):
        def see(self, one):
            return ALBUM.truths[int(re.search(r"number (\d+)$", one.caption)[1])]

    remembered = Memorisation.plan(distinct).measure(CaptionIsAll(distinct))
    assert remembered.passed
    swapped = Swap.plan(distinct, 60).measure(CaptionIsAll(distinct))
    assert not swapped.passed and swapped.numbers["tone_of_b"] < 0.1 and swapped.numbers["shared_captions"] == 0
    advised = advise(remembered, swapped, verdicts(Oracle(ALBUM))["text_edit"], FLAT)[1]
    assert "text in flow.drop" in dict(zip(advised.causes, advised.advice, strict=True))["the set"]


def test_without_known_answers_the_verdict_stands_and_says_less():
    strange = Album(ALBUM.records, ALBUM.truths, ALBUM.patch, keys=r"(?P<composition>x)(?P<lighting>y)")
    oracle = Oracle(ALBUM)
    found = verdicts(oracle, of=strange)
    assert failed(found) == set()
    assert found["vision_swap"].numbers["true_answers_known"] == 0
    assert found["text_edit"].numbers["calibration"] == {}


def test_where_the_measure_itself_is_wrong_the_edit_cannot_pass():
    """Words that move nothing in the true pictures, given as if they moved the subject."""
    from fluxdit_jax.shared.edit_rules import Rule

    backwards = Rule("looking left", "looking right", "left")
    plan = Edit.plan(ALBUM, [backwards], ("portrait of", "picture of"), 20, encode_words)
    verdict = plan.measure(Oracle(ALBUM))
    assert not verdict.passed and verdict.value == 0
    assert any("itself" in reason for reason in verdict.reasons)
