"""The commands that the documents show: each of its own program's, whose configuration is read as that reads it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from training_helpers import REPOSITORY

from fluxdit_jax import config as configuration
from fluxdit_jax.stages import stages_of

DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "preprocess" / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


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
