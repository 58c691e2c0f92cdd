"""The command line of training: what it refuses in one line, and what it says of keys and configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_helpers import flat, tiny_config, write_config
from wording import naming

from fluxdit_jax import config as configuration
from fluxdit_jax import train_arguments
from fluxdit_jax.config import default_config
from fluxdit_jax.stages import add_stage

pytest_plugins = ("training_fixtures",)


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "data", tmp_path / "run")


# ------------------------------------------------------------------------------------------------ the real command


def refused(train_command, config_file, *arguments):
    """The one line with which the command refuses."""
    done = train_command.run(*arguments, config=config_file)
    assert done.returncode == 1, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and done.stdout == "", done.stderr + done.stdout
    return lines[0]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.model.widht=64", ["widht", "width"]),
        ("--config.data.micro_batch_size=many", ["batch_size", "many"]),
        ("--config.data.batch_size=4", ["batch_size", "config.data.micro_batch_size"]),
        ("workdir=/tmp/x", ["workdir=/tmp/x", "--config.group.key=value"]),
        ("--config.model.dtype=float16", ["config.model.dtype", "65,504"]),
    ],
    ids=["unknown", "type", "renamed", "extra", "float16"],
)
def test_the_command_refuses_in_one_line(train_command, config, tmp_path, argument, words):
    line = refused(train_command, write_config(tmp_path / "c.py", config), argument)
    for word in words:
        assert word in line
    assert not Path(config.workdir).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--confg.model.width=64", ["confg.model.width"]),
        ("--config.model.width", ["config.model.width"]),
        ("--config.model.width=3.5", ["width", "3.5"]),
        ("--config.model=3", ["model"]),
        (
            "--config.data.path=/nowhere",
            ["/nowhere", "--data", "python -m preprocess build"],
        ),
        ("--config.workdir=/proc/no/such", ["/proc/no/such"]),
        ("--config.workdir=/dev/null", ["/dev/null"]),
        ("--config.mesh.fsdp=3", ["mesh", "3"]),
        ("--config.seed=-1", ["config.seed", "-1"]),
        ("--config.resume.from_run=/nowhere", ["/nowhere"]),
        ("--config.log.vae=/nowhere", ["/nowhere"]),
        ("--config.log.tracker=nowhere:X", ["config.log.tracker", "nowhere"]),
        ("--config.checkpoint.after=nowhere-to {checkpoint}", ["config.checkpoint.after", "nowhere-to"]),
    ],
)
def test_more_refusals_in_one_line(train_command, config, tmp_path, tiny_dataset, argument, words):
    config.data.path = str(tiny_dataset)
    line = refused(train_command, write_config(tmp_path / "c.py", config), argument)
    for word in words:
        assert word in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["broken.py", "no such file"]),
        ("def get_config(:\n", ["broken.py", "invalid syntax"]),
        ("x = 1\n", ["get_config"]),
        ("import nothing_of_that_name\n", ["nothing_of_that_name"]),
    ],
    ids=["missing", "syntax", "empty", "import"],
)
def test_a_configuration_file_that_cannot_be_read_is_told_in_one_line(train_command, tmp_path, text, words):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    line = refused(train_command, path)
    for word in words:
        assert word in line


def test_config_errors_are_what_the_command_catches():
    from fluxdit_jax import train

    assert configuration.ConfigError in train.USER_ERRORS


# ------------------------------------------------------------------------------------------------ the command line


def test_every_key_is_described_on_demand(capsys):
    with pytest.raises(SystemExit) as ended:
        train_arguments.parse(["train", "--keys"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(" = ")[0] for line in lines) == sorted(key for key, _ in flat(default_config().to_dict()))
    for line in lines:
        assert line[42:].strip(), line
    with pytest.raises(SystemExit):
        train_arguments.parse(["train", "--keys=ema"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "ema.decay",
        "ema.short_decay",
    ]


def test_help_names_the_keys_option_and_the_configurations(capsys):
    with pytest.raises(SystemExit) as ended:
        train_arguments.parse(["train", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--keys" in said and "configs/" in said and "--config.optim.lr" in said


@pytest.mark.parametrize(
    ("argument", "keys"),
    [
        ("--config.ema.horizon=3", ["decay", "short_decay"]),
        ("--config.wallet.size=3", ["model", "optim", "workdir"]),
        ("--config.optim.lr.x=3", None),
        ("--config.model.widht=3", None),
        ("--config.optim.lr=3", None),
    ],
)
def test_a_key_far_from_any_gets_the_keys_of_its_group(argument, keys):
    said = train_arguments.near_keys(["--config=configs/demo.py", argument])
    assert all(key in said for key in keys) if keys else said == ""


def test_training_without_a_configuration_asks_for_one(train_command, tmp_path):
    with train_command._commands.start("fluxdit_jax.train", cwd=tmp_path) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "--config=configs/demo.py" in err and err.count("\n") == 1


def test_the_toy_of_stages_is_found_from_any_folder(train_command, tmp_path):
    arguments = ["--config=demo_stages", f"--config.data.path={tmp_path / 'nowhere'}", "--plan"]
    with train_command._commands.start("fluxdit_jax.train", *arguments, cwd=tmp_path) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "config.data.resolution is 64" in err and "ImportError" not in err


@pytest.mark.parametrize("group", ["", "stages.px32."])
def test_steps_beside_images_are_refused(group):
    c = default_config()
    if group:
        add_stage(c, "px32", {"train.images": 80})
    train = c.stages.px32.train if group else c.train
    train.images = 80
    with pytest.raises(SystemExit, match=rf"--config\.{group}train\.steps.*images is 80"):
        train_arguments.require_effect([f"--config.{group}train.steps=5"], c)
    train.images = None
    train_arguments.require_effect([f"--config.{group}train.steps=5"], c)


def test_a_configuration_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(SystemExit, match=naming("configs/dmo.py", "no such file", "demo, demo_stages, nano")):
        train_arguments._found("--config=configs/dmo.py")
    assert train_arguments._found("--config=") == "--config="
