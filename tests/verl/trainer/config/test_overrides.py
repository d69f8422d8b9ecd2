"""Arguments of other trainers, typing errors and bare values: each gets a line that says what to write."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from verl.algorithms import ALGORITHMS
from verl.errors import ConfigError
from verl.trainer.command import run_command
from verl.trainer.config.loading import schema_keys
from verl.trainer.config.overrides import check_overrides
from verl.trainer.config.published import PROJECTS, Rule, find_rule, read_rules, read_same_keys
from verl.trainer.main_ppo import train

ROOT = Path(__file__).resolve().parents[4]
SECTIONS = {"S": "Search-R1", "G": "IGPO", "V": "verl 0.8 and 0.9"}
"""Headings of docs/migration.md."""
SCRIPTS = {
    name: arguments.split()
    for name, arguments in re.findall(
        r"^## (.*)\n([^#]*)", Path(__file__).with_name("published_scripts.txt").read_text(), re.MULTILINE
    )
}
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def refusals(arguments: list[str]) -> dict[str, str]:
    """Return the refusal of each argument by its key."""
    return _find_refusals(tuple(arguments))


@cache
def _find_refusals(arguments: tuple[str, ...]) -> dict[str, str]:
    with pytest.raises(ConfigError) as error:
        check_overrides([*arguments])
    lines = str(error.value).splitlines()
    lines = [line.strip() for line in lines[1:]] if len(lines) > 1 else lines
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("arguments", SCRIPTS.values(), ids=list(SCRIPTS))
def test_every_argument_of_a_published_script_is_known_and_what_is_advised_is_accepted(
    arguments: list[str],
) -> None:
    refused = refusals(arguments)
    keys = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    assert keys - set(schema_keys()) <= set(refused)
    assert [advice for advice in refused.values() if "no such key" in advice or "<" in advice] == []
    check_overrides(convert(arguments))


def convert(arguments: list[str]) -> list[str]:
    """Replace what is refused by what is advised."""
    refused = refusals(arguments)
    kept = [a for a in arguments if a.partition("=")[0].lstrip("+") not in refused]
    advised = [advice.partition(";")[0] for advice in refused.values() if advice.startswith("write ")]
    return [*kept, *" ".join(text.removeprefix("write ") for text in advised).split()]


@pytest.mark.parametrize(
    ("arguments", "key", "advice"),
    [
        (SCRIPTS["verl, search"], f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_mini_batch_size=1280"),
        (
            SCRIPTS["verl, search"],
            "data.max_prompt_length",
            "data.max_start_length=4096 data.max_prompt_length=6596",
        ),
        (SCRIPTS["verl, search"], f"{ROLLOUT}.multi_turn.max_assistant_turns", "max_turns=3"),
        (
            SCRIPTS["Search-R1, PPO"],
            "algorithm.kl_ctrl.kl_coef",
            f"{ACTOR}.use_kl_loss=true {ACTOR}.kl_loss_coef=0.001",
        ),
        (
            SCRIPTS["Search-R1, PPO"],
            f"{ACTOR}.ppo_micro_batch_size",
            f"{ACTOR}.ppo_max_token_len_per_gpu=73536",
        ),
        (SCRIPTS["Search-R1, PPO"], "algorithm.adv_estimator", "algorithm.adv_estimator=grpo"),
        (SCRIPTS["IGPO"], "max_turns", "max_turns=9"),
        ([f"{ROLLOUT}.n=8", "trainer.save_freq=-1"], "trainer.save_freq", "trainer.save_freq=0"),
        (SCRIPTS["verl, DAPO"], f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_mini_batch_size=512"),
        (
            [f"{ROLLOUT}.n=8", f"{ACTOR}.tis_imp_ratio_cap=-1"],
            f"{ACTOR}.tis_imp_ratio_cap",
            f"{ACTOR}.tis_imp_ratio_cap=null",
        ),
        (
            [f"{ROLLOUT}.n=8", f"{ROLLOUT}.val_kwargs.n=1", f"{ACTOR}.ppo_mini_batch_size=32"],
            f"{ACTOR}.ppo_mini_batch_size",
            f"{ACTOR}.ppo_mini_batch_size=256",
        ),
        (
            [f"{ACTOR}.optim.betas=[0.9,0.95]"],
            f"{ACTOR}.optim.betas",
            f"{ACTOR}.optim.beta1=0.9 {ACTOR}.optim.beta2=0.95",
        ),
        (
            [f"{ACTOR}.optim.lr_warmup_steps=10"],
            f"{ACTOR}.optim.lr_warmup_steps",
            f"{ACTOR}.optim.lr_warmup_steps_ratio=<lr_warmup_steps / total_training_steps>",
        ),
    ],
)
def test_values_are_converted(arguments: list[str], key: str, advice: str) -> None:
    assert refusals(arguments)[key].partition(";")[0] == f"write {advice}"


def test_of_an_unset_key_nothing_is_computed() -> None:
    key = f"{ACTOR}.ppo_micro_batch_size_per_gpu"
    assert refusals([f"{key}=null"])[key].startswith("leave it out: a forward pass is limited in tokens")
    assert refusals([f"{ROLLOUT}.n=null"]) == {f"{ROLLOUT}.n": "leave it out"}


def test_corrections_that_exist_here_are_kept() -> None:
    kept = [
        f"{ACTOR}.policy_loss.loss_mode=gspo",
        f"{ACTOR}.clip_ratio_c=3.0",
        f"{ACTOR}.loss_scale_factor=512",
        "algorithm.adv_estimator=rloo",
    ]
    left = {f"{ROLLOUT}.n", f"{ACTOR}.policy_loss.clip_cov_ratio"}
    assert set(refusals([f"{ROLLOUT}.n=8", f"{ACTOR}.policy_loss.clip_cov_ratio=0.1", *kept])) == left


def test_a_shared_key_is_read_as_ours_unless_other_keys_are_of_another_trainer() -> None:
    ours = ["data.max_prompt_length=4096", "max_turns=9", "actor_rollout_ref.actor.ppo_mini_batch_size=64"]
    assert check_overrides(ours) == ours


@pytest.mark.parametrize(
    ("script", "left"),
    [("verl, search", "trainer.balance_batch=true"), ("IGPO", "codeact_env_disabled=true")],
)
def test_a_script_that_is_converted_but_for_one_key_is_not_converted_again(script: str, left: str) -> None:
    assert list(refusals([*convert(SCRIPTS[script]), left])) == [left.partition("=")[0]]


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("data.train_batch_sise=4", "no such key, did you mean data.train_batch_size?"),
        ("actor_rollout_ref.actor.lr=1e-5", "no such key, did you mean actor_rollout_ref.actor.optim.lr?"),
        ("+trainer.n_gpu_per_node=2", "no such key, did you mean trainer.n_gpus_per_node?"),
        ("++trainer.sede=2", "no such key, did you mean trainer.seed?"),
        ("~critic.model", "leave it out: GRPO has no critic"),
        ("reward.url=http://localhost", "no such key; all keys"),  # two sections have one: which was meant?
        ("~trainer.seed", "a setting cannot be removed; write trainer.seed=VALUE"),
    ],
)
def test_one_refusal_is_one_line(argument: str, advice: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_overrides([argument, "trainer.seed=1"])
    assert "\n" not in str(error.value)
    assert f": {advice}" in str(error.value)


def test_keys_that_exist_keys_of_hydra_and_flags_pass() -> None:
    ours = ["+trainer.seed=1", "--cfg", "job", "hydra.run.dir=x", "++max_turns=2", "--config-name=mine"]
    assert check_overrides(ours) == [
        *("--cfg", "job", "--config-name=mine"),
        *("trainer.seed=1", "hydra.run.dir=x", "max_turns=2"),
    ]


def test_overrides_may_stand_before_and_after_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["main_ppo", "trainer.seed=7", "--cfg", "job", "max_turns=4"])
    run_command(train)
    assert {"  seed: 7", "max_turns: 4"} <= set(capsys.readouterr().out.splitlines())


def test_values_that_need_quotes_are_shown_in_them() -> None:
    values = ["a=b", "模型", "it's=1", 'say "x"=1', "C:\\a=b\\", "'unclosed", "{a"]
    arguments = [f"trainer.experiment_name={value}" for value in values]
    with pytest.raises(ConfigError) as error:
        check_overrides(arguments)
    lines = [line.split(": put the value in quotes: ") for line in str(error.value).splitlines()[1:]]
    assert [refused for refused, _ in lines] == arguments
    assert [through_shell_and_hydra(advice) for _, advice in lines] == values


def test_commas_are_a_list_or_one_text() -> None:
    with pytest.raises(ConfigError) as error:
        check_overrides(["data.train_files=a.parquet,b#2.parquet"])
    assert "put the value in quotes" in str(error.value)
    with pytest.raises(ConfigError) as error:
        check_overrides(["data.train_files=a.parquet,b.parquet"])
    quoted = re.findall(r"write (\S+), for one text (\S+)", str(error.value))[0]
    assert [through_shell_and_hydra(text) for text in quoted] == [
        ["a.parquet", "b.parquet"],
        "a.parquet,b.parquet",
    ]
    assert check_overrides(["trainer.seed=1,2", "-m"]) == ["-m", "trainer.seed=1,2"]


def test_elements_of_a_list_are_quoted_one_by_one() -> None:
    with pytest.raises(ConfigError) as error:
        check_overrides(["data.train_files=[模.parquet, 'b.parquet']"])
    assert through_shell_and_hydra(str(error.value).split("quotes: ")[1]) == ["模.parquet", "b.parquet"]


def through_shell_and_hydra(text: str) -> object:
    """The value that arrives when `text` is pasted into a shell."""
    done = subprocess.run(["bash", "-c", f"printf %s {text}"], capture_output=True, text=True, check=True)
    return OverridesParser.create().parse_override(done.stdout).value()


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("seed", "error: seed: expected NAME=VALUE"),
        ("data.train_batch_size=many", "error: data.train_batch_size: Value 'many'"),
        ("trainer.logger=wandb", "error: trainer.logger: Invalid value assigned"),
        ("trainer.experiment_name=模型", "error: trainer.experiment_name=模型: put the value in quotes"),
        ("recipe=tpu", "error: recipe must be one of gpu, gpu_1, "),
        ("--config-name=mine", "error: Cannot find primary config 'mine'"),
    ],
)
def test_an_error_of_hydra_is_one_line(argument: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["main_ppo", argument])
    with pytest.raises(SystemExit) as end:
        run_command(train)
    assert str(end.value.code).startswith(line)
    assert "\n" not in str(end.value.code)


def test_rules_write_keys_that_exist_and_hide_no_other() -> None:
    methods = [schema_keys(method.settings_class, "algorithm.") for method in ALGORITHMS.values()]
    known = {*schema_keys(), *itertools.chain(*methods)}
    written = {key for rule in read_rules() for key in re.findall(r"([\w.]+)=", rule.here)}
    assert written - known == set()
    for letter in PROJECTS:
        same = {key for pattern in read_same_keys(letter) for key in spread(pattern)}
        assert same - known == set()
        assert [key for key in same if find_rule(key, {}, projects=letter)] == []
    for rule in read_rules():
        name, _, value = re.sub("!=.*", "=another", rule.condition).partition("=")
        settings = {name: value} if name else {}
        found = [find_rule(key, settings, projects=rule.projects) for key in spread(rule.keys)]
        assert rule in found, f"{rule.keys} is hidden by {found}"


def spread(pattern: str) -> list[str]:
    """`a.{b,c*}` as `a.b` and `a.cx`."""
    pattern = pattern.replace("*", "x")
    match = re.search(r"\{(.*?)\}", pattern)
    if match is None:
        return [pattern]
    return [key for name in match[1].split(",") for key in spread(pattern.replace(match[0], name, 1))]


def table_row(rule: Rule) -> str:
    """The row of a rule in docs/migration.md."""
    keys = rule.keys if "}" not in rule.keys else rule.keys.replace(",", ", ")
    condition = f", where `{rule.condition}`" if rule.condition else ""
    here = f"`{rule.here}`" if rule.here else ""
    return f"| `{keys}`{condition} | {here} | {rule.note} |"


@pytest.mark.parametrize("letter", PROJECTS)
def test_the_migration_guide_shows_the_table(letter: str) -> None:
    guide = (ROOT / "docs/migration.md").read_text()
    section = guide.split(f"\n## {SECTIONS[letter]}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    expected = [f"| `{keys}` | the same | |" for keys in read_same_keys(letter)]
    expected += [table_row(rule) for rule in read_rules() if letter in rule.projects]
    assert rows == expected, "\n".join(expected)


def test_the_keys_of_igpo_are_accepted_as_its_script_writes_them() -> None:
    written = [a for a in SCRIPTS["IGPO"] if "algorithm." in a and "kl_ctrl" not in a]
    assert len(written) > 8
    plain = check_overrides(["algorithm=igpo", *written])
    assert not any(argument.startswith("+") for argument in plain)
