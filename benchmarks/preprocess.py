"""`python -m preprocess build`: its speed against the encoders alone, its memory, and planning at scale.

    python -m benchmarks.preprocess --images 200               # tiny random encoders of the real classes
    python -m benchmarks.preprocess --images 40 --encoders larger
    python -m benchmarks.preprocess --images 16 --encoders full --repeats 2   # of real size; 10 minutes on 2 cores
    python -m benchmarks.preprocess --plan 100000

Images are drawn with mixed sizes (0.3 to 2.2 megapixels, JPEG) and encoded at 512 pixels. Each build is followed by
the same networks alone, on ready tensors of the same shapes and batches and as often as `--repeats` says: their
images/s are what nothing that feeds them can exceed. On a CPU decoding shares the cores with the encoders, which it
does not with a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.environment import ROOT, table, write
from fluxdit_jax.shared.host_memory import keep_freed_memory
from fluxdit_jax.shared.paths import expanded

sys.path.append(str(ROOT / "tests"))
BATCH = 8  # `build`'s default
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
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        y, x = rng.integers(0, 2048 - height), rng.integers(0, 2048 - width)
        pixels = np.asarray(coarse, np.float32) + texture[y : y + height, x : x + width]
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
        words = ["portrait", "old", "woman", "red", "field", "light", "dog", "sea"] * 12
        caption = " ".join(words[: 5 + number % 80])
        path.with_suffix(".json").write_text(json.dumps({"caption": caption}))


def tiny(folder: Path) -> dict[str, Path]:
    """The tests' encoders, by option."""
    import tiny_models

    names = {"--vae": "tiny_vae", "--text-encoder": "tiny_t5", "--vision-encoder": "tiny_dino"}
    for name in names.values():
        if not (folder / name).exists():
            getattr(tiny_models, f"save_{name}")(folder)
    return {option: folder / name for option, name in names.items()}


def larger(folder: Path) -> dict[str, Path]:
    """A Flux autoencoder of a quarter of its width, a ViT of width 192, and the tests' T5."""
    import tiny_models

    vae, vision = folder / "larger_vae", folder / "larger_dino"
    if not vae.exists():
        tiny_models.save_flux_vae(vae, (32, 64, 128, 128))
    if not vision.exists():
        tiny_models.save_dino(vision, 192, 768, 12, 3)
    return tiny(folder) | {"--vae": vae, "--vision-encoder": vision}


def full(folder: Path) -> dict[str, Path]:
    """Of the sizes that people use: Flux's autoencoder, T5 v1.1 large and DINOv3 ViT-L/16, with random weights."""
    import tiny_models
    import torch
    from transformers import T5Config, T5EncoderModel

    vae, text, vision = folder / "full_vae", folder / "full_t5", folder / "full_dino"
    if not vae.exists():
        tiny_models.save_flux_vae(vae, (128, 256, 512, 512))
    if not text.exists():
        torch.manual_seed(0)
        tokenizer = tiny(folder)["--text-encoder"]
        shutil.copytree(tokenizer, text, ignore=shutil.ignore_patterns("*.safetensors"))
        config = T5Config(
            vocab_size=32128, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )  # fmt: skip
        T5EncoderModel(config).save_pretrained(text)
    if not vision.exists():
        tiny_models.save_dino(vision, 1024, 4096, 24, 16)
    return {"--vae": vae, "--text-encoder": text, "--vision-encoder": vision}


ENCODERS = {"tiny": tiny, "larger": larger, "full": full}


