"""The figure of a run, from the recorded metrics of the real model and from made-up ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from draw_run import draw, main, read_runs

from verl.errors import ConfigError

RECORDED = Path(__file__).parents[2] / "docs" / "real"


def write_run(folder: Path, *lines: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_recorded_run_is_drawn_again_in_both_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(RECORDED), "--out", str(tmp_path), "--name", "real"])
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["real.pdf", "real.png"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_values_that_were_not_measured_are_left_out_of_a_figure_of_two_runs(tmp_path: Path) -> None:
    first = write_run(
        tmp_path / "first",
        {"step": 0, "kind": "val", "val/em": 0.25},
        {"step": 1, "kind": "train", "reward/em_mean": 0.5, "ig/gain_mean": None},
        {"step": 2, "kind": "train", "reward/em_mean": None},
    )
    second = write_run(tmp_path / "second", {"step": 1, "kind": "train", "reward/em_mean": 0.25})
    picture = draw(read_runs([first, second]), name="two", folder=tmp_path)
    assert picture.svg.count("not measured") == 3  # searches, gain, entropy
    assert (tmp_path / "two.pdf").read_bytes().startswith(b"%PDF")


def test_a_folder_without_metrics_and_a_name_that_is_given_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a run folder with a line in metrics\.jsonl"):
        read_runs([tmp_path])
    line = {"step": 1, "kind": "train"}
    same = [write_run(tmp_path / side / "run", line) for side in ("left", "right")]
    with pytest.raises(ConfigError, match="a run named run is given before"):
        read_runs(same)


def test_more_runs_than_there_are_colors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: 9 runs: expected at most 8 in one figure"):
        main([str(tmp_path / str(k)) for k in range(9)])
