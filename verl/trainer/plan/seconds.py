"""Expected seconds of every stage of a step, and the part of them that the hardware's limit explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.trainer.plan.assumptions import (
    AGENT_COMPLETION_S,
    BANDWIDTH_SHARE,
    BATCH_COMPLETION_S,
    BATCH_EPISODE_S,
    COMPUTED_LOG_PROBS,
    COMPUTED_UPDATE,
    CPU_SEARCHES_PER_S,
    DRIVER_COMPLETION_S,
    DRIVER_EPISODE_S,
    ENGINE_STEP_S,
    ENGINE_TOKEN_S,
    FILE_BYTES_PER_S,
    GAIN_FLOPS,
    GAIN_LATENCY_S,
    GB,
    GPU_SEARCHES_PER_S,
    HOST_BYTES_PER_S,
    IPC_BYTES_PER_S,
    LORA_TRAIN_SHARE,
    NCCL_BYTES_PER_S,
    PREFILL_SHARE,
    RECORD_COMPLETION_S,
    SLEEP_S,
    TRAIN_SHARE,
)
from verl.trainer.plan.gpus import Gpu
from verl.trainer.plan.memory import ADAM_BYTES, FLOAT32, Phase, policy_bytes
from verl.trainer.plan.setup import Offload, Setup

ENGINES = "engines"
"""The stage of the rollout that GPUs compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of a phase; the stages of a step follow each other."""

    phase: Phase
    name: str
    seconds: float | None
    """None: not planned, as `detail` explains."""
    detail: str = ""
    tokens: float | None = None
    """Of all ranks or engines, where the stage computes tokens."""
    limit_s: float = 0.0
    """What the stage would take at the peak of the GPUs."""

    @property
    def limit_share(self) -> float | None:
        return self.limit_s / self.seconds if self.seconds and self.limit_s else None


def list_stages(setup: Setup) -> list[Stage]:
    """Return the stages of a training step in order; none for a GPU of unknown speed, or without training.

    All episodes of a step begin at the same time, so that most of them are at the same turn: engines, driver
    and retriever take turns more than they overlap, and their seconds are added.
    """
    if setup.gpu.flops is None or setup.gpu.bandwidth is None or not setup.trains:
        return []
    rollout = [_engines(setup), _agents(setup), _driver(setup), _retrieval(setup)]
    rollout_s = sum(stage.seconds or 0.0 for stage in rollout)
    share = _train_share(setup)
    reward = [_gains(setup, hidden_s=rollout_s)] if setup.uses_ig_service else []
    reward += [_pass(setup, Phase.REWARD, "method_log_probs", share=share)] if setup.scores_log_probs else []
    knows_old = setup.num_updates == 1 or setup.scores_with_policy
    log_probs = [_batch(setup)]
    log_probs += [] if knows_old else [_pass(setup, Phase.LOG_PROBS, "old_log_probs", share=share)]
    if setup.frozen.has_kl:
        # The reference has no adapters.
        log_probs.append(_pass(setup, Phase.LOG_PROBS, "reference_log_probs", share=TRAIN_SHARE))
    offload = [_offload(setup)] if setup.offload != Offload() else []
    return [*rollout, *reward, *log_probs, _update(setup), _publish(setup), *offload, _records(setup)]


def step_seconds(stages: Sequence[Stage], setup: Setup) -> float | None:
    """Return the seconds of a step, without stages that are not planned; None if none is.

    Where the next step is sampled while one trains, a publish waits for both. On the same GPUs engines and
    training then take turns, and what the rollout does on CPUs runs beside them.
    """
    if not stages:
        return None
    rollout, publish = phase_seconds(stages, Phase.ROLLOUT), phase_seconds(stages, Phase.PUBLISH)
    training = sum(stage.seconds or 0.0 for stage in stages) - rollout - publish
    if not setup.runs_ahead:
        return rollout + training + publish
    if setup.is_colocated:
        training += sum(stage.seconds or 0.0 for stage in stages if stage.name == ENGINES)
    return max(rollout, training) + publish


def phase_seconds(stages: Sequence[Stage], phase: Phase) -> float:
    """Return the seconds of the stages of a phase."""
    return sum(stage.seconds or 0.0 for stage in stages if stage.phase == phase)


def _speed(gpu: Gpu) -> tuple[float, float]:
    """Return FLOP/s and bytes/s of a GPU whose speed is known."""
    assert gpu.flops is not None
    assert gpu.bandwidth is not None
    return gpu.flops, gpu.bandwidth


def _train_share(setup: Setup) -> float:
    """Return the share of peak FLOP/s that the policy reaches."""
    return LORA_TRAIN_SHARE if setup.lora_rank else TRAIN_SHARE


def _pass(setup: Setup, phase: Phase, name: str, *, share: float) -> Stage:
    """Return a forward pass over all episodes, at a share of peak FLOP/s."""
    tokens = setup.episodes.count * setup.episodes.tokens
    peak = _speed(setup.gpu)[0] * setup.world_size
    limit_s = setup.shape.pass_flops(setup.episodes.tokens) * tokens / peak
    seconds = limit_s * COMPUTED_LOG_PROBS / share
    return Stage(phase=phase, name=name, seconds=seconds, tokens=tokens, limit_s=limit_s)


def _update(setup: Setup) -> Stage:
    """Return the update; checkpointing computes the forward pass once more."""
    tokens = setup.episodes.count * setup.episodes.tokens * setup.num_epochs
    passes = setup.update_passes + setup.recomputed_share
    peak = _speed(setup.gpu)[0] * setup.world_size
    one_pass_s = setup.shape.pass_flops(setup.episodes.tokens) * tokens / peak
    return Stage(
        phase=Phase.UPDATE,
        name="update",
        detail=f"{setup.num_updates} optimizer steps",
        seconds=one_pass_s * passes * COMPUTED_UPDATE / _train_share(setup),
        tokens=tokens,
        limit_s=one_pass_s * setup.update_passes,
    )


def _engines(setup: Setup) -> Stage:
    """Return reading and sampling of the engines: all episodes together, then the longest one alone."""
    flops, bandwidth = _speed(setup.gpu)
    shape, episodes, tp = setup.shape, setup.episodes, setup.engine_gpus
    gpus = setup.engine_world_size
    # A prompt is read once for its group, what follows once: the cache keeps the rest.
    read = episodes.questions * episodes.prompt_tokens + episodes.count * episodes.observation_tokens
    read_limit_s = 2.0 * shape.parameters * read / (flops * gpus)
    # KV heads below one per GPU are copied.
    kv = shape.kv_bytes(setup.number_bytes) / min(tp, shape.kv_heads)
    context = episodes.tokens * 0.7
    room = max(1.0, setup.cache_bytes / (kv * context))
    running = min(episodes.count, setup.max_concurrent or episodes.count)
    batch = min(setup.max_num_seqs, running / setup.replicas, room)
    sampled = episodes.count * episodes.sampled_tokens
    steps = sampled / setup.replicas / batch
    moved = setup.engine_weight_bytes + batch * context * kv  # bytes per decoding step and GPU
    step_limit_s = max(moved / bandwidth, 2.0 * shape.parameters * batch / (flops * tp))
    seconds = (
        read_limit_s / PREFILL_SHARE
        + steps * decoding_step_s(step_limit_s, sequences=batch)
        + episodes.longest_sampled * decoding_step_s(setup.engine_weight_bytes / bandwidth, sequences=1)
    )
    return Stage(
        phase=Phase.ROLLOUT,
        name=ENGINES,
        detail=f"{setup.replicas} x {batch:.0f} sequences at a time"
        + ("" if setup.slot_rank is None else ", without the kernels of adapters"),
        seconds=seconds,
        tokens=read + sampled,
        limit_s=read_limit_s + steps * step_limit_s,
    )


def decoding_step_s(limit_s: float, *, sequences: float) -> float:
    """Return the seconds of a decoding step: of its kernels, which take `limit_s` at the speed of the GPU's
    data sheet, or of vLLM's processes if they take longer.

    vLLM prepares a step while the GPU computes the one before. This was not measured where both take about
    as long, nor for one sequence.
    """
    return max(limit_s / BANDWIDTH_SHARE, ENGINE_STEP_S + sequences * ENGINE_TOKEN_S)


def _agents(setup: Setup) -> Stage:
    """Return the work of the agents, each in the process of its engine."""
    completions = setup.episodes.count * (setup.episodes.searches + 1)
    seconds = completions * AGENT_COMPLETION_S / setup.replicas
    return Stage(phase=Phase.ROLLOUT, name="agents", seconds=seconds)


def _driver(setup: Setup) -> Stage:
    """Return the work of the trainer's own thread while episodes run."""
    seconds = _per_episode(setup, DRIVER_EPISODE_S, DRIVER_COMPLETION_S)
    return Stage(phase=Phase.ROLLOUT, name="driver", seconds=seconds)


