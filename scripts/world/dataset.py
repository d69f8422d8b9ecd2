"""The world as users keep theirs: a wiki-18 style corpus and Search-R1 style parquet files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from world import text
from world.facts import BRIDGES, Fact, Kind, World, WorldSize, relations_of
from world.traces import Problem


def corpus(world: World, *, seed: int) -> dict[Fact, str]:
    """Return the contents of the passage of every fact, in random order."""
    rng = Random(f"corpus {seed}")
    contents = list(_contents(world, rng).items())
    rng.shuffle(contents)
    return dict(contents)


def _contents(world: World, rng: Random) -> dict[Fact, str]:
    return {fact: text.write_contents(fact, rng) for fact in world.facts}


def write_corpus(path: Path, contents: Iterable[str]) -> None:
    """Write the corpus file of the retriever; the id of a passage is its number."""
    _write_lines(path, ({"id": str(k), "contents": line} for k, line in enumerate(contents)))


def _write_lines(path: Path, rows: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def problems(world: World, size: WorldSize, *, split: str, seed: int) -> list[Problem]:
    """Draw questions about the subjects of a split, half one-hop, then half two-hop.

    Raises ValueError when the world is too small.
    """
    rng = Random(f"{split} {seed}")
    number = size.train_questions if split == "train" else size.test_questions
    known = [f for f in world.facts if (f.subject.name in world.test_subjects) == (split == "test")]
    by_key = {(f.subject.name, f.relation.name): f for f in known}
    chains = [
        (first, by_key[first.value.name, relation.name])
        for first in known
        if first.relation in BRIDGES
        for relation in relations_of(Kind.person)
    ]
    one_hop = number - number // 2
    if len(known) < one_hop or len(chains) < number // 2:
        raise ValueError(
            f"a world of {len(known)} facts and {len(chains)} chains is too small for {number} questions"
        )
    single: list[tuple[Fact, ...]] = [(fact,) for fact in rng.sample(known, one_hop)]
    return [Problem(hops, rng.randrange(2)) for hops in [*single, *rng.sample(chains, number // 2)]]


def write_questions(
    path: Path, problems: Sequence[Problem], *, passages: Mapping[Fact, str], split: str
) -> None:
    """Write questions as Search-R1's parquet rows; `extra_info.index` counts within each source.

    `passages` is the corpus: every question has the ids and the texts of the passages of its facts.
    """
    counts: defaultdict[str, Iterator[int]] = defaultdict(count)
    ids = {fact: str(number) for number, fact in enumerate(passages)}
    rows = [
        {
            "id": f"{split}_{number}",
            "question": problem.question,
            "golden_answers": problem.answer.golds,
            "data_source": problem.source,
            "prompt": [{"role": "user", "content": text.prompt(problem.question)}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": problem.answer.golds}},
            "extra_info": {
                "split": split,
                "index": next(counts[problem.source]),
                "supporting_ids": [ids[fact] for fact in problem.hops],
                "supporting_texts": [passages[fact] for fact in problem.hops],
            },
        }
        for number, problem in enumerate(problems)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_examined(
    path: Path, problems: Sequence[Problem], *, num_questions: int, world: World, seed: int
) -> None:
    """Write at most so many questions for `python -m IG doctor`, half one-hop and half two-hop, as JSONL.

    Each comes with what a good search for every hop shows: the passage of the fact, then two others about the
    same subject.
    """
    contents = _contents(world, Random(f"corpus {seed}"))
    rng = Random(f"examined {seed}")

    def search(fact: Fact) -> str:
        others = [other for other in world.facts if other.subject == fact.subject and other != fact]
        return text.documents([contents[found] for found in [fact, *rng.sample(others, 2)]])

    one_hop, two_hops = ([p for p in problems if len(p.hops) == hops] for hops in (1, 2))
    _write_lines(
        path,
        [
            {
                "question": problem.question,
                "answers": problem.answer.golds,
                "documents": [
                    {"text": search(fact), "role": role}
                    for fact, role in zip(problem.hops, ("first", "second"), strict=False)
                ],
            }
            for problem in [*one_hop[: num_questions // 2], *two_hops[: num_questions // 2]]
        ],
    )
