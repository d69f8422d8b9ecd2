"""The settings of the judge: a YAML file with its model, prompt and limits."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from verl.errors import ConfigError

PACKAGED_FILE = Path(__file__).with_name("judge.yaml")
_PLACEHOLDERS = ("question", "golds", "answer")


class JudgeSettings(BaseModel):
    """See judge.yaml for what each entry means."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base_url: Annotated[str, Field(pattern=r"^https?://")]
    model: Annotated[str, Field(min_length=1)]
    key_variable: Annotated[str, Field(pattern=r"^\w+$")]
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    max_concurrent: Annotated[int, Field(gt=0)]
    max_calls: Annotated[int, Field(ge=0)]
    max_tokens: Annotated[int, Field(ge=0)]
    max_reply_tokens: Annotated[int, Field(gt=0)]
    prompt: str

    @property
    def is_local(self) -> bool:
        """Return whether the endpoint is on this machine."""
        return urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")

    def write_prompt(self, question: str, golds: Sequence[str], answer: str) -> str:
        """Return what the judge is asked, with gold answers and answer as JSON."""
        accepted, judged = (json.dumps(value, ensure_ascii=False) for value in (list(golds), answer))
        return self.prompt.format(question=question, golds=accepted, answer=judged)


def load_settings(path: Path) -> tuple[JudgeSettings, str]:
    """Return the settings in a YAML file and the SHA-256 of the file. Raises ConfigError."""
    try:
        content = path.read_bytes()
        settings = JudgeSettings.model_validate(yaml.safe_load(content))
        _check_prompt(settings.prompt)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"--settings {path}: {key} is {first['input']!r}: {first['msg']}; compare {PACKAGED_FILE}"
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--settings {path}: {reason}; compare {PACKAGED_FILE}") from error
    return settings, sha256(content).hexdigest()


def _check_prompt(prompt: str) -> None:
    """Raise ValueError unless the prompt has each placeholder once, and no other."""
    found = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
    if sorted(found) != sorted(_PLACEHOLDERS):
        expected = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
        raise ValueError(f"prompt has the placeholders {found}, expected {expected} once each")
