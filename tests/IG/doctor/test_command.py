from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from IG.config import IGServiceConfig
from IG.doctor.command import main, parse_arguments
from IG.estimator import GainEstimator
from IG.sampler import SampledAnswer, SamplingError
from serving.web.settings import SettingError
from tests.fakes import FakePairJudge
from tests.IG.service.backends import FakeBackend

Run = Callable[..., tuple[int, dict[str, Any], str]]
"""Arguments to exit status, JSON line, and everything that was printed."""


class ReadingSampler:
    """Right as often as the context holds documents that help; a poisonous one cannot be sampled."""

    def __init__(self, num_answers: int) -> None:
        self._num_answers = num_answers

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        if "poison" in prompt:
            raise SamplingError("the prompt is too long")
        name = prompt.partition("Question: ")[2].partition("?")[0]
        helping = sum(f"{name} document {role}" in prompt for role in ("first", "second"))
        rng = np.random.default_rng(sum(map(ord, prompt)))
        right = rng.random(self._num_answers) < (0.1, 0.5, 0.9)[helping]
        return tuple(
            SampledAnswer(text="Bolton" if yes else f"Town{k % 3}", mean_log_prob=-1.0, num_tokens=1)
            for k, yes in enumerate(right)
        )


@pytest.fixture
def started() -> list[tuple[FakeBackend, IGServiceConfig]]:
    return []


@pytest.fixture
def run(
    started: list[tuple[FakeBackend, IGServiceConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Run:
    async def start(config: IGServiceConfig) -> FakeBackend:
        sampler = ReadingSampler(config.num_generations)
        estimator = GainEstimator(sampler, FakePairJudge(), config=config, generator_digest="1")
        started.append((FakeBackend(estimator=estimator), config))
        return started[-1][0]

    def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
        status = main([*arguments, "--out", str(tmp_path / "out")], start_backend=start)
        shown = capsys.readouterr().out
        return status, json.loads(shown.splitlines()[-1]) if status == 0 else {}, shown

    return call


def write(path: Path, lines: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def lines(count: int = 12) -> list[dict[str, object]]:
    return [
        {
            "question": f"Q{k}?",
            "answers": ["Bolton"],
            "documents": [
                {"text": f"Q{k} document {role}", "role": role} for role in ("first", "second")[: 1 + k % 2]
            ],
        }
        for k in range(count)
    ]


def test_a_whole_examination(
    run: Run, started: list[tuple[FakeBackend, IGServiceConfig]], tmp_path: Path
) -> None:
    status, line, shown = run("--questions", write(tmp_path / "q.jsonl", lines()), "--num-questions", "10")
    assert status == 0
    ((backend, config),) = started
    assert (backend.closed, config.num_generations) == (True, 64)
    assert (line["questions"], line["failed"], line["empty_share"]) == (10, 0, 0.0)
    assert 0.2 < line["signal"] < 0.6
    assert line["judge_rejects_em"] == 0.0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    means = {name: np.mean(values) for name, values in report["gains"].items()}
    assert means["no document"] == 0.0
    assert means["random documents"] < means["only the first document"] < means["all supporting documents"]
    assert report["work"]["baselines_sampled"] == 10
    assert "token" not in report["settings"]
    for text in ("mean gain, random documents", "(configured)", "rejects", *report["advice"]):
        assert text in shown


@pytest.mark.parametrize(
    ("num_generations", "trustworthy", "advice"),
    [("60", True, "is enough: from"), ("1", False, "Raise --num-generations from 1 to")],
)
def test_the_advice_follows_the_noise(
    run: Run, tmp_path: Path, num_generations: str, trustworthy: bool, advice: str
) -> None:
    questions = write(tmp_path / "q.jsonl", lines(24))
    status, line, shown = run("--questions", questions, "--num-generations", num_generations)
    assert (status, line["trustworthy"]) == (0, trustworthy)
    assert advice in shown


def test_the_same_seed_gives_the_same_report(run: Run, tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", lines())
    reports = []
    for _ in range(2):
        assert run("--questions", questions, "--max-samples", "16", "--num-questions", "5")[0] == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        del report["seconds"]
        reports.append(report)
    assert reports[0] == reports[1]


def test_parquet_without_documents_gets_no_verdict(run: Run, tmp_path: Path) -> None:
    rows = [
        {"question": f"Q{k}?", "reward_model": {"ground_truth": {"target": ["Bolton"]}}} for k in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    status, line, shown = run("--questions", str(tmp_path / "q.parquet"))
    assert status == 0
    assert (line["trustworthy"], line["signal"]) == (None, None)
    assert line["judge_rejects_em"] == 0.0
    assert "No question has documents" in shown


def test_entropy_needs_no_answers(run: Run, tmp_path: Path) -> None:
    bare = [{key: line[key] for key in ("question", "documents")} for line in lines()]
    status, line, _ = run("--questions", write(tmp_path / "q.jsonl", bare), "--gain", "entropy")
    assert status == 0
    assert (line["gain"], line["judge_rejects_em"]) == ("entropy", None)
    assert line["signal"] is not None


def test_what_cannot_be_measured_is_named_and_leaves_the_others_alone(run: Run, tmp_path: Path) -> None:
    poisoned = lines()[:1]
    poisoned[0]["question"] = "poison?"
    status, line, shown = run("--questions", write(tmp_path / "q.jsonl", lines() + poisoned))
    assert status == 0
    assert (line["questions"], line["failed"]) == (12, 2)
    assert "'poison?', all supporting documents: the prompt is too long" in shown
    assert run("--questions", write(tmp_path / "p.jsonl", poisoned))[0] == 1


def test_a_bad_folder_is_named_before_models_load_and_models_that_cannot_start_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("here")

    async def refuse(config: IGServiceConfig) -> FakeBackend:
        raise RuntimeError("no room")

    arguments = ["--questions", write(tmp_path / "q.jsonl", lines()), "--out"]
    assert main([*arguments, str(tmp_path / "file")], start_backend=refuse) == 1
    assert "expected a folder" in caplog.text
    assert "no room" not in caplog.text
    assert main([*arguments, str(tmp_path / "out")], start_backend=refuse) == 1
    assert "no room" in caplog.text
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-samples", "4"], "--max-samples is 4, expected at least --num-generations"),
        (["--temperature", "0"], "--temperature is 0"),
        (["--gain", "much"], "--gain is 'much'"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse_arguments(arguments)


def test_flags_are_those_of_the_doctor_and_of_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    request = parse_arguments(["--num-generations", "5", "--score", "soft", "--compat"])
    assert (request.config.num_generations, request.config.score, request.max_samples) == (5, "soft", 64)
    assert request.config.compat
    for arguments in (["--max-samples", "one"], ["--num-questions", "0"], ["--bogus"]):
        with pytest.raises(SystemExit) as ended:
            parse_arguments(arguments)
        assert ended.value.code == 2
        assert arguments[0] in capsys.readouterr().err
