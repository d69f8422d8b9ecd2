from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from serving.web.settings import (
    Setting,
    SettingError,
    Value,
    add_settings,
    parse_choice,
    parse_integer,
    parse_switch,
    parse_text,
    parse_token,
    read_token_file,
    resolve_settings,
)


def make(name: str, default: str, parse: object, **more: object) -> Setting:
    fields = {"flag": f"--{name}", "env": f"SOME_{name.upper()}", "meaning": "about 50 % of it"} | more
    return Setting(name=name, default=default, parse=parse, **fields)  # type: ignore[arg-type]


SETTINGS = (
    make("color", "red", parse_choice(("red", "blue"))),
    make("number", "3", parse_integer(1, 9)),
    make("quiet", "false", parse_switch),
    make("token", "", parse_token, flag="--token_file", parse_flag=read_token_file),
)


def resolve(*arguments: str, **environ: str) -> dict[str, Value]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_settings(parser, SETTINGS)
    flags = vars(parser.parse_args(arguments))
    return resolve_settings(SETTINGS, flags=flags, environ=environ)


def test_a_switch_needs_no_value_and_its_variable_has_words() -> None:
    assert resolve()["quiet"] is False
    assert resolve("--quiet")["quiet"] is True
    assert resolve("--quiet", SOME_QUIET="no")["quiet"] is True
    assert resolve(SOME_QUIET="Yes")["quiet"] is True
    with pytest.raises(SettingError, match=r"\$SOME_QUIET is 'maybe', expected true or false"):
        resolve(SOME_QUIET="maybe")


def test_every_value_is_checked_wherever_it_comes_from() -> None:
    assert resolve("--number", "007", SOME_COLOR="blue") == {
        "color": "blue",
        "number": 7,
        "quiet": False,
        "token": "",
    }
    with pytest.raises(SettingError, match=r"--color is 'green', expected one of red, blue"):
        resolve("--color", "green")
    with pytest.raises(SettingError, match=r"\$SOME_NUMBER is '10', expected a whole number from 1 to 9"):
        resolve(SOME_NUMBER="10")


def test_a_token_stands_in_a_file_or_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    assert resolve("--token_file", str(file), SOME_TOKEN="other")["token"] == "s3cret"
    assert resolve(SOME_TOKEN="other")["token"] == "other"
    with pytest.raises(SystemExit):
        resolve("--token", "s3cret-in-argv")


def test_a_default_may_follow_from_what_is_known() -> None:
    settings = (make("one", "a", parse_text), make("two", "", parse_text))
    values = resolve_settings(
        settings, flags={}, environ={}, derive_default=lambda s, known: s.default or f"{known['one']}b"
    )
    assert values == {"one": "a", "two": "ab"}


def test_help_names_flag_variable_and_default() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_settings(parser, SETTINGS)
    assert "about 50 % of it ($SOME_NUMBER; default 3)" in " ".join(parser.format_help().split())
