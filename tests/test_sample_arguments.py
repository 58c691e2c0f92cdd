"""What `python -m fluxdit_jax.sample` refuses before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxdit_jax.prompts import SampleError, read_prompts
from fluxdit_jax.sample_arguments import parse_arguments

GIVEN = ["--workdir", "run", "--out", "x.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--prompt or --prompts"),
        (["--prompt", "a \udcff dog"], "not UTF-8"),
        (["--prompt", "x", "--seed", "-1"], "--seed at least 0"),
        (["--prompt", "x", "--seed", str(2**31 - 1)], "below 2**31"),
        (["--prompt", "x", "--seed", str(10**30)], "below 2**31"),
        (["--prompt", "x", "--count", "0"], "at least 1"),
        (["--prompt", "x", "--guidance-text", "nan"], "finite"),
        (["--prompt", "x", "--sweep-vision", "1,inf"], "finite"),
        (["--prompt", "x", "--sweep-text", "1,,2"], "is not numbers"),
        (["--prompt", "x", "--rescale", "nan"], "between 0 and 1"),
        (["--prompt", "x", "--out", "x.jpg"], "end in .png"),
    ],
)
def test_refused_with_the_option(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments([*GIVEN, *arguments])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_prompts_come_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa dog\r\n\n  Hündchen \u2028 und Katze \nlast".encode())
    assert read_prompts(path) == ["a dog", "Hündchen \u2028 und Katze", "last"]
    assert parse_arguments([*GIVEN, "--prompt", "first", "--prompts", str(path)]).prompt[0] == "first"


@pytest.mark.parametrize(
    ("content", "words"), [(b"a\xff", "byte 1 is not UTF-8"), (b"x" * 10_000_001, "10,000,000 bytes")]
)
def test_files_of_prompts_that_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(SampleError, match=words):
        read_prompts(tmp_path / "prompts.txt")
