"""Every case of `numbers.yaml` against the rules of this project, or those of `--rules MODULE`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

CASES: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "numbers.yaml").read_text(encoding="utf-8")
)


def flatten(value: Any) -> list[Any]:
    """Return the numbers of nested lists in order, with brackets between them that keep the shape."""
    if isinstance(value, list | tuple):
        return ["[", *(part for each in value for part in flatten(each)), "]"]
    return [value if value is None else float(value)]


def test_every_case_has_its_own_name() -> None:
    names = [case["id"] for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_worked_number(case: dict[str, Any], request: pytest.FixtureRequest) -> None:
    rules = importlib.import_module(request.config.getoption("--rules")).RULES
    if case["rule"] not in rules:
        pytest.skip(f"{request.config.getoption('--rules')} has no rule {case['rule']}")
    got = flatten(rules[case["rule"]](case.get("settings", {}), **case["input"]))
    expected = flatten(case["expected"])
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        if isinstance(other, float) and one is not None:
            assert one == pytest.approx(other, abs=case["tolerance"], rel=0)
        else:
            assert one == other
