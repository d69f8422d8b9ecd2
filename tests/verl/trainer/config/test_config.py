"""The YAML cannot drift from the schema, variables are read, and bad values are named."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException

from tests.fakes import make_action, make_question, make_trajectory
from tests.methods import credit_group, make_method
from verl.algorithms import ALGORITHMS
from verl.errors import ConfigError
from verl.trainer.config.advice import list_advice
from verl.trainer.config.loading import config_class, config_groups, load_config, register_schema, schema_keys
from verl.trainer.config.overrides import check_overrides
from verl.trainer.config.pools import check_pools
from verl.trainer.config.schema import Config
from verl.trainer.config.validate import check_schedule, validate
from verl.types import ActionKind, Gain, Score

REPOSITORY = Path(__file__).resolve().parents[4]
VARIABLES = {
    "RETRIEVER_URL": "http://10.0.0.1:8000/retrieve",
    "IG_SERVICE_URL": "http://10.0.0.2:310",
    "IG_BATCH_SIZE": "64",
    "IG_TIMEOUT": "33",
    "WAND_PROJECT": "published",
    "WANDB_PROJECT": "ours",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def composed(overrides: Sequence[str] = ()) -> Config:
    register_schema()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return load_config(compose("ppo_trainer", overrides=list(overrides)))


def test_yaml_states_exactly_the_defaults_of_the_schema() -> None:
    defaults = config_class()()
    folder = "runs/${trainer.project_name}/${trainer.experiment_name}"
    assert defaults.trainer.default_local_dir == folder
    defaults.trainer.default_local_dir = "runs/inforeasoner/grpo"
    config = composed()
    method = ALGORITHMS[config.algorithm.name]
    defaults.algorithm = method.settings_class()
    assert defaults.reward.outcome == "auto"
    defaults.reward.outcome = method.outcome
    assert defaults.agent.format == "auto"
    defaults.agent.format = method.format
    assert defaults.reward.answer_wrapper == "auto"
    assert dataclasses.asdict(config) == dataclasses.asdict(defaults)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_answers_are_scored_as_published_or_as_the_user_says(name: str) -> None:
    published = ALGORITHMS[name].answer_wrapper
    config = composed([f"algorithm={name}"])
    assert config.reward.answer_wrapper == (published or "auto")
    assert not [text for text in list_advice(config) if "answer_wrapper" in text]
    chosen = composed([f"algorithm={name}", "reward.answer_wrapper='So: {answer}.'"])
    assert chosen.reward.answer_wrapper == "So: {answer}."
    advice = [text for text in list_advice(chosen) if "reward.answer_wrapper='So: {answer}.'" in text]
    assert len(advice) == bool(published)
    for wrong in ("'So'", "'{answer} {answer}'"):
        with pytest.raises(ConfigError, match=r"reward\.answer_wrapper must be auto or a text with {answer}"):
            composed([f"algorithm={name}", f"reward.answer_wrapper={wrong}"])


def test_yaml_names_every_key_of_the_schema() -> None:
    text = (REPOSITORY / "verl/trainer/config/ppo_trainer.yaml").read_text()
    keys = [key for key in schema_keys() if not key.startswith("algorithm.")]
    assert [key for key in keys if f"{key.rsplit('.', 1)[-1]}:" not in text] == []


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method_is_chosen_by_its_name_and_every_key_of_it_documented(name: str) -> None:
    chosen = composed([f"algorithm={name}"]).algorithm
    assert (type(chosen), chosen.name) == (ALGORITHMS[name].settings_class, name)
    text = (REPOSITORY / "docs/methods.md").read_text()
    keys = schema_keys(ALGORITHMS[name].settings_class, "algorithm.")
    assert [part for part in (f"## {name}", *(f"`{key}`" for key in keys)) if part not in text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=none"], f"algorithm must be one of {', '.join(ALGORITHMS)}, got 'none'"),
        (["algorithm=search_r1", "algorithm.tau=1"], "a setting of algorithm=tips only"),
        (
            ["algorithm=search_r1", "algorithm.gain_weight=1"],
            "a setting of algorithm=inforeasoner or ig_search or igpo or stepsearch only",
        ),
        (["reward.gain_weight=1"], "did you mean algorithm.gain_weight"),
        (["reward.gain=none"], "write algorithm=search_r1 for none"),
    ],
)
def test_a_setting_of_no_or_another_method_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_overrides(arguments)


@pytest.fixture
def store_recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Add a recipe that chooses a method, as `- override /algorithm: search_r1` in its file does."""
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))

    def add(name: str, **content: object) -> None:
        defaults = [{"override /algorithm": "search_r1"}, "_self_"]
        store.store(group="recipe", name=name, node={"defaults": defaults, **content}, package="_global_")

    return add