def _batch(setup: Setup) -> Stage:
    """Return the work of the trainer's own thread between the episodes and the passes over them."""
    seconds = _per_episode(setup, BATCH_EPISODE_S, BATCH_COMPLETION_S)
    return Stage(phase=Phase.LOG_PROBS, name="batch", detail="scores, credit, dealing", seconds=seconds)


def _records(setup: Setup) -> Stage:
    """Return the work of the trainer's own thread after the publish."""
    seconds = _per_episode(setup, 0.0, RECORD_COMPLETION_S)
    return Stage(phase=Phase.PUBLISH, name="records", detail="with metrics", seconds=seconds)


def _per_episode(setup: Setup, episode_s: float, completion_s: float) -> float:
    """Return the seconds of all episodes; each has one completion more than searches."""
    return setup.episodes.count * (episode_s + completion_s * (setup.episodes.searches + 1))


def _retrieval(setup: Setup) -> Stage:
    """Return the searches, which the retriever answers in batches."""
    searches = setup.episodes.count * setup.episodes.searches
    if setup.retriever_gpus:
        rate, where = GPU_SEARCHES_PER_S * setup.retriever_gpus, f"{setup.retriever_gpus} GPUs"
    else:
        rate, where = CPU_SEARCHES_PER_S, "CPUs (ivf_pq)"
    detail = f"{searches:,.0f} searches on {where}"
    return Stage(phase=Phase.ROLLOUT, name="retrieval", detail=detail, seconds=searches / rate)


