"""Names in an input that are no photographs of the user's: hidden files, folders of systems, and this project's own."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from fluxdit_jax.dataset.manifest import INDEX, MANIFEST
from preprocess.decoding.formats import EXTENSIONS

# Archives of macOS; thumbnails and bins of NAS boxes and Windows; what a file system's check found.
_SYSTEM = {"__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin"}
_SYSTEM |= {"system volume information", "lost+found", "thumbs.db", "desktop.ini"}
PLOTS = ("plan.png", "latents.png", "buckets.png", "contact.png", "pictures.png", "details.png")
MARK = "drawn by fluxdit_jax.preprocess"  # a text in the PNGs
# An extension of letters alone means something; "jpg_large", "jpg?w=1200" and the "30" of "at 10.15.30" do not.
_LETTERS = re.compile(r"\.[a-z]+[0-9]?")


def hidden(name: str) -> bool:
    """Whether a name begins with a dot, as those of macOS's resource forks do ("._a.png")."""
    return name.startswith(".")


def of_a_system(name: str) -> bool:
    """Whether a folder or file of this name is a system's own."""
    return name.casefold() in _SYSTEM


def of_this_project(names: set[str]) -> bool:
    """Whether a folder of these names is a dataset of `build`, one being built, or a run of training."""
    return (
        {MANIFEST, INDEX} <= names
        or "build_log.jsonl" in names
        or ({"config.json", "dataset.json"} <= names and bool({"checkpoints", "ema"} & names))
    )


def is_plot(path: Path, ours: bool) -> bool:
    """Whether a file was drawn by this project: by its mark, and in a folder of `ours` by its name.

    The name alone says nothing elsewhere: a plan.png may be the plan of a house.
    """
    if path.name not in PLOTS:
        return False
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return False
        with path.open("rb") as file:
            return ours or MARK.encode() in file.read(4096)
    except OSError:
        return False


def names_an_image(name: str) -> bool:
    """Whether a file whose extension is that of no image may be one: without extension, or with one made up."""
    suffix = PurePosixPath(name).suffix.lower()
    return not suffix or not _LETTERS.fullmatch(suffix) or suffix.startswith(EXTENSIONS)
