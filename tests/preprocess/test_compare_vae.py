"""`compare-vae`: its measures against closed forms, and the command on real autoencoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wording import naming

from preprocess import PreprocessError
from preprocess.__main__ import main
from preprocess.build.lock import locked
from preprocess.encoders import load_vae
from preprocess.input.scan import scan
from preprocess.inspect.reconstruction import LatentStatistics, reconstruct
from preprocess.inspect.vae_comparison import WORK, CompareOptions, _where_they_differ, compare


def test_statistics_of_independent_and_of_equal_channels() -> None:
    noise = np.random.default_rng(0).standard_normal((4, 200, 200))
    independent = LatentStatistics.of([5 + 2 * noise, 5 + 2 * noise[:, ::-1]])
    assert independent.std == pytest.approx((2, 2), rel=0.02)
    assert independent.directions == pytest.approx(4, rel=0.01)
    assert abs(independent.neighbours) < 0.01 and independent.largest == pytest.approx(np.abs(noise).max(), rel=0.03)
    equal = LatentStatistics.of([np.repeat(noise[:1], 4, axis=0)])
    assert equal.directions == pytest.approx(1, abs=1e-9)
    one_strong = LatentStatistics.of([noise * np.array([10, 1, 1, 1])[:, None, None]])
    assert one_strong.std == pytest.approx((1, 10), rel=0.02)
    assert one_strong.directions == pytest.approx(103**2 / (100**2 + 3), rel=0.01)


def test_neighbours_of_an_averaged_latent() -> None:
    """A mean over 2 x 1 positions shares half its noise with its neighbour below, none with the one beside it."""
    noise = np.random.default_rng(1).standard_normal((2, 401, 400))
    assert LatentStatistics.of([noise[:, 1:] + noise[:, :-1]]).neighbours == pytest.approx(0.25, abs=0.01)


def test_a_reconstruction_by_hand(draw_photo) -> None:
    """Pictures of two sizes in batches; PSNR from its definition; a picture's row does not depend on its batch."""
    pictures = [draw_photo(*size, seed) for seed, size in enumerate([(64, 96), (96, 64), (64, 96), (64, 96)])]
    vae, done = load_vae("builtin:dct"), []
    found = reconstruct(vae, pictures, 2, done.append)
    assert done == [2, 1, 1] and found.latent_bytes == 2 * 16 * 8 * 12
    for k, picture in enumerate(pictures):
        image = vae.decode(vae.encode(picture[None]))[0]
        np.testing.assert_array_equal(found.images[k], image)
        error = np.square(image.astype(float) - picture).mean()
        assert found.psnr[k] == pytest.approx(10 * np.log10(255**2 / error))
        assert 0.2 < found.ssim[k] < 1
    assert found.encode_rate > 0 and found.decode_rate > 0


def test_an_exact_vae_has_99_db_and_an_ssim_of_1(draw_photo) -> None:
    class Exact:
        """Pixels as latents."""

        def encode(self, images: np.ndarray) -> np.ndarray:
            return images.transpose(0, 3, 1, 2).astype(np.float32)

        def decode(self, latents: np.ndarray) -> np.ndarray:
            return latents.transpose(0, 2, 3, 1).astype(np.uint8)

    found = reconstruct(Exact(), [draw_photo(64, 64, 0)], 4, lambda n: None)  # type: ignore[arg-type]
    assert found.psnr.tolist() == [99.0] and found.ssim.tolist() == [pytest.approx(1)]


def test_the_place_where_two_differ_most() -> None:
    picture = np.full((256, 320, 3), 100, np.uint8)
    both, one = picture.copy(), picture.copy()
    both[:96, :96] += 50  # wrong alike in both
    one[:96, :96] += 50
    one[120:216, 192:288] += 20
    spread, place = _where_they_differ(picture, [both, one])
    assert place == (120, 192) and spread == pytest.approx(400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, draw_photo) -> Path:
    """Five pictures without captions, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(5):
        Image.fromarray(draw_photo(128, 96, seed)).save(folder / f"{seed}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    return folder


def test_the_command(folder: Path, tiny_vae_dir: Path, tmp_path: Path, capsys) -> None:
    output = folder / "vaes"  # in the input: its sheets are no pictures of the user's
    command = ["compare-vae", "--vae", "builtin:dct", "--vae", str(tiny_vae_dir), "--input", str(folder)]
    command += ["--output", str(output), "--resolution", "128", "--device", "cpu"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "5 of 6 pictures" in told and "1 not an image passed over" in told
    assert "A  builtin:dct: built-in, 16 channels at 1/8" in told and "AutoencoderKL, 16 channels" in told
    numbers = json.loads((output / "comparison.json").read_text())
    assert numbers["pictures"] == [f"{seed}.png" for seed in range(5)]
    psnr = np.array([each["psnr_db"] for each in numbers["vaes"]])
    gain = psnr[1] - psnr[0]
    assert f"B less A: {gain.mean():+.2f} ± {gain.std(ddof=1) / 5**0.5:.2f} dB" in told
    assert f"B is nearer in {(gain > 0).sum()} of 5" in told
    for name in ("pictures.png", "details.png"):
        with Image.open(output / name) as sheet:
            assert sheet.width > 3 * 256 and sheet.height > 5 * 256
    assert [found.key for found in scan(folder).found] == ["0.png", "1.png", "2.png", "3.png", "4.png", "broken.jpg"]
    before = (output / "comparison.json").read_text()
    assert main([*command, "--count", "2"]) == 0  # a sample: the same two every time
    chosen = json.loads((output / "comparison.json").read_text())["pictures"]
    assert main([*command, "--count", "2"]) == 0 and len(chosen) == 2
    assert json.loads((output / "comparison.json").read_text())["pictures"] == chosen != json.loads(before)["pictures"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"vaes": ("builtin:dct",)}, ["two", "builtin:dct"]),
        ({"vaes": ("builtin:dct", "builtin:dct")}, ["different", "builtin:dct, builtin:dct"]),
        ({"count": 0}, ["--count", 1000, 0]),
        ({"resolution": 0}, ["--resolution", 0]),
        ({"resolution": 4096, "count": 200}, ["--count 200", "smaller --count"]),
        ({"vaes": ("builtin:dct", "./nowhere")}, ["--vae ./nowhere", "no such directory"]),
    ],
)
def test_impossible_options_are_named(folder: Path, tmp_path: Path, changes: dict, named: list) -> None:
    usual = {"vaes": ("builtin:dct", "builtin:other"), "input": str(folder), "output": str(tmp_path / "out")}
    with pytest.raises(PreprocessError, match=naming(*named)):
        compare(CompareOptions(**(usual | changes)))


def test_a_picture_of_the_users_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "details.png")
    with pytest.raises(PreprocessError, match=naming("--output", "details.png")):
        compare(CompareOptions(("builtin:dct", "builtin:other"), str(folder), str(tmp_path)))


def test_two_at_once_are_told_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / WORK).mkdir(parents=True)
    options = CompareOptions(("builtin:dct", "builtin:tone"), str(folder), str(tmp_path / "out"))
    with locked(tmp_path / "out" / WORK / "lock"), pytest.raises(PreprocessError, match="is being written by pid"):
        compare(options)


def test_a_folder_without_pictures_is_named(tmp_path: Path, tiny_vae_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    options = CompareOptions(
        ("builtin:dct", str(tiny_vae_dir)), str(tmp_path / "in"), str(tmp_path / "out"), device="cpu"
    )
    with pytest.raises(PreprocessError, match=naming("--input", tmp_path / "in", "1 zero bytes")):
        compare(options)
    assert not (tmp_path / "out").exists()
