"""The configuration as typed sections, with defaults and range checks.

Components receive their own section, never the whole tree. The classes are plain (Hydra merges overrides into
them); nothing assigns to them after `load_config`. Standard library only: any layer may import a section.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

from serving.answers import AnswerRule
from verl.errors import ConfigError
from verl.trainer.config.alarms import AlarmsConfig
from verl.trainer.config.data import DataConfig
from verl.trainer.config.evaluation import EvaluationConfig
from verl.trainer.config.fields import (
    check_section,
    fraction,
    not_negative,
    one_of,
    path_name,
    positive,
    require,
    setting,
    share,
    web_url,
)
from verl.trainer.config.placement import PlacementConfig

ANSWER_PLACE = "{answer}"
DROP_OBSERVATIONS = "drop_observations"
SYNC, ONE_STEP_OFF = "sync", "one_step_off"
ALL_LINEAR = "all-linear"
MERGED, ADAPTER = "merged", "adapter"


@dataclass
class ModelConfig:
    """The policy's model."""

    path: str = "world/models/policy"
    dtype: str = one_of("auto", "float32", "bfloat16")
    attention: str = one_of("auto", "sdpa", "flash_attention_2")
    enable_gradient_checkpointing: bool = False
    checkpoint_every_n_layers: int = positive(1)
    """Of so many layers one is computed again in the backward pass, the others keep their activations."""
    lora_rank: int = not_negative(0)
    """Above 0, adapters of this rank are trained instead of the weights (LoRA)."""
    lora_alpha: float = positive(16.0)
    target_modules: Any = ALL_LINEAR
    """The layers with adapters: all linear ones of the decoder, or those with these last parts of names."""
    lora_transfer: str = one_of(MERGED, ADAPTER)
    """What engines get after an update: all weights, with the adapters in them, or the adapters alone."""

    def __post_init__(self) -> None:
        targets = self.target_modules
        require(
            targets == ALL_LINEAR or (isinstance(targets, list) and {*map(type, targets)} == {str}),
            "actor_rollout_ref.model.target_modules",
            targets,
            f"{ALL_LINEAR} or a list of names of linear layers such as [q_proj,v_proj]",
        )
        require(bool(self.path), "actor_rollout_ref.model.path", self.path, "a model folder or hub id")
        self.path = os.path.expanduser(self.path)


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = not_negative(1e-6)
    lr_warmup_steps_ratio: float = fraction(0.0)
    weight_decay: float = not_negative(0.01)
    beta1: float = fraction(0.9)
    beta2: float = fraction(0.999)


@dataclass
class PolicyLossConfig:
    """The ratio of new to old probability that the loss clips."""

    loss_mode: str = one_of("vanilla", "gspo", "gspo_turn")
    """`vanilla`: of each token; `gspo`: of a whole trajectory (arXiv 2507.18071); `gspo_turn`: of a turn."""


@dataclass
class FsdpConfig:
    """How the model is sharded, and what of it waits in host memory while a phase does not need it."""

    fsdp_size: int | None = setting(None, lambda value: value == -1 or value > 0, "-1 or greater than 0")
    """Ranks that share one copy of the model; -1: all, None: those of a node."""
    param_offload: bool = False
    optimizer_offload: bool = False


@dataclass
class RefFsdpConfig:
    """The same of the frozen models."""

    param_offload: bool = False


@dataclass
class RefConfig:
    """The frozen models: the reference of the KL term, and what a method scores with."""

    fsdp_config: RefFsdpConfig = field(default_factory=RefFsdpConfig)


@dataclass
class ActorConfig:
    """The update of the policy."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
    ppo_epochs: int = positive(1)
    ppo_mini_batch_size: int = positive(80)
    ppo_max_token_len_per_gpu: int = positive(8192)
    clip_ratio_low: float = positive(0.2)
    clip_ratio_high: float = positive(0.2)
    clip_ratio_c: float | None = setting(None, lambda value: value > 1, "greater than 1")
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    tis_imp_ratio_cap: float | None = positive(2.0)
    use_kl_loss: bool = True
    kl_loss_coef: float = not_negative(0.001)
    kl_loss_type: str = one_of("low_var_kl", "kl", "abs", "mse")
    entropy_coeff: float = not_negative(0.0)
    grad_clip: float = positive(1.0)
    loss_agg_mode: str = one_of(
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    )
    loss_scale_factor: float = positive(1024.0)
    max_skipped_updates: int = positive(3)


@dataclass
class RolloutConfig:
    """Sampling by the engines."""

    n_agent: int = positive(5)
    temperature: float = positive(1.0)
    tensor_model_parallel_size: int = positive(1)
    gpu_memory_utilization: float = setting(0.5, lambda value: 0 < value < 1, "in (0, 1)")
    cpu_kv_cache_gib: float = positive(0.25)
    max_num_seqs: int = positive(256)
    max_num_batched_tokens: int | None = positive(None)
    enforce_eager: bool = False
    free_cache_engine: bool = True
    n_gpus_per_node: int = not_negative(0)
    weight_transfer: str = one_of("auto", "file", "ipc", "nccl")
    request_timeout_s: float = positive(120.0)
    max_log_prob_difference: float | None = positive(None)


@dataclass
class ActorRolloutRefConfig:
    """Policy, frozen reference and engines."""

    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class AgentConfig:
    """The form of episodes: prompt format, tools, and what happens when the context is full."""

    format: str = "auto"
    """`auto`: that of the method, see docs/methods.md."""
    tools: list[str] = field(default_factory=lambda: ["search"])
    context: str = one_of("end", DROP_OBSERVATIONS)
    """A full context ends the episode, or its oldest observations are dropped (in evaluations only)."""
    enable_thinking: bool | None = None
    """For chat templates that know it; None: as the template has it."""


@dataclass
class RetrieverConfig:
    """The search service."""

    url: str = web_url("http://127.0.0.1:8000/retrieve")
    topk: int = positive(3)
    timeout_s: float = positive(30.0)


@dataclass
class SemanticGainConfig:
    """The IG service."""

    url: str = web_url("http://127.0.0.1:8310")
    timeout_s: float = positive(120.0)
    batch_size: int = positive(256)


@dataclass
class RewardConfig:
    """The reward of an episode."""

    outcome: str = one_of("auto", "em", "sub_em", "f1", "igpo_f1", "autorefine_f1", "math")
    """`auto`: that of the method, see docs/methods.md."""
    answer_rule: str = one_of("folded", *(rule for rule in AnswerRule if rule != "folded"))
    answer_wrapper: str = setting(
        "auto",
        lambda value: value == "auto" or value.count(ANSWER_PLACE) == 1,
        f"auto or a text with {ANSWER_PLACE} in it once",
    )
    """Text around an answer where a method asks for its log-prob; `auto`: as the method was published."""
    format_score: float = not_negative(0.0)
    math_cpu_time_s: float = positive(5.0)
    semantic: SemanticGainConfig = field(default_factory=SemanticGainConfig)
    max_failure_share: float = share(0.2)


@dataclass
class FilterGroupsConfig:
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2)."""

    enable: bool = False
    """Leave out groups whose outcomes are all equal, and ask further questions in their place."""
    max_num_gen_batches: int = positive(4)
    """Most batches of questions that a step asks."""


