"""The figures of a diagnosis as tables of text, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from IG.doctor.agreement import Agreement
from IG.doctor.aliases import AliasReport
from IG.doctor.diagnosis import Diagnosis, Plan
from IG.doctor.matching import Match
from IG.doctor.noise import NoiseLevel, NoiseReport
from IG.doctor.scenarios import LABELS
from IG.doctor.statistics import Interval
from IG.estimator import explain_empty

_MATCHES = {
    Match.text: "equal to a gold by text",
    Match.exact_match: "equal only as EM normalises",
    Match.entailment: "equal only by entailment",
    Match.none: "not a gold",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table; the first column holds names, the others figures."""

    title: str
    meaning: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(diagnosis: Diagnosis, plan: Plan) -> list[Table]:
    """Every table that there are figures for."""
    made = [_zero_variance(diagnosis, plan)] if diagnosis.zero_variance else []
    if diagnosis.noise is not None:
        made.append(_noise(diagnosis.noise, plan))
    if diagnosis.gains:
        made.append(_gains(diagnosis))
    if diagnosis.agreement is not None:
        made.append(_agreement(diagnosis.agreement, diagnosis.agreement_is))
    if diagnosis.aliases is not None:
        made.append(_aliases(diagnosis.aliases))
    made.append(_work(diagnosis.work))
    return made


def _zero_variance(diagnosis: Diagnosis, plan: Plan) -> Table:
    source = {
        "simulated": (
            "Simulated: a rollout is a scenario drawn at random and one answer sampled with its context; "
            "a trained policy differs, so check again with --rollouts."
        ),
        "observed": "Observed: groups of the recorded rollouts; smaller sizes are their subsets.",
    }[diagnosis.groups_are]
    return Table(
        title=f"Groups with zero variance ({diagnosis.groups_are})",
        meaning=(
            f"Share of groups whose rewards are all equal, so that they teach nothing. {source} The last "
            f"column counts differences within the noise of a gain of {plan.num_generations} samples as none."
        ),
        columns=("group size", "groups", "outcome only", f"+ {plan.gain_weight:g} x gain", "beyond noise"),
        rows=tuple(
            (
                str(level.group_size),
                str(level.num_groups),
                _share(level.outcome),
                _share(level.with_gain),
                _share(level.within_noise),
            )
            for level in diagnosis.zero_variance
        ),
    )


def _noise(noise: NoiseReport, plan: Plan) -> Table:
    return Table(
        title="Signal against noise",
        meaning=(
            f"Error of a gain of R samples per condition, over {noise.num_gains} contexts of "
            f"{noise.num_questions} questions: against the gain of all {noise.max_samples} samples, against "
            "the truth (estimated from that), and as the service's standard error says. The "
            f"signal of {noise.signal:.3f} is the spread of the true gains within a question. The rank "
            "agreement is Somers' D with the gains of all samples: Kendall's tau over the scenarios whose "
            "gains differ."
        ),
        columns=("samples", "error", "noise", "service says", "signal / noise", "rank agreement"),
        rows=tuple(_noise_row(level, noise, plan) for level in noise.levels),
    )


def _noise_row(level: NoiseLevel, noise: NoiseReport, plan: Plan) -> tuple[str, ...]:
    mark = " *" if level.num_samples == plan.num_generations else ""
    return (
        f"{level.num_samples}{mark}",
        _figure(level.error),
        _figure(level.noise),
        _figure(level.jackknife),
        _ratio(noise.signal, level.noise),
        _figure(level.rank_agreement),
    )


def _gains(diagnosis: Diagnosis) -> Table:
    return Table(
        title="Gain by what was found",
        meaning="Gains of all samples; quartiles over questions.",
        columns=("scenario", "questions", "mean", "25 %", "median", "75 %"),
        rows=tuple(
            (
                f"{kind}: {LABELS[name]}",
                str(len(values)),
                _figure(float(np.mean(values))),
                *(_figure(float(np.quantile(values, at))) for at in (0.25, 0.5, 0.75)),
            )
            for kind, scenarios in diagnosis.gains.items()
            for name, values in scenarios.items()
        ),
    )


