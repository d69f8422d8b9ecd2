"""Put the measurements together: one table, one advice, one JSON line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from IG.config import IGServiceConfig
from IG.doctor.noise import Noise, measure_noise
from IG.doctor.questions import Scenario
from IG.doctor.readings import Measured, QuestionReading
from IG.estimator import explain_empty
from serving.answers import normalize_answer

MAX_NOISE_SHARE = 1 / 3
"""Largest noise of a trustworthy gain, as a share of the signal."""
MAX_JUDGE_ERRORS = 0.02
"""Largest share of answers that are exact matches and rejected by the judge."""
_MAX_EXAMPLES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeAgreement:
    """How the entailment judge and exact match rate the same sampled answers, as shares of all of them."""

    only_judge: float
    """Equivalent to a gold answer by the judge alone: a paraphrase, or an error of the judge."""
    only_exact: float
    """An exact match that the judge rejects: always an error of the judge."""
    examples: tuple[str, ...]
    """Distinct answers that the two rate differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that the report shows; None for what these questions do not allow to measure."""

    num_questions: int
    failures: tuple[str, ...]
    noise: Noise | None
    judge: JudgeAgreement | None
    gains: dict[Scenario, list[float]]
    """Gains of all samples by scenario, one per question that has it."""
    work: dict[str, int]
    num_samples: int | None
    """Smallest number of samples whose noise is small enough; None when there is none."""
    is_trustworthy: bool | None
    """Whether gains at the configured number of samples can be trained on; None without documents."""
    advice: tuple[str, ...]
    """Sentences, the most important one first."""


def diagnose(measured: Measured, config: IGServiceConfig) -> Diagnosis:
    """Make every analysis that the questions allow. `config` is that of training."""
    noise = measure_noise(measured.readings, config, rng=np.random.default_rng(config.seed))
    judge = compare_judge(measured.readings, config)
    gains = _gains_by_scenario(measured.readings, config)
    enough = None
    if noise is not None:
        limit = noise.signal * MAX_NOISE_SHARE
        enough = next((size for size, error in noise.levels.items() if error < limit), None)
    doubts = _doubts(noise, judge, gains, config)
    is_enough = enough is not None and enough <= config.num_generations
    is_trustworthy = None if noise is None else is_enough and not doubts
    if warning := explain_empty(measured.work.answers_empty, of=measured.work.answers_sampled):
        doubts.append(warning)
    return Diagnosis(
        num_questions=len(measured.readings),
        failures=measured.failures,
        noise=noise,
        judge=judge,
        gains=gains,
        work=asdict(measured.work),
        num_samples=enough,
        is_trustworthy=is_trustworthy,
        advice=(*(f"{doubt}." for doubt in doubts), _noise_advice(noise, enough, config)),
    )


def compare_judge(readings: Sequence[QuestionReading], config: IGServiceConfig) -> JudgeAgreement | None:
    """Compare judge and exact match over all sampled answers; None when no question has gold answers."""
    num_answers = only_judge = only_exact = 0
    examples: dict[str, None] = {}
    for reading in readings:
        golds = reading.question.golds
        keys = {normalize_answer(gold) for gold in golds} - {""}
        for samples in reading.conditions.values() if golds else ():
            matches = samples.equivalent_to_gold(threshold=config.threshold)  # [response, gold]
            judged = np.asarray(matches.any(axis=1))
            exact = np.asarray([normalize_answer(text) in keys for text in samples.texts], dtype=np.bool_)
            num_answers += len(exact)
            only_judge += int((judged & ~exact).sum())
            only_exact += int((~judged & exact).sum())
            for at in np.flatnonzero(judged != exact):
                verdict = "judged equivalent" if judged[at] else "judged different"
                examples[f"{reading.question.text} {samples.texts[at]!r}, {verdict} to {golds[0]!r}"] = None
    if not num_answers:
        return None
    return JudgeAgreement(
        only_judge=only_judge / num_answers,
        only_exact=only_exact / num_answers,
        examples=tuple(examples)[:_MAX_EXAMPLES],
    )


def rows(diagnosis: Diagnosis, config: IGServiceConfig) -> list[tuple[str, str]]:
    """Return name and value of every row of the table."""
    table = [
        (f"mean gain, {name}", f"{np.mean(gains):.3f}, {len(gains)} questions")
        for name, gains in diagnosis.gains.items()
        if name is not Scenario.none
    ]
    if diagnosis.noise is not None:
        table.append(("signal: spread of the gains of a question", f"{diagnosis.noise.signal:.3f}"))
        for size, noise in diagnosis.noise.levels.items():
            mark = " (configured)" if size == config.num_generations else ""
            table.append((f"noise of a gain of {size} samples{mark}", f"{noise:.3f}"))
    if (judge := diagnosis.judge) is not None:
        table.append(("answers right by the judge alone", f"{judge.only_judge:.1%}"))
        table.append(("exact matches that the judge rejects", f"{judge.only_exact:.1%}"))
    work = diagnosis.work
    table.append(("empty answers", f"{work['answers_empty']} of {work['answers_sampled']}"))
    return table


def summary(diagnosis: Diagnosis, config: IGServiceConfig) -> dict[str, object]:
    """Return the figures of the JSON line."""
    noise, judge, work = diagnosis.noise, diagnosis.judge, diagnosis.work
    shares = {
        "signal": noise.signal if noise else None,
        "noise": noise.levels.get(config.num_generations) if noise else None,
        "judge_rejects_em": judge.only_exact if judge else None,
        "empty_share": work["answers_empty"] / work["answers_sampled"] if work["answers_sampled"] else None,
    }
    return {
        "questions": diagnosis.num_questions,
        "failed": len(diagnosis.failures),
        "trustworthy": diagnosis.is_trustworthy,
        "num_samples": diagnosis.num_samples,
        "gain": str(config.gain),
        **{name: None if value is None else round(value, 4) for name, value in shares.items()},
    }


def _gains_by_scenario(
    readings: Sequence[QuestionReading], config: IGServiceConfig
) -> dict[Scenario, list[float]]:
    """Return gains of all samples for the questions that have documents."""
    gains = [reading.gains(config) for reading in readings if reading.contexts]
    found = {name: [each[name] for each in gains if name in each] for name in Scenario}
    return {name: values for name, values in found.items() if values}


def _noise_advice(noise: Noise | None, enough: int | None, config: IGServiceConfig) -> str:
    if noise is None:
        return "No question has documents, so no gain was measured; add documents to the questions."
    signal = f"a third of the signal of {noise.signal:.3f}"
    if enough is None:
        return (
            f"Do not train on these gains: no number of samples up to {max(noise.levels)} brings the noise "
            f"below {signal}."
        )
    reason = f"the noise of {noise.levels[enough]:.3f} is below {signal}"
    if enough > config.num_generations:
        return f"Raise --num-generations from {config.num_generations} to {enough}: there {reason}."
    return f"--num-generations {config.num_generations} is enough: from {enough} samples on {reason}."


def _doubts(
    noise: Noise | None,
    judge: JudgeAgreement | None,
    gains: dict[Scenario, list[float]],
    config: IGServiceConfig,
) -> list[str]:
    """Return what makes the gains untrustworthy at any number of samples."""
    doubts = []
    if noise is not None and Scenario.random in gains:
        helpful, random = (float(np.mean(gains[name])) for name in (Scenario.supporting, Scenario.random))
        if helpful - random <= noise.levels[config.num_generations]:
            doubts.append(
                f"Supporting documents gain {helpful:.3f} on average and random ones {random:.3f}, no more "
                "than the noise apart: try a larger generator or another entailment model"
            )
    if judge is not None and judge.only_exact > MAX_JUDGE_ERRORS:
        doubts.append(
            f"The entailment judge rejects {judge.only_exact:.1%} of the answers although they match a gold "
            "answer exactly: look at judge.examples in report.json and try another --entailment-model"
        )
    return doubts
