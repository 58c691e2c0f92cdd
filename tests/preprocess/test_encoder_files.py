"""The files that the torch encoders are read from: missing ones, wrong ones, and those of the Hub's cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_fixtures import write_image
from wording import naming

from preprocess import PreprocessError
from preprocess.encoders import load_text_encoder, load_vae, load_vision_encoder


@pytest.mark.parametrize("load", [load_vae, load_text_encoder, load_vision_encoder])
@pytest.mark.parametrize(
    ("spec", "told"),
    [("./nowhere", "config.json"), ("builtin:nonsense", r"\bbuiltin:(dct|hash|tone)\b")],
)
def test_what_is_not_there_is_named(load, spec: str, told: str) -> None:
    with pytest.raises(PreprocessError, match=f"{spec}.*{told}"):
        load(spec)


def test_wrong_kind_of_model_is_named(tiny_vae_dir: Path, tiny_t5_dir: Path) -> None:
    with pytest.raises(PreprocessError, match=naming(str(tiny_t5_dir), "diffusion_pytorch_model.safetensors")):
        load_vae(str(tiny_t5_dir))
    with pytest.raises(PreprocessError, match=rf"{tiny_vae_dir}.*\bmodel\.safetensors"):
        load_text_encoder(str(tiny_vae_dir))
    with pytest.raises(PreprocessError, match=naming("--vision-encoder", str(tiny_t5_dir), "'t5'", "dinov3_vit")):
        load_vision_encoder(str(tiny_t5_dir))


def test_pickled_weights_are_not_read(tiny_t5_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_t5_dir, tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").rename(tmp_path / "t5" / "pytorch_model.bin")
    with pytest.raises(PreprocessError, match=naming(str(tmp_path / "t5"), ".bin", "safetensors")):
        load_text_encoder(str(tmp_path / "t5"))


def test_missing_weights_are_not_invented(tiny_dino_dir: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_dino_dir, tmp_path / "dino")
    tensors = load_file(tmp_path / "dino" / "model.safetensors")
    tensors.pop(next(name for name in tensors if "norm" in name))
    save_file(tensors, tmp_path / "dino" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PreprocessError, match=naming("--vision-encoder", str(tmp_path / "dino"), 1, "norm")):
        load_vision_encoder(str(tmp_path / "dino"))


def offline(cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A program of Python that has the Hub's files in `cache` and cannot reach the Hub."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_a_hub_that_cannot_be_reached_says_what_to_fetch(tmp_path: Path) -> None:
    code = (
        "from preprocess.encoders import *; from preprocess import PreprocessError\n"
        "for load in (load_vae, load_text_encoder, load_vision_encoder):\n"
        "    try: load()\n"
        "    except PreprocessError as error: print(error)\n"
    )
    result = offline(tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    vae, text, vision = result.stdout.strip().splitlines()
    assert "hf download black-forest-labs/FLUX.1-schnell --include 'vae/config.json' --include 'vae/" in vae
    assert "--vae DIRECTORY" in vae and str(tmp_path) in vae
    assert "hf download google/t5-v1_1-large" in text and "'spiece.model'" in text
    assert "hf download facebook/dinov3-vitl16-pretrain-lvd1689m" in vision
    assert all("builtin:dct" in line for line in (vae, text, vision))


def test_offline_all_three_are_told_at_once(tmp_path: Path, draw_photo) -> None:
    image = tmp_path / "photos" / "a.png"
    write_image(image, 0, "a", draw_photo)
    for more, count in (([], 3), (["--vae", "builtin:dct"], 2)):
        command = ["-m", "preprocess", "build", "--input", str(image.parent), "--output", str(tmp_path / "x")]
        result = offline(tmp_path, *command, *more)
        assert result.returncode == 1 and len(result.stderr.splitlines()) < 24
        for option, spec, size, licence in (
            ("--vae", "black-forest-labs/FLUX.1-schnell", "170 MB", "Apache-2.0"),
            ("--text-encoder", "google/t5-v1_1-large", "3,130 MB", "Apache-2.0"),
            ("--vision-encoder", "facebook/dinov3-vitl16-pretrain-lvd1689m", "1,210 MB", "DINOv3 License"),
        )[3 - count :]:
            (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"  {option} {spec}")]
            assert size in line and licence in line
            assert f"hf download {spec} --include" in result.stderr
            assert f"{option} encoders/{spec.partition('/')[2]}" in result.stderr
        assert "hf auth login" in result.stderr and "https://huggingface.co/facebook/dinov3" in result.stderr
        assert str(tmp_path / "hub") in result.stderr


def test_a_cached_repository_is_used_offline_with_its_commit(tiny_vae_dir: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--someone--flux"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_vae_dir, cache / "snapshots" / commit / "vae")
    code = "from preprocess.encoders import load_vae; i = load_vae('someone/flux').identity; print(i.id, i.revision)"
    result = offline(tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["someone/flux", commit]


def test_a_cached_conversion_is_used_offline_by_name_and_by_what_a_manifest_says(
    tiny_t5_dir: Path, tmp_path: Path
) -> None:
    """google/t5-v1_1-large has safetensors in a pull request alone, which nobody can be asked for without a network."""
    cache, main, conversion = tmp_path / "hub" / "models--google--t5-v1_1-large", "a" * 40, "b" * 40
    (cache / "refs" / "refs" / "pr").mkdir(parents=True)
    (cache / "refs" / "main").write_text(main)
    for number, commit in (("1", main), ("2", conversion)):
        shutil.copytree(tiny_t5_dir, cache / "snapshots" / commit)
        (cache / "refs" / "refs" / "pr" / number).write_text(commit)
    (cache / "snapshots" / main / "model.safetensors").unlink()
    code = (
        "from preprocess.encoders import load_text_encoder; i = load_text_encoder('google/t5-v1_1-large').identity; "
        "print(i.id, i.revision, i.spec, load_text_encoder(i.spec).identity.revision)"
    )
    result = offline(tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    name = "google/t5-v1_1-large"
    assert result.stdout.split() == [name, conversion, f"{name}@{conversion}", conversion]


def test_safetensors_are_taken_from_the_hubs_conversion_where_main_has_none(
    tiny_t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As google/t5-v1_1-large has it. The Hub is played by two folders, one for each revision."""
    import fnmatch
    import types

    import huggingface_hub

    main, conversion = tmp_path / ("a" * 40), tmp_path / ("b" * 40)
    shutil.copytree(tiny_t5_dir, main)
    (main / "model.safetensors").rename(main / "pytorch_model.bin")
    shutil.copytree(tiny_t5_dir, conversion)
    asked = []

    def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert not any(fnmatch.fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns)
        return str({None: main, "refs/pr/2": conversion}[revision])

    def get_repo_discussions(self: object, repository: str, **more: str) -> list:
        assert more == {
            "author": "SFconvertbot",
            "discussion_type": "pull_request",
            "discussion_status": "open",
        }
        return [types.SimpleNamespace(num=2, title="Adding `safetensors` variant of this model")]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_repo_discussions", get_repo_discussions)
    encoder = load_text_encoder("google/t5-v1_1-large", device="cpu")
    assert asked == [("google/t5-v1_1-large", None), ("google/t5-v1_1-large", "refs/pr/2")]
    assert (encoder.identity.id, encoder.identity.revision) == ("google/t5-v1_1-large", "b" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_repo_discussions", lambda *a, **k: [])
    with pytest.raises(PreprocessError, match=naming("google/t5-v1_1-large", ".bin", "safetensors")):
        load_text_encoder("google/t5-v1_1-large", device="cpu")
    assert load_text_encoder("google/t5-v1_1-large@refs/pr/2", device="cpu").identity.revision == "b" * 40
