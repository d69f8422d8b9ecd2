"""The command line of `python -m verl.ask`."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from verl.ask.__main__ import parse, read_questions


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_temperature_is_a_finite_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--temperature", value, "q"])
    message = f"--temperature must be a finite number of at least 0, got {float(value)}"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["Who is a\udcff?"], ["--gold", "a\udcff", "q"]])
def test_arguments_that_are_not_utf_8_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "the question and --gold must be UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # depends on the locale
def test_a_typed_line_that_is_not_utf_8_is_asked_with_replacements(
    errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"a\xffb\n\nc\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    assert list(read_questions(parse([]), Console())) == ["a\N{REPLACEMENT CHARACTER}b", "c"]
