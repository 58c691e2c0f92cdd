"""Every command line, option, key and link of README.md, preprocess/README.md and docs/ is what the programs know.

Every command is parsed by its own program. Those of the README's road are also run, in the order of the README, on
twelve small pictures with the built-in encoders and a network of two blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from absl import flags
from build_fixtures import FLAGS
from ml_collections import ConfigDict, config_flags
from PIL import Image
from training_helpers import REPOSITORY

from fluxdit_jax import config as configuration
from fluxdit_jax import environment, export, play, sample, score, train, train_arguments, validate
from fluxdit_jax.stages import stages_of
from preprocess import __main__ as preprocess

pytest_plugins = ("training_fixtures",)
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "preprocess" / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
OTHERS = {"bash", "source", "tensorboard", "pip", ".venv/bin/pip", "pre-commit", "rm", "rclone"}  # not of this project
FOREIGN = {
    "--logdir",
    "--array",
    "--gpus",
    "--wrap",
    "--dependency",
    "--index-url",
    "--no-deps",
    "--exclude",
    "--transfers",
}  # options of those


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a document: its words, without comments and continuations."""

    document: str
    words: tuple[str, ...]

    @property
    def module(self) -> str:
        return self.words[2] if self.words[:2] == ("python", "-m") else ""

    @property
    def arguments(self) -> list[str]:
        return list(self.words[3:])

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def commands(path: Path) -> Iterator[Command]:
    """Of the fenced bash blocks, and of inline code that begins with `python `."""
    text = path.read_text(encoding="utf-8")
    lines: list[str] = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [code.translate({ord("["): "", ord("]"): ""}) for code in re.findall(r"`(python [^`]+)`", prose)]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            one, words = words[:end], words[end + 1 :]
            yield Command(path.relative_to(REPOSITORY).as_posix(), tuple(one[one[0] == "srun" :]))


COMMANDS = [command for path in DOCUMENTS for command in commands(path)]


def help_of(program: Callable[[], object]) -> str:
    """What a program prints for --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        program()
    assert stop.value.code in (0, None)
    return printed.getvalue()


def options_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))


@pytest.fixture(scope="module")
def known_options() -> dict[str, set[str]]:
    """The options of each program, from its own --help."""
    names = ["build", "inspect", "verify", "export", "demo", "subset", "compare-vae"]
    found = {
        f"preprocess {name}": options_of(help_of(lambda name=name: preprocess.main([name, "--help"]))) for name in names
    }
    found["fluxdit_jax.sample"] = options_of(help_of(lambda: sample.parse_arguments(["--help"])))
    found["fluxdit_jax.play"] = options_of(help_of(lambda: play.parse_arguments(["--help"])))
    found["fluxdit_jax.score"] = options_of(help_of(lambda: score.parse_arguments(["--help"])))
    found["fluxdit_jax.validate"] = options_of(help_of(lambda: validate.parse_arguments(["--help"])))
    found["fluxdit_jax.train"] = options_of(help_of(lambda: train_arguments.parse(["train", "--help"])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", "--help"])
        found["fluxdit_jax.export"] = options_of(help_of(export.main))
    found["scripts/install.sh"] = options_of((REPOSITORY / "scripts" / "install.sh").read_text())
    return found


def read_config(words: list[str]) -> ConfigDict:
    """The configuration of a `fluxdit_jax.train` command, by absl's own parser, checked as training checks it."""
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["train", *(word for word in words if word != "--plan")]
        )  # ml_collections finds the overrides there
        config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
        assert values(sys.argv) == ["train"]
    if "--plan" in words:
        values.config.workdir = "."
    configuration.check(values.config)
    stages_of(values.config)
    return values.config


# ------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_understood_by_its_program(command: Command, known_options, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    if not command.module:
        assert command.words[0] in OTHERS | {"python"}
        for word in command.words[1:]:
            if word.endswith((".sh", ".py")):
                assert (REPOSITORY / word).is_file(), word
        if "scripts/install.sh" in command.words:
            assert {word for word in command.words if word.startswith("--")} <= known_options["scripts/install.sh"]
        return
    if command.module == "preprocess":
        options = known_options[f"preprocess {command.arguments[0]}"]
        assert {word for word in command.arguments if word.startswith("--")} <= options
        if len(command.arguments) > 1:
            preprocess._parser().parse_args(command.arguments)
    elif command.module == "fluxdit_jax.train":
        words = [word.replace("--config=FILE", "--config=configs/demo.py") for word in command.arguments]
        if words == ["--keys"]:
            assert "optim.lr" in help_of(lambda: train_arguments.parse(["train", *words]))
        elif words:
            read_config(words)
    elif command.module in known_options:
        given = {word.partition("=")[0] for word in command.arguments if word.startswith("--")}
        assert given <= known_options[command.module]
        _parse_drawing(command)
    else:
        assert command.module == "preprocess" or importlib.util.find_spec(command.module), command