def test_a_recipe_may_choose_the_method(store_recipe: Callable[..., None]) -> None:
    store_recipe("by_outcome")
    arguments = ["recipe=by_outcome", "algorithm.tau=1"]
    with pytest.raises(ConfigError, match=r"algorithm\.tau: a setting of algorithm=tips only"):
        check_overrides(arguments)
    check_overrides([*arguments, "algorithm=tips"])  # the command line wins
    assert composed(check_overrides(["recipe=by_outcome"])).algorithm.name == "search_r1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"algorithm": {"tau": 1}},
            "algorithm.tau: a setting of algorithm=tips only",
        ),
        ({"trainer": {"sede": 1}}, "trainer.sede: Key 'sede' not in"),
        ({"trainer": {"seed": "x"}}, "trainer.seed: Value 'x'"),
    ],
)
def test_a_bad_key_of_a_recipe_is_named_with_its_file(
    store_recipe: Callable[..., None], content: dict[str, object], message: str
) -> None:
    store_recipe("bad", **content)
    with pytest.raises(ConfigError, match=rf"recipe/bad\.yaml: {message}"):
        check_overrides(["recipe=bad"])


def test_every_key_is_read_by_code() -> None:
    names = ("schema", "alarms", "evaluation", "placement")
    sections = {REPOSITORY / f"verl/trainer/config/{name}.py" for name in names}
    sources = [p.read_text() for p in (REPOSITORY / "verl").rglob("*.py") if p not in sections]
    schema = (REPOSITORY / "verl/trainer/config/schema.py").read_text()
    leaves = {key.rsplit(".", 1)[-1] for key in schema_keys()}
    # Read through methods of their sections; adv_estimator is accepted because published scripts set it.
    derived = {"train_files", "val_files", "total_epochs", "adv_estimator"}
    unread = [leaf for leaf in leaves - derived if not any(f".{leaf}" in source for source in sources)]
    assert "train_paths" in schema
    assert unread == []


def test_variables_are_read_and_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    config = composed()
    semantic = config.reward.semantic
    assert (semantic.url, semantic.batch_size, semantic.timeout_s) == ("http://10.0.0.2:310", 64, 33.0)
    assert config.retriever.url == "http://10.0.0.1:8000/retrieve"
    assert config.trainer.project_name == "ours"
    assert composed(["reward.semantic.timeout_s=5"]).reward.semantic.timeout_s == 5
    monkeypatch.setenv("WANDB_PROJECT", "")  # as good as none
    assert composed().trainer.default_local_dir == "runs/published/grpo"


def test_the_migration_guide_names_every_variable() -> None:
    guide = (REPOSITORY / "docs/migration.md").read_text()
    raw = (REPOSITORY / "verl/trainer/config/ppo_trainer.yaml").read_text()
    for names in re.findall(r": \$\{env:([A-Z_,]+),", raw):
        assert f"| {', else '.join(f'`{name}`' for name in names.split(','))} | `" in guide


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("IG_TIMEOUT", "two minutes", "reward.semantic.timeout_s: Value 'two minutes'"),
        ("IG_BATCH_SIZE", "0", "reward.semantic.batch_size must be greater than 0, got 0"),
        ("RETRIEVER_URL", "localhost:8000", "retriever.url must be an http"),
    ],
)
def test_a_bad_variable_is_named(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "valid")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"{message}.*\(read from the environment: {name}\)$"):
        composed()


