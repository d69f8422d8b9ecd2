"""Plans: what a file may say, and what is said about one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from comparison.plan import PLANS, read_plan
from tests.scripts.comparison.made_up import write_plan
from verl.errors import ConfigError

GOOD = """
rollouts: 80
evaluate_every: 5
questions: 10
untuned: {lr: 1e-4, group: 5, kl: 0.001}
worlds: {easy: {folder: world}}
methods:
  search_r1: {algorithm: search_r1}
  inforeasoner: {algorithm: inforeasoner, settings: {reward.outcome: f1}}
stages:
  one: {world: easy, steps: 10, seeds: 2, base: search_r1, methods: [inforeasoner]}
  two:
    world: easy
    steps: 10
    seeds: 1
    vary: {method: inforeasoner, setting: algorithm.gain_weight, values: [0.0, 1]}
  three:
    world: easy
    steps: 10
    seeds: 1
    vary: {method: inforeasoner, setting: ig_service.num_generations, values: [4]}
"""


@pytest.mark.parametrize("name", sorted(path.stem for path in PLANS.glob("*.yaml")))
def test_the_plans_that_are_here_can_be_read(name: str) -> None:
    plan = read_plan(name)
    assert all(plan.method(method) for stage in plan.stages.values() for method in plan.stage_methods(stage))


def test_a_varied_setting_makes_a_method_per_value_with_the_tuning_of_its_own(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, GOOD))
    assert plan.untuned.lr == 1e-4
    assert plan.stage_methods(plan.stages["one"]) == ["search_r1", "inforeasoner"]
    assert plan.stage_methods(plan.stages["two"]) == [
        "inforeasoner gain_weight=0.0",
        "inforeasoner gain_weight=1",
    ]
    varied = plan.method("inforeasoner gain_weight=1")
    assert varied.settings == {"reward.outcome": "f1", "algorithm.gain_weight": 1}
    assert varied.tuned_like == "inforeasoner"
    assert plan.method("inforeasoner num_generations=4").ig_service == {"num_generations": 4}


TUNING = """
tuning:
  world: easy
  steps: 5
  seed: 1
  window: 5
  methods: [search_r1]
  trials: [{lr: 1e-4, group: 5, kl: 0.0}]
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trials: [{lr: 1e-4, group: 5, kl: 0.0}]", "trials: []", r"tuning\.trials: is empty"),
        ("methods: [search_r1]", "methods: []", r"tuning\.methods: is empty"),
        (
            "algorithm: search_r1}",
            "algorithm: search_r1, tuned_like: inforeasoner}",
            r"methods\.search_r1\.tuned_like: inforeasoner; expected one of search_r1",
        ),
    ],
)
def test_a_tuning_that_finds_nothing_for_a_method_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert read_plan(write_plan(tmp_path, GOOD + TUNING)).tuning is not None
    with pytest.raises(ConfigError, match=message):
        read_plan(write_plan(tmp_path, (GOOD + TUNING).replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rollouts: 80", "rollout: 80", "rollouts: Field required"),
        ("steps: 10, seeds: 2", "steps: 10, seeds: 2, seed: 1", r"stages\.one\.seed: Unexpected keyword"),
        ("lr: 1e-4", "lr: fast", r"untuned\.lr: .*valid number.*got 'fast'"),
        ("group: 5", "group: 7", "untuned: group: 7; expected 2 or more, a divisor of rollouts: 80"),
        ("algorithm: search_r1}", "algorithm: searchr1}", r"search_r1\.algorithm: searchr1; expected one"),
        ("world: easy, steps", "world: hard, steps", r"stages\.one\.world: hard; expected one of easy"),
        ("base: search_r1", "base: nothing", r"stages\.one\.base: nothing"),
        ("algorithm: search_r1}", "algorithm: search_r1, handicap: luck}", "handicap: luck; expected one"),
        ("rollouts: 80", "rollouts: [80", "no YAML"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_used_is_refused_with_key_value_and_what_was_expected(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        read_plan(write_plan(tmp_path, GOOD.replace(old, new, 1)))


def test_a_plan_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"# \xff\n")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("latin", "folder"):
        with pytest.raises(ConfigError, match=rf"{name}\.yaml: cannot be read .*UTF-8"):
            read_plan(str(tmp_path / f"{name}.yaml"))


def test_an_unknown_plan_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match="--plan fast: expected a YAML file, or one of default, easy, separates"
    ):
        read_plan("fast")
