from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.scripted_evaluation import make_result, write_evaluation_folder
from tests.scripted_run import answer_turn, decode, encode, make_question, make_turn, search_turn
from verl.errors import ServiceError
from verl.evaluation.evidence import EvidenceRecord, Ranks, is_complete, read_evidence, write_evidence
from verl.evaluation.loss_analysis import Loss, analyze_losses, ceiling_table, find_loss, loss_table
from verl.evaluation.page import write_report
from verl.evaluation.records import EVIDENCE_FILE, ResultWriter, read_results
from verl.protocols import Page
from verl.types import Action, ActionKind, Passage, Question, Score, Stop, Trajectory, Turn


def make_evidence(
    *,
    uid: str = "nq/test/0",
    kind: str = "supporting_ids",
    items: tuple[str, ...] = ("1", "2"),
    last_action: str = "answer",
    read: tuple[bool, ...] = (False, False),
    question_ranks: Ranks | None = None,
    query_ranks: Ranks | None = None,
    in_corpus: tuple[bool | None, ...] = (True, True),
    depth: int | None = 100,
    failure: str | None = None,
) -> EvidenceRecord:
    return {
        "format": 1,
        "uid": uid,
        "sample": 0,
        "kind": kind,
        "items": list(items),
        "last_action": last_action,
        "read": list(read[: len(items)]),
        "question_ranks": question_ranks or [None] * len(items),
        "query_ranks": query_ranks or [None] * len(items),
        "in_corpus": list(in_corpus[: len(items)]),
        "topk": 3,
        "depth": depth,
        "failure": failure,
    }


WRONG = make_result(em=0.0)
NONE = make_result(em=0.0, prediction=None)


@pytest.mark.parametrize(
    ("result", "evidence", "loss"),
    [
        (make_result(), make_evidence(), None),
        (make_result(failure="search_failed: x"), make_evidence(), None),
        (make_result(em=0.0) | {"metrics": {"em": 0.0, "math": 1.0}}, make_evidence(), None),
        (NONE, make_evidence(last_action="invalid"), Loss.MALFORMED),
        (NONE, make_evidence(last_action="tool", read=(True, True)), Loss.REFUSED),
        (make_result(em=0.0, prediction=" "), make_evidence(), Loss.REFUSED),
        (WRONG, make_evidence(items=()), Loss.UNKNOWN),
        (WRONG, make_evidence(read=(True, True), depth=None), Loss.UNUSED),
        (WRONG, make_evidence(read=(True, False), in_corpus=(True, False)), Loss.NOT_IN_CORPUS),
        (make_result(em=0.0, num_searches=0), make_evidence(depth=None), Loss.NEVER_SEARCHED),
        (WRONG, make_evidence(depth=None), Loss.UNKNOWN),
        (WRONG, make_evidence(failure="retriever: late"), Loss.UNKNOWN),
        # One of two is found, the other one is not: without it the answer cannot be known.
        (WRONG, make_evidence(query_ranks=[2, None]), Loss.NOT_RETRIEVED),
        (WRONG, make_evidence(read=(True, False), query_ranks=[None, 40]), Loss.CUT),
        (NONE | {"stop": "length"}, make_evidence(last_action="tool", query_ranks=[1, 2]), Loss.CUT),
        (NONE | {"stop": "length"}, make_evidence(last_action="tool", read=(True, True)), Loss.CUT),
    ],
)
def test_an_answer_is_lost_in_one_place(result, evidence: EvidenceRecord, loss: Loss | None) -> None:
    assert find_loss(result, evidence) is loss


def test_shares_are_of_what_was_measured() -> None:
    results = [
        make_result("nq/test/0"),
        make_result("nq/test/1", em=0.0),
        make_result("nq/test/2", em=0.0),
        make_result("tq/test/0", em=0.0),
        make_result("tq/test/1", failure="search_failed: x"),
    ]
    evidence = [
        make_evidence(uid="nq/test/0", items=("1",), read=(True,), question_ranks=[1]),
        make_evidence(uid="nq/test/1", items=("1",), query_ranks=[9], question_ranks=[9]),
        make_evidence(uid="nq/test/2", items=("1",), failure="retriever: late"),
        make_evidence(uid="tq/test/0", items=(), kind="none"),
        make_evidence(uid="tq/test/1", items=("1",), question_ranks=[3]),
    ]
    nq, tq, every = analyze_losses(results, evidence).groups
    assert (nq.num_answers, nq.num_right, nq.losses[Loss.CUT], nq.losses[Loss.UNKNOWN]) == (3, 1, 1, 1)
    # The search that failed does not count as a miss; the question whose answer failed has a ceiling.
    assert [found and found.value for found in (nq.in_topk, nq.in_depth, tq.in_topk)] == [0.5, 1.0, 1.0]
    assert every.in_topk is not None
    assert every.in_topk.num_questions == 3
    assert [found and found.value for found in (nq.read, nq.em_if_read, nq.em_if_not)] == [1 / 3, 1.0, 0.0]
    assert (tq.read, tq.em_if_read) == (None, None)
    assert every.kinds == {"supporting_ids": 4, "none": 1}
    analysis = analyze_losses(results, evidence)
    assert loss_table(analysis).header == (
        "source",
        "answers",
        "right",
        "wrong",
        "retrieved but cut",
        "unknown",
    )
    assert loss_table(analysis).rows[-1] == ("all", "4", "1", "3", "1", "2")
    assert ceiling_table(analysis).rows[0][0] == "nq"


