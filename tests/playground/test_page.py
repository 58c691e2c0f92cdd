"""`python -m fluxdit_jax.play`, driven by its API and in a browser (Debian's `chromium`)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drawing_helpers import SHORT, draw, pixels
from fork_server import Commands, Process
from PIL import Image

from fluxdit_jax.play import parse_arguments
from fluxdit_jax.playground.session import Session
from fluxdit_jax.sampling import recipe

pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
from fluxdit_jax.playground.page import Page  # noqa: E402

pytest_plugins = ("training_fixtures", "drawing_fixtures")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--disable-quic")  # fmt: skip

USUAL = {"prompt": SHORT, "reference": None, "guidance_text": 1, "guidance_vision": 1, "size": "64x64",
         "seed": 0, "count": 1, "steps": 2, "method": "heun", "rescale": 0, "weights": "newest",
         "sweep_text": "", "sweep_vision": ""}  # fmt: skip


class Served:
    """A page that is being served, by a process of its own.

    Attributes:
      address: of the page. out: the folder of its pictures. scratch: of the files that it lays down for a while.
    """

    def __init__(self, commands: Commands, run: Path, folder: Path, cache: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.out, self.scratch = folder / "play", folder / "scratch"
        self.scratch.mkdir()
        env = {"TMPDIR": str(self.scratch), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        asked = ["--workdir", run, "--out", self.out, "--port", port]
        self.process: Process = commands.start("fluxdit_jax.play", *asked, env=env)
        self.line = self.process.stdout.readline()
        self.address = self.line.split()[0]
        assert self.address == f"http://127.0.0.1:{port}/", (self.line, self.process.stderr)


@pytest.fixture(scope="module")
def served(scene: Path, commands: Commands, xla_cache: Path, tmp_path_factory) -> Iterator[Served]:
    page = Served(commands, scene / "run", tmp_path_factory.mktemp("page"), xla_cache)
    yield page
    page.process.kill()
    page.process.wait()


class Api:
    """The page's API, every field with a value."""

    def __init__(self, address: str, folder: Path):
        self._client = gradio_client.Client(address, verbose=False, download_files=str(folder))

    def begin(self, **fields: Any) -> Any:
        if fields.get("reference"):
            fields["reference"] = gradio_client.handle_file(str(fields["reference"]))
        return self._client.submit(**USUAL | fields, api_name="/draw")

    def draw(self, **fields: Any) -> tuple[Path, str, dict]:
        """(the picture as it is downloaded, notes, history)"""
        picture, notes, history = self.begin(**fields).result(120)
        return picture and Path(picture), notes, history

    def stop(self) -> None:
        self._client.predict(api_name="/stop")

    def restore(self, path: Path) -> tuple:
        return self._client.predict(gradio_client.handle_file(str(path)), api_name="/restore")


@pytest.fixture
def api(served: Served, tmp_path: Path) -> Api:
    return Api(served.address, tmp_path)


def test_a_picture_comes_as_the_file_that_sample_would_write(api: Api, served: Served, scene: Path) -> None:
    picture, _, history = api.draw(seed=3, guidance_text=2.5)
    newest = max(served.out.glob("*.png"))
    assert picture.read_bytes() == newest.read_bytes() and len(history["value"]) == len(list(served.out.glob("*.png")))
    same = draw(scene, "--prompt", SHORT, "--size", "64x64", "--steps", "2", "--seed", "3", "--guidance-text", "2.5")
    assert (pixels(picture) == same).all()
    prompt, _, text_scale, *_ = restored = api.restore(picture)
    assert (prompt, text_scale) == (SHORT, 2.5) and restored[5] == 3 and not restored[-2]


def test_a_reference_that_is_dropped_and_a_sheet(api: Api, scene: Path) -> None:
    reference = min((scene / "photos").rglob("*.png"))
    picture, _, _ = api.draw(reference=reference, sweep_text="1,2", sweep_vision="1,3")
    made = recipe.read(picture)
    assert made.arguments["sweep_vision"] == [1.0, 3.0] and "vision" in made.given
    draw(scene, "--prompt", SHORT, "--size", "64x64", "--steps", "2", "--reference", str(reference),
         "--sweep-text", "1,2", "--sweep-vision", "1,3")  # fmt: skip
    assert (pixels(picture) == pixels(scene / "x.png")).all()


