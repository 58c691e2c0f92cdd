"""What `python -m fluxdit_jax.sample` checks, tells and writes, on a run that was made without training."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import options
from drawing_helpers import config, pixels
from PIL import Image, PngImagePlugin
from training_helpers import dropping, lively, tiny_flow
from wording import lines_naming, naming

from fluxdit_jax import sample as command
from fluxdit_jax.dataset.manifest import EncoderIdentity, Manifest, load_manifest
from fluxdit_jax.export import export
from fluxdit_jax.model import dit
from fluxdit_jax.run.checkpoint import CheckpointError, Checkpoints
from fluxdit_jax.run.run_directory import RunError, record_start
from fluxdit_jax.sample import sample
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.sampling.kept import Kept
from fluxdit_jax.sampling.prompts import SampleError, encode_reference, read_reference
from fluxdit_jax.sampling.recipe import Recipe, read
from fluxdit_jax.settings import Settings, resolve
from preprocess.build.build import build

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

QUICK = ("--steps", "1", "--method", "euler")


@dataclasses.dataclass(frozen=True)
class Scene:
    """A folder with p.png, ds/, run/ of two steps, exported/ of the second, and drawn.png, of the second as well."""

    root: Path
    manifest: Manifest
    settings: Settings
    size: tuple[int, int]  # height and width, not square
    first: np.ndarray  # the picture in drawn.png
    told: str  # what was printed when it was drawn

    def arguments(self, *given: str, of: tuple[str, ...] = ("--workdir", "run"), out: str = "x.png"):
        source = (of[0], str(self.root / of[1])) if of else ()
        return parse_arguments([*source, "--out", str(self.root / out), *given])

    def draw(self, *given: str, **more) -> list[np.ndarray]:
        return sample(self.arguments(*given, **more))

    def edited(self, name: str, digest: str | None = None, **arguments: object) -> str:
        """The path of drawn.png with another recipe."""
        with Image.open(self.root / "drawn.png") as picture:
            raw = json.loads(picture.text["recipe"])
            raw["arguments"] |= arguments
            info = PngImagePlugin.PngInfo()
            info.add_itxt("recipe", json.dumps(raw | ({"digest": digest} if digest else {})))
            picture.save(self.root / name, pnginfo=info)
        return str(self.root / name)


def recipe_of(path: Path) -> dict:
    with Image.open(path) as picture:
        return json.loads(picture.text["recipe"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory, draw_photo, quick_compile) -> Scene:
    root = tmp_path_factory.mktemp("command")
    (root / "photos").mkdir()
    for number in range(2):
        Image.fromarray(draw_photo(64, 160, number)).save(root / "photos" / f"p{number}.png")
        (root / "photos" / f"p{number}.txt").write_text(f"photo number {number} of a dog")
    build(options(root / "photos", root / "ds", resolution=64, holdout=0.0))
    manifest = load_manifest(root / "ds")
    c = config(root / "ds", root / "run")
    c.model.width, c.model.depth = 16, 1
    settings = resolve(c, manifest)
    shapes = dit.build(settings.model)[1]
    with Checkpoints(root / "run", keep=2) as checkpoints:
        for step in (4, 8):
            checkpoints.save_ema(step, lively(shapes, seed=step, scale=0.1))
    record_start(root / "run", c, manifest)
    export(root / "run", root / "exported")
    (record,) = {size for shard in manifest.shards["train"] for size in shard.buckets}
    height, width = map(int, record.split("x"))
    unfinished = Scene(root, manifest, settings, (height, width), np.zeros(0), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        (first,) = unfinished.draw(
            "--prompt", "a dog", "--seed", "7", "--reference", str(root / "photos" / "p0.png"), *QUICK, out="drawn.png"
        )  # fmt: skip
        told = sys.stdout.getvalue()
    return dataclasses.replace(unfinished, first=first, told=told)


# --------------------------------------------------------------------------------------------- what is written


def test_one_picture_is_the_file_that_is_asked_for(scene: Scene) -> None:
    (height, width), path = scene.size, scene.root / "drawn.png"
    assert height != width and scene.first.shape == (height, width, 3)
    np.testing.assert_array_equal(pixels(path), scene.first)
    told = recipe_of(path)
    assert told["arguments"]["seed"] == 7 and told["arguments"]["step"] == 8 and told["batch_size"] == 1
    assert told["arguments"]["size"] == f"{width}x{height}"
    assert told["arguments"]["workdir"] == str(scene.root / "run") and told["arguments"]["model"] is None
    assert lines_naming(scene.told, "size", f"{width}x{height}")
    assert f"{path}  {width}x{height}  seed 7  'a dog'\n" in scene.told and "sheet" not in scene.told
    assert not list(scene.root.glob(".*lock"))


def test_a_recipe_is_read_however_large_its_picture(scene: Scene, monkeypatch) -> None:
    """A sheet may have more pixels than Pillow opens."""
    before = read(scene.root / "drawn.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    assert read(scene.root / "drawn.png").notes().chunks == before.notes().chunks


def test_a_recipe_alone_draws_it_again(scene: Scene, capsys) -> None:
    (again,) = scene.draw("--recipe", str(scene.root / "drawn.png"), of=())
    np.testing.assert_array_equal(again, scene.first)
    assert recipe_of(scene.root / "x.png") == recipe_of(scene.root / "drawn.png")
    assert "note" not in capsys.readouterr().out


def test_several_pictures_have_a_file_each_and_a_sheet(scene: Scene, capsys) -> None:
    """Seeds count up over prompts; at most 16 pictures are computed at once."""
    (height, width), several = scene.size, ("--prompt", "a dog", "--prompt", "a cat", "--count", "9", "--seed", "3")
    drawn = scene.draw(*several, "--size", f"{width}x{height}", *QUICK, out="several.png")
    files = [scene.root / f"several-{number:03}.png" for number in range(18)]
    assert sorted(scene.root.glob("several*")) == sorted([scene.root / "several.png", *files])
    for number, (file, picture) in enumerate(zip(files, drawn, strict=True)):
        np.testing.assert_array_equal(pixels(file), picture)
        told = recipe_of(file)
        assert told["arguments"]["seed"] == 3 + number and told["batch_size"] == 16
        assert told["arguments"]["prompt"] == ["a dog" if number < 9 else "a cat"]
    assert len({picture.tobytes() for picture in drawn}) == 18
    sheet = Image.open(scene.root / "several.png")
    assert sheet.size == (170 + 9 * 262 + 6, 2 * 262 + 6)
    told = capsys.readouterr().out
    assert lines_naming(told, "size", f"{width}x{height}") and lines_naming(told, "sheet", 18)


def test_pictures_are_written_as_they_are_drawn(scene: Scene) -> None:
    """What ends it after the first batch of 16 leaves that one's files."""

    def stop(done: int) -> None:
        raise InterruptedError(done)

    out = scene.root / "stopped.png"
    given = scene.arguments("--prompt", "a dog", "--count", "17", *QUICK, out=str(out))
    with pytest.raises(InterruptedError, match="16"):
        command.sample(given, progress=stop)
    files = sorted(scene.root.glob("stopped*.png"))
    assert files == [scene.root / f"stopped-{number:03}.png" for number in range(16)]
    assert recipe_of(files[3])["arguments"]["seed"] == 3


