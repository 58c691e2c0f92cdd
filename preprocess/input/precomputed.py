"""Precomputed conditions: a folder of one `.npy` an image, as `--vision-embeddings DIR` or `--condition NAME=DIR`."""

from __future__ import annotations

import collections
import io
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from fluxdit_jax.dataset.fields import DECLARED, FILE, SEQUENCE, VECTOR, VISION, Field, field_named, name_fault
from fluxdit_jax.dataset.manifest import EncoderIdentity
from preprocess import PreprocessError
from preprocess.database import StoredSet
from preprocess.decoding.formats import EXTENSIONS
from preprocess.decoding.images import Rejected
from preprocess.input.byte_source import ByteSource

VISION_WIDTH = 1024
MAX_BYTES = 1_000_000
_MAX_WIDTH, _MAX_TOKENS = 2**16, 4096
_LOOKED_AT = 100  # files that decide what the width is


class Folder:
    """A folder of one condition's files.

    `KEY.npy` (photos/a.jpg.npy) belongs to the image KEY. `photos/a.npy` does too, as long as only one image
    of the input is called photos/a.

    Attributes:
      field: what the files are.
      identity: as of an encoder. Its width is the commonest of the first files, by key.

    Raises:
      PreprocessError: there is no such folder, or no file of an image in it.
    """

    def __init__(self, field: Field, directory: str, keys: Callable[[], Iterable[str]], source: str = "") -> None:
        """
        Args:
          directory: the folder.
          keys: gives those of all images of the input, sorted.
          source: name of what made the files, or "".
        """
        self.field, self.directory = field, Path(directory)
        option = "--vision-embeddings" if field == VISION else f"--condition {field.name}="
        if not self.directory.is_dir():
            raise PreprocessError(f"{option} {directory}: there is no such folder")
        stems = StoredSet()
        self._shared: set[str] = set()
        for stem in map(_stem, keys()):
            if stem in stems:
                self._shared.add(stem)
            stems.add(stem)
        self.identity = EncoderIdentity(
            id=f"precomputed:{source}" if source else "precomputed",
            revision="",
            sha256="",
            dtype="float32",
            width=VISION_WIDTH if field == VISION else self._width(option, keys),
            options={"precomputed": True},
        )

    @classmethod
    def of_plan(cls, field: Field, directory: str, identity: EncoderIdentity) -> Folder:
        """The folder as another process found it, which asks for no file that it could not tell from another."""
        folder = cls.__new__(cls)
        folder.field, folder.directory, folder.identity, folder._shared = field, Path(directory), identity, set()
        return folder

    def _width(self, option: str, keys: Callable[[], Iterable[str]]) -> int:
        """The commonest width of the first files; one that has another is then the reject."""
        widths: collections.Counter[int] = collections.Counter()
        fault = f"there is no file of an image in it, as {next(iter(keys()), 'KEY')}.npy"
        for key in keys():
            path = self._file(key) or self._file(_stem(key))
            if path is None:
                continue
            try:
                widths[parse(ByteSource(str(path)).read(MAX_BYTES), self.field).shape[-1]] += 1
            except Rejected as error:
                fault = f"no file in it can be used; {path.name}: {error}"
            if widths.total() == _LOOKED_AT:
                break
        if not widths:
            raise PreprocessError(f"{option} {self.directory}: {fault}")
        return widths.most_common(1)[0][0]

    def read(self, key: str) -> tuple[bytes, np.ndarray]:
        """The bytes of an image's file, and what they say, see `parse`; raises `Rejected`."""
        what = f"no {'vector' if self.field == VISION else self.field.name}"
        path = self._file(key)
        if path is None:
            path = self._file(_stem(key))
            if path is None:
                raise Rejected(what, f"neither {key}.npy nor {_stem(key)}.npy")
            if _stem(key) in self._shared:
                raise Rejected(what, f"several images are called {_stem(key)}: name it {key}.npy")
        data = ByteSource(str(path)).read(MAX_BYTES)
        return data, parse(data, self.field, self.identity.width)

    def _file(self, name: str) -> Path | None:
        """The file of this name, or of the same with its accents composed in another way, as a Mac writes them."""
        for spelt in dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))):
            path = self.directory / f"{spelt}.npy"
            if os.path.lexists(path):
                return path
        return None


