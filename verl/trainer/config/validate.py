"""Checks across sections and against the machine, before any model loads: all problems in one message."""

from __future__ import annotations

from pathlib import Path

from serving.model_files import ModelNotFoundError, find_local_model, read_model_config
from verl.agent.formats import FORMATS
from verl.agent.prompts import CONTEXT_TEXTS, load_texts, prompt_file
from verl.agent.reference import ONE_SHOT_RAG, REFERENCE_TEXTS
from verl.agent.tools import TOOLS
from verl.algorithms import ALGORITHMS
from verl.errors import ConfigError
from verl.trainer.config.pools import check_pools, has_own_gpus, policy_gpus
from verl.trainer.config.schema import DROP_OBSERVATIONS, ONE_STEP_OFF, Config


def validate(config: Config, *, num_gpus: int, cpu_has_bfloat16: bool, trains: bool = True) -> None:
    """Raise one ConfigError that lists every problem within the configuration and with this machine."""
    problems = [*_check_algorithm(config), *_check_reward(config), *_check_files(config, trains=trains)]
    if config.plan and not trains:
        problems.append("plan=true plans training (python -m verl.trainer.main_ppo); leave it out here")
    trains = trains and not config.trainer.evaluates_only
    if trains:
        problems += check_schedule(config, device=resolve_device(config, num_gpus=num_gpus))
    problems += _check_episodes(config, num_gpus=num_gpus, cpu_has_bfloat16=cpu_has_bfloat16, trains=trains)
    _refuse(problems)


def validate_episodes(config: Config, *, num_gpus: int, cpu_has_bfloat16: bool) -> None:
    """Raise one ConfigError that lists every problem of what plays episodes: agent, model, devices."""
    _refuse(_check_episodes(config, num_gpus=num_gpus, cpu_has_bfloat16=cpu_has_bfloat16, trains=False))


