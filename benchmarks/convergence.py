"""Convergence: steps and FLOPs until the gate passes, for each choice of `configs/demo.py` and for a plain DiT.

    python -m benchmarks.convergence --data data/demo            # all of VARIANTS; 5 to 10 minutes each on 2 cores
    python -m benchmarks.convergence --data data/demo default plain_dit
    python -m benchmarks.convergence --show                      # the table of what is measured

The data set is the demonstration set, made as `scripts/quickstart.sh` does. A variant is `configs/demo.py` with a
few keys changed (`BASE`, and one choice more), trained by the project's own step. Every `PROBE` steps a part of the
gate is drawn from the EMA (a third of the pictures, a third of the swaps, half of the edits); where that part is near
passing, the whole gate is measured, with all its controls, by the classes that `fluxdit_jax.validate` uses, with the
same noise. The run ends when the gate passes, or at the variant's last step. Each result is written as soon as it is
there.

FLOPs are counted by hand: three forward passes a training step, no recomputation, no drawing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import plain_dit
from benchmarks.environment import RESULTS, describe, table, write
from configs import demo
from fluxdit_jax.dataset.grid import GRID_FILE, read_grid
from fluxdit_jax.dataset.manifest import Manifest, load_manifest
from fluxdit_jax.device import devices
from fluxdit_jax.gate.edit import TextEdit
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Sampler
from fluxdit_jax.gate.swap import Swap
from fluxdit_jax.loader import reader
from fluxdit_jax.model import cost, dit
from fluxdit_jax.objective import Objective, patch_statistics
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.sampling.pipeline import Generator
from fluxdit_jax.sampling.prompts import encode_prompts
from fluxdit_jax.settings import Settings, resolve
from fluxdit_jax.shared.host_memory import keep_freed_memory
from fluxdit_jax.shared.paths import expanded
from fluxdit_jax.state import create_state
from fluxdit_jax.train_step import make_train_step
from fluxdit_jax.vae.decoder import decode_all, load_decoder

NAME = "convergence"
PROBE = 100  # steps
NEAR = {"memorised": 0.96, "swapped": 0.75, "turned": 0.80}  # of the part; there the whole gate is measured
SAMPLER = {"steps": 6, "method": "rk3", "batch_size": 20}  # validate's own
# What every choice but the first was held against: what `configs/demo.py` said before it took the winner.
BASE = {"flow.uniform_share": 1.0, "train.steps": 1500}
ADAMW = BASE | {"optim.name": "adamw"}
PLAIN = ADAMW | {"flow.shift": 1.0, "flow.stratified": False}
# Each: what it shows, and the keys of configs/demo.py it changes. In order of importance.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("configs/demo.py: logit-normal, cosine to step 1,200", {}),
    "base": ("uniform time, cosine to step 1,500", BASE),
    "adamw_2e-3": ("AdamW 2e-3", ADAMW | {"optim.lr": 2e-3}),
    "plain_dit_1e-3": ("plain DiT, AdamW 1e-3, uniform time", PLAIN | {"optim.lr": 1e-3}),
    "constant": ("constant learning rate", BASE | {"optim.schedule": "constant"}),
    "shift_1": ("no time shift", BASE | {"flow.shift": 1.0}),
    "muon_4e-3": ("Muon 4e-3", BASE | {"optim.lr": 4e-3}),
    "short": ("cosine to step 900", BASE | {"train.steps": 900}),
    "logit_normal": ("logit-normal time", BASE | {"flow.uniform_share": 0.0}),
    "adamw_4e-3": ("AdamW 4e-3", ADAMW | {"optim.lr": 4e-3}),
    "plain_dit_2e-3": ("plain DiT, AdamW 2e-3, uniform time", PLAIN | {"optim.lr": 2e-3}),
    "muon_16e-3": ("Muon 1.6e-2", BASE | {"optim.lr": 16e-3}),
    "short_600": ("cosine to step 600", BASE | {"train.steps": 600}),
    "auto_shift": ("time shift by token count (0.5)", BASE | {"flow.shift": None}),
    "no_dropout": (
        "no condition dropped",
        BASE | {"flow.drop": ""},
    ),
}
AVERAGES = (0.9, 0.99, 0.999)  # fixed decays, looked at beside the warmed-up EMA and the raw weights


class Gate:
    """The three tests of `fluxdit_jax.validate` on a data set, for any weights."""

    def __init__(self, directory: str, manifest: Manifest, settings: Settings, graph: Any):
        source = reader.RecordSource(directory, manifest, "train")
        records = [source[index] for index in range(len(source))]
        self._decoder = load_decoder(manifest.vae, None)
        truths = decode_all(self._decoder, [record.latent for record in records])
        grid = read_grid(Path(directory) / GRID_FILE)
        self._set = EvalSet(tuple(records), tuple(truths), settings.model.patch, grid)
        self._library = Library(self._set)
        self._memorisation, self._swap = Memorisation.plan(self._set), Swap.plan(self._set, 60)
        self._edit = TextEdit.plan(self._set, 40, None, lambda texts: encode_prompts(texts, manifest, None))
        self._generator = Generator.of(settings, manifest, graph=graph, **SAMPLER)

    def sampler(self, params: Any) -> Sampler:
        return Sampler(self._generator, params, self._decoder)

    def part(self, sampler: Sampler) -> dict[str, float]:
        """Shares that pass in a part of each test, and the median PSNR in dB."""
        own = range(0, len(self._set), 3)
        pairs, cases = range(0, len(self._swap.pairs), 3), range(0, len(self._edit.cases), 2)
        memorised = self._library.retrieve(sampler([self._memorisation.own[i] for i in own]), own)
        answers = [self._swap.pairs[k].answer for k in pairs]
        swapped = self._library.retrieve(sampler([self._swap.swapped[k] for k in pairs]), answers)
        answers = [self._edit.cases[k][1] for k in cases]
        edited = self._library.retrieve(sampler([self._edit.edited[k] for k in cases]), answers)
        return {
            "memorised": memorised.share,
            "psnr_db": float(np.median(memorised.psnr)),
            "swapped": swapped.share,
            "turned": edited.share,
        }

    def whole(self, sampler: Sampler) -> dict[str, Any]:
        """The gate's verdict: each test's share, the controls that failed, and the numbers people ask for."""
        verdicts = [test.measure(sampler, self._library) for test in (self._memorisation, self._swap, self._edit)]
        memorised, swapped, turned = verdicts
        return {
            "passed": all(verdict.passed for verdict in verdicts),
            "memorised": memorised.value,
            "psnr_db": memorised.numbers["psnr_median_db"],
            "swapped": swapped.value,
            "turned": turned.value,
            "reasons": [reason for verdict in verdicts for reason in verdict.reasons],
        }


def measure(name: str, directory: str, seed: int, averages: bool, probe: int, limit: int | None) -> dict[str, Any]:
    """Trains one variant until the gate passes, or to step `limit`; returns its row."""
    what, changes = VARIANTS[name]
    config = demo.get_config()
    config.update_from_flattened_dict(changes | {"seed": seed, "data.path": directory})
    manifest = load_manifest(directory)
    settings = resolve(config, manifest)
    plain = name.startswith("plain_dit")
    network = plain_dit if plain else dit
    graph = plain_dit.build(settings.model) if plain else dit.build(settings.model)[0]
    statistics = patch_statistics(manifest.latent_mean, manifest.latent_std, settings.model.patch)
    optimizer = build_optimizer(settings.optimizer)
    params = jax.jit(lambda key: network.initialize(settings.model, key))(jax.random.key(seed))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    whole = make_train_step(
        Objective(
            graph, settings.model, settings.flow, statistics, seed=seed, global_batch_size=settings.global_batch_size
        ),
        optimizer,
        ema_target=settings.ema_decay,
    )
    accumulate, update = (jax.jit(part, donate_argnums=0) for part in whole[:2])
    forward = (plain_dit if plain else cost).flops_per_sample(settings.model, settings.tokens, settings.batch.lengths)
    flops = 3 * forward * settings.global_batch_size  # of a step
    batches = reader.batches(
        reader.RecordSource(directory, manifest, "train"), seed=seed, start=0, batch_size=settings.micro_batch_size,
        layout=settings.batch, threads=1, prefetch=4,
    )  # fmt: skip
    gate = Gate(directory, manifest, settings, graph)
    state = jax.jit(lambda params: create_state(params, optimizer))(params)
    kept = {decay: jax.tree.map(jnp.copy, params) for decay in AVERAGES} if averages else {}
    move = jax.jit(_move, donate_argnums=0)

    curve, others, verdict = [], [], None
    total = config.train.steps if limit is None else min(limit, config.train.steps)
    started, training = time.monotonic(), 0.0
    with tqdm(total=total, desc=name, unit="step", mininterval=30.0) as bar:
        for number in range(1, total + 1):
            begun = time.monotonic()
            state, values = accumulate(state, next(batches))
            state, _ = update(state)
            if kept:
                kept = move(kept, state.params)
            bar.update()
            if number % probe and number != total:
                continue
            loss = float(values["loss"])
            training += time.monotonic() - begun
            sampler = gate.sampler(state.ema)
            part = gate.part(sampler)
            curve.append({"step": number, "loss": round(loss, 4), **_rounded(part)})
            bar.set_postfix_str(" ".join(f"{key} {value}" for key, value in curve[-1].items() if key != "step"))
            if kept and number % (3 * probe) == 0:
                weights = {"raw": state.params, **{str(decay): tree for decay, tree in kept.items()}}
                seen = {label: gate.part(gate.sampler(tree)) for label, tree in weights.items()}
                seen["warmed up"] = part
                others.append({"step": number} | {label: _rounded(one) for label, one in seen.items()})
            if number == total or all(part[key] >= bound for key, bound in NEAR.items()):
                verdict = gate.whole(sampler)
                curve[-1]["whole"] = _rounded(verdict)
                if verdict["passed"]:
                    break
    passed = bool(verdict and verdict["passed"])
    return {
        "name": name if seed == 0 else f"{name} seed {seed}",
        "what": what,
        "changes": changes,
        "seed": seed,
        "parameters": parameters,
        "gflops_per_step": round(flops / 1e9, 2),
        "total_steps": config.train.steps,
        "passed": passed,
        "steps": number,
        "tflops": round(number * flops / 1e12, 2),
        "seconds_shared_machine": round(time.monotonic() - started, 1),
        "last": _rounded(verdict),
        "curve": curve,
        "averages": others,
        "environment": describe(),
    }


def _move(kept: dict[float, Any], params: Any) -> dict[float, Any]:
    """The averages after a step, each of its fixed decay."""
    return {decay: optax.incremental_update(params, old, 1 - decay) for decay, old in kept.items()}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def known() -> list[dict[str, Any]]:
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def show(rows: list[dict[str, Any]]) -> str:
    """The table, with the FLOPs to the gate as a multiple of the base's."""
    base = next((row["tflops"] for row in rows if row["name"] == "base" and row["passed"]), None)
    lines = []
    for row in rows:
        steps = f"{row['steps']:,}" if row["passed"] else f"not in {row['steps']:,}"
        ratio = f"{row['tflops'] / base:.2f}" if base and row["passed"] else "-"
        if base and not row["passed"]:
            ratio = f"> {row['tflops'] / base:.2f}"
        last = row["last"]
        lines.append(
            [row["name"], row["what"], f"{row['parameters'] / 1e6:.2f} M", row["gflops_per_step"], steps, row["tflops"],
             ratio, f"{last['psnr_db']:.1f}", *(f"{last[key]:.0%}" for key in ("memorised", "swapped", "turned"))]
        )  # fmt: skip
    header = ["variant", "what", "parameters", "GFLOP a step", "steps to the gate", "TFLOP", "of the base",
              "dB there", "memorised", "swapped", "turned"]  # fmt: skip
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--data", type=expanded, help="the demonstration set, preprocessed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe", type=int, default=PROBE, help="steps between looks at the gate")
    parser.add_argument("--limit", type=int, help="last step of a run; its schedule stays what it is")
    parser.add_argument("--averages", action="store_true", help="look at raw weights and fixed decays too")
    parser.add_argument("--show", action="store_true", help="print the table and end")
    arguments = parser.parse_args()
    if unknown := set(arguments.variants) - VARIANTS.keys():
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if not arguments.show:
        if arguments.data is None:
            parser.error("--data DIR: the demonstration set, made as scripts/quickstart.sh does")
        devices.use_compilation_cache()
        keep_freed_memory(large_too=True)
        for name in arguments.variants or VARIANTS:
            row = measure(name, arguments.data, arguments.seed, arguments.averages, arguments.probe, arguments.limit)
            rows = [other for other in known() if other["name"] != row["name"]]
            write(NAME, [*rows, row])
    print(show(known()))


if __name__ == "__main__":
    main()
