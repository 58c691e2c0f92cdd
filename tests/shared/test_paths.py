"""`~` at every edge: expanded once, also after `=`, where no shell does it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from build_fixtures import FLAGS, write_photos
from fork_server import Commands
from training_helpers import REPOSITORY

from fluxdit_jax.config import PATHS, ConfigError, check, default_config
from fluxdit_jax.shared.paths import HomeError, expanded, given_path
from preprocess.__main__ import main

pytest_plugins = ("training_fixtures",)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory and, beside it, the empty current directory."""
    for name in ("home", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "home"


def preprocess(*arguments: str) -> int:
    return main(list(arguments))


Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run(commands: Commands, xla_cache: Path) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        done = commands.run(*arguments, env={"XDG_CACHE_HOME": str(xla_cache)})
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_only_a_leading_tilde_is_a_home(home: Path) -> None:
    assert expanded("~/a b") == f"{home}/a b" and expanded("~") == str(home)
    assert given_path("~/x") == home / "x"
    for text in ("", "owner/name", "a/~/b", "x~", "/~/x", "builtin:dct"):
        assert expanded(text) == text
    named_so = given_path("./~/x")
    assert named_so == Path.cwd() / "~" / "x" and expanded(str(named_so)) == str(named_so)
    with pytest.raises(HomeError, match=r"'~nobody-of-that-name/x'.*\./~nobody"):
        expanded("~nobody-of-that-name/x")


def test_every_key_that_is_a_path(home: Path) -> None:
    c = default_config()
    for key in PATHS:
        c.update_from_flattened_dict({key: f"~/{key}"})
    check(c)
    given = [c.workdir, c.data.path, c.log.vae, c.score.vision_encoder, c.gate.report, c.resume.from_run]
    assert given == [f"{home}/{key}" for key in PATHS]
    c.log.vae = "~nobody-of-that-name/vae"
    with pytest.raises(ConfigError, match=r"config\.log\.vae"):
        check(c)


@pytest.mark.slow
def test_the_commands_from_pictures_to_export(home: Path, draw_photo, run: Run) -> None:
    write_photos(home / "photos", 6, draw_photo)
    size = ["--resolution=128", "--modulus=16", "--holdout=0"]
    assert preprocess("build", "--input=~/photos", "--output=~/ds", *size, *FLAGS) == 0
    assert preprocess("verify", "~/ds") == 0
    assert preprocess("inspect", "~/ds", "--output=~/seen") == 0
    assert preprocess("export", "~/ds", "--output=~/tars") == 0
    few = ["--count=2", "--resolution=64", "--lights=2", "--allow-fewer"]
    assert preprocess("subset", "--input=~/ds", "--images=~/photos", "--output=~/few", *few) == 0
    (home / "experiment.py").write_text((REPOSITORY / "configs" / "demo.py").read_text())
    run(
        "fluxdit_jax.train", "--config=~/experiment.py", "--config.workdir=~/run", "--config.data.path=~/ds",
        "--config.model.width=32", "--config.model.depth=1", "--config.model.heads=1", "--config.train.steps=1",
        "--config.data.micro_batch_size=2", "--config.optim.global_batch_size=2", "--config.log.preview_every=0",
        "--config.optim.schedule=constant",
    )  # fmt: skip
    run("fluxdit_jax.sample", "--workdir=~/run", "--out=~/pictures/p.png", "--prompt=x", "--steps=1",
        "--reference=~/photos/set0/p00.png")  # fmt: skip
    run("fluxdit_jax.export", "--workdir=~/run", "--out=~/exported")
    for made in (
        "ds/manifest.json",
        "seen",
        "tars",
        "few",
        "run/ema/1",
        "pictures/p.png",
        "exported/config.json",
    ):
        assert (home / made).exists(), made
    assert json.loads((home / "run" / "config.json").read_text())["data"]["path"] == str(home / "ds")
    assert list(Path.cwd().iterdir()) == []


def test_a_folder_that_is_named_so(home: Path, draw_photo) -> None:
    write_photos(Path("~") / "in", 3, draw_photo)
    size = ["--resolution=128", "--modulus=16", "--holdout=0"]
    assert preprocess("build", "--input=./~/in", "--output=./~/ds", *size, *FLAGS) == 0
    assert (Path("~") / "ds" / "manifest.json").exists() and list(home.iterdir()) == []