def test_a_home_in_paths_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["data.train_files=['~/a.parquet',/b.parquet]", "data.val_files=~/v=#.parquet"]
    overrides = [*paths, "actor_rollout_ref.model.path=~/m", "trainer.default_local_dir=~/runs/x"]
    config = composed(check_overrides(overrides))
    assert config.data.train_paths == ("/home/me/a.parquet", "/b.parquet")
    assert config.data.val_paths == ("/home/me/v=#.parquet",)
    assert config.actor_rollout_ref.model.path == "/home/me/m"
    assert config.trainer.default_local_dir == "/home/me/runs/x"


def test_wrong_type_is_refused_with_its_key() -> None:
    with pytest.raises(ConfigCompositionException) as error:
        composed(["data.train_batch_size=many"])
    assert "many" in str(error.value) + str(error.value.__cause__)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_batch_size=0", "data.train_batch_size must be greater than 0, got 0"),
        ("actor_rollout_ref.actor.kl_loss_type=k9", "one of low_var_kl"),
        ("actor_rollout_ref.model.lora_rank=-1", "lora_rank must be at least 0, got -1"),
        ("actor_rollout_ref.model.target_modules=q_proj", r"all-linear or a list of names .*got 'q_proj'"),
        ("actor_rollout_ref.model.target_modules=[]", "all-linear or a list of names"),
        ("reward.max_failure_share=1.5", r"reward.max_failure_share must be in \[0, 1\]"),
        ("retriever.url=localhost:8000", "an http"),
        ("data.prompt=rows", "data.prompt must be one of auto, parquet, file, got 'rows'"),
        ("trainer.logger=[tensorboard]", "trainer.logger must be one of"),
        ("trainer.experiment_name=../../x", r"trainer.experiment_name must be a name: .*got '../../x'"),
        ("trainer.project_name=/abs", "trainer.project_name must be a name"),
        ("trainer.experiment_name=''", "trainer.experiment_name must be a name"),
        ("trainer.total_training_steps=-1", "at least 0"),
        ("evaluation.n=4", r"evaluation\.temperature must be greater than 0 with evaluation\.n=4"),
    ],
)
def test_bad_value_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed([override])


def test_validation_lists_every_problem_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = composed(
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
    config = composed([f"actor_rollout_ref.{setting}", "data.train_files=gone.parquet"])
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
    config = composed([f"actor_rollout_ref.rollout.{key}={value}", "trainer.device=cpu"])
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
    config = composed(
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
    config = composed([f"actor_rollout_ref.{each}" for each in settings])
    found = check_pools(config, device=device)
    assert [line for line in found if "lora" in line] == found[: problem is not None]
    assert all(line.startswith(f"actor_rollout_ref.model.{problem}") for line in found[:1])


@pytest.mark.parametrize(("device", "num_problems"), [("cpu", 1), ("cuda", 2)])
def test_what_contradicts_sampling_ahead_is_refused(device: str, num_problems: int) -> None:
    """No importance weights and, where the engines share GPUs with the policy, giving it their memory."""
    overrides = ["trainer.schedule=one_step_off", "actor_rollout_ref.actor.tis_imp_ratio_cap=null"]
    problems = check_schedule(composed(overrides), device=device)
    assert len(problems) == num_problems
    assert problems[0].startswith("actor_rollout_ref.actor.tis_imp_ratio_cap=null: ")
    assert ["free_cache_engine=true: " in problem for problem in problems[1:]] == [True] * (num_problems - 1)
    assert check_schedule(composed(overrides[1:]), device=device) == []
    for fix in ("free_cache_engine=false", "n_gpus_per_node=2"):
        assert (
            check_schedule(composed([overrides[0], f"actor_rollout_ref.rollout.{fix}"]), device=device) == []
        )
    config = composed([*overrides, "trainer.device=cpu"])
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
    config = composed(arguments)
    if problem is None:
        validate(config, num_gpus=0, cpu_has_bfloat16=False)
        return
    with pytest.raises(ConfigError) as error:
        validate(config, num_gpus=0, cpu_has_bfloat16=False)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["algorithm=ig_search"], "autorefine"),
        (["algorithm=igpo"], "igpo"),
        (["algorithm=tips"], "search_r1"),
        (["algorithm=igpo", "recipe=gpu"], "igpo"),
        (["algorithm=igpo", "agent.format=autorefine"], "autorefine"),
        # The policy of the embedded world writes one format only.
        *[(["algorithm=igpo", f"recipe={name}"], "search_r1") for name in ("world", "quickstart", "smoke")],
    ],
)
def test_the_format_is_that_of_the_method_unless_it_is_given(arguments: list[str], expected: str) -> None:
    assert composed(arguments).agent.format == expected


