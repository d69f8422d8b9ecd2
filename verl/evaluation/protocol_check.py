"""Apply a protocol to the configuration, list what deviates from it, and say so under every table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import TypedDict

from verl.errors import ConfigError
from verl.evaluation.protocols import NO_PROTOCOL, PROTOCOLS, EvaluationProtocol, find_set
from verl.evaluation.summary import LABELS, Summary
from verl.evaluation.tables import ABSENT, Table, format_estimate
from verl.trainer.config.schema import Config
from verl.types import Question

_KEY = "evaluation.protocol"
_ALLOW = "evaluation.protocol_overrides=true"


class ProtocolRecord(TypedDict):
    """The entry `protocol` of settings.json."""

    name: str
    deviations: list[str]
    unchecked: list[str]
    """What could not be compared with the protocol."""
    ids: dict[str, str]
    """SHA-256 of the questions of each set, see `hash_questions`."""


def read_protocol_option(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--protocol NAME` as `evaluation.protocol=NAME`. Raises ConfigError."""
    found, rest = [], iter(arguments)
    for argument in rest:
        option, separator, name = argument.partition("=")
        if option != "--protocol":
            found.append(argument)
            continue
        name = name if separator else next(rest, "")
        _require_known(name, f"--protocol {name}")
        found.append(f"{_KEY}={name}")
    return found


