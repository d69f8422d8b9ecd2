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
from world.asking import Asked
from world.facts import BRIDGES, Fact, Kind, World, WorldSize, relations_of
from world.traces import Problem

SPLITS = ("train", "test")
ROLES = ("first", "second", "third", "fourth")


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


Routes = Sequence[Sequence[tuple[str, str]]]
"""For each hop of a question, id and contents of every passage that states its fact, the usual one first."""


def number_passages(passages: Mapping[Fact, str]) -> dict[Fact, list[tuple[str, str]]]:
    """Return id and contents of the passage of each fact of a corpus."""
    return {fact: [(str(number), contents)] for number, (fact, contents) in enumerate(passages.items())}


def write_questions(path: Path, problems: Sequence[Asked], *, routes: Sequence[Routes], split: str) -> None:
    """Write questions as Search-R1's parquet rows; `extra_info.index` counts within each source.

    The supporting passages of a question are the usual ones of its hops. Where a hop has several,
    `extra_info.routes` has the ids of all, hop by hop.
    """
    counts: defaultdict[str, Iterator[int]] = defaultdict(count)
    has_choice = any(len(passages) > 1 for hops in routes for passages in hops)
    rows = [
        {
            "id": f"{split}_{number}",
            "question": problem.question,
            "golden_answers": list(problem.answer.golds),
            "data_source": problem.source,
            "prompt": [{"role": "user", "content": text.prompt(problem.question)}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": list(problem.answer.golds)}},
            "extra_info": {
                "split": split,
                "index": next(counts[problem.source]),
                "supporting_ids": [passages[0][0] for passages in hops],
                "supporting_texts": [passages[0][1] for passages in hops],
                **({"routes": [[found for found, _ in passages] for passages in hops]} if has_choice else {}),
            },
        }
        for number, (problem, hops) in enumerate(zip(problems, routes, strict=True))
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
    chosen = [*one_hop[: num_questions // 2], *two_hops[: num_questions // 2]]
    write_documents(path, [(problem, [search(fact) for fact in problem.hops]) for problem in chosen])


def write_documents(path: Path, questions: Iterable[tuple[Asked, Sequence[str]]]) -> None:
    """Write questions, each with the text that every hop's search shows, for `python -m IG doctor`."""
    _write_lines(
        path,
        (
            {
                "question": problem.question,
                "answers": list(problem.answer.golds),
                "documents": [
                    {"text": shown, "role": role} for shown, role in zip(searches, ROLES, strict=False)
                ],
            }
            for problem, searches in questions
        ),
    )
