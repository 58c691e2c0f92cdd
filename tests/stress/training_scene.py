"""A run to hurt: a tiny data set of real pictures, a configuration that saves at every step, and what must come out.

Import after `forked.enter`. Everything that starts JAX happens in forks (`forked.call`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path

import forked
import training_helpers
from preprocess_kills import draw, wishes

import fluxdit_jax.export
import fluxdit_jax.sample
import fluxdit_jax.validate  # noqa: F401  the forks run these
from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.metrics import read_metrics
from preprocess.build.build import build

STEPS = 4
BUILD = (
    "--vae=builtin:dct",
    "--text-encoder=builtin:hash",
    "--vision-encoder=builtin:tone",
    "--resolution=64",
    "--modulus=16",
    "--holdout=0.2",
    "--shard-size=5",
    "--max-rejects=1.0",
    "--workers=2",
    "--batch-size=3",
)
# What a report says of when it was made and how long that took.
_PARTS = rb"(load|draw|measure|total)"
CLOCK = re.compile(rb'"made": "[^"]*"|"' + _PARTS + rb'": [\d.]+|\d+ s in all, [^<]*|' + _PARTS + rb" [\d.]+ s,?")


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where everything is. `cache` holds the compiled programs, `expected` what a run left alone gives."""

    root: Path
    config: Path
    cache: Path
    expected: str

    def train(self, run: Path, *arguments: str, **more):  # noqa: ANN003, ANN201
        """`python -m fluxdit_jax.train` on the run directory `run`; more goes to `forked.run`."""
        return self.start("fluxdit_jax.train", f"--config={self.config}", f"--config.workdir={run}", *arguments, **more)

    def start(self, module: str, *arguments: str, begin=forked.run, **more):  # noqa: ANN001, ANN003, ANN201
        """begin: `forked.run`, or `forked.start` to have the child while it runs."""
        cache = {"XDG_CACHE_HOME": str(more.pop("cache", self.cache))}
        more = {"scratch": self.root / "scratch"} | more
        return begin(module, *arguments, environment=cache, **more)

    def programs(self) -> dict[str, tuple[str, list[str], Path]]:
        """(module, arguments, folder of its output) of each program that reads the finished run, small."""
        whole = self.root / "whole"
        run = f"--workdir={whole}"
        prompts = ["--prompt=noise number 3", "--prompt=noise number 4", "--steps=1"]
        little = ["--limit=4", "--pairs=2", "--edits=2", "--steps=1"]
        return {
            "export": ("fluxdit_jax.export", [run, f"--out={self.root}/exported"], self.root / "exported"),
            "sample": (
                "fluxdit_jax.sample",
                [run, f"--out={self.root}/drawn/a.png", *prompts],
                self.root / "drawn",
            ),
            "validate": ("fluxdit_jax.validate", [run, *little], whole / "validation"),
        }

    def outcome(self, run: Path) -> str:
        return outcome(run)

    def files(self, folder: Path) -> dict[str, str]:
        """Digest of every file under a folder by name, the clock's readings in a report left out."""
        found = {}
        for path in sorted(folder.rglob("*")) if folder.exists() else ():
            if path.is_file():
                content = path.read_bytes()
                if path.name.startswith("report."):
                    content = CLOCK.sub(b"", content)
                found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
        return found

    def torn(self, folder: Path, expected: dict[str, str]) -> list[str]:
        """Files under a final name (no .tmp, nothing hidden) that are not the expected ones."""
        working = lambda name: name.endswith(".tmp") or any(part[0] == "." for part in Path(name).parts)  # noqa: E731
        found = self.files(folder).items()
        return [name for name, digest in found if not working(name) and digest != expected.get(name)]

    def litter(self, run: Path) -> list[str]:
        """What no run may leave behind: temporary files, shared memory, checkpoints set aside as damaged."""
        found = [path for path in run.rglob("*") if "tmp" in path.name or path.name == "damaged"]
        found += (self.root / "scratch" / "tmp").iterdir()
        return [str(path) for path in found] + shared_memory()


def make(root: Path, pictures: bool = True) -> Scene:
    """Makes the scene and its reference run, root/whole. Without pictures two programs less are compiled."""
    assert forked.call(_prepare, root, pictures) == "ready"
    scene = Scene(root, root / "config.py", root / "cache", "")
    whole = scene.train(root / "whole")
    assert whole.status == 0, whole.err
    expected = outcome(root / "whole")
    assert expected
    return dataclasses.replace(scene, expected=expected)


def _prepare(root: Path, pictures: bool) -> str:
    draw(root / "photos", range(24))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        build(wishes(root / "photos", root / "data"))
    c = training_helpers.tiny_config(root / "data", root / "unused")
    c.flow.drop = "all 0.1, text 0.2, vision 0.2"
    c.train.steps = STEPS
    c.checkpoint.minutes, c.checkpoint.ema_every = 1e-9, 2  # a checkpoint after every step
    c.log.preview_every, c.log.preview_count, c.log.preview_steps = 2 * pictures, 2, 1
    c.log.minutes = 0.0  # what is logged depends on steps alone
    c.log.heldout_every = 4 * pictures
    training_helpers.write_config(root / "config.py", c)
    return "ready"


def outcome(run: Path) -> str:
    """What a run came to, as JSON: its losses, digests of all EMA weights and of its last state, its pictures.

    "" if it cannot be read.
    """
    with contextlib.suppress(RuntimeError):
        return forked.call(_outcome, run)
    return ""


def _outcome(run: Path) -> str:
    lines = read_metrics(run / "metrics.jsonl")
    told = ("step", "loss", "gradient_norm", "heldout_loss", "skipped")
    state = max((int(path.name) for path in (run / "checkpoints").glob("[0-9]*")), default=0)
    meta = json.loads((run / "checkpoints" / str(state) / "meta" / "metadata").read_text())
    return json.dumps(
        {
            "scalars": [{name: line[name] for name in told if name in line} for line in lines if "loss" in line],
            "heldout": [line for line in lines if "heldout_loss" in line],
            "ema": {step: tree_digest(restore_ema(run, step)[1]) for step in ema_steps(run)},
            "state": [state, meta["digest"]],
            "pictures": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((run / "samples").glob("*"))
            },
        }
    )


def shared_memory() -> list[str]:
    """Files in /dev/shm, less those that were there when this was imported; each is told once."""
    found = set(Path("/dev/shm").iterdir()) - _BEFORE
    _BEFORE.update(found)
    return sorted(map(str, found))


_BEFORE = set(Path("/dev/shm").iterdir())
