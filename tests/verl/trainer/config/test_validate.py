"""Settings that contradict each other or do not fit the machine are refused, unusual ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import make_action, make_question, make_trajectory
from tests.methods import credit_group, make_method
from verl.algorithms import ALGORITHMS
from verl.errors import ConfigError
from verl.trainer.config.advice import list_advice
from verl.trainer.config.loading import compose_config
from verl.trainer.config.pools import check_pools
from verl.trainer.config.validate import check_schedule, validate
from verl.types import ActionKind, Gain, Score


def test_validation_lists_every_problem_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose_config(
        [
            *["data.train_files=gone.parquet", "actor_rollout_ref.model.path=./gone", "trainer.device=cuda"],
            *["agent.tools=[search,search,ask]", "data.prompt_file=gone.yaml", "trainer.launcher=local"],
            "trainer.num_cpu_engines=2",
            "agent.context=drop_observations",
        ],
    )
    with pytest.raises(ConfigError) as error:
        validate(config, num_gpus=0, cpu_has_bfloat16=False)
    message = str(error.value)
    assert "data.train_files: no such file 'gone.parquet'" in message
    assert "actor_rollout_ref.model.path=./gone: no such folder" in message
    assert "this machine has 0 GPUs" in message
    assert "trainer.launcher=local runs one worker; use trainer.launcher=ray for several GPUs" in message
    assert "use trainer.launcher=ray or trainer.num_cpu_engines=1" in message
    assert "agent.tools: 'ask' is unknown, expected search" in message
    assert "expected at least one name, each once" in message
    assert "data.prompt_file='gone.yaml' cannot be read" in message
    assert "agent.context=drop_observations is for evaluation" in message
    config.trainer.val_only = True
    config.algorithm = ALGORITHMS["inforeasoner"].settings_class(name="search_r1")
    config.agent.format = "xml"
    with pytest.raises(ConfigError, match=r"agent\.format='xml' is unknown, expected search_r1") as error:
        validate(config, num_gpus=0, cpu_has_bfloat16=False)
    assert "algorithm.name='search_r1' is set by algorithm=NAME alone" in str(error.value)
    assert "agent.context" not in str(error.value)


@pytest.mark.parametrize(
    ("tools", "is_refused"), [("null", False), ("[search]", False), ("[]", True), ("[web_search]", True)]
)
def test_gains_of_tools_that_the_agent_does_not_have_are_refused(tools: str, is_refused: bool) -> None:
    config = compose_config(
        ["algorithm=igpo", f"algorithm.gain_tools={tools}", "data.train_files=gone.parquet"]
    )
    with pytest.raises(ConfigError) as error:
        validate(config, num_gpus=0, cpu_has_bfloat16=False)
    assert ("expected names of agent.tools (search)" in str(error.value)) is is_refused


@pytest.mark.parametrize(
    "setting",
    [
        "actor.fsdp_config.param_offload=true",
        "actor.fsdp_config.optimizer_offload=true",
        "ref.fsdp_config.param_offload=true",
        "rollout.weight_transfer=ipc",
        "rollout.n_gpus_per_node=2",
    ],
)
def test_what_only_gpus_have_is_refused_on_the_cpu(setting: str) -> None:
    config = compose_config([f"actor_rollout_ref.{setting}", "data.train_files=gone.parquet"])
    for num_gpus, is_refused in ((0, True), (8, False)):
        with pytest.raises(ConfigError) as error:
            validate(config, num_gpus=num_gpus, cpu_has_bfloat16=False)
        assert (f"actor_rollout_ref.{setting}" in str(error.value)) is is_refused


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tensor_model_parallel_size", 3, r"does not divide the 4 key-value heads of world/models/policy"),
        ("max_num_batched_tokens", 300, r"max_num_batched_tokens=300: expected at least 1120, the largest"),
    ],
)
def test_engines_that_vllm_would_refuse_or_run_badly_are_refused(key: str, value: int, message: str) -> None:
    config = compose_config([f"actor_rollout_ref.rollout.{key}={value}", "trainer.device=cpu"])
    with pytest.raises(ConfigError, match=message):
        validate(config, num_gpus=0, cpu_has_bfloat16=False)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"n_gpus_per_node": 8}, "n_gpus_per_node=8 leaves no GPU for the policy: expected less than "),
        ({"n_gpus_per_node": 3, "tensor_model_parallel_size": 2}, "n_gpus_per_node=3 is no multiple of "),
        ({"n_gpus_per_node": 2, "weight_transfer": "ipc"}, "weight_transfer=ipc shares the memory of a GPU"),
        ({"weight_transfer": "nccl"}, "weight_transfer=nccl cannot connect two processes on one GPU"),
        ({"n_gpus_per_node": 3, "weight_transfer": "file"}, None),
        ({"n_gpus_per_node": 2, "tensor_model_parallel_size": 2}, None),
    ],
)
def test_gpus_of_the_engines_that_cannot_be_set_aside_are_refused(
    settings: dict[str, object], problem: str | None
) -> None:
    config = compose_config(
        ["recipe=gpu", *(f"actor_rollout_ref.rollout.{key}={value}" for key, value in settings.items())]
    )
    problems = check_pools(config, device="cuda")
    assert len(problems) == (problem is not None)
    assert all(found.startswith(f"actor_rollout_ref.rollout.{problem}") for found in problems)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        (
            "model.lora_rank=0",
            "lora_transfer=adapter needs actor_rollout_ref.model.lora_rank from 1 to 512, ",
        ),
        (
            "model.lora_rank=513",
            "lora_transfer=adapter needs actor_rollout_ref.model.lora_rank from 1 to 512, ",
        ),
        ("rollout.weight_transfer=nccl", "lora_transfer=adapter sends files, so "),
        ("rollout.weight_transfer=file", None),
    ],
)
def test_adapters_that_engines_cannot_take_are_refused(
    setting: str, problem: str | None, device: str
) -> None:
    settings = ("model.lora_rank=32", "model.lora_transfer=adapter", setting)
    config = compose_config([f"actor_rollout_ref.{each}" for each in settings])
    found = check_pools(config, device=device)
    assert [line for line in found if "lora" in line] == found[: problem is not None]
    assert all(line.startswith(f"actor_rollout_ref.model.{problem}") for line in found[:1])


@pytest.mark.parametrize(("device", "num_problems"), [("cpu", 1), ("cuda", 2)])
def test_what_contradicts_sampling_ahead_is_refused(device: str, num_problems: int) -> None:
    """No importance weights and, where the engines share GPUs with the policy, giving it their memory."""
    overrides = ["trainer.schedule=one_step_off", "actor_rollout_ref.actor.tis_imp_ratio_cap=null"]
    problems = check_schedule(compose_config(overrides), device=device)
    assert len(problems) == num_problems
    assert problems[0].startswith("actor_rollout_ref.actor.tis_imp_ratio_cap=null: ")
    assert ["free_cache_engine=true: " in problem for problem in problems[1:]] == [True] * (num_problems - 1)
    assert check_schedule(compose_config(overrides[1:]), device=device) == []
    for fix in ("free_cache_engine=false", "n_gpus_per_node=2"):
        fixed = compose_config([overrides[0], f"actor_rollout_ref.rollout.{fix}"])
        assert check_schedule(fixed, device=device) == []
    config = compose_config([*overrides, "trainer.device=cpu"])
    with pytest.raises(ConfigError, match=r"tis_imp_ratio_cap=null"):
        validate(config, num_gpus=0, cpu_has_bfloat16=False)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["trainer.nnodes=2"], "trainer.nnodes=2 needs trainer.ray_address, the HOST:PORT of a Ray cluster"),
        (["trainer.ray_address=a:1"], "trainer.device=auto looks at this machine only"),
        (
            ["trainer.ray_address=a:1", "trainer.launcher=local"],
            "trainer.launcher=local starts no Ray, so trainer.ray_address=a:1 has no effect",
        ),
        (
            ["trainer.ray_address=a:1", "trainer.device=cpu", "trainer.nnodes=2"],
            "trainer.num_cpu_workers=1 is no multiple of trainer.nnodes=2",
        ),
        (
            ["trainer.num_cpu_workers=3", "actor_rollout_ref.actor.fsdp_config.fsdp_size=2"],
            "fsdp_size=2 does not divide the 3 ranks",
        ),
        (["actor_rollout_ref.actor.fsdp_config.fsdp_size=-1"], None),
        # This machine only drives: it needs no GPU.
        (["trainer.ray_address=a:1", "trainer.device=cuda", "trainer.nnodes=2"], None),
    ],
)
def test_several_nodes_are_checked_before_any_is_joined(arguments: list[str], problem: str | None) -> None:
    config = compose_config(arguments)
    if problem is None:
        validate(config, num_gpus=0, cpu_has_bfloat16=False)
        return
    with pytest.raises(ConfigError) as error:
        validate(config, num_gpus=0, cpu_has_bfloat16=False)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["algorithm=igpo"], []),
        (
            ["algorithm=igpo", "agent.format=search_r1"],
            ["agent.format=search_r1: igpo was published with igpo"],
        ),
        (["algorithm=search_r1", "algorithm.filter_groups.enable=true"], []),
        (["algorithm=cw_grpo", "algorithm.filter_groups.enable=true"], []),
        (
            ["algorithm=ig_search", "algorithm.filter_groups.enable=true"],
            ["algorithm.filter_groups.enable=true leaves"],
        ),
        (
            ["actor_rollout_ref.actor.policy_loss.loss_mode=gspo"],
            ["policy_loss.loss_mode=gspo with clip_ratio_low=0.2"],
        ),
        (
            [
                "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
                "actor_rollout_ref.actor.clip_ratio_low=3e-4",
                "actor_rollout_ref.actor.clip_ratio_high=4e-4",
            ],
            [],
        ),
        (
            ["actor_rollout_ref.rollout.n_gpus_per_node=2"],
            ["actor_rollout_ref.rollout.gpu_memory_utilization=0.5 leaves"],
        ),
        (["actor_rollout_ref.rollout.n_gpus_per_node=2", "placement.ig_service_gpus=8"], []),
    ],
)
def test_settings_that_hardly_do_what_is_wanted_are_named(arguments: list[str], advice: list[str]) -> None:
    found = list_advice(compose_config(arguments))
    assert len(found) == len(advice)
    for message, expected in zip(found, advice, strict=True):
        assert expected in message


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_methods_of_which_it_is_said_learn_nothing_from_equal_outcomes(name: str) -> None:
    """Two attempts with the same outcome, of which one gained more by its search."""
    question = make_question()
    attempts = [make_trajectory(question, sample=i, queries=("q",), answer="x") for i in range(2)]
    action = make_action(ActionKind.TOOL, "q", start=1, end=3)
    attempts = [replace(t, turns=(replace(t.turns[0], action=action), t.turns[1])) for t in attempts]
    scores = [Score(outcome=0.0, gain=Gain(turns=(gain, None), trajectory=gain)) for gain in (0.5, 0.1)]
    credits = credit_group(make_method(name), attempts, scores)
    learns = any(credit.advantages.any() for credit in credits)
    # Those of gigpo differ only where a right answer took more turns than another.
    assert learns is not (ALGORITHMS[name].compares_outcomes_only or name == "gigpo")


@pytest.mark.parametrize("outcome", ["igpo_f1", "autorefine_f1"])
def test_a_format_score_is_refused_where_the_outcome_has_a_rule_of_its_own(outcome: str) -> None:
    settings = [f"reward.outcome={outcome}", "data.train_files=gone.parquet"]
    for score, refused in ((0.1, True), (0.0, False)):
        config = compose_config([*settings, f"reward.format_score={score}"])
        with pytest.raises(ConfigError) as error:
            validate(config, num_gpus=0, cpu_has_bfloat16=False)
        assert (
            f"reward.format_score=0.1 has no effect on reward.outcome={outcome}" in str(error.value)
        ) is refused


@pytest.mark.parametrize(("device", "cpu_has_it", "refused"), [("cpu", 0, 1), ("cpu", 1, 0), ("cuda", 0, 0)])
def test_bfloat16_is_refused_on_a_cpu_without_it(device: str, cpu_has_it: bool, refused: bool) -> None:
    config = compose_config(
        [
            f"trainer.device={device}",
            "actor_rollout_ref.model.dtype=bfloat16",
            "data.train_files=gone.parquet",
        ]
    )
    with pytest.raises(ConfigError) as error:
        validate(config, num_gpus=8, cpu_has_bfloat16=cpu_has_it)
    assert ("this CPU has no instructions for it" in str(error.value)) is bool(refused)
