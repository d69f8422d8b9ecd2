"""From YAML and command line to checked dataclasses: the only place below `main_*` that knows OmegaConf."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from verl.errors import ConfigError
from verl.trainer.config.schema import Config


def register_schema() -> None:
    """Make Hydra check types and refuse unknown keys; called once by an entry point."""
    ConfigStore.instance().store(name="ppo_schema", node=Config)


def load_config(raw: DictConfig) -> Config:
    """Resolve interpolations and run every range check. Raises ConfigError."""
    config = OmegaConf.to_object(raw)
    if not isinstance(config, Config):
        raise ConfigError(f"expected the ppo_schema configuration, got {type(config).__name__}")
    return config


def schema_keys(node: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included."""
    for field in dataclasses.fields(node):
        key = f"{prefix}{field.name}"
        yield key
        factory = field.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            yield from schema_keys(factory, f"{key}.")


def check_override_keys(arguments: Sequence[str]) -> None:
    """Refuse `key=value` arguments whose key the schema does not know, naming the nearest one.

    Hydra would refuse them, too, but suggests nothing. Its own keys and flags pass. Raises ConfigError.
    """
    known = list(schema_keys())
    problems = []
    for argument in arguments:
        key, separator, _ = argument.partition("=")
        key = key.lstrip("+~").split("@")[0]
        if not separator or argument.startswith("-") or key.startswith(("hydra.", "hydra/")):
            continue
        if key not in known:
            problems.append(f"  {key}{_suggestion(key, known)}")
    if problems:
        raise ConfigError(
            "unknown configuration keys:\n"
            + "\n".join(problems)
            + "\nAll keys: verl/trainer/config/ppo_trainer.yaml"
        )


def _suggestion(key: str, known: Sequence[str]) -> str:
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5) if not by_leaf else by_leaf[:1]
    return f": did you mean {nearest[0]}?" if nearest else ""
