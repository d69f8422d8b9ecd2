"""The command line of `python -m verl.ask`."""

from __future__ import annotations

import pytest

from verl.ask.__main__ import parse


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_temperature_is_a_finite_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--temperature", value, "q"])
    message = f"--temperature must be a finite number of at least 0, got {float(value)}"
    assert message in capsys.readouterr().err
