"""The report: numbers for machines, a page for people, the same in TensorBoard."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from gate_doctored import Grey
from gate_scenes import Oracle, eval_set, measured
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_helpers import conditions

from fluxdit_jax.dataset.manifest import EncoderIdentity, Manifest
from fluxdit_jax.gate import page, report
from fluxdit_jax.gate.advice import advise
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.sheet import draw_sheet
from fluxdit_jax.gate.verdict import Case, Verdict
from fluxdit_jax.model.dit import ModelConfig
from fluxdit_jax.pages import charts
from fluxdit_jax.shared.json_files import write_json

MODEL = ModelConfig(
    width=48, depth=2, heads=3, patch=2, channels=16, conditions=conditions(1024, 1024), dtype="float32", remat="none",
    attention="xla",
)  # fmt: skip
MANIFEST = Manifest(
    name="scenes", resolution=64, modulus=16, fit="resize",
    encoders={
        "vae": EncoderIdentity("builtin:dct", "1", "aa", "float32", 16, {}),
        "text": EncoderIdentity("builtin:hash", "1", "bb", "float32", 1024),
        "vision": EncoderIdentity("builtin:tone", "1", "cc", "float32", 1024),
    },
    buckets=((64, 64),), latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16, latent_count=1, lengths={"text": 9},
    shards={},
)  # fmt: skip
CIRCUMSTANCES = report.Circumstances(
    "/runs/<b>bold</b>",
    "data/scenes",
    1500,
    6,
    "rk3",
    0,
    "cpu: cpu",
    "2026-11-24T10:00:00",
    {"total": 12.5},
    100,
)
LOG = [{"step": s, "loss": 1 / (1 + s / 20), "images_per_second": 140.0} for s in range(10, 500, 10)]


class Outline(HTMLParser):
    """Checks that tags nest, and collects images, texts and what would be fetched from elsewhere."""

    VOID = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.images, self.text, self.outside, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
        for name in ("src", "href"):
            if name in values and not values[name].startswith(("data:image/", "#")):
                self.outside.append(values[name])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text: str) -> Outline:
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    return outline


def judged(model: type[Oracle], of: EvalSet) -> list[Verdict]:
    return advise(measured(of, model(eval_set()), edits=20), LOG)


@pytest.fixture(scope="module")
def passing():
    return judged(Oracle, eval_set())


@pytest.fixture(scope="module")
def failing():
    return judged(Grey, eval_set())


@pytest.fixture(scope="module")
def unjudged():
    return judged(Oracle, dataclasses.replace(eval_set(), grid={}))


@pytest.fixture(scope="module")
def sheet(passing):
    return draw_sheet(eval_set(), passing)


def content(verdicts):
    return report.build_report(verdicts, CIRCUMSTANCES, MODEL, MANIFEST)


def test_the_json_has_the_verdict_and_everything_behind_it(passing, tmp_path):
    path = tmp_path / "validation" / "report.json"
    write_json(content(passing), path)
    read_back = json.loads(path.read_text())
    assert read_back["passed"] is True and read_back["verdict"].startswith("PASS")
    assert set(read_back["metrics"]) == {"memorisation", "vision_swap", "text_edit"}
    for metric in read_back["metrics"].values():
        assert metric["passed"] is metric["judged"] is True and metric["value"] >= metric["threshold"]
        assert metric["controls"] and all(control["passed"] is True for control in metric["controls"])
    guidance = read_back["metrics"]["vision_swap"]["numbers"]["guidance"]
    assert guidance == dict.fromkeys(["1.0", "1.5", "3.0", "5.0"], 1.0)
    assert read_back["weights"]["ema_step"] == 1500
    assert (read_back["model"]["width"], read_back["model"]["depth"], read_back["model"]["heads"]) == (
        48,
        2,
        3,
    )
    assert read_back["encoders"]["text"]["id"] == "builtin:hash" and read_back["dataset"]["format_version"] == 1
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_a_failed_report_says_which_and_why(failing):
    found = content(failing)
    assert found["passed"] is False and found["verdict"] == "FAIL: memorisation, vision swap, text edit"
    for metric in found["metrics"].values():
        assert metric["reasons"] and metric["advice"]
    assert {tuple(cause["tests"]) for cause in found["advice"]} == {("memorisation", "vision swap", "text edit")}


def test_a_report_says_what_was_not_judged(unjudged, failing, tmp_path):
    write_json(content(unjudged), tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["passed"] is False and found["verdict"] == "NOT JUDGED: vision swap, text edit"
    assert {name: metric["judged"] for name, metric in found["metrics"].items()} == {
        "memorisation": True, "vision_swap": False, "text_edit": False,
    }  # fmt: skip
    assert found["metrics"]["vision_swap"]["passed"] is False and found["metrics"]["vision_swap"]["cases"] == []
    (cause,) = found["advice"]
    assert (cause["name"], cause["tests"]) == ("the set", ["vision swap", "text edit"])
    both = content([failing[0], *unjudged[1:]])
    assert both["verdict"] == "FAIL: memorisation; NOT JUDGED: vision swap, text edit"


def test_json_has_no_nan(tmp_path):
    write_json({"a": float("nan"), "b": [np.float32("inf"), np.int64(3)], "c": np.bool_(True)}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 3], "c": True}


def test_the_page_is_whole_and_needs_nothing_from_outside(passing, sheet, tmp_path):
    path = tmp_path / "validation" / "report.html"
    page.write_page(passing, content(passing), LOG, sheet, path)
    outline = read(path.read_text())
    assert outline.outside == [] and "script" not in outline.tags and "link" not in outline.tags
    assert "@import" not in path.read_text() and "url(" not in path.read_text()
    text = " ".join(outline.text)
    order = ["PASS", "All pictures", "1. Memorisation", "2. Vision swap", "3. Text edit", "Particulars"]
    assert sorted(order, key=text.index) == order
    for words in ("40 of 40", "60 of 60", "20 of 20", "at most", "control", "Training", "builtin:hash",
                  "EMA of step 1,500", "Over guidance scales"):  # fmt: skip
        assert words.lower() in text.lower(), words
    assert outline.tags.count("svg") == 5  # three scatter plots, the guidance and the training curve
    # The sheet; of each test 12 cases, with 2, 4 and 3 pictures.
    assert len(outline.images) == 1 + 12 * 2 + 12 * 4 + 12 * 3
    assert all(image.startswith("data:image/jpeg;base64,") for image in outline.images)
    shown = Image.open(io.BytesIO(base64.b64decode(outline.images[0].split(",")[1])))
    assert shown.size == (sheet.shape[1], sheet.shape[0])


def test_a_page_of_a_set_without_a_grid_has_the_wall_and_is_open(unjudged):
    text = page.page(unjudged, content(unjudged), LOG)
    outline = read(text)
    words = " ".join(outline.text)
    assert "NOT JUDGED" in words and "FAIL" not in words and "PASS" not in words
    assert '<header class="open">' in text and "does not allow a judgement: vision swap and text edit." in text
    assert text.count('class="card open"') == 2 and text.count('class="card good"') == 1
    assert len(outline.images) == 2 + 12 * 2  # the wall, and memorisation
    assert outline.tags.count("svg") == 2 and text.count("Why it is not judged") == 2


def test_what_comes_from_outside_is_escaped(passing):
    """Captions, paths and the names of lights are other people's text."""
    evil = "<script>alert('x')</script> \"quoted\" & <img src=x onerror=alert(1)>"
    case = Case(evil, evil, 1.0, True, (("original", np.zeros((16, 16, 3), np.uint8)),) * 2)
    spoiled = dataclasses.replace(
        passing[0], statement=evil, numbers={"by_light": {evil: 0.5}}, controls=(), cases=(case,) * 40
    )
    text = page.page([spoiled, *passing[1:]], content(passing), LOG)
    outline = read(text)
    assert "script" not in outline.tags and outline.outside == []
    assert "<script>" not in text and "<b>bold</b>" not in text and "<img src=x" not in text
    assert evil in " ".join(outline.text).replace("\n", " ")


