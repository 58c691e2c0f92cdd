"""What the log says of a run, and which cause is named for which numbers: at each limit."""

import dataclasses
import re

import pytest

from fluxdit_jax.gate.advice import LOOK, advise, by_cause
from fluxdit_jax.gate.noise_levels import NoiseLevels
from fluxdit_jax.gate.training import read_training
from fluxdit_jax.gate.verdict import Control, Verdict, not_judged


def logged(losses, **more) -> list[dict]:
    return [{"step": 10 * k, "loss": loss} | more for k, loss in enumerate(losses, start=1)]


def seven(mean: float, backwards: bool = False) -> list[float]:
    """Losses of this mean, of which no six have it: an eighth of 56."""
    losses = [mean - 0.75, *[mean + 0.125] * 6]
    return losses[::-1] if backwards else losses


def found(log, step=None, planned=None) -> dict[str, str]:
    return dict(read_training(log, step, planned).findings)


# ------------------------------------------------------------------------------------------ the log


def test_a_curve_of_eight_losses_says_something():
    assert found(logged([1.0] * 8)) == {} and not read_training(logged([1.0] * 8)).explains
    few = read_training(logged([1.0] * 7))
    assert few.explains and (few.first, few.last) == (None, None)
    ((cause, text),) = few.findings
    assert cause == "little trained" and "7" in text and "config.log.every" in text
    assert found([]).keys() == {"little trained"}
    assert found([*logged([1.0] * 8), {"step": 90, "loss": None}, {"step": 100}]) == {}


def test_first_and_last_are_the_means_of_an_eighth():
    training = read_training(logged([*seven(5, True), *[3] * 42, *seven(2)]))
    assert (training.first, training.last) == (5, 2)
    training = read_training(logged([5, *[3] * 6, 2]))
    assert (training.first, training.last) == (5, 2)


def test_only_what_was_logged_up_to_the_weights_counts():
    log = logged([1.0] * 8) + [{"step": 90, "loss": 9.0, "skipped": 3.0}]
    assert found(log, step=80) == {} and read_training(log, step=80).last == 1
    assert found(log, step=79).keys() == {"little trained"}
    assert "broken numbers" in found(log) and read_training(log).last == 9


@pytest.mark.parametrize(
    ("step", "planned", "unfinished"),
    [(990, 1000, True), (1000, 1000, False), (1010, 1000, False), (990, None, False), (None, 1000, False)],
)
def test_weights_of_before_the_planned_end(step, planned, unfinished):
    training = read_training(logged([1.0] * 99), step, planned)
    assert training.explains == unfinished
    assert [cause for cause, _ in training.findings] == ["not trained to the end"] * unfinished
    if unfinished:
        assert all("990" in text and "1,000" in text and "falls" not in text for _, text in training.findings)


@pytest.mark.parametrize(("last", "falls"), [(1.49, True), (1.5, False)])
def test_a_loss_that_still_falls(last, falls):
    """The last eighth of the losses is compared with that of a quarter before."""
    log = logged([*[9.0] * 35, *seven(2.0), *[5.0] * 7, *seven(last)])
    told = found(log)
    assert (told.keys() == {"not trained to the end"}) == falls
    assert all("2.000" in text and "1.490" in text for text in told.values())
    assert ("falls" in found(log, 560, 1000)["not trained to the end"]) == falls
    assert "falls" not in found(logged([1.0] * 7), 70, 1000)["not trained to the end"]


@pytest.mark.parametrize(
    ("first", "low", "last", "lost"),
    [
        (1.0, 0.5, 0.75, True),  # half of what was gained
        (1.0, 0.5, 0.74, False),
        (1.0, 0.5, 1.5, True),
        (20.0, 19.0, 21.0, True),  # a twentieth was gained
        (20.0, 19.1, 21.0, False),
        (1.0, 0.5, 0.5, False),
    ],
)
def test_what_was_learned_may_be_lost(first, low, last, lost):
    """By eighths: the lowest is that from the 20th to the 26th."""
    between = [(first + low) / 2] * 23
    log = logged([*seven(first, True), *between[:12], *[low] * 7, *between, *seven(last)])
    told = found(log)
    assert ("learning rate" in told) == lost
    if lost:
        for number in (f"{low:.3f}", f"{last:.3f}", "step 260 "):
            assert number in told["learning rate"]
        assert read_training(log).explains


