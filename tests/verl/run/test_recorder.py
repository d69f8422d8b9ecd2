from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.scripted_run import METHOD, decode, make_question, make_step, make_turn, search_turn
from verl.errors import DataError
from verl.run.rebuild import rebuild_step
from verl.run.recorder import Recorder
from verl.run.records import EVALUATION, count_calls, read_records
from verl.types import (
    Action,
    ActionKind,
    Credit,
    Finish,
    Gain,
    Observation,
    Passage,
    Score,
    Span,
    SpanKind,
    Stop,
    Trajectory,
    Turn,
    join_context,
)


def _record_step(run_dir: Path, step: int = 3) -> Path:
    scored = make_step(step, steps=6, num_questions=8, num_samples=5)
    return Recorder(run_dir, decode=decode).write(step, scored)


def test_a_step_is_rebuilt_from_its_file(tmp_path: Path) -> None:
    scored = make_step(3, steps=6, num_questions=8, num_samples=5)
    step = rebuild_step(read_records(_record_step(tmp_path)))
    assert any(s.failure for scores in step.scores for s in scores), "the script must contain a failure"
    assert step.scores == tuple(map(tuple, scored.scores))
    for group, again in zip(scored.groups, step.groups, strict=True):
        assert again.question == group.question
        for trajectory, rebuilt in zip(group.trajectories, again.trajectories, strict=True):
            np.testing.assert_array_equal(rebuilt.token_ids, trajectory.token_ids)
            np.testing.assert_array_equal(rebuilt.policy_mask, trajectory.policy_mask)
            np.testing.assert_allclose(rebuilt.sampling_log_probs, trajectory.sampling_log_probs, atol=1e-6)
            assert rebuilt.passages == trajectory.passages
            assert (rebuilt.answer, rebuilt.stop) == (trajectory.answer, trajectory.stop)


def test_dropped_observations_come_back_and_are_absent_where_there_are_none(tmp_path: Path) -> None:
    read = search_turn("where", [Passage(id="1", title="T", text="A town.", score=0.5)])
    turns = (replace(read, replacement_ids=read.output_ids[:2]), read, replace(read, num_dropped=1))
    trajectory = Trajectory(
        question=make_question(1), sample=0, prompt_ids=read.output_ids, turns=turns, stop=Stop.BUDGET
    )
    path = Recorder(tmp_path, decode=decode).write_evaluation(0, [trajectory], [Score(outcome=0.0)])
    (record,) = read_records(path)
    dropped = [(turn.get("num_dropped"), "replacement_ids" in turn) for turn in record["turns"]]
    assert dropped == [(None, True), (None, False), (1, False)]
    rebuilt = rebuild_step([record]).groups[0].trajectories[0]
    for number in range(3):
        np.testing.assert_array_equal(rebuilt.context_ids(number), trajectory.context_ids(number))
    assert len(rebuilt.context_ids(2)) == len(join_context(read.output_ids, turns[:2])) - (
        len(read.observation_ids) - 2
    )


def test_the_facts_of_turns_come_back_also_from_old_files(tmp_path: Path) -> None:
    pages = [Passage(id=str(k), title='"Bolton"', text="A town.", score=0.5) for k in range(3)]
    read = search_turn("where", pages[:1])
    overflowed = replace(read, observation_ids=read.observation_ids[:0], finish=Finish.LENGTH)
    call, thought = read.action.calls[0], Span(kind=SpanKind.THINK, start=0, end=2, text="hm", num_closing=1)
    twice = replace(
        read,
        action=replace(read.action, calls=(call, call), spans=(thought, *read.action.spans * 2)),
        observations=tuple(
            Observation(text=t, passages=p) for t, p in (("a", (*pages[:2],)), ("b", (*pages[2:],)))
        ),
    )
    turns = (read, overflowed, replace(overflowed, observations=()), twice)
    trajectory = Trajectory(
        question=make_question(1), sample=0, prompt_ids=read.output_ids, turns=turns, stop=Stop.LENGTH
    )
    path = Recorder(tmp_path, decode=decode).write_evaluation(0, [trajectory], [Score(outcome=0.0)])
    rebuilt = rebuild_step(read_records(path)).groups[0].trajectories[0]
    assert [turn.action for turn in rebuilt.turns] == [turn.action for turn in turns]
    assert [turn.finish for turn in rebuilt.turns] == [turn.finish for turn in turns]
    assert [turn.passages for turn in rebuilt.turns] == [turn.passages for turn in turns]
    assert rebuilt.observations[0] == read.observations[0]
    assert rebuilt.turns[3].observations == twice.observations
    assert [o.text for o in rebuilt.observations] == [o.text for o in trajectory.observations]

    early = json.loads(path.read_text())  # format 3 had no closing tags at first
    for turn in early["turns"]:
        for span in turn["action"]["spans"]:
            del span["num_closing"]
    path.with_name("step_000001.jsonl").write_text(json.dumps(early) + "\n")
    (record,) = read_records(path.with_name("step_000001.jsonl"))
    assert rebuild_step([record]).groups[0].trajectories[0].turns[0].action == turns[0].action

    line = json.loads(path.read_text())
    line["turns"].pop()  # they had one call in a turn
    del line["mask_runs"][-2:]
    for version in (2, 1):
        for turn in line["turns"]:
            action = turn["action"]
            if version == 2:
                del turn["observations"]
                (span,), (call,) = action.pop("spans"), action.pop("calls")
                action |= {"start": span["start"], "end": span["end"], **call}
            else:
                del turn["finish"], turn["is_executed"], action["tool"], action["arguments"]
                action["kind"] = "search"
        path.write_text(json.dumps(line | {"format": version}) + "\n")
        (record,) = read_records(path)
        assert [count_calls(turn) for turn in record["turns"]] == [1, int(version == 2), 0]
        old = rebuild_step([record]).groups[0].trajectories[0]
        assert [turn.action for turn in old.turns] == [turn.action for turn in turns[:3]]
        assert [len(turn.observations) for turn in old.turns] == [1, int(version == 2), 0]
        assert old.passages == (pages[0],)


