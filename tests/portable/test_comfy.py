"""ComfyUI's node, called as ComfyUI calls it."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import types

import numpy as np
import pytest
import torch
from exported_scene import Scene, make
from PIL import Image
from training_helpers import REPOSITORY
from wording import naming

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")
GIVEN = {"guidance_text": 2.0, "guidance_vision": 1.5, "rescale": 0.2, "steps": 2, "method": "heun", "width": 64,
         "height": 64, "seed": 3, "count": 2}  # fmt: skip


def load_node(name: str = "comfy_node"):
    """The folder as ComfyUI imports it: by its path, under a name of ComfyUI's choice."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "comfy" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scene(tmp_path_factory, draw_photo, quick_compile) -> Scene:
    return make(tmp_path_factory.mktemp("comfy"), draw_photo)


def test_what_comfyui_asks_of_a_node_is_there():
    node = load_node()
    for name, kind in node.NODE_CLASS_MAPPINGS.items():
        asked = kind.INPUT_TYPES()
        names = [*asked["required"], *asked.get("optional", {})]
        taken = inspect.signature(getattr(kind, kind.FUNCTION)).parameters
        assert sorted(names) == sorted(set(taken) - {"self"})
        assert kind.RETURN_TYPES and kind.CATEGORY and name in node.NODE_DISPLAY_NAME_MAPPINGS


def test_it_draws_what_the_pipeline_draws(scene):
    node = load_node()
    photo = scene.root / "photos" / "p0.png"
    pixels = np.asarray(Image.open(photo).convert("RGB"))
    reference = torch.from_numpy(pixels.astype(np.float32) / 255)[None]
    (model,) = node.FluxDiTLoader().load("", "auto", True, str(scene.root / "exported"))
    (images,) = node.FluxDiTSampler().draw(model, "a dog", reference=reference, **GIVEN)
    assert images.dtype == torch.float32 and images.shape == (2, 64, 64, 3)
    pipe = scene.pipe()
    given = {"guidance_text": 2.0, "guidance_vision": 1.5, "rescale": 0.2, "seed": 3, "num_inference_steps": 2}
    size = {"width": 64, "height": 64, "num_images_per_prompt": 2, "output_type": "np"}
    drawn = pipe("a dog", reference=Image.open(photo), **given, **size).images
    np.testing.assert_array_equal(images.numpy(), drawn)


def test_without_trust_and_without_a_model_it_says_what_to_do(scene, tmp_path):
    loader = load_node().FluxDiTLoader()
    with pytest.raises(ValueError, match=naming("pipeline.py", "trust_its_code")):
        loader.load("", "auto", False, str(scene.root / "exported"))
    with pytest.raises(ValueError, match=naming("gone", "--format diffusers")):
        loader.load(str(tmp_path / "gone"), "auto", True)


def test_within_comfyui_its_models_are_listed_its_bar_moves_and_its_cancel_is_heard(scene, tmp_path, monkeypatch):
    """Stand-ins for the modules of ComfyUI that the node asks: ComfyUI itself is no package, and over a gigabyte."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "mine").symlink_to(scene.root / "exported")
    moved, stop = [], []

    class Bar:
        def __init__(self, total):
            moved.append(total)

        def update(self, count):
            moved.append(count)

    class Interrupted(Exception):
        pass

    def interrupted():
        if stop:
            raise Interrupted

    modules = {
        name: types.ModuleType(name) for name in ("comfy", "comfy.model_management", "comfy.utils", "folder_paths")
    }
    modules["comfy.model_management"].get_torch_device = lambda: torch.device("cpu")
    modules["comfy.model_management"].unload_all_models = lambda: None
    modules["comfy.model_management"].throw_exception_if_processing_interrupted = interrupted
    modules["comfy.utils"].ProgressBar = Bar
    modules["folder_paths"].get_folder_paths = lambda kind: [str(tmp_path / kind)]
    modules["comfy"].model_management, modules["comfy"].utils = (
        modules["comfy.model_management"],
        modules["comfy.utils"],
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    node = load_node("comfy_node_within")
    assert node.FluxDiTLoader.INPUT_TYPES()["required"]["model"] == (["mine"],)
    (model,) = node.FluxDiTLoader().load("mine", "float32", True)
    node.FluxDiTSampler().draw(model, "a dog", **GIVEN)
    assert moved == [2, 1, 1]
    stop.append(True)
    with pytest.raises(Interrupted):
        node.FluxDiTSampler().draw(model, "a dog", **GIVEN)


def test_it_imports_nothing_of_this_project():
    code = (REPOSITORY / "comfy" / "__init__.py").read_text()
    assert not re.search(r"^\s*(import|from) (fluxdit_jax|jax|preprocess)", code, re.MULTILINE)
    assert [path.name for path in (REPOSITORY / "comfy").glob("*.py")] == ["__init__.py"]
