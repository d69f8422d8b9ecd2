"""The plan for the terminal and for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.table import Table

from verl.trainer.plan.assumptions import GB
from verl.trainer.plan.check import Plan
from verl.trainer.plan.memory import total
from verl.trainer.plan.setup import Setup

_WIDTH = 110
"""Where stdout is no terminal."""


def print_plan(plan: Plan) -> None:
    """Print where everything is, the memory of every kind of GPU, and the seconds of every stage."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    console.print(Group("\n".join(describe_places(plan)), *memory_tables(plan), seconds_table(plan)))


def describe_places(plan: Plan) -> list[str]:
    """Return one line per part of the run: what is where."""
    setup = plan.setup
    gpus, nodes = setup.num_gpus, setup.num_nodes
    policy, engines = (_place(setup, pool) for pool in (setup.policy_gpus, setup.pool_gpus))
    lines = [
        f"{setup.gpu.name}: {nodes * gpus} GPUs of {setup.gpu.memory / GB:.1f} GB, "
        f"a model of {setup.shape.parameters / 1e9:.2f} billion parameters",
        f"policy: {policy}, a rank on each, sharded over {setup.num_shards}",
    ]
    if setup.lora_rank:
        lines.append(f"trained: adapters of rank {setup.lora_rank}; without them the policy is the reference")
    if setup.frozen.count:
        names = [*(["reference"] if setup.frozen.loads_reference else [])]
        names += ["the method's copy of the policy"] if setup.frozen.refresh_steps else []
        lines.append(f"{' and '.join(names)}: as the policy")
    sleeps = "asleep while the policy has the GPU" if setup.frees_engine else "always awake"
    lines.append(
        f"engines: {engines}, {setup.replicas} of {setup.engine_gpus} GPU{'s' * (setup.engine_gpus > 1)} "
        f"each, {setup.engine_share:g} of the memory, {sleeps}"
    )
    if setup.slot_rank is not None:
        size = setup.engine_weight_bytes * len(setup.pool_gpus) / GB
        kept = f", {size:.1f} GB of weights of a node wait in host memory" if setup.frees_engine else ""
        lines.append(f"engines get adapters alone, and keep the weights below them{kept}")
    here = " of the trainer's node" if nodes > 1 else ""
    if setup.uses_ig_service:
        where = f"GPU {_span(range(setup.ig_gpus))}{here}, {setup.ig_share:g} of the memory"
        lines.append(f"IG service: {where if setup.ig_gpus else 'elsewhere'}")
    where = (
        f"GPU {_span(range(setup.retriever_gpus))}{here}, {setup.index_bytes / GB:g} GB of vectors over all"
    )
    lines.append(f"retriever: {where if setup.retriever_gpus else 'on CPUs, or elsewhere'}")
    return lines


def _place(setup: Setup, gpus: range) -> str:
    nodes = setup.num_nodes
    return f"GPU {_span(gpus)}" + (f" of each of {nodes} nodes" if nodes > 1 else "")


def memory_tables(plan: Plan) -> Iterator[Table]:
    """Yield a table of GB per item and phase for each set of GPUs that hold the same."""
    for gpus in _same_gpus(plan):
        yield _memory_table(plan, gpus)


def seconds_table(plan: Plan) -> Table | str:
    """Return the expected seconds of each stage; a text where they are not planned."""
    if not plan.stages:
        return "seconds: not planned for this kind of GPU, or for a run that only evaluates"
    table = Table(title="seconds of a step, expected", title_justify="left")
    table.add_column("phase")
    table.add_column("stage")
    table.add_column("")
    for name in ("seconds", "tokens", "of peak"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.phase,
            stage.name,
            stage.detail,
            "-" if stage.seconds is None else f"{stage.seconds:.1f}",
            "" if stage.tokens is None else f"{stage.tokens:,.0f}",
            "" if stage.limit_share is None else f"{stage.limit_share:.0%}",
        )
    table.add_section()
    detail = ""
    if plan.setup.runs_ahead:
        others = "engines with training" if plan.setup.is_colocated else "training"
        detail = f"the longer of rollout and {others}, then publish"
    table.add_row("step", "", detail, f"{plan.step_s:.1f}", "", "")
    return table


def plan_record(plan: Plan) -> dict[str, object]:
    """Return the plan for programs; memory is that of the fullest GPU in each phase, in GB."""
    setup = plan.setup
    seconds = {stage.name: stage.seconds for stage in plan.stages}
    return {
        "fits": plan.fits,
        "gpu": setup.gpu.name,
        "num_gpus": setup.num_gpus * setup.num_nodes,
        "parameters": setup.shape.parameters,
        "usable_gb": round(plan.usable / GB, 1),
        "memory_gb": {
            phase: round(max(total(plan.items, phase, gpu=gpu) for gpu in range(setup.num_gpus)) / GB, 1)
            for phase in plan.phases
        },
        "seconds": {name: None if s is None else round(s, 1) for name, s in seconds.items()},
        "step_s": None if plan.step_s is None else round(plan.step_s, 1),
    }


def _same_gpus(plan: Plan) -> list[list[int]]:
    """Return the GPUs of a node, grouped by what they hold."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for gpu in range(plan.setup.num_gpus):
        held = tuple(i for i, item in enumerate(plan.items) if gpu in item.gpus)
        groups.setdefault(held, []).append(gpu)
    return list(groups.values())


def _memory_table(plan: Plan, gpus: Sequence[int]) -> Table:
    table = Table(title=f"GB on GPU {_span(gpus)}", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase, justify="right")
    for item in plan.items:
        if gpus[0] in item.gpus:
            amounts = [item.amounts.get(phase, 0.0) for phase in plan.phases]
            table.add_row(item.name, *(f"{amount / GB:.1f}" if amount else "" for amount in amounts))
    table.add_section()
    sums = [total(plan.items, phase, gpu=gpus[0]) for phase in plan.phases]
    table.add_row("sum", *(f"{amount / GB:.1f}" for amount in sums))
    table.add_row("usable", *(f"{plan.usable / GB:.1f}" for _ in sums))
    over = [amount - plan.usable for amount in sums]
    if any(amount > 0 for amount in over):
        table.add_row("over", *(f"{amount / GB:.1f}" if amount > 0 else "" for amount in over), style="bold")
    return table


def _span(gpus: Sequence[int] | range) -> str:
    """Write indices that follow each other as `0-7`."""
    is_run = len(gpus) > 1 and gpus[-1] - gpus[0] == len(gpus) - 1
    return f"{gpus[0]}-{gpus[-1]}" if is_run else ", ".join(str(gpu) for gpu in gpus)
