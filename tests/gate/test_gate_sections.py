"""The parts of the report page, for verdicts and reports written by hand."""

import base64
import copy
import io
import re

import numpy as np
import pytest
from gate_pictures import plain
from gate_scenes import Oracle, eval_set, measured
from PIL import Image, JpegImagePlugin

from fluxdit_jax.gate.page import NAMES, page, write_page
from fluxdit_jax.gate.verdict import Case, Control, Verdict, not_judged
from fluxdit_jax.pages.charts import Chart

REPORT = {
    "passed": True,
    "weights": {"ema_step": 1500, "workdir": "/runs/fox", "digest": "abc"},
    "model": {"parameters": 2_500_000, "width": 48, "depth": 2, "heads": 3, "family": {"patch": 2}},
    "dataset": {
        "path": "data/set", "name": "set", "records": 40, "format_version": 1, "resolution": 64,
        "shards_sha256": [f"{k}" * 64 for k in range(1, 10)], "pictures_tested": 30, "drawn_portraits": 0,
    },
    "sampling": {"method": "rk3", "steps": 6, "network_evaluations": 1800, "seed": 0},
    "encoders": {"vae": {"id": "dct", "revision": "1", "width": 16, "sha256": "ef" * 32}},
    "device": "cpu", "seconds": {"total": 12.5}, "made": "2026-11-24",
}  # fmt: skip


def case(number: int = 0, passed: bool = True, pictures: int = 2, size=(8, 8)) -> Case:
    shown = tuple((f"title {k}", plain((20 * number % 256, 100 * k, 50), *size)) for k in range(pictures))
    return Case(f"case {number}", f"note {number}", float(number), passed, shown)


def verdict(name="text_edit", title="Text edit", value=0.5, reasons=(), **more) -> Verdict:
    values = {"question": "?", "threshold": 0.8, "statement": "s", "numbers": {}, "controls": (), "cases": (case(),)}
    return Verdict(name=name, title=title, value=value, reasons=reasons, **(values | more))


def html(*verdicts: Verdict, log=(), sheet=None, **changes) -> str:
    return page(list(verdicts), REPORT | changes, list(log), sheet)


def images(text: str) -> list[Image.Image]:
    """Of the page; without a sheet the first two are the wall."""
    return [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r"base64,([^\"]+)", text)]


def rows(numbers: dict) -> list[tuple[str, str, str]]:
    """(name, class, value) of each row of the table of numbers."""
    table = re.search(r"<h3>Numbers</h3><table>(.*?)</table>", html(verdict(numbers=numbers)))[1]
    return re.findall(r'<tr><td>(.*?)</td><td class="(.*?)">(.*?)</td></tr>', table)


# ------------------------------------------------------------------------------------------ the whole


def test_the_verdict_stands_on_top_and_tests_are_numbered():
    tests = [verdict("memorisation", "Memorisation"), verdict("vision_swap", "Vision swap", reasons=("why it is",))]
    good, bad = html(tests[0]), html(*tests, passed=False)
    assert '<header class="good"><p class="stamp">PASS</p>' in good and "<title>PASS: validation of fox" in good
    assert '<header class="bad"><p class="stamp">FAIL</p>' in bad and "<title>FAIL: validation of fox" in bad
    assert "vision swap" not in re.search("<h1>(.*?)</h1>", good)[1].lower()
    assert re.search("<h1>(.*?)</h1>", bad)[1].endswith(": vision swap.")
    assert re.findall(r'<span class="mark (\w+)">(\w+)</span> (\d\. [\w ]+)</h2>', bad) == [
        ("good", "pass", "1. Memorisation"), ("bad", "fail", "2. Vision swap"),
    ]  # fmt: skip
    assert re.findall(r'<a class="card (\w+)" href="#(\w+)">', bad) == [
        ("good", "memorisation"),
        ("bad", "vision_swap"),
    ]
    assert ("<li>why it is</li>" in bad, bad.count("<li>"), good.count("<li>")) == (True, 1, 0)
    assert 'nav class="cards"><a' in bad and "</a></nav>" in bad


def test_what_was_not_judged_is_neither_good_nor_bad():
    good, bad = verdict("memorisation", "Memorisation"), verdict("memorisation", "Memorisation", reasons=("why",))
    open_ = [not_judged("text_edit", "Text edit", "?", 0.9, "which is no grid")]
    text = html(good, *open_, passed=False)
    assert '<header class="open"><p class="stamp">NOT JUDGED</p>' in text
    assert "<title>NOT JUDGED: validation of fox" in text
    assert re.search("<h1>(.*?)</h1>", text)[1].endswith(": text edit.")
    assert re.findall(r'<a class="card (\w+)" href.*?<p class="big">(.*?)</p>', text) == [
        ("good", "50 %"), ("open", "not judged"),
    ]  # fmt: skip
    assert re.findall(r'<span class="mark (\w+)">([\w ]+)</span> (\d\.)', text) == [
        ("good", "pass", "1."), ("open", "not judged", "2."),
    ]  # fmt: skip
    assert "Why it is not judged" in text and "which is no grid" in text and "Why it failed" not in text
    failed = html(bad, *open_, passed=False)  # one that failed is the verdict
    assert '<header class="bad"><p class="stamp">FAIL</p>' in failed
    assert re.search("<h1>(.*?)</h1>", failed)[1].endswith(": memorisation.")


