from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import report
import view_rollouts
from rich.console import Console

from tests.scripted_run import decode, make_question, search_turn, write_run
from verl.run.recorder import Recorder
from verl.types import Score, Stop, Trajectory


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("view") / "run", steps=3)


def _show(*arguments: str) -> str:
    screen = StringIO()
    view_rollouts.main(list(arguments), console=Console(file=screen, width=150))
    return screen.getvalue()


def test_shows_turns_gain_and_advantage_of_runs_and_of_single_files(run_dir: Path) -> None:
    shown = _show(str(run_dir), "--only", "right", "--limit", "2")
    for part in ("search: ", "answer: ", "gain +", "advantage ", "accepted: ", "step 3", "2 trajectories of"):
        assert part in shown, part
    assert re.search(r"credit   think [+-]\d\.\d+   answer .*   other .*   whole turn [+-]\d\.\d+", shown)
    shown = _show(str(run_dir), "--evaluation", "--step", "0", "--limit", "1")
    assert "test/0" in shown
    assert "advantage -" in shown
    assert "1 trajectories" in _show(str(run_dir / "evaluation" / "step_000000.jsonl"), "--limit", "1")
    with pytest.raises(SystemExit, match="no step 7; recorded are 1, 2, 3"):
        _show(str(run_dir), "--step", "7")


def test_results_that_the_context_had_no_room_for_are_named(tmp_path: Path) -> None:
    turn = search_turn("where", [])
    turn = replace(turn, observation_ids=turn.observation_ids[:0], num_dropped=3)
    trajectory = Trajectory(
        question=make_question(1), sample=0, prompt_ids=turn.output_ids, turns=(turn,), stop=Stop.LENGTH
    )
    for step in (0, 5):
        Recorder(tmp_path, decode=decode).write_evaluation(step, [trajectory], [Score(outcome=0.0)])
    report.main([str(tmp_path)])
    for shown in (_show(str(tmp_path), "--evaluation"), (tmp_path / "report.html").read_text()):
        assert "no room for the result" in shown
        assert "without the results of turns 1 to 3" in shown


def test_report_script(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(run_dir)])
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    with pytest.raises(SystemExit, match="is not a run folder"):
        report.main([str(run_dir / "absent")])
