"""The folder that an export is written to: what else is in it stays."""

from __future__ import annotations

import pytest
from exported_scene import Scene, make
from wording import naming

from fluxdit_jax.export import export
from fluxdit_jax.run.run_directory import load_stage
from fluxdit_jax.sampling.exported import ExportError

pytest_plugins = ("training_fixtures",)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, draw_photo, quick_compile) -> Scene:
    return make(tmp_path_factory.mktemp("builtin"), draw_photo)


@pytest.mark.parametrize("form", [{}, {"form": "diffusers", "license": "other"}])
def test_what_is_no_export_is_neither_replaced_nor_cleared_away(scene, tmp_path, form):
    run = scene.root / "run"
    with pytest.raises(ExportError, match=naming("--out", "run directory itself")):
        export(run, run, **form)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ExportError, match=naming(str(tmp_path), "no export", "README.md")):
        export(run, tmp_path, **form)
    with pytest.raises(ExportError, match=naming("manifest.json", "folder of its own")):
        export(run, scene.root / "ds", **form)
    assert (tmp_path / "README.md").read_text() == "mine" and load_stage(run, 3)


@pytest.mark.parametrize("form", [{}, {"form": "diffusers", "license": "other"}])
def test_an_export_again_keeps_what_is_not_its_own(scene, tmp_path, form):
    for _ in range(2):
        export(scene.root / "run", out := tmp_path / "out", samples=1, **form)
        for name in ("vae/mine.safetensors", "samples/mine.png", "notes.md"):
            assert not (out / name).exists() or (out / name).read_text() == "mine"
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("mine")
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["000.png", "mine.png"]