def test_what_was_validated_is_told():
    text = html(verdict())
    for words in (
        "EMA of step 1,500 of /runs/fox", "2.5 M parameters", "rk3 in 6 steps", "40 pictures of data/set",
        "EMA of step 1,500, digest abc", "1,800 (seed 0)", "total 12.5 s", "dct 1 (width 16, sha256 efefefefefefefef)",
        ", ".join(f"{k}" * 16 for k in range(1, 9)), "30 of 40 tested<", "set, format version 1, 64 px",
    ):  # fmt: skip
        assert words in text, words
    assert "9999" not in text  # the ninth shard
    older = html(
        verdict(), weights=REPORT["weights"] | {"digest": ""}, dataset=REPORT["dataset"] | {"drawn_portraits": None}
    )
    assert "digest not known" in older and "40 in the set<" in older
    assert ", 7 of them drawn portraits" in html(verdict(), dataset=REPORT["dataset"] | {"drawn_portraits": 7})


def test_the_page_is_written_into_a_new_folder_and_again(tmp_path):
    path = tmp_path / "run" / "validation" / "report.html"
    for _ in range(2):
        write_page([verdict()], copy.deepcopy(REPORT), [], None, path)
        assert path.read_text(encoding="utf-8") == html(verdict())


# ------------------------------------------------------------------------------------------ one test


@pytest.mark.parametrize(("value", "width"), [(0.5, "50.0"), (1.2, "100.0"), (-0.1, "0.0"), (0.004, "0.4")])
def test_the_gauge_ends_at_the_value_and_marks_the_threshold(value, width):
    assert re.search(r'<i style="width:(.*?)%"></i><b style="left:(.*?)%"', html(verdict(value=value))).groups() == (
        width, "80.0",
    )  # fmt: skip


def test_controls_stand_with_their_bounds():
    controls = (Control("one", "m", 0.1, 0.2, at_most=True), Control("two", "m", 0.1, 0.2, at_most=False))
    text = html(verdict(controls=controls))
    found = re.findall(
        r'<span class="mark (\w+)">(\w+)</span></td><td>(\w+)<small>m</small></td><td class="number">(.*?)</td>'
        r"<td>(.*?)</td>",
        text,
    )
    assert found == [("good", "ok", "one", "10 %", "at most 20 %"), ("bad", "failed", "two", "10 %", "at least 20 %")]
    assert "<h3>Controls</h3><table><tr>" in text and "</tr></table>" in text
    assert "Controls" not in html(verdict())


def test_numbers_are_written_by_what_they_are():
    found = rows({
        "retrieved": 0.934, "rank_median": 1.5, "questions": 40, "psnr_median_db": 31.26, "margin_median": 12.3456,
        "unheard_of": 2.0, "psnr_worst_db": None, "right_row": None, "by_light": {"dim": 0.5, "warm": 1.0},
        "guidance": {1.0: 0.25, 1.5: 1.0},
    })  # fmt: skip
    values = ["93.4 %", "1.5", "40", "31.3 dB", "12.3", "2", "-", "-", "dim 50 %, warm 100 %", "1 25 %, 1.5 100 %"]
    assert [value for _, _, value in found] == values
    assert found[5][0] == "unheard of" and found[8][0] == "by light" and found[0][0] != "retrieved"
    assert rows({"words": "x" * 24})[0][1] == "number" and rows({"words": "x" * 25})[0][1] == "long"


def test_every_number_of_the_tests_has_a_name():
    for test in measured(eval_set(("fox", "teapot", "cactus")), Oracle(eval_set())):
        assert {name for name, value in test.numbers.items() if not isinstance(value, dict)} <= NAMES.keys()


def test_a_chart_is_drawn_where_there_is_one():
    chart = Chart("all cases", "x", "y", (0.0, 1.0), (0.0, 1.0), (True, False))
    text = html(verdict(chart=chart, numbers={"retrieved": 0.5}, cases=(case(0), case(1, passed=False))))
    assert text.count("<svg") == 1 and "<figcaption>all cases</figcaption>" in text and "case 1: note 1" in text
    assert "<svg" not in html(verdict())


