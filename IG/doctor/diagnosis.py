"""All analyses of one run put together: what was found, and what could not be looked at and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from IG.doctor.advice import Advice, advise
from IG.doctor.agreement import Agreement, measure_agreement, recorded_outcomes, split_half
from IG.doctor.aliases import AliasReport, alias_report
from IG.doctor.groups import GROUP_SIZES, RewardGroup, ZeroVariance, simulate_groups, zero_variance
from IG.doctor.measuring import Measured
from IG.doctor.noise import NUM_SAMPLES, NoiseReport, measure_noise
from IG.doctor.readings import GainRule, QuestionReading
from IG.doctor.rollouts import RecordedRollout, observed_groups
from IG.doctor.scenarios import Scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is looked at and how."""

    rule: GainRule
    num_generations: int
    """Samples per condition that training means to use."""
    gain_weight: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that the report shows."""

    num_questions: int
    num_failures: int
    failures: tuple[str, ...]
    groups_are: str
    """`observed` or `simulated`."""
    zero_variance: tuple[ZeroVariance, ...]
    noise: NoiseReport | None
    agreement: Agreement | None
    agreement_is: str
    """`recorded` or `sampled`: where the gains and answers come from."""
    aliases: AliasReport | None
    work: dict[str, int]
    gains: dict[str, dict[Scenario, list[float]]]
    """By kind of question, then by scenario."""
    advice: Advice
    skipped: dict[str, str] = field(default_factory=dict)
    """Analyses that could not be made, with the reason."""


def diagnose(measured: Measured, plan: Plan, *, rollouts: Sequence[RecordedRollout] | None) -> Diagnosis:
    """Make every analysis that the questions and rollouts allow."""
    rng = np.random.default_rng(plan.seed)
    answerable = [reading for reading in measured.readings if reading.question.golds]
    skipped: dict[str, str] = {}
    noise = measure_noise(measured.readings, plan.rule, sizes={*NUM_SAMPLES, plan.num_generations}, rng=rng)
    if noise is None:
        skipped["signal against noise"] = "no question has documents, so there is no gain to measure"
    groups = _groups(answerable, plan, rollouts=rollouts, skipped=skipped, rng=rng)
    levels = [
        zero_variance(
            groups,
            group_size=size,
            gain_weight=plan.gain_weight,
            noise=noise.noise_at(plan.num_generations) if noise else None,
        )
        for size in GROUP_SIZES
    ]
    known = tuple(level for level in levels if level is not None)
    aliases = alias_report(answerable, plan.rule)
    if aliases is None:
        skipped["alias statistics"] = "no question has answers"
    return Diagnosis(
        num_questions=len(measured.readings),
        num_failures=len(measured.failures),
        failures=measured.failures[:10],
        groups_are="simulated" if rollouts is None else "observed",
        zero_variance=known,
        noise=noise,
        agreement=_agreement(answerable, plan, rollouts=rollouts, skipped=skipped, rng=rng),
        agreement_is="sampled" if rollouts is None else "recorded",
        aliases=aliases,
        work=asdict(measured.work),
        gains=gains_by_scenario(measured.readings, plan.rule),
        advice=advise(known, noise, gain_weight=plan.gain_weight),
        skipped=skipped,
    )


def _groups(
    answerable: Sequence[QuestionReading],
    plan: Plan,
    *,
    rollouts: Sequence[RecordedRollout] | None,
    skipped: dict[str, str],
    rng: np.random.Generator,
) -> list[RewardGroup]:
    if rollouts is not None:
        return observed_groups(rollouts)
    if not answerable:
        skipped["zero-variance groups"] = "no question has answers, so there is no outcome to simulate"
    with_documents = [reading for reading in answerable if reading.contexts]
    return simulate_groups(with_documents or answerable, plan.rule, num_samples=plan.num_generations, rng=rng)


def _agreement(
    answerable: Sequence[QuestionReading],
    plan: Plan,
    *,
    rollouts: Sequence[RecordedRollout] | None,
    skipped: dict[str, str],
    rng: np.random.Generator,
) -> Agreement | None:
    pairs = split_half(answerable, plan.rule, rng=rng) if rollouts is None else recorded_outcomes(rollouts)
    agreement = measure_agreement(pairs, rng=rng)
    if agreement is None:
        skipped["gain and exact match"] = (
            "no question has both documents and answers" if rollouts is None else "no rollout has a gain"
        )
    return agreement


def gains_by_scenario(
    readings: Sequence[QuestionReading], rule: GainRule
) -> dict[str, dict[Scenario, list[float]]]:
    """Gains of all samples; questions that need several documents apart from those that need one."""
    kinds: dict[str, dict[Scenario, list[float]]] = {}
    for reading in readings:
        if not reading.contexts:
            continue
        kind = "one document" if len(reading.question.documents) == 1 else "several documents"
        for name, gain in reading.gains(rule).items():
            kinds.setdefault(kind, {}).setdefault(name, []).append(gain)
    return {
        kind: {name: found[name] for name in Scenario if name in found}
        for kind, found in sorted(kinds.items())
    }


def summary(diagnosis: Diagnosis, plan: Plan) -> dict[str, object]:
    """The figures that a script wants, on one line."""
    noise, agreement, work = diagnosis.noise, diagnosis.agreement, diagnosis.work
    return {
        "questions": diagnosis.num_questions,
        "failed": diagnosis.num_failures,
        "group_size": diagnosis.advice.group_size,
        "num_samples": diagnosis.advice.num_samples,
        "zero_variance_outcome": {
            str(level.group_size): _rounded(level.outcome) for level in diagnosis.zero_variance
        },
        "zero_variance_with_gain": {
            str(level.group_size): _rounded(level.with_gain) for level in diagnosis.zero_variance
        },
        "zero_variance_beyond_noise": {
            str(level.group_size): _rounded(level.within_noise) for level in diagnosis.zero_variance
        },
        "groups": diagnosis.groups_are,
        "signal": _rounded(noise.signal if noise else None),
        "noise": _rounded(noise.noise_at(plan.num_generations) if noise else None),
        "gain": str(plan.rule.gain),
        "spearman_em": _rounded(agreement.spearman.value if agreement and agreement.spearman else None),
        "auc_em": _rounded(agreement.auc.value if agreement and agreement.auc else None),
        "empty_share": _rounded(
            work["answers_empty"] / sampled if (sampled := work["answers_sampled"]) else None
        ),
        "skipped": sorted(diagnosis.skipped),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
