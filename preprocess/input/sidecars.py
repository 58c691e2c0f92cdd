"""Caption files beside pictures: which file belongs to which picture, by name, in a folder or in an archive."""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator

from preprocess.decoding.formats import EXTENSIONS, OTHER_IMAGES
from preprocess.decoding.images import Rejected
from preprocess.input.byte_source import ByteSource
from preprocess.input.captions import Source

# Extension to how the file is read, in order of preference.
TYPES = {".json": ".json", ".txt": ".txt", ".caption": ".txt"}
_NUMBER = re.compile(r"(.+)\.(0|[1-9][0-9]{0,3})")
_KNOWN = frozenset((*TYPES, *EXTENSIONS, *OTHER_IMAGES))


def extension(name: str) -> str:
    """The extension of a file's name in lower case, "" if it has none."""
    return _suffix(name).lower()


def _suffix(path: str) -> str:
    """As `PurePath.suffix`, which takes longer than all else of a scan of many files."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[dot:] if 0 < dot < len(name) - 1 else ""


def normal(path: str) -> str:
    """A path by which it is looked for, as file systems and people differ.

    NFC, with the extension in lower case, and those before it where they are an image's ("A.JPG.TXT", "A.JPG.1.txt").
    """
    if not path.isascii():
        path = unicodedata.normalize("NFC", path)
    suffix = _suffix(path)
    end, tail = path[: len(path) - len(suffix)], suffix.lower()
    while (suffix := _suffix(end)) and (suffix.lower() in _KNOWN or suffix[1:].isdigit()):
        end, tail = end[: len(end) - len(suffix)], suffix.lower() + tail
    return end + tail


def bases(picture: str) -> list[str]:
    """What the names of a picture's caption files begin with, in normal spelling; the most usual first.

    The name without the extension of an image, and the whole name. Of "a.jpg_large" also "a.jpg".
    """
    at = normal(picture)
    suffix = _suffix(at)
    real = max((e for e in EXTENSIONS if suffix.startswith(e)), key=len, default=None)
    if real is None:
        return [at]
    stem = at[: len(at) - len(suffix)]
    return list(dict.fromkeys((stem, at, stem + real)))


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    name: str
    place: ByteSource


class Sidecars:
    """The caption files and pictures of one folder, or of a whole archive.

    The captions of `a.png` are in `a.json`, `a.txt`, `a.caption`, in this order, then in `a.png.json` and so on (first
    there, where another picture is called `a` too). `a.1.txt`, `a.2.txt`, ..., numbered without a gap from 0 or 1, hold
    further ones of the kind of `a.txt`, unless there is another file `a.1.*`. Upper and lower case of an extension and
    the composition of accents (NFC, NFD) do not count where no file has the very name.

    Args:
      pictures: names (paths below the folder or archive).
      files: of the caption files, with where they are.
      others: names of the other files. A caption file of the very name of one of them is no other picture's.
      first_dot: a WebDataset. Behind the files of its name, the one picture of a sample (what shares the name up to the
        first dot) has the one further caption of the sample.
    """

    def __init__(
        self,
        pictures: Iterable[str],
        files: Iterable[tuple[str, ByteSource]],
        others: Iterable[str] = (),
        first_dot: bool = False,
    ) -> None:
        self._stems = collections.Counter(bases(name)[0] for name in pictures)
        self._taken = set(self._stems)  # names that a caption file may have, and then is no other picture's
        for name in others:
            at = normal(name)
            self._taken |= {at, at.removesuffix(_suffix(at))}
        self._files: dict[str, list[_File]] = collections.defaultdict(list)
        self._numbered: dict[tuple[str, str], dict[int, str]] = collections.defaultdict(dict)
        self._used: dict[str, set[str]] = {}
        for name, place in files:
            at = normal(name)
            self._files[at].append(_File(name, place))
            suffix = extension(name)
            if (match := _NUMBER.fullmatch(at.removesuffix(suffix))) and match[0] not in self._taken:
                self._numbered[match[1], suffix][int(match[2])] = at
        self._samples: dict[str, tuple[list[str], dict[str, None]]] = {}
        if first_dot:
            self._group(pictures, others)

    def sources(self, picture: str) -> tuple[Source, ...]:
        """Where the captions of a picture may stand, in order of preference."""
        names = bases(picture)
        if self._stems[names[0]] > 1:
            names = [*names[1:], names[0]]
        found = [source for base in names for source in self._of(base, picture)]
        if self._samples:
            found += self._of_sample(picture, names, bool(found))
        groups: dict[str, int] = {}
        return tuple(dataclasses.replace(source, group=groups.setdefault(kind, len(groups))) for kind, source in found)

    def unused(self) -> Iterator[tuple[str, ByteSource]]:
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
            best = min(files, key=lambda f: (not f.name.startswith(exact), not f.name.endswith(suffix), f.name))
        self._used.setdefault(at, set()).add(best.name)
        return Source(best.name[best.name.rfind("/") + 1 :], 0, best.place, TYPES[suffix])

    def _group(self, pictures: Iterable[str], others: Iterable[str]) -> None:
        """Divides the names into samples: pictures, read or not, and stems of caption files."""
        for name in (*pictures, *(name for name in others if extension(name) in OTHER_IMAGES)):
            self._samples.setdefault(_sample(name), ([], {}))[0].append(name)
        for at in self._files:
            if (sample := self._samples.get(_sample(at))) is not None:
                sample[1][at.removesuffix(extension(at))] = None

    def _of_sample(self, picture: str, names: list[str], has_own: bool) -> list[tuple[str, Source]]:
        """The captions that a picture has by its sample alone; or why it has none, where it is not the only one."""
        members, stems = self._samples[_sample(picture)]
        further = [stem for stem in stems if stem not in names]
        if len(members) == 1:
            found = (source for stem in further for _, source in self._of(stem, picture))
            return [("first dot", dataclasses.replace(source, only=True)) for source in found]
        if has_own or not stems:
            return []
        name = _sample(picture)
        why = Rejected(
            "several pictures of one name",
            f"{len(members)} pictures are called {name!r} up to the first dot, so that it is not known whose caption "
            f"{', '.join(stem.rpartition('/')[2] for stem in list(stems)[:3])} is; call this one's {names[0]}.txt",
        )
        return [("", Source(name, 0, texts=why))]


def _sample(name: str) -> str:
    folder, _, last = normal(name).rpartition("/")
    return (f"{folder}/" if folder else "") + last.partition(".")[0]
