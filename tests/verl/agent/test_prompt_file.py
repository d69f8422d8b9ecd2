"""The prompt file: checked at the door, replaced by a setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from verl.agent.prompts import PACKAGED_FILE, load_texts
from verl.errors import ConfigError
from verl.protocols import FixedText

ENTRIES = {"first": FixedText(required=("question",), optional=("tools",)), "note": FixedText()}
GOOD = {"first": "Ask: {question}", "note": "a {{brace}}"}


def test_the_packaged_file_gives_what_is_asked_for() -> None:
    sections = yaml.safe_load(PACKAGED_FILE.read_text())
    entries = {name: FixedText(optional=("question", "tools", "text")) for name in sections["search_r1"]}
    texts = load_texts(PACKAGED_FILE, section="search_r1", entries=entries)
    assert texts["observation"] == "\n\n<information>{text}</information>\n\n"
    assert load_texts(PACKAGED_FILE, section="has_no_texts", entries={}) == {}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"cannot be read \(.*No such file"),
        (b"\xff", "cannot be read"),
        ("a: [", "cannot be read .*expected YAML like"),
        ("- a", "mine is None, expected a section with first, note"),
        ({"mine": {"first": "{question}"}}, "mine.note is None, expected a text with no placeholder"),
        ({"mine": GOOD | {"note": 7}}, "mine.note is 7"),
        ({"mine": GOOD | {"retry": "x"}}, "mine.retry is not known, expected only first, note"),
        ({"mine": GOOD | {"first": "Ask"}}, r"mine.first has \{question\} 0 times, expected it once"),
        (
            {"mine": GOOD | {"first": "{question} {name}"}},
            r"placeholder \{name\}, expected \{question",
        ),
        ({"mine": GOOD | {"first": "{question.__class__}"}}, r"placeholder \{question.__class__\}"),
        ('mine: {first: "{question}", note: "a\\ud800"}', r"mine.note has half a character, '\\ud800'"),
        ('mine: {"\\ud800": x}', r"mine.\\ud800 is not known"),
        ("[" * 2000, r"cannot be read \(maximum recursion depth"),
        ("mine: " + "[" * 60 + "]" * 60, r"mine is \[+\.\.\.\]+, expected a section"),
        ({"mine": GOOD | {"note": "{"}}, "mine.note is malformed .*brace is written twice"),
    ],
)
def test_a_bad_file_is_refused_with_file_key_and_expectation(
    tmp_path: Path, content: object, complaint: str
) -> None:
    file = tmp_path / "prompts.yaml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=rf"data.prompt_file='{file}'.*{complaint}") as refused:
        load_texts(file, section="mine", entries=ENTRIES)
    assert len(str(refused.value).encode().splitlines()) == 1
