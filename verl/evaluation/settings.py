"""`settings.json` of an evaluation folder: what was evaluated. Only the same evaluation continues it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from serving.files import write_json_atomically
from serving.redaction import redact
from verl.agent.reference import NO_SEARCH
from verl.errors import ConfigError
from verl.evaluation.protocols import BROWSECOMP_PLUS
from verl.evaluation.records import (
    EVIDENCE_FILE,
    HOPS_FILE,
    JUDGE_FILE,
    LATEX_FILE,
    MARKDOWN_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    SETTINGS_FILE,
    SUMMARY_FILE,
    TRAJECTORIES_FILE,
    VERDICTS_FILE,
)
from verl.run.folder import set_aside_run
from verl.run.manifest import MANIFEST_FILE, Manifest
from verl.run.progress import model_digest
from verl.run.report.report import REPORT_FILE
from verl.run.resume import retriever_facts
from verl.utils.files import parse_json
from verl.utils.flatten import flatten

logger = logging.getLogger(__name__)

PARTS = (
    SETTINGS_FILE, RESULTS_FILE, TRAJECTORIES_FILE, METRICS_FILE, SUMMARY_FILE, MARKDOWN_FILE, LATEX_FILE,
    REPORT_FILE, EVIDENCE_FILE, VERDICTS_FILE, JUDGE_FILE, HOPS_FILE, BROWSECOMP_PLUS,
)  # fmt: skip
"""All that an evaluation leaves in its folder, except for the log, which is open."""
_WITHOUT_EFFECT = (
    "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.model.attention",
    "actor_rollout_ref.model.enable_gradient_checkpointing",
    "actor_rollout_ref.model.checkpoint_every_n_layers", "algorithm.", "trainer.", "data.train_",
    "data.val_max_questions", "retriever.timeout_s", "reward.semantic.", "reward.max_failure_share",
    "evaluation.output_dir", "evaluation.log_file", "evaluation.resume", "evaluation.audit",
    "evaluation.expected_ids", "placement.", "plan",
)  # fmt: skip
"""Beginnings of the keys that change no answer and no metric, so that they may differ."""


_REFERENCE = "evaluation.reference"
_HASH = re.compile("[0-9a-f]{64}")


@with_config(ConfigDict(extra="allow"))
class _Shape(TypedDict):
    config: dict[str, Any]
    model: dict[str, Any]
    data: list[dict[str, Any]]
    prompt_file: dict[str, Any] | None
    services: dict[str, Any]


_SHAPE = TypeAdapter(_Shape)


def open_folder(folder: Path, settings: Manifest, *, resume: bool) -> None:
    """Write the settings to an empty folder, or check that those of an earlier start are the same.

    Without `resume` what is there is moved to `previous-<time>/`. Raises ConfigError that names each setting
    that differs, DataError if `settings.json` is damaged.
    """
    if (folder / MANIFEST_FILE).is_file():
        raise ConfigError(
            f"evaluation.output_dir={str(folder)!r} is the folder of a training run; name another one, as "
            f"{folder}/evaluation_of_it"
        )
    if not resume and (previous := set_aside_run(folder, parts=PARTS)):
        logger.info("evaluation.resume=false: the earlier evaluation was moved to %s", previous)
    settings = redact(settings)
    path = folder / SETTINGS_FILE
    if not path.is_file():
        left = [name for name in PARTS if (folder / name).is_file()]
        if left:
            raise ConfigError(
                f"evaluation.output_dir={str(folder)!r} has {', '.join(left)} without {SETTINGS_FILE}, "
                "which says what they are of; restore it, or set evaluation.resume=false, which moves them "
                "aside"
            )
        write_json_atomically(path, settings)
        return
    fix = "restore it, or set evaluation.resume=false, which moves the earlier evaluation aside"
    earlier = read_manifest(path, fix=fix)
    differences = list_differences(earlier, settings)
    if differences:
        raise ConfigError(
            f"{folder} holds an evaluation with other settings: {'; '.join(differences)}. Fix: restore them "
            "to continue it, name another evaluation.output_dir, or set evaluation.resume=false, which moves "
            "the earlier evaluation aside"
        )
    if earlier.get("git") != settings["git"]:
        logger.warning("the code has changed since this evaluation was started: %s", settings["git"])


def read_manifest(path: Path, *, fix: str) -> Mapping[str, Any]:
    """Return the settings in a file. Raises DataError if it is damaged."""
    return parse_json(path.read_bytes(), shape=_SHAPE, where=str(path), fix=fix)


def list_differences(
    earlier: Mapping[str, Any], now: Mapping[str, Any], *, words: tuple[str, str] = ("was", "is")
) -> list[str]:
    """Return the settings that change answers or metrics and differ, as `key was ..., is ...`.

    Model and files are compared by content, the retriever by its index where it describes it, and not with an
    evaluation that does not search.
    """
    old, new = _settings(earlier), _settings(now)
    shown_old, shown_new = ({**_shorten(old), **_names(earlier)}, {**_shorten(new), **_names(now)})
    has_search = NO_SEARCH not in (old.get(_REFERENCE), new.get(_REFERENCE))
    return [
        f"{key} {words[0]} {shown_old.get(key)!r}, {words[1]} {shown_new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and (has_search or not key.startswith("retriever."))
    ]


def _shorten(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings with the first digits of their hashes."""
    return {
        key: value[:12] if isinstance(value, str) and _HASH.fullmatch(value) else value
        for key, value in settings.items()
    }


def _settings(record: Mapping[str, Any]) -> dict[str, object]:
    """Return what answers and metrics depend on, by key."""
    config = flatten(record["config"])
    kept = {key: value for key, value in config.items() if not key.startswith(_WITHOUT_EFFECT)}
    prompt_file = record["prompt_file"] or {}
    index = retriever_facts(record)
    if index:
        del kept["retriever.url"]
    return (
        kept
        | index
        | {
            "actor_rollout_ref.model.path": model_digest(record["model"]),
            "data.val_files": [file["sha256"] for file in record["data"]],
            "data.prompt_file": prompt_file.get("sha256"),
        }
    )


def _names(record: Mapping[str, Any]) -> dict[str, str]:
    """Return path and beginning of the hash of what is compared by content, by key."""
    prompt_file = record["prompt_file"] or {"path": None, "sha256": ""}
    files = ", ".join(f"{file['path']} ({file['sha256'][:12]})" for file in record["data"])
    return {
        "actor_rollout_ref.model.path": f"{record['model']['path']} ({model_digest(record['model'])})",
        "data.val_files": files,
        "data.prompt_file": f"{prompt_file['path']} ({prompt_file['sha256'][:12]})",
    }
