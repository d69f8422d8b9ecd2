"""Plans of 3 and 7 billion parameters beside an audit of the same runs, made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from rich.table import Table

from verl.trainer.config import loading
from verl.trainer.config.schema import Config
from verl.trainer.plan.assumptions import ASLEEP_BYTES, GB
from verl.trainer.plan.check import Plan, plan_run
from verl.trainer.plan.gpus import find_gpu
from verl.trainer.plan.memory import Phase, total
from verl.trainer.plan.shape import KNOWN_SHAPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """GB per H100 of a run: 16,384 tokens per pass, checkpointing, half of the memory for the engine."""

    model: str
    num_gpus: int
    weights: float
    adam: float
    reference: float
    gradient: float
    update: float
    """At its peak, without the rest of the engine that sleeps."""
    rollout: float


AUDITED_MEMORY = tuple(
    Audit(
        model=model,
        num_gpus=num_gpus,
        weights=row[0],
        adam=row[1],
        reference=row[2],
        gradient=row[3],
        update=row[4],
        rollout=row[5],
    )
    for model, num_gpus, row in (
        ("3B", 8, (1.5, 3.1, 0.8, 1.5, 20, 50)),
        ("3B", 4, (3.1, 6.2, 1.5, 3.1, 27, 55)),
        ("3B", 2, (6.2, 12.3, 3.1, 6.2, 41, 66)),
        ("3B", 1, (12.3, 24.7, 6.2, 12.3, 72, 87.5)),
        ("7B", 8, (3.8, 7.6, 1.9, 3.8, 42, 58)),
        ("7B", 4, (7.6, 15.2, 3.8, 7.6, 59, 71)),
        ("7B", 2, (15.2, 30.5, 7.6, 15.2, 93, 98)),
    )
)
AUDITED_IG_SERVICE = 17.5
"""GB of the IG service with 0.15 of the memory, its entailment model as measured."""

AUDITED_SECONDS = {
    "engines": (10, 35),
    "driver": (3, 28),
    "retrieval": (1, 160),
    "gains": (0, 65),
    "log_probs": (9.6, 11),
    "update": (21, 45),
    "publish": (0.7, 14),
}
"""Of a step of 512 questions with 5 episodes each, 3 billion parameters, 8 H100: from best to worst; the best
of the last three with the speeds that were measured on an H200."""


def audited_plan(model: str, *, num_gpus: int = 8, ig_service_gpus: int = 0) -> Plan:
    """Return the plan of a run that was audited."""
    overrides = [
        "recipe=gpu",
        f"trainer.n_gpus_per_node={num_gpus}",
        f"placement.ig_service_gpus={ig_service_gpus}",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.5",
        "actor_rollout_ref.rollout.n_agent=5",
    ]
    return plan_run(compose_config(*overrides), KNOWN_SHAPES[f"Qwen/Qwen2.5-{model}"], find_gpu("H100"))[0]


@cache
def compose_config(*overrides: str) -> Config:
    """Return the configuration of these overrides, which must not be changed."""
    return loading.compose_config(overrides)


def planned_memory(plan: Plan) -> dict[str, float]:
    """Return the GB of GPU 0 that an `Audit` has."""
    items = {item.name: item.amounts for item in plan.items}
    named = {
        "weights": items["policy: float32 weights"][Phase.UPDATE],
        "adam": items["optimizer: Adam"][Phase.UPDATE],
        "reference": items["reference"][Phase.UPDATE],
        "gradient": items["gradient"][Phase.UPDATE],
        "update": total(plan.items, Phase.UPDATE, gpu=0) - ASLEEP_BYTES,
        "rollout": total(plan.items, Phase.ROLLOUT, gpu=0),
    }
    return {name: amount / GB for name, amount in named.items()}


def planned_seconds(plan: Plan) -> dict[str, float]:
    """Return the seconds of the stages that were audited."""
    seconds = {stage.name: stage.seconds or 0.0 for stage in plan.stages}
    seconds["log_probs"] = seconds["old_log_probs"] + seconds["reference_log_probs"]
    # All of this ran on the driver's thread when it was audited.
    seconds["driver"] += seconds["agents"] + seconds["batch"] + seconds["records"]
    return {name: seconds[name] for name in AUDITED_SECONDS}


def measure() -> dict[str, float]:
    """Return the planned seconds of a step and its stages, and the largest distance from audited memory."""
    plan = audited_plan("3B", ig_service_gpus=8)
    seconds = planned_seconds(plan)
    distances = [
        abs(planned / getattr(audit, name) - 1)
        for audit in AUDITED_MEMORY
        for name, planned in planned_memory(audited_plan(audit.model, num_gpus=audit.num_gpus)).items()
    ]
    figures = {f"{name}_s": round(value, 1) for name, value in seconds.items()}
    return {"step_s": round(sum(seconds.values()), 1), **figures, "memory_distance": round(max(distances), 3)}


def tables() -> Iterator[Table]:
    """Yield the planned beside the audited memory and seconds."""
    table = Table(title="GB per GPU on H100s, planned / audited", title_justify="left")
    for column in ("", "weights", "Adam", "reference", "gradient", "update", "rollout"):
        table.add_column(column, justify="right")
    for audit in AUDITED_MEMORY:
        memory = planned_memory(audited_plan(audit.model, num_gpus=audit.num_gpus))
        pairs = (f"{value:.1f} / {getattr(audit, name):g}" for name, value in memory.items())
        table.add_row(f"{audit.model} x {audit.num_gpus}", *pairs)
    yield table
    table = Table(title="seconds of a step of 512 x 5, 8 H100", title_justify="left")
    for column in ("", "3B", "3B audited", "7B"):
        table.add_column(column, justify="right")
    small, large = (planned_seconds(audited_plan(model, ig_service_gpus=8)) for model in ("3B", "7B"))
    for name, (best, worst) in AUDITED_SECONDS.items():
        table.add_row(name, f"{small[name]:.1f}", f"{best:g} - {worst:g}", f"{large[name]:.1f}")
    table.add_row("step", f"{sum(small.values()):.1f}", "50 - 170", f"{sum(large.values()):.1f}")
    yield table


def recipe_rows() -> Iterator[str]:
    """Yield a row of docs/scale.md for each recipe for GPUs and each size, on GPUs of 80 GB."""
    for recipe in ("gpu_1", "gpu_2", "gpu_4", "gpu", "gpu_16", "gpu_16_off"):
        for size in ("1.5B", "3B", "7B"):
            plan, problem = _recipe_plan(recipe, size)
            result = f"{plan.step_s:.0f} | fits"
            if problem is not None:
                result = f"| {problem.partition('; change: ')[2]}"
            yield f"| `{recipe}` | {size} | {_gigabytes(plan)} | {result} |"


def lora_rows() -> Iterator[str]:
    """Yield a row of docs/scale.md for each of what fits with adapters of rank 32 alone."""
    for recipe, size in (("gpu_1", "3B"), ("gpu_1", "7B"), ("gpu_2", "7B")):
        plan, problem = _recipe_plan(recipe, size, "actor_rollout_ref.model.lora_rank=32")
        assert problem is None, problem
        whole, _ = _recipe_plan(recipe, size)
        largest = max(total(whole.items, phase, gpu=0) for phase in Phase) / GB
        seconds = f"{plan.step_s:.0f}"
        yield f"| `{recipe}` | {size} | {_gigabytes(plan)} | {seconds} | {largest:.1f}, does not fit |"


def stage_rows() -> Iterator[str]:
    """Yield a row of docs/scale.md for each stage of a step of 512 x 5 episodes, and their sum."""
    plans = [audited_plan(model, ig_service_gpus=8) for model in ("3B", "7B")]
    for stages in zip(*(plan.stages for plan in plans), strict=True):
        yield f"| {stages[0].name} | {' | '.join(f'{stage.seconds:.1f}' for stage in stages)} |"
    yield f"| step | {' | '.join(f'{plan.step_s:.1f}' for plan in plans)} |"


def _recipe_plan(recipe: str, size: str, *overrides: str) -> tuple[Plan, str | None]:
    shape = KNOWN_SHAPES[f"Qwen/Qwen2.5-{size}"]
    return plan_run(compose_config(f"recipe={recipe}", *overrides), shape, find_gpu("H100"))


def _gigabytes(plan: Plan) -> str:
    phases = (Phase.ROLLOUT, Phase.UPDATE, Phase.PUBLISH)
    return " | ".join(f"{total(plan.items, phase, gpu=0) / GB:.1f}" for phase in phases)
