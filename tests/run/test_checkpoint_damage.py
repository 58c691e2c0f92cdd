"""Damaged checkpoints and full disks: every kind is told and survived, and nothing is thrown away."""

from __future__ import annotations

import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import cut, flip_in_the_largest_file, restore
from training_helpers import abstract_state, meta_of, small_state, tree_equal

from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.checkpoint import CheckpointError, Checkpoints, checkpoint_steps, ema_digest, first_line

pytest_plugins = ("training_fixtures", "checkpoint_fixtures")
pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_flipped_bit_in_ema_weights_is_told(workdir):
    flip_in_the_largest_file(workdir / "ema" / "2")
    with pytest.raises(CheckpointError, match=r"ema/2\b"):
        restore_ema(workdir)
    assert restore_ema(workdir, 1)[0] == 1


def test_weights_without_a_description_have_no_digest(workdir):
    assert ema_digest(workdir, 2) is not None and ema_digest(workdir, 3) is None
    for path in (workdir / "ema" / "2").glob("_*METADATA"):
        path.write_text("{")
    assert ema_digest(workdir, 2) is None


def delete(path):
    path.unlink()


DAMAGE = {
    "meta cut": lambda d: cut(d / "meta" / "metadata"),
    "meta lost": lambda d: delete(d / "meta" / "metadata"),
    "meta changed": lambda d: (d / "meta" / "metadata").write_text(
        (d / "meta" / "metadata").read_text().replace('"samples": 24', '"samples": 28')
    ),
    "meta without digest": lambda d: (d / "meta" / "metadata").write_text('{"samples": 24, "batch_size": 4}'),
    "description lost": lambda d: delete(d / "state" / "_METADATA"),
    "description empty": lambda d: (d / "state" / "_METADATA").write_text(""),
    "manifest cut": lambda d: cut(d / "state" / "manifest.ocdbt"),
    "numbers cut": lambda d: cut(max(d.rglob("d/*"), key=lambda p: p.stat().st_size)),
    "numbers lost": lambda d: delete(max(d.rglob("d/*"), key=lambda p: p.stat().st_size)),
    "numbers flipped": flip_in_the_largest_file,
    "folder empty": lambda d: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in d.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(workdir, states, package_log, damage):
    before = {p: p.read_bytes() for p in (workdir / "checkpoints" / "2").rglob("*") if p.is_file()}
    damage(workdir / "checkpoints" / "2")
    after = {p: p.read_bytes() for p in (workdir / "checkpoints" / "2").rglob("*") if p.is_file()}
    assert before != after
    with Checkpoints(workdir, keep=2) as checkpoints:
        state, found = checkpoints.restore(abstract_state(states[1]))
        assert tree_equal(state, states[1]) and found == meta_of(1)
        told = "\n".join(package_log)
        assert "ERROR checkpoints/2 " in told
        assert (workdir / "damaged" / "2").is_dir() and str(workdir / "damaged" / "2") in told
        # the step is free again, and the run goes on saving
        assert checkpoints.save(2, states[2], meta_of(2)) and checkpoints.save(3, states[3], meta_of(3))
    state, found = restore(workdir, states[3])
    assert tree_equal(state, states[3]) and found == meta_of(3)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "3"]


def test_nothing_but_damage_stops_with_a_way_out(workdir, states):
    for step in ("1", "2"):
        flip_in_the_largest_file(workdir / "checkpoints" / step)
    with pytest.raises(CheckpointError) as refusal:
        restore(workdir, states[1])
    for word in (
        str(workdir / "checkpoints"),
        "2: ",
        "1: ",
        "backup",
        f"--config.resume.from_run={workdir}",
    ):
        assert word in str(refusal.value)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["1", "2"]  # nothing is thrown away


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: small_state(1, rows=61), ["params/mlp/kernel", "[60, 40]", "[61, 40]"]),
        (lambda: small_state(1, extra=np.ones(3, np.float32)), ["params/extra"]),
        (lambda: small_state(1)._replace(ema={"bias": jnp.ones(7)}), ["ema/mlp/kernel"]),
    ],
    ids=["shape", "missing", "unknown"],
)
def test_a_checkpoint_of_another_configuration_names_the_first_difference(workdir, package_log, other, words):
    with pytest.raises(CheckpointError) as refusal:
        restore(workdir, other())
    for word in ["checkpoints/2", "config.model", *words]:
        assert word in str(refusal.value)
    assert not package_log  # it is not damaged
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def test_of_another_run_damaged_ones_stay_where_they_are(workdir, states, package_log):
    cut(workdir / "checkpoints" / "2" / "meta" / "metadata")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with Checkpoints(workdir, keep=1, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract_state(states[1]))[1] == meta_of(1)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert "checkpoints/2" in package_log[0]


