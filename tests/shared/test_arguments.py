"""Errors of the command line: one line, with the option that was meant."""

from __future__ import annotations

import pytest

from fluxdit_jax.sampling.arguments import parse_arguments
from preprocess.__main__ import main

DRAWING = ["--workdir=x", "--prompt=x", "--out=x.png"]


@pytest.mark.parametrize(
    ("program", "given", "words"),
    [
        (parse_arguments, [*DRAWING, "--guidance-txt=3"], "did you mean --guidance-text?"),
        (parse_arguments, [*DRAWING, "--nothing-like-it"], "unrecognized arguments: --nothing-like-it"),
        (parse_arguments, [*DRAWING, "--steps=many"], "--steps"),
        (main, ["build", "--inptu", "x", "--output", "y"], "did you mean --input?"),
        (main, ["buidl"], "'build'"),
    ],
)
def test_an_error_is_one_line_and_says_what_was_meant(program, given, words, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        program(given)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "error: " in error and words in error
