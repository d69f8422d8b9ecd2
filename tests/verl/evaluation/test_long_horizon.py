"""Searches of many hops: the set, one episode of 61 turns with a real retriever, and the factors."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from make_world import main as make_world

from search_r1.search.bm25 import load_bm25
from search_r1.search.client import HttpSearch
from search_r1.search.retriever import ThreadedRetriever
from tests.agents import make_agent
from tests.fakes import CharTokenizer
from tests.search_r1.search.servers import serving
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import score_answer
from verl.evaluation.long_horizon import Ending, HopScore, main, score_hops, summarize_hops
from verl.evaluation.records import TRAJECTORIES_FILE, ResultWriter
from verl.run.rebuild import rebuild_trajectory
from verl.run.records import TrajectoryRecord, read_records
from verl.trainer.ppo.metrics import rollout_metrics
from verl.types import Completion, Finish, IntArray, Message, Question, Sampling, Stop, Trajectory
from world.long_horizon import draw_trails

CHARS = CharTokenizer()
HOPS = [1, 4, 30]
DROPPED = "removed"
LIMITS = {"max_turns": 64, "max_prompt_length": 14_000, "max_response_length": 200, "max_obs_length": 900}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of one question of each length, made by the command."""
    out = tmp_path_factory.mktemp("long") / "set"
    make_world(["long-horizon", "--hops", *map(str, HOPS), "--questions", "1", "--out", str(out)])
    return out


def read_rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "test.parquet").to_pylist()
    return rows


def test_the_path_is_in_the_corpus_and_not_in_the_question(folder: Path) -> None:
    corpus = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    contents = {line["id"]: line["contents"] for line in corpus}
    assert len(corpus) == 6 * sum(HOPS)
    for row, num_hops in zip(read_rows(folder), HOPS, strict=True):
        extra = row["extra_info"]
        path, ids = extra["path"], extra["supporting_ids"]
        assert (extra["num_hops"], len(path), len(set(path))) == (num_hops, num_hops, num_hops)
        assert [contents[name] for name in ids] == extra["supporting_texts"]
        for person, following, evidence in zip(
            path, [*path[1:], None], extra["supporting_texts"], strict=True
        ):
            assert evidence.startswith(f'"{person}"\n')
            assert (following or row["golden_answers"][0]) in evidence
        # The first person alone is named, and each name stands on its own page and the one before it.
        assert [person for person in path if person in row["question"]] == path[:1]
        for number, person in enumerate(path):
            pages = {text.split("\n")[0] for text in contents.values() if person in text}
            assert pages == {f'"{name}"' for name in path[max(0, number - 1) : number + 1]}
    assert draw_trails(HOPS, seed=0) == draw_trails(HOPS, seed=0) != draw_trails(HOPS, seed=1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--hops", "0"], "at least 1 hop"),
        (["--hops", "3000"], "names are wanted"),
        (["--questions", "0"], "--questions is 0, expected at least 1"),
        (["--questions", "-1"], "--questions is -1, expected at least 1"),
    ],
)
def test_a_set_that_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_world(["long-horizon", *options, "--out", str(tmp_path / "set")])
    assert complaint in capsys.readouterr().err


class Follower:
    """A policy that searches for a person, opens the page and goes on to the person that it names.

    It reads nothing but the last observation of its context, as a real one could.
    """

    def __init__(self) -> None:
        self.contexts: list[list[int]] = []

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        self.contexts.append(prompt_ids.tolist())
        ids = CHARS.encode(self.write(CHARS.decode(self.contexts[-1])))
        return Completion(
            ids=np.array(ids, np.int32),
            log_probs=np.full(len(ids), -0.5, np.float32),
            finish=Finish.STOP,
            version=0,
        )

    def write(self, context: str) -> str:
        before, _, last = context.rpartition("<tool_call>")
        if not before:
            (person,) = re.findall(r"trail of (.+) end\?", context)
            return self.search(person)
        called, _, observation = last.partition("</tool_call>")
        call = json.loads(called)
        if call["name"] == "search":
            (person,) = call["arguments"]["query"]
            found = re.search(rf'\(Id: (\d+), Title: "{person}"\)', observation)
            assert found is not None, observation
            return write_call("open_page", id=found[1], part="1")
        end = re.search(r"trail end of [\w ]+ is ([\w ]+)", observation)
        if end is not None:
            return f"<answer> {end[1]} </answer>"
        link = re.search(
            r"The (?:heir|mentor|rival|editor|neighbor|witness|godparent|apprentice) of [\w ]+ is ([\w ]+)\.",
            observation,
        )
        assert link is not None, observation
        return self.search(link[1])

    @staticmethod
    def search(person: str) -> str:
        return f"<think> Next is {person}. </think>" + write_call("search", query=[person])