def _check_episodes(config: Config, *, num_gpus: int, cpu_has_bfloat16: bool, trains: bool) -> list[str]:
    return [
        *_check_agent(config, trains=trains),
        *_check_model(config),
        *_check_devices(config, num_gpus),
        *_check_batch(config, device=resolve_device(config, num_gpus=num_gpus)),
        *_check_nodes(config, num_gpus),
        *_check_precision(config, num_gpus, cpu_has_bfloat16=cpu_has_bfloat16),
    ]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(
            "the configuration cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def resolve_device(config: Config, *, num_gpus: int) -> str:
    """Return `cpu` or `cuda`: `trainer.device`, where auto is a GPU if there is one."""
    if config.trainer.device == "auto":
        return "cuda" if num_gpus else "cpu"
    return config.trainer.device


def _check_algorithm(config: Config) -> list[str]:
    name = config.algorithm.name
    if name in ALGORITHMS and type(config.algorithm) is ALGORITHMS[name].settings_class:
        return _check_gain_tools(config)
    return [
        f"algorithm.name={name!r} is set by algorithm=NAME alone, which selects the settings of the method; "
        f"write algorithm= with one of {', '.join(ALGORITHMS)}"
    ]


def _check_gain_tools(config: Config) -> list[str]:
    named, tools = getattr(config.algorithm, "gain_tools", None), config.agent.tools
    if named is None or (named and {*named} <= {*tools}):
        return []
    return [
        f"algorithm.gain_tools={named!r}: expected names of agent.tools ({', '.join(tools)}), not those "
        "that a prompt format shows to the policy, or null for every turn but the last"
    ]


def _check_reward(config: Config) -> list[str]:
    reward = config.reward
    if reward.format_score == 0 or reward.outcome not in ("igpo_f1", "autorefine_f1"):
        return []
    return [
        f"reward.format_score={reward.format_score:g} has no effect on reward.outcome={reward.outcome}, "
        "which has a rule of its own for wrong answers; set it to 0, or reward.outcome to em, sub_em or f1"
    ]


def _check_files(config: Config, *, trains: bool) -> list[str]:
    files = [("data.train_files", p) for p in config.data.train_paths] if trains else []
    files += [("data.val_files", p) for p in config.data.val_paths]
    return [
        f"{key}: no such file {path!r} in {Path.cwd()}; scripts/prepare_data.py writes data files"
        for key, path in files
        if not Path(path).is_file()
    ]


def _check_agent(config: Config, *, trains: bool) -> list[str]:
    agent = config.agent
    tools, formats = " or ".join(TOOLS), " or ".join(FORMATS)
    problems = [
        f"agent.tools: {name!r} is unknown, expected {tools}" for name in agent.tools if name not in TOOLS
    ]
    if not agent.tools or len({*agent.tools}) < len(agent.tools):
        problems.append(f"agent.tools={agent.tools!r}: expected at least one name, each once, of {tools}")
    if agent.context == DROP_OBSERVATIONS and trains:
        problems.append(
            f"agent.context={DROP_OBSERVATIONS} is for evaluation: without its old observations a trajectory "
            "is no longer one sequence to train on; use agent.context=end with a larger "
            "data.max_prompt_length, or evaluate with python -m verl.trainer.main_eval"
        )
    if agent.format not in FORMATS:
        return [*problems, f"agent.format={agent.format!r} is unknown, expected {formats}"]
    sections = {agent.format: FORMATS[agent.format].texts}
    sections |= {"context": CONTEXT_TEXTS} if agent.context == DROP_OBSERVATIONS else {}
    if config.evaluation.reference != "none" and not trains:
        sections["references"] = REFERENCE_TEXTS
        if config.evaluation.reference == ONE_SHOT_RAG and "search" not in agent.tools:
            problems.append(f"agent.tools={agent.tools!r}: evaluation.reference={ONE_SHOT_RAG} needs search")
    sections |= {f"tools.{name}": TOOLS[name].texts for name in agent.tools if name in TOOLS}
    for section, entries in sections.items():
        try:
            load_texts(prompt_file(config.data.prompt_file), section=section, entries=entries)
        except ConfigError as error:
            problems.append(str(error))
    return [*dict.fromkeys(problems)]  # a file that cannot be read is one problem


def _check_model(config: Config) -> list[str]:
    path = config.actor_rollout_ref.model.path
    try:
        if find_local_model(path) is None:
            return []  # a hub id: whether it can be downloaded shows when it is loaded
        model = read_model_config(path)
    except ModelNotFoundError as error:
        return [f"actor_rollout_ref.model.path={error}"]
    num_heads = model.get("num_key_value_heads") or model.get("num_attention_heads")
    problems = check_heads(config, num_heads=num_heads) if isinstance(num_heads, int) else []
    limit = model.get("max_position_embeddings")
    if isinstance(limit, int) and config.data.max_model_len > limit:
        problems.append(
            f"data.max_prompt_length + data.max_response_length = {config.data.max_model_len} exceeds "
            f"the model's {limit} positions ({path}/config.json); lower one of them"
        )
    return problems


def _check_devices(config: Config, num_gpus: int) -> list[str]:
    device = resolve_device(config, num_gpus=num_gpus)
    parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    wanted = config.trainer.n_gpus_per_node
    problems = []
    if device == "cpu" and parallel != 1:
        problems.append(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel} needs GPUs; use 1 on the CPU"
        )
    if device == "cuda" and num_gpus < wanted and config.trainer.ray_address is None:
        problems.append(
            f"trainer.n_gpus_per_node={wanted}, but this machine has {num_gpus} GPUs; "
            "lower it or use trainer.device=cpu"
        )
    problems += check_pools(config, device=device)
    if device == "cuda" and config.trainer.launcher == "local" and wanted > 1:
        problems.append("trainer.launcher=local runs one worker; use trainer.launcher=ray for several GPUs")
    if device == "cpu":
        problems += [f"{key}=true frees memory of GPUs; leave it out on the CPU" for key in _offloads(config)]
    for key in ("num_cpu_workers", "num_cpu_engines"):
        if config.trainer.launcher == "local" and getattr(config.trainer, key) > 1:
            problems.append(
                f"trainer.launcher=local runs one worker and one engine; use trainer.launcher=ray or "
                f"trainer.{key}=1"
            )
    return problems


def check_schedule(config: Config, *, device: str) -> list[str]:
    """Return what contradicts sampling the next step while one trains."""
    settings = config.actor_rollout_ref
    if config.trainer.schedule != ONE_STEP_OFF:
        return []
    problems = []
    if settings.actor.tis_imp_ratio_cap is None:
        problems.append(
            "actor_rollout_ref.actor.tis_imp_ratio_cap=null: trainer.schedule=one_step_off samples with "
            "weights that are one update older than those it trains, and only importance weights correct "
            "for that; set it to 2.0, or trainer.schedule=sync"
        )
    is_colocated = device == "cuda" and not has_own_gpus(settings.rollout)
    if is_colocated and settings.rollout.free_cache_engine:
        problems.append(
            "actor_rollout_ref.rollout.free_cache_engine=true: trainer.schedule=one_step_off samples while "
            "the policy trains, so that the engines cannot give it their memory; set it to false, and "
            "actor_rollout_ref.rollout.gpu_memory_utilization to what both have room for (plan=true), or "
            "give engines GPUs of their own (actor_rollout_ref.rollout.n_gpus_per_node), or "
            "trainer.schedule=sync"
        )
    return problems


