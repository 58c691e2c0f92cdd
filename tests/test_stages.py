"""A run in stages: what carries over at a switch, what is a stage's own, and that nothing is lost in between."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from build_fixtures import options, write_photos
from training_helpers import tiny_config, tree_equal
from wording import lines_naming, naming

from fluxdit_jax import plan, train_arguments
from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.flow import shift_for_tokens
from fluxdit_jax.loader import reader
from fluxdit_jax.model import cost
from fluxdit_jax.optimizer import learning_rate
from fluxdit_jax.prepared import Prepared, open_source
from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.checkpoint import checkpoint_steps
from fluxdit_jax.run.metrics import last_step, read_metrics
from fluxdit_jax.run.run_directory import RunError, load_stage
from fluxdit_jax.sample import sample
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.settings import resolve
from fluxdit_jax.stages import add_stage, stage_at, stages_of
from fluxdit_jax.train import train
from preprocess.build.build import build

pytest_plugins = ("training_fixtures",)
slow = pytest.mark.slow
SMALL, LARGE = 4, 6  # steps of the stages


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, draw_photo) -> Path:
    """One image set at 32 and 64 px."""
    folder = tmp_path_factory.mktemp("stages")
    photos = write_photos(folder / "photos", 14, draw_photo)
    sides = {"resolution": 64, "resolutions": (32, 64), "modulus": 32, "max_tokens": 8}
    build(options(photos, folder / "data", **(sides | {"holdout": 0.3})))
    return folder / "data"


def staged(data: Path, workdir: Path, **changes):
    """A run of 4 steps at 32 px and 6 at 64 px."""
    c = tiny_config(data, workdir)
    c.flow.drop, c.optim.warmup_steps = "all 0.1, text 0.2, vision 0.2", 0
    c.routing.first, c.routing.last = 0, 1
    c.log.heldout_every, c.log.heldout_count, c.checkpoint.ema_every = 100, 3, 100
    small = {"data.resolution": 32, "train.steps": SMALL, "optim.lr": 1e-2, "data.micro_batch_size": 8}
    small |= {"routing.share": 0.5}
    large = {"data.resolution": 64, "train.steps": LARGE, "optim.lr": 3e-3, "optim.warmup_steps": 2}
    add_stage(c, "px32", small | changes.get("px32", {}))
    add_stage(c, "px64", large | changes.get("px64", {}))
    return c


def run(config, expected: int = 0) -> None:
    assert train(config.copy_and_resolve_references()) == expected


@pytest.fixture(scope="module")
def whole(quick_compile, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted; read only."""
    c = staged(data, tmp_path_factory.mktemp("whole") / "run")
    run(c)
    return Path(c.workdir)


def losses(workdir: Path) -> dict[int, dict]:
    """What was logged at each step, without what depends on the clock."""
    timed = ("images_per_second", "tokens_per_second", "data_wait", "mfu", "device_memory_gb")
    found: dict[int, dict] = {}
    for entry in read_metrics(Path(workdir) / "metrics.jsonl"):
        values = {k: v for k, v in entry.items() if k not in timed and k != "step" and not k.startswith("health")}
        assert not found.get(entry["step"], {}).keys() & values.keys(), "a step is logged twice"
        found.setdefault(entry["step"], {}).update(values)
    return found


def assert_same_outcome(workdir: Path, reference: Path) -> None:
    assert losses(workdir) == losses(reference)
    assert ema_steps(Path(workdir)) == ema_steps(reference) == [SMALL, SMALL + LARGE]
    for step in ema_steps(reference):
        assert tree_equal(restore_ema(Path(workdir), step)[1], restore_ema(reference, step)[1]), step


# ------------------------------------------------------------------------------------------------ what a run does


