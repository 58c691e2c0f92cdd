"""A further condition, from images to pictures: a vector with no change of code, a sequence by its declaration."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]
DECLARED = "DECLARED = {field.name: field for field in (LATENT, TEXT, VISION, PATCHES)}"
FIELDS = (
    'Field("twin", SEQUENCE, CAPTION, "second text encoder")',
    'Field("depth", SEQUENCE, FILE, "depth files")',
)
WITH_FURTHER = DECLARED.replace("PATCHES)", f"PATCHES, {', '.join(FIELDS)})")
# The option that names the second encoder of captions.
OPTION = ('"vision": "vision_encoder"}', '"vision": "vision_encoder", "twin": "second_text_encoder"}')
DEFAULT = ("    vision_embeddings: str", '    second_text_encoder: str = "builtin:hash"\n    vision_embeddings: str')
COUNT = 12

# Every command of the road, in one process. Prints what each returned.
ROAD = """
import json, sys
from pathlib import Path
from fluxdit_jax import export, sample, train, validate
from fluxdit_jax.dataset.grid import Place, write_grid
from fluxdit_jax.sampling.arguments import parse_arguments
from preprocess.__main__ import main as preprocess
from configs import demo

root = Path(sys.argv[1])
built = [
    "--output", f"{root}/data", "--input", f"{root}/photos", "--resolution", "64", "--modulus", "16",
    "--holdout", "0.2", "--max-rejects", "0.5",
    "--vae", "builtin:dct", "--text-encoder", "builtin:hash", "--vision-encoder", "builtin:tone",
]
conditions = ["--condition", f"depth={root}/depth", "--condition", f"pose={root}/pose"]
status = {"refused": preprocess(["build", *built, *conditions[2:]])}
status["build"] = preprocess(["build", *built, *conditions])
status["again"] = preprocess(["build", "--output", f"{root}/data"])
status["verify"] = preprocess(["verify", f"{root}/data"])
config = demo.get_config()
config.workdir, config.data.path = f"{root}/run", f"{root}/data"
config.model.width, config.model.depth, config.model.heads = 32, 1, 2
config.data.micro_batch_size = config.optim.global_batch_size = 4
config.train.steps, config.optim.warmup_steps, config.log.every = 3, 1, 1
config.log.preview_steps, config.log.preview_count, config.log.preview_guidance = 1, 2, 2.0
status["train"] = train.train(config)

def draw(name, *options):
    from_run = [] if {"--model", "--recipe"} & set(options) else ["--workdir", f"{root}/run"]
    prompt = [] if {"--recipe", "--prompt"} & set(options) else ["--prompt", "waves"]
    prompt += [] if "--recipe" in options else ["--steps", "2", "--method", "euler"]
    sample.sample(parse_arguments([*from_run, *prompt, *options, "--out", f"{root}/{name}.png"]))

