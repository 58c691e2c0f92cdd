"""Finding an encoder's files: a local directory, or a Hugging Face repository through its cache.

Only configuration, tokenizer and safetensors files are ever fetched or read. Nothing is unpickled and no
code from a repository is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from preprocess import PreprocessError
from preprocess.encoders.downloads import Unreachable, Wanted

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
TRANSFORMERS_WEIGHTS = "model"
_CONVERSION_BOT = "SFconvertbot"  # the Hub's own service: offers safetensors of repositories that lack them


@dataclasses.dataclass(frozen=True)
class Found:
    """Where an encoder's files are.

    Attributes:
      directory: holds `config.json` and the weights.
      spec: as the user gave it.
      revision: commit hash if it came from the Hub, else "".
      sha256: over names and contents of the weight and tokenizer files, hex.
      config: `config.json`, parsed.
    """

    directory: Path
    spec: str
    revision: str
    sha256: str
    config: dict[str, Any]


def find(spec: str, option: str, stem: str, subfolder: str = "", extra: tuple[str, ...] = ()) -> Found:
    """Finds an encoder's files, downloading them if `spec` is an id and they are not cached.

    Args:
      spec: directory, `owner/name` or `owner/name@revision`.
      option: the command line option behind `spec`, for messages.
      stem: file name of the weights without `.safetensors`.
      subfolder: looked into first, if the directory or repository has it.
      extra: further file patterns that belong to the encoder and decide its output (the tokenizer).

    Raises:
      PreprocessError: not there, not reachable, or without safetensors weights.
    """
    local = Path(spec).expanduser()
    if local.is_dir():
        revision = ""
    elif looks_like_path(spec):
        raise PreprocessError(
            f"{option} {spec}: there is no such directory. Give a directory that holds config.json and "
            f"{stem}.safetensors, a Hugging Face id (owner/name), or builtin:..."
        )
    else:
        local, revision = _from_hub(spec, option, stem, subfolder, extra)
    if subfolder and (local / subfolder / "config.json").is_file():
        local = local / subfolder
    try:
        config = json.loads((local / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PreprocessError(f"{option} {spec}: {local} has no config.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PreprocessError(f"{option} {spec}: {local / 'config.json'} cannot be read: {error}") from error
    weights = _weight_files(local, stem)
    if not weights:
        raise PreprocessError(_no_safetensors(spec, option, local, stem))
    others = sorted({path for pattern in extra for path in local.glob(pattern)})
    return Found(local, spec, revision, _hash_files([*weights, *others]), config)


def looks_like_path(spec: str) -> bool:
    """Whether a spec that is no directory was meant to be one, and not an id of the Hub."""
    return spec.startswith((".", "/", "~")) or spec.partition("@")[0].count("/") != 1


def _weight_files(directory: Path, stem: str) -> list[Path]:
    return sorted([*directory.glob(f"{stem}.safetensors"), *directory.glob(f"{stem}-*-of-*.safetensors")])


def _patterns(stem: str, folder: str, extra: tuple[str, ...]) -> list[str]:
    names = ["config.json", f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", "*.safetensors.index.json"]
    return [folder + name for name in [*names, *extra]]


def _from_hub(spec: str, option: str, stem: str, subfolder: str, extra: tuple[str, ...]) -> tuple[Path, str]:
    """Downloads (or finds in the cache) the files of a repository; returns the snapshot and its commit."""
    from huggingface_hub import snapshot_download

    repository, _, revision = spec.partition("@")

    def fetch(folder: str, revision: str) -> Path:
        patterns = _patterns(stem, folder, extra)
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))

    try:
        folder = f"{subfolder}/" if subfolder else ""
        snapshot = fetch(folder, revision)
        if folder and not (snapshot / folder / "config.json").is_file():
            folder = ""
            snapshot = fetch(folder, revision)
        if not revision and not _weight_files(snapshot / folder, stem):
            try:
                offered = _offered_conversion(repository)
            except (OSError, ValueError):
                if (cached := _cached_conversion(snapshot, folder, stem)) is None:
                    raise
                snapshot = cached
            else:
                snapshot = fetch(folder, offered) if offered else snapshot
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these two
        raise _unreachable(spec, option, stem, subfolder, extra, error) from error
    return snapshot, snapshot.name


def _offered_conversion(repository: str) -> str:
    """The revision under which the Hub's conversion service offers safetensors, or "".

    google/t5-v1_1-large, the default text encoder, has them only there: its main branch holds pickles.
    """
    from huggingface_hub import HfApi

    try:
        offers = HfApi().get_repo_discussions(
            repository, author=_CONVERSION_BOT, discussion_type="pull_request", discussion_status="open"
        )
        return next((f"refs/pr/{offer.num}" for offer in offers if "safetensors" in offer.title), "")
    except (OSError, ValueError):
        raise
    except Exception as error:  # the HTTP library's own, without a connection
        raise OSError(str(error)) from error


def _cached_conversion(snapshot: Path, folder: str, stem: str) -> Path | None:
    """The snapshot of a pull request with weights that is in the cache, where the Hub cannot be asked."""
    references = sorted((snapshot.parents[1] / "refs" / "refs" / "pr").glob("[0-9]*"), key=lambda path: int(path.name))
    found = (snapshot.parent / path.read_text().strip() for path in references)
    return next((each for each in found if _weight_files(each / folder, stem)), None)


def _unreachable(
    spec: str, option: str, stem: str, subfolder: str, extra: tuple[str, ...], error: Exception
) -> Unreachable:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    folder = f"{subfolder}/" if subfolder else ""
    refused = isinstance(error, (GatedRepoError, RepositoryNotFoundError))
    if isinstance(error, GatedRepoError):
        why = "asks you to accept its licence (on its page) and to log in once with `hf auth login`"
    elif refused:
        why = "does not exist on the Hub, or is private and needs `hf auth login`"
    else:
        why = f"cannot be fetched ({_first_line(error)}) and is not in the cache"
    files = (f"{folder}config.json", f"{folder}{stem}*.safetensors*", *(f"{folder}{name}" for name in extra))
    return Unreachable(Wanted(option, spec, files, why, refused))


def _no_safetensors(spec: str, option: str, directory: Path, stem: str) -> str:
    return (
        f"{option} {spec}: {directory} has no {stem}.safetensors. Weights in pickle files (.bin, .pt, .ckpt) can "
        "run code when they are loaded and are not read. If the repository has a branch or pull request with "
        f"safetensors, give it as {option} OWNER/NAME@REVISION (for example @refs/pr/2); otherwise convert once, "
        "in a Python that you trust with the file: "
        '`from transformers import AutoTokenizer, T5EncoderModel; m = "OWNER/NAME"; '
        'T5EncoderModel.from_pretrained(m).save_pretrained("DIR"); '
        'AutoTokenizer.from_pretrained(m).save_pretrained("DIR")` '
        f"(or the model's own class), and give {option} DIR."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
