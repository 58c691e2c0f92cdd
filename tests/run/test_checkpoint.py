"""Checkpoints: what is saved comes back bit for bit, also the averages alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_helpers import restore
from training_helpers import abstract_state, meta_of, small_state, tree_equal
from wording import naming

from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA, CheckpointError, Checkpoints, checkpoint_steps, ema_digest
from fluxdit_jax.run.digest import tree_digest

pytest_plugins = ("training_fixtures", "checkpoint_fixtures")
pytestmark = pytest.mark.usefixtures("quick_compile")


# ------------------------------------------------------------------------------------------------ round trip


def test_what_is_saved_comes_back_bit_for_bit(two_saved, states):
    state, found = restore(two_saved, states[2])
    assert tree_equal(state, states[2]) and found == meta_of(2)
    assert type(state) is type(states[2])
    assert (int(state.step), int(state.opt_state.mini_step), int(state.skipped)) == (1, 1, 2)


def test_a_restored_state_can_be_donated(two_saved, states):
    state, _ = restore(two_saved, states[2])
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    memory = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = step(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)} == memory  # used again, all of it


def test_a_new_directory_has_nothing_to_restore(tmp_path, states):
    assert restore(tmp_path / "new", states[1]) is None
    with Checkpoints(tmp_path / "new", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None


def test_the_state_may_be_donated_right_after_saving(tmp_path):
    state = small_state(5)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, meta_of(1))
        for _ in range(3):  # overwrites the buffers that are being saved
            state = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
        jax.block_until_ready(state)
    assert tree_equal(restore(tmp_path, state)[0], expected)


class Slow(dict):
    """A dictionary that takes its time to be written, as on a slow disk."""

    def items(self):
        time.sleep(0.3)
        return super().items()


def test_lists_that_grow_while_they_are_written_are_saved_as_they_were(tmp_path, states):
    """A run goes on with the losses of its window at once; the saved ones must be those of the digest."""
    losses = [1.0]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, states[1], meta_of(1) | {"unfinished": Slow(losses=losses)})
        losses.append(2.0)
    assert restore(tmp_path, states[1])[1]["unfinished"] == {"losses": [1.0]}


def test_the_latest_few_are_kept_and_every_ema(tmp_path, states):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, states[step], meta_of(step))
            checkpoints.save_ema(step, states[step].ema)
        assert checkpoints.latest_step() == 4
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
    assert ema_steps(tmp_path) == [1, 2, 3, 4]


def test_one_that_is_kept_makes_no_room_for_newer_ones_also_after_a_restart(tmp_path, states):
    def there():
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, states[step], meta_of(step))
            assert step < 2 or checkpoints.keep_before(22, 20) == (2 if step == 2 else None)  # the first call decides
    assert there() == [2, 3]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract_state(states[3]))[1] == meta_of(3)
        checkpoints.save(4, states[4], meta_of(4))
    assert there() == [2, 4]


@pytest.mark.parametrize(("found", "margin", "kept"), [(4, 2, 2), (4, 1, 3), (3, 20, 1), (1, 20, None), (9, 0, 4)])
def test_which_one_is_kept(tmp_path, states, found, margin, kept):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, states[step], meta_of(step))
        assert checkpoints.keep_before(found, margin) == kept
        assert checkpoints.keep_before(9, 0) is None, "also where there was none, it is decided"


def test_saving_a_step_twice_keeps_the_first_and_refuses_other_numbers(workdir, states):
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.restore(abstract_state(states[2]))
        assert checkpoints.save(2, states[2], meta_of(2)) and checkpoints.save_ema(2, states[2].ema)
    with Checkpoints(workdir, keep=2) as checkpoints:
        for save in (
            lambda: checkpoints.save(2, states[3], meta_of(3)),
            lambda: checkpoints.save_ema(2, states[3].ema),
        ):
            with pytest.raises(CheckpointError, match=r"(checkpoints|ema)/2\b"):
                save()
    assert tree_equal(restore(workdir, states[2])[0], states[2])
    assert tree_equal(restore_ema(workdir)[1], jax.tree.map(np.asarray, states[2].ema))


def test_read_only_touches_nothing(workdir, states):
    for folder in ("checkpoints", "ema"):
        (workdir / folder / "7.orbax-checkpoint-tmp").mkdir()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with Checkpoints(workdir, keep=1, read_only=True) as checkpoints:
        assert tree_equal(checkpoints.restore(abstract_state(states[2]))[0], states[2])
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_what_a_killed_process_left_is_cleared_away(workdir, states):
    for place in (
        "checkpoints/9.orbax-checkpoint-tmp",
        "ema/9.orbax-checkpoint-tmp-123",
        "short_ema/9.orbax-checkpoint-tmp",
    ):
        shutil.copytree(workdir / "ema" / "2", workdir / place)
    assert restore(workdir, states[2])[1] == meta_of(2)
    assert not list(workdir.rglob("*orbax-checkpoint-tmp*"))
    assert ema_steps(workdir) == checkpoint_steps(workdir) == [1, 2]


def test_only_whole_checkpoints_count_as_steps(workdir, tmp_path):
    assert checkpoint_steps(tmp_path / "new") == ema_steps(tmp_path / "new") == []
    for folder in ("checkpoints", "ema"):
        (workdir / folder / "10").mkdir()
        (workdir / folder / "11.orbax-checkpoint-tmp").mkdir()
        (workdir / folder / "notes").write_text("")
    assert checkpoint_steps(workdir) == ema_steps(workdir) == [1, 2, 10]


# ------------------------------------------------------------------------------------------------ EMA


def test_ema_weights_come_back_as_numpy(two_saved, states):
    step, ema = restore_ema(two_saved)
    assert step == 2 and tree_equal(ema, jax.tree.map(np.asarray, states[2].ema))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(ema))
    step, ema = restore_ema(two_saved, 1)
    assert step == 1 and tree_equal(ema, jax.tree.map(np.asarray, states[1].ema))


def test_ema_weights_can_be_read_without_this_project(two_saved, states):
    code = (
        "import sys, json, orbax.checkpoint as ocp\n"
        "assert 'fluxdit_jax' not in sys.modules\n"
        f"tree = ocp.PyTreeCheckpointer().restore({str(two_saved / 'ema' / '2')!r})\n"
        "flat = {'bias': tree['bias'], 'kernel': tree['mlp']['kernel']}\n"
        "print(json.dumps({k: [str(v.dtype), v.shape, float(v.sum())] for k, v in flat.items()}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    ema = states[2].ema
    for name, leaf in (("bias", ema["bias"]), ("kernel", ema["mlp"]["kernel"])):
        assert found[name] == ["float32", list(leaf.shape), pytest.approx(float(leaf.sum()), rel=1e-5)]


def test_missing_ema_weights_are_told(tmp_path, two_saved):
    for folder, named in ((EMA, False), (SHORT_EMA, True)):
        with pytest.raises(CheckpointError, match=f"{tmp_path / folder} .*weights") as refusal:
            restore_ema(tmp_path, folder=folder)
        assert ("config.ema.short_decay" in str(refusal.value)) == named
    with pytest.raises(CheckpointError, match=naming(two_saved / "ema", 5, "1, 2")):
        restore_ema(two_saved, 5)


@pytest.mark.parametrize("short", [False, True])
def test_each_average_there_is_is_written_with_its_digest(tmp_path, short):
    state = small_state(7, short_ema=short)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, state, meta_of(5))
        checkpoints.save_averages(5, state)
        checkpoints.poll(wait=True)
        assert checkpoints.failures == 0 and checkpoints.restore(abstract_state(state))[1] == meta_of(5)
    meta = json.loads((tmp_path / "checkpoints" / "5" / "meta" / "metadata").read_text())
    averages = {EMA: state.ema} | ({SHORT_EMA: state.short_ema} if short else {})
    assert {name for name in meta if name.endswith("_digest")} == {f"{folder}_digest" for folder in averages}
    for folder, average in averages.items():
        assert meta[f"{folder}_digest"] == ema_digest(tmp_path, 5, folder) == tree_digest(average)
        step, weights = restore_ema(tmp_path, folder=folder)
        assert step == 5 and tree_equal(weights, jax.tree.map(np.asarray, average))
    assert ema_steps(tmp_path, SHORT_EMA) == [5] * short


def test_the_format_is_plain_orbax(two_saved):
    manager = ocp.CheckpointManager(two_saved / "checkpoints")
    assert manager.all_steps() == [1, 2]
