"""Measures `python -m preprocess build`: throughput, the encoders' share, memory, and planning at scale.

    python scripts/bench_preprocess.py --images 500 1000 2000
    python scripts/bench_preprocess.py --plan 100000
    python scripts/bench_preprocess.py --rows 200000

Images are drawn with mixed sizes (0.3 to 2.2 megapixels, JPEG) and encoded at 512 pixels by tiny random
encoders of the real classes. Prints Markdown tables; run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIZES = (
    (480, 640),
    (1024, 1024),
    (900, 1350),
    (1200, 800),
    (1200, 1800),
    (1080, 1920),
    (700, 560),
    (1365, 768),
)


def draw(folder: Path, count: int) -> None:
    """Photograph-like JPEGs: smooth colour with fine texture, about 0.2 to 0.8 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    texture = np.random.default_rng(0).normal(0, 12, (2048, 2048, 1)).astype(np.float32)
    for number in range(count):
        path = folder / f"{number // 1000:03}" / f"{number:06}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        rng = np.random.default_rng(number)
        height, width = SIZES[number % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(
            (width, height), Image.BICUBIC
        )
        y, x = rng.integers(0, 2048 - height), rng.integers(0, 2048 - width)
        pixels = np.asarray(coarse, np.float32) + texture[y : y + height, x : x + width]
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
        words = ["portrait", "old", "woman", "red", "field", "light", "dog", "sea"] * 12
        caption = " ".join(words[: 5 + number % 80])
        path.with_suffix(".json").write_text(json.dumps({"caption": caption}))


def models(folder: Path) -> list[str]:
    """The tiny encoders as command line options."""
    import tiny_models

    names = {"--vae": "tiny_vae", "--text-encoder": "tiny_t5", "--vision-encoder": "tiny_dino"}
    flags = []
    for option, name in names.items():
        if not (folder / name).exists():
            getattr(tiny_models, f"save_{name}")(folder)
        flags += [option, str(folder / name)]
    return flags


def measure(work: Path, count: int, more: list[str]) -> dict:
    """One build in a process of its own; returns the end of its log with the peak memory."""
    output = work / f"data{count}"
    subprocess.run(["rm", "-rf", str(output)], check=True)
    arguments = ["build", "--input", str(work / "images"), "--output", str(output), "--resolution", "512"]
    arguments += ["--limit", str(count), "--shard-size", "250", *models(work), *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the build ended with {status}")
    log = [json.loads(line) for line in (output / "build_log.jsonl").read_text().splitlines()]
    return log[-1] | {"peak_mb": usage.ru_maxrss / 1024}


def table(work: Path, counts: list[int], more: list[str]) -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before\n")
    print(
        "| images | all, s | encode, s | images/s | ms an image | text | vae | vision | encoders | waiting | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for count in counts:
        end = measure(work, count, more)
        seconds = end["seconds"]
        whole = seconds["encode"]
        share = {what: seconds[f"encode: {what}"] / whole for what in ("text", "vae", "vision")}
        waiting = sum(value for what, value in seconds.items() if what.startswith("encode: waiting")) / whole
        print(
            f"| {count} | {seconds['all']:.1f} | {whole:.1f} | {count / whole:.2f} | {1000 * whole / count:.1f} | "
            f"{share['text']:.1%} | {share['vae']:.1%} | {share['vision']:.1%} | {sum(share.values()):.1%} | "
            f"{waiting:.1%} | {end['peak_mb']:.0f} |",
            flush=True,
        )
        rest = {what: value for what, value in seconds.items() if what != "all"}
        print(f"<!-- {json.dumps(rest)} -->")


def plan(work: Path, count: int) -> None:
    """`--dry-run` over `count` small files: reading, hashing and judging headers."""
    folder = work / "many"
    image = work / "one.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).save(image, quality=50)
    data = image.read_bytes()
    for number in range(count):
        path = folder / f"{number // 1000:03}" / f"{number:06}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data + b"%d" % number)
            path.with_suffix(".json").write_text(json.dumps({"caption": f"picture {number} of a dog"}))
    arguments = ["build", "--dry-run", "--input", str(folder), "--output", str(work / "planned")]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    peak = usage.ru_maxrss / 1024
    print(
        f"plan of {count:,} files: {seconds:.1f} s, {count / seconds:,.0f}/s, peak {peak:.0f} MB (exit {status})"
    )


def rows(count: int) -> None:
    """Memory of a plan with `count` items with captions of 300 characters, and what that is for ten million."""
    import hashlib

    from preprocess.images import Header
    from preprocess.options import Options
    from preprocess.plan import Item, make_units
    from preprocess.scan import Place

    table = Options("in", "out").checked().buckets()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    items = []
    for number in range(count):
        content = hashlib.sha256(b"%d" % number).hexdigest()
        header = Header(1000 + number % 500, 1200, 1, "JPEG")
        path = f"/data/photos/{number // 1000:05}/{number:08}.jpg"
        caption = f"{number:08} " + "word " * 58
        items.append(Item(path[13:], Place(path), caption, content, header, table[number % len(table)]))
    make_units(items, 0.02, 1000)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"{count:,} planned items: {used / count:,.0f} bytes each, {used / count * 1e7 / 1e9:.1f} GB for ten million"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="*", default=[], help="builds of so many images")
    parser.add_argument("--plan", type=int, default=0, help="plan so many files")
    parser.add_argument("--rows", type=int, default=0, help="memory of so many planned items")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "bench_preprocess"))
    parser.add_argument("more", nargs="*", help="further options of build, after --")
    arguments = parser.parse_args()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    if arguments.images:
        draw(work / "images", max(arguments.images))
        table(work, arguments.images, arguments.more)
    if arguments.plan:
        plan(work, arguments.plan)
    if arguments.rows:
        rows(arguments.rows)


if __name__ == "__main__":
    main()
