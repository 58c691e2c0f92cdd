"""Loader: samples a second to ready batches, ours against WebDataset, MosaicML Streaming, .npy files and the limit.

    python -m benchmarks.loader                      # 10 minutes, 12 GB of disk for a while
    python -m benchmarks.loader --sides 64 --rounds 3 --no-cold
    python -m benchmarks.loader --sides 128 --append   # keeps the rows of earlier runs that this one does not make

The same records everywhere (latents of 128 or 512 KiB, 90 to 110 text tokens of width 1024, a vector), shuffled; a
ready batch is 16 patchified latents and texts padded to 256. Every side is checked to give the same batches, row by
row. The sides then run in turn, each a process that is asleep while it has not its turn. Peers (webdataset,
mosaicml-streaming, torch) go into a virtual environment of their own under ~/.cache/fluxdit_jax/bench-venv.

The limit copies ready fields from one memory-mapped file into a fresh batch: no checksum, no patches to make.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import venv
from io import BytesIO
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from benchmarks.environment import RESULTS, table, write
from benchmarks.loader_sides import collate, digests
from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.manifest import (  # fmt: skip
    MANIFEST,
    EncoderIdentity,
    Manifest,
    Shard,
    sha256_file,
    shard_name,
)
from fluxdit_jax.dataset.records import WRITER_OPTIONS, Record, encode_record
from fluxdit_jax.model.patches import patchify

PEERS = ("torch==2.13.0", "mosaicml-streaming==0.13.0", "webdataset==1.0.2", "ml_dtypes==0.6.0")
VENV = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fluxdit_jax" / "bench-venv"
SHARED = Path("/dev/shm")
SIDES = {  # name: (folder, whether it needs the peers' environment)
    "ours": ("ours", False), "ours_four_threads": ("ours", False), "ours_one_thread": ("ours", False),
    "flat": ("flat", False), "npy": ("npy", False),
    "mds": ("mds", True), "mds_workers": ("mds", True), "mds_threads": ("mds", True),
    "wds": ("wds", True), "wds_workers": ("wds", True),
}  # fmt: skip
WRITE_MDS = """
import sys, numpy as np
from pathlib import Path
from streaming import MDSWriter
source, out, side = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
columns = {"latent": "bytes", "side": "int", "text": "bytes", "vision": "bytes"}
with MDSWriter(out=out, columns=columns) as writer:
    for path in sorted(source.glob("*.latent.npy")):
        stem = path.name.split(".")[0]
        fields = {f: np.load(source / f"{stem}.{f}.npy").tobytes() for f in ("latent", "text", "vision")}
        writer.write({"side": side, **fields})
"""


def peers_python() -> Path:
    """The interpreter of the peers' environment, which is made if it is not there."""
    python = VENV / "bin" / "python"
    if not python.exists():
        venv.create(VENV, with_pip=True)
    probe = "import torch, streaming, webdataset, ml_dtypes"
    if subprocess.run([python, "-c", probe], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS], check=True)
        # streaming imports torchvision for its image data sets, which are not used here; its wheel for this torch
        # asks for CUDA. A stand-in with the names it imports serves.
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
        site = next((VENV / "lib").glob("python3*")) / "site-packages" / "torchvision"
        (site / "transforms").mkdir(parents=True, exist_ok=True)
        (site / "__init__.py").write_text("")
        (site / "datasets.py").write_text("class VisionDataset: pass\n")
        (site / "transforms" / "__init__.py").write_text("")
        (site / "transforms" / "functional.py").write_text("def to_tensor(image): raise NotImplementedError\n")
    return python


