"""What the results say about the claims that the comparison was made for, as sentences, whatever they say.

Each claim names the stages that it reads. Where these are not done, the sentence says what is missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from scipy.stats import ttest_ind

from comparison.campaign import TUNING, Campaign
from comparison.plan import Plan, Stage, Variation
from comparison.readings import (
    Difference,
    Reading,
    Runs,
    Scores,
    Verdict,
    compare,
    compare_pairs,
    drop_failed,
    final_em,
    last_mean,
    mean_over_seeds,
    rank_correlation,
    read_scores,
)
from comparison.results import Result
from comparison.tables import write_points
from verl.evaluation.paired import SIGNIFICANCE
from verl.evaluation.statistics import CONFIDENCE, adjust_holm, estimate_contrast

OUTCOME = "search_r1"
"""The method that is rewarded for the outcome alone."""
PUBLISHED_WEIGHT = 0.6
"""InfoReasoner's λ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim, where it comes from, and what the results say."""

    title: str
    source: str
    found: str


def list_claims(campaign: Campaign, stages: Sequence[str]) -> list[Claim]:
    """Return every claim that these stages can say something about, with what they say."""
    plan = campaign.plan
    chosen = {name: plan.stages[name] for name in stages if name in plan.stages}
    runs = {name: campaign.results_of(stage) for name, stage in chosen.items()}
    claims = {
        Claim(
            title="Plain outcome reward is competitive",
            source="arXiv 2605.27881",
            found=_judge_outcome(plan, runs),
        ): any(len(plan.stage_methods(stage)) > 2 for stage in chosen.values()),
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
            found=_judge_igpo(campaign, runs.get("hard", {})),
        ): "hard" in chosen and {"igpo", "igpo_loo"} <= {*chosen["hard"].methods},
        Claim(
            title="IG-Search teaches where all of a group fail",
            source="arXiv 2604.15148",
            found=_judge_failed_groups(plan, runs.get("failed_groups", {})),
        ): "failed_groups" in chosen,
        Claim(
            title="The weight of the gain matters to InfoReasoner, and 0.6 is best",
            source="InfoReasoner's ablation of λ",
            found=_judge_weight(
                chosen["lambda"].vary if "lambda" in chosen else None, runs.get("lambda", {})
            ),
        ): "lambda" in chosen,
    }
    found = [_check_world(name, campaign, stage) for name, stage in chosen.items() if stage.must_differ]
    return found + [claim for claim, is_asked in claims.items() if is_asked]


def find_unseparated(campaign: Campaign, stages: Sequence[str]) -> list[str] | None:
    """Return the methods that stages with `must_differ` have not shown to be worse than the base.

    None while such a stage is not done, or if there is none.
    """
    checked = [campaign.plan.stages[name] for name in stages if name != TUNING]
    found = [_list_unseparated(campaign, stage) for stage in checked if stage.must_differ]
    done = [names for names in found if names is not None]
    return list(chain.from_iterable(done)) if found and len(done) == len(found) else None


def _list_unseparated(campaign: Campaign, stage: Stage) -> list[str] | None:
    runs = campaign.results_of(stage)
    if sum(map(len, runs.values())) < stage.seeds * len(campaign.plan.stage_methods(stage)):
        return None
    assert stage.base is not None
    differences = compare(runs, base=stage.base, readings=(Reading.ROLLOUTS,))
    return [f"{d.method} on {stage.world}" for d in differences if d.verdict is not Verdict.WORSE]


def _check_world(name: str, campaign: Campaign, stage: Stage) -> Claim:
    missed = _list_unseparated(campaign, stage)
    found = f"Shown: every other method is worse than {stage.base}."
    if missed is None:
        found = _missing(f"all runs of the stage {name}")
    elif missed:
        found = f"Not shown to be worse than {stage.base}: {', '.join(missed)}."
    return Claim(
        title=f"The world {stage.world} separates a right reward from a broken one",
        source="must_differ of the plan",
        found=found,
    )


