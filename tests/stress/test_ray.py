"""`build --engine ray --ray-address`, on a cluster of this machine; `ray_kills.py` beside this file kills it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")
import ray_kills  # noqa: E402

from fluxdit_jax.dataset.manifest import MANIFEST  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("had", [True, False])
def test_a_cluster_may_ask_for_the_token_of_its_machine(had: bool, tmp_path: Path, monkeypatch) -> None:
    """Ray makes one for a build without an address; a cluster asks for it if it began afterwards, and only then."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray" / "auth_token"
    if had:
        token.write_text("0123456789abcdef" * 4)
    ray_kills.draw(tmp_path / "photos", range(6))
    with ray_kills.cluster() as (address, _):
        token.write_text("0123456789abcdef" * 4)
        build = ray_kills.start(tmp_path / "photos", tmp_path / "data", "--engine", "ray", "--ray-address", address)
        try:
            told, _ = build.communicate(timeout=240)
        finally:
            build.kill()
    assert build.returncode == 0, told
    assert (tmp_path / "data" / MANIFEST).exists()
