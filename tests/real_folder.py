"""A folder as people have them, and what `python -m preprocess build` makes of it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from build_fixtures import FLAGS, read, write_image

from fluxdit_jax.dataset.manifest import MANIFEST, REJECTS
from preprocess.__main__ import main

SMALL = [*FLAGS, "--resolution", "128", "--modulus", "16", "--holdout", "0"]


class Folder:
    """An input with pictures that differ, and what a build made of it."""

    def __init__(self, root: Path, draw, capsys) -> None:  # noqa: ANN001
        self.root, self.output = root / "in", root / "out"
        self._draw, self._capsys, self._seed = draw, capsys, 0
        self.said = ""
        self.root.mkdir()

    def picture(self, *names: str, caption: str | None = None, root: Path | None = None) -> None:
        for name in names:
            path = (root or self.root) / name
            suffix = path.suffix.lower()
            write_image(
                path.with_suffix(".png") if suffix not in (".png", ".jpg") else path,
                self._seed,
                None,
                self._draw,
            )
            if suffix not in (".png", ".jpg"):
                path.with_suffix(".png").rename(path)
            self._seed += 1
            if caption is not None:
                path.with_suffix(".txt").write_text(caption)

    def png(self) -> bytes:
        self.picture("drawn.png")
        data = (self.root / "drawn.png").read_bytes()
        (self.root / "drawn.png").unlink()
        return data

    def write(self, name: str, data: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def build(self, *more: str, source: Path | None = None, status: int | None = 0) -> dict[str, tuple[str, ...]]:
        found = main(["build", "--input", str(source or self.root), "--output", str(self.output), *SMALL, *more])
        captured = self._capsys.readouterr()
        self.said = captured.out + captured.err
        assert status is None or found == status, self.said
        if not (self.output / MANIFEST).exists():
            return {}
        return {key: (record.caption, *record.other_captions) for key, record in read(self.output).items()}

    def rejects(self, counted: bool = True) -> dict[str, str]:
        lines = [json.loads(line) for line in (self.output / REJECTS).read_text().splitlines()]
        return {line["key"]: line["reason"] for line in lines if line.get("counted", True) == counted}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
