"""The exported pipeline in diffusers against `fluxdit_jax.sample`: built-in encoders, and tiny real ones."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from exported_scene import TRUSTED, Scene, make
from PIL import Image, ImageCms
from safetensors.numpy import load_file
from wording import naming

from fluxdit_jax import export as command
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.export import export
from fluxdit_jax.exporting import diffusers_folder
from fluxdit_jax.portable import encoders
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.run_directory import load_stage
from fluxdit_jax.sampling import solvers
from fluxdit_jax.sampling.exported import ExportError
from fluxdit_jax.sampling.pipeline import Generator, conditions
from fluxdit_jax.sampling.prompts import encode_prompts, read_reference
from fluxdit_jax.settings import resolve

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def scene(tmp_path_factory, draw_photo, quick_compile) -> Scene:
    return make(tmp_path_factory.mktemp("builtin"), draw_photo)


@pytest.fixture(scope="module")
def real(tmp_path_factory, draw_photo, quick_compile, tiny_vae_dir, tiny_t5_dir, tiny_dino_dir) -> Scene:
    encoders = {"vae": str(tiny_vae_dir), "text_encoder": str(tiny_t5_dir), "vision_encoder": str(tiny_dino_dir)}
    return make(tmp_path_factory.mktemp("real"), draw_photo, bundle="all", **encoders)


def within_one_level(theirs: list[Any], ours: list[np.ndarray]) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        pixels = np.asarray(a).astype(int)
        assert pixels.shape == b.shape and np.std(b) > 5
        assert np.abs(pixels - b).max() <= 1


REQUESTS = {
    "prompt": ([], {}),
    "guided": (["--guidance-text", "3", "--rescale", "0.5", "--method", "euler"],
               {"guidance_text": 3.0, "rescale": 0.5, "method": "euler"}),
    "reference": (["--reference", "p0", "--guidance-text", "2", "--guidance-vision", "1.5", "--method", "rk3"],
                  {"reference": "p0", "guidance_text": 2.0, "guidance_vision": 1.5, "method": "rk3"}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "request_"), [*(("scene", each) for each in REQUESTS), ("real", "reference")])
def test_pictures_are_those_of_sample(name, request_, request):
    """Two prompts of unequal length, two pictures each, in a size that is not the most common."""
    here = request.getfixturevalue(name)
    theirs, given = REQUESTS[request_][0], dict(REQUESTS[request_][1])
    photo = here.root / "photos" / "p0.png"
    if "reference" in given:
        given["reference"] = Image.open(photo)
    words = [str(photo) if word == "p0" else word for word in theirs]
    ours = here.ours("--prompt", "a dog", "--prompt", "photo number 2 of a cat", "--count", "2", "--seed", "5",
                     "--size", "64x64", "--steps", "3", *words)  # fmt: skip
    drawn = here.pipe()(["a dog", "photo number 2 of a cat"], num_images_per_prompt=2, seed=5, width=64, height=64,
                        num_inference_steps=3, **given).images  # fmt: skip
    within_one_level(drawn, ours)


@pytest.mark.parametrize("method", ["euler", "heun", "rk3"])
def test_latents_are_those_of_the_generator(scene, method):
    """To 1e-4 of the largest value, with guidance of both conditions, and taken back by rescaling."""
    pipe, photo = scene.pipe(), Image.open(scene.root / "photos" / "p1.png")
    stage, manifest = load_stage(scene.root / "run", 3)
    settings = resolve(stage.config, manifest)
    size, vector = (64, 64), pipe.encode_reference(photo)
    (text,) = encode_prompts(["a dog"], manifest, None)
    generator = Generator.of(settings, manifest, steps=4, batch_size=1, method=method)
    wanted = conditions(settings.model.conditions, [text | {"vision": vector}], [(4, 4)])
    _, ema = restore_ema(scene.root / "run", 3)
    guidance = solvers.Guidance({"text": 3.0, "vision": 2.0}, 0.5)
    (ours,) = generator.latents(generator.cast(ema), wanted, generator.noise([9]), guidance=guidance)
    scales = {"guidance_text": 3.0, "guidance_vision": 2.0, "rescale": 0.5}
    how = {"num_inference_steps": 4, "method": method, "width": size[0], "height": size[1], "output_type": "latent"}
    (theirs,) = pipe("a dog", conditions={"vision": vector}, seed=9, **scales, **how).images
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())


def test_the_most_common_size_is_drawn_and_latents_and_numbers_can_be_had(scene):
    pipe = scene.pipe()
    seen = []
    given = {"num_inference_steps": 2, "output_type": "np"}
    (picture,) = pipe("a dog", **given, callback_on_step_end=lambda p, k, t, x: seen.append((k, t))).images
    width, height = pipe.sizes[0]
    assert width != height and picture.shape == (height, width, 3) and 0 <= picture.min() < picture.max() <= 1
    assert [k for k, _ in seen] == [0, 1] and seen[-1][1] == 0.0 < seen[0][1] < 1
    latents = pipe("a dog", num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, 16, height // 8, width // 8)
    np.testing.assert_array_equal(pipe.decode(torch.from_numpy(latents))[0], np.rint(picture * 255).astype(np.uint8))


def test_a_vector_can_be_given_instead_of_a_reference(scene):
    pipe, photo = scene.pipe(), Image.open(scene.root / "photos" / "p1.png")
    given = {"num_inference_steps": 2, "output_type": "latent"}
    by_picture = pipe("a dog", reference=photo, **given).images
    by_vector = pipe("a dog", conditions={"vision": pipe.encode_reference(photo)}, **given).images
    np.testing.assert_array_equal(by_vector, by_picture)
    assert np.abs(pipe("a dog", **given).images - by_picture).max() > 0.05


def test_it_draws_in_a_process_without_jax_and_this_project(scene, tmp_path):
    code = (
        "import sys\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(scene.root / 'exported')!r}, trust_remote_code=True)\n"
        "pipe('a dog', num_inference_steps=1).images[0].save('drawn.png')\n"
        "print([name for name in ('jax', 'flax', 'fluxdit_jax', 'preprocess') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
    within_one_level([Image.open(tmp_path / "drawn.png")], scene.ours("--prompt", "a dog", "--steps", "1"))


def test_nothing_is_run_without_trust(scene):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(scene.root / "exported")


@pytest.mark.parametrize("name", ["scene", "real"])
def test_it_can_be_saved_and_loaded_again(name, request, tmp_path):
    here = request.getfixturevalue(name)
    pipe = here.pipe()
    pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", **TRUSTED)
    given = {"num_inference_steps": 2, "output_type": "latent"}
    np.testing.assert_array_equal(again("a dog", **given).images, pipe("a dog", **given).images)


def test_the_network_alone_is_found_by_auto_model(scene):
    found = AutoModel.from_pretrained(str(scene.root / "exported" / "transformer"), **TRUSTED)
    assert type(found).__name__ == "FluxDiT" and found.config.width == 32


def test_a_compiled_network_draws_the_same(scene):
    pipe = scene.pipe()
    given = {"num_inference_steps": 1, "method": "euler", "output_type": "latent"}
    plain = pipe("a dog", **given).images
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    np.testing.assert_allclose(pipe("a dog", **given).images, plain, atol=1e-4)


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
@pytest.mark.parametrize("name", ["scene", "real"])
def test_offloaded_it_draws_the_same(name, offload, request, tmp_path):
    here = request.getfixturevalue(name)
    given = {"reference": Image.open(here.root / "photos" / "p0.png"), "num_inference_steps": 1, "output_type": "np"}
    plain = here.pipe()("a dog", **given).images
    pipe = here.pipe()
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif offload == "group":
        devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}  # and there to disk
        pipe.enable_group_offload(**devices, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    else:  # what enable_sequential_cpu_offload does on a GPU; on "cpu:0", as it calls the CPU, accelerate fails
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                accelerate.cpu_offload(module, execution_device="cpu", offload_buffers=True)
        assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}
    for _ in range(2):
        np.testing.assert_array_equal(pipe("a dog", **given).images, plain)


def test_bfloat16_is_near(scene, tmp_path):
    """Weights stored in bfloat16, computed with as such, and as f32."""
    export(scene.root / "run", tmp_path / "half", form="diffusers", license="other", dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {array.dtype.name for array in stored.values()} == {"bfloat16"}
    given = {"num_inference_steps": 4, "output_type": "latent"}
    exact = scene.pipe()("a dog", **given).images
    for dtype in (torch.bfloat16, torch.float32):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "half", dtype=dtype, **TRUSTED)
        assert pipe.transformer.dtype is dtype
        difference = np.abs(pipe("a dog", **given).images - exact).max() / np.abs(exact).max()
        assert 0 < difference < 0.05, dtype


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"width": 64, "height": 72}, ("64x72", "trained")),
        ({"seed": -1}, ("seed", -1)),
        ({"method": "dopri"}, ("method", "dopri")),
        ({"rescale": 2.0}, ("rescale", 2.0)),
        ({"output_type": "tiff"}, ("output_type", "tiff")),
        ({"conditions": {"depth": np.zeros(3)}}, ("depth", "vision")),
        ({"conditions": {"vision": np.ones(3)}}, ("vision", 1024, 3)),
        ({"conditions": {"vision": np.zeros(1024)}}, ("vision", "not all 0")),
        ({"guidance": {"depth": 2.0}}, ("guidance", "depth", "vision")),
        ({"prompt": []}, ("prompt",)),
        ({"prompt": None}, ("prompt",)),
        ({"seed": None}, ("seed",)),
        ({"guidance_text": math.nan}, ("guidance", "finite")),
        ({"reference": "photo.jpg"}, ("reference", "str")),
        ({"reference": Image.new("RGB", (64, 64)), "conditions": {"vision": np.ones(1024)}}, ("reference", "give one")),
    ],
)
def test_what_cannot_be_drawn_is_named(scene, given, words):
    with pytest.raises(ValueError, match=naming(*words)):
        scene.pipe()(**({"prompt": "a dog", "num_inference_steps": 1} | given))


# ------------------------------------------------------------------------------------------------- the export


@pytest.mark.parametrize("name", ["scene", "real"])
def test_a_prompt_that_is_cut_is_told(name, request, monkeypatch):
    """The tiny T5 and the built-in encoder of the scenes take 512 tokens, the run as many as the longest caption."""
    said, pipe = [], request.getfixturevalue(name).pipe()
    monkeypatch.setattr(sys.modules[type(pipe).__module__].logger, "warning", said.append)
    short, long = pipe.encode_prompts(["a dog", "so " * 600 + "long"])
    assert len(said) == 1 and f"{len(long)} are kept" in said[0] and "so so" in said[0]
    count = int(re.search(r"has (\d+) tokens", said[0])[1])
    assert count >= 601 and len(short) < len(long) < count


def test_the_card_has_the_licence_and_the_use(scene):
    card = (scene.root / "exported" / "README.md").read_text()
    assert "license: cc0-1.0" in card and "library_name: diffusers" in card and "DiffusionPipeline" in card
    assert "not validated" in card


def test_the_card_shows_samples_with_their_captions(scene, tmp_path):
    export(scene.root / "run", tmp_path / "out", form="diffusers", license="other", samples=2)
    card = (tmp_path / "out" / "README.md").read_text()
    for number in range(2):
        assert f"](samples/00{number}.png) | photo number" in card
        with Image.open(tmp_path / "out" / "samples" / f"00{number}.png") as picture:
            assert np.std(np.asarray(picture)) > 5
    assert not (tmp_path / "out" / "samples" / "002.png").exists()


def test_samples_are_of_the_dataset_wherever_it_is(scene, tmp_path):
    (scene.root / "ds").rename(tmp_path / "moved")
    try:
        with pytest.raises(DatasetError, match=naming(scene.root / "ds", "--data")):
            export(scene.root / "run", tmp_path / "out", samples=1)
        assert not (tmp_path / "out").exists()
        export(scene.root / "run", tmp_path / "out", samples=1, data=tmp_path / "moved")
    finally:
        (tmp_path / "moved").rename(scene.root / "ds")
    assert (tmp_path / "out" / "samples" / "000.png").exists()


@pytest.mark.parametrize(("license", "words"), [(None, ("--license", "missing")), ("My Licence", ("My Licence",))])
def test_a_licence_is_not_guessed(scene, tmp_path, license, words):
    with pytest.raises(ExportError, match=naming(*words)):
        export(scene.root / "run", tmp_path / "out", form="diffusers", license=license)
    assert not (tmp_path / "out").exists()


def test_bundled_encoders_are_those_of_the_dataset(real, tmp_path):
    folder = real.root / "exported"
    for name in ("vae", "text_encoder", "vision_encoder"):
        assert list((folder / name).glob("*.safetensors"))
    index = json.loads((folder / diffusers_folder.INDEX).read_text())
    moved = dataclasses.replace(real.manifest.text, sha256="0" * 64)
    assert index["facts"]["encoders"]["text"]["sha256"] == real.manifest.text.sha256
    with pytest.raises(ExportError, match=naming("--bundle all", "text", "000000000000")):
        diffusers_folder._encoder(tmp_path, "text", moved, "all")


def test_without_bundling_they_are_found_under_their_names_and_compared(real, tmp_path, tiny_vae_dir, capsys):
    """A folder of this machine is no name for others: the export has its last part only."""
    export(real.root / "run", tmp_path / "named", form="diffusers", license="other")
    assert "note: the vae encoder" in capsys.readouterr().out and not (tmp_path / "named" / "vae").exists()
    for file in ("model_index.json", "README.md"):
        assert str(tiny_vae_dir.parent) not in (tmp_path / "named" / file).read_text()
    given = {"num_inference_steps": 1, "seed": 2}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "named", **TRUSTED)
    with pytest.raises(ValueError, match=naming("text", "register_modules", "--bundle all")):
        pipe("a dog", **given)
    for name, about in pipe.config.facts["encoders"].items():  # as an id of the Hub that is in the cache
        about["id"] = real.manifest.encoders[name].id
    photo = Image.open(real.root / "photos" / "p1.png")
    a, b = pipe("a dog", reference=photo, **given).images[0], real.pipe()("a dog", reference=photo, **given).images[0]
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    pipe.vae, pipe.config.facts["encoders"]["vae"]["sha256"] = None, "0" * 64
    with pytest.raises(ValueError, match=naming("other weights", "vae", "000000000000")):
        pipe("a dog", **given)


def test_digests_are_those_of_preprocess(real):
    for name in ("vae", "text", "vision"):
        identity = real.manifest.encoders[name]
        assert encoders.digest(Path(identity.id), name) == identity.sha256


def test_bundled_encoders_run_in_the_dtype_of_the_dataset(real):
    pipe = real.pipe()
    pipe.config.facts["encoders"]["text"]["dtype"] = "bfloat16"
    pipe.text_encoder.to(torch.float32)
    pipe.vae.to(torch.bfloat16)
    pipe("a dog", num_inference_steps=1)
    assert pipe.text_encoder.dtype is torch.bfloat16 and pipe.vae.dtype is torch.float32


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "I;16", "P", "CMYK", "turned", "sRGB"])
def test_a_reference_is_read_as_sample_reads_it(scene, tmp_path, kind):
    pixels = np.asarray(Image.open(scene.root / "photos" / "p1.png").convert("RGB"))
    path, picture, more = tmp_path / "r.png", Image.fromarray(pixels), {}
    if kind == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif kind == "RGBA":
        picture.putalpha(Image.fromarray(pixels[..., 1]))
    elif kind == "turned":
        path, exif = tmp_path / "r.jpg", Image.Exif()
        exif[0x0112] = 6
        more = {"exif": exif}
    elif kind == "CMYK":
        path, picture = tmp_path / "r.jpg", picture.convert("CMYK")
    elif kind == "sRGB":
        more = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    elif kind != "RGB":
        picture = picture.convert(kind)
    picture.save(path, **more)
    ours, _ = read_reference(path, scene.manifest)
    facts = scene.pipe().config.facts
    theirs = encoders.fitted(Image.open(path), [(w, h) for w, h, _ in facts["sizes"]], facts["fit"])
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_pipeline_saves_its_own_code(scene, tmp_path):
    """diffusers keeps the code of all local pipelines in one file."""
    mine = scene.pipe()
    other = shutil.copytree(scene.root / "exported", tmp_path / "other")
    with (other / "pipeline.py").open("a") as file:
        file.write("# of another version\n")
    DiffusionPipeline.from_pretrained(other, **TRUSTED)
    mine.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "pipeline.py").read_text() == (scene.root / "exported" / "pipeline.py").read_text()
    with pytest.raises(ValueError, match="push_to_hub"):
        mine.save_pretrained(tmp_path / "hub", push_to_hub=True)


@pytest.mark.parametrize("first", ["fluxdit_jax", "diffusers"])
def test_an_export_of_one_format_leaves_nothing_of_the_other(real, tmp_path, first):
    forms = {"fluxdit_jax": {}, "diffusers": {"form": "diffusers", "license": "other", "bundle": "all"}}
    (second,) = forms.keys() - {first}
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("a note")
    export(real.root / "run", out, **forms[first])
    export(real.root / "run", out, **forms[second] | ({"bundle": "none"} if second == "diffusers" else {}))
    alone = tmp_path / "alone"
    export(real.root / "run", alone, **forms[second] | ({"bundle": "none"} if second == "diffusers" else {}))
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()} | {"mine.txt"}


def test_an_export_over_another_leaves_no_half(scene, tmp_path, monkeypatch):
    """While files are replaced the index is missing; the new one comes last."""
    out = tmp_path / "out"
    export(scene.root / "run", out, form="diffusers", license="other")
    moved = []
    replace = Path.replace

    def watched(self, target):
        if command.WORK in self.parts and command.WORK not in Path(target).parts:
            moved.append((Path(target).name, (out / diffusers_folder.INDEX).exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    export(scene.root / "run", out, form="diffusers", license="other")
    assert moved[-1] == (diffusers_folder.INDEX, False) and len(moved) > 6
    assert not any(there for _, there in moved)
    assert not (out / command.WORK).exists()