def _parse_drawing(command: Command) -> None:
    """sample, play and validate, without the options that read a file while they are parsed."""
    if "--recipe" in command.arguments or not command.arguments:
        return  # `road` draws a recipe again
    if command.module == "fluxdit_jax.sample":
        sample.parse_arguments(command.arguments)
    elif command.module == "fluxdit_jax.play":
        play.parse_arguments(command.arguments)
    elif command.module == "fluxdit_jax.validate":
        validate.parse_arguments(command.arguments)


# ------------------------------------------------------------------------------------------------- words of the text


def code_of(path: Path) -> list[str]:
    """Inline code and the lines of fenced blocks."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*(line for block in blocks for line in block.splitlines()), *re.findall(r"`([^`\n]+)`", prose)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_option_that_is_named_exists(path: Path, known_options) -> None:
    known = set().union(*known_options.values()) | FOREIGN | {"--config"}
    named = set().union(*(options_of(code) for code in code_of(path)))
    assert named - known == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_key_that_is_named_exists(path: Path) -> None:
    config = configuration.default_config()
    groups = "|".join(name for name in config if isinstance(config[name], ConfigDict))
    for code in code_of(path):
        for group, key in re.findall(rf"(?<![\w./])(?:--config\.)?({groups})\.([a-z_0-9]+)", code):
            if key not in ("py", "log", "safetensors") and group != "stages":  # a file; names of stages
                assert key in config[group], f"{path.name}: {group}.{key}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "#")):
            assert (path.parent / link.partition("#")[0]).exists(), link


def test_every_page_is_linked_from_the_readme_and_short() -> None:
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 210
    for path in DOCUMENTS[3:]:
        assert f"(docs/{path.name})" in readme
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 135, path.name
    figures = list((REPOSITORY / "docs" / "figures").iterdir())
    assert all(f.stat().st_size < 150_000 for f in figures) and sum(f.stat().st_size for f in figures) < 1e6


# ------------------------------------------------------------------------------------------------- running

STAGE = ("train.steps=2", "data.micro_batch_size=4", "optim.warmup_steps=1")  # of production's, shorter

# Shorter than the document's: later arguments win.
SHORT = {
    "preprocess build": [*FLAGS, "--resolution", "64", "--modulus", "16", "--min-side", "16", "--workers", "2"],
    "preprocess build --resolution 256,512,1024": [*FLAGS, "--resolution", "32,64", "--modulus", "32"],
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


def adapted(command: Command, folder: Path) -> list[str]:
    """The arguments with the document's places below `folder`, and less to do."""
    name = command.module + (f" {command.arguments[0]}" if command.module == "preprocess" else "")
    if "256,512,1024" in command.arguments:
        name += " --resolution 256,512,1024"
    moved = [re.sub(r"(^|=)/(photos|data)", rf"\1{folder}/\2", word) for word in command.arguments]
    moved = [re.sub(r"(^|=)(runs|exports)/", rf"\1{folder}/\2/", word) for word in moved]
    moved = [word if not word.endswith((".png", ".jpg")) else str(folder / word) for word in moved]
    if "--size" in moved:
        moved[moved.index("--size") + 1] = "64x64"
    moved = [re.sub(r"/photos/(512|1024)$", "/photos/64", word) for word in moved]
    stages = SHORT["configs/prod.py"] if "--config=configs/prod.py" in moved else []
    return moved + ([] if "--recipe" in moved else SHORT.get(name, []) + stages)


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
        patch.setattr(sys, "argv", ["export", *words])
        export.main()
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
        (folder / "photos" / f"{number:02}.json").write_text(json.dumps({"caption": words}))
    photo.save(folder / "mood.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        found = [command for title in ROAD for command in section_commands(title)]
        return Road(folder, {command: run(command, folder) for command in found})


def test_the_commands_of_the_readme_run_in_its_order(road: Road) -> None:
    for command, status in road.statuses.items():
        allowed = (0, 1) if command.module == "fluxdit_jax.validate" else (0,)  # such a model fails the gate
        assert status in allowed, command
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
