"""What `python -m fluxdit_jax.sample` refuses before it loads anything, and the help of the programs that draw."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from wording import naming

from fluxdit_jax import export, validate
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.sampling.prompts import SampleError, read_prompts
from fluxdit_jax.sampling.recipe import ARGUMENTS

GIVEN = ["--workdir", "run", "--out", "x.png"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["--prompt", "--prompts", "--recipe"]),
        (["--prompt", "a \udcff dog"], ["--prompt", "UTF-8"]),
        (["--prompt", "x", "--seed", "-1"], ["--seed", 0]),
        (["--prompt", "x", "--seed", str(2**31 - 1)], ["--seed", "2**31"]),
        (["--prompt", "x", "--seed", str(10**30)], ["--seed", "2**31"]),
        (["--prompt", "x", "--count", "0"], ["--count", 1]),
        (["--prompt", "x", "--guidance-text", "nan"], ["guidance", "finite"]),
        (["--prompt", "x", "--guidance", "pose=nan"], ["guidance", "finite"]),
        (["--prompt", "x", "--guidance", "pose"], ["--guidance", "'pose'", "NAME=VALUE"]),
        (["--prompt", "x", "--guidance", "pose=much"], ["--guidance", "pose=much"]),
        (["--prompt", "x", "--condition", "=a.npy"], ["--condition", "=a.npy"]),
        (["--prompt", "x", "--condition", "pose="], ["--condition", "pose="]),
        (["--prompt", "x", "--sweep-vision", "1,inf"], ["guidance", "finite"]),
        (["--prompt", "x", "--sweep-text", "1,,2"], ["--sweep-text", "1,,2"]),
        (["--prompt", "x", "--guidance-text", "1e9"], ["guidance", "1e+09"]),
        (["--prompt", "x", "--steps", "10001"], ["--steps", "10,000"]),
        (["--prompt", "x", "--prompt", "y", "--count", "5001"], ["10,002 pictures", "10,000"]),
        (
            ["--prompt", "x", "--count", "101", "--sweep-text", ",".join(map(str, range(100)))],
            ["10,100 pictures", "10,000"],
        ),
        (["--prompt", "x", "--rescale", "nan"], ["--rescale", 0, 1]),
        (["--prompt", "x", "--out", "x.jpg"], ["--out", ".png"]),
    ],
)
def test_refused_with_the_option(arguments: list[str], named: list, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments([*GIVEN, *arguments])
    assert end.value.code == 2 and re.search(naming(*named), capsys.readouterr().err.splitlines()[-1])


def test_further_conditions_have_a_file_and_a_scale_by_name() -> None:
    plain = parse_arguments([*GIVEN, "--prompt", "x"])
    assert plain.condition == plain.guidance == {}
    named = ["--condition", "pose=a=b.npy", "--condition", "hue=c.npy", "--guidance", "pose=2.5"]
    found = parse_arguments([*GIVEN, "--prompt", "x", *named])
    assert found.condition == {"pose": Path("a=b.npy"), "hue": Path("c.npy")} and found.guidance == {"pose": 2.5}


def test_prompts_come_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa dog\r\n\n  Hündchen \u2028 und Katze \nlast".encode())
    assert read_prompts(path) == ["a dog", "Hündchen \u2028 und Katze", "last"]
    assert parse_arguments([*GIVEN, "--prompt", "first", "--prompts", str(path)]).prompt[0] == "first"


@pytest.mark.parametrize(
    ("content", "named"), [(b"a\xff", [1, "UTF-8"]), (b"x" * 10_000_001, [10_000_000]), (b" \n\n", ["no line"])]
)
def test_files_of_prompts_that_are_refused(tmp_path: Path, content: bytes, named: list) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(SampleError, match=naming("--prompts", tmp_path / "prompts.txt", *named)):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (lambda: parse_arguments(["--help"]), 24),
        (lambda: validate.parse_arguments(["--help"]), 13),
        (export.main, 11),
    ],
    ids=["sample", "validate", "export"],
)
def test_the_help_tells_every_default(program, options: int, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "--help"])
    with pytest.raises(SystemExit) as end:
        program()
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=-)", text.partition("options:\n")[2].partition("\n\n")[0])[1:]
    assert end.value.code == 0 and len(entries) == options
    for entry in entries:
        assert "default: " in " ".join(entry.split()) or "(required)" in entry, entry


def test_the_help_tells_what_guidance_is_usual(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option, *usual in (("--guidance-text", 3, 7, 2, 5), ("--guidance-vision", 1, 3)):
        entry = re.search(f"{option} [A-Z_]+ (.*?) --", text)[1]
        assert re.search(naming(*usual, "default: 1.0"), entry), entry
    assert "width x height" in text


@pytest.mark.parametrize("given", [[], ["--workdir", "run", "--model", "out"]])
def test_a_run_or_an_export_is_drawn_from_and_not_both(given: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([*given, "--prompt", "x", "--out", "x.png"])
    assert re.search(naming("--workdir", "--model", "--recipe"), capsys.readouterr().err.splitlines()[-1])


def test_a_recipe_may_name_any_folder_that_a_file_system_has() -> None:
    allowed = ARGUMENTS["workdir"]
    assert allowed("runs/\u5b9f\u9a13\u30001") and allowed("a\u00a0b") and allowed(None)
    assert not any(map(allowed, ("a\nb", "a\x1b[2J", "", "\ud800", 3)))
