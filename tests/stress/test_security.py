"""What data from a stranger cannot do; `security.py` beside this file holds the attacks."""

from __future__ import annotations

import html
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import security  # noqa: E402
import security_code  # noqa: E402
import security_pages  # noqa: E402

from fluxdit_jax.shared.sanitize import shown


@pytest.mark.parametrize("part", sorted(security.PARTS.keys() - {"bombs", "pages"}))
def test_nothing_gets_through(part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    what, tried, survived, lost = security.PARTS[part](tmp_path)
    assert lost == 0 and survived == tried > 10, (what, capsys.readouterr().out)


@pytest.mark.slow
def test_bombs_stay_within_their_memory() -> None:
    """In a process of its own, since the memory of a process is what is limited."""
    command = [sys.executable, security.__file__, "--quick", "--part", "bombs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "within 0.8 GB" in done.stdout and "lost    0" in done.stdout


@pytest.mark.slow
def test_no_script_of_a_caption_runs_in_a_browser(tmp_path: Path) -> None:
    if not security_pages.CHROMIUM:
        pytest.skip(f"none of {', '.join(security_pages.BROWSERS)} is on this machine")
    tried, wrong = security_pages.look(tmp_path)
    assert wrong == [] and tried >= 30


def test_the_captions_stand_in_the_page_as_they_are() -> None:
    """The same without a browser: escaped wherever they stand, and complete."""
    for evil in security_pages.EVIL:
        page = security_pages.report_page(evil)
        assert page.count(html.escape(evil)) >= 20
        rest = page.replace(html.escape(evil), "")
        for tag in ("<script", "<img src=x", "<svg onload", "<iframe", '<a href="javascript'):
            assert tag not in rest.lower()


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import yaml.constructor",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "torch.load(path)",
        "np.load(path, allow_pickle=wanted)",
        "np.load(path, allow_pickle=True)",
        "model.from_pretrained(x, trust_remote_code=True)",
        "model.from_pretrained(x, trust_remote_code=flag)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "archive.extractall(folder)",
        "tempfile.mktemp()",
    ],
)
def test_the_look_at_our_code_sees(line: str) -> None:
    assert security_code.forbidden(f"x = 1\n{line}\n", "file.py")[0].startswith("file.py:2: ")


def test_and_leaves_in_peace() -> None:
    innocent = "model.eval()\nnp.load(p)\nnp.load(p, allow_pickle=False)\nf(trust_remote_code=False)\nrun(['ls'])\n"
    assert security_code.forbidden(innocent, "file.py") == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a dog.png", "a dog.png"),
        ("Hündchen 犬 \u3000👩\u200d👧", "Hündchen 犬 \u3000👩\u200d👧"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("a\x9bb\u202ec\u2028d\ud800", "a\\x9bb\\u202ec\\u2028d\\ud800"),
    ],
)
def test_what_is_shown_of_a_strangers_text(text: str, told: str) -> None:
    assert shown(text) == told
    assert shown(f"one\n\t{text}", lines=True).startswith("one\n\t")
