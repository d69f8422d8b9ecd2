"""Answers to mathematical problems: pairs as in MATH-500, made here, and answers that stop a grader."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fakes import FakeAgent, make_question, make_trajectory
from verl.algorithms.scoring.outcome import Outcome, measure_outcome
from verl.algorithms.scoring.reward import score_answer
from verl.types import Score, find_rightness
from verl.utils.reward_score.math_grader import Grade, GradingAgent, MathGrader


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    grader = MathGrader(cpu_time_s=5.0)
    asyncio.run(grader.connect())
    yield grader
    asyncio.run(grader.aclose())
    assert not find_workers()


def find_workers() -> list[psutil.Process]:
    """Return the processes that grade for this one."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and any("math_worker" in word for word in child.cmdline())
    ]


RIGHT = {
    r"\frac{1}{2}": [
        "0.5",
        "1/2",
        r"\dfrac12",
        r"$\frac{2}{4}$",
        r"The answer is \boxed{\frac{1}{2}}.",
        r"\(0.50\)",
    ],
    r"\frac{14}{3}": [r"4\frac{2}{3}", "14/3"],
    r"11\sqrt2": [r"11\sqrt{2}", r"\sqrt{242}"],
    r"\frac{\sqrt{3}}{3}": [r"\frac{1}{\sqrt{3}}", "3^{-1/2}"],
    r"\left( 3, \frac{\pi}{2} \right)": [r"(3,\pi/2)", r"$(3, 0.5\pi)$"],
    r"[0,1)": [r"\left[0, 1\right)"],
    r"(-\infty,1)\cup(2,\infty)": [r"(2,\infty) \cup (-\infty,1)"],
    r"\{1,2\}": [r"\{2, 1\}", "1, 2"],
    "6,-2": ["-2 and 6", r"x=-2 \text{ or } x=6"],
    r"10\text{ inches}": ["10", r"10 \text{ inches}"],
    r"90^\circ": ["90", "90 degrees"],
    r"5\%": ["5%", "5"],
    r"\$18.90": ["18.9", r"\$18.90", "$18.90$"],
    "1,000": ["1000", "10^3"],
    "x^2+2x+1": ["(x+1)^2", "x(x+2)+1"],
    "p - q": ["-(q-p)"],
    "3+4i": ["4i+3"],
    "y = 2x + 3": ["2x+3", "y=3+2x"],
    r"\text{(C)}": ["C", "(C)", r"\text{C}"],
    r"\text{even}": ["even", r"\text{Even}"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
    "120": ["5!", r"\binom{10}{3}", "120.", "The answer is 120."],
}
WRONG = {
    r"\frac{1}{2}": ["0.49", "2", "1/3", "-1/2", ""],
    "2": [r"$1$ or $2$", "1, 2, 3", r"\boxed{1} \boxed{2}", "x", "no idea", "Or(2,3)", "2 " * 300],
    r"[0,1)": ["(0,1)", "[0,1]"],
    r"\{1,2\}": [r"\{1,3\}", "1"],
    r"\pi": ["3.14", "22/7"],
    "(1,2)": ["(2,1)"],
    "5": ["0.05", "__import__('os').getpid()"],
}


@pytest.mark.parametrize(("pairs", "score"), [(RIGHT, 1.0), (WRONG, 0.0)])
def test_answers_are_compared_as_expressions(
    grader: MathGrader, pairs: dict[str, list[str]], score: float
) -> None:
    grades = {
        (gold, a): grader.grade(a, ["unrelated", gold]) for gold, answers in pairs.items() for a in answers
    }
    assert {pair: grade for pair, grade in grades.items() if grade != Grade(score=score)} == {}


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_graded(grader: MathGrader) -> None:
    for answer in ("9^{9^{9^9}}", "(x+y+z+w)^{300}"):
        assert grader.grade(answer, ["42"]) == Grade(score=0.0, is_unfinished=True)
        assert grader.grade(f"42+0*{len(answer)}", ["42"]) == Grade(score=1.0)


@pytest.mark.parametrize(
    "answer", ["(" * 60, "{" * 60, r"\frac{" * 30, "\ud83d", "\0", r"\frac{1}{0}", "1" * 480]
)
def test_what_is_no_expression_is_wrong(grader: MathGrader, answer: str) -> None:
    assert grader.grade(answer, ["42"]) == Grade(score=0.0)


def test_only_a_failure_of_the_grader_leaves_an_answer_without_outcome(grader: MathGrader) -> None:
    question = make_question(golds=("0.5",))

    def score(answer: str | None) -> Score:
        trajectory = make_trajectory(question, answer=answer)
        return score_answer(
            trajectory,
            outcome=lambda t: measure_outcome(t, metric="math", format_score=0.1, grade=grader.grade),
        )

    right, wrong, missing = score(r"\frac{1}{2}"), score("0.6"), score(None)
    assert [each.outcome for each in (right, wrong, missing)] == [1.0, 0.1, 0.0]
    assert [find_rightness(each.metrics) for each in (right, wrong, missing)] == [1.0, 0.0, 0.0]
    assert right.metrics["em"] == 0.0
    unfinished = score("9^{9^{9^9}}")
    assert unfinished.outcome == 0.1
    assert [each.metrics["math_unfinished"] for each in (right, missing, unfinished)] == [0.0, 0.0, 1.0]
    failure = "math_failed: the grader ended with status -9"
    unmeasured = measure_outcome(
        make_trajectory(question, answer="1"), metric="math", grade=lambda *_: Grade(failure=failure)
    )
    assert unmeasured == Outcome(value=None, metrics={}, failure=failure)
    assert score_answer(make_trajectory(question), outcome=lambda _: unmeasured).valid_outcome is None


async def test_verdicts_are_found_where_episodes_end_and_a_grader_that_dies_is_replaced(
    grader: MathGrader,
) -> None:
    question = make_question(golds=("a",))
    trajectory = await GradingAgent(FakeAgent(), grader).run(question, sample=0, seed=0, greedy=True)
    for child in find_workers():
        os.kill(child.pid, signal.SIGKILL)
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0)
    assert trajectory.answer is not None
    assert grader.grade(trajectory.answer, question.golds) == Grade(score=1.0)  # known
    assert find_workers() == []
    assert grader.grade("42+1-1", ["42"]) == Grade(score=1.0)


def test_a_grader_that_is_stopped_is_replaced() -> None:
    grader = MathGrader(cpu_time_s=1.0)
    before = find_workers()
    asyncio.run(grader.connect())
    (worker,) = [child for child in find_workers() if child not in before]
    worker.suspend()
    assert grader.grade("42+1-1", ["42"]) == Grade(score=1.0)
    assert not worker.is_running()
    asyncio.run(grader.aclose())


def test_a_failure_is_kept_until_the_next_attempt_and_lines_of_a_library_are_not_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "fail"
    flag.touch()
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif os.path.exists({str(flag)!r}):\n    os.kill(os.getpid(), 9)\n"
        "os.write(1, b'a line\\n')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    grader = MathGrader(cpu_time_s=2.0)
    failure = "math_failed: at its start: the grader ended with status -9"
    assert grader.grade("1/2", ["0.5"]) == Grade(failure=failure)
    flag.unlink()
    assert grader.grade("1/2", ["0.5"]) == Grade(failure=failure)  # at once, while rewards are computed

    async def try_again() -> None:
        await grader.prepare("1/2", ["0.5"])
        assert grader.grade("1/2", ["0.5"]) == Grade(score=1.0)
        await grader.aclose()

    asyncio.run(try_again())
