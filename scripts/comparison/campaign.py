"""What of a plan is done, what is left, in which order and how long it takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from comparison.plan import Plan, Stage, Tuned
from comparison.readings import last_mean
from comparison.results import Result
from comparison.runs import RunSpec, stage_runs, tuning_runs

_DEPENDS_ON_LENGTH = {"actor_rollout_ref.actor.optim.lr_warmup_steps_ratio", "algorithm.use_curriculum"}
"""Settings with which a step depends on the number of all steps; those of defaults are not in a result."""
TUNING = "tuning"
"""Name of the first part of a plan, beside its stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A tuned setting of a method, and what it gave."""

    run: RunSpec
    em: float | None
    """Mean EM of the last steps; None while it is not done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """A plan with the results that there are."""

    plan: Plan
    results: Mapping[str, Result]
    trials: Mapping[str, Sequence[Trial]] = field(default_factory=dict)
    """Of each method that is tuned."""

    @property
    def chosen(self) -> dict[str, Tuned]:
        """Return the best trial of each method whose trials are all done; the first of equals."""
        return {
            name: max(trials, key=lambda trial: trial.em or 0.0).run.tuned
            for name, trials in self.trials.items()
            if all(trial.run.key in self.results for trial in trials)
        }

    def runs_of(self, stage: Stage) -> dict[str, list[RunSpec]]:
        """Return the runs of each method of a stage, of those whose tuning is done."""
        return stage_runs(self.plan, stage, chosen=self.chosen)

    def results_of(self, stage: Stage) -> dict[str, list[Result]]:
        """Return the results of each method of a stage, as far as they are done."""
        found = {
            name: [self.results[run.key] for run in runs if run.key in self.results]
            for name, runs in self.runs_of(stage).items()
        }
        return {name: results for name, results in found.items() if results}

    def repeats(self) -> dict[str, list[Result]]:
        """Return, for methods that are tuned, the other runs with the chosen settings in the same world.

        Their first steps differ from the best trial in the seed alone; runs whose first steps also depend on
        how many follow are left out.
        """
        tuning = self.plan.tuning
        found: dict[str, dict[str, Result]] = {name: {} for name in self.trials}
        for stage in self.plan.stages.values():
            if tuning is None or stage.world != tuning.world or stage.steps < tuning.steps:
                continue
            for name, results in self.results_of(stage).items():
                for result in results:
                    if name in found and not _DEPENDS_ON_LENGTH & result.settings["config"].keys():
                        found[name][result.key] = result
        return {name: list(results.values()) for name, results in found.items()}

    def waiting(self, stages: Sequence[str]) -> list[RunSpec]:
        """Return the runs that cannot begin yet, because their method is not tuned, with untuned settings."""
        runs = []
        for stage in (self.plan.stages[name] for name in stages if name != TUNING):
            known = self.runs_of(stage)
            chosen = dict.fromkeys(self.trials, self.plan.untuned)
            every = stage_runs(self.plan, stage, chosen=chosen)
            runs += [run for name, of_method in every.items() if name not in known for run in of_method]
        return list({run.key: run for run in runs}.values())

    def left(self, stages: Sequence[str]) -> list[RunSpec]:
        """Return the runs that can be done now, in order: trials first, then stage by stage, seed by seed.

        Each seed goes through all methods before the next, so that partial results can be compared.
        """
        return list({run.key: run for run in self.all_runs(stages) if run.key not in self.results}.values())

    def count(self, stages: Sequence[str]) -> tuple[int, int]:
        """Return how many different runs of these stages are done, and how many are known."""
        keys = {run.key for run in self.all_runs(stages)}
        return len(keys & self.results.keys()), len(keys) + len(self.waiting(stages))

    def all_runs(self, stages: Sequence[str]) -> Iterator[RunSpec]:
        """Yield the runs of these stages that are known, in order; some may be those of two stages."""
        if TUNING in stages:
            for trials in self.trials.values():
                yield from (trial.run for trial in trials)
        for name in stages:
            if name != TUNING:
                stage = self.plan.stages[name]
                runs = self.runs_of(stage)
                for seed in range(stage.seeds):
                    yield from sorted(
                        (of_method[seed] for of_method in runs.values()),
                        key=lambda run: sorted(run.ig_flags.items()),  # the service need not start again
                    )


def make_campaign(plan: Plan, results: Mapping[str, Result]) -> Campaign:
    """Return the plan with what is known of its runs."""
    trials = {}
    for name, runs in tuning_runs(plan).items():
        assert plan.tuning is not None
        window = plan.tuning.window
        trials[name] = [
            Trial(run=run, em=last_mean(results[run.key].em, window) if run.key in results else None)
            for run in runs
        ]
    return Campaign(plan=plan, results=results, trials=trials)


def estimate_seconds(
    runs: Sequence[RunSpec], results: Mapping[str, Result], *, pace_s: float
) -> float | None:
    """Return how long runs will take on a machine of this pace, by those that are done; None where none is.

    By the median seconds per step, all included, of runs with the same method on the same world; of the same
    world; of all. Runs of unknown pace count as if this machine had done them.
    """
    known: dict[tuple[object, ...], list[float]] = {}
    for result in results.values():
        if result.steps:
            world, method = result.settings["world"], result.settings["config"]["algorithm.name"]
            ratio = 1.0 if result.pace_s is None else pace_s / result.pace_s
            for key in ((world, method), (world,), ()):
                known.setdefault(key, []).append(ratio * result.wall_s / result.steps)
    if not known:
        return None
    total = 0.0
    for run in runs:
        world, method = run.settings["world"], run.method.algorithm
        key = next(key for key in ((world, method), (world,), ()) if key in known)
        total += statistics.median(known[key]) * run.steps
    return total
