"""What a stranger's data or files could do to the machine: run code, read or write elsewhere, fill the memory.

    python tests/stress/security.py        prints the table; exits 1 if anything got through

Pages are opened in headless Chromium where there is one; without it that row says 0 tried.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import bad_inputs  # noqa: E402
import security_code  # noqa: E402
import security_pages  # noqa: E402
from build_fixtures import FLAGS, options  # noqa: E402
from fuzz import bounded  # noqa: E402
from PIL import Image  # noqa: E402

from fluxdit_jax.dataset import records  # noqa: E402
from fluxdit_jax.dataset.manifest import MANIFEST, json_checksum, load_manifest, sha256_file  # noqa: E402
from fluxdit_jax.shared.sanitize import shown  # noqa: E402
from preprocess.decoding import images  # noqa: E402
from preprocess.decoding.images import Rejected  # noqa: E402

Row = tuple[str, int, int, int]
REPOSITORY = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------- paths in metadata

SECRET = "the secret outside"


def hostile_paths(outside: Path) -> dict[str, str]:
    """Rows of a table: what, and the path in it. Each would lead to the picture `outside` if it were followed."""
    up = os.path.relpath(outside, outside.parent / "in")
    return {
        "up": up,
        "up from a folder": f"sub/../../{outside.name}",
        "absolute": str(outside),
        "absolute, doubled": f"//{outside}",
        "file URL": f"file://{outside}",
        "home": f"~/../..{outside}",
        "backslashes": up.replace("/", "\\"),
        "encoded": up.replace("..", "%2e%2e"),
        "NUL": f"{up}\0.png",
        "a link to a file": "link.png",
        "a link to a folder": f"folder/{outside.name}",
        "a link above, and up again": f"folder/../{outside.name}",
        "5,000 times up": "../" * 5000 + str(outside),
    }


def paths(root: Path) -> Row:
    """The secret picture lies beside the input; no record may be made of it, whatever the tables say."""
    from build_fixtures import read

    from preprocess.build.build import build

    outside, folder = root / "secret.png", root / "in"
    (folder / "sub").mkdir(parents=True)
    outside.write_bytes(bad_inputs.coded(bad_inputs.picture(123, 99)))
    (folder / "good.png").write_bytes(bad_inputs.PNG)
    (folder / "good.txt").write_text("a good picture")
    (folder / "link.png").symlink_to(outside)
    (folder / "folder").symlink_to(root)
    hostile = hostile_paths(outside)
    rows = [{"file_name": path, "caption": SECRET} for path in hostile.values()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sub" / "metadata.csv").write_text(f"file_name,caption\n../../{outside.name},{SECRET}\n")
    with tarfile.open(folder / "a.tar", "w") as archive:
        for kind, target in ((tarfile.SYMTYPE, str(outside)), (tarfile.LNKTYPE, "../../secret.png")):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, target
            archive.addfile(member)
        for name in (str(outside), f"../{outside.name}"):
            member = tarfile.TarInfo(name)
            member.size = len(outside.read_bytes())
            archive.addfile(member, io.BytesIO(outside.read_bytes()))
    build(options(folder, root / "out", resolution=64, max_rejects=1.0, holdout=0.0))
    made = read(root / "out")
    digest = sha256_file(outside)
    wrong = [key for key, record in made.items() if record.content_hash == digest or record.caption == SECRET]
    wrong += [] if "good.png" in made else ["the good picture was not taken"]
    return _row("paths in metadata, links and archive members that leave the input", len(hostile) + 5, wrong)


# ----------------------------------------------------------------------------------------- names in the output

KEYS = [
    "../../up.png",
    "/etc/absolute.png",
    "new\nline.png",
    "-rf.png",
    "a\\b.png",
    "\x1b[31mred.png",
    "nul\0.png",
    "x" * 300,
]


def names(root: Path) -> Row:
    """A data set whose keys lead elsewhere: what `export` and `inspect` make of it."""
    import training_helpers as helpers

    from preprocess.inspect.export import export
    from preprocess.inspect.plots import _original
    from preprocess.inspect.report import Dataset

    members = [records.encode_record(_renamed(helpers.make_record(i), key)) for i, key in enumerate(KEYS)]
    helpers.write_dataset(root / "data", train=len(KEYS), holdout=0, shards=1, sizes=((4, 4),))
    raw = json.loads((root / "data" / MANIFEST).read_text())
    shard = root / "data" / raw["shards"]["train"][0]["file"]
    helpers.write_shard(shard, members)
    raw["shards"]["train"][0] |= {"sha256": sha256_file(shard), "bytes": shard.stat().st_size}
    raw.pop("checksum")
    raw["checksum"] = json_checksum(raw)
    (root / "data" / MANIFEST).write_text(json.dumps(raw))
    wrong = []
    for path in export(root / "data", root / "tar"):
        with tarfile.open(path) as archive:
            unsafe = [m.name for m in archive if not (m.isreg() and m.name[:9].isdecimal() and m.name[9] == ".")]
            wrong += unsafe
            if unsafe:
                continue
            # as an old tar unpacks it; Python before 3.11.4 has no filters
            archive.extractall(
                root / "unpacked", **({"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {})
            )
    there = {path.name for path in root.iterdir()}
    wrong += sorted(there - {"data", "tar", "unpacked"})
    secret = root / "data" / "up.png"
    secret.write_bytes(bad_inputs.PNG)
    (root / "data" / "in" / "sub").mkdir(parents=True)
    record = _renamed(helpers.make_record(0), "../../up.png", sha256_file(secret))
    manifest = load_manifest(root / "data")
    for key in KEYS:
        found = _original(
            root / "data" / "in" / "sub",
            _renamed(record, key, record.content_hash),
            Dataset(root, manifest, None),
        )
        wrong += [] if found is None else [f"inspect showed {key!r}"]
    return _row("keys that lead elsewhere: tar members of an export, pictures of inspect", 2 * len(KEYS), wrong)


def _renamed(record: records.Record, key: str, content: str = "") -> records.Record:
    import dataclasses

    return dataclasses.replace(record, key=key, content_hash=content or record.content_hash)


# --------------------------------------------------------------------------------------------------- bombs


def bombs(side: int) -> dict[str, bytes]:
    """Files of a few kilobytes to a megabyte that claim, or unfold to, gigabytes; and flat pictures of side x side."""
    large = zlib.compress(b"\0" * 250_000_000, 9)
    profile = bad_inputs.chunk(b"iCCP", b"k\0\0" + large)
    text = bad_inputs.chunk(b"zTXt", b"k\0\0" + large)
    international = bad_inputs.chunk(b"iTXt", b"k\0\1\0\0\0" + large)
    orientation = bad_inputs.chunk(b"zTXt", b"Raw profile type exif\0\0" + large)
    webp = bytearray(bad_inputs.coded(bad_inputs.picture(), "WEBP", exif=bad_inputs.ORIENTATION_99))
    webp[24:30] = b"\xff" * 6
    jpeg = bytearray(bad_inputs.JPEG)
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500
    bmp = bytearray(bad_inputs.coded(bad_inputs.picture(), "BMP"))
    bmp[18:26] = (2**31 - 1).to_bytes(4, "little") * 2
    flat = Image.new("L", (side, side))
    pixels = bad_inputs.png(90, 80, b"\0" * 250_000_000)
    avif = bytearray(bad_inputs.coded(bad_inputs.picture(), "AVIF"))
    at = avif.index(b"ispe") + 8
    avif[at : at + 8] = (2**31 - 1).to_bytes(4, "big") * 2
    return {
        "PNG of 100,000 x 100,000": bad_inputs.png(100_000, 100_000, b"\0" * 100),
        "PNG of 2^31 x 2^31": bad_inputs.png(2**31 - 1, 2**31 - 1, b"\0" * 100),
        "PNG with pixels that unfold to 250 MB": pixels,
        "PNG with a profile of 250 MB": bad_inputs.png(90, 80, b"\0" * 100, profile),
        "PNG with a text of 250 MB": bad_inputs.png(90, 80, b"\0" * 100, text),
        "PNG with an international text of 250 MB": bad_inputs.png(90, 80, b"\0" * 100, international),
        "PNG with EXIF of 250 MB": bad_inputs.png(90, 80, b"\0" * 100, orientation),
        "WebP of 2^24 x 2^24": bytes(webp),
        "JPEG XL of 2^30 x 2^30": b"\xff\x0a" + b"\xff" * 60,
        "JPEG of 65,500 x 65,500": bytes(jpeg),
        "BMP of 2^31 x 2^31": bytes(bmp),
        "AVIF of 2^31 x 2^31": bytes(avif),
        f"TIFF of {side} x {side} in a few kilobytes": bad_inputs.coded(flat, "TIFF", compression="tiff_adobe_deflate"),
        f"WebP of {side} x {side} in a few kilobytes": bad_inputs.coded(flat, "WEBP"),
    }


def decompression(_: Path, side: int = 6_000) -> Row:
    """Each within what an allowed picture of side x side takes in its worst format, 16 bytes a pixel, and 200 MB."""
    memory = 16 * side**2 + 200_000_000
    wrong, made = [], bombs(side)
    for what, content in made.items():
        with bounded(memory), contextlib.suppress(Rejected):
            try:
                header = images.read_header(content, images.Limits())
                images.decode(content, header, (64, 64), "resize")
            except MemoryError:
                wrong.append(f"{what}: more than {memory / 1e9:g} GB")
            except Rejected as rejected:
                if "MemoryError" in rejected.detail:
                    wrong.append(f"{what}: more than {memory / 1e9:g} GB: {rejected}")
    return _row(f"decompression bombs, each within {memory / 1e9:.1f} GB", len(made), wrong)


# ------------------------------------------------------------------------------------------------ the terminal

NAMES = [
    "red\x1b[31m.png",
    "title\x1b]0;owned\x07.png",
    "line\n13:00:00 I forged.png",
    "back\b\b.png",
    "c1\x9b31m.png",
    "turn\u202egnp.png",
]


def terminal(root: Path) -> Row:
    """Pictures and other files with such names: nothing of `build`'s and the training log's may act on a terminal."""
    import logging

    from fluxdit_jax.run.reporting import log_to
    from preprocess.__main__ import main as preprocess

    (root / "in").mkdir()
    for number, name in enumerate(NAMES):
        (root / "in" / name).write_bytes(bad_inputs.coded(bad_inputs.picture(90 + number // 2, 80)))
        (root / "in" / name.replace(".png", ".txt")).write_text(f"caption {number}")
        (root / "in" / name.replace(".png", ".odd")).write_text("not looked at")
        (root / "in" / name.replace(".png", ".gif")).write_bytes(b"GIF")
    command = [
        "build",
        "--input",
        root / "in",
        "--output",
        root / "out",
        "--resolution",
        "64",
        "--holdout",
        "0",
    ]
    command += ["--max-upscale", "1", "--max-rejects", "1", *FLAGS]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        preprocess([*map(str, command), "--dry-run"])
        preprocess([*map(str, command)])
        undo = log_to(root / "train.log")
        logging.getLogger("fluxdit_jax").warning("%s", " ".join(NAMES))
        undo()
    text = told.getvalue().replace("\r", "\n") + (root / "train.log").read_text()
    wrong = [f"{c!r}" for c in sorted(set(text) - {"\n", "\t"}) if shown(c) != c]
    wrong += [line for line in text.splitlines() if line.startswith("13:00:00 I forged")]
    wrong += [] if "red\\x1b[31m" in text else ["no name was told at all"]
    return _row("file names that colour a terminal or forge a line of a log", 4 * len(NAMES), wrong)


# ------------------------------------------------------------------------------------------------------ all


def _row(what: str, tried: int, wrong: list[str]) -> Row:
    for line in wrong:
        print(f"LOST {what}: {line}")
    return what, tried, max(0, tried - len(wrong)), len(wrong)


def code(_: Path) -> Row:
    return _row("our code: pickle, eval, remote code, shell, unpacking", *security_code.look())


def pages(root: Path) -> Row:
    if not security_pages.CHROMIUM:
        return "captions with scripts in pages (no Chromium on this machine)", 0, 0, 0
    return _row(
        "captions with scripts in report.html and TensorBoard's texts, in Chromium",
        *security_pages.look(root),
    )


PARTS: dict[str, Callable[..., Row]] = {
    "code": code,
    "paths": paths,
    "names": names,
    "bombs": decompression,
    "pages": pages,
    "terminal": terminal,
}


def run(quick: bool, parts: Iterable[str] = tuple(PARTS)) -> list[Row]:
    """All parts; `quick` only makes the bombs smaller."""
    rows = []
    for name in parts:
        with tempfile.TemporaryDirectory(prefix="security-") as folder:
            more = {"side": 12_000} if name == "bombs" and not quick else {}
            rows.append(PARTS[name](Path(folder), **more))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=sorted(PARTS), action="append", help="only this one")
    parser.add_argument("--quick", action="store_true", help="smaller bombs")
    arguments = parser.parse_args()
    rows = run(arguments.quick, arguments.part or tuple(PARTS))
    for row in rows:
        print("{:85} tried {:4} survived {:4} lost {:4}".format(*row))
    return int(any(row[3] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