def test_texts_are_cut_where_the_credit_changes_or_a_span_begins_or_ends(tmp_path: Path) -> None:
    """Also inside a character of several tokens, which has a text only as a whole."""

    def decode_bytes(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    text = "<search> Zo\u00eb </search>"
    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    query = Span(kind=SpanKind.QUERY, start=9, end=13, text="Zo\u00eb")
    turn = replace(search_turn("x", []), output_ids=ids, output_log_probs=np.zeros(len(ids), np.float32))
    turn = replace(turn, action=replace(turn.action, spans=(query,)), observation_ids=ids[:2])
    scored = make_step(3, steps=6, num_questions=1, num_samples=1)
    trajectory = replace(scored.groups[0].trajectories[0], prompt_ids=ids[:3], turns=(turn, turn))
    advantages = np.zeros(len(trajectory.token_ids), np.float32)
    advantages[3 + 9 : 3 + 12] = 0.5  # up to the first half of the last letter
    scored = replace(
        scored,
        groups=[replace(scored.groups[0], trajectories=(trajectory,))],
        scores=[[Score(outcome=1.0)]],
        credits=[[Credit(advantages=advantages, components={"reward": 1.0})]],
    )
    (record,) = read_records(Recorder(tmp_path, decode=decode_bytes).write(1, scored))
    end = (len(ids), len(text))
    assert record["turns"][0]["text_cuts"] == [(0, 0), (9, 9), (12, 11), (13, 12), end]
    assert record["turns"][1]["text_cuts"] == [(0, 0), (9, 9), (13, 12), end]


def test_the_method_on_a_rebuilt_step_gives_the_recorded_credit(tmp_path: Path) -> None:
    step = rebuild_step(read_records(_record_step(tmp_path)))
    spread = 0.0
    for computed, recorded in zip(METHOD.credit(step.groups, step.scores), step.credits, strict=True):
        for one, other in zip(computed, recorded, strict=True):
            assert other is not None
            np.testing.assert_allclose(other.advantages, one.advantages, atol=1e-6)
            assert other.components == one.components
            spread = max(spread, float(np.abs(other.advantages).max(initial=0.0)))
    assert spread > 0.5, "a comparison of zeros shows nothing"


def test_gains_and_components_of_turns_come_back(tmp_path: Path) -> None:
    scored = make_step(3, steps=6, num_questions=1, num_samples=2)
    trajectories = scored.groups[0].trajectories
    gains = [Gain(turns=(0.25, *[None] * (len(t.turns) - 1))) for t in trajectories]
    gains[1] = replace(gains[1], failure="gain_failed: IG service: HTTP 500")
    scores = [replace(s, gain=gain) for s, gain in zip(scored.scores[0], gains, strict=True)]
    credits = [
        replace(credit, components={"reward": 1.0, "turn_gain": gain.turns})
        for credit, gain in zip(scored.credits[0], gains, strict=True)
    ]
    scored = replace(scored, scores=[scores], credits=[credits])
    step = rebuild_step(read_records(Recorder(tmp_path, decode=decode).write(1, scored)))
    assert [score.gain for score in step.scores[0]] == gains
    assert [credit and credit.components for credit in step.credits[0]] == [c.components for c in credits]


def test_a_file_of_format_1_is_read(tmp_path: Path) -> None:
    path = _record_step(tmp_path)
    new = rebuild_step(read_records(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for key in ("format", "turn_gains", "gain_failure", "components"):
            del line[key]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = rebuild_step(read_records(path))
    assert [[s.gain.trajectory for s in of_group] for of_group in old.scores] == [
        [s.gain.trajectory for s in of_group] for of_group in new.scores
    ]


@pytest.mark.parametrize("version", [0, 99])
def test_a_file_of_an_unknown_format_is_named_before_its_shape(tmp_path: Path, version: int) -> None:
    path = tmp_path / "step_000001.jsonl"
    path.write_text(f'{{"format": {version}, "everything_else": "new"}}\n')
    with pytest.raises(DataError, match=rf"jsonl:1: format {version} was found, formats 1 to 3 are read"):
        read_records(path)


def test_a_line_is_readable_by_itself(tmp_path: Path) -> None:
    question = make_question(1)
    passage = Passage(id="9", title='"Bolton"', text="A town.\u2028 \ud800", score=float("nan"))
    turns = (search_turn("where", [passage]), make_turn("??", Action(kind=ActionKind.INVALID)))
    prompt = np.array([81, 58], dtype=np.int32)
    failed = Trajectory(
        question=question,
        sample=0,
        prompt_ids=prompt,
        turns=turns,
        stop=Stop.FAILED,
        failure="search_failed: http://u:pw@h/",
    )
    verdict = Score(outcome=None, failure=failed.failure)
    path = Recorder(tmp_path, decode=decode).write_evaluation(0, [failed], [verdict])
    assert path == tmp_path / EVALUATION / "step_000000.jsonl"
    (line,) = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert line["prompt_text"] == "Q:"
    assert line["mask_runs"] == [2, len(turns[0].output_ids), len(turns[0].observation_ids), 2, 0]
    assert line["turns"][0]["action"]["text"] == "where"
    assert line["turns"][0]["passages"][0]["score"] is None
    assert line["failure"] == "search_failed: http://***@h/"
    assert line["advantage"] is None
    assert "NaN" not in path.read_text()


def test_a_non_finite_log_prob_is_null_and_comes_back_as_nan(tmp_path: Path) -> None:
    scored = make_step(2, steps=2, num_questions=1, num_samples=2)
    whole = scored.groups[0]
    broken = whole.trajectories[0]
    turn = replace(
        broken.turns[0], output_log_probs=np.full(len(broken.turns[0].output_ids), np.nan, np.float32)
    )
    group = replace(
        whole, trajectories=(replace(broken, turns=(turn, *broken.turns[1:])), whole.trajectories[1])
    )
    path = Recorder(tmp_path, decode=decode).write(1, replace(scored, groups=[group]))
    rebuilt = rebuild_step(read_records(path)).groups[0].trajectories[0]
    assert np.isnan(rebuilt.turns[0].output_log_probs).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda line: b'{"step": 3}', "kind: Field required"),
        (lambda line: line[: len(line) // 2], "Invalid JSON"),
        (lambda line: line.replace(b'"question": "', b'"question": "\xff'), "invalid unicode"),
        (lambda line: line.replace(b'"turns": [', b'"turns": [7, '), "turns.0: Input should be"),
        (lambda line: b"[]", "should be an object|valid dictionary"),
        (lambda line: b"", "Invalid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: Callable[[bytes], bytes], named: str) -> None:
    path = _record_step(tmp_path)
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, change(rest[0]).rstrip(b"\n") + b"\n", *rest[1:]]))
    with pytest.raises(DataError, match=rf"step_000003\.jsonl:2: .*({named})"):
        read_records(path)
    with pytest.raises(DataError, match="is not there"):
        read_records(tmp_path / "absent.jsonl")


def test_log_probs_are_rounded_as_decimals(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    exact_halves = np.arange(-9, 9, dtype=np.float32) / 128  # 7 decimals that end in 5
    log_probs = np.concatenate([rng.normal(-1, 4, 500).astype(np.float32), exact_halves])
    turn = Turn(
        output_ids=np.arange(len(log_probs), dtype=np.int32),
        output_log_probs=log_probs,
        action=Action(kind=ActionKind.INVALID),
    )
    trajectory = Trajectory(
        question=make_question(0),
        sample=0,
        prompt_ids=np.arange(3, dtype=np.int32),
        turns=(turn,),
        stop=Stop.ANSWERED,
    )
    path = Recorder(tmp_path, decode=decode).write_evaluation(0, [trajectory], [Score(outcome=1.0)])
    (record,) = read_records(path)
    assert record["turns"][0]["output_log_probs"] == [round(float(x), 6) for x in log_probs]
