"""The commands of the documents run, on 24 small pictures with the built-in encoders and a network of two blocks.

Those of the README's road in its order, then those of each page of docs/ in the folder that the road has left.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS
from document_commands import DOCUMENTS, Command, commands, read_config
from PIL import Image
from training_helpers import REPOSITORY

from fluxdit_jax import environment, export, sample, score, train, validate
from preprocess import __main__ as preprocess

pytest_plugins = ("training_fixtures",)

STAGE = ("train.steps=2", "data.micro_batch_size=4", "optim.warmup_steps=1")  # of production's, shorter

# Shorter than the document's: later arguments win.
SHORT = {
    "preprocess build": [*FLAGS, "--resolution", "64", "--modulus", "16", "--min-side", "16", "--workers", "2"],
    "preprocess build --resolution 256,512,1024": [
        *FLAGS, "--resolution", "32,64", "--modulus", "32", "--holdout", "0.3",
    ],
    "preprocess subset": ["--count", "6", "--resolution", "64", "--allow-fewer"],
    "fluxdit_jax.train": [
        f"--config.{change}"
        for change in (
            "model.width=32", "model.depth=1", "model.heads=2", "train.steps=3", "optim.global_batch_size=4",
            "data.micro_batch_size=4", "model.remat=none", "optim.warmup_steps=1", "log.every=1", "log.preview_every=0",
            "log.heldout_count=2", "checkpoint.ema_every=2", "gate.required=False",
        )
    ],
    "configs/prod.py": [
        "--config.train.stages=px256,px512",
        *(f"--config.stages.px{old}.data.resolution={new}" for old, new in ((256, 32), (512, 64))),
        *(f"--config.stages.px{old}.{key}" for old in (256, 512) for key in STAGE),
    ],
    "fluxdit_jax.sample": ["--steps", "2"],
    "fluxdit_jax.validate": ["--limit", "6", "--pairs", "2", "--edits", "2", "--steps", "1"],
}  # fmt: skip
ROAD = ("My pictures", "Share")  # sections of the README that are run, in this order


@dataclasses.dataclass(frozen=True)
class Road:
    """What came of the README's commands: exit statuses by command, in the folder where they were run."""

    folder: Path
    statuses: dict[Command, int]


# What a command of a page needs besides, by what is in it; later arguments win here as well.
FURTHER = {
    "preprocess build": ["--device", "cpu"],
    "preprocess compare-vae": ["--resolution", "64"],
    "fluxdit_jax.score": ["--count", "4", "--references", "8", "--steps", "1"],
    "routing.share": [f"--config.{change}" for change in ("model.depth=3", "routing.first=1", "routing.last=1")],
    "alignment.block": [f"--config.{change}" for change in ("model.depth=2", "alignment.block=1", "alignment.until=4")],
    "--output DATASET --vae": ["--vae", "builtin:dct"],
}
PUBLISHED = {"black-forest-labs/FLUX.1-schnell": "vae", "REPA-E/e2e-flux-vae": "builtin:dct"}  # what stands for it


def adapted(command: Command, folder: Path) -> list[str]:
    """The arguments with the document's places below `folder`, and less to do."""
    text = " ".join(command.words)
    name = command.module + (f" {command.arguments[0]}" if command.module == "preprocess" else "")
    data = "/data/photos/64" if name == "preprocess inspect" else "/data/photos"
    placed = {"DIR": "/made", "DATASET": data, "RUN": f"runs/{len(list(folder.glob('runs/*')))}", "IMAGES": "/photos"}
    moved = [
        placed.get(word, re.sub(r"=(DATASET|RUN)$", lambda m: f"={placed[m[1]]}", word)) for word in command.arguments
    ]
    moved = [re.sub(r"(^|=)/(photos|data|vaes|made)", rf"\1{folder}/\2", word) for word in moved]
    moved = [re.sub(r"(^|=)(runs|exports|published)\b", rf"\1{folder}/\2", word) for word in moved]
    moved = [re.sub(r"(^|=)([\w.]+\.(png|jpg|npy))$", rf"\1{folder}/\2", word) for word in moved]
    if "--size" in moved:
        moved[moved.index("--size") + 1] = "64x64"
    moved = [re.sub(r"/photos/(512|1024)$", "/photos/64", word) for word in moved]
    if name == "preprocess compare-vae":
        moved = [
            str(folder / PUBLISHED[word]) if PUBLISHED.get(word) == "vae" else PUBLISHED.get(word, word)
            for word in moved
        ]
    further = [word for key, words in FURTHER.items() if key in text for word in words]
    if "256,512,1024" in command.arguments:
        name += " --resolution 256,512,1024"
    again = name == "preprocess build" and "--resolution" not in command.arguments  # has the options of before
    stages = SHORT["configs/prod.py"] if "--config=configs/prod.py" in moved else []
    words = moved + ([] if "--recipe" in moved or again else SHORT.get(name, []) + stages) + further
    places = [word for word in words if re.search(r"^(--config\.\S+=)?[A-Z]{3,}$", word)]
    assert not places, f"{command}: {places} would be written beside the documents"
    return words