pose, depth = ["--condition", f"pose={root}/pose/00.npy"], ["--condition", f"depth={root}/depth/00.npy"]
draw("plain")
draw("other_words", "--prompt", "hills")
draw("pose", *pose)
draw("other_pose", "--condition", f"pose={root}/pose/01.npy")
draw("depth", *depth)
draw("both", *pose, *depth)
draw("guided", *pose, *depth, "--guidance", "pose=3", "--guidance", "depth=2", "--guidance-text", "2")
draw("again", "--recipe", f"{root}/guided.png")
export.export(root / "run", root / "export")
draw("exported", "--model", f"{root}/export", *pose, *depth)
views = {f"{n:02}.png": Place(str(n // 6), str(n % 6), "day") for n in range(12)}  # so that edits are asked for
write_grid(root / "data" / "grid.json", views)
few = ["--limit", "6", "--steps", "1", "--method", "euler", "--unrelated", "waves=>hills"]
status["validate"] = validate.command(["--workdir", f"{root}/run", *few])
print("STATUS " + json.dumps(status))
"""


@pytest.fixture(scope="module")
def road(tmp_path_factory, draw_photo: Callable, xla_cache: Path) -> tuple[Path, dict[str, int], str]:
    """(folder, what the commands returned, what they printed) of a copy of the program with three lines changed.

    Two declared fields, one of files and one that a second encoder makes of captions, which also has an option.
    """
    root = tmp_path_factory.mktemp("conditions")
    copy = root / "program"
    for name in ("fluxdit_jax", "preprocess", "configs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = copy / "preprocess" / "build" / "options.py"
    edits = [(copy / "fluxdit_jax" / "dataset" / "fields.py", DECLARED, WITH_FURTHER), (options, *OPTION)]
    for path, old, new in [*edits, (options, *DEFAULT)]:
        text = path.read_text()
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new))
    for name in ("photos", "pose", "depth"):
        (root / name).mkdir()
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(draw_photo(64, (64, 96)[number % 2], number)).save(root / "photos" / f"{number:02}.png")
        side = ("left", "right")[number % 2]
        caption = {"caption": f"waves number {number} looking {side}"}
        (root / "photos" / f"{number:02}.json").write_text(json.dumps(caption))
        np.save(root / "pose" / f"{number:02}.npy", (5 * rng.normal(size=7)).astype(np.float32))
        np.save(root / "depth" / f"{number:02}.npy", rng.normal(size=(1 + number % 5, 3)).astype(np.float16))
    (root / "pose" / "11.npy").unlink()
    environment = os.environ | {"PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(xla_cache)}
    done = subprocess.run(
        [sys.executable, "-c", ROAD, str(root)],
        capture_output=True, text=True, timeout=600, check=False, cwd=copy, env=environment,
    )  # fmt: skip
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert last.startswith("STATUS "), done.stdout[-3000:] + done.stderr[-3000:]
    return root, json.loads(last.removeprefix("STATUS ")), done.stdout + done.stderr


def picture(root: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(root / f"{name}.png")).astype(int)


def test_every_command_takes_the_conditions(road) -> None:
    root, status, printed = road
    assert status["refused"] == 1 and "--condition depth=DIR" in printed  # declared, and not given
    assert (status["build"], status["again"], status["verify"], status["train"]) == (0, 0, 0, 0)
    report = json.loads((root / "run" / "validation" / "report.json").read_text())
    assert status["validate"] == 1 and report["metrics"]["text_edit"]["judged"]  # with both encoders of captions
    assert "'waves' becomes 'hills'" in printed


def test_the_dataset_stores_them_as_they_were_given(road) -> None:
    root, _, _ = road
    from array_record.python.array_record_module import ArrayRecordReader

    manifest = json.loads((root / "data" / "manifest.json").read_text())
    assert manifest["conditions"]["pose"]["encoder"]["width"] == 7 and "length" not in manifest["conditions"]["pose"]
    assert manifest["conditions"]["depth"]["encoder"]["width"] == 3 and manifest["conditions"]["depth"]["length"] == 5
    (reject,) = map(json.loads, (root / "data" / "rejects.jsonl").read_text().splitlines())
    assert reject["key"] == "11.png" and "pose" in reject["reason"]
    assert manifest["rejects"] == 1
    assert manifest["conditions"]["twin"]["encoder"]["id"] == "builtin:hash"
    import tensorflow_datasets as tfds

    found = {}
    builder = tfds.builder_from_directory(root / "data")
    for split in ("train", "holdout"):
        for path in builder.info.splits[split].filepaths:
            reader = ArrayRecordReader(str(path))
            for data in reader.read_all():
                example = builder.info.features.deserialize_example_np(data)
                found[example["key"].decode()] = example
    assert len(found) == COUNT - 1
    for key, example in found.items():
        np.testing.assert_array_equal(example["twin"], example["text"])  # by the same encoder
        pose, depth = (np.load(root / name / key.replace(".png", ".npy")) for name in ("pose", "depth"))
        np.testing.assert_allclose(example["pose"], pose / np.linalg.norm(pose), rtol=1e-5)
        np.testing.assert_allclose(example["depth"].astype(np.float32), depth, rtol=1e-2)


def test_a_build_given_again_changes_nothing(road) -> None:
    _, _, printed = road
    assert f"{COUNT - 1} kept, 0 new, 0 changed, 0 dropped" in printed


def test_each_of_them_changes_the_picture(road) -> None:
    root, _, _ = road
    names = ("plain", "pose", "other_pose", "depth", "both", "guided")
    pictures = {name: picture(root, name) for name in names}
    for number, one in enumerate(names):
        for other in names[:number]:
            assert np.abs(pictures[one] - pictures[other]).max() > 0, (one, other)


def test_a_recipe_and_an_export_draw_the_same_picture(road) -> None:
    root, _, _ = road
    np.testing.assert_array_equal(picture(root, "again"), picture(root, "guided"))
    np.testing.assert_array_equal(picture(root, "exported"), picture(root, "both"))
    described = json.loads((root / "export" / "config.json").read_text())
    assert described["encoders"].keys() == {"vae", "text", "vision", "twin", "depth", "pose"}
    card = (root / "export" / "README.md").read_text()
    assert "| condition pose |" in card and "| condition depth |" in card


def test_the_nulls_of_all_conditions_are_trained(road) -> None:
    root, _, _ = road
    from safetensors.numpy import load_file

    tensors = load_file(root / "export" / "model.safetensors")
    assert {
        "twin_embed.kernel",
        "pose_embed.kernel",
        "null_pose",
        "depth_embed.kernel",
        "depth_scale",
        "null_depth",
    } <= tensors.keys()
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").open()]
    gradients = {name for line in lines for name in line if name.startswith("gradient_norm_by_group/")}
    assert {"gradient_norm_by_group/null_pose", "gradient_norm_by_group/pose_embed"} <= gradients