def _gains(setup: Setup, *, hidden_s: float) -> Stage:
    """Return how long a step still waits for gains that were requested while its episodes ran.

    Where the step before trains meanwhile, on the same GPUs, the gains take their whole time from it. The
    generator of the IG service is taken to have 3 billion parameters.
    """
    if not setup.ig_gpus:
        detail = "the IG service runs elsewhere: placement.ig_service_gpus=0"
        return Stage(phase=Phase.REWARD, name="gains", seconds=None, detail=detail)
    work_s = GAIN_FLOPS * setup.episodes.count / (_speed(setup.gpu)[0] * setup.ig_gpus)
    where = f"on GPU {'0' if setup.ig_gpus == 1 else f'0-{setup.ig_gpus - 1}'}"
    if setup.runs_ahead:
        detail = f"{where}, which train meanwhile"
        return Stage(phase=Phase.REWARD, name="gains", detail=detail, seconds=work_s)
    visible_s = max(0.0, work_s - hidden_s) + GAIN_LATENCY_S
    detail = f"visible of {work_s:.0f} s {where}"
    return Stage(phase=Phase.REWARD, name="gains", detail=detail, seconds=visible_s)


def _publish(setup: Setup) -> Stage:
    """Return sleep and wake of the engines, and the way of the weights, or adapters, to them."""
    way, speed = {
        "file": ("through host memory", FILE_BYTES_PER_S),
        "ipc": ("through GPU memory", IPC_BYTES_PER_S),
        "nccl": ("over NCCL", NCCL_BYTES_PER_S),
    }[setup.transfer]
    asleep_s = SLEEP_S if setup.frees_engine else 0.0
    if setup.slot_rank is not None:
        way = f"adapters {way}"
        # What an engine keeps while it sleeps goes to host memory and back.
        asleep_s += 2 * setup.engine_weight_bytes / HOST_BYTES_PER_S if setup.frees_engine else 0.0
    return Stage(
        phase=Phase.PUBLISH,
        name="publish",
        detail=f"{way}, with sleep and wake" if setup.frees_engine else way,
        seconds=asleep_s + setup.sent_bytes / speed,
    )


def _offload(setup: Setup) -> Stage:
    """Return the copies to host memory and back; frozen weights, those below adapters too, only come back."""
    trained, offload = setup.trained_parameters, setup.offload
    moved = 2.0 * ADAM_BYTES * trained if offload.optimizer else 0.0
    moved += policy_bytes(setup) + FLOAT32 * trained if offload.policy else 0.0
    frozen = setup.frozen.count * setup.shape.parameters * setup.number_bytes
    moved += frozen if offload.reference else 0.0
    per_gpu = moved / setup.num_shards
    return Stage(
        phase=Phase.PUBLISH,
        name="offload",
        detail=f"{per_gpu / GB:.1f} GB to and from host memory per GPU",
        seconds=per_gpu / HOST_BYTES_PER_S,
    )
