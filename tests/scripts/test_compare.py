"""The command around the runs: its order, its budget, failures, and what it prints; the runs are made up."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from compare import choose_stages, do_runs, main, require_device, reserve
from rich.console import Console
from screen import Screen

from comparison.campaign import make_campaign
from comparison.pace import machine_pace
from comparison.plan import Plan, read_plan
from comparison.results import LOCKS, Result, read_results, write_result
from comparison.runs import RunSpec
from serving.files import lock_file
from tests.scripts.comparison.made_up import make_plan, make_result
from verl.errors import ConfigError, RolloutError


@dataclass
class FakeRunner:
    """Notes the runs that it was asked for; those of `broken` methods fail."""

    broken: tuple[str, ...] = ()
    wall_s: float = 10.0
    titles: list[str] = field(default_factory=list)

    async def run(self, run: RunSpec, *, title: str) -> Result:
        self.titles.append(title)
        if run.method_name in self.broken:
            raise RolloutError("the engine broke")
        return make_result(run, em=(0.0,) * run.steps, wall_s=self.wall_s, pace_s=machine_pace())


async def work(
    runner: FakeRunner, folder: Path, *, plan: Plan | None = None, hours: float | None = None
) -> dict[str, str]:
    asked: Any = runner
    screen = Screen(Console(file=(folder / "screen").open("a", buffering=1), width=200))
    return await do_runs(asked, screen, plan or make_plan(), stages=["easy"], results=folder, hours=hours)


async def test_every_run_is_done_once_and_its_result_is_kept_at_once(tmp_path: Path) -> None:
    first = FakeRunner()
    assert await work(first, tmp_path) == {}
    assert [title.partition(":")[0].split(",")[0] for title in first.titles] == [
        f"run {k} of 4" for k in (1, 2, 3, 4)
    ]
    assert "0:00:30 left: inforeasoner on easy" in first.titles[1]  # three runs of 10 s
    assert len(read_results(tmp_path)) == 4
    again = FakeRunner()
    await work(again, tmp_path)
    assert again.titles == []
    await work(again, tmp_path, plan=make_plan(evaluate_every=2))
    assert len(again.titles) == 4


async def test_a_run_that_another_comparison_holds_or_has_done_is_left_to_it(tmp_path: Path) -> None:
    held, done, *others = make_campaign(make_plan(), {}).left(["easy"])
    runner = FakeRunner()
    with lock_file(tmp_path / LOCKS / held.key, taken=ConfigError("held twice")):
        write_result(tmp_path, make_result(done, em=(0.0,)))
        working = asyncio.create_task(work(runner, tmp_path))
        screen = tmp_path / "screen"
        while not (screen.exists() and "waiting" in screen.read_text()):
            await asyncio.sleep(0.01)
        assert [title.partition(": ")[2] for title in runner.titles] == [run.label for run in others]
        assert held.key not in read_results(tmp_path)
    await working  # the other comparison has ended without a result
    assert held.key in read_results(tmp_path)
    assert not any((tmp_path / LOCKS).iterdir())
    write_result(tmp_path / "other", make_result(done, em=(0.0,)))
    with reserve([done, held], tmp_path / "other") as run:  # the results were read before `done` was
        assert run is held
        with reserve([held], tmp_path / "other") as nothing:
            assert nothing is None


async def test_no_run_begins_that_would_end_after_the_budget(tmp_path: Path) -> None:
    runner = FakeRunner(wall_s=3600.0)
    await work(runner, tmp_path, hours=0.5)
    assert len(runner.titles) == 1  # how long one takes was not known before
    await work(runner, tmp_path, hours=1.5)
    assert len(runner.titles) == 4


async def test_a_run_that_fits_into_the_rest_of_the_budget_is_done_before_a_longer_one(
    tmp_path: Path,
) -> None:
    for run in make_campaign(make_plan(), {}).left(["easy"])[:2]:
        hours = {"search_r1": 0.5, "inforeasoner": 2.0}[run.method_name]
        result = make_result(run, em=(0.0,) * run.steps, wall_s=3600 * hours, pace_s=machine_pace())
        write_result(tmp_path, result)
    runner = FakeRunner()
    await work(runner, tmp_path, hours=1.0)
    assert [title.partition(": ")[2].partition(" ")[0] for title in runner.titles] == ["search_r1"]


async def test_a_run_that_fails_is_named_and_not_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    failed = await work(FakeRunner(broken=("inforeasoner",)), tmp_path)
    assert {name.partition(",")[0] for name in failed} == {"inforeasoner on easy"}
    assert set(failed.values()) == {"the engine broke"}
    assert {r.settings["config"]["algorithm.name"] for r in read_results(tmp_path).values()} == {"search_r1"}
    assert await work(FakeRunner(), tmp_path) == {}  # they are tried again
    assert len(read_results(tmp_path)) == 4


async def test_three_failures_in_a_row_end_it(tmp_path: Path) -> None:
    runner = FakeRunner(broken=("search_r1", "inforeasoner"))
    assert len(await work(runner, tmp_path)) == len(runner.titles) == 3


def test_a_report_alone_and_a_list_do_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--plan", "separates", "--stage", "easy", "--docs", str(tmp_path)]
    assert main([*arguments, "--list"]) == 0
    *listed, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"done": 0, "runs": 4, "left_s": None, "failed": [], "not_separated": None}
    assert [line.split("  ")[1].partition(",")[0] for line in listed] == [
        "search_r1 on easy",
        "shuffled on easy",
    ] * 2
    assert not any(tmp_path.iterdir())
    assert main([*arguments, "--report"]) == 0
    plan = read_plan("separates")
    _, of_all_stages = make_campaign(plan, {}).count(list(plan.stages))
    page = (tmp_path / "comparison/separates/comparison.md").read_text()
    assert f"0 of {of_all_stages} runs are done." in page


def test_an_unknown_stage_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="--stage hrad: expected one of easy"):
        choose_stages(make_plan(), ["hrad"])


def test_a_plan_uses_a_gpu_only_if_it_says_so() -> None:
    require_device(make_plan(), num_gpus=0)
    require_device(make_plan(settings={"trainer.device": "cuda"}), num_gpus=1)
    for settings in ({}, {"trainer.device": "auto"}):  # both would have the keys of runs on CPUs
        with pytest.raises(ConfigError, match="results of CPUs and GPUs are kept apart"):
            require_device(make_plan(settings=settings), num_gpus=1)
