"""Say at which hop a long search was lost: `python -m verl.evaluation.long_horizon RUN --data FILE`.

RUN is the folder of an evaluation, FILE the parquet file of its questions, whose `extra_info.supporting_ids`
are the passages of the hops, in order, as `scripts/make_world.py long-horizon` writes them. A table goes to
the terminal and `long_horizon.json` into RUN.

The three factors are those of WebDetective (Song et al. 2025, arXiv 2510.05137): was the evidence found
(knowledge sufficiency), was the right answer given where it was found (knowledge utilization), was none given
where it was not (good refusal). The formulas are ours, plain shares of episodes, as are the numbers per hop
and what was still in the context. Only what was read counts as found; a passage that was cut does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console

from serving.files import write_json_atomically
from serving.questions import QuestionError, read_rows, read_support
from serving.web.settings import expand_home
from verl.errors import DataError
from verl.evaluation.records import HOPS_FILE, TRAJECTORIES_FILE
from verl.evaluation.tables import ABSENT, Table, as_rich
from verl.run.records import TrajectoryRecord, count_calls, iterate_records
from verl.utils.entry import error_line


class Ending(StrEnum):
    """How an episode ended."""

    RIGHT = "right"
    WRONG = "wrong"
    REFUSED = "refused"
    """Without an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopScore:
    """How far one episode came along its path."""

    uid: str
    num_hops: int
    hops_found: int
    """Hops whose passage was read."""
    hops_in_order: int
    """Leading hops that were all read: how far the path was followed without a gap."""
    furthest_hop: int
    """The last hop whose passage was read, from 1; 0 for none."""
    hops_kept: int
    """Hops whose passage was still in the context when the last turn was written."""
    num_calls: int
    """Executed tool calls."""
    ending: Ending

    @property
    def is_sufficient(self) -> bool:
        """Return whether every hop was read: the answer could be known."""
        return self.hops_found == self.num_hops


def score_hops(record: TrajectoryRecord, path: Sequence[str]) -> HopScore:
    """Return how far an episode came; `path` are the ids of the passages of its hops, in order."""
    turns = record["turns"]
    # As in the loss analysis, a passage that was cut with its observation was not read.
    read = [{p["id"] for p in turn["passages"] if not p.get("is_cut")} for turn in turns]
    # A turn without replacement stays in the context, also among the first `num_dropped`.
    num_dropped = turns[-1].get("num_dropped", 0) if turns else 0
    kept = [
        ids
        for number, (turn, ids) in enumerate(zip(turns, read, strict=True))
        if number >= num_dropped or not turn.get("replacement_ids")
    ]
    ever, at_end = set().union(*read), set().union(*kept)
    found = [passage_id in ever for passage_id in path]
    return HopScore(
        uid=record["uid"],
        num_hops=len(path),
        hops_found=sum(found),
        hops_in_order=next((hop for hop, is_found in enumerate(found) if not is_found), len(path)),
        furthest_hop=max((hop for hop, is_found in enumerate(found, start=1) if is_found), default=0),
        hops_kept=sum(passage_id in at_end for passage_id in path),
        num_calls=sum(map(count_calls, turns)),
        ending=_find_ending(record),
    )


def _find_ending(record: TrajectoryRecord) -> Ending:
    if not (record["answer"] or "").strip():
        return Ending.REFUSED
    return Ending.RIGHT if record["metrics"]["em"] >= 1.0 else Ending.WRONG