def test_the_switch_is_seen_and_each_resolution_has_its_own_held_out_loss(whole: Path) -> None:
    logged = losses(whole)
    assert [logged[step]["stage"] for step in range(1, 11)] == [1] * SMALL + [2] * LARGE
    assert [logged[step]["resolution"] for step in range(1, 11)] == [32] * SMALL + [64] * LARGE
    for step, own in ((SMALL, "px32"), (SMALL + LARGE, "px64")):
        assert {"heldout_loss/px32", "heldout_loss/px64"} <= logged[step].keys()
        assert logged[step]["heldout_loss"] == logged[step][f"heldout_loss/{own}"]
    assert all(np.isfinite(v) for values in logged.values() for v in values.values())
    log = (whole / "train.log").read_text()
    assert "stage px32 (1 of 2), begins at step 0" in log and "stage px64 (2 of 2), begins at step 4" in log
    assert [path.name for path in sorted((whole / "samples").glob("*"))] == []


def test_the_learning_rate_is_counted_from_the_stages_first_step(whole: Path) -> None:
    rates = [losses(whole)[step]["learning_rate"] for step in range(1, 11)]
    np.testing.assert_allclose(rates, [1e-2] * SMALL + [1.5e-3] + [3e-3] * (LARGE - 1), rtol=1e-6)


def test_up_to_the_switch_it_is_a_run_of_the_first_stage(whole: Path, data: Path, tmp_path: Path) -> None:
    """Also with another split of the global batch, which is no stage's own."""
    c = staged(data, tmp_path / "run")
    c.train.stages = ""
    c.data.path, c.train.steps, c.optim.lr, c.data.micro_batch_size = str(data / "32"), SMALL, 1e-2, 8
    c.routing.share = 0.5
    run(c)
    assert tree_equal(restore_ema(tmp_path / "run", SMALL)[1], restore_ema(whole, SMALL)[1])
    for step in range(1, SMALL + 1):
        assert losses(tmp_path / "run")[step]["loss"] == losses(whole)[step]["loss"]


def test_the_second_stage_is_a_run_that_goes_on_from_the_whole_state(whole: Path, data: Path, tmp_path: Path) -> None:
    """Weights, moments, EMA, steps and samples carry over: a run of its own from that state comes to the same bits."""
    c = staged(data, tmp_path / "first")
    c.train.stages = "px32"
    run(c)
    alone = tiny_config(data / "64", tmp_path / "alone")
    alone.flow.drop = c.flow.drop
    alone.log.heldout_every = alone.checkpoint.ema_every = 100
    alone.optim.lr, alone.optim.warmup_steps, alone.train.steps = 3e-3, 0, SMALL + LARGE
    alone.resume.from_run, alone.resume.take = str(tmp_path / "first"), "state"
    run(alone)
    without = staged(data, tmp_path / "without", px64={"optim.warmup_steps": 0})
    run(without)
    for other in (tmp_path / "alone",):
        found = restore_ema(other, SMALL + LARGE)[1]
        assert tree_equal(found, restore_ema(tmp_path / "without", SMALL + LARGE)[1])
        assert not tree_equal(found, restore_ema(whole, SMALL + LARGE)[1]), "the warm-up of the stage changes it"


def test_the_same_images_go_on_in_the_same_order(data: Path, tmp_path: Path, monkeypatch, quick_compile) -> None:
    """No image is seen again before all were seen, across the switch."""
    seen: list[int] = []
    original = reader.batches

    def batches(source, **options):
        for batch in original(source, **options):
            seen.extend(int(i) for i in batch["index"])
            yield batch

    monkeypatch.setattr(reader, "batches", batches)
    run(staged(data, tmp_path / "run"))
    assert sorted(seen) == list(range(8 * (SMALL + LARGE)))  # and none beyond the end
    stages = stages_of(staged(data, tmp_path / "run"))
    sources = [open_source(stage.config, Prepared.of(stage).manifest) for stage in stages]
    keys = [[source[i].key for i in range(len(source))] for source in sources]
    assert keys[0] == keys[1]