def test_eight_losses_tell_that_it_is_lost_and_the_run_is_quoted():
    lost = [1, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5, 1]
    log = logged(lost)
    assert "0.500 by step 30 and" in found(log)["learning rate"] and ":" in found(log)["learning rate"]
    assert "learning rate" not in found(log[1:])
    said = [
        *log[:5],
        {"step": 51, "health/spiked": "step 51: jumped"},
        {"step": 52, "health/diverged": "step 52: gone"},
        {"step": 53, "health/broken": "step 53: broken"},
        {"step": 54, "health/collapsed": "step 54: sinks"},
        *log[5:],
    ]
    assert re.findall(r"step 5\d: \w+", found(said)["learning rate"]) == ["step 53: broken"]
    assert found(log)["learning rate"] == found(said)["learning rate"].split(" The run said")[0]


@pytest.mark.parametrize(
    ("ratios", "collapsed"),
    [
        ([0.1, 0.1, 0.1], True),
        ([0.1, 0.1], False),
        ([0.9, 0.1, 0.1, 0.9], True),
        ([0.1, 0.9, 0.9, 0.1], False),
        ([0.3, 0.3, 0.3], False),
        ([0.29, 0.29, 0.29], True),
    ],
)
def test_a_weak_prediction_is_a_collapse(ratios, collapsed):
    log = logged([1.0] * 20)
    for entry, ratio in zip(log[-len(ratios) :], ratios):
        entry["velocity_rms_ratio"] = ratio
    assert (found(log).keys() == {"collapse"}) == collapsed
    assert all(f"{min(ratios)}" in text for text in found(log).values())


def test_parts_without_gradient_are_named():
    norms = {"b": [0, 0, 0, 0], "a": [1, 0, 0, 0], "well": [1, 0, 0, 1], "null_text": [0, 0, 0, 0], "new": [0, 0]}
    log = logged([1.0] * 20, skipped=0.0)
    for name, values in norms.items():
        for entry, value in zip(log[-len(values) :], values):
            entry[f"gradient_norm_by_group/{name}"] = float(value)
    told = found(log)
    assert told.keys() == {"no gradient"} and " a, b " in told["no gradient"]
    assert read_training(log).explains


@pytest.mark.parametrize(
    ("count", "skipped", "told"),
    [
        (40, {31: 2.0, 40: 1.0}, 3),  # in the last ten of forty
        (40, {30: 2.0, 1: 5.0}, 0),
        (8, {6: 2.0}, 0),
        (8, {7: 2.0}, 2),
        (3, {2: 2.0}, 0),
        (3, {3: 2.0}, 2),
    ],
)
def test_skipped_batches_of_the_last_quarter_count(count, skipped, told):
    log = [entry | {"skipped": skipped.get(k, 0.0)} for k, entry in enumerate(logged([1.0] * count), start=1)]
    texts = found(log)
    assert ("broken numbers" in texts) == bool(told)
    assert not told or f"{told} micro-batches" in texts["broken numbers"]


@pytest.mark.parametrize(
    ("long", "short", "lags"), [(2.0, 1.95, True), (2.0, 1.96, False), (2.0, None, False), (None, 1.0, False)]
)
def test_a_short_average_that_is_better_by_a_fiftieth(long, short, lags):
    log = logged([1.0] * 20)
    log[4] |= {"heldout_loss": 9.0, "short_ema/heldout_loss": 1.0 if short else None}
    log[9] |= {"heldout_loss": long, "short_ema/heldout_loss": short}
    if long is None:
        log[4]["heldout_loss"] = None
    told = found(log)
    assert (told.keys() == {"the EMA lags"}) == lags and not read_training(log).explains
    assert all("2.0000" in text and "1.9500" in text for text in told.values())


# ------------------------------------------------------------------------------------------ the tests' numbers