def test_each_released_checkpoint_finds_its_format_by_one_word() -> None:
    """By the word of docs/tools_and_formats.md, and by the method with agent.format=auto."""
    text = (Path(__file__).resolve().parents[4] / "docs" / "tools_and_formats.md").read_text()
    rows = re.findall(r"^\| (\S+) \| `(agent\.format=\w+)` \| `(algorithm=\w+)` \|", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["Search-R1", "InfoReasoner", "AutoRefine", "IGPO"]
    for _, word, method in rows:
        assert composed([word]).agent.format == composed([method]).agent.format == word.partition("=")[2]


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
    found = list_advice(composed(arguments))
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


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("search_r1", "em"),
        ("ig_search", "autorefine_f1"),
        ("igpo", "igpo_f1"),
        ("stepsearch", "f1"),
        ("siop", "em"),
    ],
)
def test_a_method_is_rewarded_for_the_outcome_that_it_was_published_with(name: str, outcome: str) -> None:
    assert composed([f"algorithm={name}"]).reward.outcome == outcome
    assert composed([f"algorithm={name}", "reward.outcome=em"]).reward.outcome == "em"


@pytest.mark.parametrize("outcome", ["igpo_f1", "autorefine_f1"])
def test_a_format_score_is_refused_where_the_outcome_has_a_rule_of_its_own(outcome: str) -> None:
    settings = [f"reward.outcome={outcome}", "data.train_files=gone.parquet"]
    for score, refused in ((0.1, True), (0.0, False)):
        with pytest.raises(ConfigError) as error:
            validate(
                composed([*settings, f"reward.format_score={score}"]), num_gpus=0, cpu_has_bfloat16=False
            )
        assert (
            f"reward.format_score=0.1 has no effect on reward.outcome={outcome}" in str(error.value)
        ) is refused


@pytest.mark.parametrize("recipe", config_groups()["recipe"])
def test_every_recipe_fits_the_schema_and_overrides_win(recipe: str) -> None:
    assert composed([f"recipe={recipe}", "trainer.save_freq=7"]).trainer.save_freq == 7


@pytest.mark.parametrize(("device", "cpu_has_it", "refused"), [("cpu", 0, 1), ("cpu", 1, 0), ("cuda", 0, 0)])
def test_bfloat16_is_refused_on_a_cpu_without_it(device: str, cpu_has_it: bool, refused: bool) -> None:
    config = composed(
        [
            f"trainer.device={device}",
            "actor_rollout_ref.model.dtype=bfloat16",
            "data.train_files=gone.parquet",
        ]
    )
    with pytest.raises(ConfigError) as error:
        validate(config, num_gpus=8, cpu_has_bfloat16=cpu_has_it)
    assert ("this CPU has no instructions for it" in str(error.value)) is bool(refused)


def test_file_lists_and_single_files_are_both_taken() -> None:
    assert composed(["data.train_files=[a.parquet,b.parquet]"]).data.train_paths == ("a.parquet", "b.parquet")
    assert composed(["data.train_files=a.parquet"]).data.train_paths == ("a.parquet",)
