"""What to download, and where to put it, when encoders cannot be fetched: said once for all of them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from preprocess import PreprocessError

BUILTIN = "--vae builtin:dct --text-encoder builtin:hash --vision-encoder builtin:tone"


@dataclasses.dataclass(frozen=True)
class _Known:
    """A default encoder: its weights' size in MB, its licence, and whether its page asks to accept that first."""

    megabytes: int
    licence: str
    gated: bool = False
    note: str = ""


_KNOWN = {
    "black-forest-labs/FLUX.1-schnell": _Known(170, "Apache-2.0", gated=True),
    "google/t5-v1_1-large": _Known(
        3130,
        "Apache-2.0",
        note="its main branch holds pickles: add --revision refs/pr/N, the pull request of SFconvertbot on its page",
    ),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _Known(1210, "DINOv3 License", gated=True),
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An encoder that cannot be fetched.

    Attributes:
      option: of the command line, as "--vae".
      spec: the Hugging Face id, with its revision if one was given.
      files: patterns of what it consists of.
      why: what the Hub or the network said.
      refused: the Hub was reached, and refused.
    """

    option: str
    spec: str
    files: tuple[str, ...]
    why: str
    refused: bool = False

    @property
    def repository(self) -> str:
        return self.spec.partition("@")[0]

    @property
    def folder(self) -> str:
        return Path(self.repository).name

    def command(self, folder: str) -> str:
        """The `hf download` line that puts it into a folder."""
        revision = self.spec.partition("@")[2]
        at = f"--revision {revision} " if revision else ""
        names = " ".join(f"--include '{name}'" for name in self.files)
        return f"hf download {self.repository} {at}{names} --local-dir {folder}"


class Unreachable(PreprocessError):
    """An encoder's repository cannot be fetched and is not in the cache."""

    def __init__(self, wanted: Wanted) -> None:
        from huggingface_hub import constants

        super().__init__(
            f"{wanted.option} {wanted.spec}: the repository {wanted.why}. On a machine with access run "
            f"`{wanted.command(wanted.folder)}`, copy that directory here and give it as `{wanted.option} DIRECTORY`; "
            f"or copy the other machine's Hugging Face cache (~/.cache/huggingface/hub) to "
            f"{os.fspath(constants.HF_HUB_CACHE)}. To try the system without any download use the built-in encoders: "
            f"{BUILTIN}."
        )
        self.wanted = wanted


def together(errors: list[Unreachable]) -> PreprocessError:
    """One error for several encoders: what to download, how large, which licence to accept, and where to put it."""
    from huggingface_hub import constants

    if len(errors) == 1:
        return errors[0]
    wanted = [error.wanted for error in errors]
    lines = [f"{len(wanted)} encoders cannot be fetched, and are not in {constants.HF_HUB_CACHE}:"]
    lines += [f"  {one.option} {one.spec}{_about(one)}" for one in wanted]
    lines += [f"  ({one.option}: {one.why})" for one in wanted if one.refused]
    if not any(one.refused for one in wanted):
        lines.append(f"  ({wanted[0].why})")
    lines.append("On a machine with access to huggingface.co:")
    gated = [one for one in wanted if one.refused or _known(one).gated]
    if gated:
        pages = " and ".join(f"https://huggingface.co/{one.repository}" for one in gated)
        lines += [f"  accept the licence on {pages}", "  hf auth login        # once"]
    for one in wanted:
        lines.append(f"  {one.command(f'encoders/{one.folder}')}")
        if _known(one).note and "@" not in one.spec:
            lines.append(f"      # {_known(one).note}")
    here = " ".join(f"{one.option} encoders/{one.folder}" for one in wanted)
    lines += [
        f"Copy the folder `encoders` here and add: {here}",
        f"Or copy that machine's cache (~/.cache/huggingface/hub) to {constants.HF_HUB_CACHE}",
        f"To try the system without any download: {BUILTIN}",
    ]
    return PreprocessError("\n".join(lines))


def _known(wanted: Wanted) -> _Known:
    return _KNOWN.get(wanted.repository, _Known(0, ""))


def _about(wanted: Wanted) -> str:
    known = _known(wanted)
    return f"   about {known.megabytes:,} MB, {known.licence}" if known.megabytes else ""