def test_a_place_that_cannot_be_written_is_named_by_the_first_picture(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    paths = [tmp_path / "file" / f"{name}.png" for name in ("first", "second")]
    with pytest.raises(command.SampleError, match=naming("--out", paths[0])):
        command.check_out(paths)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_sweep_is_one_sheet_and_tells_how_far_it_is(scene: Scene, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    swept = ("--sweep-text", "1,4", "--sweep-vision", "0,1,2", "--reference", str(scene.root / "photos" / "p0.png"))
    drawn = scene.draw("--prompt", "a dog", "--seed", "5", *swept, *QUICK, out="swept.png")
    assert len(drawn) == 6 and list(scene.root.glob("swept*")) == [scene.root / "swept.png"]
    assert Image.open(scene.root / "swept.png").size == (170 + 2 * 262 + 6, 22 + 3 * 262 + 6)
    assert "6/6" in sys.stderr.getvalue()
    told = capsys.readouterr().out
    assert [f"row {row}  vision {row - 1}  seed 5  'a dog'\n" in told for row in (1, 2, 3)] == [True] * 3
    assert "1 picture at 2 x 3 guidance scales" in told


def test_the_program_draws_and_ends_with_success(scene: Scene, monkeypatch) -> None:
    """Of an export; the picture is that of its run, also where nobody watches."""
    photo = str(scene.root / "photos" / "p0.png")
    given = ["--model", str(scene.root / "exported"), "--prompt", "a dog", "--seed", "7", "--reference", photo, *QUICK]
    monkeypatch.setattr(sys, "argv", ["sample", *given, "--step", "8", "--out", str(scene.root / "y.png")])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0 and "image" not in sys.stderr.getvalue()
    np.testing.assert_array_equal(pixels(scene.root / "y.png"), scene.first)


# --------------------------------------------------------------------------------------- refused before drawing


def test_where_the_pictures_go_is_checked_first(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "s-001.png").mkdir()
    (tmp_path / "file").write_text("")
    for out, more in (("s-001.png", ()), ("file/x.png", ()), ("s.png", ("--count", "2"))):
        # the weights that are asked for do not exist: they are not looked at before
        with pytest.raises(SampleError, match="--out .*(s-001.png|file)"):
            scene.draw("--prompt", "x", "--step", "999", *more, out=str(tmp_path / out))
    # a sweep writes its sheet alone
    with pytest.raises(CheckpointError, match="999"):
        scene.draw("--prompt", "x", "--step", "999", "--count", "2", "--sweep-text", "1,2", out=str(tmp_path / "s.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "s-001.png"]


@pytest.mark.parametrize(
    ("source", "error", "named"),
    [
        (("--workdir", "exported"), SampleError, "exported is an export.*--model"),
        (("--workdir", "photos"), RunError, "photos"),
        (("--workdir", "none"), RunError, "none"),
    ],
)
def test_what_is_no_run(scene: Scene, source: tuple[str, str], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        scene.draw("--prompt", "x", of=source)


def test_a_run_with_an_export_in_its_folder_is_a_run(scene: Scene) -> None:
    (scene.root / "run" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="no step 3"):
        scene.draw("--prompt", "x", "--step", "3")
    (scene.root / "run" / "model.safetensors").unlink()


def test_an_export_has_the_weights_of_one_step(scene: Scene) -> None:
    for name, value, held in (("step", "4", "8"), ("weights", "short_ema", "ema")):
        with pytest.raises(SampleError, match=rf"--{name} {value}: .*exported has {held}"):
            scene.draw("--prompt", "x", f"--{name}", value, of=("--model", "exported"))


# ------------------------------------------------------------------------------------------------- recipes


def test_a_recipe_whose_source_is_gone(scene: Scene) -> None:
    gone = str(scene.root / "gone")
    for option, given in (("--workdir", {"workdir": gone}), ("--model", {"workdir": None, "model": gone})):
        path = scene.edited("gone.png", **given)
        with pytest.raises(SampleError, match=rf"gone.png.*{gone}.*{option}"):
            scene.draw("--recipe", path, of=())


def test_a_recipe_whose_weights_are_gone_or_others(scene: Scene, capsys) -> None:
    path = scene.edited("lost.png", step=3)
    with pytest.raises(SampleError, match=r"lost.png.*step 3, digest"):
        scene.draw("--recipe", path, of=())
    with pytest.raises(CheckpointError, match="no step 3"):
        scene.draw("--recipe", path, "--step", "3", of=())
    path = scene.edited("others.png", digest="0" * 64)
    with pytest.raises(SampleError, match=r"others.png.*digest"):
        scene.draw("--recipe", path, of=())
    with pytest.raises(SampleError, match="--reference"):  # the digest is passed, and then this recipe has no vector
        scene.draw("--recipe", without_vector(scene), "--step", "8", of=())
    assert "another picture" in capsys.readouterr().out


def without_vector(scene: Scene) -> str:
    path = Path(scene.edited("older.png", digest="0" * 64))
    with Image.open(path) as picture:
        raw = json.loads(picture.text["recipe"]) | {"vector": None}
        info = PngImagePlugin.PngInfo()
        info.add_itxt("recipe", json.dumps(raw))
        picture.save(path, pnginfo=info)
    return str(path)


def test_the_vector_is_the_references_or_the_recipes(scene: Scene) -> None:
    photo = scene.root / "photos" / "p1.png"
    given = scene.arguments("--prompt", "x", "--reference", str(photo))
    seen = read_reference(photo, scene.manifest)
    found, told = command._given(given, seen, scene.manifest, None, Kept())
    assert found.keys() == {"vision"}
    vector = found["vision"]
    np.testing.assert_array_equal(vector, encode_reference(seen[0], scene.manifest, None))
    assert told == {"path": str(photo), "sha256": seen[1]}
    assert command._given(given, None, scene.manifest, None, Kept()) == ({}, None)
    own = {"path": "/photos/a.jpg", "sha256": "ab"}
    again = Recipe({}, given={"vision": vector}, reference=own)
    found, told = command._given(given, None, scene.manifest, again, Kept())
    assert found.keys() == {"vision"} and found["vision"] is vector and told == own
    other, told = command._given(
        given, seen, scene.manifest, Recipe({}, given={"vision": -vector}, reference=own), Kept()
    )
    np.testing.assert_array_equal(other["vision"], vector)
    assert told["sha256"] == seen[1]
    assert command._given(given, None, scene.manifest, Recipe({}), Kept()) == ({}, None)
    for recipe, named in (
        (Recipe({}, reference=own), "/photos/a.jpg"),
        (Recipe({}, given={"vision": vector[:3]}, reference=own), "3 numbers.*1024"),
        (Recipe({}, given={"pose": vector[:3]}), "pose"),
    ):
        with pytest.raises(SampleError, match=named):
            command._given(given, None, scene.manifest, recipe, Kept())


def test_a_further_condition_is_read_for_the_dataset_that_has_it(scene: Scene, tmp_path: Path) -> None:
    pose = np.float32([0.6, 0.0, 0.8])
    np.save(tmp_path / "pose.npy", pose)
    identity = EncoderIdentity("given", "", "", "float32", 3)
    manifest = dataclasses.replace(scene.manifest, encoders=scene.manifest.encoders | {"pose": identity})
    named = ("--condition", f"pose={tmp_path / 'pose.npy'}")
    given = scene.arguments("--prompt", "x", *named, "--guidance", "pose=2")
    found, _ = command._given(given, None, manifest, Recipe({}, given={"pose": -pose}), Kept())
    np.testing.assert_array_equal(found["pose"], pose)
    # this run's dataset has none
    for option, known in ((named, "besides the caption are: vision"), (("--guidance", "pose=2"), "are: none")):
        with pytest.raises(SampleError, match=f"{option[0]} pose=.*{known}"):
            command._given(scene.arguments("--prompt", "x", *option), None, scene.manifest, None, Kept())
    np.save(tmp_path / "pose.npy", pose[:2])
    with pytest.raises(SampleError, match="--condition pose=.*pose.npy"):
        command._given(given, None, manifest, None, Kept())
    twice = ("--prompt", "x", "--condition", f"vision={tmp_path / 'pose.npy'}")
    with pytest.raises(SampleError, match="--reference and --condition vision"):
        command._given(scene.arguments(*twice), (np.zeros((8, 8, 3), np.uint8), ""), scene.manifest, None, Kept())
    with pytest.raises(SampleError, match="--condition pose=.*none.npy"):
        command._given(scene.arguments("--prompt", "x", "--condition", "pose=none.npy"), None, manifest, None, Kept())


def test_only_an_encoder_that_is_asked_for_is_fetched(scene: Scene) -> None:
    text = dataclasses.replace(scene.manifest.text, id="org/model")
    manifest = dataclasses.replace(scene.manifest, encoders=scene.manifest.encoders | {"text": text})
    plain = scene.arguments("--prompt", "x")
    for spec in (None, "org/model", "builtin:hash", str(scene.root)):
        plain.text_encoder = spec
        assert command._text_encoder(plain, manifest) == spec
    plain.text_encoder = "somebody/model"
    with pytest.raises(SampleError, match="somebody/model.*--text-encoder"):
        command._text_encoder(plain, manifest)
    asked = scene.arguments("--prompt", "x", "--text-encoder", "somebody/model")
    assert command._text_encoder(asked, manifest) == "somebody/model"


@pytest.mark.parametrize(
    ("trained", "vector", "given", "notes"),
    [
        ({}, False, (), ["without vision"]),
        ({}, True, (), []),
        ({"vision": 0.2}, False, (), []),
        ({"all": 0.2, "vision": 0.2}, False, ("--sweep-vision", "1,3"), ["no effect"]),
        ({"all": 0.2, "vision": 0.2}, False, ("--guidance-vision", "3"), ["no effect"]),
        ({"all": 0.2}, False, (), []),
        ({"vision": 0.2, "all": 0.2}, False, (), []),
        ({"vision": 0.2}, True, ("--guidance-text", "3", "--guidance-vision", "3"), ["without conditions"]),
        ({"vision": 0.2}, True, ("--guidance-vision", "3"), ["without conditions"]),
        ({"vision": 0.2}, True, ("--sweep-text", "1,3"), ["without conditions"]),
        ({"vision": 0.2}, True, ("--sweep-vision", "1,3"), ["without conditions"]),
        ({"all": 0.2}, True, ("--guidance-text", "3"), []),
    ],
)
def test_what_the_model_never_trained_is_told(scene: Scene, trained, vector, given, notes, capsys) -> None:
    arguments = scene.arguments("--prompt", "x", *given)
    settings = dataclasses.replace(scene.settings, flow=tiny_flow(drop=dropping(**trained)))
    command._note_untrained(settings, arguments, {"vision": np.ones(3)} if vector else {})
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(notes) and all(note in line for note, line in zip(notes, told))
