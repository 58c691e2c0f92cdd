"""Precomputed vision vectors: `--vision-embeddings DIR` holds one `<key>.npy` an image, float32 [1024]."""

from __future__ import annotations

import collections
import io
import math
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from fluxdit_jax.dataset.manifest import EncoderIdentity
from preprocess import PreprocessError
from preprocess.decoding.formats import EXTENSIONS
from preprocess.decoding.images import Rejected
from preprocess.input.byte_source import ByteSource

WIDTH = 1024
_MAX_BYTES = 1_000_000


class Vectors:
    """A folder of vectors.

    `KEY.npy` (photos/a.jpg.npy) belongs to the image KEY. `photos/a.npy` does too, as long as only one image
    of the input is called photos/a.

    Args:
      directory: the folder.
      keys: of all images of the input.
      source: name of the encoder that made them, or "".

    Raises:
      PreprocessError: there is no such folder.
    """

    def __init__(self, directory: str, keys: Iterable[str], source: str = "") -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise PreprocessError(f"--vision-embeddings {directory}: there is no such folder")
        stems = collections.Counter(_stem(key) for key in keys)
        self._shared = {stem for stem, count in stems.items() if count > 1}
        self.identity = EncoderIdentity(
            id=f"precomputed:{source}" if source else "precomputed",
            revision="",
            sha256="",
            dtype="float32",
            width=WIDTH,
            options={"precomputed": True},
        )

    def read(self, key: str) -> tuple[bytes, np.ndarray]:
        """The file's bytes and the vector in it, float32 [1024] of unit L2 norm; raises `Rejected`."""
        path = self._file(key)
        if path is None:
            path = self._file(_stem(key))
            if path is None:
                raise Rejected("no vector", f"neither {key}.npy nor {_stem(key)}.npy")
            if _stem(key) in self._shared:
                raise Rejected("no vector", f"several images are called {_stem(key)}: name it {key}.npy")
        data = ByteSource(str(path)).read(_MAX_BYTES)
        return data, parse(data)

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


def parse(data: bytes) -> np.ndarray:
    """A `.npy` of one vector to float32 [1024] of unit L2 norm; raises `Rejected`."""
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except Exception as error:  # noqa: BLE001  numpy parses the header with ast: many kinds of error
        raise Rejected("not a .npy vector", str(error)[:200]) from error
    # Judged before the array is made, which a header may claim to be of any size.
    if math.prod(shape) != WIDTH or len([side for side in shape if side != 1]) != 1:
        raise Rejected("wrong vector shape", f"{list(shape)}, expected [{WIDTH}]")
    if dtype.kind != "f" or len(data) - file.tell() < WIDTH * dtype.itemsize:
        raise Rejected("wrong vector type", f"{dtype}, {len(data) - file.tell()} bytes; expected float32")
    vector = np.frombuffer(data, dtype, WIDTH, file.tell()).astype(np.float64)
    if not np.isfinite(vector).all():
        raise Rejected("vector is not finite", f"{int((~np.isfinite(vector)).sum())} of {WIDTH} values")
    norm = float(np.linalg.norm(vector))
    if not 1e-12 < norm < 1e30:
        raise Rejected("vector without length", f"its norm is {norm:g}")
    return (vector / norm).astype(np.float32)
