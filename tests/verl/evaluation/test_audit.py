"""What `index audit` says of a corpus goes into the loss analysis of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r1.search.asking import read_questions
from search_r1.search.bm25 import build_bm25
from search_r1.search.index_cli import main as index
from serving.answers import normalize_answer
from serving.evidence import find_corpus_hash
from tests.scripted_run import answer_turn, decode, encode, search_turn
from verl.errors import DataError
from verl.evaluation.audit import Audit, read_audit
from verl.evaluation.evidence import is_complete, read_evidence, write_evidence
from verl.evaluation.loss_analysis import Loss, analyze_losses, find_loss, loss_table
from verl.evaluation.records import ResultWriter, read_results
from verl.types import Question, Score, Stop, Trajectory

WORLD = Path(__file__).resolve().parents[3] / "world"
NUM_QUESTIONS = 6


def read_world() -> list[Question]:
    """Questions of the embedded world without their supporting passages."""
    asked = [one for one in read_questions([WORLD / "test.parquet"]) if one.data_source == "world_onehop"]
    return [
        Question(uid=one.uid, text=one.text, messages=(), golds=one.golds, data_source=one.data_source)
        for one in asked[:NUM_QUESTIONS]
    ]


def write_questions(path: Path, questions: list[Question]) -> Path:
    rows = [
        {
            "question": question.text,
            "golden_answers": list(question.golds),
            "data_source": question.data_source,
            "extra_info": dict(zip(("split", "index"), question.uid.split("/")[1:], strict=True)),
        }
        for question in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def remove_passages(path: Path, gold: str) -> Path:
    """Write the corpus of the embedded world without the passages that hold an answer."""
    words = f" {normalize_answer(gold)} "
    lines = (WORLD / "corpus.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if words not in f" {normalize_answer(json.loads(line)['contents'])} "]
    assert 0 < len(kept) < len(lines)
    path.write_text("".join(kept))
    return path


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Question], str]:
    """The audit of a corpus without the answer to the first question, the questions and its hash."""
    folder = tmp_path_factory.mktemp("audit")
    questions = read_world()
    corpus = remove_passages(folder / "corpus.jsonl", questions[0].golds[0])
    build_bm25(corpus, index_path=folder / "bm25")
    output = folder / "audit.jsonl"
    flags = ["--questions", str(write_questions(folder / "q.jsonl", questions)), "--output", str(output)]
    flags += ["--retriever_name", "bm25", "--index_path", str(folder / "bm25"), "--corpus_path", str(corpus)]
    assert index(["audit", *flags]) == 0
    return output, questions, json.loads(output.read_text().splitlines()[0])["corpus_sha256"]


async def trace(folder: Path, questions: list[Question], audit: Audit | None) -> list[Loss | None]:
    """Return where wrong answers to all questions were lost, without searching again."""
    results = read_results(folder)
    await write_evidence(folder, results, questions=questions, search=None, topk=3, depth=None, audit=audit)
    evidence = read_evidence(folder, results)
    assert evidence is not None
    assert is_complete(folder, results, audit=audit)
    return [find_loss(*pair) for pair in zip(results, evidence, strict=True)]


async def test_an_answer_that_the_corpus_lacks_is_known_without_passage_ids(
    tmp_path: Path, audited: tuple[Path, list[Question], str]
) -> None:
    path, questions, corpus_sha256 = audited
    writer = ResultWriter(tmp_path, decode=decode)
    for question in questions:
        turns = (search_turn("q", []), answer_turn("wrong"))
        trajectory = Trajectory(
            question=question, sample=0, prompt_ids=encode("p"), turns=turns, stop=Stop.ANSWERED, seconds=0.1
        )
        writer.write(trajectory, score=Score(outcome=0.0, metrics={"em": 0.0}))
    writer.close()
    assert set(await trace(tmp_path, questions, None)) == {Loss.UNKNOWN}
    audit = read_audit(path, questions, corpus_sha256=corpus_sha256)
    # What was written without the audit is not taken for what it says.
    assert not is_complete(tmp_path, read_results(tmp_path), audit=audit)
    assert await trace(tmp_path, questions, audit) == [
        Loss.NOT_IN_CORPUS,
        *[Loss.UNKNOWN] * (NUM_QUESTIONS - 1),
    ]
    evidence = read_evidence(tmp_path, read_results(tmp_path)) or []
    assert [record["in_corpus"] for record in evidence] == [[False], *[[True]] * (NUM_QUESTIONS - 1)]
    note = loss_table(analyze_losses(read_results(tmp_path), evidence)).note
    assert f"index audit (SHA-256 {audit.sha256[:12]})" in note


def test_an_audit_of_something_else_is_refused(
    tmp_path: Path, audited: tuple[Path, list[Question], str], caplog: pytest.LogCaptureFixture
) -> None:
    path, questions, corpus_sha256 = audited
    lines = path.read_text().splitlines(keepends=True)
    other = questions[0].text.replace("?", " now?")
    wrong = {
        "nothing": ("", "is empty"),
        "no_audit": ("[1]\n", r"no_audit:1: .*write it with `index audit"),
        "shorter": ("".join(lines[1:]), rf"lacks 1 of {NUM_QUESTIONS} questions \(for example world_onehop"),
        "question": (path.read_text().replace(questions[0].text, other), "audit the same files"),
        "evidence": (path.read_text().replace(questions[0].golds[0], "x"), "with the evidence"),
    }
    for name, (text, complaint) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=complaint):
            read_audit(tmp_path / name, questions, corpus_sha256=corpus_sha256)
    with pytest.raises(DataError, match="nowhere is not a file"):
        read_audit(tmp_path / "nowhere", questions, corpus_sha256=corpus_sha256)
    with pytest.raises(DataError, match=rf"{corpus_sha256[:12]}, the retriever searches one with 0a0a"):
        read_audit(path, questions, corpus_sha256="0a0a")
    read_audit(path, questions, corpus_sha256=None)
    assert "the retriever states no hash" in caplog.text


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"corpus_sha256": "a"}, "a"),
        ({"url": "u", "retriever": {"1.corpus_sha256": "a", "2.corpus_sha256": "a"}}, "a"),
        ({"1.corpus_sha256": "a", "2.corpus_sha256": "b"}, None),
        ({"corpus_sha256": None}, None),
        ({}, None),
    ],
)
def test_the_corpus_of_a_retriever_has_one_hash(facts: dict[str, object], expected: str | None) -> None:
    assert find_corpus_hash(facts) == expected
