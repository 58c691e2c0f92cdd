"""The parser of every command: an error is one line, which suggests the option that a mistyped one resembles."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from typing import NoReturn

_UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """As `argparse.ArgumentParser`, without its usage before an error: `--help` has it."""

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            given = message.removeprefix(_UNKNOWN).split()[0].partition("=")[0]
            if near := difflib.get_close_matches(given, list(self._options()), 1):
                message += f"; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _options(self) -> Iterator[str]:
        """Its own, and those of its commands: what a command does not know is an error of the whole."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._option_string_actions
