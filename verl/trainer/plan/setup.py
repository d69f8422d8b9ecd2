"""What a configuration puts on which GPU: the facts that the memory and the time of a step follow from."""

from __future__ import annotations

from dataclasses import dataclass, field

from verl.algorithms.base import Need
from verl.trainer.config.data import DataConfig
from verl.trainer.config.pools import engine_gpus, has_own_gpus, policy_gpus, slot_rank, transfer_kind
from verl.trainer.config.schema import ONE_STEP_OFF, Config
from verl.trainer.needs import USE_IG_SERVICE, FrozenModels, find_frozen_models, find_needs
from verl.trainer.plan.assumptions import (
    COMPLETION_TOKENS,
    ENGINE_BYTES,
    ENGINE_HIDDENS,
    ENGINE_INTERMEDIATES,
    ENGINE_TOKENS,
    GB,
    PASSAGE_TOKENS,
    PROMPT_TOKENS,
    SEARCHED_SHARE,
)
from verl.trainer.plan.gpus import Gpu
from verl.trainer.plan.shape import ModelShape
from verl.workers.batch import count_mini_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """What waits in host memory while its phase does not need it."""

    policy: bool = False
    """Weights; gradients are dropped with each update."""
    optimizer: bool = False
    reference: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """What the episodes of a step are expected to be; tokens are means per episode."""

    questions: int
    per_question: int
    searches: float
    prompt_tokens: float
    observation_tokens: float
    sampled_tokens: float
    longest_sampled: int
    """Tokens that the longest episode samples; the engines end with it alone."""

    @property
    def count(self) -> int:
        return self.questions * self.per_question

    @property
    def tokens(self) -> float:
        """Return the tokens of one episode."""
        return self.prompt_tokens + self.observation_tokens + self.sampled_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run on GPUs, as the plan sees it."""

    shape: ModelShape
    gpu: Gpu
    num_gpus: int
    """Of one node."""
    policy_gpus: range
    """Of one node; each has a rank of the policy."""
    pool_gpus: range
    """Of one node, for the engines; they are the same or others."""
    num_nodes: int = 1
    num_shards: int
    """Ranks that share one copy of the policy."""
    frozen: FrozenModels
    scores_with_policy: bool
    """Whether the method measures log-probs under the policy; then the same pass gives the old ones."""
    scores_with_frozen: bool
    uses_ig_service: bool
    trains: bool
    number_bytes: int
    """Of a number in forward passes and in the engine."""
    recomputed_share: float
    """Layers that checkpointing computes again in the backward pass, as a share."""
    micro_tokens: int
    """Tokens of one forward pass of a rank."""
    num_updates: int
    """Optimizer steps per training step."""
    num_epochs: int
    engine_gpus: int
    """GPUs of one engine."""
    engine_share: float
    engine_tokens: int
    """Tokens that an engine computes at once."""
    max_num_seqs: int
    max_concurrent: int | None
    """Episodes at a time over all engines; None: as many as the engines take."""
    max_model_len: int
    frees_engine: bool
    """Whether the engine sleeps while the policy has the GPU."""
    transfer: str
    """How weights reach the engines, see `transfer_kind`."""
    runs_ahead: bool
    """Whether a step is sampled while the one before trains."""
    ig_gpus: int
    """Of the driver's node, as those of the retriever; the other nodes have fewer programs."""
    ig_share: float
    retriever_gpus: int
    index_bytes: float
    other_bytes: tuple[float, ...] = ()
    """What other programs were found to use on each GPU, services included; empty: not measured."""
    episodes: Episodes
    offload: Offload = field(default_factory=Offload)
    lora_rank: int = 0
    slot_rank: int | None = None
    """Rank for which engines have room, where adapters are all that they get; None: they get all weights."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the policy over all nodes."""
        return len(self.policy_gpus) * self.num_nodes

    @property
    def engine_world_size(self) -> int:
        """Return the number of GPUs of engines over all nodes."""
        return len(self.pool_gpus) * self.num_nodes

    @property
    def is_colocated(self) -> bool:
        """Return whether engines share the GPUs of the policy."""
        return self.policy_gpus == self.pool_gpus

    @property
    def update_passes(self) -> int:
        """Return the FLOP of an update in forward passes: one, and two backward, with LoRA one."""
        return 2 if self.lora_rank else 3

    @property
    def scores_log_probs(self) -> bool:
        """Return whether the method measures log-probs while it rewards."""
        return self.scores_with_policy or self.scores_with_frozen

    @property
    def trained_parameters(self) -> int:
        """Return the number of parameters with gradient and optimizer state."""
        return self.shape.lora_parameters(self.lora_rank) if self.lora_rank else self.shape.parameters

    @property
    def replicas(self) -> int:
        """Return the number of engines over all nodes."""
        return self.engine_world_size // self.engine_gpus

    @property
    def engine_weight_bytes(self) -> float:
        """Return the weights of an engine per GPU, with room for an adapter, mostly whole on each."""
        slot = self.shape.lora_parameters(self.slot_rank or 0)
        return (self.shape.parameters / self.engine_gpus + slot) * self.number_bytes

    @property
    def sent_bytes(self) -> float:
        """Return the bytes that an engine gets after an update: all weights, or adapters in float32."""
        if self.slot_rank is None:
            return float(self.shape.parameters * self.number_bytes)
        return 4.0 * self.trained_parameters

    @property
    def cache_bytes(self) -> float:
        """Return the key-value cache of an engine per GPU; negative where the weights alone are too large."""
        shape = self.shape
        sizes = ENGINE_INTERMEDIATES * shape.intermediate / self.engine_gpus + ENGINE_HIDDENS * shape.hidden
        others = ENGINE_BYTES + self.engine_tokens * self.number_bytes * sizes
        return self.gpu.memory * self.engine_share - self.engine_weight_bytes - others

    @property
    def sequence_cache_bytes(self) -> float:
        """Return what the longest sequence takes of the cache per GPU; a KV head is copied, never split."""
        split = min(self.engine_gpus, self.shape.kv_heads)
        return self.max_model_len * self.shape.kv_bytes(self.number_bytes) / split