def _judge_outcome(plan: Plan, runs: Mapping[str, Runs]) -> str:
    sentences = []
    for name, of_stage in runs.items():
        if OUTCOME not in of_stage or len(of_stage) < 3 or name in ("lambda", "failed_groups", "samples"):
            continue
        differences = compare(of_stage, base=OUTCOME, readings=(Reading.ROLLOUTS,))
        if all(d.verdict is Verdict.ONE_SEED for d in differences):
            sentences.append(f"{name}: one seed, no verdict.")
            continue
        sentences.append(f"{name}: against {OUTCOME}, {_count_verdicts(differences)}.")
        if pairs := plan.controls(of_stage):
            differences = compare_pairs(of_stage, pairs, readings=(Reading.ROLLOUTS,))
            controls = ", ".join(dict.fromkeys(control for _, control in pairs))
            sentences.append(f"Against {controls}, {_count_verdicts(differences)}.")
    return " ".join(sentences) or _missing("a stage with search_r1 and other methods")


def _count_verdicts(differences: Sequence[Difference]) -> str:
    parts = [
        f"{len(names)} {verdict} ({', '.join(names)})"
        for verdict in Verdict
        if (names := [d.method for d in differences if d.verdict is verdict])
    ]
    return f"of {len(differences)} methods {'; '.join(parts)}"


def _judge_corpus(whole: Runs, damaged: Runs) -> str:
    """Compare what missing passages cost search_r1 with what each method wins on the whole corpus.

    That it is more than any method wins takes all tests, which then need no adjustment; what is said of
    single methods is by Holm.
    """
    base, broken = (_read_ends(runs.get(OUTCOME, ())) for runs in (whole, damaged))
    others = {name: scores for name in whole if name != OUTCOME and (scores := _read_ends(whole[name]))}
    if base is None or broken is None or not others:
        return _missing("the stages hard and damaged with search_r1")
    before, after = drop_failed([base, broken])
    loss = estimate_contrast([(1.0, after), (-1.0, before)])
    shown = write_points(float(after.mean() - before.mean()), None if loss is None else loss.interval())
    start = f"With the passages removed {OUTCOME} ends at {shown} points of EM."
    known = {}
    for name, scores in others.items():
        # The loss minus the win: base - broken - (method - base), above 0 where the loss is larger.
        sides = zip((2.0, -1.0, -1.0), drop_failed([base, broken, scores]), strict=True)
        if (contrast := estimate_contrast([*sides])) is None:
            return f"{start} One seed gives no verdict."
        known[name] = contrast
    if all(test.value > 0 and test.p_value < SIGNIFICANCE for test in known.values()):
        return f"{start} This is shown to be more than each of {len(known)} methods wins on the whole corpus."
    adjusted = adjust_holm([test.p_value for test in known.values()])
    clear = [name for name, p in zip(known, adjusted, strict=True) if p is not None and p < SIGNIFICANCE]
    more = [name for name in clear if known[name].value > 0]
    less = [name for name in clear if known[name].value < 0]
    left = [name for name in known if name not in clear]
    parts = [f"it is less than {', '.join(less)} win"] if less else []
    parts += [f"open against {', '.join(left)}"] if left else []
    return (
        f"{start} This is shown to be more than {len(more)} of {len(known)} methods win on the whole "
        f"corpus; {'; '.join(parts)}."
    )


def _judge_rankings(runs: Mapping[str, Runs]) -> str:
    worlds = [name for name in ("hard", "damaged", "easy") if len(_means(runs.get(name, {}))) > 2]
    sentences = []
    for k, one in enumerate(worlds):
        for other in worlds[k + 1 :]:
            found = rank_correlation(_means(runs[one]), _means(runs[other]))
            if found is not None:
                tau, p, count = found
                word = "neither that the rankings agree nor that they invert is shown"
                if p < SIGNIFICANCE:
                    word = "the rankings agree" if tau > 0 else "the rankings invert"
                sentences.append(
                    f"{one} and {other}: Kendall's tau {tau:+.2f} (p {p:.3f}, {count} methods), {word}."
                )
    return " ".join(sentences) or _missing("two worlds with three methods each")