def test_several_answers_to_a_question_are_averaged_before_the_questions() -> None:
    """Four answers to one question, one to another: the questions weigh alike, and are what is resampled."""
    answers = [make_result("nq/test/0", sample=k, em=float(k == 0)) for k in range(4)]
    answers.append(make_result("nq/test/1"))
    evidence = [
        make_evidence(uid=result["uid"], read=(True, result["sample"] < 2)) | {"sample": result["sample"]}
        for result in answers
    ]
    (group,) = analyze_losses(answers, evidence).groups
    assert group.read is not None
    assert group.em_if_read is not None
    assert group.em_if_not is not None
    assert (group.read.value, group.read.num_questions) == ((2 / 4 + 1) / 2, 2)
    assert (group.em_if_read.value, group.em_if_read.num_questions) == ((1 / 2 + 1) / 2, 2)
    assert (group.em_if_not.value, group.em_if_not.num_questions) == (0.0, 1)


@dataclass
class DeepSearch:
    """Finds what is scripted for a query, and knows some passages by id."""

    found: dict[str, list[Passage]]
    ids: tuple[str, ...] = ()
    asked: list[str] = field(default_factory=list)
    works: bool = False
    page_status: int | None = None
    """With which it refuses to open pages."""

    async def search(self, query: str) -> tuple[Passage, ...]:
        self.asked.append(query)
        if query == "broken" and not self.works:
            raise ServiceError("retriever", "late")
        return tuple(self.found.get(query, ()))

    async def open_page(self, page_id: str, *, part: int, part_chars: int, timeout_s: float) -> Page | None:
        if self.page_status is not None:
            raise ServiceError("retriever", "refused", status=self.page_status)
        return Page(title="", part=1, num_parts=1, passages=()) if page_id in self.ids else None

    async def wait_ready(self, timeout_s: float) -> None:
        """Be ready."""

    async def describe(self) -> None:
        return None

    async def aclose(self) -> None:
        """Close nothing."""


MARSH = Passage(id="1", title='"Marsh"', text="Marsh was born in Bolton.", score=1.0)
CALDER = Passage(id="2", title='"Calder"', text="Calder is a river.", score=0.5)
MARSH_TEXT, CALDER_TEXT = (f"{p.title}\n{p.text}" for p in (MARSH, CALDER))


def ask(
    number: int, *, ids: tuple[str, ...] = (), texts: tuple[str, ...] = (), gold: str = "Bolton"
) -> Question:
    uid = f"nq/test/{number}"
    return replace(
        make_question(number), uid=uid, data_source="nq", text=f"q{number}", golds=(gold,),
        supporting_ids=ids, supporting_texts=texts,
    )  # fmt: skip


def play(question: Question, *turns: Turn) -> Trajectory:
    return Trajectory(
        question=question, sample=0, prompt_ids=encode("p"), turns=turns, stop=Stop.ANSWERED, seconds=0.1
    )


async def trace(
    folder: Path, trajectories: list[Trajectory], search: DeepSearch | None
) -> list[EvidenceRecord]:
    writer = ResultWriter(folder, decode=decode)
    for trajectory in trajectories:
        em = float(trajectory.answer in trajectory.question.golds)
        writer.write(trajectory, score=Score(outcome=em, metrics={"em": em}))
    writer.close()
    questions = [trajectory.question for trajectory in trajectories]
    results = read_results(folder)
    await write_evidence(folder, results, questions=questions, search=search, topk=1, depth=10)
    found = read_evidence(folder, results)
    assert found is not None
    return found