FLAT = logged([1.0] * 8)
NUMBERS = {
    "memorisation": {
        "contrast": 1.0, "distance_to_the_nearest": 0.0, "usual_distance": 60.0, "roughness": 1.0, "retrieved": 0.95,
        "right_row": 0.95, "right_light": 0.95, "psnr_median_db": 30.0,
    },
    "vision_swap": {"right_row": 0.9, "right_light": 0.9, "retrieved": 0.8},
    "text_edit": {"right_row": 0.9, "right_light": 0.9, "retrieved": 0.9, "stayed": 0.0},
}  # fmt: skip
THRESHOLDS = {"memorisation": 0.99, "vision_swap": 0.8, "text_edit": 0.9}
RARE, OFTEN = Control("rare", "", 0.0, 0.5, at_most=True), Control("often", "", 1.0, 0.5, at_most=True)
ALL, NONE = Control("all", "", 1.0, 0.9, at_most=False), Control("none", "", 0.0, 0.9, at_most=False)
HALF = Control("half", "", 0.5, 0.9, at_most=False)
GOOD = {"memorisation": (RARE, ALL), "vision_swap": (RARE,), "text_edit": (ALL, ALL)}


def verdicts(failing: dict[str, dict], controls: dict[str, tuple[Control, ...]] = GOOD) -> list[Verdict]:
    """The three verdicts; those in `failing` failed, with these numbers changed."""
    return [
        Verdict(
            name, name.replace("_", " ").capitalize(), "?", 0.5, THRESHOLDS[name], "", numbers | failing.get(name, {}),
            (GOOD | controls)[name], ("why",) if name in failing else (), (),
        )
        for name, numbers in NUMBERS.items()
    ]  # fmt: skip


def causes(name: str, numbers: dict, controls: tuple[Control, ...] = ()) -> list[str]:
    given = {name: controls} if controls else {}
    told = {verdict.name: verdict for verdict in advise(verdicts({name: numbers}, given), FLAT)}
    assert all(verdict.advice == verdict.causes == () for other, verdict in told.items() if other != name)
    return list(dict.fromkeys(told[name].causes))


def test_pictures_that_are_mostly_recognised_are_of_the_set_and_unfinished():
    far = {"distance_to_the_nearest": 0.6, "usual_distance": 1.0}
    first, *others = verdicts({"memorisation": far})
    for value, cause in ((0.5, "pictures of nothing"), (0.86, "unfinished pictures")):
        (told, *_) = advise([dataclasses.replace(first, value=value), *others], FLAT)
        assert cause in told.causes


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, ["unfinished pictures"]),
        ({"retrieved": 1.0, "right_row": 1.0, "right_light": 1.0}, ["unfinished pictures"]),
        # Of the missed half 0.7 are 0.35.
        ({"retrieved": 0.5, "right_row": 0.86, "right_light": 0.5}, ["vision path"]),
        ({"retrieved": 0.5, "right_row": 0.85, "right_light": 0.5}, ["unfinished pictures"]),
        ({"retrieved": 0.5, "right_row": 0.5, "right_light": 0.86}, ["text path"]),
        ({"retrieved": 0.5, "right_row": 0.5, "right_light": 0.85}, ["unfinished pictures"]),
        ({"retrieved": 0.5, "right_row": 0.86, "right_light": 0.86}, ["vision path"]),
        # A few misses in another light name the vision path; a few of another photograph name nothing.
        ({"retrieved": 0.98, "right_row": 1.0, "right_light": 0.98}, ["vision path"]),
        ({"retrieved": 0.89, "right_row": 0.89, "right_light": 1.0}, ["text path"]),
        ({"retrieved": 0.91, "right_row": 0.91, "right_light": 1.0}, ["unfinished pictures"]),
        ({"retrieved": 0.5, "right_row": None, "right_light": None}, ["unfinished pictures"]),  # no grid
        ({"retrieved": 0.5, "right_light": 1.0, "right_row": 0.5, "psnr_median_db": 21.9},
         ["text path", "unfinished pictures"]),
        ({"retrieved": 0.5, "right_light": 1.0, "right_row": 0.5, "psnr_median_db": 22}, ["text path"]),
        ({"psnr_median_db": None}, ["unfinished pictures"]),  # all of another size
    ],
)  # fmt: skip
def test_causes_of_bad_memory(numbers, expected):
    assert causes("memorisation", numbers) == expected


def test_a_memory_that_follows_the_noise_or_is_blurred():
    for controls in ((OFTEN, ALL), (RARE, NONE)):
        assert causes("memorisation", {}, controls) == ["the noise decides"]
    (told, *_) = advise(verdicts({"memorisation": {"psnr_median_db": 21.9}}), FLAT)
    assert "21.9" in told.advice[0]
    (told, *_) = advise(verdicts({"memorisation": {"psnr_median_db": 22}}), FLAT)
    assert "22" not in told.advice[0]