def _offloads(config: Config) -> list[str]:
    """Return the keys under which something is moved to host memory."""
    settings = config.actor_rollout_ref
    sections = {"actor": settings.actor.fsdp_config, "ref": settings.ref.fsdp_config}
    return [
        f"actor_rollout_ref.{name}.fsdp_config.{key}"
        for name, section in sections.items()
        for key in ("param_offload", "optimizer_offload")
        if getattr(section, key, False)
    ]


def check_heads(config: Config, *, num_heads: int) -> list[str]:
    """Return what is wrong with dividing a model of so many key-value heads among the GPUs of an engine."""
    parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    if num_heads % parallel == 0:
        return []
    return [
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel} does not divide the {num_heads} "
        f"key-value heads of {config.actor_rollout_ref.model.path}, so that GPUs would hold copies of them; "
        f"use a divisor of {num_heads}, the smallest with which the model fits: more engines are faster"
    ]


def _check_batch(config: Config, *, device: str) -> list[str]:
    """Return what vLLM would refuse minutes later."""
    rollout, data = config.actor_rollout_ref.rollout, config.data
    # On the CPU prompts are not read in pieces: a batch has room for the longest one.
    least = max(rollout.max_num_seqs, data.max_model_len if device == "cpu" else 0)
    if rollout.max_num_batched_tokens is None or rollout.max_num_batched_tokens >= least:
        return []
    return [
        f"actor_rollout_ref.rollout.max_num_batched_tokens={rollout.max_num_batched_tokens}: expected at "
        f"least {least}, the largest of rollout.max_num_seqs and, on the CPU, data.max_prompt_length + "
        "data.max_response_length; raise it, or leave it null"
    ]


def _check_nodes(config: Config, num_gpus: int) -> list[str]:
    trainer, problems = config.trainer, []
    if trainer.ray_address is None:
        if trainer.nnodes > 1:
            problems.append(
                f"trainer.nnodes={trainer.nnodes} needs trainer.ray_address, the HOST:PORT of a Ray cluster "
                "of these nodes, see docs/scale.md; for this machine alone set trainer.nnodes=1"
            )
    elif trainer.launcher == "local":
        problems.append(
            f"trainer.launcher=local starts no Ray, so trainer.ray_address={trainer.ray_address} has no "
            "effect; leave one of them out"
        )
    elif trainer.device == "auto":
        problems.append(
            "trainer.device=auto looks at this machine only; with trainer.ray_address write "
            "trainer.device=cuda or trainer.device=cpu"
        )
    on_cpu = resolve_device(config, num_gpus=num_gpus) == "cpu"
    for key in ("num_cpu_workers", "num_cpu_engines"):
        if on_cpu and getattr(trainer, key) % trainer.nnodes:
            problems.append(
                f"trainer.{key}={getattr(trainer, key)} is no multiple of trainer.nnodes={trainer.nnodes}, "
                "which all get the same share"
            )
    ranks = trainer.num_cpu_workers if on_cpu else len(policy_gpus(config)) * trainer.nnodes
    size = config.actor_rollout_ref.actor.fsdp_config.fsdp_size
    if size not in (None, -1) and ranks % size:
        problems.append(
            f"actor_rollout_ref.actor.fsdp_config.fsdp_size={size} does not divide the {ranks} ranks of the "
            "policy; use a divisor, -1 (all ranks) or null (those of a node)"
        )
    return problems


def _check_precision(config: Config, num_gpus: int, *, cpu_has_bfloat16: bool) -> list[str]:
    is_coarse = config.actor_rollout_ref.model.dtype == "bfloat16"
    if is_coarse and not cpu_has_bfloat16 and resolve_device(config, num_gpus=num_gpus) == "cpu":
        return [
            "actor_rollout_ref.model.dtype=bfloat16: this CPU has no instructions for it (avx512_bf16 or "
            "amx_bf16); use auto or float32"
        ]
    return []