def run_preprocess(arguments: list[str]) -> tuple[int, float]:
    """`python -m preprocess` in a process of its own: (exit status, peak memory in MB)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    return status, usage.ru_maxrss / 1024


def build(work: Path, output: Path, count: int, encoders: dict[str, Path], more: list[str]) -> dict[str, Any]:
    """One build in a process of its own; returns the end of its log with the peak memory."""
    subprocess.run(["rm", "-rf", str(output)], check=True)
    arguments = ["build", "--input", str(work / "images"), "--output", str(output), "--resolution", "512"]
    arguments += ["--limit", str(count), "--shard-size", "250", "--batch-size", str(BATCH), *more]
    arguments += [word for option, directory in encoders.items() for word in (option, str(directory))]
    status, peak = run_preprocess(arguments)
    if status:
        raise RuntimeError(f"the build ended with {status}: {' '.join(arguments)}")
    log = [json.loads(line) for line in (output / "build_log.jsonl").read_text().splitlines()]
    return log[-1] | {"peak_mb": peak}


class Bare:
    """The three networks by their own libraries, on tensors of the shapes that a build gave them."""

    def __init__(self, encoders: dict[str, Path], output: Path):
        import pyarrow.parquet
        import torch
        from diffusers import AutoencoderKL
        from transformers import AutoModel, T5EncoderModel

        from preprocess.encoders.vision import input_size

        self._vae = AutoencoderKL.from_pretrained(encoders["--vae"]).eval()
        self._text = T5EncoderModel.from_pretrained(encoders["--text-encoder"]).eval()
        self._vision = AutoModel.from_pretrained(encoders["--vision-encoder"]).eval()
        index = pyarrow.parquet.read_table(output / "index.parquet").to_pydict()
        sizes = sorted(zip(index["bucket_height"], index["bucket_width"]))
        lengths = sorted(index["tokens"])
        self.count = len(sizes)
        batches: list[tuple[int, int, int]] = []  # pictures, height, width
        for size in dict.fromkeys(sizes):
            of_size = sizes.count(size)
            batches += [(min(BATCH, of_size - start), *size) for start in range(0, of_size, BATCH)]
        patch = self._vision.config.patch_size
        self._pixels = [torch.rand(b, 3, h, w) * 2 - 1 for b, h, w in batches]
        self._pictures = [torch.randn(b, 3, *input_size(h, w, patch)) for b, h, w in batches]
        self._tokens = [
            torch.ones(len(part), max(part), dtype=torch.long)
            for part in (lengths[start : start + 64] for start in range(0, len(lengths), 64))
        ]

    def __call__(self) -> dict[str, float]:
        """Seconds of each network for all pictures."""
        import torch

        runs = {
            "text": lambda: [self._text(ids, attention_mask=torch.ones_like(ids)) for ids in self._tokens],
            "vae": lambda: [self._vae.encode(pixels).latent_dist.mean for pixels in self._pixels],
            "vision": lambda: [self._vision(pixel_values=pixels).pooler_output for pixels in self._pictures],
        }
        seconds = {}
        with torch.inference_mode():
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[name] = time.perf_counter() - started
        return seconds


def compare(work: Path, kind: str, count: int, repeats: int, more: list[str]) -> dict[str, Any]:
    """Builds and the bare encoders in turn; a row of seconds."""
    encoders, output = ENCODERS[kind](work), work / f"data-{kind}-{count}"
    builds, alone, bare = [], [], None
    for _ in tqdm(range(repeats), desc=f"{kind}, {count} images", unit="round"):
        builds.append(build(work, output, count, encoders, more))
        if bare is None:
            bare = Bare(encoders, output)
            bare()  # the first call is slower: buffers, kernels chosen
        alone.append(bare())
    whole = [end["seconds"]["encode"] for end in builds]
    least = [sum(seconds.values()) for seconds in alone]
    ratios = [a / b for a, b in zip(least, whole)]
    return {
        "encoders": kind,
        "images": bare.count,
        "build": [end["seconds"] for end in builds],
        "bare": alone,
        "images_per_s": bare.count / statistics.median(whole),
        "bare_images_per_s": bare.count / statistics.median(least),
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "peak_mb": max(end["peak_mb"] for end in builds),
    }


def show(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        seconds = {
            what: statistics.median(run[what] for run in row["build"] if what in run) for what in row["build"][0]
        }
        whole = seconds["encode"]
        shares = [seconds[f"encode: {what}"] / whole for what in ("text", "vae", "vision")]
        waiting = sum(value for what, value in seconds.items() if what.startswith("encode: waiting")) / whole
        ratio = row["ratio"]
        lines.append(
            [row["encoders"], row["images"], f"{seconds['all']:.1f}", f"{whole:.1f}", *(f"{s:.1%}" for s in shares),
             f"{sum(shares):.1%}", f"{waiting:.1%}", f"{row['images_per_s']:.2f}", f"{row['bare_images_per_s']:.2f}",
             f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})", f"{row['peak_mb']:.0f}"]
        )  # fmt: skip
    header = ["encoders", "images", "all s", "encode s", "text", "vae", "vision", "encoders' share", "waiting",
              "images/s", "bare images/s", "ratio", "peak MB"]  # fmt: skip
    return table(header, lines)


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
    status, peak = run_preprocess(arguments)
    seconds = time.perf_counter() - start
    print(f"plan of {count:,} files: {seconds:.1f} s, {count / seconds:,.0f}/s, peak {peak:.0f} MB (exit {status})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[], help="builds of so many images")
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=["tiny"])
    parser.add_argument("--repeats", type=int, default=3, help="builds of each")
    parser.add_argument("--plan", type=int, default=0, help="plan so many files")
    parser.add_argument("--work", type=expanded, default=str(Path(tempfile.gettempdir()) / "bench_preprocess"))
    parser.add_argument("--plain-bare", action="store_true", help="leave glibc as it is for the encoders alone")
    parser.add_argument("--name", default="preprocess", help="of the result")
    parser.add_argument("more", nargs="*", help="further options of build, after --")
    arguments = parser.parse_args()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    if arguments.images:
        if not arguments.plain_bare:
            keep_freed_memory(large_too=True)  # as `build` does on a CPU
        draw(work / "images", max(arguments.images))
        rows = []
        for kind in arguments.encoders:
            for count in arguments.images:
                rows.append(compare(work, kind, count, arguments.repeats, arguments.more))
                write(arguments.name, rows)
        print(show(rows))
    if arguments.plan:
        plan(work, arguments.plan)


if __name__ == "__main__":
    main()
