"""A build that is given again: the options that are left out are the dataset's, and one that differs must be meant."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fluxdit_jax.dataset.fields import PATCHES
from fluxdit_jax.dataset.manifest import DatasetError, EncoderIdentity, Manifest, load_manifest, parts_of
from preprocess import PreprocessError
from preprocess.buckets import default_modulus
from preprocess.build.options import ENCODERS, Options
from preprocess.build.plan import Identities
from preprocess.build.publish import OPTIONS_FILE, load_options, save_options
from preprocess.build.units import WORK

# They say where something is, or which inputs are taken: judged by what would become of the records. A dataset that
# grows by them loses nothing. The others decide what every record is.
_SELECTING = (
    "input", "limit", *ENCODERS.values(), "vision_embeddings", "vision_patches", "condition", "caption_field",
    "allow_outside", "min_side", "max_pixels",
)  # fmt: skip
_DECISIVE = (
    "resolution",
    "vision_resolution",
    "modulus",
    "fit",
    "max_aspect",
    "holdout",
    "shard_size",
    "latent",
    "max_tokens",
    "seed",
    "dtype",
)
_OF_THIS_MACHINE = ("output", "workers")  # not taken from a dataset


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What is known of the build that an output folder has seen.

    Attributes:
      values: options by name; only some of a dataset that does not store them.
      identities: of the encoders, None if they are not known.
      replace: that build was permitted to drop or encode again what there was.
    """

    values: dict[str, Any]
    identities: Identities | None = None
    replace: bool = False


def published(output: Path) -> Earlier | None:
    """What a dataset, or a folder of several resolutions, was built with; None if there is none.

    A dataset without a readable `build.json` is asked for what its manifest knows, and a folder of several for that of
    its largest.
    """
    if parts := parts_of(output):
        return _published_parts(output, parts)
    manifest: Manifest | None = None
    identities: Identities | None = None
    with contextlib.suppress(DatasetError):
        manifest = load_manifest(output)
        identities = manifest.encoders
    try:
        return Earlier(load_options(output).to_dict(), identities)
    except PreprocessError:
        return Earlier(_of_manifest(manifest), identities) if manifest else None


def _published_parts(output: Path, parts: dict[int, Path]) -> Earlier:
    largest = published(parts[max(parts)])
    assert largest is not None
    values = largest.values
    with contextlib.suppress(PreprocessError):
        values = load_options(output).to_dict()
    seen = values.get("vision_resolution") or values["resolution"]
    sides = sorted(parts.keys() | set(values.get("resolutions", ())))  # one that is damaged is made again
    return dataclasses.replace(largest, values=values | {"resolutions": sides, "vision_resolution": seen})


def unfinished(output: Path) -> Earlier | None:
    """What a build that did not end was asked to do; None if there is none, or it is not known."""
    path = output / WORK / OPTIONS_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        options = load_options(path.parent)
        identities = {name: EncoderIdentity(**identity) for name, identity in raw["identities"].items()}
        return Earlier(options.to_dict(), identities, raw["replace"] is True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, PreprocessError):
        return None


def begin(output: Path, options: Options, identities: Identities, replace: bool) -> None:
    """Notes what is being built, so that it can be continued by `--output` alone, and planned without encoders."""
    path = output / WORK / OPTIONS_FILE
    known = {name: dataclasses.asdict(identity) for name, identity in identities.items()}
    more = {"identities": known, "replace": replace}
    save_options(path, options, **more)


def _of_manifest(manifest: Manifest) -> dict[str, Any]:
    values = {
        "resolution": manifest.resolution,
        "modulus": manifest.modulus,
        "vision_resolution": manifest.vision_resolution,
        "fit": manifest.fit,
    }
    for name, option in ENCODERS.items():
        if name in manifest.encoders and not manifest.encoders[name].id.startswith("precomputed"):
            values[option] = manifest.encoders[name].id
    if PATCHES.encoder in manifest.encoders:
        values["vision_patches"] = manifest.encoders[PATCHES.encoder].options["cells"]
    if "max_tokens" in manifest.text.options:
        values["max_tokens"] = manifest.text.options["max_tokens"]
    return values