async def test_evidence_is_looked_for_in_what_was_read_and_in_deeper_searches(tmp_path: Path) -> None:
    both = {"ids": ("1", "2"), "texts": (MARSH_TEXT, CALDER_TEXT)}
    cut = replace(MARSH, text="Marsh was")
    trajectories = [
        play(ask(0), search_turn("a", [MARSH]), answer_turn("Bolton")),
        play(ask(1, **both), search_turn("a", [MARSH]), search_turn("b", []), answer_turn("x")),
        play(ask(2, ids=("1",), texts=(MARSH_TEXT,)), search_turn("a", [cut]), answer_turn("x")),
        play(ask(3, ids=("8",), texts=("T\nt",)), answer_turn("x")),
        play(ask(4, ids=("Calder",)), search_turn("d", [MARSH]), answer_turn("x")),
        play(ask(5, gold="yes"), answer_turn("x")),
        play(ask(7, ids=("Calder",)), search_turn("c", [replace(CALDER, is_cut=True)]), answer_turn("x")),
        play(ask(6, ids=("1",)), search_turn("broken", []), make_turn("?", Action(kind=ActionKind.INVALID))),
    ]
    search = DeepSearch(
        {"c": [MARSH, CALDER], "q0": [MARSH], "a": [MARSH], "b": [MARSH, CALDER], "Calder": [CALDER]}
    )
    found = await trace(tmp_path, trajectories, search)
    assert [record["read"] for record in found] == [
        [True], [True, False], [False], [False], [False], [], [False], [False]
    ]  # fmt: skip
    assert [record["kind"] for record in (found[0], found[5])] == ["gold_strings", "none"]
    assert [record["query_ranks"] for record in found[:5]] == [[None], [1, 2], [1], [None], [None]]
    assert (found[0]["question_ranks"], found[3]["in_corpus"]) == ([1], [False])
    assert found[4]["in_corpus"] == [True]  # found by its title alone
    assert (found[-1]["last_action"], found[-1]["failure"]) == ("invalid", "retriever: late")
    results = read_results(tmp_path)
    losses = [find_loss(*pair) for pair in zip(results, found, strict=True)]
    assert losses == [
        None, Loss.CUT, Loss.CUT, Loss.NOT_IN_CORPUS, Loss.NOT_RETRIEVED, Loss.UNKNOWN, Loss.CUT,
        Loss.MALFORMED,
    ]  # fmt: skip
    assert search.asked.count("b") == 1


async def test_a_search_that_failed_is_made_again_and_no_other(tmp_path: Path) -> None:
    trajectories = [
        play(ask(0, ids=("1",)), search_turn("a", []), answer_turn("x")),
        play(ask(1, ids=("1",)), search_turn("broken", []), answer_turn("x")),
    ]
    (_, failed) = await trace(tmp_path, trajectories, DeepSearch({}))
    results = read_results(tmp_path)
    assert failed["failure"] is not None
    assert not is_complete(tmp_path, results)
    search = DeepSearch({"q1": [MARSH]}, works=True)
    questions = [trajectory.question for trajectory in trajectories]
    await write_evidence(tmp_path, results, questions=questions, search=search, topk=1, depth=10)
    assert is_complete(tmp_path, results)
    assert (read_evidence(tmp_path, results) or [])[1]["question_ranks"] == [1]
    assert "a" not in search.asked
    assert not is_complete(tmp_path, results[:1])


@pytest.mark.parametrize(("status", "failure"), [(404, None), (503, "retriever: refused")])
async def test_a_page_that_cannot_be_opened_now_is_looked_up_again(
    status: int, failure: str | None, tmp_path: Path
) -> None:
    trajectories = [play(ask(0, ids=("8",), texts=("T\nt",)), answer_turn("x"))]
    (found,) = await trace(tmp_path, trajectories, DeepSearch({}, page_status=status))
    assert (found["failure"], found["in_corpus"]) == (failure, [None])
    assert is_complete(tmp_path, read_results(tmp_path)) is (failure is None)


async def test_without_a_deeper_search_only_what_was_read_is_known(tmp_path: Path) -> None:
    question = ask(0, ids=("1",), texts=(MARSH_TEXT,))
    (found,) = await trace(tmp_path, [play(question, search_turn("a", [CALDER]), answer_turn("x"))], None)
    assert (found["depth"], found["in_corpus"]) == (None, [None])
    assert find_loss(read_results(tmp_path)[0], found) is Loss.UNKNOWN


def test_the_files_of_an_evaluation_say_where_answers_were_lost(tmp_path: Path) -> None:
    folder = write_evaluation_folder(tmp_path / "run", skill=0.5, num_questions=40)
    write_report(folder)
    assert "Where wrong answers were lost" not in (folder / "table.md").read_text()
    results = read_results(folder)
    lines = [make_evidence(uid=result["uid"], query_ranks=[1, 2]) for result in results]
    (folder / EVIDENCE_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report(folder).read_text()
    for text in (html, (folder / "table.md").read_text(), (folder / "table.tex").read_text()):
        assert "Where wrong answers were lost" in text
        assert "retrieved but cut" in text
    summary = json.loads((folder / "summary.json").read_text())
    groups = summary["losses"]["groups"]
    wrong = groups["all"]["answers"] - groups["all"]["right"]
    assert 0 < wrong == sum(groups["all"]["lost"].values())
    # Of other answers than these, as after an interrupted start: not used.
    (folder / EVIDENCE_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    write_report(folder)
    assert "losses" not in json.loads((folder / "summary.json").read_text())
