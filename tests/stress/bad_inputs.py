"""Every kind of bad input that we could think of, in one folder, and what `build` makes of each.

    python tests/stress/bad_inputs.py        prints the table

A case is a name, a function that writes the input, and the reason it must be rejected with ("" if it must
become a record all the same).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from build_fixtures import options  # noqa: E402

from fluxdit_jax.dataset.manifest import REJECTS  # noqa: E402
from preprocess.build.build import build  # noqa: E402

Case = tuple[str, str, Callable[[Path], None], str]


def picture(width: int = 90, height: int = 80, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def coded(image: Image.Image, format: str = "PNG", **more: object) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **more)
    return file.getvalue()


def data(content: bytes) -> Callable[[Path], None]:
    """The image file has this content and a good caption."""

    def write(path: Path) -> None:
        path.write_bytes(content)
        path.with_suffix(".txt").write_text("a good caption")

    return write


def caption(content: bytes, suffix: str = ".json") -> Callable[[Path], None]:
    """A good image with this caption file."""

    def write(path: Path) -> None:
        path.write_bytes(coded(picture()))
        path.with_suffix(suffix).write_bytes(content)

    return write


def alone(write: Callable[[Path], object]) -> Callable[[Path], None]:
    def call(path: Path) -> None:
        write(path)

    return call


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *extra: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    body = b"".join(extra) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def bad_crc() -> bytes:
    content = bytearray(coded(picture()))
    content[content.index(b"IDAT") + 40] ^= 0xFF
    return bytes(content)


def frames(format: str) -> bytes:  # noqa: A002
    several = [picture(90, 80 + i).resize((90, 80)) for i in range(3)]
    return coded(several[0], format, save_all=True, append_images=several[1:])


def link(target: str) -> Callable[[Path], None]:
    return alone(lambda path: path.symlink_to(target))


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("../../leaves.png", "/etc/absolute.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))


JPEG = coded(picture(), "JPEG")
PNG = coded(picture())

FLOATS = coded(Image.fromarray(np.ones((80, 90), np.float32)), "TIFF")
MILLIONS = coded(Image.fromarray(np.full((80, 90), 10**6, np.int32)), "TIFF")
TEXT_BOMB = png(90, 80, b"", chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 10**8)))
ORIENTATION_99 = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"
BROKEN_EXIF = b"Exif\0\0MM\0*\xff\xff\xff\xff"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
STATEMENTS = png(
    90,
    80,
    b"\0" * 21_680,
    chunk(b"cICP", b"\x09\x10\0\1") + chunk(b"gAMA", b"\0\1\x86\xa0") + chunk(b"cHRM", bytes(range(32))),
    chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(SRGB)),
    chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      12\n" + ORIENTATION_99.hex().encode()),
    chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<r tiff:Orientation="6"/>'),
)
LEAVING_ROW = json.dumps({"file_name": "../../etc/passwd", "caption": "x"})

CASES: list[Case] = [
    ("zero bytes", "a.png", data(b""), "zero bytes"),
    ("a web page called .jpg", "b.jpg", data(b"<!doctype html><html>404</html>"), "not an image"),
    ("random bytes called .png", "c.png", data(np.random.default_rng(0).bytes(5000)), "not an image"),
    ("the first 8 bytes of a PNG", "d.png", data(PNG[:8]), "not an image"),
    ("JPEG cut in the middle", "e.jpg", data(JPEG[: len(JPEG) // 2]), "damaged image"),
    ("PNG cut in the middle", "f.png", data(PNG[: len(PNG) // 2]), "damaged image"),
    ("WebP cut in the middle", "g.webp", data(coded(picture(), "WEBP")[:-500]), "not an image|damaged image"),
    ("AVIF cut in the middle", "h.avif", data(coded(picture(), "AVIF")[:-500]), "not an image|damaged image"),
    ("TIFF cut in the middle", "i.tif", data(coded(picture(), "TIFF")[:9000]), "not an image|damaged image"),
    ("BMP cut in the middle", "j.bmp", data(coded(picture(), "BMP")[:9000]), "damaged image"),
    ("PNG with a wrong check sum", "k.png", data(bad_crc()), "damaged image"),
    ("PNG whose pixels are too few", "l.png", data(png(90, 80, b"\0" * 100)), "damaged image"),
    ("decompression bomb, 60,000 x 60,000", "m.png", data(png(60_000, 60_000, b"\0" * 100)), "too many pixels"),
    ("bomb of text chunks", "n.png", data(TEXT_BOMB), "not an image|damaged image"),
    ("animated WebP", "o.webp", data(frames("WEBP")), "animated or several pages"),
    ("animated PNG", "p.png", data(frames("PNG")), "animated or several pages"),
    ("TIFF of several pages", "q.tiff", data(frames("TIFF")), "animated or several pages"),
    ("GIF", "r.gif", data(coded(picture(), "GIF")), "image type is not read"),
    ("GIF called .png", "s.png", data(coded(picture(), "GIF")), "not an image"),
    ("HEIC", "t.heic", data(b"\0\0\0\x18ftypheic"), "image type is not read"),
    ("PNG called .jpg", "u.jpg", data(PNG), ""),
    ("20 x 90 pixels", "v.png", data(coded(picture(20, 90))), "too small"),
    ("90 x 900 pixels", "w.png", data(coded(picture(90, 900))), "absurd aspect ratio"),
    ("floating-point TIFF", "x.tif", data(FLOATS), "unsupported pixels"),
    ("32-bit TIFF", "y.tif", data(MILLIONS), "unsupported pixels"),
    ("broken colour profile", "z.png", data(coded(picture(), icc_profile=b"nonsense" * 50)), ""),
    ("orientation 99", "aa.jpg", data(coded(picture(), "JPEG", exif=ORIENTATION_99)), ""),
    ("broken EXIF", "ab.jpg", data(coded(picture(), "JPEG", exif=BROKEN_EXIF)), ""),
    ("no caption at all", "ca.png", alone(lambda p: p.write_bytes(PNG)), "no caption"),
    ("empty .txt", "cb.png", caption(b"", ".txt"), "empty caption"),
    ("white space only", "cc.png", caption(b'{"caption": " \\n "}'), "empty caption"),
    ("caption is a number", "cd.png", caption(b'{"caption": 7}'), "caption is not a string"),
    ("caption is a list of numbers", "ce.png", caption(b'{"caption": [1, 2]}'), "caption is not a string"),
    ("caption is null", "cf.png", caption(b'{"caption": null}'), "no caption"),
    ("JSON without the field", "cg.png", caption(b'{"title": "x"}'), "no caption"),
    ("JSON that is a list of texts", "ch.png", caption(b'["a dog"]'), ""),
    ("JSON that is a list of numbers", "ch2.png", caption(b"[1, 2]"), "no caption"),
    ("broken JSON", "ci.png", caption(b'{"caption": "a dog'), "broken JSON"),
    ("JSON nested 100,000 deep", "cj.png", caption(b"[" * 100_000), "broken JSON"),
    ("empty .json", "ck.png", caption(b""), "broken JSON"),
    ("invalid UTF-8 in JSON", "cl.png", caption(b'{"caption": "\xff\xfe"}'), "invalid UTF-8"),
    ("invalid UTF-8 in .txt", "cm.png", caption(b"\xff\xfd", ".txt"), "invalid UTF-8"),
    ("UTF-16 cut in a character", "cv.png", caption(b"\xff\xfe\xfd", ".txt"), "invalid UTF-16"),
    ("half a surrogate pair", "cn.png", caption(b'{"caption": "\\ud800"}'), "invalid UTF-8"),
    ("caption of 30,000 characters", "co.png", caption(b"word " * 6000, ".txt"), "caption too long"),
    ("caption file of 5 MB", "cp.png", caption(b" " * 5_000_000, ".txt"), "file too large"),
    ("caption of 3,000 words", "cq.png", caption(b"dog " * 3000, ".txt"), ""),
    ("caption with a script tag", "cr.png", caption(b"<script>alert(1)</script>", ".txt"), ""),
    ("caption with control characters", "cs.png", caption(b"a dog \x1b[31m", ".txt"), ""),
    ("caption with NUL", "ct.png", caption(b"a \0 dog", ".txt"), "NUL in the caption"),
    ("caption of format characters", "cu.png", caption(b"\xe2\x80\x8b", ".txt"), "empty caption"),
    ("link to nothing", "la.png", link("nowhere.png"), "broken link"),
    ("link to itself", "lb.png", link("lb.png"), "broken link"),
    ("link out of the input", "lc.png", link("/etc/passwd"), "path leaves the input"),
    ("link to a folder above: a loop", "ld", link("."), "link to a folder"),
    ("a pipe called .png", "le.png", alone(lambda p: os.mkfifo(p)), "not a regular file"),
    ("a folder called .png", "lf.png", alone(lambda p: p.mkdir()), "(not an input)"),
    ("caption without an image", "na.txt", alone(lambda p: p.write_text("lonely")), "caption without an image"),
    ("file name that is not UTF-8", "nb\udcff.png", data(PNG), "file name is not UTF-8"),
    ("file name with a new line", "nc\nx.png", data(PNG), ""),
    ("file name that starts with a dash", "-rf.png", data(PNG), ""),
    ("file name of 255 bytes", "n" * 251 + ".png", data(PNG), ""),
    ("row leaving the input", "metadata.jsonl", alone(lambda p: p.write_text(LEAVING_ROW)), "path leaves the input"),
    ("archive that is none", "ta.tar", alone(lambda p: p.write_bytes(b"x" * 2000)), "damaged archive"),
    ("archive member whose path leaves it", "tb.tar", alone(tar), "path leaves the input"),
]  # fmt: skip


def write(folder: Path) -> None:
    """All the cases and ten good images."""
    folder.mkdir(parents=True)
    for number in range(10):
        (folder / f"good{number}.png").write_bytes(coded(picture(80 + number, 90)))
        (folder / f"good{number}.txt").write_text(f"good picture {number}")
    for _, name, make, _ in CASES:
        make(folder / name)


def outcomes(folder: Path, output: Path) -> dict[str, tuple[str, str]]:
    """Builds and returns for every case the reason (or "a record") and the detail."""
    build(options(folder, output, resolution=64, max_rejects=1.0, holdout=0.0))
    lines = [json.loads(line) for line in (output / REJECTS).read_text(encoding="utf-8").splitlines()]
    from build_fixtures import read

    keys = set(read(output))
    result = {}
    for what, name, _, _ in CASES:
        shown = name.encode("utf-8", "backslashreplace").decode()
        mine = [line for line in lines if line["key"].split(":")[0].startswith(shown)]
        if name in keys:
            assert not mine, f"{what} is both a record and a reject"
            result[what] = ("a record", "")
        elif mine:
            result[what] = (mine[0]["reason"], mine[0]["detail"])
        else:
            result[what] = ("nothing", "")
    return result


def right(expected: str, reason: str) -> bool:
    """Whether an outcome is what `CASES` asks for."""
    return reason in {"": ["a record"], "(not an input)": ["nothing"]}.get(expected, expected.split("|"))


def run(quick: bool) -> list[tuple[str, int, int, int]]:
    """(fault, tried, survived, lost): all kinds in one build, which takes seconds."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / "in")
        found = outcomes(Path(name) / "in", Path(name) / "out")
    wrong = [f"{what}: {found[what][0]}" for what, _, _, want in CASES if not right(want, found[what][0])]
    for line in wrong:
        print(f"LOST {line}")
    return [("kinds of bad input to preprocess build", len(CASES), len(CASES) - len(wrong), len(wrong))]


def main() -> int:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()) as told:
        write(Path(name) / "in")
        found = outcomes(Path(name) / "in", Path(name) / "out")
    print(f"| {len(CASES)} kinds of bad input | what it gets | detail |\n|---|---|---|")
    for what, (reason, detail) in found.items():
        print(f"| {what} | {reason} | {detail[:90].replace('|', '/')} |")
    print("\n" + told.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
