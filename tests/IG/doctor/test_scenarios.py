from __future__ import annotations

import random

from IG.doctor.scenarios import Scenario, contexts_of
from tests.IG.doctor.synthetic import question


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


def test_one_document_is_all_there_is() -> None:
    contexts = contexts_of(question(name="A?"), others=[question(name="B?")], rng=random.Random(0))
    assert list(contexts) == [Scenario.none, Scenario.supporting, Scenario.random]


def test_no_documents_leave_the_question_alone() -> None:
    others = [question(name="B?")]
    assert contexts_of(question(num_documents=0), others=others, rng=random.Random(0)) == {Scenario.none: ""}


def test_nothing_random_where_there_is_too_little_to_draw_from() -> None:
    contexts = contexts_of(question(num_documents=2), others=[question(name="B?")], rng=random.Random(0))
    assert Scenario.random not in contexts
