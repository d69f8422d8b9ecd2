"""The hard world as users keep theirs: corpus, questions, and the questions for `python -m IG doctor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from worlds import SETTINGS_FILE

from serving.files import write_json_atomically
from world import dataset
from world.hard import text
from world.hard.facts import Fact, Problem, World, WorldSize, draw_problems

MAX_SEARCHES = 6
"""Of an episode: two more than the longest chain of hops."""


def write_data(out: Path, world: World, size: WorldSize, *, seed: int) -> None:
    """Write corpus.jsonl, train.parquet, test.parquet, doctor.jsonl, and the settings of runs."""
    out.mkdir(parents=True, exist_ok=True)
    passages, routes = draw_corpus(world, seed=seed)
    dataset.write_corpus(out / "corpus.jsonl", passages)
    for split in ("train", "test"):
        problems = draw_problems(world, size, split=split, seed=seed)
        chosen = [[routes[fact] for fact in problem.hops] for problem in problems]
        dataset.write_questions(out / f"{split}.parquet", problems, routes=chosen, split=split)
    write_examined(
        out / "doctor.jsonl", problems[: size.examined_questions], world=world, routes=routes, seed=seed
    )
    settings = {"trainer": [f"max_turns={MAX_SEARCHES}"]}
    write_json_atomically(out / SETTINGS_FILE, settings)


def draw_corpus(world: World, *, seed: int) -> tuple[list[str], dict[Fact, list[tuple[str, str]]]]:
    """Return all passages in random order, and for every fact (id, contents) of those that state it."""
    by_contents: dict[str, list[Fact]] = {}
    for fact in world.facts:
        if fact not in world.only_in_records:
            by_contents[text.write_fact(fact)] = [fact]
    for subject, stated in world.records.items():
        by_contents[text.write_records(subject, stated)] = list(stated)
    passages = list(by_contents)
    Random(f"hard corpus {seed}").shuffle(passages)
    routes: dict[Fact, list[tuple[str, str]]] = {fact: [] for fact in world.facts}
    for number, contents in enumerate(passages):
        for fact in by_contents[contents]:
            routes[fact].append((str(number), contents))
    return passages, {
        fact: sorted(found, key=lambda route: _order(fact, route)) for fact, found in routes.items()
    }


def _order(fact: Fact, route: tuple[str, str]) -> bool:
    """Sort the passage of the fact alone before the one of several facts."""
    return route[1] != text.write_fact(fact)


def write_examined(
    path: Path,
    problems: Sequence[Problem],
    *,
    world: World,
    routes: Mapping[Fact, Sequence[tuple[str, str]]],
    seed: int,
) -> None:
    """Write questions with what a good search for every hop shows: its passage, two others of the subject."""
    rng = Random(f"hard examined {seed}")

    def search(fact: Fact) -> str:
        first = routes[fact][0][1]
        others = {routes[other][0][1] for other in world.facts if other.subject == fact.subject} - {first}
        return text.documents([first, *rng.sample(sorted(others), min(2, len(others)))])

    dataset.write_documents(path, [(p, [search(fact) for fact in p.hops]) for p in problems])