def complete(given: dict[str, Any]) -> tuple[Options, list[str]]:
    """Options of a command line, those left out taken from the dataset or the unfinished build in its output.

    Args:
      given: by name; "output" is among them.

    Returns:
      The options, and those taken from there that are not the defaults, as on a command line.

    Raises:
      PreprocessError: no input is given and none is known.
    """
    output = Path(given["output"])
    earlier = unfinished(output) or published(output)
    values = dict(earlier.values) if earlier else {}
    for name in _OF_THIS_MACHINE:
        values.pop(name, None)
    _follow_resolution(values, given)
    taken = [
        _flag(name, value)
        for name, value in values.items()
        if name not in given and value not in (getattr(Options, name, None), [])
        if not (name == "resolution" and values.get("resolutions"))
    ]
    given = given | {"condition": _conditions(values.get("condition", ()), given.get("condition", ()))}
    values |= given
    for name in ("condition", "resolutions"):
        values[name] = tuple(values.get(name, ()))
    if "input" not in values:
        where = "holds no dataset" if earlier is None else f"does not say what it was built from ({OPTIONS_FILE})"
        raise PreprocessError(f"--input is needed: --output {output} {where}")
    return Options(**values), taken


def _conditions(before: Iterable[str], given: Iterable[str]) -> tuple[str, ...]:
    """NAME=DIR of all: those of before stay; NAME= takes one of them away."""
    had, names = ({text.partition("=")[0] for text in texts} for texts in (before, given))
    kept = [text for text in before if text.partition("=")[0] not in names]
    return (*kept, *(text for text in given if not (text.endswith("=") and text[:-1] in had)))


def _follow_resolution(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Brings the modulus of an earlier build to the resolution that is given: bucket sides are in proportion to it."""
    before = values.get("resolution", Options.resolution)
    now = given.get("resolution", before)
    if values.get("modulus") == default_modulus(before):
        del values["modulus"]  # it was not given
    elif "modulus" in values and given.get("resolutions"):
        values["modulus"] = values["modulus"] * now // before


def _flag(name: str, value: Any) -> str:
    if name == "resolutions":
        return f"--resolution {','.join(map(str, value))}"
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, (list, tuple)):
        return " ".join(f"--{flag} {shlex.quote(each)}" for each in value) or f"no --{flag}"
    if name == "limit" and not value:
        return "--limit 0 (all)"
    return f"--{flag} {value!r}" if value == "" or " " in str(value) else f"--{flag} {value}"


def require_same(options: Options, before: Earlier, output: str) -> dict[str, str]:
    """Checks that a build has the options of the dataset in its output.

    Returns:
      {option: line} of those that select other inputs or encoders: whether they may differ depends on what would
      become of the records.

    Raises:
      PreprocessError: an option that decides what the records are differs; it names both values.
    """
    now = options.to_dict()
    differing = [name for name, value in before.values.items() if name in now and now[name] != value]
    if "seed" in differing and options.latent == before.values.get("latent") == "mean":
        differing.remove("seed")
    # An encoder that is added takes nothing from what exists.
    differing = [name for name in differing if before.values[name] or name not in ENCODERS.values()]
    lines = {
        name: f"  {_flag(name, now[name])} is given, the dataset was built with {_flag(name, before.values[name])}"
        for name in differing
    }
    decisive = [lines[name] for name in _DECISIVE if name in lines]
    selecting = {name: lines[name] for name in _SELECTING if name in lines}
    if decisive:
        raise PreprocessError(
            "\n".join(
                [
                    f"--output {output} was built with other options; nothing was changed:",
                    *decisive,
                    *selecting.values(),
                    f"To build it anew with these, add --replace. To update it, leave them out (`--output {output}` "
                    "alone repeats its build); or build into another --output.",
                ]
            )
        )
    return selecting


def permitted(options: Options, replace: bool, interrupted: Earlier | None) -> bool:
    """Whether what is there may be replaced: by this command, or by the one that it continues."""
    if replace or interrupted is None or not interrupted.replace:
        return replace
    now = options.to_dict()
    return all(now[name] == interrupted.values.get(name) for name in (*_DECISIVE, *_SELECTING))
