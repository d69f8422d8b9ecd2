from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from IG.doctor.questions import choose, read_questions
from serving.questions import QuestionError

GOOD = {
    "question": " Where ",
    "answers": ["Bolton"],
    "documents": [{"text": "It is Bolton.", "role": "first"}],
}


def write(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def test_questions_come_with_their_documents(tmp_path: Path) -> None:
    bare = {"question": "Who?"}
    first, second = read_questions(write(tmp_path / "q.jsonl", GOOD, "", bare))
    assert (first.text, first.golds) == ("Where?", ("Bolton",))
    assert [(document.text, document.role) for document in first.documents] == [("It is Bolton.", "first")]
    assert (second.text, second.golds, second.documents) == ("Who?", (), ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "q.jsonl:3: not JSON"),
        ("[" * 200_000, "q.jsonl:3: not JSON in UTF-8 (maximum recursion"),
        ('{"question": ' + "9" * 5000 + "}", "q.jsonl:3: not JSON in UTF-8 (Exceeds the limit"),
        (
            GOOD | {"question": "Where\ud800?"},
            "q.jsonl:3: character 5 of question is '\\ud800', expected",
        ),
        ("[1]", "q.jsonl:3: the row is [1], expected an object"),
        ({"answers": ["x"]}, "q.jsonl:3: none of question, extra_info.question holds anything"),
        (GOOD | {"answers": [None]}, "q.jsonl:3: answers is [None], expected a text, a number or a list"),
        (GOOD | {"answers": ["a", True]}, "q.jsonl:3: answers is ['a', True], expected a text, a number or"),
        (GOOD | {"documents": {}}, "q.jsonl:3: documents is {}, expected a list"),
        (GOOD | {"documents": [{"text": "x"}]}, "q.jsonl:3: documents[0].role is None"),
        (GOOD | {"documents": [{"text": " ", "role": "first"}]}, "q.jsonl:3: documents[0].text is ' '"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(QuestionError) as raised:
        read_questions(write(tmp_path / "q.jsonl", GOOD, "", line))
    assert message in str(raised.value)


def test_what_is_not_there_or_empty_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match=r"none\.jsonl: no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(QuestionError, match="it has no questions"):
        read_questions(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"question": "Who?"}\n{"question": "caf\xe9"}\n')
    with pytest.raises(QuestionError, match=r"bytes\.jsonl:2: not JSON in UTF-8"):
        read_questions(tmp_path / "bytes.jsonl")


def test_a_json_array_as_of_hotpotqa_is_read(tmp_path: Path) -> None:
    row = {"_id": "7", "question": "Where?", "answer": "Bolton", "context": [["Bolton", ["A town."]]]}
    (tmp_path / "q.json").write_text(json.dumps([row]))
    (question,) = read_questions(tmp_path / "q.json")
    assert (question.text, question.golds, question.documents) == ("Where?", ("Bolton",), ())


def test_parquet_has_no_documents(tmp_path: Path) -> None:
    row = {"question": "Where?", "reward_model": {"ground_truth": {"target": ["Bolton", "Bolton, England"]}}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    (question,) = read_questions(tmp_path / "q.parquet")
    assert (question.golds, question.documents) == (("Bolton", "Bolton, England"), ())
    pq.write_table(pa.Table.from_pylist([{"text": "Where?"}]), tmp_path / "other.parquet")
    with pytest.raises(QuestionError, match="none of question"):
        read_questions(tmp_path / "other.parquet")
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(QuestionError, match="not a readable parquet file"):
        read_questions(tmp_path / "no.parquet")


def test_the_same_seed_chooses_the_same_questions_in_their_order(tmp_path: Path) -> None:
    lines = [{"question": f"Question {number:02}?"} for number in range(20)]
    questions = read_questions(write(tmp_path / "q.jsonl", *lines))
    chosen = choose(questions, count=5, rng=random.Random(1))
    assert chosen == choose(questions, count=5, rng=random.Random(1))
    assert len(chosen) == 5
    assert [question.text for question in chosen] == sorted(question.text for question in chosen)
    assert choose(questions, count=99, rng=random.Random(1)) == questions
