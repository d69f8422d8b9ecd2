"""The section `evaluation`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from verl.trainer.config.fields import check_section, not_negative, one_of, positive, require, setting


@dataclass
class EvaluationConfig:
    """The evaluation of a model without training."""

    output_dir: str = "runs/evaluation"
    log_file: str | None = None
    n: int = positive(1)
    temperature: float = not_negative(0.0)
    max_questions: int | None = positive(None)
    resume: bool = True
    seed: int = not_negative(0)
    reference: str = one_of("none", "no_search", "one_shot_rag")
    search_depth: int | None = setting(100, lambda value: 1 <= value <= 1000, "1 to 1000")
    """At most as many passages as the retriever returns."""
    audit: str | None = None
    """Output of `index audit` for the same questions and corpus."""
    protocol: str = "none"
    """A name of `verl.evaluation.protocols`, which has the table of them."""
    protocol_overrides: bool = False
    expected_ids: str | None = setting(
        None, lambda value: bool(re.fullmatch("[0-9a-f]{12,64}", value)), "12 to 64 digits of a SHA-256"
    )
    """Of the questions, see `verl.evaluation.protocol_check.hash_questions`."""

    def __post_init__(self) -> None:
        check_section("evaluation", self)
        require(bool(self.output_dir), "evaluation.output_dir", self.output_dir, "a folder")
        self.output_dir = os.path.expanduser(self.output_dir)
        if self.log_file is not None:
            require(bool(self.log_file), "evaluation.log_file", self.log_file, "a file or null")
            self.log_file = os.path.expanduser(self.log_file)
        if self.audit is not None:
            require(bool(self.audit), "evaluation.audit", self.audit, "the output of index audit or null")
            self.audit = os.path.expanduser(self.audit)
        require(
            self.n == 1 or self.temperature > 0,
            "evaluation.temperature",
            self.temperature,
            f"greater than 0 with evaluation.n={self.n}: greedy answers are all equal",
        )