def summarize_hops(scores: Sequence[HopScore]) -> dict[str, float | int | None]:
    """Return the factors over episodes; None where there is nothing to divide by."""
    sufficient = [score for score in scores if score.is_sufficient]
    lacking = [score for score in scores if not score.is_sufficient]
    refused = [score for score in scores if score.ending is Ending.REFUSED]
    return {
        "episodes": len(scores),
        "right": _share(scores, Ending.RIGHT),
        "knowledge_sufficiency": _ratio(len(sufficient), len(scores)),
        "knowledge_utilization": _share(sufficient, Ending.RIGHT),
        "good_refusal": _share(lacking, Ending.REFUSED),
        # Of the episodes without an answer, those that had a reason.
        "good_refusal_precision": _ratio(sum(not score.is_sufficient for score in refused), len(refused)),
        "guessed": _share(lacking, Ending.RIGHT),
        "hops_found_share": _mean([score.hops_found / score.num_hops for score in scores]),
        "hops_in_order_mean": _mean([score.hops_in_order for score in scores]),
        "furthest_hop_mean": _mean([score.furthest_hop for score in scores]),
        "hops_kept_share": _mean([score.hops_kept / score.num_hops for score in scores]),
        "calls_per_hop": _ratio(sum(s.num_calls for s in scores), sum(s.hops_found for s in scores)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and write the factors, or exit with one line that says why that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.evaluation.long_horizon",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of an evaluation")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="parquet file of its questions"
    )
    options = parser.parse_args(expand_home(arguments))
    with error_line():
        scores, num_failed = score_folder(options.run, paths=read_paths(options.data))
        groups = {"all": scores, **{f"{n} hops": of_n for n, of_n in by_num_hops(scores).items()}}
        factors = {name: summarize_hops(of_one) for name, of_one in groups.items()}
        write_json_atomically(
            options.run / HOPS_FILE,
            {"failed": num_failed, "factors": factors, "episodes": [asdict(score) for score in scores]},
        )
        Console().print(as_rich(_make_table(factors, num_failed=num_failed)))


def score_folder(folder: Path, *, paths: Mapping[str, Sequence[str]]) -> tuple[list[HopScore], int]:
    """Return the score of every episode of an evaluation that did not fail, and how many did.

    Raises DataError for a damaged folder, and for a question without a path.
    """
    scores: list[HopScore] = []
    num_failed = 0
    for record in iterate_records(folder / TRAJECTORIES_FILE):
        if record["failure"] is not None:
            num_failed += 1
        elif not (path := paths.get(record["uid"])):
            raise DataError(
                f"{folder}: question {record['uid']} has no passages per hop in the file of --data; expected "
                "the file that was evaluated, with extra_info.supporting_ids"
            )
        else:
            scores.append(score_hops(record, path))
    return scores, num_failed


def read_paths(file: Path) -> dict[str, list[str]]:
    """Return the ids of the passages of the hops of each question, by uid. Raises DataError."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected the parquet file that was evaluated")
    paths: dict[str, list[str]] = {}
    try:
        for where, row in read_rows(file):
            extra = row.get("extra_info")
            extra = extra if isinstance(extra, dict) else {}
            ids, _ = read_support(row, where=where)
            uid = f"{row.get('data_source')}/{extra.get('split')}/{extra.get('index')}"
            paths[uid] = list(ids)
    except QuestionError as error:
        raise DataError(str(error)) from error
    return paths


def _make_table(factors: Mapping[str, Mapping[str, float | int | None]], *, num_failed: int) -> Table:
    names = list(factors["all"])
    return Table(
        title="Long searches",
        header=("", *factors),
        rows=tuple((name, *(_show(of_one[name]) for of_one in factors.values())) for name in names),
        note=f"{num_failed} failed episodes are left out.",
    )


def _show(value: float | int | None) -> str:
    return ABSENT if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def by_num_hops(scores: Iterable[HopScore]) -> dict[int, list[HopScore]]:
    """Return the episodes by the number of hops of their question, in ascending order."""
    found: dict[int, list[HopScore]] = {}
    for score in scores:
        found.setdefault(score.num_hops, []).append(score)
    return dict(sorted(found.items()))


def _share(scores: Sequence[HopScore], ending: Ending) -> float | None:
    return _ratio(sum(score.ending is ending for score in scores), len(scores))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return _ratio(sum(values), len(values))


if __name__ == "__main__":
    main()
