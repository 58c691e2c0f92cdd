"""Training across hosts that share folders and nothing else: network namespaces with addresses of their own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training_helpers import REPOSITORY, tiny_config, write_config
from wording import naming

from fluxdit_jax.device.hosts import of_a_collective, require_reachable
from fluxdit_jax.device.sharding import MeshError
from fluxdit_jax.run.checkpoint import checkpoint_steps
from fluxdit_jax.run.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parent))

from hosts import Host, hosts, possible  # noqa: E402

pytest_plugins = ("training_fixtures",)
PATIENCE, STEPS = 3.0, 60
needs_hosts = pytest.mark.skipif(not possible(), reason="needs root and network namespaces")


def begin(cluster: list[Host], config: Path, cache: Path) -> list[subprocess.Popen]:
    """The same run on every host."""
    env = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    given = [f"--config={config}", f"--config.mesh.coordinator={cluster[0].address}:9876"]
    given.append(f"--config.mesh.num_processes={len(cluster)}")
    return [
        host.start("-m", "fluxdit_jax.train", *given, f"--config.mesh.process_id={number}", env=env, cwd=REPOSITORY)
        for number, host in enumerate(cluster)
    ]


def steps_of(workdir: Path) -> dict[int, float]:
    path = workdir / "metrics.jsonl"
    return {entry["step"]: entry["loss"] for entry in read_metrics(path) if "loss" in entry} if path.exists() else {}


def wait_for_saved(workdir: Path, processes: list[subprocess.Popen], after: int) -> None:
    """Until a checkpoint beyond a step is complete and a few steps more are done."""
    while True:
        saved = max(checkpoint_steps(workdir), default=0)
        if saved > after and max(steps_of(workdir), default=0) > saved:
            return
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@needs_hosts
@pytest.mark.slow
def test_two_hosts_are_one_run_through_a_death_and_a_cut_cable(
    train_command, tiny_dataset: Path, xla_cache: Path, tmp_path: Path
) -> None:
    """The survivor names the lost host within its patience; the same command goes on, at the end on one host alone.

    The hosts split the weights before the death and the batch alone before the cut.
    """
    config = tiny_config(tiny_dataset, tmp_path / "one")
    config.train.steps = STEPS
    assert train_command.run(config=write_config(tmp_path / "one.py", config)).returncode == 0

    workdir = tmp_path / "two"
    config.workdir, config.log.preview_every, config.log.preview_count = str(workdir), 5, 1
    config.checkpoint.minutes, config.mesh.patience = 0.01, PATIENCE
    with hosts(2) as cluster:
        reached = 0
        for fault, fsdp in (("kill", 2), ("cut", 1)):
            config.mesh.fsdp = fsdp
            file = write_config(tmp_path / f"{fault}.py", config)
            processes = begin(cluster, file, xla_cache)
            wait_for_saved(workdir, processes, reached)
            reached = max(steps_of(workdir))
            if fault == "kill":
                processes[1].kill()
            else:
                cluster[1].cut()
            began = time.monotonic()
            told = [process.communicate(timeout=90)[0] for process in processes]
            assert time.monotonic() - began < PATIENCE + 20
            assert [process.returncode for process in processes] == [1, -9 if fault == "kill" else 1], told
            assert f"process 1 on host1 is silent for {PATIENCE:.0f} s" in told[0] and "Traceback" not in told[0]
            assert "Make space" not in told[0]
            for each in told:
                assert "process 0 on host0, process 1 on host1. If process 0 dies" in each
            if fault == "cut":
                assert f"process 0 on host0 is silent for {PATIENCE:.0f} s" in told[1]
                cluster[1].mend()
    config.mesh.fsdp = 1
    done = train_command.run(config=write_config(tmp_path / "two.py", config))
    assert done.returncode == 0, done.stderr
    one, two = steps_of(tmp_path / "one"), steps_of(workdir)
    assert one.keys() == two.keys() == set(range(1, STEPS + 1))
    for step in range(1, 8):
        assert two[step] == pytest.approx(one[step], rel=2e-4), step
    assert np.mean(list(two.values())) == pytest.approx(np.mean(list(one.values())), rel=0.02)


@needs_hosts
@pytest.mark.slow
def test_a_host_that_fails_by_itself_tells_the_others_why(tiny_dataset: Path, xla_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_dataset, tmp_path / "run")
    file = write_config(tmp_path / "c.py", config)
    with hosts(2) as cluster:
        shared = ["-m", "fluxdit_jax.train", f"--config={file}", f"--config.mesh.coordinator={cluster[0].address}:9876",
                  "--config.mesh.num_processes=2"]  # fmt: skip
        env = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(xla_cache)}
        more: list[list[str]] = [[], [f"--config.data.path={tmp_path / 'nowhere'}"]]
        processes = [
            host.start(*shared, f"--config.mesh.process_id={number}", *more[number], env=env, cwd=REPOSITORY)
            for number, host in enumerate(cluster)
        ]
        told = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], told
    assert "nowhere" in told[1]
    assert re.search(naming("process 1 on host1 has ended", "nowhere"), told[0]), told[0]


def test_errors_that_a_lost_peer_can_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective fails as another kind of error where it was begun by an array's arrival and not by a step."""
    gloo = ValueError("UNKNOWN: Gloo AllGather failed: Read error [10.0.0.3]:44208: Connection reset by peer")
    assert not of_a_collective(gloo)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert of_a_collective(gloo) and of_a_collective(jax.errors.JaxRuntimeError("UNAVAILABLE: socket closed"))
    assert of_a_collective(ValueError("INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled system error"))
    assert not of_a_collective(OSError("/runs/NCCL-and-Gloo/checkpoints/12: No space left on device"))


def test_a_name_that_leads_others_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostbyname", {"far": "192.0.2.7", "localhost": "127.0.0.1"}.get)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    require_reachable("localhost:1234")
    with pytest.raises(MeshError, match=naming("'localhost'", "127.0.0.1", "/etc/hosts")):
        require_reachable("far:1234")
    monkeypatch.setattr("socket.gethostname", lambda: "far")
    require_reachable("far:1234")