def make_setup(config: Config, shape: ModelShape, gpu: Gpu, *, other_bytes: tuple[float, ...] = ()) -> Setup:
    """Return the facts of a configuration on GPUs of this kind; `trainer.device` is not read."""
    settings, placement = config.actor_rollout_ref, config.placement
    actor, rollout = settings.actor, settings.rollout
    needs = find_needs(config)
    num_gpus, num_nodes = config.trainer.n_gpus_per_node, config.trainer.nnodes
    node_ranks = len(policy_gpus(config))
    separate = has_own_gpus(rollout)
    fsdp_size = actor.fsdp_config.fsdp_size
    minis = count_mini_batches(config.trajectories_per_step, mini_batch_size=actor.ppo_mini_batch_size)
    # A rank with few rows never fills a forward pass.
    rows = -(-min(config.trajectories_per_step, actor.ppo_mini_batch_size) // (node_ranks * num_nodes))
    longest = config.data.max_model_len
    trains = not config.trainer.evaluates_only
    return Setup(
        shape=shape,
        gpu=gpu,
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        policy_gpus=policy_gpus(config),
        pool_gpus=engine_gpus(config),
        num_shards=node_ranks * num_nodes if fsdp_size == -1 else fsdp_size or node_ranks,
        frozen=find_frozen_models(config),
        scores_with_policy=Need.POLICY_LOG_PROBS in needs,
        scores_with_frozen=Need.FROZEN_LOG_PROBS in needs,
        uses_ig_service=bool(needs & USE_IG_SERVICE),
        trains=trains,
        number_bytes=4 if settings.model.dtype == "float32" else 2,
        recomputed_share=settings.model.enable_gradient_checkpointing
        / settings.model.checkpoint_every_n_layers,
        micro_tokens=min(max(actor.ppo_max_token_len_per_gpu, longest), rows * longest),
        num_updates=minis * actor.ppo_epochs,
        num_epochs=actor.ppo_epochs,
        engine_gpus=rollout.tensor_model_parallel_size,
        engine_share=rollout.gpu_memory_utilization,
        engine_tokens=rollout.max_num_batched_tokens or ENGINE_TOKENS,
        max_num_seqs=rollout.max_num_seqs,
        max_concurrent=config.trainer.max_concurrent_episodes,
        max_model_len=longest,
        frees_engine=rollout.free_cache_engine and not separate,
        transfer=transfer_kind(settings, device="cuda"),
        runs_ahead=config.trainer.schedule == ONE_STEP_OFF,
        ig_gpus=min(placement.ig_service_gpus, num_gpus),
        ig_share=placement.ig_service_memory,
        retriever_gpus=min(placement.retriever_gpus, num_gpus),
        index_bytes=placement.retriever_index_gb * GB,
        other_bytes=other_bytes,
        offload=Offload(
            policy=actor.fsdp_config.param_offload,
            optimizer=actor.fsdp_config.optimizer_offload,
            reference=settings.ref.fsdp_config.param_offload,
        ),
        episodes=expect_episodes(config),
        lora_rank=settings.model.lora_rank,
        slot_rank=slot_rank(settings.model),
    )


def expect_episodes(config: Config) -> Episodes:
    """Return what episodes are expected to be: means of NQ and HotpotQA, within the limits of `data`."""
    data: DataConfig = config.data
    searches = SEARCHED_SHARE * config.max_turns
    prompt = min(PROMPT_TOKENS, data.max_start_length)
    sampled = (searches + 1) * min(COMPLETION_TOKENS, data.max_response_length)
    observed = searches * min(config.retriever.topk * PASSAGE_TOKENS, data.max_obs_length)
    return Episodes(
        questions=data.train_batch_size,
        per_question=config.actor_rollout_ref.rollout.n_agent,
        searches=searches,
        prompt_tokens=prompt,
        # An episode that would exceed the longest context ends before.
        observation_tokens=max(0.0, min(observed, data.max_model_len - prompt - sampled)),
        sampled_tokens=sampled,
        longest_sampled=min((config.max_turns + 1) * data.max_response_length, data.max_model_len),
    )
