"""`python -m fluxdit_jax.sample` on a real run: long prompts, sizes, recipes, and what is refused before drawing."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from drawing_helpers import SHORT, config, draw, pixels
from fork_server import Commands
from PIL import Image, PngImagePlugin
from wording import lines_naming, naming, numbers

from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.run.checkpoint import CheckpointError
from fluxdit_jax.sample import sample
from fluxdit_jax.sampling import recipe
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.sampling.sizes import choose_size, pictures_by_size
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures", "drawing_fixtures")
pytestmark = pytest.mark.usefixtures("quick_compile")
LONG = "photo number 3 of a dog by the red sea in the blue light of an evening with"  # 19


# --------------------------------------------------------------------------------------------- long prompts


def test_words_beyond_the_longest_caption_count(scene: Path, capsys: pytest.CaptureFixture) -> None:
    one = draw(scene, "--prompt", f"{LONG} a castle", "--steps", "2")
    told = capsys.readouterr().out
    assert lines_naming(told, 1, 21, "tokens", 7)
    other = draw(scene, "--prompt", f"{LONG} boats", "--steps", "2")
    assert (one != other).any()
    capsys.readouterr()
    draw(scene, "--prompt", SHORT, "--steps", "2")
    assert "tokens" not in capsys.readouterr().out


def test_a_picture_does_not_depend_on_a_long_prompt_beside_it(scene: Path) -> None:
    def together(*prompts: str) -> list[np.ndarray]:
        given = [text for prompt in prompts for text in ("--prompt", prompt)]
        common = ["--workdir", str(scene / "run"), "--out", str(scene / "x.png"), "--steps", "2"]
        return sample(parse_arguments([*common, *given]))

    short = ["photo number 4 of a dog", SHORT, "photo number 5 of a dog", "a dog"]
    long = [short[0], f"{LONG} a castle", short[2], f"{LONG} boats" * 3]
    for number, (one, other) in enumerate(zip(together(*short), together(*long))):
        assert (one == other).all() == (number in (0, 2))


def test_what_the_encoder_cuts_is_told(scene: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{SHORT}\n{'word ' * 600}\n")
    draw(scene, "--prompts", str(path), "--steps", "1")
    assert re.search(numbers(2, 601, 512), capsys.readouterr().out)


def test_a_run_that_cuts_its_captions_cuts_prompts_and_tells(scene: Path, capsys: pytest.CaptureFixture) -> None:
    c = config(scene / "ds", scene / "cutting")
    c.data.text_tokens, c.train.steps = 4, 2
    assert train(c) == 0
    capsys.readouterr()
    draw(scene, "--prompt", SHORT, "--steps", "1", run="cutting")
    told = capsys.readouterr().out
    assert re.search(numbers(1, 7, 4), told) and "config.data.text_tokens=4" in told


# ---------------------------------------------------------------------------------------------------- sizes


def test_sizes_are_width_x_height_in_and_out(scene: Path, capsys: pytest.CaptureFixture) -> None:
    counts = pictures_by_size(load_manifest(scene / "ds"))
    height, width = next((h, w) for (h, w) in counts if w > h)
    drawn = draw(scene, "--prompt", SHORT, "--size", f"{width}x{height}", "--steps", "1")
    assert drawn.shape == (height, width, 3)
    told = capsys.readouterr().out
    assert f"  {width}x{height}  " in told
    assert lines_naming(told, f"size: {width}x{height} ") and not lines_naming(told, "size: ", "common")
    assert Image.open(scene / "x.png").text["size"] == f"{width}x{height}"
    common = next(iter(counts))
    with pytest.raises(SampleError, match=f"--size 8x16 .*{common[1]}x{common[0]}"):
        draw(scene, "--prompt", SHORT, "--size", "8x16")


def test_the_default_size_is_the_most_common_of_those_with_pictures(scene: Path, capsys: pytest.CaptureFixture) -> None:
    counts = pictures_by_size(load_manifest(scene / "ds"))
    common, (empty, *_) = next(iter(counts)), [size for size, count in counts.items() if not count]
    assert counts[common] == max(counts.values()) and sum(counts.values()) == 8
    assert draw(scene, "--prompt", SHORT, "--steps", "1").shape[:2] == common
    assert lines_naming(capsys.readouterr().out, f"size: {common[1]}x{common[0]} ", "common")
    with pytest.raises(SampleError) as refusal:
        draw(scene, "--prompt", SHORT, "--size", "8x16")
    offered = re.findall(r"(\d+)x(\d+) \(\d+\)", str(refusal.value))
    assert {(int(h), int(w)) for w, h in offered} == {size for size, count in counts.items() if count}
    # one of the table without a picture, as an older version's recipe may ask for, is drawn and told
    assert choose_size(f"{empty[1]}x{empty[0]}", load_manifest(scene / "ds")) == empty
    assert lines_naming(capsys.readouterr().out, f" {empty[1]}x{empty[0]} ")


def test_the_height_first_is_named(tmp_path: Path) -> None:
    import dataclasses

    from training_helpers import write_dataset

    manifest = dataclasses.replace(write_dataset(tmp_path / "d"), buckets=((64, 64), (48, 80)))
    assert choose_size("80x48", manifest) == (48, 80)
    with pytest.raises(SampleError, match="48x80 .*width.*: 80x48 "):
        choose_size("48x80", manifest)


# -------------------------------------------------------------------------------------------------- recipes


def test_a_picture_is_drawn_again_from_its_file_alone(
    scene: Path, commands: Commands, xla_cache: Path, tmp_path: Path
) -> None:
    """One of several, with everything that can be given, by the real command in another folder."""
    photo = tmp_path / "photo.png"
    photo.write_bytes((scene / "photos" / "set0" / "p00.png").read_bytes())
    first = tmp_path / "first.png"
    run = functools.partial(commands.run, "fluxdit_jax.sample", cwd=tmp_path, env={"XDG_CACHE_HOME": str(xla_cache)})
    done = run(
        "--workdir", scene / "run", "--out", first, "--prompt", SHORT, "--prompt", f"{LONG} 山",
        "--reference", "photo.png", "--guidance-text", 3, "--guidance-vision", 1.5, "--rescale", 0.4,
        "--steps", 2, "--seed", 5, "--method", "euler", "--step", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    photo.unlink()  # the recipe has its vector
    for name in ("first-001", "first"):
        done = run("--recipe", f"{name}.png", "--out", "again.png")
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / f"{name}.png"))
        again, before = (Image.open(tmp_path / f"{n}.png").text for n in ("again", name))
        assert again == before
    assert json.loads(before["recipe"])["reference"]["sha256"] and before["rescale"] == "0.4"
    assert before["weights"] == f"{scene / 'run'}/ema/4"


def test_a_sweep_sheet_is_drawn_again(scene: Path) -> None:
    draw(
        scene,
        "--prompt",
        SHORT,
        "--sweep-text",
        "1,3",
        "--sweep-vision",
        "0,2",
        "--rescale",
        "0.5",
        "--steps",
        "1",
    )
    sheet = scene / "sheet.png"
    (scene / "x.png").rename(sheet)
    draw(scene, "--recipe", str(sheet), run="")
    np.testing.assert_array_equal(pixels(scene / "x.png"), pixels(sheet))
    draw(scene, "--recipe", str(sheet), "--sweep-text", "2", "--sweep-vision", "1", run="")
    text = Image.open(scene / "x.png").text
    assert text["guidance_text"] == "2.0" and "sweep_text" not in text


def test_what_is_given_beside_a_recipe_counts(scene: Path) -> None:
    one = draw(scene, "--prompt", SHORT, "--steps", "2", "--seed", "7")
    (scene / "x.png").rename(scene / "seven.png")
    recipe_of = ["--recipe", str(scene / "seven.png")]
    assert (draw(scene, *recipe_of, run="") == one).all()
    for more in (["--seed", "8"], ["--prompt", "a red dog"], ["--steps", "1"]):
        assert (draw(scene, *recipe_of, *more, run="") != one).any()


def test_other_weights_than_the_recipes(scene: Path, capsys: pytest.CaptureFixture) -> None:
    draw(scene, "--prompt", SHORT, "--steps", "1")
    path = scene / "weights.png"
    (scene / "x.png").rename(path)
    assert train(config(scene / "ds", scene / "other")) == 0  # the same run: the same weights, moved
    draw(scene, "--recipe", str(path), run="other")
    c = config(scene / "ds", scene / "third")
    c.seed = 1
    assert train(c) == 0
    with pytest.raises(SampleError, match=naming(f"--recipe {path}", "digest", "--step", "--weights")):
        draw(scene, "--recipe", str(path), run="third")
    capsys.readouterr()
    draw(scene, "--recipe", str(path), "--step", "8", run="third")
    assert lines_naming(capsys.readouterr().out, "recipe", "digest")
    with pytest.raises(CheckpointError, match=naming(scene / "third", 3, 8)):
        draw(scene, "--recipe", str(path), "--step", "3", run="third")
    with pytest.raises(SampleError, match=naming(scene / "gone", "--workdir")):
        draw(scene, "--recipe", str(edited(path, scene / "moved.png", workdir=str(scene / "gone"))), run="")


def edited(source: Path, target: Path, **arguments: object) -> Path:
    """The picture with other arguments in its recipe."""
    with Image.open(source) as picture:
        raw = json.loads(picture.text["recipe"])
        raw["arguments"] |= arguments
        return with_text(picture, target, recipe=json.dumps(raw))


def with_text(picture: Image.Image, target: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    picture.save(target, pnginfo=info)
    return target


def test_a_recipe_of_an_older_version(scene: Path, capsys: pytest.CaptureFixture) -> None:
    one = draw(scene, "--prompt", SHORT, "--steps", "2", "--seed", "3")
    old = {
        "prompt": SHORT, "seed": "3", "steps": "2", "method": "heun", "guidance_text": "1.0", "guidance_vision": "1.0",
        "weights": f"{scene / 'run'}/ema/8", "reference": "",
    }  # fmt: skip
    with Image.open(scene / "x.png") as picture:
        path = with_text(picture, scene / "old.png", **old)
        with_reference = with_text(picture, scene / "old_reference.png", **old | {"reference": "/photos/a.jpg"})
    capsys.readouterr()
    assert (draw(scene, "--recipe", str(path), run="") == one).all()
    assert "older version" in capsys.readouterr().out
    with pytest.raises(SampleError, match="/photos/a.jpg.*--reference"):
        draw(scene, "--recipe", str(with_reference), run="")


GOOD = {
    "prompt": ["x"], "count": 1, "seed": 0, "size": "64x64", "steps": 2, "method": "heun", "guidance_text": 1.0,
    "guidance_vision": 1.0, "rescale": 0.0, "sweep_text": None, "sweep_vision": None, "workdir": "/run",
    "weights": "ema", "step": 8, "vae": None, "text_encoder": None,
}  # fmt: skip
WHOLE = {"format": 1, "arguments": GOOD, "digest": "ab", "batch_size": 1, "vector": None, "reference": None,
         "circumstances": {}}  # fmt: skip


def test_the_hostile_recipes_are_changed_from_one_that_is_read(tmp_path: Path) -> None:
    path = with_text(Image.new("RGB", (8, 8)), tmp_path / "r.png", recipe=json.dumps(WHOLE))
    assert recipe.read(path).arguments == GOOD


def test_a_recipe_keeps_every_condition_and_scale_that_is_given(tmp_path: Path) -> None:
    arguments = GOOD | {"guidance": {"pose": 2.5}, "model": None}
    given = {"vision": np.float32([0.6, 0.8]), "pose": np.float32([0.0, 1.0, 0.0])}
    written = recipe.Recipe(arguments, "ab", batch_size=1, given=given)
    Image.new("RGB", (8, 8)).save(tmp_path / "r.png", pnginfo=written.notes())
    found = recipe.read(tmp_path / "r.png")
    assert found.arguments == arguments and found.given.keys() == given.keys()
    for name, values in given.items():
        assert found.given[name].dtype == np.float32
        np.testing.assert_array_equal(found.given[name], values)
    with Image.open(tmp_path / "r.png") as picture:
        raw = json.loads(picture.text["recipe"])
    assert isinstance(raw["vector"], str) and raw["conditions"].keys() == {"pose"}, "as an earlier version reads it"


def test_a_solver_that_was_renamed_is_known_by_its_old_name(tmp_path: Path) -> None:
    told = json.dumps(WHOLE | {"arguments": GOOD | {"method": "kutta3"}})
    path = with_text(Image.new("RGB", (8, 8)), tmp_path / "r.png", recipe=told)
    assert recipe.read(path).arguments == GOOD | {"method": "rk3"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, ""),
        ("null", "format"),
        (json.dumps(WHOLE | {"format": 2}), "format 2"),
        (json.dumps(WHOLE | {"digest": 7}), "digest"),
        (json.dumps(WHOLE | {"batch_size": 10**9}), "batch_size"),
        (json.dumps(WHOLE | {"vector": "!"}), "vision"),
        (json.dumps(WHOLE | {"vector": "AAAAAA=="}), "vision"),
        (json.dumps(WHOLE | {"vector": 7}), "vision"),
        (json.dumps(WHOLE | {"conditions": [1]}), "conditions"),
        (json.dumps(WHOLE | {"conditions": {"a\x1b": "AACAPw=="}}), "conditions"),
        (json.dumps(WHOLE | {"conditions": {"pose": "AAAAAA=="}}), "pose"),
        (json.dumps(WHOLE | {"conditions": {"pose": None}}), "pose"),
        (json.dumps(WHOLE | {"conditions": {"pose": [[1, 1], "AACAPw=="]}}), "pose"),
        (json.dumps(WHOLE | {"conditions": {"text": [[10**30], "AACAPw=="]}}), "text"),
        (json.dumps(WHOLE | {"conditions": {"text": [["1"], "AACAPw=="]}}), "text"),
        *(
            (json.dumps(WHOLE | {"arguments": GOOD | {name: value}}), name)
            for name, value in {
                "prompt": [], "count": 10**8, "seed": True, "steps": 10**7, "guidance_text": float("nan"),
                "sweep_text": ["1"], "guidance": {"pose": "1"}, "workdir": "/run\x1b[31m",
                "step": -1, "size": 7, "vae": ["/etc"],
            }.items()
        ),
        (json.dumps(WHOLE | {"arguments": GOOD | {"prompt": ["\ud800"]}}), "prompt"),
        (json.dumps(WHOLE | {"arguments": {"prompt": ["x"]}}), "lacks count"),
        ("9" * 5000, ""),
        (" " * (17 << 20), "characters"),
    ],
)  # fmt: skip
def test_hostile_recipes_are_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    path = with_text(Image.new("RGB", (8, 8)), tmp_path / "r.png", recipe=text)
    with pytest.raises(SampleError, match=rf"r\.png.*{named}") as refusal:
        recipe.read(path)
    assert "\x1b" not in str(refusal.value) and len(str(refusal.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"{}"])
def test_files_that_are_no_png(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.png").write_bytes(content)
    with pytest.raises(SampleError, match=r"r\.png.*PNG"):
        recipe.read(tmp_path / "r.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(SampleError, match="no recipe"):
        recipe.read(tmp_path / "plain.png")


def test_a_recipes_encoder_is_not_fetched(scene: Path) -> None:
    draw(scene, "--prompt", SHORT, "--steps", "1")
    path = edited(scene / "x.png", scene / "foreign.png", text_encoder="somebody/model")
    with pytest.raises(SampleError, match=r"somebody/model.*--text-encoder"):
        draw(scene, "--recipe", str(path), run="")


# ---------------------------------------------------------------------------------- refused before drawing


@pytest.mark.parametrize("kind", ["folder", "file above", "one of several", "name too long", "no folder's name"])
def test_an_output_that_cannot_be_is_refused_first(scene: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "d.png").mkdir()
    (tmp_path / "s-001.png").mkdir()
    out = {
        "folder": "d.png", "file above": "file/x.png", "one of several": "s.png", "name too long": "n" * 250 + ".png",
        "no folder's name": "file/a/b/x.png",
    }[kind]  # fmt: skip
    several = ["--count", "2"] if kind == "one of several" else []
    # the weights that are asked for do not exist: they are not looked at before
    with pytest.raises(SampleError, match="--out .*(d.png|file|s-001.png|nnn)"):
        draw(scene, "--prompt", SHORT, "--step", "999", "--out", str(tmp_path / out), *several)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.png", "file", "s-001.png"]


def test_inputs_that_are_not_there_are_refused_first(scene: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="--reference .*none.png"):
        draw(scene, "--prompt", SHORT, "--step", "999", "--reference", str(tmp_path / "none.png"))
    with pytest.raises(OSError, match=r"none\.txt"):
        draw(scene, "--prompts", str(tmp_path / "none.txt"))
    with pytest.raises(SampleError, match=r"none\.png"):
        draw(scene, "--recipe", str(tmp_path / "none.png"))


def test_outputs_of_export_and_validate_are_refused_first(scene: Path, tmp_path: Path) -> None:
    from fluxdit_jax import validate
    from fluxdit_jax.export import export

    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        export(scene / "run", tmp_path / "file" / "out", step=999)
    (scene / "run" / "validation").write_text("")
    try:
        assert validate.command(["--workdir", str(scene / "run"), "--step", "999"]) == 2
        with pytest.raises(NotADirectoryError, match="validation"):
            validate._locked(validate.parse_arguments(["--workdir", str(scene / "run"), "--step", "999"]))
    finally:
        (scene / "run" / "validation").unlink()
