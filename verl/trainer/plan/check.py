"""The plan of a run: its memory, its seconds, whether it fits, and which settings make it fit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from verl.trainer.config.pools import check_pools, has_own_gpus
from verl.trainer.config.schema import ONE_STEP_OFF, Config
from verl.trainer.needs import find_frozen_models
from verl.trainer.plan.assumptions import GB, USABLE_SHARE
from verl.trainer.plan.gpus import Gpu, MeasuredGpu
from verl.trainer.plan.memory import Item, Phase, list_items, total
from verl.trainer.plan.seconds import Stage, list_stages, step_seconds
from verl.trainer.plan.setup import Setup, make_setup
from verl.trainer.plan.shape import ModelShape

Settings = Mapping[str, float]
"""Settings to change, by their keys."""

_ENGINE = "actor_rollout_ref.rollout.gpu_memory_utilization"
_TOKENS = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
_CHECKPOINTING = "actor_rollout_ref.model.enable_gradient_checkpointing"
_EVERY_N_LAYERS = "actor_rollout_ref.model.checkpoint_every_n_layers"
_OFFLOAD = (
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    "actor_rollout_ref.actor.fsdp_config.param_offload",
    "actor_rollout_ref.ref.fsdp_config.param_offload",
)
"""In the order in which they are tried: the largest first, and the reference only where there is one."""
_LORA = "actor_rollout_ref.model.lora_rank"
_LORA_RANK = 32
_OWN_GPUS = "actor_rollout_ref.rollout.n_gpus_per_node"
_IG_GPUS = "placement.ig_service_gpus"
_NUM_GPUS = "trainer.n_gpus_per_node"
_OWN_GPU_SHARES = (0.9, 0.85, 0.8, 0.7, 0.6)
_ENGINE_SHARES = (0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
_TOKEN_LIMITS = (16384, 8192, 4096, 2048)
_GPU_COUNTS = (2, 4, 8)
_MIN_SEQUENCES = 16
"""Longest sequences for which a suggested share of the engine has room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """The phase and GPU that lack most memory."""

    phase: Phase
    gpu: int
    needed: float
    """Bytes, as `usable`."""
    usable: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a step takes of the GPUs, in memory and in time."""

    setup: Setup
    items: tuple[Item, ...]
    stages: tuple[Stage, ...]

    @property
    def usable(self) -> float:
        """Return the bytes of a GPU that can be used."""
        return self.setup.gpu.memory * USABLE_SHARE

    @property
    def step_s(self) -> float | None:
        """Return the seconds of a step; None where they are not planned."""
        return step_seconds(self.stages, self.setup)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(Phase) if self.setup.trains else (Phase.LOAD, Phase.ROLLOUT, Phase.PUBLISH)

    @property
    def excess(self) -> Excess | None:
        """Return by how much the fullest phase is too large; None where everything fits."""
        needs = [
            Excess(phase=phase, gpu=gpu, needed=total(self.items, phase, gpu=gpu), usable=self.usable)
            for phase in self.phases
            for gpu in range(self.setup.num_gpus)
        ]
        worst = max(needs, key=lambda need: need.needed)
        return worst if worst.needed > self.usable else None

    @property
    def fits(self) -> bool:
        """Return whether every phase fits, and the engine has room for the longest sequence."""
        return self.excess is None and self.setup.cache_bytes >= self.setup.sequence_cache_bytes


def make_plan(setup: Setup) -> Plan:
    """Return the plan of these facts."""
    return Plan(setup=setup, items=tuple(list_items(setup)), stages=tuple(list_stages(setup)))


def plan_run(
    config: Config, shape: ModelShape, gpu: Gpu, *, machine: tuple[MeasuredGpu, ...] = ()
) -> tuple[Plan, str | None]:
    """Return the plan of a configuration, and one line that says why it does not fit and what to change.

    `machine` are the GPUs of this machine, where other programs may run already.
    """
    used = tuple(measured.used for measured in machine)
    plan = make_plan(make_setup(config, shape, gpu, other_bytes=used))
    if plan.fits:
        return plan, None
    changes = [
        " ".join(_show(key, value) for key, value in change.items())
        for change in find_changes(config, shape, gpu, used=used)
    ]
    advice = ", or ".join(changes) or "take a smaller model or GPUs with more memory"
    return plan, f"the run does not fit: {_describe(plan)}; change: {advice}"


def find_changes(config: Config, shape: ModelShape, gpu: Gpu, *, used: tuple[float, ...]) -> list[Settings]:
    """Return changes of settings with which the run fits: the smallest of each kind that has one.

    On the same GPUs, with engines on some of them alone where they sample ahead, with more GPUs, and with
    adapters where the same GPUs are too few for all that is on them. All of them were planned.
    """

    def fits(changes: Settings) -> bool:
        changed = change_settings(config, changes)
        setup = make_setup(changed, shape, gpu, other_bytes=used)
        has_room = setup.cache_bytes >= _MIN_SEQUENCES * setup.sequence_cache_bytes
        return has_room and make_plan(setup).fits and not check_pools(changed, device="cuda")

    same_gpus = next(filter(fits, _list_changes(config)), None)
    is_everywhere = config.placement.ig_service_gpus >= config.trainer.n_gpus_per_node
    more_gpus = (
        {_NUM_GPUS: count, **({_IG_GPUS: count} if is_everywhere else {}), **changes}
        for count in _GPU_COUNTS
        if count > config.trainer.n_gpus_per_node
        for changes in _list_changes(config)
        if _IG_GPUS not in changes
    )
    on_more_gpus = next(filter(fits, more_gpus), None)
    adapters = None
    if not config.actor_rollout_ref.model.lora_rank and (same_gpus is None or _IG_GPUS in same_gpus):
        with_adapters = ({_LORA: _LORA_RANK, **changes} for changes in _list_changes(config))
        adapters = next(filter(fits, with_adapters), None)

    def step_s(changes: Settings) -> float:
        setup = make_setup(change_settings(config, changes), shape, gpu, other_bytes=used)
        return make_plan(setup).step_s or 0.0

    pools = min(filter(fits, _list_pools(config)), key=step_s, default=None)
    return [change for change in (same_gpus, pools, on_more_gpus, adapters) if change is not None]


def _list_pools(config: Config) -> Iterator[Settings]:
    """Yield numbers of GPUs for engines alone, where those sample ahead and share the GPUs of the policy."""
    rollout, num_gpus = config.actor_rollout_ref.rollout, config.trainer.n_gpus_per_node
    if has_own_gpus(rollout) or config.trainer.schedule != ONE_STEP_OFF:
        return
    parallel = rollout.tensor_model_parallel_size
    for own in range(parallel, num_gpus, parallel):
        others = num_gpus - own
        service = {_IG_GPUS: others} if config.placement.ig_service_gpus > others else {}
        for share in _OWN_GPU_SHARES:
            yield {_OWN_GPUS: own, _ENGINE: share, **service}


def _list_changes(config: Config) -> Iterator[Settings]:
    """Yield changes of settings on the same GPUs, from none over single ones to several."""
    settings = config.actor_rollout_ref
    share, tokens = settings.rollout.gpu_memory_utilization, settings.actor.ppo_max_token_len_per_gpu
    values = (*(_OWN_GPU_SHARES if has_own_gpus(settings.rollout) else ()), *_ENGINE_SHARES)
    shares: list[Settings] = [{}, *({_ENGINE: value} for value in values if value != share)]
    longest = config.data.max_model_len
    limits: list[Settings] = [{}]
    limits += [{_TOKENS: value} for value in _TOKEN_LIMITS if longest <= value < tokens]
    checkpointing: list[Settings] = [{}]
    if not settings.model.enable_gradient_checkpointing:
        checkpointing.append({_CHECKPOINTING: True})
    if settings.model.checkpoint_every_n_layers > 1:
        checkpointing.append({**checkpointing[-1], _EVERY_N_LAYERS: 1})
    services: list[Settings] = [{}, *([{_IG_GPUS: 0}] if config.placement.ig_service_gpus else [])]
    offloaded = (
        settings.actor.fsdp_config.optimizer_offload,
        settings.actor.fsdp_config.param_offload,
        settings.ref.fsdp_config.param_offload or not find_frozen_models(config).count,
    )
    new = [key for key, is_set in zip(_OFFLOAD, offloaded, strict=True) if not is_set]
    offload: list[Settings] = [dict.fromkeys(new[:count], True) for count in range(len(new) + 1)]
    # The fewest settings first; among equally many, those of the engine before those of the update.
    combinations = itertools.product(services, offload, checkpointing, limits, shares)
    changes = [{**a, **b, **c, **d, **e} for a, b, c, d, e in combinations]
    yield from sorted(changes, key=len)


def change_settings(config: Config, changes: Settings) -> Config:
    """Return a copy of a configuration with other values under these keys."""
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        *path, name = key.split(".")
        section: object = changed
        for part in path:
            section = getattr(section, part)
        assert name in {field.name for field in fields(section)}  # type: ignore[arg-type]
        setattr(section, name, value)
    return changed


def _describe(plan: Plan) -> str:
    setup, excess = plan.setup, plan.excess
    if excess is None:
        return (
            f"the engine's share of {setup.gpu.memory * setup.engine_share / GB:.1f} GB "
            f"({_ENGINE}={setup.engine_share:g}) has no room beside {setup.engine_weight_bytes / GB:.1f} GB "
            f"of weights for a sequence of {setup.max_model_len} tokens"
        )
    present = [item for item in plan.items if excess.gpu in item.gpus and excess.phase in item.amounts]
    largest = sorted(present, key=lambda item: -item.amounts[excess.phase])[:3]
    parts = ", ".join(f"{item.name} {item.amounts[excess.phase] / GB:.1f}" for item in largest)
    return (
        f"phase {excess.phase} needs {excess.needed / GB:.1f} GB on GPU {excess.gpu} ({parts}, ...) of "
        f"{excess.usable / GB:.1f} GB that are usable of {setup.gpu.memory / GB:.1f}"
    )


def _show(key: str, value: float) -> str:
    meaning = " (start the IG service on other GPUs)" if (key, value) == (_IG_GPUS, 0) else ""
    meaning = " (train adapters alone)" if key == _LORA else meaning
    return f"{key}={str(value).lower() if isinstance(value, bool) else f'{value:g}'}{meaning}"