@dataclass
class AlgorithmConfig:
    """What all methods share; `algorithm=NAME` selects the class of a method, see `verl.algorithms`."""

    name: str = ""
    adv_estimator: str = one_of("grpo")
    norm_adv_by_std_in_grpo: bool = True
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    overlong_filtering: bool = False
    """Leave trajectories that the token budget cut off out of the update."""

    def __post_init__(self) -> None:
        check_section("algorithm", self)

    def refuse_ignored(self, *keys: str, because: str) -> None:
        """Raise ConfigError for a key that nothing reads and whose value is not the default."""
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in keys and value != each.default:
                raise ConfigError(
                    f"algorithm.{each.name}={value} has no effect with {because}; "
                    f"leave it out or set it to {each.default}"
                )


@dataclass
class OutcomeConfig(AlgorithmConfig):
    """What methods share whose reward is one number per trajectory."""

    adv_estimator: str = one_of("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


@dataclass
class TrainerConfig:
    """The run: length, devices, folder, seed."""

    total_epochs: int = positive(1)
    total_training_steps: int | None = not_negative(None)
    schedule: str = one_of(SYNC, ONE_STEP_OFF)
    """When a step is sampled, see `verl.trainer.ppo.schedule`."""
    test_freq: int = not_negative(0)
    save_freq: int = not_negative(20)
    max_checkpoints_to_keep: int = positive(2)
    val_before_train: bool = True
    val_after_train: bool = True
    val_only: bool = False
    device: str = one_of("auto", "cpu", "cuda")
    launcher: str = one_of("ray", "local")
    ray_address: str | None = None
    nnodes: int = positive(1)
    n_gpus_per_node: int = positive(8)
    num_cpu_workers: int = positive(1)
    num_cpu_engines: int = positive(1)
    seed: int = not_negative(0)
    logger: list[str] = field(default_factory=lambda: ["console", "wandb"])
    project_name: str = path_name("inforeasoner")
    experiment_name: str = path_name("grpo")
    default_local_dir: str = "runs/${trainer.project_name}/${trainer.experiment_name}"
    resume_mode: str = one_of("auto", "disable")
    max_concurrent_episodes: int | None = positive(None)
    """Over all engines; None: as many as they decode at once."""
    startup_timeout_s: float = positive(600.0)
    node_wait_s: float = not_negative(60.0)
    service_wait_s: float = positive(10.0)
    profile_steps: list[int] = field(default_factory=list)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)

    def __post_init__(self) -> None:
        for logger in self.logger:
            require(logger in ("console", "wandb"), "trainer.logger", logger, "one of console, wandb")
        for step in self.profile_steps:
            require(step >= 1, "trainer.profile_steps", step, "a step, from 1")
        self.default_local_dir = os.path.expanduser(self.default_local_dir)

    @property
    def evaluates_only(self) -> bool:
        """Return whether the run evaluates its newest checkpoint, or the initial model, and no more."""
        return self.val_only or self.total_training_steps == 0

    def count_steps(self, *, batches_per_epoch: int) -> int:
        """Return the steps of the run: `total_epochs` over the questions, at most `total_training_steps`."""
        epochs = self.total_epochs * batches_per_epoch
        return epochs if self.total_training_steps is None else min(epochs, self.total_training_steps)


@dataclass
class Config:
    """The whole tree, as typed on the command line."""

    data: DataConfig = field(default_factory=DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    max_turns: int = positive(3)
    agent: AgentConfig = field(default_factory=AgentConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    plan: bool = False
    placement: PlacementConfig = field(default_factory=PlacementConfig)

    def __post_init__(self) -> None:
        check_section("", self)

    @property
    def trajectories_per_step(self) -> int:
        """Return the number of episodes of a training step."""
        return self.data.train_batch_size * self.actor_rollout_ref.rollout.n_agent
