"""Captions with scripts in the pages that we write, and a browser that tells whether one ran."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), "")
MARK = "data-owned"
OWN = f"document.documentElement.setAttribute('{MARK}','1')"
EVIL = [
    f"<script>{OWN}</script>",
    f'"><img src=x onerror="{OWN}">',
    f"'><svg onload={OWN}>",
    f"</title><script>{OWN}</script>",
    f"</style><script>{OWN}</script>",
    f"--><script>{OWN}</script><!--",
    f"]]><script>{OWN}</script>",
    f'<iframe srcdoc="&lt;script&gt;parent.{OWN}&lt;/script&gt;"></iframe>',
    f'<a href="javascript:{OWN}" onfocus={OWN} autofocus>x</a>',
    f"&lt;script&gt;{OWN}&lt;/script&gt;",
    f"\u2028<script>{OWN}</script>\u2029",
    f"+ADw-script+AD4-{OWN}+ADw-/script+AD4-",
]


def report_page(evil: str) -> str:
    """`report.html` with this text everywhere that a caption, a path, a name or a number's name can come to stand."""
    from fluxdit_jax.gate import page
    from fluxdit_jax.gate.verdict import Case, Control, Verdict
    from fluxdit_jax.pages.charts import Chart

    case = Case(evil, evil, 1.0, True, ((evil, np.zeros((16, 16, 3), np.uint8)),) * 2)
    chart = Chart(evil, evil, evil, (0.1, 0.9), (0.2, 0.8), (True, False))
    control = Control(evil, evil, 0.5, 0.4, at_most=False)
    verdicts = [
        Verdict(
            name,
            evil,
            evil,
            0.5,
            0.9,
            evil,
            {evil: 1.0, "by_light": {evil: 0.5}, "guidance": {1.0: 0.5, 3.0: 0.6}},
            (control,),
            (evil,),
            (case, case),
            chart,
            (evil,),
            (evil,),
        )
        for name in ("memorisation", "vision_swap", "text_edit")
    ]
    report = {
        "passed": False,
        "weights": {"workdir": f"/runs/{evil}", "ema_step": 1},
        "model": {"parameters": 1e6, "width": 1, "depth": 1, "heads": 1, "family": {evil: evil}},
        "dataset": {
            "records": 2,
            "path": evil,
            "name": evil,
            "format_version": 1,
            "resolution": 64,
            "shards_sha256": [evil],
        },
        "sampling": {"method": evil, "steps": 1, "seed": 0, "network_evaluations": 1},
        "encoders": {evil: {"id": evil, "revision": evil, "width": 1, "sha256": evil}},
        "device": evil,
        "made": evil,
        "seconds": {"total": 1.0, evil: 1.0},
    }
    return page.page(verdicts, report, [{"step": s, "loss": 1.0 / s, evil: evil} for s in range(1, 9)])


def board_page(evil: str) -> str:
    """What TensorBoard's text page makes of a text of ours with this in it."""
    from tensorboard.plugin_util import markdown_to_safe_html

    return f"<!doctype html><html><body>{markdown_to_safe_html(evil)}</body></html>"


def owned(html: str, folder: Path) -> bool:
    """Whether a script of the page ran, in headless Chromium."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "<html" in done.stdout, done.stderr[-500:]
    return f'{MARK}="1"' in done.stdout


def look(folder: Path) -> tuple[int, list[str]]:
    """(texts tried, what was wrong). A page that does not escape shows first that a script that runs is seen."""
    everything = " ".join(EVIL)
    wrong = []
    if not owned(f"<!doctype html><html><body>{everything}</body></html>", folder):
        wrong.append("nothing ran in a page that does not escape: this looks at nothing")
    from fluxdit_jax.pages.parts import _NOTHING_FOREIGN as policy

    page = report_page(everything)
    if policy not in page:
        wrong.append("report.html has no content security policy")
    for what, html in (
        ("report.html without its policy", page.replace(policy, "")),
        ("report.html with a caption that is not escaped", page.replace("</body>", f"{everything}</body>")),
        ("TensorBoard's texts", board_page(everything)),
    ):
        if owned(html, folder):
            wrong.append(f"a script ran in {what}")
    return 3 * len(EVIL), wrong
