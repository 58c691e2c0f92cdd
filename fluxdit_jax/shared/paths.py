"""Paths as a user gives them: `~` is expanded where they come in, once.

A shell expands `~` at the beginning of a word, but not in `--out=~/picture.png`. Imports neither JAX nor PyTorch;
`preprocess` uses it too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class HomeError(argparse.ArgumentTypeError, ValueError):
    """There is no such home directory, or no path at all."""


def expanded(text: str) -> str:
    """A path, or an id such as `owner/name`, with a leading `~` or `~user` replaced by that home directory.

    `./~/x`, a folder that is named so, becomes absolute: `pathlib` drops the `./`, and nothing may then take it for a
    home directory. The `type` of an argument that is an id or a directory; `given_path` is that of a path.

    Raises:
      HomeError: there is no such user, or no home directory is known.
    """
    if not text or not str(Path(text)).startswith("~"):
        return text
    if not text.startswith("~"):
        return str(Path(text).absolute())
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise HomeError(
            f"{text!r}: {Path(text).parts[0]!r} is no home directory that is known here; give the whole path, or "
            f"./{text} for a folder of that name"
        ) from error


def place(text: str) -> str:
    """As `expanded`, and not empty: `--output "$UNSET"` would be the current folder. Raises `HomeError`."""
    if not text:
        raise HomeError("the path is empty (a variable that is not set?)")
    return expanded(text)


def given_path(text: str) -> Path:
    """The `type` of an argument that is a path; raises `HomeError`."""
    return Path(place(text))


def expand_keys(config: ConfigDict, keys: Iterable[str]) -> None:
    """Expands the values of "key" or "group.key" in place where they are given; raises `HomeError`, naming the key."""
    for key in keys:
        group, _, name = key.rpartition(".")
        values = config[group] if group else config
        try:
            values[name] = values[name] and expanded(values[name])
        except HomeError as error:
            raise HomeError(f"{key} is {error}") from error
