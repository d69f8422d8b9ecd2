"""Questions whose answer is many hops away, with the corpus to search for it.

A trail leads from person to person. Each has a page, which is several consecutive passages with the person's
name as title: facts that lead nowhere and, at a random place among them, the link to the next person. Links
are of many kinds, and the question names the first person alone, so that nothing but the pages says which
way the trail goes. The last page says where it ends.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from search_r1.search.bm25 import build_bm25
from world import dataset, text
from world.facts import Entity, Fact, Kind, Relation, draw_names, make_entity, random_entity, relations_of

SOURCE = "world_long_horizon"
LINKS = tuple(
    Relation(name, Kind.person, Kind.person, ("", ""))
    for name in ("heir", "mentor", "rival", "editor", "neighbor", "witness", "godparent", "apprentice")
)
"""Relations that lead on; their questions are never asked."""
END = Relation("trail end", Kind.person, Kind.town, ("Where does the trail of {x} end?", ""))
FACTS_PER_PAGE = tuple(
    relation for relation in relations_of(Kind.person) if relation.value is not Kind.person
)
"""Further facts on a page: birthplace, residence, university, award, instrument."""


@dataclass(frozen=True, slots=True)
class Trail:
    """The facts that lead to the answer, one per hop, and all passages of the pages that they are on."""

    hops: tuple[Fact, ...]
    passages: tuple[tuple[Fact, str], ...]
    """Each fact of each page with its contents, pages in random order."""

    @property
    def question(self) -> str:
        return END.wordings[0].format(x=self.hops[0].subject.name)

    @property
    def answer(self) -> Entity:
        return self.hops[-1].value


def draw_trails(hops: Sequence[int], *, seed: int) -> list[Trail]:
    """Draw one trail per entry of `hops`, which is its number of hops; no person is on two trails.

    Raises ValueError for trails that are too short, and when there are not enough names.
    """
    if any(length < 1 for length in hops):
        raise ValueError(f"a trail must have at least 1 hop, got {min(hops)}")
    rng = Random(f"long horizon {seed}")
    names = iter(draw_names(Kind.person, sum(hops), rng))
    return [_draw_trail([make_entity(Kind.person, *next(names)) for _ in range(n)], rng) for n in hops]


def _draw_trail(persons: Sequence[Entity], rng: Random) -> Trail:
    links = [Fact(person, rng.choice(LINKS), following) for person, following in itertools.pairwise(persons)]
    hops = (*links, Fact(persons[-1], END, random_entity(Kind.town, rng)))
    pages = []
    for hop in hops:
        page = [Fact(hop.subject, r, random_entity(r.value, rng)) for r in FACTS_PER_PAGE]
        page.insert(rng.randrange(len(page) + 1), hop)
        pages.append([(fact, text.write_contents(fact, rng)) for fact in page])
    rng.shuffle(pages)
    return Trail(hops, tuple(passage for page in pages for passage in page))


def write_set(folder: Path, trails: Sequence[Trail]) -> None:
    """Write corpus, questions and the BM25 index of the corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    passages = {fact: contents for trail in trails for fact, contents in trail.passages}
    ids = {fact: str(number) for number, fact in enumerate(passages)}
    dataset.write_corpus(folder / "corpus.jsonl", passages.values())
    rows = [
        {
            "id": f"test_{number}",
            "question": trail.question,
            "golden_answers": trail.answer.golds,
            "data_source": SOURCE,
            "prompt": [{"role": "user", "content": trail.question}],
            "ability": "long-horizon-search",
            "reward_model": {"style": "rule", "ground_truth": {"target": trail.answer.golds}},
            "extra_info": {
                "split": "test",
                "index": number,
                "num_hops": len(trail.hops),
                "path": [fact.subject.name for fact in trail.hops],
                "supporting_ids": [ids[fact] for fact in trail.hops],
                "supporting_texts": [passages[fact] for fact in trail.hops],
            },
        }
        for number, trail in enumerate(trails)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    build_bm25(folder / "corpus.jsonl", index_path=folder / "bm25")


def main(arguments: Sequence[str]) -> None:
    """Write the set; exit with status 2, and with what to do, if it cannot be made."""
    parser = argparse.ArgumentParser(
        prog="make_world.py long-horizon",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--hops",
        nargs="+",
        type=int,
        default=[4, 8, 16, 30],
        help="lengths of the trails (default 4 8 16 30)",
    )
    parser.add_argument("--questions", type=int, default=10, help="questions of each length (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="what the trails are drawn from (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    chosen = parser.parse_args(arguments)
    if chosen.questions < 1:
        parser.error(f"--questions is {chosen.questions}, expected at least 1")
    try:
        trails = draw_trails(
            [length for length in chosen.hops for _ in range(chosen.questions)], seed=chosen.seed
        )
        write_set(chosen.out, trails)
    except ValueError as error:
        parser.error(str(error))