def write_call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@asynccontextmanager
async def searching(folder: Path) -> AsyncIterator[HttpSearch]:
    """The retriever of the set, over a real socket."""
    found = load_bm25(folder / "bm25", corpus_path=folder / "corpus.jsonl")
    retriever = ThreadedRetriever(found, facts=found.facts())
    async with serving(retriever, corpus_path=folder / "corpus.jsonl") as client:
        search = HttpSearch(str(client.base_url), topk=3, timeout_s=60.0)
        yield search
        await search.aclose()


Episode = tuple[Trajectory, Follower]


def play_all(folder: Path, *, dropped_text: str | None = DROPPED) -> list[Episode]:
    """Play one episode per question."""

    async def play(row: dict[str, Any], search: HttpSearch) -> Episode:
        policy, extra = Follower(), row["extra_info"]
        question = Question(
            uid=f"{row['data_source']}/{extra['split']}/{extra['index']}",
            text=row["question"],
            messages=(Message(role="user", content=row["question"]),),
            golds=tuple(row["golden_answers"]),
            data_source=row["data_source"],
        )
        agent = make_agent(
            policy,
            search,
            tokenizer=CHARS,
            name="tool_calls",
            tools=("search", "open_page"),
            dropped_text=dropped_text,
            **LIMITS,
        )
        return await agent.run(question, sample=0, seed=0, greedy=True), policy

    async def play_each() -> list[Episode]:
        async with searching(folder) as search:
            return [await play(row, search) for row in read_rows(folder)]

    return asyncio.run(play_each())


@pytest.fixture(scope="module")
def episodes(folder: Path) -> list[Episode]:
    return play_all(folder)


@pytest.fixture
def run(folder: Path, episodes: list[Episode], tmp_path: Path) -> Path:
    """The folder of an evaluation with these episodes and a failed one."""
    writer = ResultWriter(tmp_path / "run", decode=CHARS.decode)
    first, _ = episodes[0]
    failed = replace(first, sample=1, stop=Stop.FAILED, failure="search_failed: x")
    for trajectory in [*(trajectory for trajectory, _ in episodes), failed]:
        writer.write(trajectory, score=score_answer(trajectory, outcome=measure_outcome))
    writer.close()
    return tmp_path / "run"


def test_sixty_turns_fit_into_the_context_and_each_can_be_rebuilt(episodes: list[Episode], run: Path) -> None:
    trajectory, policy = episodes[-1]
    assert (trajectory.stop, len(trajectory.turns)) == (Stop.ANSWERED, 2 * HOPS[-1] + 1)
    assert trajectory.answer in trajectory.question.golds
    limit = LIMITS["max_prompt_length"]
    assert len(trajectory.token_ids) > 1.5 * limit
    assert [len(context) <= limit for context in policy.contexts] == [True] * len(policy.contexts)
    dropped = [turn.num_dropped for turn in trajectory.turns]
    assert dropped == sorted(dropped)
    assert dropped[0] == 0 < dropped[-1] < len(trajectory.turns) - 1
    # The mask covers what was sampled, and nothing of what was dropped or replaced it.
    sampled = np.concatenate([turn.output_ids for turn in trajectory.turns])
    assert np.array_equal(trajectory.token_ids[trajectory.policy_mask], sampled)
    uid = trajectory.question.uid
    (record,) = (r for r in read_records(run / TRAJECTORIES_FILE) if r["uid"] == uid)
    rebuilt = rebuild_trajectory(record)
    for number, context in enumerate(policy.contexts):
        assert trajectory.context_ids(number).tolist() == context
        assert rebuilt.context_ids(number).tolist() == context
        assert CHARS.decode(context).count(DROPPED) == sum(
            len(turn.replacement_ids) > 0 for turn in trajectory.turns[: dropped[number]]
        )
    metrics = rollout_metrics([trajectory])
    assert (
        metrics["rollout/dropped_observations"]
        == sum(len(t.replacement_ids) > 0 for t in trajectory.turns)
        > 0
    )
    assert metrics["rollout/searches_mean"] == 2 * HOPS[-1]


def test_without_dropping_the_context_ends_the_episode(folder: Path) -> None:
    ended, _ = play_all(folder, dropped_text=None)[-1]
    assert (ended.stop, ended.answer, ended.is_one_sequence) == (Stop.LENGTH, None, True)
    assert len(ended.turns) < 2 * HOPS[-1]


