"""Bytes of the input: a file, or a part of an uncompressed archive."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path
from typing import BinaryIO

from preprocess.decoding.images import Rejected


@dataclasses.dataclass(frozen=True, slots=True)
class ByteSource:
    """Bytes on disk: a file, or a part of an archive (`size` >= 0)."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self, limit: int) -> bytes:
        """The bytes; raises `Rejected` if they cannot be read or are more than `limit`."""
        with self.open() as file:
            try:
                size = os.fstat(file.fileno()).st_size if self.size < 0 else self.size
                if size > limit:
                    raise Rejected("file too large", f"{size:,} bytes, the limit is {limit:,}")
                file.seek(self.offset)
                data = file.read(size)
            except OSError as error:
                raise Rejected("unreadable file", error.strerror or str(error), transient=True) from error
        if self.size >= 0 and len(data) < self.size:
            raise Rejected("unreadable file", "the archive is cut short", transient=True)
        return data

    def open(self) -> BinaryIO:
        """The open file; raises `Rejected` if it cannot be opened."""
        try:
            if not stat.S_ISREG(Path(self.path).stat().st_mode):  # opening a pipe would wait for ever
                raise Rejected("not a regular file")
            return Path(self.path).open("rb")
        except FileNotFoundError as error:
            raise Rejected("missing file", str(error.filename), transient=True) from error
        except ValueError as error:  # a NUL in the name
            raise Rejected("missing file", repr(self.path)) from error
        except OSError as error:
            raise Rejected("unreadable file", error.strerror or str(error), transient=True) from error
