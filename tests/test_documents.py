"""Every command line, option, key and link of README.md, preprocess/README.md and docs/ is what the programs know.

Every command is parsed by its own program; `test_documents_run.py` runs them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from document_commands import COMMANDS, DOCUMENTS, Command, read_config
from ml_collections import ConfigDict
from training_helpers import REPOSITORY

from fluxdit_jax import config as configuration
from fluxdit_jax import export, play, sample, score, train_arguments, validate
from preprocess import __main__ as preprocess

OTHERS = {"bash", "source", "tensorboard", "pip", ".venv/bin/pip", "pre-commit", "rm", "rclone"}  # not of this project
FOREIGN = {
    "--logdir",
    "--array",
    "--gpus",
    "--wrap",
    "--dependency",
    "--generate",
    "--index-url",
    "--no-deps",
    "--exclude",
    "--transfers",
}  # options of those


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
