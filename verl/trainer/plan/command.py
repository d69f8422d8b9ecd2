"""`plan=true` of the command line, and the check with which every run on GPUs begins."""

from __future__ import annotations

import json
import logging
import os

from verl.errors import ConfigError
from verl.trainer.config.pools import check_pools
from verl.trainer.config.schema import Config
from verl.trainer.config.validate import check_heads, check_schedule
from verl.trainer.plan.assumptions import GB
from verl.trainer.plan.check import plan_run
from verl.trainer.plan.gpus import KNOWN, Gpu, MeasuredGpu, find_gpu, measure_gpus
from verl.trainer.plan.memory import total
from verl.trainer.plan.shape import UnknownShapeError, read_shape
from verl.trainer.plan.show import plan_record, print_plan

logger = logging.getLogger(__name__)


def show_plan(config: Config) -> None:
    """Print the plan of a run, as JSON in the last line. Raises ConfigError if it does not fit.

    It needs neither GPUs nor data, and of a model folder only config.json.
    """
    if config.trainer.device == "cpu":
        raise ConfigError(
            "plan=true plans GPUs, and trainer.device=cpu has none: on CPUs a run takes little beside the "
            "libraries of its processes (the quickstart: 6 to 7 GB in all); set trainer.device=cuda"
        )
    shape = read_shape(config.actor_rollout_ref.model.path)
    problems = [*check_pools(config, device="cuda"), *check_heads(config, num_heads=shape.kv_heads)]
    if problems := [*problems, *check_schedule(config, device="cuda")]:
        raise ConfigError("; ".join(problems))
    machine = measure_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    gpu = choose_gpu(config, machine)
    if gpu is None:
        raise ConfigError(
            "placement.gpu=null plans the GPUs of this machine, but nvidia-smi reports none; name the kind: "
            f"{', '.join(known.name for known in KNOWN)}, or its memory such as 48GB"
        )
    # On another machine nothing runs yet.
    used = machine if config.placement.gpu is None else ()
    plan, problem = plan_run(config, shape, gpu, machine=used)
    print_plan(plan)
    print(json.dumps(plan_record(plan)), flush=True)  # noqa: T201 (for the program that started this one)
    if problem is not None:
        raise ConfigError(problem)


def check_memory(config: Config, *, model_path: str) -> None:
    """Raise ConfigError for a run on this machine's GPUs that does not fit, before it loads a model.

    Where neither nvidia-smi nor `placement.gpu` says what the GPUs are, or the model is of an unknown kind, a
    warning says that nothing was checked.
    """
    machine = measure_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    gpu = choose_gpu(config, machine)
    if gpu is None:
        logger.warning("memory is not planned: nvidia-smi reports no GPU; name its kind as placement.gpu")
        return
    try:
        shape = read_shape(model_path)
    except UnknownShapeError as error:
        logger.warning("memory is not planned: %s", error)
        return
    if problems := check_heads(config, num_heads=shape.kv_heads):
        raise ConfigError("; ".join(problems))
    plan, problem = plan_run(config, shape, gpu, machine=machine)
    if problem is not None:
        raise ConfigError(f"{problem}; the whole plan: plan=true")
    fullest = max(plan.phases, key=lambda phase: total(plan.items, phase, gpu=0))
    need = total(plan.items, fullest, gpu=0) / GB
    logger.info("memory: at most %.1f of %.1f GB on GPU 0, in %s", need, gpu.memory / GB, fullest)


def choose_gpu(config: Config, machine: tuple[MeasuredGpu, ...]) -> Gpu | None:
    """Return the planned kind: `placement.gpu`, else the smallest of the GPUs that the run would take."""
    if config.placement.gpu is not None:
        return find_gpu(config.placement.gpu)
    taken = [measured.gpu for measured in machine[: config.trainer.n_gpus_per_node]]
    return min(taken, key=lambda gpu: gpu.memory, default=None)
