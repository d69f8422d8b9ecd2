"""An evaluation alone, killed and continued with two engines, equals the one at the end of a training."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prepare_data import main as prepare_data
from rich.console import Console
from view_rollouts import main as view_rollouts

from tests.e2e.running import ROOT, end_training, launched, training, wait_for
from tests.flashrag_sample import SPLITS, write_sample
from verl.evaluation.records import METRICS_FILE, RESULTS_FILE, TRAJECTORIES_FILE, read_results
from verl.run.records import TrajectoryRecord, read_records

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

NUM_QUESTIONS = 40


def evaluation_arguments(retriever: str) -> tuple[str, ...]:
    return (
        f"retriever.url={retriever}",
        "trainer.device=cpu",
        f"evaluation.max_questions={NUM_QUESTIONS}",
    )


def test_evaluation_alone_equals_that_of_the_training(tmp_path: Path, retriever: str) -> None:
    run_dir, folder = tmp_path / "run", tmp_path / "evaluation"
    overrides = (
        "algorithm=search_r1",
        f"retriever.url={retriever}",
        "trainer.total_training_steps=1",
        "trainer.val_after_train=true",
        "actor_rollout_ref.actor.optim.lr=2e-5",
        f"data.val_max_questions={NUM_QUESTIONS}",
    )
    with training(run_dir, *overrides) as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output

    variables = {"MODEL_PATH": "run", "OUTPUT_DIR": "evaluation"}
    arguments = evaluation_arguments(retriever)
    slowly = (*arguments, "trainer.max_concurrent_episodes=1")
    with launched("evaluate.sh", *slowly, cwd=tmp_path, variables=variables) as process:
        wait_for(lambda: count_lines(folder / RESULTS_FILE) >= 3, what="3 answers", process=process)
        end_training(process, lambda: os.killpg(process.pid, signal.SIGKILL))
    num_kept = count_lines(folder / RESULTS_FILE)
    assert num_kept < NUM_QUESTIONS
    with (folder / RESULTS_FILE).open("a") as results:
        results.write('{"format": 1, "uid": "world_one')  # a line that was cut

    with launched(
        "evaluate.sh", *arguments, "trainer.num_cpu_engines=2", cwd=tmp_path, variables=variables
    ) as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    summary = json.loads(output.splitlines()[-1])
    assert (summary["asked"], summary["questions"]) == (NUM_QUESTIONS - num_kept, NUM_QUESTIONS)
    assert len(list(folder.glob("previous-*"))) == 1

    in_training = read_records(run_dir / "evaluation" / "step_000001.jsonl")
    alone = read_records(folder / TRAJECTORIES_FILE)
    assert list(map(facts, alone)) == list(map(facts, in_training))
    assert [result["uid"] for result in read_results(folder)] == [record["uid"] for record in in_training]
    metrics = json.loads((folder / METRICS_FILE).read_text())
    logged = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name: value for name, value in metrics.items() if name.startswith("val/")} == {
        name: value for name, value in logged.items() if name.startswith("val/")
    }
    assert 0 < metrics["val/em"] < 1, "the comparison of means needs questions that differ"


def test_the_command_of_the_readme_gives_what_it_shows(tmp_path: Path, retriever: str) -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Evaluate\n")[2]
    command = re.search(r"^bash evaluate\.sh", section, re.MULTILINE)
    shown = re.search(r"^{.*}$", section, re.MULTILINE)
    assert command is not None
    assert shown is not None
    done = subprocess.run(
        ["bash", "-c", command[0]],
        cwd=ROOT,
        env={
            **os.environ,
            "RECIPE": "world",
            "RETRIEVER_URL": retriever,
            "OUTPUT_DIR": str(tmp_path / "evaluation"),
            "VIRTUAL_ENV": sys.prefix,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    promised, summary = json.loads(shown[0]), json.loads(done.stdout.splitlines()[-1])
    assert list(summary) == list(promised)
    measured = ("em", "sub_em", "f1", "questions", "failed", "searches_mean", "output_tokens_mean", "asked")
    assert [summary[name] for name in measured] == [
        pytest.approx(promised[name], abs=5e-5) for name in measured
    ]
    assert (tmp_path / "evaluation" / "report.html").is_file()
    console = Console(record=True, width=100)
    view_rollouts([str(tmp_path / "evaluation" / TRAJECTORIES_FILE), "--limit", "1"], console=console)
    assert "What is the residence of Pauline Fisher?" in console.export_text()


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def facts(record: TrajectoryRecord) -> list[object]:
    """Return all that the policy read and wrote, and how it was scored."""
    tokens = [(turn["output_ids"], turn["observation_ids"], turn["passages"]) for turn in record["turns"]]
    return [record["uid"], record["prompt_ids"], tokens, record["stop"], record["outcome"], record["metrics"]]


def test_a_sample_of_the_seven_sets_is_evaluated_under_a_protocol(tmp_path: Path, retriever: str) -> None:
    """Questions of the embedded world in the schemas of the sets, made here, from files to tables."""
    flashrag = write_sample(tmp_path / "flashrag", per_set=2)
    prepare_data(["--flashrag-dir", str(flashrag), "--test", *SPLITS, "--out-dir", str(tmp_path / "data")])
    arguments = (
        *("--protocol", "search_r1", f"retriever.url={retriever}", "trainer.device=cpu"),
        *("data.max_start_length=512", "data.max_prompt_length=1024", "data.max_response_length=96"),
        *("data.max_obs_length=192", "evaluation.protocol_overrides=true"),
    )
    variables = {"TEST_FILES": "data/test.parquet", "OUTPUT_DIR": "evaluation"}
    with launched("evaluate.sh", *arguments, cwd=tmp_path, variables=variables) as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    folder = tmp_path / "evaluation"
    assert [result["data_source"] for result in read_results(folder)] == [
        name for name in SPLITS for _ in range(2)
    ]
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["config"]["max_turns"] == 4
    deviations = settings["protocol"]["deviations"]
    assert "data.val_files has 2 questions of nq, the protocol has 3610" in deviations
    assert any(text.startswith("the retriever has a corpus of 2580 passages") for text in deviations)
    tables = (folder / "table.md").read_text()
    assert "| Search-R1 3B base, PPO | 40.6 |" in tables
    assert tables.count("DEVIATES FROM IT, NOT COMPARABLE") == tables.count("## ")
    losses = json.loads((folder / "summary.json").read_text())["losses"]["groups"]
    assert losses["musique"]["evidence"] == {"supporting_ids": 2}
    assert losses["nq"]["evidence"] == {"gold_strings": 2}
    assert losses["nq"]["evidence_in_depth"]["value"] == 1.0
