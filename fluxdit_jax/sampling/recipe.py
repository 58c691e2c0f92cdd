"""How a picture was drawn, as text in its PNG: everything that `sample --recipe` needs to draw it again.

The text "recipe" is JSON; beside it stand the values that people look for, each as a text of its own. A PNG may come
from anyone: its text is bounded and checked, its paths are only tried as paths, and nothing in it is fetched or run.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import PngImagePlugin

import fluxdit_jax
from fluxdit_jax.dataset.fields import field_named, name_fault
from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.settings import Settings
from fluxdit_jax.shared.cli import explain
from fluxdit_jax.shared.sanitize import shown
from fluxdit_jax.vae.files import find_directory, hash_files, weight_files

KEY = "recipe"
FORMAT = 1
_MAX_BYTES = 16 << 20
MAX_PICTURES = 10_000
MAX_STEPS = 10_000
MAX_SCALE = 1e9
MAX_SCALES = 1000  # of a sweep
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_RENAMED_METHODS = {"kutta3": "rk3"}
_OLD = ("prompt", "seed", "steps", "method", "guidance_text", "guidance_vision", "weights")


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_SCALE  # no NaN either


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096 and _CONTROL.search(value) is None


def _prompt(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _list_of(check: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and 0 < len(value) <= most and all(map(check, value))


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _scales(value: Any) -> bool:
    return (
        isinstance(value, dict) and len(value) <= 100 and all(map(_text, value)) and all(map(_number, value.values()))
    )


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# The arguments of `sample` that decide a picture, and what each may be.
ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    "prompt": _list_of(_prompt, MAX_PICTURES),
    "count": _integer(1, MAX_PICTURES),
    "seed": _integer(0, 2**31 - 1),
    "size": _text,
    "steps": _integer(1, MAX_STEPS),
    "method": _text,
    "guidance_text": _number,
    "guidance_vision": _number,
    "guidance": _scales,
    "rescale": _number,
    "sweep_text": _optional(_list_of(_number, MAX_SCALES)),
    "sweep_vision": _optional(_list_of(_number, MAX_SCALES)),
    "workdir": _optional(_text),
    "model": _optional(_text),
    "weights": _text,
    "step": _integer(0, 2**31 - 1),
    "vae": _optional(_text),
    "text_encoder": _optional(_text),
}


_SINCE = ("model", "guidance")  # an older version's recipe has none


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """All that decides a picture or a sheet.

    Attributes:
      arguments: of `sample`, by name, see `ARGUMENTS`.
      digest: `tree_digest` of the EMA weights; "" where an older version wrote none.
      weights_path: where they were read, for people.
      batch_size: pictures computed at once: another number may round differently. 0: not known.
      given: the conditions besides the prompt, by name: "vision", the reference's vector, and those of --condition.
      reference: its file's name and sha256, for people; or None.
      circumstances: what else decides bits: encoders, precision, device, versions.
    """

    arguments: dict[str, Any]
    digest: str = ""
    weights_path: str = ""
    batch_size: int = 0
    given: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    reference: dict[str, str] | None = None
    circumstances: dict[str, Any] = dataclasses.field(default_factory=dict)

    def of_one(self, prompt: str, seed: int) -> Recipe:
        """That of one picture of several."""
        own = {"prompt": [prompt], "count": 1, "seed": seed, "sweep_text": None, "sweep_vision": None}
        return dataclasses.replace(self, arguments=self.arguments | own)

    def notes(self) -> PngImagePlugin.PngInfo:
        """As the texts of a PNG."""
        arguments = self.arguments
        plain = arguments | {
            "prompt": "\n".join(arguments["prompt"]),
            "weights": self.weights_path,
            "weights_digest": self.digest,
            "reference": (self.reference or {}).get("path", ""),
        }
        info = PngImagePlugin.PngInfo()
        for name, value in plain.items():
            if value is not None:
                info.add_itxt(name, str(value).encode("utf-8", "replace").decode())
        whole = dataclasses.asdict(self) | {"format": FORMAT}
        values = {name: _written(value) for name, value in whole.pop("given").items()}
        whole |= {"vector": values.pop("vision", None)} | ({"conditions": values} if values else {})
        info.add_itxt(KEY, json.dumps(whole, ensure_ascii=True))
        return info


def read(path: Path) -> Recipe:
    """The recipe of a PNG of `sample`. What an older version wrote has no digest, no batch size and no rescale.

    Raises:
      SampleError: it is no PNG, has no recipe, or one that cannot be; the message names the value.
    """
    try:
        with PngImagePlugin.PngImageFile(path) as picture:  # reads the texts and no pixels, however many there are
            texts = {str(name): text for name, text in picture.info.items() if isinstance(text, str)}
            size = f"{picture.width}x{picture.height}"
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise SampleError(f"--recipe {path} cannot be read as a PNG: {explain(error)}") from error
    try:
        if KEY in texts:
            return _parsed(texts[KEY])
        if not texts.keys() >= set(_OLD):
            raise ValueError("it has no recipe; only pictures and sheets of fluxdit_jax.sample have one")
        return _of_old(texts, size)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SampleError(f"--recipe {path}: {shown(str(error))[:300]}") from error


def _parsed(text: str) -> Recipe:
    if len(text) > _MAX_BYTES:
        raise ValueError(f"its recipe has more than {_MAX_BYTES:,} characters")
    raw = json.loads(text)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"its recipe has format {found!r}; this version reads format {FORMAT}")
    arguments = raw.get("arguments")
    if not isinstance(arguments, dict):
        raise ValueError("its recipe has no arguments")
    arguments, values = _checked(arguments), raw.get("conditions", {})
    if not isinstance(values, dict):
        raise ValueError(f"conditions of its recipe is {values!r:.80}, which cannot be")
    values |= {} if raw.get("vector") is None else {"vision": raw["vector"]}
    given = {name: _read(name, value) for name, value in values.items()}
    for name, fits in (
        ("digest", _text),
        ("batch_size", _integer(1, 4096)),
        ("circumstances", _table),
        ("reference", _optional(_table)),
    ):
        if not fits(raw.get(name)):
            raise ValueError(f"{name} of its recipe is {raw.get(name)!r}, which cannot be")
    return Recipe(
        arguments,
        raw["digest"],
        batch_size=raw["batch_size"],
        given=given,
        reference=raw.get("reference"),
        circumstances=raw["circumstances"],
    )


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in ARGUMENTS if name not in arguments and name not in _SINCE]
    if missing:
        raise ValueError(f"its recipe lacks {', '.join(missing)}")
    for name, fits in ARGUMENTS.items():
        if name in arguments and not fits(arguments[name]):
            raise ValueError(f"{name} of its recipe is {arguments[name]!r}, which cannot be")
    if (arguments["workdir"] is None) == (arguments.get("model") is None):
        raise ValueError("its recipe must name a workdir or a model, and not both")
    if arguments["count"] * len(arguments["prompt"]) > MAX_PICTURES:
        raise ValueError(f"its recipe asks for more than {MAX_PICTURES:,} pictures")
    method = _RENAMED_METHODS.get(arguments["method"], arguments["method"])
    return {name: arguments[name] for name in ARGUMENTS if name in arguments} | {"method": method}


def _written(array: np.ndarray) -> Any:
    """A vector as base64 of f32; a sequence as its shape and that."""
    text = base64.b64encode(array.astype("<f4").tobytes()).decode()
    return text if array.ndim == 1 else [list(array.shape), text]


def _read(name: str, written: Any) -> np.ndarray:
    if name_fault(name):
        raise ValueError(f"conditions of its recipe has the name {name[:40]!r}, which cannot be")
    shape, text = written if isinstance(written, list) and len(written) == 2 else ([-1], written)
    field = field_named(name)
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(shape).astype(field.dtype)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{name} of its recipe is not base64 of numbers: {error}") from error
    if fault := field.fault(values):
        raise ValueError(f"{name} of its recipe {fault}")
    return values


def _of_old(texts: dict[str, str], size: str) -> Recipe:
    """Of the separate texts that an older version wrote; its picture's size is that of the PNG."""
    workdir, weights, step = texts["weights"].rsplit("/", 2)
    arguments: dict[str, Any] = dict.fromkeys(ARGUMENTS) | {
        "guidance": {},
        "prompt": [texts["prompt"]],
        "count": 1,
        "size": size,
        "method": texts["method"],
        "rescale": 0.0,
        "workdir": workdir,
        "weights": weights,
    }
    for name, text in (("seed", texts["seed"]), ("steps", texts["steps"]), ("step", step)):
        arguments[name] = int(text[:20])
    for name in ("guidance_text", "guidance_vision"):
        arguments[name] = float(texts[name][:40])
    reference = {"path": texts["reference"]} if texts.get("reference") else None
    return Recipe(_checked(arguments), reference=reference)