def test_damaged_ones_are_kept_apart_from_those_damaged_before(tmp_path, states):
    for steps in ((1, 2, 3), (2, 3), (3,)):
        with Checkpoints(tmp_path, keep=5) as checkpoints:
            for step in steps:
                checkpoints.save(step, states[step], meta_of(step))
        for step in steps[-2:]:
            (tmp_path / "checkpoints" / str(step) / "note").write_text(str(len(steps)))
            if step > 1:
                delete(tmp_path / "checkpoints" / str(step) / "meta" / "metadata")
        with Checkpoints(tmp_path, keep=5) as checkpoints:
            assert checkpoints.restore(abstract_state(states[1]))[1] == meta_of(1)
    notes = {path.parent.name: path.read_text() for path in (tmp_path / "damaged").rglob("note")}
    assert notes == {"2": "3", "2.2": "2", "3": "3", "3.2": "2", "3.3": "1"}
    assert checkpoint_steps(tmp_path) == [1]


# ------------------------------------------------------------------------------------------------ full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where the machine lets us make one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_is_loud_and_later_saves_recover(small_disk, package_log):
    states = {step: small_state(step) for step in (1, 2, 3)}
    with Checkpoints(small_disk, keep=1) as checkpoints:
        checkpoints.save(1, states[1], meta_of(1))
        checkpoints.poll(wait=True)
        assert checkpoints.failures == 0
        filler = small_disk / "filler"
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(b"x" * (free - 8192))
        checkpoints.save(2, states[2], meta_of(2))
        checkpoints.save_ema(2, states[2].ema)
        checkpoints.poll(wait=True)
        assert checkpoints.failures == 2
        for what in ("checkpoints/2", "ema/2"):
            (line,) = (line for line in package_log if line.startswith("ERROR") and f" {what}: " in line)
            assert str(small_disk) in line
        filler.unlink()
        assert checkpoints.save(3, states[3], meta_of(3)) and checkpoints.save_ema(3, states[3].ema)
        checkpoints.poll(wait=True)
        assert checkpoints.failures == 2
    state, found = restore(small_disk, states[3])
    assert tree_equal(state, states[3]) and found == meta_of(3)
    assert tree_equal(restore_ema(small_disk)[1], jax.tree.map(np.asarray, states[3].ema))
    assert ema_steps(small_disk) == [3]
    assert not list(small_disk.rglob("*tmp*"))  # what a failed save left does not go on filling the disk


def test_after_a_failed_save_the_last_good_one_is_restored(small_disk):
    states = {step: small_state(step) for step in (1, 2)}
    with Checkpoints(small_disk, keep=1) as checkpoints:
        checkpoints.save(1, states[1], meta_of(1))
        checkpoints.poll(wait=True)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "filler").write_bytes(b"x" * (free - 8192))
        checkpoints.save(2, states[2], meta_of(2))
    assert checkpoints.failures == 1
    state, found = restore(small_disk, states[1])
    assert tree_equal(state, states[1]) and found == meta_of(1)


def test_the_first_line_of_an_error():
    assert first_line(OSError(" \none\ntwo\n")) == "one"
    assert first_line(OSError("x" * 400)) == "x" * 300
    assert first_line(OSError("\n")) == first_line(OSError()) == "OSError"
