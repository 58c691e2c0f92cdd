"""Caption files beside pictures: which file belongs to which picture, by name, in a folder or in an archive."""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator

from preprocess.captions import Source
from preprocess.formats import EXTENSIONS
from preprocess.images import Rejected
from preprocess.place import Place

# Extension to how the file is read, in order of preference.
TYPES = {".json": ".json", ".txt": ".txt", ".caption": ".txt"}
_NUMBER = re.compile(r"(.+)\.(0|[1-9][0-9]{0,3})")


def extension(name: str) -> str:
    """The extension of a file's name in lower case, "" if it has none."""
    return _suffix(name).lower()


def _suffix(path: str) -> str:
    """As `PurePath.suffix`, which takes longer than all else of a scan of many files."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[dot:] if 0 < dot < len(name) - 1 else ""


def normal(path: str) -> str:
    """A path by which it is looked for: NFC, and the extension in lower case, as file systems and people differ."""
    if not path.isascii():
        path = unicodedata.normalize("NFC", path)
    suffix = _suffix(path)
    return path[: len(path) - len(suffix)] + suffix.lower() if suffix else path


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    name: str
    place: Place


class Sidecars:
    """The caption files and pictures of one folder, or of a whole archive.

    The captions of `a.png` are in `a.json`, `a.txt`, `a.caption`, in this order, then in `a.png.json` and so on (first
    there, where another picture is called `a` too). `a.1.txt`, `a.2.txt`, ..., numbered without a gap from 0 or 1, hold
    further ones of the kind of `a.txt`, unless they are those of a picture `a.1.png`. Upper and lower case of an
    extension and the composition of accents (NFC, NFD) do not count where no file has the very name.

    Args:
      pictures: names (paths below the folder or archive).
      files: of the caption files, with where they are.
      first_dot: a WebDataset: a caption file with none of these names belongs to the one picture that shares its name
        up to the first dot, if it is the only caption file that does.
    """

    def __init__(
        self, pictures: Iterable[str], files: Iterable[tuple[str, Place]], first_dot: bool = False
    ) -> None:
        self._stems = collections.Counter(_stem(name) for name in pictures)
        self._files: dict[str, list[_File]] = collections.defaultdict(list)
        self._numbered: dict[tuple[str, str], dict[int, str]] = collections.defaultdict(dict)
        self._used: dict[str, set[str]] = {}
        for name, place in files:
            at = normal(name)
            self._files[at].append(_File(name, place))
            suffix = extension(name)
            if (match := _NUMBER.fullmatch(at.removesuffix(suffix))) and match[0] not in self._stems:
                self._numbered[match[1], suffix][int(match[2])] = at
        self._samples: dict[str, tuple[list[str], set[str]]] = {}
        if first_dot:
            self._group(pictures)

    def sources(self, picture: str) -> tuple[Source, ...]:
        """Where the captions of a picture may stand, in order of preference."""
        stem, name = _stem(picture), normal(picture)
        bases = [name, stem] if self._stems[stem] > 1 else [stem, name]
        found = [source for base in dict.fromkeys(bases) for source in self._of(base, picture)]
        if not found and self._samples:
            found = self._of_sample(picture)
        groups: dict[str, int] = {}
        return tuple(
            dataclasses.replace(source, group=groups.setdefault(kind, len(groups))) for kind, source in found
        )

    def unused(self) -> Iterator[tuple[str, Place]]:
        """The caption files that belong to no picture asked for so far."""
        for at, files in self._files.items():
            if at not in self._used:
                yield from ((file.name, file.place) for file in files)

    def repeated(self) -> int:
        """Caption files that differ from the one taken in case or composition alone."""
        return sum(len(self._files[at]) - len(names) for at, names in self._used.items())

    # --------------------------------------------------------------------------------------------- small parts

    def _of(self, base: str, picture: str) -> Iterator[tuple[str, Source]]:
        """(kind, source) of the caption files `base.*`."""
        exact = picture.removesuffix(_suffix(picture)), picture
        for suffix in TYPES:
            names = [base + suffix]
            numbers = self._numbered.get((base, suffix), {})
            start = 0 if 0 in numbers else 1
            names += [numbers[n] for n in range(start, start + len(numbers)) if n in numbers]
            if len(names) - 1 != len(numbers):  # a gap: these are names of pictures that are not there
                names = names[:1]
            for at in names:
                if files := self._files.get(at):
                    yield base + suffix, self._source(files, at, suffix, exact)

    def _source(self, files: list[_File], at: str, suffix: str, exact: tuple[str, ...]) -> Source:
        best = files[0]
        if len(files) > 1:
            best = min(
                files, key=lambda f: (not f.name.startswith(exact), not f.name.endswith(suffix), f.name)
            )
        self._used.setdefault(at, set()).add(best.name)
        return Source(best.name[best.name.rfind("/") + 1 :], 0, best.place, TYPES[suffix])

    def _group(self, pictures: Iterable[str]) -> None:
        for name in pictures:
            self._samples.setdefault(_sample(name), ([], set()))[0].append(name)
        for at in self._files:
            if (sample := self._samples.get(_sample(at))) is not None:
                sample[1].add(at.removesuffix(extension(at)))

    def _of_sample(self, picture: str) -> list[tuple[str, Source]]:
        members, stems = self._samples[_sample(picture)]
        if not stems:
            return []
        if len(members) > 1 or len(stems) > 1:
            why = Rejected(
                "several pictures of one name",
                f"{len(members)} pictures and {len(stems)} captions are called {_sample(picture)!r} up to the first "
                f"dot; call its caption {_stem(picture).rpartition('/')[2]}.txt",
            )
            return [("", Source(_sample(picture), 0, texts=why))]
        return list(self._of(next(iter(stems)), picture))


def _stem(picture: str) -> str:
    """The name without the extension of an image; the whole name if it has another one or none."""
    at = normal(picture)
    suffix = extension(picture)
    return at.removesuffix(suffix) if suffix in EXTENSIONS else at


def _sample(name: str) -> str:
    folder, _, last = normal(name).rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"