def check_weights(again: Recipe, digest: str, others_wanted: bool, path: Path) -> None:
    """Refuses weights other than those of the recipe in `path`, unless others are asked for."""
    if not again.digest:
        print("note: an older version wrote this recipe: it does not know the digest of its weights, nor --rescale")
        return
    if digest == again.digest:
        return
    what = f"the weights are not those of the recipe (digest {digest[:12]}, the recipe has {shown(again.digest[:12])})"
    if others_wanted:
        print(f"note: {what}: it becomes another picture")
        return
    raise SampleError(
        f"--recipe {path}: {what}: bring them back, name their run with --workdir, or give --step or "
        "--weights to draw with others"
    )


def circumstances(settings: Settings, manifest: Manifest, vae: str | None) -> dict[str, Any]:
    """What decides the bits of a picture besides the arguments and the weights."""
    return {
        "fluxdit_jax": fluxdit_jax.__version__,
        "jax": jax.__version__,
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        "dtype": settings.model.dtype,
        "attention": settings.model.attention,
        "time_shift": settings.flow.shift,
        "text_tokens": settings.text_tokens,
        "vae_given": hash_files(weight_files(find_directory(manifest.vae, vae))) if vae else "",
        **{name: f"{encoder.id} {encoder.sha256}" for name, encoder in manifest.encoders.items()},
    }


def note_circumstances(again: Recipe, made: Recipe) -> None:
    """Prints what is not as it was when the recipe was written, and decides bits."""
    there, here = again.circumstances, made.circumstances
    changed = [name for name in here if there and there.get(name) != here[name]]
    if changed:
        listed = "; ".join(f"{name} {shown(str(there.get(name))[:100])!r}, here {here[name]!r}" for name in changed)
        print(f"note: drawn under other circumstances, so that bits may differ: {listed}")
