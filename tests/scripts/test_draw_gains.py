"""The figure of gains: drawn again from the numbers that are kept beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from draw_gains import main, read_report

from verl.errors import ConfigError

KEPT = Path(__file__).parents[2] / "docs" / "worlds" / "gains.json"


def test_the_figure_is_drawn_from_the_numbers_that_are_kept(tmp_path: Path) -> None:
    main([str(KEPT), "--out", str(tmp_path)])
    assert (tmp_path / "gains.json").read_text() == KEPT.read_text()
    for ending in ("pdf", "png"):
        assert (tmp_path / f"gains.{ending}").stat().st_size > 1000


def test_another_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ConfigError, match=r"other.json: expected report.json of `python -m IG doctor`"):
        read_report(other)