def test_a_stage_fits_its_resolution(data: Path, tmp_path: Path) -> None:
    small, large = (Prepared.of(stage) for stage in stages_of(staged(data, tmp_path / "run")))
    assert (small.settings.tokens, large.settings.tokens) == (4, 16)
    assert small.manifest.latent_std != large.manifest.latent_std
    assert small.settings.flow.shift == shift_for_tokens(4) and large.settings.flow.shift == shift_for_tokens(16)
    assert large.settings.optimizer.first_step == SMALL and large.settings.optimizer.total_steps == LARGE
    assert jax.tree.map(np.shape, small.program.abstract) == jax.tree.map(np.shape, large.program.abstract)


def test_a_run_of_one_stage_is_a_run_without(data: Path, tmp_path: Path, quick_compile) -> None:
    c = staged(data, tmp_path / "staged")
    c.train.stages = "px64"
    run(c)
    plain = tiny_config(data / "64", tmp_path / "plain")
    plain.flow.drop, plain.log.heldout_every, plain.checkpoint.ema_every = c.flow.drop, 100, 100
    plain.optim.lr, plain.train.steps = 3e-3, LARGE
    run(plain)
    assert tree_equal(restore_ema(tmp_path / "staged")[1], restore_ema(tmp_path / "plain")[1])


# ------------------------------------------------------------------------------------------------ interrupted


def interrupt(monkeypatch, after: int) -> None:
    """Sends this process a signal when the loops ask for the `after`-th micro-batch, of all stages together."""
    original, count = reader.batches, [0]

    def batches(*arguments, **options):
        for batch in original(*arguments, **options):
            count[0] += 1
            if count[0] == after:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(reader, "batches", batches)


# Micro-batches asked for: 5 in the first stage (one ahead), then 13.
@pytest.mark.parametrize("after", [2, 5, 6, 7, 12])
def test_stopped_in_each_stage_and_at_the_switch_it_goes_on_exactly(
    data: Path, tmp_path: Path, whole: Path, monkeypatch, after: int
) -> None:
    c = staged(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        run(c, expected=128 + signal.SIGTERM)
    run(c)
    assert_same_outcome(Path(c.workdir), whole)


def write_file(path: Path, data: Path, workdir: Path) -> Path:
    path.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_stages import staged\n\n\n"
        f"def get_config():\n    c = staged(Path({str(data)!r}), Path({str(workdir)!r}))\n"
        "    c.checkpoint.minutes = 1e-9\n    return c\n"
    )
    return path


@slow
def test_kill_9_in_each_stage_and_at_the_switch(train_command, data: Path, tmp_path: Path, whole: Path) -> None:
    """A checkpoint after every step; killed within half a second after a step of each stage, and after the switch."""
    seed = random.randrange(10**6)
    rng, workdir, killed = random.Random(seed), tmp_path / "killed", 0
    file, log, metrics = write_file(tmp_path / "c.py", data, workdir), workdir / "train.log", workdir / "metrics.jsonl"

    def starts() -> int:
        return len(re.findall(r"step \d+ of 10$", log.read_text(), re.MULTILINE)) if log.exists() else 0

    for step in (1, SMALL, SMALL + 2, None):
        before = starts()
        with train_command.start(config=file) as process:
            while step is not None and process.poll() is None:
                if starts() > before and last_step(metrics) >= step:
                    time.sleep(rng.uniform(0, 0.5))
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
            _, err = process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, (seed, err[-2000:])
    assert process.returncode == 0 and killed >= 2, (seed, killed)
    assert_same_outcome(workdir, whole)


# ------------------------------------------------------------------------------------------------ afterwards


def test_weights_are_drawn_at_the_resolution_of_their_stage(whole: Path, tmp_path: Path) -> None:
    for step, side, name in ((SMALL, 32, "px32"), (SMALL + LARGE, 64, "px64")):
        stage, manifest = load_stage(whole, step)
        assert stage.name == name and manifest.resolution == side
        arguments = ["--workdir", str(whole), "--step", str(step), "--prompt", "a dog", "--steps", "1"]
        (picture,) = sample(parse_arguments([*arguments, "--out", str(tmp_path / f"{step}.png")]))
        assert 0.9 * side**2 < picture.shape[0] * picture.shape[1] <= side**2


