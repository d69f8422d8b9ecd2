"""The report of results that were made up: page, Markdown, board, figures and what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from comparison.campaign import Campaign, make_campaign
from comparison.claims import find_unseparated, list_claims
from comparison.plan import Method, Plan, Stage, Tuning, Variation
from comparison.report import find_places, write_report
from comparison.results import Result
from tests.scripts.comparison.made_up import TUNED, make_plan, make_result

WRONG, RIGHT = "0" * 60, "1" * 50 + "0" * 10


def curve(first: float, last: float, steps: int = 12) -> list[float | None]:
    return [first + (last - first) * k / (steps - 1) for k in range(steps)]


def fill(plan: Plan, *, right: tuple[str, ...], stages: tuple[str, ...] | None = None) -> Campaign:
    """Return a campaign in which the methods of `right` learn, and all others stay as they are."""
    results: dict[str, Result] = {}
    for run in make_campaign(plan, {}).left([*(stages or plan.stages)]):
        learns = run.method_name in right
        results[run.key] = make_result(
            run,
            em=curve(0.1, 0.95 if learns else 0.1),
            outcomes=((0, WRONG), (12, RIGHT if learns else WRONG)),
        )
    return make_campaign(plan, results)


def hard_plan(**changes: object) -> Plan:
    methods = {
        "search_r1": Method(algorithm="search_r1"),
        "gigpo": Method(algorithm="gigpo"),
        "<b>": Method(algorithm="stepsearch"),
    }
    stage = Stage(world="easy", steps=12, seeds=2, base="search_r1", methods=[*methods])
    vary = Variation(method="search_r1", setting="max_turns", values=[1, 2])
    stages = {"hard": stage, "turns": Stage(world="easy", steps=12, seeds=2, vary=vary)}
    return make_plan(methods=methods, stages=stages, **changes)


def test_a_report_has_verdicts_costs_figures_and_a_board_with_commands(tmp_path: Path) -> None:
    campaign = fill(hard_plan(), right=("gigpo",))
    places = find_places(tmp_path, plan="default")
    page = write_report(campaign, stages=["hard", "turns"], places=places, plan="default").read_text()
    text = (tmp_path / "comparison.md").read_text()
    score = next(line for line in text.splitlines() if line.startswith("| gigpo | 2/2 | 83.3"))
    assert "+83.3 [" in score
    assert r"better (p \<0.001)" in score
    assert "no difference shown" in next(
        line for line in text.splitlines() if line.startswith(r"| \<b> | 2/2 | 0.0")
    )
    cost = next(line for line in text.splitlines() if line.startswith("| gigpo | 2/2 | 9 |"))
    assert cost == "| gigpo | 2/2 | 9 | 9,000 | 27 | 2/2 | 11 | 11,000 | 33 |"
    assert "<h1>Comparison of methods</h1>" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for name in ("hard_curves", "hard_pairs", "turns"):
        for ending in ("pdf", "png"):
            assert (tmp_path / "comparison" / "figures" / f"{name}.{ending}").stat().st_size > 1000
        assert f"(comparison/figures/{name}.png)" in text
    board = (tmp_path / "board.md").read_text()
    (entry,) = [line for line in board.splitlines() if line.startswith("| gigpo")]
    key = next(run.key for run in campaign.runs_of(campaign.plan.stages["hard"])["gigpo"])
    assert "| 2/2 | 11 | 11,000 | 33 |" in entry
    assert f"--stage hard --verify {key}'" in entry


def test_without_a_result_there_is_a_report_that_says_so(tmp_path: Path) -> None:
    places = find_places(tmp_path, plan="mine.yaml")
    page = write_report(make_campaign(make_plan(), {}), stages=["easy"], places=places, plan="mine.yaml")
    assert page == tmp_path / "comparison" / "mine" / "comparison.html"
    assert "0 of 4 runs are done." in page.read_text()
    assert "What the results say" not in page.read_text()
    assert f"No method is tuned; all have {TUNED}." in (page.parent / "comparison.md").read_text()
    assert not (tmp_path / "board.md").exists()


@pytest.mark.parametrize(("right", "expected"), [(("search_r1",), []), ((), ["inforeasoner on easy"])])
def test_a_world_separates_when_every_other_method_is_shown_to_be_worse(
    right: tuple[str, ...], expected: list[str]
) -> None:
    plan = make_plan()
    plan = replace(plan, stages={"check": replace(plan.stages["easy"], must_differ=True)})
    assert find_unseparated(make_campaign(plan, {}), ["check"]) is None
    campaign = fill(plan, right=right)
    assert find_unseparated(campaign, ["check"]) == expected
    (said,) = claims(campaign).values()
    assert said.startswith("Not shown" if expected else "Shown: every other method is worse than search_r1")


def claims(campaign: Campaign) -> dict[str, str]:
    return {claim.title: claim.found for claim in list_claims(campaign, [*campaign.plan.stages])}


def test_claims_say_what_the_results_say_and_what_is_missing() -> None:
    found = claims(fill(hard_plan(), right=("gigpo",)))
    assert len(found) == 1  # the plan has no stage for the other claims
    outcome = found["Plain outcome reward is competitive"]
    assert outcome == "hard: against search_r1, of 2 methods 1 better (gigpo); 1 no difference shown (<b>)."
    plan = hard_plan()
    plan = replace(plan, stages=plan.stages | {"damaged": plan.stages["turns"]})
    found = claims(fill(plan, right=("gigpo",), stages=("hard",)))
    missing = found["Missing documents cost more than any method wins"]
    assert missing == "Not known yet: the stages hard and damaged with search_r1 must be done first."


def test_the_loss_by_missing_passages_is_compared_with_what_a_method_wins() -> None:
    plan = hard_plan()
    plan = replace(
        plan, stages={"hard": plan.stages["hard"], "damaged": replace(plan.stages["hard"], steps=11)}
    )
    results = dict(fill(plan, right=("gigpo", "search_r1"), stages=("hard",)).results)
    for run in make_campaign(plan, {}).left(["damaged"]):
        results[run.key] = make_result(run, em=curve(0.1, 0.1), outcomes=((0, WRONG), (11, WRONG)))
    found = claims(make_campaign(plan, results))["Missing documents cost more than any method wins"]
    assert "search_r1 ends at -83.3 [" in found
    assert found.endswith("This is shown to be more than each of 2 methods wins on the whole corpus.")
    results |= {
        key: result
        for key, result in fill(plan, right=("gigpo",), stages=("hard",)).results.items()
        if result.settings["config"]["algorithm.name"] != "stepsearch"
    }
    found = claims(make_campaign(plan, results))["Missing documents cost more than any method wins"]
    assert "search_r1 ends at +0.0 [" in found
    assert (
        "more than 0 of 2 methods win on the whole corpus; it is less than gigpo win; open against <b>"
        in found
    )


def test_the_bias_of_igpo_is_read_from_its_searches() -> None:
    igpo = {
        "igpo": Method(algorithm="igpo"),
        "igpo_loo": Method(algorithm="igpo", settings={"algorithm.baseline": "leave_one_out"}),
    }
    plan = make_plan(methods=igpo, stages={"hard": Stage(world="easy", steps=12, seeds=3, methods=[*igpo])})
    results = {}
    for run in make_campaign(plan, {}).left(["hard"]):
        searches = (0.5 if run.method_name == "igpo" else 1.4) + 0.1 * run.seed
        results[run.key] = make_result(run, em=curve(0.1, 0.5), searches=[searches] * 12)
    found = claims(make_campaign(plan, results))["IGPO without leave-one-out searches less"]
    assert found.startswith(
        "igpo ends with -0.90 [-1.13, -0.67] searches per episode against igpo_loo (3 and 3 seeds)"
    )
    assert found.endswith("the bias shows in the search rate.")


def test_methods_that_are_rewarded_by_f1_are_compared_with_f1_alone_too(tmp_path: Path) -> None:
    f1 = Method(algorithm="search_r1", settings={"reward.outcome": "f1"})
    search = Method(algorithm="ig_search", control="f1")
    methods = {"search_r1": Method(algorithm="search_r1"), "f1": f1, "ig_search": search}
    methods |= {
        f"{name}_failed": replace(
            method, handicap="failed_groups_only", control=method.control and f"{method.control}_failed"
        )
        for name, method in methods.items()
    }
    stages = {
        "hard": Stage(world="easy", steps=12, seeds=2, base="search_r1", methods=[*methods][:3]),
        "failed_groups": Stage(
            world="easy", steps=12, seeds=2, base="search_r1_failed", methods=[*methods][3:]
        ),
    }
    campaign = fill(make_plan(methods=methods, stages=stages), right=("f1", "ig_search", "ig_search_failed"))
    found = claims(campaign)
    assert found["Plain outcome reward is competitive"] == (
        "hard: against search_r1, of 2 methods 2 better (f1, ig_search). "
        "Against f1, of 1 methods 1 no difference shown (ig_search)."
    )
    _, taught = found["IG-Search teaches where all of a group fail"].split("shown.", 1)
    assert "against search_r1_failed, it teaches there; +83.3 [" in taught
    assert taught.endswith("] against f1_failed, the gain teaches more than F1.")
    places = find_places(tmp_path, plan="default")
    write_report(campaign, stages=[*stages], places=places, plan="default")
    text = places.markdown.read_text()
    assert r"| ig\_search | f1 | +0.0 [" in text or "| ig_search | f1 | +0.0 [" in text
    assert "by the KL term of search_r1_failed (0.001), f1_failed (0.001), ig_search_failed (0.001)." in text


def test_weights_are_compared_with_none_and_with_the_published_one() -> None:
    vary = Variation(method="inforeasoner", setting="algorithm.gain_weight", values=[0.0, 0.6, 1.0])
    plan = make_plan(stages={"lambda": Stage(world="easy", steps=12, seeds=2, vary=vary)})
    found = claims(fill(plan, right=("inforeasoner gain_weight=0.6",)))
    assert found["The weight of the gain matters to InfoReasoner, and 0.6 is best"] == (
        "EM by λ: 0.0: 0.0, 0.6: 83.3, 1.0: 0.0. Shown to differ from λ 0.0: λ 0.6 (+83.3). "
        "Shown to differ from λ 0.6: λ 0.0 (-83.3), λ 1.0 (-83.3). "
        "All λ use the settings tuned with 0.6, which favors it."
    )


def test_costs_count_seeds_that_did_not_reach_the_level_and_a_best_trial_at_the_edge_is_marked(
    tmp_path: Path,
) -> None:
    trials = [replace(TUNED, lr=lr) for lr in (1e-4, 2e-4, 4e-4)]
    tuning = Tuning(world="easy", steps=5, seed=9, window=5, methods=["search_r1"], trials=trials)
    stage = Stage(world="easy", steps=12, seeds=3, base="search_r1", methods=["search_r1", "inforeasoner"])
    methods = make_plan().methods
    methods["inforeasoner"] = replace(methods["inforeasoner"], tuned_like="search_r1")
    methods["untuned"] = methods["search_r1"]
    plan = make_plan(methods=methods, stages={"hard": stage}, tuning=tuning)
    results: dict[str, Result] = {}
    for run in make_campaign(plan, {}).left(["tuning"]):
        results[run.key] = make_result(run, em=curve(0.1, 0.1 + 1000 * run.tuned.lr, 5))
    for run in make_campaign(plan, results).left(["hard"]):
        # One of three seeds of inforeasoner reaches 0.7, and two of search_r1.
        learns = run.seed == 0 or (run.seed == 1 and run.method_name == "search_r1")
        results[run.key] = make_result(run, em=curve(0.1, 0.95 if learns else 0.1))
    places = find_places(tmp_path, plan="default")
    campaign = make_campaign(plan, results)
    write_report(campaign, stages=["tuning", "hard"], places=places, plan="default")
    lines = places.markdown.read_text().splitlines()
    assert r"| search\_r1 | 2/3 | 9 | 9,000 | 27 | 2/3 | 11 | 11,000 | 33 |" in lines
    assert "| inforeasoner | 1/3 | > 12 | - | - | 1/3 | > 12 | - | - |" in lines
    assert [line.split("|")[2].strip() for line in lines if line.startswith("| lr ")] == [
        "15.0",
        "20.0",
        r"30.0 \* edge",
    ]
    (other_seeds,) = [line for line in lines if line.startswith("| the best, other seeds |")]
    assert other_seeds == "| the best, other seeds | 20.3 ± 8.9 (3) |"  # 25.5, 25.5 and 10.0 in steps 1 to 5
    assert any("1 methods have 3 trials each" in line for line in lines)
    assert any("Variants are not tuned: inforeasoner those of search_r1." in line for line in lines)
    assert any(f"Not tuned, with {TUNED}: untuned." in line for line in lines)
    assert places.board is not None
    first, second = [line for line in places.board.read_text().splitlines() if line.startswith("| ")][-2:]
    assert first.startswith(r"| search\_r1: lr 0.0004")
    assert second.startswith("| inforeasoner: lr 0.0004")