def test_what_cannot_be_drawn_is_answered_in_words(api: Api, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    refused = pytest.raises(gradio_client.exceptions.AppError, match="20,000")
    with refused:
        api.draw(prompt="word " * 5000)
    with pytest.raises(gradio_client.exceptions.AppError, match="not numbers"):
        api.draw(sweep_text="one")
    with pytest.raises(gradio_client.exceptions.AppError, match="identify image"):
        api.draw(reference=tmp_path / "text.png")
    with pytest.raises(gradio_client.exceptions.AppError, match="no recipe"):
        api.restore(tmp_path / "plain.png")
    assert "601 tokens" in api.draw(prompt="word " * 600)[1]  # and it goes on


def test_how_far_it_is_is_shown(api: Api) -> None:
    drawing, told = api.begin(sweep_text="1,2,3,4,5,6,7,8", count=8, steps=100), set()
    while not drawing.done():
        told |= {(each.index, each.length, each.desc) for each in drawing.status().progress_data or ()}
        time.sleep(0.02)
    assert any(done and total == 64 and re.fullmatch(r"[\d.]+ s each, .+ left", what) for done, total, what in told)


def test_after_an_answer_which_ends_what_was_shown_it_is_shown_again(scene: Path, tmp_path: Path) -> None:
    """Too quick here to be seen by the API."""
    asked = parse_arguments([f"--workdir={scene / 'run'}", f"--out={tmp_path / 'play'}"])
    page, events = Page(Session(asked, tmp_path)), []
    page.build()
    given = USUAL | {"count": 3}
    drawing = page._draw(*(given[name] for name in page._names), None, None,
                         progress=lambda at, desc, unit: events.append(at))  # fmt: skip
    for _ in drawing:
        events.append("answer")
    assert events == [(0, 3), (1, 3), "answer", (1, 3), (2, 3), "answer", (2, 3), (3, 3), "answer", "answer"]


def test_stopping_keeps_what_is_drawn(api: Api, served: Served) -> None:
    before = len(list(served.out.glob("*.png")))
    drawing = api.begin(count=64, steps=90)
    while len(list(served.out.glob("*.png"))) < before + 2:
        time.sleep(0.05)
    api.stop()
    _, notes, _ = drawing.result(60)
    assert re.search(r"stopped: \d+ of 64", notes) and len(list(served.out.glob("*.png"))) < before + 60
    assert api.draw()[0]


def test_files_beside_the_pictures_are_not_served(served: Served, scene: Path) -> None:
    import httpx

    with httpx.Client(trust_env=False) as client:
        for path in (scene / "run" / "config.json", Path("/etc/passwd"), served.out / ".." / "secret"):
            assert client.get(f"{served.address}gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_in_a_browser(served: Served, scene: Path, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api")
    elsewhere: list[str] = []
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1300})
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(served.address)
        page.get_by_label("Prompt", exact=True).fill(SHORT)
        page.get_by_label("Seed", exact=True).fill("11")
        page.get_by_text("Solver, weights, sweep").click()
        page.get_by_label("number input for Steps").fill("2")
        page.get_by_role("button", name="Show pictures of the dataset").click()
        page.locator("#dataset").get_by_role("button", name="Thumbnail 1 of 8").click()
        api.expect(page.get_by_label("Light and mood are taken from")).to_have_value(re.compile(r"training record \d"))
        page.get_by_role("button", name="Draw", exact=True).click()
        page.locator("#picture img").wait_for()
        with page.expect_download() as download:
            page.locator("#picture").get_by_label("Download").click()
        download.value.save_as(tmp_path / "downloaded.png")
        page.screenshot(path=tmp_path / "page.png")
        page.get_by_label("Prompt", exact=True).fill("something else")
        page.locator("#restore input[type=file]").set_input_files(tmp_path / "downloaded.png")
        api.expect(page.get_by_label("Prompt", exact=True)).to_have_value(SHORT)
        browser.close()
    made = recipe.read(tmp_path / "downloaded.png")
    assert made.arguments["seed"] == 11 and "vision" in made.given
    assert (tmp_path / "downloaded.png").read_bytes() in [path.read_bytes() for path in served.out.glob("*.png")]
    again = draw(scene, "--recipe", str(tmp_path / "downloaded.png"), run="")
    assert (again == pixels(tmp_path / "downloaded.png")).all()
    assert not [url for url in elsewhere if not url.startswith((served.address, "data:", "blob:"))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_and_leaves_nothing_behind(
    scene: Path, commands: Commands, xla_cache: Path, tmp_path: Path, number: int
) -> None:
    page = Served(commands, scene / "run", tmp_path, xla_cache)
    os.kill(page.process.pid, number)
    assert page.process.wait(20) == 128 + number
    assert not list(page.scratch.iterdir())


def test_a_port_that_is_taken_is_named(served: Served, scene: Path, commands: Commands) -> None:
    port = served.address.rpartition(":")[2].strip("/")
    second = commands.start("fluxdit_jax.play", "--workdir", scene / "run", "--port", port)
    _, told = second.communicate(60)
    assert second.returncode == 1 and port in told and "Traceback" not in told