@pytest.mark.parametrize(
    ("numbers", "control", "expected"),
    [
        ({}, RARE, ["conditions tied together"]),
        ({"right_row": 0.84}, RARE, ["text path"]),
        ({"right_light": 0.84}, RARE, ["vision path"]),
        ({"right_row": 0.84, "right_light": 0.84}, RARE, ["text path", "vision path"]),
        ({"right_row": 0.85, "right_light": 0.85, "retrieved": 0.79}, RARE, ["conditions tied together"]),
        ({"retrieved": 0.79, "right_row": 0.84}, RARE, ["text path"]),
        ({}, OFTEN, ["vision path"]),
        ({"retrieved": 0.79}, OFTEN, ["conditions tied together", "vision path"]),
    ],
)
def test_causes_of_a_bad_swap(numbers, control, expected):
    assert causes("vision_swap", numbers, (control,)) == expected


@pytest.mark.parametrize(("retrieved", "pairs"), [(0.8, True), (0.79, False)])
def test_where_too_little_was_asked_for_more_is_asked_for(retrieved, pairs):
    """Its share is high enough, and yet it failed: there were too few."""
    told = advise(
        verdicts({"vision_swap": {"retrieved": retrieved}, "text_edit": {"retrieved": retrieved + 0.1}}), FLAT
    )
    assert ("--pairs" in told[1].advice[0], "--edits" in told[2].advice[0]) == (pairs, pairs)


@pytest.mark.parametrize(
    ("numbers", "controls", "expected"),
    [
        ({}, (ALL, ALL), ["conditions tied together"]),
        ({"stayed": 0.16}, (ALL, ALL), ["text path"]),
        ({"stayed": 0.15, "right_row": 0.85}, (ALL, ALL), ["conditions tied together"]),
        ({"stayed": 0.16, "right_row": 0.5}, (ALL, ALL), ["text path"]),
        ({"stayed": 0.15, "right_row": 0.84}, (ALL, ALL), ["unstable pictures"]),
        ({"right_light": 0.84}, (ALL, ALL), ["vision path"]),
        ({"right_light": 0.85, "retrieved": 0.89}, (ALL, ALL), ["conditions tied together"]),
        ({"stayed": 1.0, "right_row": 0.0, "right_light": 0.0}, (ALL, ALL), ["text path", "vision path"]),
        ({}, (NONE, ALL), ["the noise decides"]),
        ({}, (ALL, NONE), ["captions taken as a whole"]),
        ({"stayed": 0.5}, (HALF, NONE), ["text path", "the noise decides", "captions taken as a whole"]),
    ],
)
def test_causes_of_a_bad_edit(numbers, controls, expected):
    assert causes("text_edit", numbers, controls) == expected


def test_what_is_not_judged_is_the_sets_fault_whatever_the_training():
    unjudged = [not_judged(name, name, "?", 0.8, "which is no grid", 0) for name in ("vision swap", "text edit")]
    for log in (FLAT, []):
        (first, *told) = advise([verdicts({})[0], *unjudged], log)
        assert first.advice == ()
        for verdict in told:
            assert verdict.causes == ("the set", "the set") and verdict.advice[1] == LOOK["the set"]
    (cause,) = by_cause(told)
    assert (cause.name, cause.tests) == ("the set", ("vision swap", "text edit"))
    assert len(cause.lines) == 3 and cause.lines[-1] == LOOK["the set"] and "preprocess subset" in cause.lines[-1]


PLAIN, NOTHING = {"contrast": 0.29}, {"distance_to_the_nearest": 30.1}


@pytest.mark.parametrize(
    ("numbers", "cause"),
    [
        (PLAIN, "plain pictures"),
        (NOTHING, "pictures of nothing"),
        (PLAIN | NOTHING, "plain pictures"),
        ({"contrast": 0.3, "distance_to_the_nearest": 30.0}, None),  # half of what two of the set are apart
    ],
)
def test_pictures_that_show_nothing_are_the_cause_of_all(numbers, cause):
    failing = {"memorisation": numbers, "vision_swap": {"retrieved": 0.0}, "text_edit": {"retrieved": 0.0}}
    told = advise(verdicts(failing), FLAT)
    if cause is None:
        assert not {"plain pictures", "pictures of nothing"} & {name for verdict in told for name in verdict.causes}
    else:
        assert [set(verdict.causes) for verdict in told] == [{cause}] * 3
        (only,) = by_cause(told)
        assert only.tests == ("memorisation", "vision swap", "text edit") and len(only.lines) == 2


