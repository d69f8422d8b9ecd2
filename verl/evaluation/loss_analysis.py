"""Where wrong answers were lost, and how far the retriever gives the evidence: pure functions.

Each answer that did not fail and is not right (EM; math where it was graded so) was lost in one place, the
first of these that holds:

    malformed          no answer: the last action was invalid
    refused            no answer, or an empty one, although the last action was well-formed
    read but unused    all evidence was read
    not in the corpus  some evidence that was not read is not in the corpus
    never searched     no search was executed
    not retrieved      some evidence is not among the results of any query, to the depth looked at
    retrieved but cut  it is among them, but beyond `retriever.topk`, or the observation or context was full
    unknown            there is no evidence to look for, nothing was searched again, or a search failed

The evidence is the supporting passages of the data, else any passage with a gold answer (serving.evidence).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import mean

from verl.evaluation.evidence import EvidenceRecord, Ranks
from verl.evaluation.metrics import is_right, rightness
from verl.evaluation.records import ResultRecord
from verl.evaluation.summary import LABELS, Estimate, estimate, estimate_json, name_measure
from verl.evaluation.tables import Table, format_estimate


class Loss(StrEnum):
    """See the head of this file."""

    NOT_IN_CORPUS = "not in the corpus"
    NEVER_SEARCHED = "never searched"
    NOT_RETRIEVED = "not retrieved"
    CUT = "retrieved but cut"
    UNUSED = "read but unused"
    REFUSED = "refused"
    MALFORMED = "malformed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossGroup:
    """The answers of one source, or of all."""

    name: str
    num_answers: int
    """That did not fail."""
    num_right: int
    losses: Mapping[Loss, int]
    kinds: Mapping[str, int]
    """Answers by what their evidence was taken from."""
    in_topk: Estimate | None
    """Share of questions all of whose evidence is in the first `topk` passages for the question itself."""
    in_depth: Estimate | None
    """The same to the depth looked at: the ceiling of any agent that only asks the question."""
    read: Estimate | None
    """Share of answers all of whose evidence was read: per question, then over questions."""
    em_if_read: Estimate | None
    """Share of right answers among them, like `em_if_not` per question first."""
    em_if_not: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAnalysis:
    """All groups; the last one is of all answers if there are several sources."""

    groups: tuple[LossGroup, ...]
    topk: int
    depth: int | None
    audit: str | None = None
    """SHA-256 of the output of `index audit` that says what the corpus has."""
    measure: str = LABELS["em"]
    """What says whether an answer is right."""


def find_loss(result: ResultRecord, evidence: EvidenceRecord) -> Loss | None:
    """Return where an answer was lost; None for one that is right or failed."""
    if result["failure"] is not None or is_right(result):
        return None
    if not (result["prediction"] or "").strip() and evidence["last_action"] == "invalid":
        return Loss.MALFORMED
    if not (result["prediction"] or "").strip() and result["stop"] != "length":
        return Loss.REFUSED
    if not evidence["items"]:
        return Loss.UNKNOWN
    unread = [number for number, read in enumerate(evidence["read"]) if not read]
    if not unread:
        # Of an episode that the full context ended, the policy could not answer any more.
        return Loss.UNUSED if result["prediction"] is not None else Loss.CUT
    if any(evidence["in_corpus"][number] is False for number in unread):
        return Loss.NOT_IN_CORPUS
    if result["num_searches"] == 0:
        return Loss.NEVER_SEARCHED
    if evidence["depth"] is None or evidence["failure"] is not None:
        return Loss.UNKNOWN
    is_missed = any(evidence["query_ranks"][number] is None for number in unread)
    return Loss.NOT_RETRIEVED if is_missed else Loss.CUT


def analyze_losses(results: Sequence[ResultRecord], evidence: Sequence[EvidenceRecord]) -> LossAnalysis:
    """Return the analysis of all answers, each with its evidence in the same place."""
    pairs = list(zip(results, evidence, strict=True))
    by_source: dict[str, list[tuple[ResultRecord, EvidenceRecord]]] = {}
    for pair in sorted(pairs, key=lambda pair: pair[0]["data_source"]):
        by_source.setdefault(pair[0]["data_source"], []).append(pair)
    groups = [_analyze(name, part) for name, part in by_source.items()]
    if len(groups) > 1:
        groups.append(_analyze("all", pairs))
    first = evidence[0]
    return LossAnalysis(
        groups=tuple(groups),
        topk=first["topk"],
        depth=first["depth"],
        audit=first.get("audit"),
        measure=name_measure(results),
    )


def _analyze(name: str, pairs: Sequence[tuple[ResultRecord, EvidenceRecord]]) -> LossGroup:
    answered = [(result, found) for result, found in pairs if result["failure"] is None]
    losses = Counter(loss for pair in answered if (loss := find_loss(*pair)) is not None)
    traced = [(result, found) for result, found in answered if found["items"]]
    # One per question, whatever became of its answers.
    searched = {
        found["uid"]: found
        for _, found in pairs
        if found["items"] and found["depth"] is not None and found["failure"] is None
    }
    ranks = [(found["question_ranks"], found) for found in searched.values()]
    return LossGroup(
        name=name,
        num_answers=len(answered),
        num_right=sum(is_right(result) for result, _ in answered),
        losses={loss: losses[loss] for loss in Loss},
        kinds=dict(Counter(found["kind"] for _, found in pairs)),
        in_topk=_share([_are_within(found_at, found["topk"]) for found_at, found in ranks]),
        in_depth=_share([_are_within(found_at, found["depth"]) for found_at, found in ranks]),
        read=_mean_by_question([(found["uid"], float(all(found["read"]))) for _, found in traced]),
        em_if_read=_mean_by_question(
            [(found["uid"], rightness(result)) for result, found in traced if all(found["read"])]
        ),
        em_if_not=_mean_by_question(
            [(found["uid"], rightness(result)) for result, found in traced if not all(found["read"])]
        ),
    )


def _are_within(ranks: Ranks, k: int | None) -> bool:
    return k is not None and all(rank is not None and rank <= k for rank in ranks)


def _share(flags: Sequence[bool]) -> Estimate | None:
    return estimate([list(map(float, flags))])


def _mean_by_question(values: Sequence[tuple[str, float]]) -> Estimate | None:
    """Return the mean over questions of the means over their answers: answers of one are not independent."""
    by_uid: dict[str, list[float]] = {}
    for uid, value in values:
        by_uid.setdefault(uid, []).append(value)
    return estimate([[mean(of_one) for of_one in by_uid.values()]])


def loss_metrics(analysis: LossAnalysis) -> dict[str, float]:
    """Return the number of wrong answers by where they were lost, all sources together, by metric name."""
    return {
        f"lost/{loss.replace(' ', '_')}": float(count) for loss, count in analysis.groups[-1].losses.items()
    }


def loss_table(analysis: LossAnalysis) -> Table:
    """Return the number of wrong answers by where they were lost."""
    losses = [loss for loss in Loss if any(group.losses[loss] for group in analysis.groups)]
    note = f"Numbers of answers, right by {analysis.measure}. Evidence: {_name_kinds(analysis)}."
    if analysis.audit is not None:
        note += f" What the corpus has is known by index audit (SHA-256 {analysis.audit[:12]})."
    return Table(
        title="Where wrong answers were lost",
        header=("source", "answers", "right", "wrong", *losses),
        rows=tuple(_loss_row(group, losses) for group in analysis.groups),
        note=note,
        rules=_rule(analysis),
    )


def _loss_row(group: LossGroup, losses: Sequence[Loss]) -> tuple[str, ...]:
    counts = [group.num_answers, group.num_right, group.num_answers - group.num_right]
    return (group.name, *map(str, counts), *(str(group.losses[loss]) for loss in losses))


def _name_kinds(analysis: LossAnalysis) -> str:
    labels = {
        "supporting_ids": "supporting passages of the data",
        "gold_strings": "any passage with a gold answer",
        "none": "none (yes or no)",
    }
    kinds = analysis.groups[-1].kinds
    return ", ".join(f"{label} ({kinds[kind]} answers)" for kind, label in labels.items() if kind in kinds)


def ceiling_table(analysis: LossAnalysis) -> Table:
    """Return how far the retriever gives the evidence, and what the policy makes of it."""
    k, depth = analysis.topk, analysis.depth
    searched = (f"in the first {k}", f"in the first {depth}") if depth is not None else ()
    rows = []
    for group in analysis.groups:
        ceilings = (group.in_topk, group.in_depth) if depth is not None else ()
        cells = (*ceilings, group.read, group.em_if_read, group.em_if_not)
        rows.append((group.name, *map(format_estimate, cells)))
    measure = analysis.measure
    note = f"Percent with 95 % intervals: all evidence read by the agent, and {measure} with and without it."
    if depth is not None:
        note = f"Ceiling: all evidence is in the first passages that the question itself finds. {note}"
    return Table(
        title="What the retriever gives, and what is made of it",
        header=("source", *searched, "read", f"{measure} if read", f"{measure} if not"),
        rows=tuple(rows),
        note=note,
        rules=_rule(analysis),
    )


def _rule(analysis: LossAnalysis) -> frozenset[int]:
    return frozenset({len(analysis.groups) - 1} if len(analysis.groups) > 1 else ())


def analysis_json(analysis: LossAnalysis) -> dict[str, object]:
    """Return all figures as JSON, by source."""
    return {
        "topk": analysis.topk,
        "depth": analysis.depth,
        "audit": analysis.audit,
        "measure": analysis.measure,
        "groups": {group.name: _group_json(group) for group in analysis.groups},
    }


def _group_json(group: LossGroup) -> dict[str, object]:
    shares = {
        "evidence_in_topk": group.in_topk,
        "evidence_in_depth": group.in_depth,
        "evidence_read": group.read,
        "em_if_read": group.em_if_read,
        "em_if_not_read": group.em_if_not,
    }
    return {
        "answers": group.num_answers,
        "right": group.num_right,
        "lost": {str(loss): count for loss, count in group.losses.items()},
        "evidence": dict(group.kinds),
        **{name: None if found is None else estimate_json(found) for name, found in shares.items()},
    }