def _judge_igpo(campaign: Campaign, runs: Runs) -> str:
    """Compare searches per episode over the last steps: IGPO as published, and with leave-one-out.

    By Welch's t test over the seeds, which are independent.
    """
    names = ("igpo", "igpo_loo")
    sides = [[last_mean(result.searches) for result in runs.get(name, ())] for name in names]
    one, other = ([value for value in side if value is not None] for side in sides)
    if not one or not other:
        return _missing("igpo and igpo_loo on the hard world")
    value, shown, verdict = statistics.fmean(one) - statistics.fmean(other), "", "with one seed, no verdict"
    if min(len(one), len(other)) > 1:
        low, high = ttest_ind(one, other, equal_var=False).confidence_interval(CONFIDENCE)
        shown, verdict = f" [{low:+.2f}, {high:+.2f}]", "no difference is shown"
        if high < 0:
            verdict = "the bias shows in the search rate"
        elif low > 0:
            verdict = "it searches more, against what its bias predicts"
    tuned = [campaign.chosen.get(name) for name in names]
    differ = "" if tuned[0] == tuned[1] else f" Their settings differ: {tuned[0]}; {tuned[1]}."
    return (
        f"igpo ends with {value:+.2f}{shown} searches per episode against igpo_loo "
        f"({len(one)} and {len(other)} seeds): {verdict}.{differ}"
    )


def _judge_failed_groups(plan: Plan, runs: Runs) -> str:
    """Compare each method, trained on groups that all fail, with search_r1, which gets no gradient there.

    F1 differs between wrong answers, so that a method rewarded by it is compared with F1 alone as well.
    """
    base = next((name for name in runs if name.startswith(OUTCOME)), None)
    if base is None or len(runs) < 2:
        return _missing("the stage failed_groups")
    controls = plan.controls(runs)
    against = {d.method: d for d in compare_pairs(runs, controls, readings=(Reading.ROLLOUTS,))}
    sentences = []
    for d in compare(runs, base=base, readings=(Reading.ROLLOUTS,)):
        shown = write_points(d.value, d.interval)
        text = f"{d.method}: {shown} points of EM against {base}, {_teaches(d.verdict)}"
        if (c := against.get(d.method)) is not None:
            text += f"; {write_points(c.value, c.interval)} against {c.base}, {_gain_teaches(c.verdict)}"
        sentences.append(f"{text}.")
    return " ".join(sentences)


def _judge_weight(vary: Variation | None, runs: Runs) -> str:
    if len(runs) < 3 or vary is None:
        return _missing("the stage lambda")
    values = {name: value for name, value in vary.names().items() if name in runs}
    bases = [name for name, value in values.items() if value in (0.0, PUBLISHED_WEIGHT)]
    pairs = [(name, base) for base in bases for name in values if name not in bases[: bases.index(base) + 1]]
    em = _means(runs)
    sentences = [
        f"EM by λ: {', '.join(f'{values[name]}: {100 * mean:.1f}' for name, mean in em.items())}.",
    ]
    differences = compare_pairs(runs, pairs, readings=(Reading.ROLLOUTS,))
    for base in bases:
        against = [d for d in differences if base in (d.method, d.base)]
        shown = [
            f"λ {values[d.method if d.base == base else d.base]} ({write_points(sign * d.value, None)})"
            for d in against
            if d.verdict in (Verdict.BETTER, Verdict.WORSE) and d.value is not None
            for sign in (1 if d.base == base else -1,)
        ]
        sentences.append(f"Shown to differ from λ {values[base]}: {', '.join(shown) or 'none'}.")
    sentences.append(f"All λ use the settings tuned with {PUBLISHED_WEIGHT}, which favors it.")
    return " ".join(sentences)


_NO_VERDICT = {Verdict.ONE_SEED: "one seed, no verdict", Verdict.OPEN: "not measured"}


def _teaches(verdict: Verdict) -> str:
    words = {
        Verdict.BETTER: "it teaches there",
        Verdict.WORSE: "it teaches the wrong thing there",
        Verdict.NOT_SHOWN: "that it teaches there is not shown",
    }
    return (words | _NO_VERDICT)[verdict]


def _gain_teaches(verdict: Verdict) -> str:
    words = {
        Verdict.BETTER: "the gain teaches more than F1",
        Verdict.WORSE: "with the gain it learns less than with F1 alone",
        Verdict.NOT_SHOWN: "that the gain teaches more than F1 is not shown",
    }
    return (words | _NO_VERDICT)[verdict]


def _means(runs: Runs) -> dict[str, float]:
    found = {name: mean_over_seeds(results, final_em) for name, results in runs.items()}
    return {name: mean[0] for name, mean in found.items() if mean is not None}


def _read_ends(results: Sequence[Result]) -> list[Scores] | None:
    """Return the scores of the last evaluation of each seed; None if one has none."""
    if not results or not all(result.evaluations for result in results):
        return None
    return [read_scores(result.evaluations[-1]) for result in results]


def _missing(what: str) -> str:
    return f"Not known yet: {what} must be done first."
