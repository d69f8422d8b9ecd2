"""What the results say about the claims that the comparison was made for, as sentences, whatever they say.

Each claim names the stages that it reads. Where these are not done, the sentence says what is missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from comparison.campaign import Campaign
from comparison.readings import (
    Difference,
    Reading,
    Runs,
    Verdict,
    compare,
    final_em,
    last_mean,
    mean_over_seeds,
    pair_seeds,
    rank_correlation,
)
from comparison.results import Result
from verl.evaluation.statistics import bootstrap_interval

OUTCOME = "search_r1"
"""The method that is rewarded for the outcome alone."""
_CLEAR_TAU = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim, where it comes from, and what the results say."""

    title: str
    source: str
    found: str


def list_claims(campaign: Campaign, stages: Sequence[str]) -> list[Claim]:
    """Return every claim that these stages can say something about, with what they say."""
    chosen = {name: campaign.plan.stages[name] for name in stages if name in campaign.plan.stages}
    runs = {name: campaign.results_of(stage) for name, stage in chosen.items()}
    claims = {
        Claim(
            title="Plain outcome reward is competitive",
            source="arXiv 2605.27881",
            found=_judge_outcome(runs),
        ): any(len(campaign.plan.stage_methods(stage)) > 2 for stage in chosen.values()),
        Claim(
            title="Missing documents cost more than any method wins",
            source="arXiv 2605.27881",
            found=_judge_corpus(runs.get("hard", {}), runs.get("damaged", {})),
        ): {"hard", "damaged"} <= chosen.keys(),
        Claim(
            title="Rankings invert between corpora",
            source="arXiv 2605.27881",
            found=_judge_rankings(runs),
        ): {"hard", "damaged"} <= chosen.keys(),
        Claim(
            title="IGPO without leave-one-out searches less",
            source="exact gradients of docs/methods.md: biased against searching after the first turn",
            found=_judge_igpo(runs.get("hard", {})),
        ): "hard" in chosen and {"igpo", "igpo_loo"} <= {*chosen["hard"].methods},
        Claim(
            title="IG-Search teaches where all of a group fail",
            source="arXiv 2604.15148",
            found=_judge_failed_groups(runs.get("failed_groups", {})),
        ): "failed_groups" in chosen,
        Claim(
            title="The weight of the gain matters to InfoReasoner, and 0.6 is best",
            source="InfoReasoner's ablation of λ",
            found=_judge_weight(runs.get("lambda", {})),
        ): "lambda" in chosen,
    }
    return [claim for claim, is_asked in claims.items() if is_asked]


def _judge_outcome(runs: Mapping[str, Runs]) -> str:
    sentences = []
    for name, of_stage in runs.items():
        if OUTCOME not in of_stage or len(of_stage) < 3 or name in ("lambda", "failed_groups", "samples"):
            continue
        differences = compare(of_stage, base=OUTCOME, readings=(Reading.ROLLOUTS,))
        parts = [
            f"{len(names)} {verdict} ({', '.join(names)})"
            for verdict in Verdict
            if (names := [d.method for d in differences if d.verdict is verdict])
        ]
        sentences.append(f"{name}: against {OUTCOME}, of {len(differences)} methods {'; '.join(parts)}.")
    return " ".join(sentences) or _missing("a stage with search_r1 and other methods")


def _judge_corpus(whole: Runs, damaged: Runs) -> str:
    """Compare what missing passages cost search_r1 with what the best method wins on the whole corpus."""
    em = _means(whole)
    lost = _paired_mean(damaged.get(OUTCOME, ()), whole.get(OUTCOME, ()), final_em)
    if lost is None or len(em) < 2:
        return _missing("the stages hard and damaged with search_r1")
    best = max((name for name in em if name != OUTCOME), key=lambda name: em[name])
    won = em[best] - em[OUTCOME]
    verdict = "more than" if -lost > won else "no more than"
    return (
        f"With the passages removed {OUTCOME} ends at {100 * lost:+.1f} points of EM; the best method "
        f"({best}) ends at {100 * won:+.1f} points on the whole corpus: the passages cost {verdict} what a "
        "method wins."
    )


