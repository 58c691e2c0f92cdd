"""The sides of `loader.py`, each an endless stream of ready batches of the same records in its own format.

A process of its own: `python loader_sides.py SIDE DIRECTORY`. It reads lines from stdin: "check" answers one digest a
record of an epoch, "time SECONDS" how many samples a second came. Peers run in a virtual environment of their own,
which has numpy, torch and their packages, but not ours; of this project they use `patches.py` alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16
import numpy as np

BATCH, TEXT_TOKENS, WIDTH = 16, 256, 1024
ROOT = Path(__file__).resolve().parents[1]


def _patchify():
    spec = importlib.util.spec_from_file_location("patches", ROOT / "fluxdit_jax" / "model" / "patches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.patchify


patchify = _patchify()


def collate(samples):
    """[(latent bytes, side, text bytes, vision bytes)] -> what `loader.reader.collate` makes, bf16 as uint16."""
    B, side = len(samples), samples[0][1]
    latent = np.empty((B, (side // 2) ** 2, 64), np.uint16)
    text = np.zeros((B, TEXT_TOKENS, WIDTH), np.uint16)
    length = np.empty(B, np.int32)
    vision = np.empty((B, WIDTH), np.float32)
    for row, (latent_bytes, _, text_bytes, vision_bytes) in enumerate(samples):
        patchify(np.frombuffer(latent_bytes, np.uint16).reshape(16, side, side), 2, latent[row])
        tokens = np.frombuffer(text_bytes, np.uint16).reshape(-1, WIDTH)
        text[row, : len(tokens)] = tokens
        length[row] = len(tokens)
        vision[row] = np.frombuffer(vision_bytes, np.float32)
    return {"latent": latent, "text": text, "text_length": length, "vision": vision}


def threaded(read, count):
    """Batches of a random-access source, shuffled every epoch, made by two threads, four ahead."""

    def order():
        for epoch in itertools.count():
            yield from np.random.default_rng(epoch).permutation(count).tolist()

    numbers = order()
    with ThreadPoolExecutor(2) as pool:
        ahead = []
        while True:
            while len(ahead) < 4:
                chosen = list(itertools.islice(numbers, BATCH))
                ahead.append(pool.submit(lambda chosen=chosen: collate([read(i) for i in chosen])))
            yield ahead.pop(0).result()


def ours(directory, threads=2):
    """Threads, and batches ahead, as `default_config` has them."""
    sys.path.insert(0, str(ROOT))
    from fluxdit_jax.dataset.manifest import load_manifest
    from fluxdit_jax.loader.reader import BatchLayout, RecordSource, batches
    from fluxdit_jax.shared.host_memory import keep_freed_memory

    keep_freed_memory(large_too=False)  # as `fluxdit_jax.train` does on a GPU
    manifest = load_manifest(directory)
    source = RecordSource(directory, manifest, "train")
    widths, lengths = {"text": WIDTH, "vision": WIDTH}, {"text": TEXT_TOKENS}
    layout = BatchLayout(2, (manifest.resolution // 16) ** 2, 4 * manifest.vae.width, widths, lengths)
    yield from batches(source, seed=0, start=0, batch_size=BATCH, layout=layout, threads=threads, prefetch=2 * threads)


def ours_four_threads(directory):
    """As `configs/prod.py` has it."""
    yield from ours(directory, 4)


def ours_one_thread(directory):
    yield from ours(directory, 1)


def npy(directory):
    side = json.loads((directory / "about.json").read_text())["side"]
    count = len(list(directory.glob("*.text.npy")))

    def read(i):
        latent, text, vision = (np.load(directory / f"{i:06d}.{f}.npy") for f in ("latent", "text", "vision"))
        return latent, side, text, vision

    yield from threaded(read, count)


def flat(directory):
    """The limit: fields lie ready in one file and are copied once into a fresh batch; one thread."""
    about = json.loads((directory / "about.json").read_text())
    data = np.memmap(directory / "flat", np.uint8, "r")
    side, spans = about["side"], about["spans"]
    size = side * side * 16 * 2
    for epoch in itertools.count():
        order = np.random.default_rng(epoch).permutation(len(spans)).tolist()
        for first in range(0, len(order) - BATCH + 1, BATCH):
            latent = np.empty((BATCH, (side // 2) ** 2, 64), np.uint16)
            text = np.zeros((BATCH, TEXT_TOKENS, WIDTH), np.uint16)
            vision, length = np.empty((BATCH, WIDTH), np.float32), np.empty(BATCH, np.int32)
            for row, i in enumerate(order[first : first + BATCH]):
                start, tokens = spans[i]
                middle, last = start + size, start + size + tokens * WIDTH * 2
                latent[row].reshape(-1)[:] = data[start:middle].view(np.uint16)
                text[row, :tokens].reshape(-1)[:] = data[middle:last].view(np.uint16)
                vision[row] = data[last : last + WIDTH * 4].view(np.float32)
                length[row] = tokens
            yield {"latent": latent, "text": text, "text_length": length, "vision": vision}


def _loader(dataset, workers):
    from torch.utils.data import DataLoader

    options = {"prefetch_factor": 2, "persistent_workers": True} if workers else {}
    loader = DataLoader(dataset, batch_size=BATCH, drop_last=True, num_workers=workers, collate_fn=collate, **options)
    while True:
        yield from loader


def _mds(directory):
    from streaming import StreamingDataset

    class Samples(StreamingDataset):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return sample["latent"], sample["side"], sample["text"], sample["vision"]

    return Samples(local=str(directory), shuffle=True, batch_size=BATCH)


def mds(directory):
    yield from _loader(_mds(directory), 0)


def mds_workers(directory):
    yield from _loader(_mds(directory), 2)


def mds_threads(directory):
    """Not its own way: its random access from our two threads."""
    dataset = _mds(directory)
    yield from threaded(dataset.__getitem__, dataset.num_samples)


def wds(directory, workers=0):
    import webdataset

    side = json.loads((directory / "about.json").read_text())["side"]
    files = sorted(str(path) for path in directory.glob("*.tar"))
    dataset = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(200)
    dataset = dataset.map(lambda s: (s["latent.bin"], side, s["text.bin"], s["vision.bin"]))
    yield from _loader(dataset, workers)


def wds_workers(directory):
    yield from wds(directory, 2)


SIDES = {
    f.__name__: f
    for f in (
        ours,
        ours_four_threads,
        ours_one_thread,
        npy,
        flat,
        mds,
        mds_workers,
        mds_threads,
        wds,
        wds_workers,
    )
}


def digests(batch):
    for row in range(len(batch["vision"])):
        parts = (batch[name][row].tobytes() for name in ("latent", "text", "text_length", "vision"))
        yield hashlib.sha256(b"".join(parts)).hexdigest()


def main(name, directory):
    stream = SIDES[name](Path(directory))
    next(stream)
    print("ready", flush=True)
    for line in sys.stdin:
        word, value = line.split()
        if word == "check":
            found = set()
            for batch in itertools.islice(stream, int(value)):
                found.update(digests(batch))
            print(json.dumps(sorted(found)), flush=True)
            continue
        held = [next(stream) for _ in range(6)]  # what was read ahead is not timed
        count, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < float(value):
            held = [held[-1], next(stream)]  # as a training loop: one in the step, one on its way
            count += BATCH
        print(count / seconds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