def _agreement(agreement: Agreement, source: str) -> Table:
    meaning = {
        "sampled": (
            "Gain from one half of the samples, exact match of the answers of the other half (from the same "
            "samples the two would agree by construction)."
        ),
        "recorded": "Gain and exact match of the recorded rollouts that have a gain.",
    }[source]
    return Table(
        title=f"Gain and exact match ({source})",
        meaning=(
            f"{meaning} {agreement.num_contexts} gains of {agreement.num_questions} questions; intervals of "
            "95 % from drawing questions with replacement."
        ),
        columns=("figure", "value", "95 % interval"),
        rows=(
            ("exact match", _share(agreement.exact_match), ""),
            ("Pearson correlation", *_interval(agreement.pearson)),
            ("Spearman correlation", *_interval(agreement.spearman)),
            ("AUC (right answer has the larger gain)", *_interval(agreement.auc)),
            ("Pearson within questions", *_interval(agreement.within_question)),
        ),
    )


def _aliases(aliases: AliasReport) -> Table:
    rows = [
        ("accepted answers per question, mean", f"{aliases.golds_per_question:.2f}"),
        ("accepted answers per question, most", str(aliases.golds_max)),
        ("questions with several", _share(aliases.multi_alias_share)),
        *((f"sampled answers: {name}", _share(aliases.match_shares[m])) for m, name in _MATCHES.items()),
        (f"different answers among {aliases.num_samples} samples, mean", f"{aliases.distinct_answers:.1f}"),
    ]
    if aliases.mean_gain is not None:
        rows += [
            ("mean gain of contexts", _figure(aliases.mean_gain)),
            ("mean gain with the first accepted answer alone", _figure(aliases.mean_gain_first_gold)),
            ("gains that this moves by more than 0.01", _share(aliases.changed_share)),
        ]
    return Table(
        title="Accepted answers",
        meaning="How many there are, and how sampled answers come to count as right.",
        columns=("figure", "value"),
        rows=tuple(rows),
    )


def _work(work: dict[str, int]) -> Table:
    naive, answers = max(1, work["pairs_naive"]), max(1, work["answers_sampled"])
    return Table(
        title="Work",
        meaning="What this took; the service shares work in the same way while it trains.",
        columns=("figure", "value"),
        rows=(
            ("conditions asked", str(work["conditions"])),
            ("prompts sampled", str(work["prompts_sampled"])),
            ("baselines asked", str(work["baselines"])),
            ("baselines sampled", str(work["baselines_sampled"])),
            ("answers sampled", str(work["answers_sampled"])),
            ("answers that are empty", f"{work['answers_empty']} ({work['answers_empty'] / answers:.1%})"),
            ("entailment pairs without any sharing", str(work["pairs_naive"])),
            ("entailment pairs judged", f"{work['pairs_judged']} ({work['pairs_judged'] / naive:.1%})"),
        ),
    )


def skipped_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """What could not be looked at, and what makes the rest doubtful, in sentences."""
    work = diagnosis.work
    if warning := explain_empty(work["answers_empty"], of=work["answers_sampled"]):
        yield f"Warning: {warning}."
    for name, reason in diagnosis.skipped.items():
        yield f"Not done: {name}; {reason}."
    if diagnosis.num_failures:
        yield f"{diagnosis.num_failures} gains could not be measured, the first: {diagnosis.failures[0]}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _ratio(signal: float, noise: float) -> str:
    return "-" if not noise else f"{signal / noise:.1f}"


def _interval(interval: Interval | None) -> tuple[str, str]:
    if interval is None:
        return "-", ""
    if interval.low is None:
        return f"{interval.value:.3f}", "-"
    return f"{interval.value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"
