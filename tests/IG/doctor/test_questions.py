from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from IG.doctor.questions import Scenario, choose, contexts_of, read_questions
from serving.questions import QuestionError
from tests.IG.doctor.synthetic import question

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
        ({"answers": ["x"]}, "q.jsonl:3: none of question, extra_info.question has a value"),
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


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match=r"none\.jsonl: no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(QuestionError, match="it has no questions"):
        read_questions(write(tmp_path / "empty.jsonl", ""))


def test_the_same_seed_chooses_the_same_questions_in_their_order(tmp_path: Path) -> None:
    lines = [{"question": f"Question {number:02}?"} for number in range(20)]
    questions = read_questions(write(tmp_path / "q.jsonl", *lines))
    chosen = choose(questions, count=5, seed=1)
    assert chosen == choose(questions, count=5, seed=1)
    assert len(chosen) == 5
    assert [question.text for question in chosen] == sorted(question.text for question in chosen)
    assert choose(questions, count=99, seed=1) == questions


def test_a_question_of_two_documents_has_every_scenario() -> None:
    asked = question(num_documents=2, name="A?")
    others = [asked, question(name="B?"), question(num_documents=2, name="C?")]
    contexts = contexts_of(asked, others=others, rng=random.Random(0))
    assert list(contexts) == list(Scenario)
    assert contexts[Scenario.none] == ""
    assert contexts[Scenario.first] == "A? document first"
    assert contexts[Scenario.rest] == "A? document second"
    assert contexts[Scenario.supporting] == "A? document first\nA? document second"
    drawn = contexts[Scenario.random].split("\n")
    assert len(set(drawn)) == 2, "as many as it needs"
    assert not any(text.startswith("A?") for text in drawn)


def test_without_documents_or_enough_foreign_ones_scenarios_are_left_out() -> None:
    others, rng = [question(name="B?")], random.Random(0)
    assert contexts_of(question(num_documents=0), others=others, rng=rng) == {Scenario.none: ""}
    assert Scenario.random not in contexts_of(question(num_documents=2), others=others, rng=rng)