def add_protocol_settings(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command line with the settings of the protocol that they name before them.

    `--protocol NAME` is read, too. What is given later wins, so that a contrary setting stays and is found as
    a deviation. Raises ConfigError for an option without a known name.
    """
    arguments = read_protocol_option(arguments)
    given = [text.lstrip("+").partition("=") for text in arguments]
    names = [value.strip("\"'") for key, _, value in given if key == _KEY]
    if not names:
        return arguments
    _require_known(names[-1], f"{_KEY}={names[-1]}")
    settings = PROTOCOLS[names[-1]].settings if names[-1] in PROTOCOLS else {}
    return [*(_write(*setting) for setting in settings.items()), *arguments]


def _require_known(name: str, where: str) -> None:
    """Raise ConfigError for a name that no protocol has."""
    if name not in (NO_PROTOCOL, *PROTOCOLS):
        raise ConfigError(f"{where}: expected one of {', '.join([NO_PROTOCOL, *PROTOCOLS])}")


def _write(key: str, value: object) -> str:
    """Return an override in the grammar of Hydra."""
    return f"{key}=[{','.join(map(str, value))}]" if isinstance(value, list) else f"{key}={value}"


def check_protocol(
    config: Config, questions: Sequence[Question], *, version: Mapping[str, object]
) -> ProtocolRecord | None:
    """Return what the settings record of the protocol; None without one.

    `version` is how the retriever describes itself, empty where it does not. Raises ConfigError that lists
    all deviations, unless they are allowed.
    """
    if config.evaluation.protocol == NO_PROTOCOL:
        return None
    _require_known(config.evaluation.protocol, f"{_KEY}={config.evaluation.protocol}")
    protocol = PROTOCOLS[config.evaluation.protocol]
    deviations = [
        *list_setting_deviations(config, protocol),
        *list_question_deviations(questions, protocol),
        *list_corpus_deviations(version, protocol),
    ]
    if deviations and not config.evaluation.protocol_overrides:
        raise ConfigError(
            f"{_KEY}={protocol.name}: a number under this name would not be comparable: "
            f"{'; '.join(deviations)}. Fix: leave these settings out and give what the protocol asks for, or "
            f"set {_ALLOW}, which records the deviations and prints them under every table"
        )
    unchecked = [] if version else ["the corpus, as the retriever does not describe itself"]
    if protocol.is_sample and config.evaluation.expected_ids is None:
        unchecked.append(f"whether the questions are {protocol.sample} (evaluation.expected_ids pins them)")
    ids = {name: hash_questions(of_set) for name, of_set in _group_by_set(questions).items()}
    return {"name": protocol.name, "deviations": deviations, "unchecked": unchecked, "ids": ids}


def hash_questions(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of the sorted lines `[uid, question, gold answers]`, each in JSON with its end.

    A uid alone does not tell questions apart: its index can be the row in the file.
    """
    lines = sorted(json.dumps([one.uid, one.text, one.golds]) + "\n" for one in questions)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_ids(questions: Sequence[Question], expected: str | None) -> str:
    """Return the hash of all questions. Raises ConfigError unless it begins as expected."""
    found = hash_questions(questions)
    if expected is not None and not found.startswith(expected):
        raise ConfigError(
            f"evaluation.expected_ids={expected}: the {len(questions)} questions of "
            f"data.val_files have the SHA-256 {found}; evaluate the files that were pinned, and all of their "
            "questions (evaluation.max_questions=null)"
        )
    return found


def _group_by_set(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Return the questions by the name of their set, in alphabetical order."""
    found: dict[str, list[Question]] = {}
    for question in sorted(questions, key=lambda q: find_set(q.data_source) or q.data_source):
        found.setdefault(find_set(question.data_source) or question.data_source, []).append(question)
    return found


def list_setting_deviations(config: Config, protocol: EvaluationProtocol) -> list[str]:
    """Return the settings that differ, as `key is ..., the protocol has ...`."""
    found = []
    # A reference is not the agent that the protocol is about.
    for key, expected in {"evaluation.reference": "none", **protocol.settings}.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value != expected:
            found.append(f"{key} is {value}, the protocol has {expected}")
    return found


def list_question_deviations(questions: Sequence[Question], protocol: EvaluationProtocol) -> list[str]:
    """Return the sets that the protocol does not have, or of which it has another number of questions."""
    found = []
    for name, of_set in _group_by_set(questions).items():
        count = len(of_set)
        expected = protocol.questions.get(name)
        if expected is None:
            found.append(
                f"data.val_files has {count} questions of {name}, which is not a set of the protocol"
            )
        elif count != expected:
            found.append(f"data.val_files has {count} questions of {name}, the protocol has {expected}")
    return found


def list_corpus_deviations(version: Mapping[str, object], protocol: EvaluationProtocol) -> list[str]:
    """Return what is wrong with the size of the corpus, where the retriever states it."""
    if not version:
        return []
    passages = version.get("passages")
    if passages == protocol.num_passages:
        return []
    shown = "no corpus (an online engine)" if passages is None else f"a corpus of {passages} passages"
    return [f"the retriever has {shown}, the protocol searches {protocol.corpus}"]


def find_record(settings: Mapping[str, object]) -> ProtocolRecord | None:
    """Return the record of the protocol in the settings of an evaluation, None if it had none."""
    found = settings.get("protocol")
    if not isinstance(found, Mapping) or found.get("name") not in PROTOCOLS:
        return None
    return {
        "name": str(found["name"]),
        "deviations": [*map(str, found.get("deviations") or [])],
        "unchecked": [*map(str, found.get("unchecked") or [])],
        "ids": {str(name): str(value) for name, value in (found.get("ids") or {}).items()},
    }


def with_protocol(table: Table, record: ProtocolRecord | None) -> Table:
    """Return the table with the protocol and its deviations in the note."""
    if record is None:
        return table
    parts = [table.note, f"Protocol {record['name']}: {PROTOCOLS[record['name']].title}."]
    if record["deviations"]:
        parts.append(f"DEVIATES FROM IT, NOT COMPARABLE: {'; '.join(record['deviations'])}.")
    if record["unchecked"]:
        parts.append(f"Not checked: {'; '.join(record['unchecked'])}.")
    if record["ids"]:
        shown = ", ".join(f"{name} {value[:12]}" for name, value in record["ids"].items())
        parts.append(f"Questions (SHA-256): {shown}.")
    return replace(table, note=" ".join(part for part in parts if part))


def published_table(summary: Summary, record: ProtocolRecord) -> Table:
    """Return our figures above those that papers publish for the protocol.

    Our average is over the sets of the protocol; it is left out if one is missing.
    """
    protocol = PROTOCOLS[record["name"]]
    metric = protocol.metrics[0]
    ours = {find_set(group.name) or group.name: group.estimates.get(metric) for group in summary.sources}
    has_all = ours.keys() == protocol.questions.keys()
    average = format_estimate(summary.macro.estimates.get(metric)) if has_all else ABSENT
    name = "this evaluation (deviates)" if record["deviations"] else "this evaluation"
    rows = [(name, *(format_estimate(ours.get(one)) for one in protocol.questions), average, "measured here")]
    for result in protocol.published:
        values = (result.values.get(one) for one in protocol.questions)
        cells = (ABSENT if value is None else f"{value:.1f}" for value in (*values, result.average))
        rows.append((result.model, *cells, result.source))
    note = "Rows with a source are the papers' own numbers, not measured here. The average is over the sets."
    table = Table(
        title=f"Beside published numbers: {LABELS.get(metric, metric)}",
        header=("model", *protocol.questions, "average", "source"),
        rows=tuple(rows),
        note=" ".join([note, *protocol.notes]),
        rules=frozenset({1}),
    )
    return with_protocol(table, record)


def protocol_table() -> str:
    """Return the protocols as the Markdown table of docs/evaluation.md."""
    rows = ["| protocol | questions | metric | settings | corpus |", "|---|---|---|---|---|"]
    for name, protocol in PROTOCOLS.items():
        settings = ", ".join(f"`{_write(*setting)}`" for setting in protocol.settings.items())
        total = f"{sum(protocol.questions.values()):,} of {len(protocol.questions)} sets: {protocol.sample}"
        metrics = ", ".join(f"`{metric}`" for metric in protocol.metrics)
        rows.append(f"| `{name}` | {total} | {metrics} | {settings} | {protocol.corpus} |")
    return "\n".join(rows)
