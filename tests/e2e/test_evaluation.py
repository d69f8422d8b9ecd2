"""An evaluation alone, killed and continued with two engines, equals the one of a training."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from rich.console import Console
from view_rollouts import main as view_rollouts

from tests.e2e.conftest import Quickstart
from tests.e2e.running import ROOT, end_training, launched, wait_for
from verl.evaluation.records import METRICS_FILE, RESULTS_FILE, TRAJECTORIES_FILE, read_results
from verl.run.records import TrajectoryRecord, read_records
from verl.run.tracking import read_metrics
from verl.trainer.ppo.evaluation import evaluation_metrics

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


def test_the_readmes_command_killed_and_continued_gives_what_it_shows_and_what_a_training_measures(
    tmp_path: Path, retriever: str, quickstart: Quickstart
) -> None:
    """Compared with the evaluation before the first step of the quickstart, of the same model."""
    section = (ROOT / "README.md").read_text().partition("\n## Evaluate\n")[2]
    assert re.search(r"^bash evaluate\.sh ", section, re.MULTILINE)
    shown = re.search(r"^{.*}$", section, re.MULTILINE)
    assert shown is not None
    promised = json.loads(shown[0])
    folder = tmp_path / "evaluation"
    variables = {"RETRIEVER_URL": retriever, "OUTPUT_DIR": "evaluation"}

    slowly = "trainer.max_concurrent_episodes=1"
    with launched("evaluate.sh", slowly, cwd=tmp_path, variables=variables) as process:
        wait_for(lambda: count_lines(folder / RESULTS_FILE) >= 3, what="3 answers", process=process)
        end_training(process, lambda: os.killpg(process.pid, signal.SIGKILL))
    num_kept = count_lines(folder / RESULTS_FILE)
    assert num_kept < promised["questions"]
    with (folder / RESULTS_FILE).open("a") as results:
        results.write('{"format": 1, "uid": "world_one')  # a line that was cut

    with_two = "trainer.num_cpu_engines=2"
    with launched("evaluate.sh", with_two, cwd=tmp_path, variables=variables) as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    summary = json.loads(output.splitlines()[-1])
    assert list(summary) == list(promised)
    measured = ("em", "sub_em", "f1", "questions", "failed", "searches_mean", "output_tokens_mean")
    assert [summary[name] for name in measured] == [
        pytest.approx(promised[name], abs=5e-5) for name in measured
    ]
    assert summary["asked"] == promised["asked"] - num_kept
    assert len(list(folder.glob("previous-*"))) == 1
    assert (folder / "report.html").is_file()
    console = Console(record=True, width=100)
    view_rollouts([str(folder / TRAJECTORIES_FILE), "--limit", "1"], console=console)
    assert "What is the residence of Pauline Fisher?" in console.export_text()

    in_training = read_records(quickstart.run_dir / "evaluation" / "step_000000.jsonl")
    uids = [record["uid"] for record in in_training]
    alone = {record["uid"]: record for record in read_records(folder / TRAJECTORIES_FILE)}
    assert [facts(alone[uid]) for uid in uids] == list(map(facts, in_training))
    results = read_results(folder)
    metrics = json.loads((folder / METRICS_FILE).read_text())
    assert measured_by(metrics) == evaluation_metrics(results)
    result_of = {result["uid"]: result for result in results}
    logged = next(row for row in read_metrics(quickstart.run_dir) if "val/em" in row)
    assert measured_by(logged) == evaluation_metrics([result_of[uid] for uid in uids])
    assert 0 < logged["val/em"] < 1, "the comparison of means needs questions that differ"


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def facts(record: TrajectoryRecord) -> list[object]:
    """Return all that the policy read and wrote, and how it was scored."""
    tokens = [(turn["output_ids"], turn["observation_ids"], turn["passages"]) for turn in record["turns"]]
    return [record["uid"], record["prompt_ids"], tokens, record["stop"], record["outcome"], record["metrics"]]


def measured_by(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("val/")}
