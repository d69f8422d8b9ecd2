"""Resolve YAML, command line and environment to checked dataclasses."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.agent.tools import TOOLS
from verl.algorithms import ALGORITHMS
from verl.errors import ConfigError
from verl.trainer.config.schema import AlgorithmConfig, Config
from verl.utils.flatten import flatten

logger = logging.getLogger(__name__)

_MODULE, _FILE = "verl.trainer.config", "ppo_trainer"


def register_schema() -> None:
    """Register the schema, by which Hydra checks keys and types, and the resolver of `${env:...}`."""
    _register(_tool_sections(), tuple((name, method.settings_class) for name, method in ALGORITHMS.items()))


@cache
def _register(
    sections: tuple[tuple[str, type], ...], methods: tuple[tuple[str, type[AlgorithmConfig]], ...]
) -> None:
    store = ConfigStore.instance()
    store.store(name="ppo_schema", node=_with_sections(sections))
    for name, settings_class in methods:
        store.store(group="algorithm", name=name, node=settings_class)
    OmegaConf.register_new_resolver("env", _read_environment, replace=True)


def compose_config(overrides: Sequence[str]) -> Config:
    """Return the configuration of the command line `overrides`. Raises ConfigError."""
    register_schema()
    try:
        with initialize_config_module(_MODULE, version_base=None):
            raw = compose(_FILE, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error
    return load_config(raw)


def load_config(raw: DictConfig) -> Config:
    """Resolve interpolations and run every range check. Raises ConfigError."""
    try:
        config = OmegaConf.to_object(raw)
    except (ConfigError, OmegaConfBaseException) as error:
        message = str(error) if isinstance(error, ConfigError) else first_line(error)
        raise ConfigError(f"{message}{_name_variable(raw, message)}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"expected the ppo_schema configuration, got {type(config).__name__}")
    if (method := ALGORITHMS.get(config.algorithm.name)) is not None:
        # Recorded as what they mean.
        if config.reward.outcome == "auto":
            config.reward.outcome = method.outcome
        if config.agent.format == "auto":
            config.agent.format = method.format
        if config.reward.answer_wrapper == "auto" and method.answer_wrapper:
            config.reward.answer_wrapper = method.answer_wrapper
    return config


def restore_config(recorded: Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Config:
    """Return a recorded configuration, such as that of a manifest, under `key=value` overrides.

    What it leaves out gets its default; keys that this version does not have are named in a warning. Raises
    ConfigError.
    """
    register_schema()
    schema = config_class()
    leaves, keys = flatten(recorded), set(schema_keys(schema))
    if unknown := sorted(leaves.keys() - keys):
        logger.warning("recorded settings that this version does not have: %s", ", ".join(unknown))
    raw = OmegaConf.structured(schema)
    try:
        for key, value in leaves.items():
            if key in keys:
                OmegaConf.update(raw, key, value, force_add=False)
        raw = OmegaConf.merge(raw, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    assert isinstance(raw, DictConfig)
    return load_config(raw)


def config_class() -> type[Config]:
    """Return the schema with a section for every tool that has settings."""
    return _with_sections(_tool_sections())


def _tool_sections() -> tuple[tuple[str, type], ...]:
    """Return name and class of the sections that tools have in addition to those of the schema."""
    known = {field.name for field in dataclasses.fields(Config)}
    tools = [tool for tool in TOOLS.values() if tool.section and tool.section not in known]
    return tuple((tool.section, tool.settings_class) for tool in tools)


@cache
def _with_sections(sections: tuple[tuple[str, type], ...]) -> type[Config]:
    fields = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in sections]
    return dataclasses.make_dataclass("Config", fields, bases=(Config,)) if fields else Config


def schema_keys(node: type | None = None, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema, sections included."""
    for field in dataclasses.fields(node or config_class()):
        key = f"{prefix}{field.name}"
        yield key
        factory = field.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            yield from schema_keys(factory, f"{key}.")


def config_groups() -> dict[str, tuple[str, ...]]:
    """Return the choices of each config group."""
    with initialize_config_module(_MODULE, version_base=None):
        recipes = GlobalHydra.instance().config_loader().get_group_options("recipe")
    return {"algorithm": tuple(ALGORITHMS), "recipe": tuple(recipes)}


def chosen_method(choices: Sequence[str]) -> type[AlgorithmConfig]:
    """Return the settings class of the method that choices such as `recipe=gpu` lead to.

    A recipe may choose the method, too. Raises ConfigError for a recipe with a key that does not exist.
    """
    register_schema()
    try:
        with initialize_config_module(_MODULE, version_base=None):
            chosen = OmegaConf.get_type(compose(_FILE, overrides=list(choices)), "algorithm")
    except ConfigCompositionException as error:
        raise ConfigError(first_line(error)) from error
    assert chosen is not None
    return chosen


def name_owners(key: str) -> str:
    """Return the methods that have this setting, as advice; an empty text if none has it."""
    owners = [
        name for name, method in ALGORITHMS.items() if key in schema_keys(method.settings_class, "algorithm.")
    ]
    return f"a setting of algorithm={' or '.join(owners)} only" if owners else ""


def first_line(error: Exception) -> str:
    """Return the message of an error of OmegaConf or Hydra in one line, with the key."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected NAME=VALUE"
    in_file = re.match(r"In '(.+?)': .*\n(.*)\n *full_key: (.*)", str(error))
    if isinstance(error, ConfigCompositionException) and in_file is not None:
        file, message, key = in_file.groups()
        advice = name_owners(key) if message.startswith("Key ") else ""
        return f"{file}.yaml: {key}: {advice or message}"
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    message = str(cause).partition("\n")[0].rpartition("}': ")[2].rstrip(".")
    return f"{key}: {message}" if key else message


def _read_environment(*names_and_default: object) -> object:
    """Resolve `${env:NAME,...,DEFAULT}`: the first variable that is set and not empty, else the default."""
    *names, default = names_and_default
    return next((os.environ[str(name)] for name in names if os.environ.get(str(name))), default)


def _name_variable(raw: DictConfig, message: str) -> str:
    """Name the environment variable from which the refused key, the first word of `message`, was read."""
    value: object = OmegaConf.to_container(raw, resolve=False)
    for name in re.split("[: ]", message)[0].split("."):
        value = value.get(name) if isinstance(value, dict) else None
    variables = re.findall(r"[A-Z_]+(?=,)", value) if isinstance(value, str) else []
    used = next(filter(os.environ.get, variables), None)
    return f" (read from the environment: {used})" if used else ""
