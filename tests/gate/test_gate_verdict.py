"""A verdict and its controls, what cannot be judged, and shares in words."""

import numpy as np
import pytest

from fluxdit_jax.gate.verdict import Case, Control, Verdict, failed_controls, grade, not_judged, percent


@pytest.mark.parametrize(
    ("value", "at_most", "passed"),
    [
        (0.5, True, True), (0.5, False, True), (0.51, True, False), (0.51, False, True), (0.49, True, True),
        (0.49, False, False), (float("nan"), True, False), (float("nan"), False, False),
    ],
)  # fmt: skip
def test_a_control_passes_up_to_its_bound_and_on_it(value, at_most, passed):
    control = Control("other noise", "it stands still", value, 0.5, at_most)
    assert control.passed is passed and control.to_json()["passed"] is passed
    assert control.to_json()["bound"] == 0.5 and control.to_json()["name"] == "other noise"
    reasons = failed_controls((control, control))
    assert len(reasons) == (0 if passed else 2)
    for reason in reasons:
        assert "other noise" in reason and "50 %" in reason and ("at most" if at_most else "at least") in reason


def test_a_verdict_passes_without_reasons_and_is_written_without_pictures():
    case = Case("a fox", "12 dB", 12.0, True, (("original", np.zeros((8, 8, 3), np.uint8)),))
    control = Control("c", "m", 1.0, 0.5, at_most=True)
    verdict = Verdict("x", "X", "?", 0.9, 0.8, "nine of ten", {"pairs": 1}, (control,), (), (case,))
    failed = Verdict("x", "X", "?", 0.9, 0.8, "nine of ten", {}, (), ("why",), (), advice=("look",))
    assert verdict.passed is True and failed.passed is False
    written = verdict.to_json()
    assert (written["passed"], written["value"], written["threshold"], written["numbers"]) == (
        True,
        0.9,
        0.8,
        {"pairs": 1},
    )
    assert written["cases"] == [{"label": "a fox", "note": "12 dB", "score": 12.0, "passed": True}]
    assert written["controls"] == [control.to_json()]
    assert (failed.to_json()["passed"], failed.to_json()["reasons"], failed.to_json()["advice"]) == (
        False,
        ["why"],
        ["look"],
    )
    assert written["judged"] is True and (grade(verdict), grade(failed)) == ("pass", "FAIL")


def test_the_picture_that_is_judged_is_the_last():
    shown = tuple((title, np.full((8, 8, 3), level, np.uint8)) for title, level in (("original", 1), ("drawn", 2)))
    assert (Case("", "", 0.0, True, shown).drawn == 2).all()


def test_what_cannot_be_judged_has_neither_passed_nor_failed():
    verdict = not_judged("vision_swap", "Vision swap", "?", 0.8, "which is no grid", left_out=0)
    assert not verdict.passed and not verdict.judged and grade(verdict) == "not judged"
    assert "which is no grid" in verdict.reasons[0] and "preprocess subset" in verdict.reasons[0]
    assert "preprocess subset" in verdict.statement
    written = verdict.to_json()
    assert (written["passed"], written["judged"], written["value"], written["cases"]) == (False, False, 0, [])
    assert written["threshold"] == 0.8 and written["controls"] == [] and written["numbers"] == {}
    limited = not_judged("vision_swap", "Vision swap", "?", 0.8, "which is no grid", left_out=80)
    for told in (limited.statement, *limited.reasons):
        assert "--limit" in told and "80" in told and "subset" not in told


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1, "100 %"), (0, "0 %"), (0.5, "50 %"), (0.934, "93.4 %"), (0.9996, "100 %"), (0.109375, "10.9 %"),
        (-0.05, "-5 %"), (0.0005, "0.1 %"), (0.0004, "0 %"), (float("nan"), "nan %"),
    ],
)  # fmt: skip
def test_percent(share, text):
    assert percent(share) == text