def test_the_guidance_is_drawn_as_a_curve_with_the_threshold():
    text = html(verdict(numbers={"guidance": {1.0: 0.5, 3.0: 1.0}}))
    assert text.count("<svg") == 1 and "<figcaption>Over guidance scales</figcaption>" in text
    assert '<line class="limit"' in text and "guidance scale" in text
    assert "<svg" not in html(verdict(numbers={"retrieved": 1.0}))


@pytest.mark.parametrize(("pictures", "narrow"), [(2, True), (3, False)])
def test_cases_are_shown_with_their_pictures(pictures, narrow):
    text = html(verdict(cases=tuple(case(k, k > 0, pictures) for k in range(3))))
    assert text.count('<div class="cases narrow">') == narrow and text.count('<div class="cases">') == (not narrow)
    articles = re.findall(r'<article class="(\w+)">.*?<p>(.*?)<small>(.*?)</small></p></article>', text)
    assert articles == [("good", "case 2", "note 2"), ("good", "case 1", "note 1"), ("bad", "case 0", "note 0")]
    assert len(images(text)) == 2 + 3 * pictures
    assert "<h3>all, the best first</h3>" in text


def test_large_pictures_are_reduced_and_keep_their_colours():
    first, second = images(html(verdict(cases=(case(3, size=(100, 300)),))))[2:]
    assert first.size == (192, 64) and JpegImagePlugin.get_sampling(first) == 0
    assert np.abs(np.asarray(second)[30, 90].astype(int) - (60, 100, 50)).max() <= 3
    assert images(html(verdict(cases=(case(3, size=(192, 30)),))))[2].size == (30, 192)


# ------------------------------------------------------------------------------------------ all pictures


def test_the_sheet_stands_whole_before_the_tests():
    sheet = np.zeros((300, 1500, 3), np.uint8)
    text = html(verdict("memorisation", "Memorisation"), sheet=sheet)
    assert images(text)[0].size == (1500, 300) and 'class="wall"' not in text
    assert text.index('class="cards"') < text.index("All pictures") < text.index('<section id="memorisation">')
    assert "Framed green" in text and text.count("All pictures") == 1


@pytest.mark.parametrize(
    ("count", "size", "shown"),
    [(1, (48, 48), ""), (7, (336, 48), ""), (12, (480, 96), ""), (100, (480, 480), ""),
     (101, (480, 480), " (the first 100 of 101)")],
)  # fmt: skip
def test_the_wall_has_all_pictures_in_order(count, size, shown):
    text = html(verdict("memorisation", "Memorisation", cases=tuple(case(k) for k in range(count))))
    assert f"<h3>all of them{shown}</h3>" in text
    wall = images(text[text.index('<div class="wall">') :])[:2]
    for which, sheet in enumerate(wall):
        assert sheet.size == size
        pixels = np.asarray(sheet).astype(int)
        for k in range(min(count, 100)):
            middle = pixels[48 * (k // 10) + 24, 48 * (k % 10) + 24]
            assert np.abs(middle - (20 * k % 256, 100 * which, 50)).max() <= 6
        if count == 12:
            assert (pixels[60:, 110:] == 255).all()


def test_there_is_one_wall_and_it_shows_the_first_test():
    text = html(verdict("memorisation", "Memorisation", cases=(case(1), case(2))), verdict(cases=(case(3),) * 9))
    assert text.count('class="wall"') == 1 and images(text)[0].size == (96, 48)


# ------------------------------------------------------------------------------------------ training and advice


def test_the_training_is_told_by_its_last_loss_and_its_usual_rate():
    log = [{"step": 1000 + k, "loss": 1 / k, "images_per_second": 100.0 * k} for k in (1, 2, 4)]
    log += [{"step": 1999, "loss": None}, {"step": 2000, "images_per_second": None}]
    text = html(verdict(), log=log)
    assert "1,004 steps, 200 images a second; the loss ends at 0.250." in text and text.count("<svg") == 1
    slow = html(verdict(), log=[{"step": step, "loss": 0.5} for step in (1, 2)])
    assert "2 steps; the loss ends at 0.500." in slow
    for nothing in ([], [{"step": 3}]):
        assert "<svg" not in html(verdict(), log=nothing) and "loss ends" not in html(verdict(), log=nothing)


def test_advice_stands_once_by_its_cause():
    told = {"advice": ("look <here>",), "causes": ("the cause",), "reasons": ("why",)}
    text = html(verdict("memorisation", "Memorisation", **told), verdict(**told))
    assert "<h3>the cause (memorisation, text edit)</h3>" in text and text.count("look &lt;here&gt;") == 1
    assert "the cause" not in html(verdict()) and "Where to look" not in html(verdict())
