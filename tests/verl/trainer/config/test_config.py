"""The YAML cannot drift from the schema, variables are read, and bad values are named."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from verl.algorithms import ALGORITHMS
from verl.errors import ConfigError
from verl.trainer.config.advice import list_advice
from verl.trainer.config.loading import (
    compose_config,
    config_class,
    config_groups,
    schema_keys,
)
from verl.trainer.config.overrides import check_overrides

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


def test_yaml_states_exactly_the_defaults_of_the_schema() -> None:
    defaults = config_class()()
    folder = "runs/${trainer.project_name}/${trainer.experiment_name}"
    assert defaults.trainer.default_local_dir == folder
    defaults.trainer.default_local_dir = "runs/inforeasoner/grpo"
    config = compose_config([])
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
    config = compose_config([f"algorithm={name}"])
    assert config.reward.answer_wrapper == (published or "auto")
    assert not [text for text in list_advice(config) if "answer_wrapper" in text]
    chosen = compose_config([f"algorithm={name}", "reward.answer_wrapper='So: {answer}.'"])
    assert chosen.reward.answer_wrapper == "So: {answer}."
    advice = [text for text in list_advice(chosen) if "reward.answer_wrapper='So: {answer}.'" in text]
    assert len(advice) == bool(published)
    for wrong in ("'So'", "'{answer} {answer}'"):
        with pytest.raises(ConfigError, match=r"reward\.answer_wrapper must be auto or a text with {answer}"):
            compose_config([f"algorithm={name}", f"reward.answer_wrapper={wrong}"])


def test_yaml_names_every_key_of_the_schema() -> None:
    text = (REPOSITORY / "verl/trainer/config/ppo_trainer.yaml").read_text()
    keys = [key for key in schema_keys() if not key.startswith("algorithm.")]
    assert [key for key in keys if f"{key.rsplit('.', 1)[-1]}:" not in text] == []


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method_is_chosen_by_its_name_and_every_key_of_it_documented(name: str) -> None:
    chosen = compose_config([f"algorithm={name}"]).algorithm
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
    assert compose_config(check_overrides(["recipe=by_outcome"])).algorithm.name == "search_r1"


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
    names = ("schema", "alarms", "data", "evaluation", "placement")
    sections = {REPOSITORY / f"verl/trainer/config/{name}.py" for name in names}
    sources = [p.read_text() for p in (REPOSITORY / "verl").rglob("*.py") if p not in sections]
    leaves = {key.rsplit(".", 1)[-1] for key in schema_keys()}
    # Read through methods of their sections; adv_estimator is accepted because published scripts set it.
    derived = {"train_files", "val_files", "total_epochs", "adv_estimator"}
    unread = [leaf for leaf in leaves - derived if not any(f".{leaf}" in source for source in sources)]
    assert unread == []


def test_variables_are_read_and_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    config = compose_config([])
    semantic = config.reward.semantic
    assert (semantic.url, semantic.batch_size, semantic.timeout_s) == ("http://10.0.0.2:310", 64, 33.0)
    assert config.retriever.url == "http://10.0.0.1:8000/retrieve"
    assert config.trainer.project_name == "ours"
    assert compose_config(["reward.semantic.timeout_s=5"]).reward.semantic.timeout_s == 5
    monkeypatch.setenv("WANDB_PROJECT", "")  # as good as none
    assert compose_config([]).trainer.default_local_dir == "runs/published/grpo"


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
        compose_config([])


def test_a_home_in_paths_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["data.train_files=['~/a.parquet',/b.parquet]", "data.val_files=~/v=#.parquet"]
    overrides = [*paths, "actor_rollout_ref.model.path=~/m", "trainer.default_local_dir=~/runs/x"]
    config = compose_config(check_overrides(overrides))
    assert config.data.train_paths == ("/home/me/a.parquet", "/b.parquet")
    assert config.data.val_paths == ("/home/me/v=#.parquet",)
    assert config.actor_rollout_ref.model.path == "/home/me/m"
    assert config.trainer.default_local_dir == "/home/me/runs/x"


def test_wrong_type_is_refused_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"data\.train_batch_size: Value 'many'"):
        compose_config(["data.train_batch_size=many"])


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
        ("retriever.url='http://127.0.0.1:80000/retrieve'", "an http"),
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
        compose_config([override])


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
    assert compose_config(arguments).agent.format == expected


def test_each_released_checkpoint_finds_its_format_by_one_word() -> None:
    """By the word of docs/tools_and_formats.md, and by the method with agent.format=auto."""
    text = (Path(__file__).resolve().parents[4] / "docs" / "tools_and_formats.md").read_text()
    rows = re.findall(r"^\| (\S+) \| `(agent\.format=\w+)` \| `(algorithm=\w+)` \|", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["Search-R1", "InfoReasoner", "AutoRefine", "IGPO"]
    for _, word, method in rows:
        formats = [compose_config([choice]).agent.format for choice in (word, method)]
        assert formats == [word.partition("=")[2]] * 2


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
    assert compose_config([f"algorithm={name}"]).reward.outcome == outcome
    assert compose_config([f"algorithm={name}", "reward.outcome=em"]).reward.outcome == "em"


@pytest.mark.parametrize("recipe", config_groups()["recipe"])
def test_every_recipe_fits_the_schema_and_overrides_win(recipe: str) -> None:
    assert compose_config([f"recipe={recipe}", "trainer.save_freq=7"]).trainer.save_freq == 7


def test_file_lists_and_single_files_are_both_taken() -> None:
    for files, paths in (("[a.txt,b.txt]", ("a.txt", "b.txt")), ("a.txt", ("a.txt",))):
        assert compose_config([f"data.train_files={files}"]).data.train_paths == paths