def _stem(key: str) -> str:
    path = PurePosixPath(key)
    return str(path.with_suffix("")) if path.suffix.lower() in EXTENSIONS else key


def parse(data: bytes, field: Field, width: int | None = None) -> np.ndarray:
    """A `.npy` file as the array that a record stores.

    Args:
      field: a vector, which is scaled to unit L2 norm, or a sequence [n, E].
      width: that it must have; None: any.

    Raises:
      Rejected: it is no such array, has another width, or a value that is not finite.
    """
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # noqa: BLE001  numpy parses the header with ast: many kinds of error
        raise Rejected("not a .npy vector", str(error)[:200]) from error
    # Judged before the array is made, which a header may claim to be of any size.
    if field.kind == VECTOR:
        found = math.prod(shape) if len([side for side in shape if side != 1]) == 1 or shape == (1,) else 0
        expected = f"[{width}]" if width else "one vector"
    else:
        found = shape[1] if len(shape) == 2 and 1 <= shape[0] <= _MAX_TOKENS else 0
        expected = f"[1 to {_MAX_TOKENS}, {width or 'width'}]"
    count = math.prod(shape)
    if not 1 <= found <= _MAX_WIDTH or (width and found != width):
        raise Rejected("wrong vector shape", f"{list(shape)}, expected {expected}")
    if dtype.kind != "f" or len(data) - file.tell() < count * dtype.itemsize:
        raise Rejected("wrong vector type", f"{dtype}, {len(data) - file.tell()} bytes; expected float32")
    values = np.frombuffer(data, dtype, count, file.tell()).astype(np.float64)
    if field.kind == SEQUENCE:
        values = values.reshape(shape, order="F" if fortran else "C").astype(field.dtype)
    if not np.isfinite(values).all():
        raise Rejected("vector is not finite", f"{int((~np.isfinite(values)).sum())} of {count} values")
    if field.kind == SEQUENCE:
        return values
    norm = float(np.linalg.norm(values))
    if not 1e-12 < norm < 1e30:
        raise Rejected("vector without length", f"its norm is {norm:g}")
    return (values / norm).astype(field.dtype)


def parse_option(text: str) -> tuple[str, str]:
    """(name, folder) of `--condition NAME=DIR`; raises `PreprocessError`."""
    name, equals, directory = text.partition("=")
    if not (equals and directory):
        raise PreprocessError(f"--condition {text}: expected NAME=DIR")
    if name in DECLARED and DECLARED[name].made_from != FILE:
        other = ", and --vision-embeddings DIR takes its vectors from files" if name == VISION.name else ""
        raise PreprocessError(f"--condition {text}: {name} is what the {DECLARED[name].maker} makes{other}")
    if fault := name_fault(name):
        raise PreprocessError(f"--condition {text}: {fault}")
    return name, directory


def folders_of_plan(conditions: Sequence[str], vision: str, identities: dict[str, EncoderIdentity]) -> list[Folder]:
    """What `folders` found in the process that planned, by the encoders' identities of its plan."""
    named = [(VISION, vision)] if vision else []
    named += [(field_named(name), directory) for name, directory in map(parse_option, conditions)]
    return [Folder.of_plan(field, directory, identities[field.encoder]) for field, directory in named]


def folders(
    conditions: Sequence[str], vision: str, keys: Callable[[], Iterable[str]], vision_source: str
) -> list[Folder]:
    """The folders of a build: those of `--condition`, and of `--vision-embeddings` if it is given.

    Args:
      keys: gives those of all images of the input, sorted.

    Raises:
      PreprocessError: an option is malformed, a declared condition has no folder, or a folder is not what it must be.
    """
    given = [parse_option(text) for text in conditions]
    names = [name for name, _ in given]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise PreprocessError(f"--condition {min(repeated)}=... is given more than once")
    if missing := [name for name, field in DECLARED.items() if field.made_from == FILE and name not in names]:
        raise PreprocessError(f"--condition {missing[0]}=DIR is needed: this version's records store it")
    found = [Folder(VISION, vision, keys, vision_source)] if vision else []
    return found + [Folder(field_named(name), directory, keys) for name, directory in given]