def test_what_may_change_between_two_starts(data: Path, tmp_path: Path, quick_compile) -> None:
    c = staged(data, tmp_path / "run")
    c.train.stages = "px32"
    run(c)
    c.stages.px32.data.micro_batch_size = 4
    run(c)
    c.train.stages = "px32, px64"
    with pytest.raises(RunError, match=naming("train.stages", "px32, px64")):
        train(c.copy_and_resolve_references())
    c.resume.allow_changes = True
    run(c)
    c.resume.allow_changes, c.stages.px64.optim.lr = False, 1e-3
    with pytest.raises(RunError, match=naming("stages.px64.optim.lr", 0.003, 0.001)):
        train(c.copy_and_resolve_references())
    c.stages.px64.optim.lr, c.stages.px64.train.steps = 3e-3, LARGE + 2
    with pytest.raises(RunError, match=naming("stages.px64.train.steps", LARGE, LARGE + 2, "moves the stages")):
        train(c.copy_and_resolve_references())


# ------------------------------------------------------------------------------------------------ wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: setattr(c.train, "stages", "px32, px65"), naming("px65", "px32", "px64")),
        (lambda c: setattr(c.train, "stages", "px32, px32"), "twice"),
        (lambda c: setattr(c.train, "stages", "px32,"), "''"),
        (lambda c: setattr(c.stages.px64.train, "steps", None), "must have train.steps or train.images"),
        (lambda c: setattr(c.stages.px64.optim, "lr", -1.0), naming("px64", "config.optim.lr", "above 0")),
        (lambda c: setattr(c.stages.px64.data, "micro_batch_size", 3), naming("px64", "multiple")),
        (lambda c: c.stages.px64.update({"ema": {"decay": 0.5}}), naming("stages.px64.ema", "no key of a stage")),
    ],
)
def test_a_wrong_stage_is_named(data: Path, tmp_path: Path, change, words: str) -> None:
    c = staged(data, tmp_path / "run")
    change(c)
    with pytest.raises(ConfigError, match=words):
        train(c)
    assert not (tmp_path / "run").exists()


def test_a_resolution_that_is_not_there_and_one_that_is_not_chosen(data: Path, tmp_path: Path) -> None:
    c = staged(data, tmp_path / "run", px64={"data.resolution": 128})
    with pytest.raises(DatasetError, match=naming("config.data.resolution", 128, "32, 64")):
        train(c)
    plain = tiny_config(data, tmp_path / "run")
    with pytest.raises(DatasetError, match=naming("32, 64 px", "--config.data.resolution")):
        train(plain)