def run(command: Command, folder: Path) -> int:
    """Runs it in this process; returns its exit status."""
    words = adapted(command, folder)
    if command.module == "preprocess":
        return preprocess.main(words)
    if command.module == "fluxdit_jax.environment":
        return environment.main(words)
    if command.module == "fluxdit_jax.train":
        if "--plan" in words:
            return train.show_plan(read_config(words))
        return train.train(read_config(words))
    if command.module == "fluxdit_jax.validate":
        return validate.command(words)
    if command.module == "fluxdit_jax.sample":
        return 0 if sample.sample(sample.parse_arguments(words)) else 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [command.module, *words])
        {"fluxdit_jax.export": export, "fluxdit_jax.score": score}[command.module].main()
    return int(stop.value.code or 0)


def section_commands(title: str) -> list[Command]:
    """The commands of this project in one section of the README."""
    text = DOCUMENTS[0].read_text(encoding="utf-8")
    section = text[text.index(f"\n## {title}\n") :]
    section = section[: section.find("\n## ", 4)]
    block = "\n".join(re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    split = [tuple(shlex.split(line, comments=True)) for line in block.replace("\\\n", " ").splitlines()]
    return [Command("README.md", words) for words in split if words[:2] == ("python", "-m")]


@pytest.fixture(scope="module")
def road(tmp_path_factory, draw_photo, quick_compile) -> Road:
    folder = tmp_path_factory.mktemp("road")
    (folder / "photos").mkdir()
    for number in range(24):
        photo = Image.fromarray(draw_photo(80, 80 + 16 * (number % 2), number))
        photo.save(folder / "photos" / f"{number:02}.png")
        words = f"photo of boat {number // 4}, looking {('left', 'right')[number % 2]}, on the water"
        (folder / "photos" / f"{number:02}.json").write_text(json.dumps({"caption": [words, f"boat {number}"]}))
    photo.save(folder / "mood.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        found = [command for title in ROAD for command in section_commands(title)]
        return Road(folder, {command: run(command, folder) for command in found})


def allowed(command: Command) -> tuple[int, ...]:
    return (0, 1) if command.module == "fluxdit_jax.validate" else (0,)  # such a model fails the gate


def test_the_commands_of_the_readme_run_in_its_order(road: Road) -> None:
    for command, status in road.statuses.items():
        assert status in allowed(command), command
    kinds = {command.module for command in road.statuses}
    assert kinds >= {"preprocess"} | {f"fluxdit_jax.{n}" for n in ("train", "validate", "sample", "export")}
    for made in ("data/photos/64/manifest.json", "data/gate/manifest.json", "runs/gate/validation/report.html"):
        assert (road.folder / made).exists(), made
    same = [Image.open(road.folder / name).tobytes() for name in ("harbour.png", "again.png")]
    assert same[0] == same[1]
    assert (road.folder / "exports" / "prod" / "model.safetensors").exists()


def test_the_readme_reads_the_data_set_with_tfds(road: Road) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENTS[0].read_text(encoding="utf-8"), re.M | re.S)
    names: dict[str, object] = {}
    exec(code.replace("/data/photos", str(road.folder / "data" / "photos")).replace("/512", "/64"), names)  # noqa: S102
    assert len(names["records"]) > 0  # type: ignore[arg-type]
    assert names["records"][0]["latent"].shape[0] == 16  # type: ignore[index]


def test_the_page_of_curves_names_every_scalar(road: Road) -> None:
    page = (REPOSITORY / "docs" / "curves.md").read_text(encoding="utf-8")
    named = {name.partition("/")[0] for name in re.findall(r"`([a-z_]+(?:/[A-Za-z_/]+)?)`", page)}
    lines = map(json.loads, (road.folder / "runs" / "prod" / "metrics.jsonl").open())
    written = {name.partition("/")[0] for line in lines for name in line} - {"step"}
    assert written - named == set()


# ------------------------------------------------------------------------------------------------- pages

# Commands that end by themselves only elsewhere, or need more machines: what runs them.
ELSEWHERE = {
    "benchmarks.": "by hand",
    "fluxdit_jax.play": "tests/playground",
    "--engine ray": "tests/preprocess/test_ray_engine.py",
    "mesh.coordinator": "tests/stress/test_hosts.py",
}


def commands_of_pages() -> list[Command]:
    """Of docs/, in the order of each page, without those of the README's road and those with no arguments."""
    of_road = {command.words for title in ROAD for command in section_commands(title)}
    found = dict.fromkeys(command for path in DOCUMENTS[3:] for command in commands(path))
    return [
        command
        for command in found
        if command.module and len(command.arguments) > (command.module == "preprocess")
        and command.words not in of_road
        and not any(word in str(command) for word in ELSEWHERE)
    ]  # fmt: skip


class WandbRun(list):
    """What the page's tracker asks of wandb, which is not installed: a run, as the list of what it is told."""

    log, finish = list.append, lambda self: self.append("finished")


def test_what_runs_elsewhere_is_in_the_documents() -> None:
    shown = [str(command) for path in DOCUMENTS[3:] for command in commands(path) if command.module]
    assert all(any(word in line for line in shown) for word in ELSEWHERE)


PAGES = sorted({command.document for command in commands_of_pages()})


def prepare(page: str, folder: Path, request: pytest.FixtureRequest, monkeypatch) -> None:
    """What the page's text asks the reader to have."""
    if page == "docs/conditions.md":
        shutil.rmtree(folder / "runs" / "prod")  # its data set changes
        (folder / "photos-pose").mkdir()
        for number, photo in enumerate(sorted((folder / "photos").glob("*.png"))):
            np.save(folder / "photos-pose" / f"{photo.name}.npy", np.eye(24, 5, dtype=np.float32)[number] + 0.1)
        np.save(folder / "jump.npy", np.ones(5, np.float32))
    elif page == "docs/curves.md":
        (code,) = re.findall(r"^```python\n(import wandb.*?)^```", (REPOSITORY / page).read_text("utf-8"), re.M | re.S)
        (folder / "my_trackers.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "my_trackers", raising=False)
        stand_in = types.ModuleType("wandb")
        stand_in.run = WandbRun()
        stand_in.init, stand_in.Image = lambda **given: stand_in.run, lambda pixels: pixels.shape
        monkeypatch.setitem(sys.modules, "wandb", stand_in)
    elif page in ("docs/encoders.md", "docs/learning.md"):  # they compare VAEs
        (folder / "vae").symlink_to(request.getfixturevalue("tiny_vae_dir"))
    elif page == "docs/rented.md":
        shutil.rmtree(folder / "runs" / "prod")  # what has ended saves nothing
        (folder / "rclone").write_text(f'#!/bin/sh\necho "$@" >> {folder}/copied\n')
        (folder / "rclone").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    elif page in ("docs/amd.md", "docs/scaling.md"):
        shutil.rmtree(folder / "data" / "photos")  # to be built by workers
    elif page == "docs/captions.md":
        shutil.rmtree(folder / "runs" / "prod")  # its captions' weights change
        shutil.rmtree(folder / "photos-gate")
    elif page == "docs/score.md":
        shutil.copytree(folder / "runs" / "prod", folder / "runs" / "other")


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, road: Road, tmp_path: Path, request, monkeypatch) -> None:
    folder = tmp_path / "road"
    shutil.copytree(road.folder, folder, symlinks=True)
    prepare(page, folder, request, monkeypatch)
    monkeypatch.chdir(REPOSITORY)
    for command in commands_of_pages():
        if command.document == page:
            assert run(command, folder) in allowed(command), command
    if page == "docs/rented.md":
        assert (folder / "copied").read_text().startswith(f"copy {folder}/runs/prod bucket:runs/prod")
    if page == "docs/curves.md":
        first, *_, last = sys.modules["wandb"].run
        assert first["step"] >= 0 and last == "finished"