@pytest.mark.parametrize(("roughness", "noise"), [(1.5, False), (1.6, True)])
def test_rough_pictures_of_nothing_are_noise(roughness, noise):
    told = advise(verdicts({"memorisation": NOTHING | {"roughness": roughness}}), FLAT)[0]
    assert ("noise" in told.advice[0]) == noise


@pytest.mark.parametrize(("last", "learned"), [(1.4, True), (1.5, False), (0.4, True)])
def test_a_loss_that_has_come_down_points_away_from_training(last, learned):
    """By 30 %: at what lies between the weights and the picture, and otherwise at the learning rate."""
    told = advise(verdicts({"memorisation": NOTHING}), logged([2.0, *[last] * 7]))[0]
    _, line = told.advice
    assert ("EMA" in line, "learning rate" in line) == (learned, not learned)
    assert "2.000" in line and f"{last:.3f}" in line


@pytest.mark.parametrize(("log", "planned"), [(FLAT, 100), (FLAT[1:], None)])
@pytest.mark.parametrize("numbers", [PLAIN, NOTHING])
def test_where_the_training_explains_it_nothing_is_guessed(numbers, log, planned):
    """Not trained to the end, or too few losses."""
    told = advise(verdicts({"memorisation": numbers}), log, 80, planned)[0]
    assert len(told.advice) == 2 and len(set(told.causes)) == 2
    assert told.causes[0] == read_training(log, 80, planned).findings[0][0]


def test_what_to_look_at_ends_the_lines_of_its_cause():
    """The lines of a cause stand together, in the order in which the causes were met."""
    told = advise(verdicts({"vision_swap": {"right_row": 0.5, "right_light": 0.5}}, {"vision_swap": (OFTEN,)}), FLAT)[1]
    assert told.causes == ("text path",) * 2 + ("vision path",) * 3
    assert (told.advice[1], told.advice[4]) == (LOOK["text path"], LOOK["vision path"])
    assert len(set(told.advice)) == 5


def test_the_cause_behind_most_tests_comes_first():
    failing = {"vision_swap": {"right_light": 0.5, "right_row": 0.5}, "text_edit": {"stayed": 0.5}}
    remembered = {"memorisation": {"retrieved": 0.5, "right_row": 0.9, "right_light": 0.5}}
    vision, text = by_cause(advise(verdicts(remembered | failing), FLAT))
    assert (vision.name, vision.tests) == ("vision path", ("memorisation", "vision swap"))
    assert (text.name, text.tests) == ("text path", ("vision swap", "text edit"))
    text, vision = by_cause(advise(verdicts(failing), FLAT))
    assert (text.name, text.tests) == ("text path", ("vision swap", "text edit"))
    assert (vision.name, vision.tests) == ("vision path", ("vision swap",))
    assert len(text.lines) == 3 and text.lines[-1] == LOOK["text path"]
    failing = {"memorisation": {}, "vision_swap": {"right_row": 0.5}, "text_edit": {"stayed": 0.5}}
    assert [cause.name for cause in by_cause(advise(verdicts(failing), FLAT))] == ["text path", "unfinished pictures"]


@pytest.mark.parametrize(
    ("share", "shift", "keys"),
    [
        (0.0016, 20.1, "--config.flow.uniform_share=1 --config.flow.shift=6,"),
        (0.0119, 9.6, "Train with --config.flow.shift=10,"),
        (0.06, 5.0, None),
    ],
)
def test_a_time_shift_that_hardly_teaches_the_light_comes_first(share, shift, keys):
    numbers = {"retrieved": 0.81, "right_light": 0.81}
    levels = NoiseLevels(time=0.9896, share=share, shift=shift, uniform_shift=6.07)
    told = advise(verdicts({"memorisation": numbers}), FLAT, levels=levels)[0]
    assert (told.causes[0] == "time shift") == (keys is not None)
    if keys is not None:
        assert f"{100 * share:.2g} %" in told.advice[0] and "0.990" in told.advice[0] and keys in told.advice[0]
