"""The world as users keep theirs: a wiki-18 style corpus and Search-R1 style parquet files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from world import text
from world.facts import BRIDGES, Fact, Kind, World, WorldSize, relations_of
from world.text import Passage
from world.traces import Problem


def corpus(world: World, *, seed: int) -> list[Passage]:
    """One passage per fact, in random order."""
    rng = Random(f"corpus {seed}")
    passages = list(_passages(world, rng).values())
    rng.shuffle(passages)
    return passages


def _passages(world: World, rng: Random) -> dict[Fact, Passage]:
    return {fact: text.passage(fact, rng) for fact in world.facts}


def write_corpus(path: Path, passages: Sequence[Passage]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index, passage in enumerate(passages):
            file.write(json.dumps({"id": str(index), "contents": passage.contents}) + "\n")


def problems(world: World, size: WorldSize, *, split: str, seed: int) -> list[Problem]:
    """Half one-hop and half two-hop questions about the subjects of a split, one-hop first."""
    rng = Random(f"{split} {seed}")
    count = size.train_questions if split == "train" else size.test_questions
    mine = [f for f in world.facts if (f.subject.name in world.test_subjects) == (split == "test")]
    by_key = {(f.subject.name, f.relation.name): f for f in mine}
    chains = [
        (first, by_key[first.value.name, relation.name])
        for first in mine
        if first.relation in BRIDGES
        for relation in relations_of(Kind.person)
    ]
    one_hop = count - count // 2
    if len(mine) < one_hop or len(chains) < count // 2:
        raise ValueError(
            f"a world of {len(mine)} facts and {len(chains)} chains is too small for {count} questions"
        )
    single: list[tuple[Fact, ...]] = [(fact,) for fact in rng.sample(mine, one_hop)]
    return [_ask(hops, rng.randrange(2)) for hops in [*single, *rng.sample(chains, count // 2)]]


def _ask(hops: tuple[Fact, ...], wording: int) -> Problem:
    first, last = hops[0], hops[-1]
    if len(hops) == 1:
        question = text.one_hop_question(first.relation, first.subject, wording=wording)
    else:
        question = text.two_hop_question(first.relation, first.subject, last.relation, wording=wording)
    return Problem(question, hops, wording)


def write_questions(path: Path, asked: Sequence[Problem], *, split: str) -> None:
    counters: dict[str, int] = {}
    rows = []
    for number, problem in enumerate(asked):
        index = counters.get(problem.source, 0)
        counters[problem.source] = index + 1
        golds = problem.answer.golds
        rows.append(
            {
                "id": f"{split}_{number}",
                "question": problem.question,
                "golden_answers": golds,
                "data_source": problem.source,
                "prompt": [{"role": "user", "content": text.prompt(problem.question)}],
                "ability": "fact-reasoning",
                "reward_model": {"style": "rule", "ground_truth": {"target": golds}},
                "extra_info": {"split": split, "index": index},
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_examined(path: Path, asked: Sequence[Problem], *, world: World, seed: int) -> None:
    """Questions for `python -m IG doctor`, as JSONL, each with what a good search for every hop shows.

    That is the passage of the fact first, then two others about the same subject.
    """
    passages = _passages(world, Random(f"corpus {seed}"))
    rng = Random(f"examined {seed}")
    with path.open("w", encoding="utf-8") as file:
        for problem in asked:
            documents = []
            for fact, role in zip(problem.hops, ("first", "second"), strict=False):
                others = [other for other in world.about(fact.subject).values() if other != fact]
                shown = [passages[each] for each in [fact, *rng.sample(others, 2)]]
                documents.append({"text": text.documents(shown), "role": role})
            line = {"question": problem.question, "answers": problem.answer.golds, "documents": documents}
            file.write(json.dumps(line) + "\n")


def choose_examined(asked: Sequence[Problem], *, count: int) -> list[Problem]:
    """At most `count` questions, half of them one-hop and half two-hop, in their order."""
    kinds = {hops: [problem for problem in asked if len(problem.hops) == hops] for hops in (1, 2)}
    return [problem for problems in kinds.values() for problem in problems[: count // 2]]
