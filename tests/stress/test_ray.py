"""`build --engine ray --ray-address`, on a cluster of this machine; `ray_kills.py` beside this file kills it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")
import ray_kills  # noqa: E402

from fluxdit_jax.dataset.manifest import MANIFEST  # noqa: E402


@pytest.mark.slow
def test_a_cluster_may_ask_for_the_token_of_its_machine(tmp_path: Path, monkeypatch) -> None:
    """Ray makes one for a build without an address, and every cluster that is begun afterwards asks for it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    ray_kills.draw(tmp_path / "photos", range(6))
    with ray_kills.cluster() as (address, _):
        process = ray_kills.start(tmp_path / "photos", tmp_path / "data", "--engine", "ray", "--ray-address", address)
        told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert (tmp_path / "data" / MANIFEST).exists()