def test_the_factors_of_an_evaluation(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), "--data", str(folder / "test.parquet")])
    assert "knowledge_sufficiency" in capsys.readouterr().out
    found = json.loads((run / "long_horizon.json").read_text())
    assert found["failed"] == 1
    assert list(found["factors"]) == ["all", "1 hops", "4 hops", "30 hops"]
    longest, everything = found["episodes"][-1], found["factors"]["all"]
    assert {
        key: longest[key] for key in ("num_hops", "hops_found", "hops_in_order", "furthest_hop")
    } == dict.fromkeys(("num_hops", "hops_found", "hops_in_order", "furthest_hop"), 30)
    assert 0 < longest["hops_kept"] < 30
    assert (longest["num_calls"], longest["ending"]) == (60, "right")
    assert (everything["knowledge_sufficiency"], everything["knowledge_utilization"]) == (1.0, 1.0)
    assert (everything["good_refusal"], everything["guessed"], everything["calls_per_hop"]) == (
        None,
        None,
        2.0,
    )


def test_a_file_of_other_questions_is_named(folder: Path, run: Path, tmp_path: Path) -> None:
    table = pq.read_table(folder / "test.parquet")
    pq.write_table(table.slice(1), tmp_path / "other.parquet")
    for file, complaint in [
        ("other.parquet", "world_long_horizon/test/0 has no passages"),
        ("gone", "no such file"),
    ]:
        with pytest.raises(SystemExit, match=complaint):
            main([str(run), "--data", str(tmp_path / file)])


def make_record(reads: list[list[str]], answer: str | None, *, em: float = 0.0) -> TrajectoryRecord:
    turns = [
        {
            "passages": [{"id": name.rstrip("-"), "is_cut": name.endswith("-")} for name in ids],
            "observations": [{}] * bool(ids),
            "replacement_ids": [1],
        }
        for ids in reads
    ]
    turns[-1]["num_dropped"] = 1  # the first turn is out of the context
    record: dict[str, Any] = {"uid": "q", "turns": turns, "answer": answer, "metrics": {"em": em}}
    return cast(TrajectoryRecord, record)


@pytest.mark.parametrize(
    ("reads", "answer", "em", "expected"),
    [
        # found, in order, furthest, kept, calls, ending; a- is a passage that was cut
        ([["x"], ["a", "b-"], []], "y", 0.0, (1, 1, 1, 1, 2, "wrong")),
        ([["a", "x"], ["b"], ["c"], []], "y", 1.0, (3, 3, 3, 2, 3, "right")),
        ([["a"], ["c"], []], "y", 0.0, (2, 1, 3, 1, 2, "wrong")),
        ([["x"], []], " ", 0.0, (0, 0, 0, 0, 1, "refused")),
        ([["c"], ["b", "c"], []], None, 0.0, (2, 0, 3, 2, 2, "refused")),
    ],
)
def test_how_far_an_episode_came(
    reads: list[list[str]], answer: str | None, em: float, expected: tuple[int | str, ...]
) -> None:
    score = score_hops(make_record(reads, answer, em=em), ["a", "b", "c"])
    hops = (score.hops_found, score.hops_in_order, score.furthest_hop, score.hops_kept)
    assert (*hops, score.num_calls, score.ending) == expected
    assert score.is_sufficient == (expected[0] == 3)


def test_factors_of_worked_episodes() -> None:
    def episode(hops_found: int, ending: Ending) -> HopScore:
        return HopScore(
            uid="q",
            num_hops=4,
            hops_found=hops_found,
            hops_in_order=hops_found,
            furthest_hop=hops_found,
            hops_kept=1,
            num_calls=5,
            ending=ending,
        )

    right, wrong, refused = Ending
    scores = [
        *(episode(4, ending) for ending in (right, right, wrong, refused)),
        *(episode(2, ending) for ending in (refused, refused, wrong, right)),
    ]
    assert summarize_hops(scores) == {
        "episodes": 8,
        "right": 3 / 8,
        "knowledge_sufficiency": 0.5,
        "knowledge_utilization": 0.5,
        "good_refusal": 0.5,
        "good_refusal_precision": 2 / 3,
        "guessed": 0.25,
        "hops_found_share": 0.75,
        "hops_in_order_mean": 3.0,
        "furthest_hop_mean": 3.0,
        "hops_kept_share": 0.25,
        "calls_per_hop": 40 / 24,
    }
    assert summarize_hops([])["right"] is None
