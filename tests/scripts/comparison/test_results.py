"""The result of a run: read from its folder, written, read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comparison.results import make_result, read_results, write_result
from comparison.runs import ROOT, make_run
from tests.scripted_run import write_run
from tests.scripts.comparison.made_up import TUNED, make_plan
from verl.errors import DataError


def test_a_result_has_curves_outcomes_per_question_and_manifest_of_its_run(tmp_path: Path) -> None:
    run = make_run(make_plan(), method_name="inforeasoner", world_name="easy", tuned=TUNED, steps=12, seed=3)
    run_dir = write_run(tmp_path / "run")
    result = make_result(run, run_dir, wall_s=61.04, processor_s=20.0, pace_s=0.31236)
    assert result.pace_s == 0.3124
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert result.steps == 12
    assert result.em == [round(line["reward/em_mean"], 5) for line in train]
    assert result.searches == [round(line["rollout/searches_mean"], 5) for line in train]
    assert result.tokens == [None] * 12  # the script does not write all lengths: not measured, not 0
    assert [evaluation.step for evaluation in result.evaluations] == [0, 12]
    for evaluation, line in zip(result.evaluations, [e for e in lines if e["kind"] == "val"], strict=True):
        assert len(evaluation.outcomes) == line["val/questions"] == 30
        assert evaluation.outcomes.count(".") == line["val/failed"]
        assert evaluation.em == pytest.approx(line["val/em"])
    assert 'data.train_files="{world}/train.parquet"' in result.manifest["overrides"]
    assert not any(str(folder) in json.dumps(result.manifest) for folder in (tmp_path, ROOT))

    path = write_result(tmp_path, result)
    assert path.name == f"{run.key}.json"
    assert read_results(tmp_path) == {run.key: result}


def test_a_damaged_result_is_refused_with_the_file_and_the_fix(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "abc.json").write_text('{"key": "abc"}')
    with pytest.raises(
        DataError, match=r"runs/abc\.json: settings: Field required; restore the file, or remove"
    ):
        read_results(tmp_path)
