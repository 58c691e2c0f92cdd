"""The shard files of a split: any record's bytes, with a bounded number of files open."""

from __future__ import annotations

import collections
import resource
import threading
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from fluxdit_jax.dataset.manifest import DatasetError, Shard

# Nothing read ahead, and one read per record: what ArrayRecord's own data source sets for random access.
_RANDOM_ACCESS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}


class Shards:
    """Reads records by shard and row. Thread-safe; every read verifies the record's checksum.

    All shards are checked for existence and size at construction. As many as may be open are opened then; the others
    when they are read, in exchange for the one unused for longest.

    Raises:
      DatasetError: a shard is missing, has another size than the manifest says, cannot be opened, or holds another
        number of records. The message names the file.
    """

    def __init__(self, directory: str | Path, shards: tuple[Shard, ...], most_open: int | None = None):
        """
        Args:
          most_open: files that may be open at once; None: half of what the system allows (`ulimit -n`).
        """
        self.files = [Path(directory) / shard.file for shard in shards]
        self._shards, self._directory = shards, directory
        if most_open is None:
            most_open = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._most_open = most_open
        self._open: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()
        for file, shard in zip(self.files, shards, strict=True):
            if not file.is_file():
                raise DatasetError(f"{file} is missing; the manifest lists it with {shard.records} records")
            if (size := file.stat().st_size) != shard.bytes:
                raise DatasetError(
                    f"{file} has {size} bytes, the manifest says {shard.bytes}: it is truncated or from another "
                    f"build. `python -m preprocess verify {directory}` tells what is damaged"
                )
        for number in range(min(len(shards), self._most_open)):
            self._reader(number)

    def read(self, shard: int, row: int) -> bytes:
        """A serialised record; a damaged one raises a bare RuntimeError of ArrayRecord's, without a name."""
        return self._reader(shard).read([row])[0]

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if (reader := self._open.get(shard)) is not None:
                self._open.move_to_end(shard)
                return reader
        reader = self._opened(shard)
        with self._lock:
            self._open[shard] = reader
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)  # closed when the last read from it is done
        return reader

    def _opened(self, shard: int) -> ArrayRecordReader:
        file, expected = self.files[shard], self._shards[shard].records
        try:
            reader = ArrayRecordReader(str(file), **_RANDOM_ACCESS)
            if not reader.ok():
                raise RuntimeError("it is not an ArrayRecord file, or its index is damaged")
        except Exception as error:  # ArrayRecord raises bare C++ errors without a file name
            raise DatasetError(
                f"{file} cannot be opened: {str(error).splitlines()[0]}. "
                f"`python -m preprocess verify {self._directory}` tells what is damaged"
            ) from error
        if (found := reader.num_records()) != expected:
            raise DatasetError(f"{file} holds {found} records, the manifest says {expected}: it is from another build")
        return reader
