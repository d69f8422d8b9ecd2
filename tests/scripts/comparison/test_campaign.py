"""What of a plan is done and what comes next, on results that were made up."""

from __future__ import annotations

from dataclasses import replace

from comparison.campaign import TUNING, Campaign, estimate_seconds, make_campaign
from comparison.plan import Method, Plan, Stage, Tuning
from comparison.results import Result
from comparison.runs import RunSpec
from tests.scripts.comparison.made_up import TUNED, make_plan, make_result

FAST = replace(TUNED, lr=3e-4)


def tuned_plan() -> Plan:
    methods = {
        "search_r1": Method(algorithm="search_r1"),
        "gigpo": Method(algorithm="gigpo"),
        "dr_grpo": Method(
            algorithm="search_r1",
            settings={"algorithm.norm_adv_by_std_in_grpo": False},
            tuned_like="search_r1",
        ),
    }
    tuning = Tuning(
        world="easy", steps=4, seed=99, window=2, methods=["search_r1", "gigpo"], trials=[TUNED, FAST]
    )
    stages = {"easy": Stage(world="easy", steps=10, seeds=2, base="search_r1", methods=[*methods])}
    return make_plan(methods=methods, tuning=tuning, stages=stages)


def done(*runs: RunSpec, em: tuple[float, ...] = (0.1, 0.2)) -> dict[str, Result]:
    return {run.key: make_result(run, em=em) for run in runs}


def names(campaign: Campaign, *stages: str) -> list[str]:
    return [f"{run.method_name} {run.tuned.lr:g} {run.seed}" for run in campaign.left(stages)]


def test_trials_come_first_and_each_method_goes_on_with_its_best() -> None:
    plan = tuned_plan()
    campaign = make_campaign(plan, {})
    assert names(campaign, TUNING, "easy") == [
        "search_r1 0.0001 99", "search_r1 0.0003 99", "gigpo 0.0001 99", "gigpo 0.0003 99",
    ]  # fmt: skip
    assert campaign.count([TUNING, "easy"]) == (0, 4 + 6)
    assert len(campaign.waiting(["easy"])) == 6
    assert {run.tuned for run in campaign.waiting(["easy"])} == {TUNED}  # to estimate how long they take

    slow, fast = (trial.run for trial in campaign.trials["search_r1"])
    results = done(slow, em=(0.9, 0.1, 0.2, 0.2)) | done(fast, em=(0.0, 0.0, 0.3, 0.3))
    campaign = make_campaign(plan, results)
    assert campaign.chosen == {"search_r1": FAST}  # by its last two steps
    # A seed goes through all methods before the next one does.
    assert names(campaign, TUNING, "easy")[2:] == [
        "search_r1 0.0003 0", "dr_grpo 0.0003 0", "search_r1 0.0003 1", "dr_grpo 0.0003 1",
    ]  # fmt: skip
    assert campaign.count([TUNING, "easy"]) == (2, 4 + 6)


def test_a_best_trial_is_repeated_by_other_seeds_unless_steps_depend_on_how_many_follow() -> None:
    plan = tuned_plan()
    plan.methods["gigpo"] = Method(
        algorithm="gigpo", settings={"actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.1}
    )
    campaign = make_campaign(plan, {})
    campaign = make_campaign(
        plan, done(*(trial.run for trials in campaign.trials.values() for trial in trials))
    )
    runs = campaign.runs_of(plan.stages["easy"])
    assert {name: len(of_method) for name, of_method in runs.items()} == {
        "search_r1": 2, "gigpo": 2, "dr_grpo": 2,
    }  # fmt: skip
    results = {**campaign.results, **done(*(run for of_method in runs.values() for run in of_method))}
    repeats = make_campaign(plan, results).repeats()
    assert [result.key for result in repeats["search_r1"]] == [run.key for run in runs["search_r1"]]
    assert repeats["gigpo"] == []
    assert set(repeats) == {"search_r1", "gigpo"}


def test_a_run_that_is_done_is_not_left_and_one_that_two_stages_have_is_done_once() -> None:
    stage = Stage(world="easy", steps=10, seeds=1, methods=["search_r1"])
    plan = make_plan(stages={"one": stage, "two": replace(stage, methods=["search_r1", "inforeasoner"])})
    campaign = make_campaign(plan, {})
    assert names(campaign, "one", "two") == ["search_r1 0.0001 0", "inforeasoner 0.0001 0"]
    campaign = make_campaign(plan, done(campaign.left(["one"])[0]))
    assert names(campaign, "one") == []
    assert names(campaign, "one", "two") == ["inforeasoner 0.0001 0"]
    assert [*campaign.results_of(plan.stages["two"])] == ["search_r1"]


def test_the_time_that_is_left_is_estimated_from_the_most_similar_runs_that_are_done() -> None:
    plan = make_plan()
    first, second = make_campaign(plan, {}).left(["easy"])[:2]
    assert [first.method_name, second.method_name] == ["search_r1", "inforeasoner"]
    pace = 0.4
    assert estimate_seconds([first], {}, pace_s=pace) is None
    results = {first.key: make_result(first, em=(0.0,) * 4, wall_s=12.0, pace_s=pace)}
    assert estimate_seconds([first], results, pace_s=pace) == 30.0  # 10 steps of 3 s
    # The other method: by what the world takes.
    assert estimate_seconds([first, second], results, pace_s=pace) == 60.0
    results[second.key] = make_result(second, em=(0.0,) * 4, wall_s=20.0, pace_s=pace)
    assert estimate_seconds([second], results, pace_s=pace) == 50.0
    assert estimate_seconds([second], results, pace_s=2 * pace) == 100.0  # on a machine half as fast
    results[second.key] = replace(results[second.key], pace_s=None)
    assert estimate_seconds([second], results, pace_s=2 * pace) == 50.0
