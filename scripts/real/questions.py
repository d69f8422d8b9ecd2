"""One- and two-hop questions about records, and the files that retriever, trainer and doctor read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from real.facts import Fact, Record
from serving.files import write_atomically
from verl.agent.tools.search import render_passages
from verl.types import Passage

ONE_HOP, TWO_HOP = "real_onehop", "real_twohop"
_TEST_SHARE = 0.15
_FORWARD_SHARE = 0.25
"""Of two-hop questions: those that go on from a value, as `the country where radium was discovered` does."""
_SECOND_HOPS = frozenset(
    ("capital", "currency", "peak", "domain", "independence", "legislature", "anthem", "people", "language")
) | {"discoverer", "year", "place", "series", "cas"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question and the facts that lead to its answer."""

    text: str
    hops: tuple[Fact, ...]

    @property
    def golds(self) -> tuple[str, ...]:
        """Return the accepted answers."""
        return self.hops[-1].golds

    @property
    def source(self) -> str:
        """Return the name of its kind in metrics."""
        return ONE_HOP if len(self.hops) == 1 else TWO_HOP

    @property
    def queries(self) -> tuple[str, ...]:
        """Return a good query for each hop."""
        first, last = self.hops[0], self.hops[-1]
        asked = last.relation.query or last.relation.phrase
        found = asked.format(x=last.subject)
        if first is last:
            return (found,)
        if first.subject == last.subject:
            return (first.relation.bridge.format(x=first.value).removeprefix("the "), found)
        return (first.relation.leads.format(x=first.subject).removeprefix("the "), found)


def draw_split(records: Sequence[Record], *, seed: int) -> frozenset[str]:
    """Draw the subjects that only test questions are about."""
    names = sorted(record.subject for record in records if record.facts)
    return frozenset(Random(f"split {seed}").sample(names, round(_TEST_SHARE * len(names))))


def one_hop(records: Sequence[Record]) -> list[Problem]:
    """Return a question for every fact."""
    return [
        Problem(text=fact.relation.question.format(x=fact.subject), hops=(fact,))
        for record in records
        for fact in record.facts.values()
    ]


def two_hops(records: Sequence[Record]) -> tuple[list[Problem], list[Problem]]:
    """Return the questions that begin with a value of only one subject, and those that lead to one."""
    facts = [fact for record in records for fact in record.facts.values()]
    seen = Counter((fact.relation.name, gold) for fact in facts for gold in fact.golds)
    by_name = {record.subject.removeprefix("the "): record for record in records}
    bridged, forward = [], []
    for record in records:
        for first in record.facts.values():
            others = [fact for fact in _ends(record) if fact.relation is not first.relation]
            if first.relation.bridge and seen[first.relation.name, first.value] == 1:
                phrase = first.relation.bridge.format(x=first.value)
                bridged += [_join(phrase, first, last) for last in others]
            target = next((by_name[gold] for gold in first.golds if gold in by_name), None)
            if first.relation.leads and target is not None:
                phrase = first.relation.leads.format(x=first.subject)
                forward += [_join(phrase, first, last) for last in _ends(target)]
    return bridged, forward


def _ends(record: Record) -> list[Fact]:
    return [fact for fact in record.facts.values() if fact.relation.name in _SECOND_HOPS]


def _join(phrase: str, first: Fact, last: Fact) -> Problem:
    return Problem(text=last.relation.question.format(x=phrase), hops=(first, last))


def draw_problems(
    records: Sequence[Record], *, num_one_hop: int, num_two_hop: int, seed: int
) -> dict[str, list[Problem]]:
    """Draw so many questions, without replacement, and return those of `train` and `test`.

    A question is of the test if the subject of its first fact is. Raises ValueError for too few facts.
    """
    rng = Random(f"questions {seed}")
    bridged, forward = two_hops(records)
    num_forward = round(_FORWARD_SHARE * num_two_hop)
    single = one_hop(records)
    for found, wanted in (
        (single, num_one_hop),
        (forward, num_forward),
        (bridged, num_two_hop - num_forward),
    ):
        if len(found) < wanted:
            raise ValueError(f"{len(found)} questions of a kind can be made, expected at least {wanted}")
    chosen = [
        *rng.sample(single, num_one_hop),
        *rng.sample(forward, num_forward),
        *rng.sample(bridged, num_two_hop - num_forward),
    ]
    rng.shuffle(chosen)
    held_out = draw_split(records, seed=seed)
    return {
        split: [problem for problem in chosen if (problem.hops[0].subject in held_out) == (split == "test")]
        for split in ("train", "test")
    }


def write_corpus(path: Path, records: Iterable[Record]) -> dict[str, str]:
    """Write the corpus file of the retriever and return the id of each passage, by contents."""
    contents = list(dict.fromkeys(line for record in records for line in record.passages))
    _write_lines(path, ({"id": str(number), "contents": line} for number, line in enumerate(contents)))
    return {line: str(number) for number, line in enumerate(contents)}


def write_questions(path: Path, problems: Sequence[Problem], *, ids: Mapping[str, str], split: str) -> None:
    """Write questions as Search-R1's parquet rows without prompts, each with its supporting passages."""
    counts: Counter[str] = Counter()
    rows = []
    for number, problem in enumerate(problems):
        rows.append(
            {
                "id": f"{split}_{number}",
                "question": problem.text,
                "golden_answers": list(problem.golds),
                "data_source": problem.source,
                "prompt": [{"role": "user", "content": problem.text}],
                "ability": "fact-reasoning",
                "reward_model": {"style": "rule", "ground_truth": {"target": list(problem.golds)}},
                "extra_info": {
                    "split": split,
                    "index": counts[problem.source],
                    "kind": "-".join(fact.relation.name for fact in problem.hops),
                    "supporting_ids": [ids[fact.contents] for fact in problem.hops],
                    "supporting_texts": [fact.contents for fact in problem.hops],
                },
            }
        )
        counts[problem.source] += 1
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_examined(path: Path, problems: Sequence[Problem], *, count: int) -> None:
    """Write at most so many questions for `python -m IG doctor`, half of them two-hop, and their passages."""
    chosen = [
        problem
        for source in (ONE_HOP, TWO_HOP)
        for problem in [p for p in problems if p.source == source][: count // 2]
    ]
    _write_lines(
        path,
        [
            {
                "question": problem.text,
                "answers": list(problem.golds),
                "documents": [
                    {"text": render([fact.contents]), "role": role}
                    for fact, role in zip(problem.hops, ("first", "second"), strict=False)
                ],
            }
            for problem in chosen
        ],
    )


def render(contents: Iterable[str]) -> str:
    """Return passages as the agent renders what it found."""
    parts = (line.split("\n", 1) for line in contents)
    return render_passages([Passage(id="", title=title, text=text, score=0.0) for title, text in parts])


def _write_lines(path: Path, rows: Iterable[object]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