def make_records(root: Path, side: int, count: int, python: Path) -> set[str]:
    """The records in every format under `root`; returns the digest of each in a ready batch."""
    for name in ("ours", "flat", "npy", "mds", "wds"):
        (root / name).mkdir(parents=True)
    rng, per_shard = np.random.default_rng(0), 250
    base = rng.normal(size=(16, side, side)).astype(BF16)
    shards, spans, expected = [], [], set()
    offset, parts = 0, -(-count // per_shard)
    with (root / "flat" / "flat").open("wb") as flat:
        for part in range(parts):
            name = shard_name("bench", "train", part, parts)
            writer = ArrayRecordWriter(str(root / "ours" / name), WRITER_OPTIONS)
            numbers = range(part * per_shard, min(count, (part + 1) * per_shard))
            with tarfile.open(root / "wds" / f"{part:04d}.tar", "w") as tar:
                for i in numbers:
                    vision = rng.normal(size=1024)
                    fields = {
                        "latent": np.roll(base, i),
                        "text": rng.normal(size=(90 + i % 21, 1024)).astype(BF16),
                        "vision": (vision / np.linalg.norm(vision)).astype(np.float32),
                    }
                    writer.write(encode_record(Record(
                        key=f"folder/{i:06d}.jpg", caption="a caption " * 8, latent=fields["latent"],
                        conditions={"text": fields["text"], "vision": fields["vision"]}, original_size=(1, 1),
                        encoded_size=(side * 8, side * 8), content_hash=hashlib.sha256(b"%d" % i).hexdigest(),
                    )))  # fmt: skip
                    for field, array in fields.items():
                        np.save(root / "npy" / f"{i:06d}.{field}.npy",
                                array if field == "vision" else array.view(np.uint16))  # fmt: skip
                        entry = tarfile.TarInfo(f"{i:06d}.{field}.bin")
                        entry.size = array.nbytes
                        tar.addfile(entry, BytesIO(array.tobytes()))
                    ready = patchify(fields["latent"], 2).tobytes() + fields["text"].tobytes()
                    ready += fields["vision"].tobytes()
                    spans.append((offset, len(fields["text"])))
                    offset += flat.write(ready)
                    sample = (
                        fields["latent"].tobytes(),
                        side,
                        fields["text"].tobytes(),
                        fields["vision"].tobytes(),
                    )
                    expected.update(digests(collate([sample])))
            writer.close()
            path = root / "ours" / name
            size = f"{side * 8}x{side * 8}"
            shards.append(Shard(name, sha256_file(path), path.stat().st_size, len(numbers), {size: len(numbers)}))
    encoder = EncoderIdentity("none", "", "00" * 32, "float32", 1024)
    manifest = Manifest(
        name="bench", resolution=side * 8, modulus=64, fit="resize",
        encoders={
            "vae": dataclasses.replace(encoder, width=16, options={"factor": 8}), "text": encoder, "vision": encoder,
        },
        buckets=((side * 8, side * 8),), latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16, latent_count=count,
        lengths={"text": 256}, shards={"train": tuple(shards), "holdout": ()},
    )  # fmt: skip
    (root / "ours" / MANIFEST).write_text(manifest.to_json())
    for name in ("flat", "npy", "wds"):
        (root / name / "about.json").write_text(json.dumps({"side": side, "spans": spans}))
    (root / "mds").rmdir()
    subprocess.run([python, "-c", WRITE_MDS, root / "npy", root / "mds", str(side)], check=True)
    return expected


class Side:
    """A process that makes batches when it is told to."""

    def __init__(self, name: str, root: Path, peers: Path):
        folder, peer = SIDES[name]
        script = Path(__file__).with_name("loader_sides.py")
        self._process = subprocess.Popen(
            [peers if peer else sys.executable, script, name, root / folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        if self._process.stdout.readline().strip() != "ready":
            raise SystemExit(f"error: the side {name} did not start; run {script} {name} {root / folder} by hand")

    def ask(self, word: str, value: float) -> str:
        """Its answer to one line, JSON."""
        print(word, value, file=self._process.stdin, flush=True)
        return self._process.stdout.readline()

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its workers, too
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def drop_cache(root: Path) -> None:
    """Takes the files under `root` out of the page cache; the pages that a process has mapped stay."""
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(names, root: Path, peers: Path, rounds: int, seconds: float, cold: bool, expected: set[str]):
    """{side: samples a second, one of every round}, each a fresh process. Hot: after its first epoch; cold: in it."""
    found = {name: [] for name in names}
    checks = len(expected) // 16
    for _ in tqdm(range(rounds), desc="cold" if cold else "hot", unit="round"):
        for name in names:
            if cold:
                drop_cache(root / SIDES[name][0])
            side = Side(name, root, peers)
            if not cold:  # an epoch to warm up, which is looked at
                digest = set(json.loads(side.ask("check", checks)))
                if not digest or digest - expected:
                    raise SystemExit(f"error: {name} gives other batches than the records")
            found[name].append(float(side.ask("time", seconds)))
            side.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128], help="of the latents")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timing")
    parser.add_argument("--only", nargs="+", default=list(SIDES))
    parser.add_argument("--no-cold", action="store_true")
    parser.add_argument("--no-hot", action="store_true")
    parser.add_argument("--append", action="store_true", help="to results/loader.json, instead of writing it anew")
    options = parser.parse_args()
    peers, rows = peers_python(), []
    shared = set(SHARED.glob("[0-9]*_*"))
    for side in options.sides:
        root = Path(tempfile.mkdtemp(prefix="loader-"))
        try:
            expected = make_records(root, side, options.records, peers)
            kilobytes = round((side * side * 32 + 100 * 2048 + 4096) / 1000)
            for cold in [False] * (not options.no_hot) + [True] * (not options.no_cold):
                seconds = options.seconds if not cold else 0.3
                found = measure(options.only, root, peers, options.rounds, seconds, cold, expected)
                for name, values in found.items():
                    ratios = [a / b for a, b in zip(found["ours"], values, strict=True)]
                    rows.append({
                        "record_kb": kilobytes, "cache": "cold" if cold else "hot", "side": name,
                        "samples_per_s": [round(v) for v in values], "median": round(statistics.median(values)),
                        "ours_over_it": round(statistics.median(ratios), 2),
                        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
                    })  # fmt: skip
        finally:
            shutil.rmtree(root)
            for path in set(SHARED.glob("[0-9]*_*")) - shared:  # MDS's, of processes that were killed
                path.unlink(missing_ok=True)
    header = ["record, KB", "cache", "side", "samples/s", "ours / it", "from - to"]
    keys = ("record_kb", "cache", "side", "median", "ours_over_it")
    if options.append:
        made = {(row["record_kb"], row["cache"], row["side"]) for row in rows}
        earlier = json.loads((RESULTS / "loader.json").read_text())["rows"]["rows"]
        rows += [row for row in earlier if (row["record_kb"], row["cache"], row["side"]) not in made]
        rows.sort(key=lambda row: (row["record_kb"], row["cache"] == "cold", list(SIDES).index(row["side"])))
    print(table(header, [[row[k] for k in keys] + ["{} - {}".format(*row["spread"])] for row in rows]))
    print(write("loader", {"peers": PEERS, "rows": rows}))


if __name__ == "__main__":
    main()