def _judge_rankings(runs: Mapping[str, Runs]) -> str:
    worlds = [name for name in ("hard", "damaged", "easy") if len(_means(runs.get(name, {}))) > 2]
    sentences = []
    for k, one in enumerate(worlds):
        for other in worlds[k + 1 :]:
            tau = rank_correlation(_means(runs[one]), _means(runs[other]))
            if tau is not None:
                word = "neither agree nor invert"
                if abs(tau) >= _CLEAR_TAU:
                    word = "agree" if tau > 0 else "invert"
                sentences.append(f"{one} and {other}: Kendall's tau {tau:+.2f}, the rankings {word}.")
    return " ".join(sentences) or _missing("two worlds with three methods each")


def _judge_igpo(runs: Runs) -> str:
    """Compare searches per episode over the last steps: IGPO as published, and with leave-one-out."""
    found = _difference(runs.get("igpo", ()), runs.get("igpo_loo", ()), lambda r: last_mean(r.searches))
    if found is None:
        return _missing("igpo and igpo_loo on the hard world")
    value, interval, num_seeds = found
    shown = "" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    verdict = "no difference is shown"
    if interval is not None and interval[1] < 0:
        verdict = "the bias shows in the search rate"
    elif interval is not None and interval[0] > 0:
        verdict = "it searches more, against what its bias predicts"
    return (
        f"igpo ends with {value:+.2f}{shown} searches per episode against igpo_loo ({num_seeds} seeds): "
        f"{verdict}."
    )


def _judge_failed_groups(runs: Runs) -> str:
    """Compare each method, trained on groups that all fail, with search_r1, which gets no gradient there."""
    base = next((name for name in runs if name.startswith(OUTCOME)), None)
    if base is None or len(runs) < 2:
        return _missing("the stage failed_groups")
    sentences = []
    for d in compare(runs, base=base, readings=(Reading.ROLLOUTS,)):
        shown = _write_difference(d)
        sentences.append(f"{d.method}: {shown} points of EM against {base}, {_teaches(d.verdict)}.")
    return " ".join(sentences)


def _judge_weight(runs: Runs) -> str:
    if len(runs) < 3:
        return _missing("the stage lambda")
    em = _means(runs)
    best = max(em, key=lambda name: em[name])
    values = ", ".join(f"{name.partition('=')[2] or name}: {100 * value:.1f}" for name, value in em.items())
    base = next(iter(runs))
    differing = [
        d.method
        for d in compare(runs, base=base, readings=(Reading.ROLLOUTS,))
        if d.verdict in (Verdict.BETTER, Verdict.WORSE)
    ]
    shown = (
        f"shown to differ from {base}: {', '.join(differing)}"
        if differing
        else f"none is shown to differ from {base}"
    )
    return f"EM by λ: {values}. The best is {best}; {shown}."


def _teaches(verdict: Verdict) -> str:
    words = {
        Verdict.BETTER: "it teaches there",
        Verdict.WORSE: "it teaches the wrong thing there",
        Verdict.NOT_SHOWN: "that it teaches there is not shown",
        Verdict.OPEN: "not measured",
    }
    return words[verdict]


def _write_difference(difference: Difference) -> str:
    if difference.value is None or difference.interval is None:
        return "-"
    low, high = difference.interval
    return f"{100 * difference.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _means(runs: Runs) -> dict[str, float]:
    found = {name: mean_over_seeds(results, final_em) for name, results in runs.items()}
    return {name: mean[0] for name, mean in found.items() if mean is not None}


def _paired_mean(
    some: Sequence[Result], others: Sequence[Result], measure: Callable[[Result], float | None]
) -> float | None:
    found = _difference(some, others, measure)
    return None if found is None else found[0]


def _difference(
    some: Sequence[Result], others: Sequence[Result], measure: Callable[[Result], float | None]
) -> tuple[float, tuple[float, float] | None, int] | None:
    """Return the mean difference over the seeds that both have, its interval over seeds, and their number.

    An interval takes at least three seeds.
    """
    values = [
        a - b
        for one, other in pair_seeds(some, others)
        if (a := measure(one)) is not None and (b := measure(other)) is not None
    ]
    if not values:
        return None
    interval = bootstrap_interval([values]) if len(values) > 2 else None
    return statistics.fmean(values), interval, len(values)


def _missing(what: str) -> str:
    return f"Not known yet: {what} must be done first."