def test_a_failing_page_says_fail_and_where_to_look(failing):
    outline = read(page.page(failing, content(failing), []))
    text = " ".join(outline.text)
    assert "FAIL" in text and "PASS" not in text
    assert "Why it failed" in text and text.count("Where to look first") == 1
    assert "no losses" in text
    assert {text.count(line) for cause in content(failing)["advice"] for line in cause["lines"]} == {1}


def test_the_worst_cases_are_shown():
    cases = tuple(Case(f"case {k}", "", float(k), k > 2, ()) for k in np.random.default_rng(0).permutation(50))
    verdict = Verdict("x", "x", "x", 1.0, 0.9, "x", {}, (), (), cases)
    chosen = dict(report.chosen_cases(verdict, each=3))
    assert [case.score for case in chosen["best"]] == [49, 48, 47]
    assert [case.score for case in chosen["worst"]] == [2, 1, 0]
    assert all(20 < case.score < 30 for case in chosen["median"])
    few = Verdict("x", "x", "x", 1.0, 0.9, "x", {}, (), (), cases[:5])
    assert [len(group) for _, group in report.chosen_cases(few, each=3)] == [5]


def test_tensorboard_gets_numbers_and_grids(passing, sheet, tmp_path):
    report.write_tensorboard(passing, 1500, sheet, tmp_path)
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert board.Scalars("validation/passed")[0].value == 1 and board.Scalars("validation/passed")[0].step == 1500
    assert board.Scalars("validation/vision_swap/value")[0].value == 1
    assert board.Scalars("validation/vision_swap/guidance/3.0")[0].value == 1
    assert board.Scalars("validation/vision_swap/by_light/l4")[0].value == 1
    assert board.Scalars("validation/text_edit/stayed")[0].value == 0
    for name in ("memorisation", "vision_swap", "text_edit"):
        assert board.Images(f"validation/{name}")[0].height > 1000
    shown = board.Images("validation/all")[0]
    assert (shown.height, shown.width) == sheet.shape[:2]