def test_stages_of_other_images_are_refused(data: Path, tmp_path: Path, draw_photo) -> None:
    photos = write_photos(tmp_path / "photos", 9, draw_photo)
    other = tmp_path / "data"
    for side in (32, 64):
        chosen = photos if side == 32 else data.parent / "photos"
        build(options(chosen, other / str(side), resolution=side, modulus=side // 2, vision_resolution=64, holdout=0.3))
    with pytest.raises(DatasetError, match=naming("same images", "px64")):
        train(staged(other, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------ by hand


def test_stages_by_hand(data: Path, tmp_path: Path) -> None:
    c = staged(data, tmp_path / "run", px64={"train.steps": None, "train.images": 41})
    first, second = stages_of(c)
    assert (first.first, first.last, second.first, second.last) == (0, SMALL, SMALL, SMALL + math.ceil(41 / 8))
    weighed = staged(data, tmp_path / "run", px64={"train.images": 41})
    assert stages_of(weighed)[1].last == second.last, "pictures outweigh steps"
    assert [stage_at((first, second), step).name for step in (0, 1, 4, 5, 10, 99)] == ["px32"] * 3 + ["px64"] * 3
    assert first.config.data.path == str(data / "32") and first.config.optim.lr == 1e-2
    assert second.config.data.micro_batch_size == c.data.micro_batch_size, "what a stage does not say is the run's"
    schedule = learning_rate(resolve(second.config, Prepared.of(second).manifest, second.first).optimizer, 3e-3)
    assert [float(schedule(step)) for step in (4, 5, 6, 9)] == pytest.approx([1.5e-3, 3e-3, 3e-3, 3e-3])


def test_the_plan_by_hand(data: Path, tmp_path: Path) -> None:
    stages = [Prepared.of(stage) for stage in stages_of(staged(data, tmp_path / "run"))]
    plans = plan.plan_of(stages, plan.Rate(1e9, "given"))
    for one, each, steps in zip(plans, stages, (SMALL, LARGE), strict=True):
        flops = 3 * cost.flops_per_sample(each.settings.model, each.settings.tokens, each.settings.batch.lengths)
        assert (one.steps, one.pictures, one.flops) == (steps, 8 * steps, flops)
        assert one.seconds == pytest.approx(8 * steps * flops / 1e9)
        assert one.kwh == pytest.approx(one.seconds / 3600 * 0.45)
        assert one.epochs == 8 * steps / each.manifest.records("train")
    lines = "\n".join([*plan.table(plans), *plan.totals(plans, stages, plan.Rate(1e9, "given"))])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stages[0].program.abstract))
    assert "px32" in lines and f"3 states of {size / 1e9:.2f} GB, 2 EMA" in lines
    many = [dataclasses.replace(one, pictures=10**6, images=500) for one in plans]
    assert plan.warnings(plans) == [] and len(plan.warnings(many)) == 1
    short = [plans[0], dataclasses.replace(plans[1], warmup=2 * LARGE)]
    (told,) = plan.warnings(short)
    assert re.match(naming("px64", "warmup_steps", 2 * LARGE, f"{plans[1].lr / 2:.2g}"), told)


def test_the_plan_is_printed_and_nothing_is_run(train_command, data: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path / "c.py", data, tmp_path / "run")
    done = train_command.run("--plan", config=file)
    assert done.returncode == 0, done.stderr
    for name in ("px32", "px64"):
        assert lines_naming(done.stdout, name, "4 x 2" if name == "px64" else "8 x 1")
        assert lines_naming(done.stdout, f"stage {name}", "GB of memory")
    assert lines_naming(done.stdout, "in all", "kWh", 450) and not (tmp_path / "run").exists()
    smallest = [f"--config.{key}=1" for key in ("data.micro_batch_size", "stages.px32.data.micro_batch_size")]
    smallest += ["--config.model.remat=block", "--config.device_memory_gb=0.0001"]  # nothing smaller to look for
    done = train_command.run("--plan", *smallest, config=file)
    assert done.returncode == 1 and lines_naming(done.stdout, "stage px64", "device_memory_gb")
    assert lines_naming(done.stdout, "stage px32", "device_memory_gb")


def test_a_checkpoint_is_written_at_the_switch(whole: Path) -> None:
    assert checkpoint_steps(whole) == [SMALL, SMALL + LARGE]


def test_an_override_that_stages_have_in_their_own_way_is_refused(data: Path, tmp_path: Path, capsys) -> None:
    c = staged(data, tmp_path / "run")
    for key in ("optim.lr", "train.steps", "train.images"):
        with pytest.raises(SystemExit, match=rf"px32, px64.*--config\.stages\.px32\.{key}"):
            train_arguments.require_effect([f"--config.{key}=5"], c)
    train_arguments.require_effect(["--config.optim.warmup_steps=1", "--config.seed=1"], c)
    assert "has no effect on the stages px64" in capsys.readouterr().err


def test_a_refused_override_starts_nothing(train_command, data: Path, tmp_path: Path) -> None:
    done = train_command.run("--config.optim.lr=1e-3", config=write_file(tmp_path / "c.py", data, tmp_path / "run"))
    assert done.returncode == 1 and "--config.stages.px32.optim.lr" in done.stderr
    assert not (tmp_path / "run").exists()
