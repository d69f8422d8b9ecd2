"""The section `data`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from verl.trainer.config.fields import check_section, one_of, positive, require


def _file_list(key: str, value: Any) -> tuple[str, ...]:
    files = [value] if isinstance(value, str) else list(value or [])
    is_valid = bool(files) and all(isinstance(f, str) and f for f in files)
    require(is_valid, key, value, "a parquet file or a list of them")
    return tuple(os.path.expanduser(file) for file in files)


@dataclass
class DataConfig:
    """Questions and lengths in tokens."""

    train_files: Any = "world/train.parquet"
    val_files: Any = "world/test.parquet"
    prompt: str = one_of("auto", "parquet", "file")
    prompt_file: str | None = None
    train_batch_size: int = positive(16)
    val_max_questions: int | None = positive(None)
    max_start_length: int = positive(256)
    max_prompt_length: int = 1024
    max_response_length: int = positive(96)
    max_obs_length: int = positive(192)

    def __post_init__(self) -> None:
        check_section("data", self)
        require(
            self.max_prompt_length >= self.max_start_length,
            "data.max_prompt_length",
            self.max_prompt_length,
            f"at least data.max_start_length ({self.max_start_length}): it holds the prompt and all turns",
        )
        if self.prompt_file is not None:
            require(bool(self.prompt_file), "data.prompt_file", self.prompt_file, "a YAML file or null")
            self.prompt_file = os.path.expanduser(self.prompt_file)

    @property
    def train_paths(self) -> tuple[str, ...]:
        """Return the training files as a tuple, `~` expanded."""
        return _file_list("data.train_files", self.train_files)

    @property
    def val_paths(self) -> tuple[str, ...]:
        """Return the held-out files as a tuple, `~` expanded."""
        return _file_list("data.val_files", self.val_files)

    @property
    def max_model_len(self) -> int:
        """Return the longest sequence of an engine, in tokens: the context and one more completion."""
        return self.max_prompt_length + self.max_response_length