def test_tensorboard_of_a_set_without_a_grid_has_no_sheet(unjudged, tmp_path):
    report.write_tensorboard(unjudged, 7, None, tmp_path)
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert board.Scalars("validation/passed")[0].value == 0 and board.Scalars("validation/memorisation/value")
    assert board.Tags()["images"] == ["validation/memorisation"]
    told = board.Tensors("validation/vision_swap/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "preprocess subset" in told


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.ticks(3, 97) == [20, 40, 60, 80]
    assert charts.ticks(-0.013, 0.021) == [-0.01, 0, 0.01, 0.02]
    assert charts.ticks(5, 5) == [5]


def test_shares_over_guidance_are_a_line_with_what_is_needed_dashed():
    svg = charts.shares({1.0: 0.25, 1.5: 0.5, 3.0: 1.0, 5.0: 1.0}, 0.8, "guidance scale")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'class="mean" points="([^"]+)"', svg)[1].split()]
    (one, half, three, five), needed = points, float(re.search(r'class="limit" x1="[^"]*" y1="([^"]*)"', svg)[1])
    assert one[0] < half[0] < three[0] < five[0] and one[1] > half[1] > needed > three[1] == five[1]  # y points down
    assert (needed - three[1]) / (half[1] - three[1]) == pytest.approx(0.4, abs=0.01)
    assert (half[0] - one[0]) / (five[0] - three[0]) == pytest.approx(0.25, abs=0.01)
    assert re.findall(r">([\d.]+%?)</text>", svg) == ["1", "1.5", "3", "5", "0%", "20%", "40%", "60%", "80%", "100%"]
    assert "guidance scale" in svg and charts.shares({1.0: 0.5}, 0.8, "x").count("<svg") == 1


def test_the_training_curve_falls_from_left_to_right():
    svg = charts.curve([(e["step"], e["loss"]) for e in LOG], "step", "loss")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'class="raw" points="([^"]+)"', svg)[1].split()]
    assert len(points) == len(LOG)
    assert all(x1 < x2 and y1 < y2 for (x1, y1), (x2, y2) in zip(points, points[1:]))  # y points down
    assert charts.curve([], "step", "loss") == "" and charts.curve([(0, 1.0)], "step", "loss") == ""
