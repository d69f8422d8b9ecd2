"""The configuration as typed sections: one default per key, range checks at the door.

Components receive their own section, never the whole tree. The classes are plain (Hydra merges overrides into
them); nothing assigns to them after `load_config`. Standard library only: any layer may import a section.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from serving.answers import AnswerRule
from verl.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
LAUNCHERS = ("ray", "local")
PROMPTS = ("auto", "parquet", "file")
OUTCOMES = ("em", "sub_em", "f1")
KL_TYPES = ("low_var_kl", "kl", "abs", "mse")
LOSS_AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
RESUME_MODES = ("auto", "disable")
LOGGERS = ("console", "wandb")
DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "eager")


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {expected}, got {value!r}")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(value in allowed, key, value, "one of " + ", ".join(allowed))


def _inside(key: str, name: str) -> None:
    """Refuse a name that leads out of the folder it is joined to."""
    is_inside = name.isprintable() and not {"", ".", ".."} & set(name.split("/"))
    _check(is_inside, key, name, "a name: printable, not absolute, without '..'")


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        _check(value > 0 and math.isfinite(value), f"{section}.{name}", value, "greater than 0")


def check_not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        _check(value >= 0 and math.isfinite(value), f"{section}.{name}", value, "at least 0")


def _file_list(key: str, value: Any) -> tuple[str, ...]:
    files = [value] if isinstance(value, str) else list(value or [])
    _check(
        bool(files) and all(isinstance(f, str) and f for f in files),
        key,
        value,
        "a parquet file or a list of them",
    )
    return tuple(os.path.expanduser(file) for file in files)


@dataclass
class DataConfig:
    train_files: Any = "world/train.parquet"
    val_files: Any = "world/test.parquet"
    prompt: str = "auto"
    prompt_file: str | None = None
    train_batch_size: int = 16
    val_max_questions: int | None = None
    max_start_length: int = 256
    max_prompt_length: int = 1024
    max_response_length: int = 96
    max_obs_length: int = 192

    def __post_init__(self) -> None:
        _positive("data", train_batch_size=self.train_batch_size, max_start_length=self.max_start_length)
        _positive("data", max_response_length=self.max_response_length, max_obs_length=self.max_obs_length)
        _check(
            self.max_prompt_length >= self.max_start_length,
            "data.max_prompt_length",
            self.max_prompt_length,
            f"at least data.max_start_length ({self.max_start_length}): it holds the prompt and all turns",
        )
        _one_of("data.prompt", self.prompt, PROMPTS)
        if self.prompt_file is not None:
            _check(bool(self.prompt_file), "data.prompt_file", self.prompt_file, "a YAML file or null")
            self.prompt_file = os.path.expanduser(self.prompt_file)
        if self.val_max_questions is not None:
            _positive("data", val_max_questions=self.val_max_questions)

    @property
    def train_paths(self) -> tuple[str, ...]:
        return _file_list("data.train_files", self.train_files)

    @property
    def val_paths(self) -> tuple[str, ...]:
        return _file_list("data.val_files", self.val_files)

    @property
    def max_model_len(self) -> int:
        """Longest sequence an engine must hold: the rolling context and one more completion."""
        return self.max_prompt_length + self.max_response_length


@dataclass
class ModelConfig:
    path: str = "world/models/policy"
    dtype: str = "auto"
    attention: str = "auto"
    enable_gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _check(bool(self.path), "actor_rollout_ref.model.path", self.path, "a model folder or hub id")
        self.path = os.path.expanduser(self.path)
        _one_of("actor_rollout_ref.model.dtype", self.dtype, DTYPES)
        _one_of("actor_rollout_ref.model.attention", self.attention, ATTENTIONS)


@dataclass
class OptimConfig:
    lr: float = 1e-6
    lr_warmup_steps_ratio: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        section = "actor_rollout_ref.actor.optim"
        check_not_negative(section, lr=self.lr, weight_decay=self.weight_decay)
        for name in ("lr_warmup_steps_ratio", "beta1", "beta2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{section}.{name}", value, "in [0, 1)")


@dataclass
class ActorConfig:
    optim: OptimConfig = field(default_factory=OptimConfig)
    ppo_epochs: int = 1
    ppo_mini_batch_size: int = 80
    ppo_max_token_len_per_gpu: int = 8192
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    use_kl_loss: bool = True
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    entropy_coeff: float = 0.0
    grad_clip: float = 1.0
    loss_agg_mode: str = "token-mean"
    max_skipped_updates: int = 3

    def __post_init__(self) -> None:
        section = "actor_rollout_ref.actor"
        _positive(section, ppo_epochs=self.ppo_epochs, ppo_mini_batch_size=self.ppo_mini_batch_size)
        _positive(section, ppo_max_token_len_per_gpu=self.ppo_max_token_len_per_gpu, grad_clip=self.grad_clip)
        _positive(section, clip_ratio_low=self.clip_ratio_low, clip_ratio_high=self.clip_ratio_high)
        check_not_negative(section, kl_loss_coef=self.kl_loss_coef, entropy_coeff=self.entropy_coeff)
        _positive(section, max_skipped_updates=self.max_skipped_updates)
        _one_of(f"{section}.kl_loss_type", self.kl_loss_type, KL_TYPES)
        _one_of(f"{section}.loss_agg_mode", self.loss_agg_mode, LOSS_AGGREGATIONS)


@dataclass
class RolloutConfig:
    n_agent: int = 5
    temperature: float = 1.0
    tensor_model_parallel_size: int = 1
    gpu_memory_utilization: float = 0.5
    cpu_kv_cache_gib: float = 0.25
    max_num_seqs: int = 256
    enforce_eager: bool = False
    free_cache_engine: bool = True
    request_timeout_s: float = 120.0
    max_log_prob_difference: float | None = None

    def __post_init__(self) -> None:
        section = "actor_rollout_ref.rollout"
        _positive(section, n_agent=self.n_agent, temperature=self.temperature, max_num_seqs=self.max_num_seqs)
        _positive(section, tensor_model_parallel_size=self.tensor_model_parallel_size)
        _positive(section, cpu_kv_cache_gib=self.cpu_kv_cache_gib, request_timeout_s=self.request_timeout_s)
        _check(
            0 < self.gpu_memory_utilization < 1,
            f"{section}.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "in (0, 1)",
        )
        if self.max_log_prob_difference is not None:
            _positive(section, max_log_prob_difference=self.max_log_prob_difference)


@dataclass
class ActorRolloutRefConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class AgentConfig:
    format: str = "search_r1"
    tools: list[str] = field(default_factory=lambda: ["search"])


@dataclass
class RetrieverConfig:
    url: str = "http://127.0.0.1:8000/retrieve"
    topk: int = 3
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        _check(self.url.startswith(("http://", "https://")), "retriever.url", self.url, "an http(s) URL")
        _positive("retriever", topk=self.topk, timeout_s=self.timeout_s)


@dataclass
class SemanticGainConfig:
    url: str = "http://127.0.0.1:8310"
    timeout_s: float = 120.0
    batch_size: int = 256

    def __post_init__(self) -> None:
        _check(
            self.url.startswith(("http://", "https://")), "reward.semantic.url", self.url, "an http(s) URL"
        )
        _positive("reward.semantic", timeout_s=self.timeout_s, batch_size=self.batch_size)


@dataclass
class RewardConfig:
    outcome: str = "em"
    answer_rule: str = "folded"
    format_score: float = 0.0
    semantic: SemanticGainConfig = field(default_factory=SemanticGainConfig)
    max_failure_share: float = 0.2

    def __post_init__(self) -> None:
        _one_of("reward.outcome", self.outcome, OUTCOMES)
        _one_of("reward.answer_rule", self.answer_rule, tuple(AnswerRule))
        check_not_negative("reward", format_score=self.format_score)
        _check(
            0 <= self.max_failure_share <= 1, "reward.max_failure_share", self.max_failure_share, "in [0, 1]"
        )


@dataclass
class AlgorithmConfig:
    """What all methods share; `algorithm=NAME` brings the class of a method, see `verl.algorithms`."""

    name: str = ""
    adv_estimator: str = "grpo"
    norm_adv_by_std_in_grpo: bool = True

    def __post_init__(self) -> None:
        _one_of("algorithm.adv_estimator", self.adv_estimator, ("grpo",))


@dataclass
class TrainerConfig:
    total_epochs: int = 1
    total_training_steps: int | None = None
    test_freq: int = 0
    save_freq: int = 20
    max_checkpoints_to_keep: int = 2
    val_before_train: bool = True
    val_after_train: bool = True
    val_only: bool = False
    device: str = "auto"
    launcher: str = "ray"
    n_gpus_per_node: int = 8
    num_cpu_workers: int = 1
    seed: int = 0
    logger: list[str] = field(default_factory=lambda: ["console", "wandb"])
    project_name: str = "inforeasoner"
    experiment_name: str = "grpo"
    default_local_dir: str = "runs/${trainer.project_name}/${trainer.experiment_name}"
    resume_mode: str = "auto"
    max_concurrent_episodes: int = 512
    startup_timeout_s: float = 600.0
    service_wait_s: float = 10.0

    def __post_init__(self) -> None:
        _positive("trainer", total_epochs=self.total_epochs, n_gpus_per_node=self.n_gpus_per_node)
        _positive(
            "trainer",
            num_cpu_workers=self.num_cpu_workers,
            max_concurrent_episodes=self.max_concurrent_episodes,
        )
        _positive("trainer", max_checkpoints_to_keep=self.max_checkpoints_to_keep)
        _positive("trainer", startup_timeout_s=self.startup_timeout_s, service_wait_s=self.service_wait_s)
        check_not_negative("trainer", test_freq=self.test_freq, save_freq=self.save_freq, seed=self.seed)
        if self.total_training_steps is not None:
            check_not_negative("trainer", total_training_steps=self.total_training_steps)
        _inside("trainer.project_name", self.project_name)
        _inside("trainer.experiment_name", self.experiment_name)
        _one_of("trainer.device", self.device, DEVICES)
        _one_of("trainer.launcher", self.launcher, LAUNCHERS)
        _one_of("trainer.resume_mode", self.resume_mode, RESUME_MODES)
        for logger in self.logger:
            _one_of("trainer.logger", logger, LOGGERS)
        self.default_local_dir = os.path.expanduser(self.default_local_dir)

    @property
    def evaluates_only(self) -> bool:
        """Whether the run evaluates its newest checkpoint, or the initial model, and trains nothing."""
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
    max_turns: int = 3
    agent: AgentConfig = field(default_factory=AgentConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _positive("config", max_turns=self.max_turns)

    @property
    def trajectories_per_step(self) -> int:
        return self.data.train_batch_size * self.actor_rollout_ref.rollout.n_agent
