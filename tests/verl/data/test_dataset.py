"""Parquet files become questions, or errors that name the file, the row and the column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.agents import make_format
from tests.fakes import CharTokenizer
from verl.data.dataset import check_prompt_lengths, load_questions, require_supporting_ids
from verl.errors import DataError
from verl.types import Message, Question


def make_row(
    index: int = 0, *, target: object = None, source: str = "nq", **changes: object
) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"<answer>: q{index}?\n"}],
        "ability": "fact-reasoning",
        "reward_model": {
            "style": "rule",
            "ground_truth": {"target": ["Bolton"] if target is None else target},
        },
        "extra_info": {"split": "train", "index": index},
        "question": f"q{index}?",
    } | changes


FORMAT = make_format(CharTokenizer())


def load(files: Sequence[Path], *, prompt: str = "auto", limit: int | None = None) -> list[Question]:
    return load_questions(files, prompt_format=FORMAT, prompt=prompt, limit=limit)


def write(file: Path, *rows: dict[str, Any]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file


WRITTEN = FORMAT.write_prompt("who wrote it?")
OWN = [{"role": "user", "content": "Use <answer> a </answer>."}]


@pytest.mark.parametrize(
    ("prompt", "own", "asked"),
    [
        ("auto", OWN, tuple(Message(**message) for message in OWN)),
        ("parquet", OWN, tuple(Message(**message) for message in OWN)),
        ("file", OWN, WRITTEN),
        ("file", [{"role": "user", "content": "who?"}], WRITTEN),
        ("file", "no prompt at all", WRITTEN),
        ("auto", None, WRITTEN),
        ("auto", [{"role": "user", "content": "who wrote it?"}], WRITTEN),
        ("auto", [{"role": "user", "content": " who wrote it\n"}], WRITTEN),
    ],
)
def test_where_the_prompt_comes_from(
    tmp_path: Path, prompt: str, own: object, asked: tuple[Message, ...]
) -> None:
    """The question is the same for policy and IG service: with a question mark."""
    row = make_row(0, question=" who wrote it ", prompt=own)
    (question,) = load([write(tmp_path / "a.parquet", row)], prompt=prompt)
    assert (question.text, question.messages) == ("who wrote it?", asked)


def test_that_prompts_are_only_questions_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [make_row(k, prompt=[{"role": "user", "content": f"q{k}?"}]) for k in range(2)]
    load([write(tmp_path / "a.parquet", *rows, make_row(2))])
    (record,) = caplog.records
    assert "the prompt of 2 of 3 rows is only the question" in record.message
    assert "a.parquet, row 0" in record.message


def test_a_row_without_an_instruction_is_refused_where_it_should_have_one(tmp_path: Path) -> None:
    for number, prompt in enumerate([None, [{"role": "user", "content": "q0?"}]]):
        file = write(tmp_path / f"{number}.parquet", make_row(0, prompt=prompt))
        with pytest.raises(DataError, match=r"row 0: prompt is .*data.prompt=auto or file"):
            load([file], prompt="parquet")


def test_the_same_index_in_another_source_is_another_question(tmp_path: Path) -> None:
    one = write(tmp_path / "a.parquet", make_row(0))
    two = write(tmp_path / "b.parquet", make_row(0, source="hotpotqa"))
    assert [q.uid for q in load([one, two])] == ["nq/train/0", "hotpotqa/train/0"]
    assert len(load([one, two], limit=1)) == 1


ASKED = [{"role": "user", "content": "Reason, then give <answer> x </answer>. Question: Where?"}]
POLITE = [{"role": "system", "content": "You are a helpful and harmless assistant."}, *ASKED]
BARE = [{"role": "user", "content": "Where?"}]
TRUTH = {"style": "rule", "ground_truth": {"target": ["Ramsey", "Ramsey, England"]}}
EXTRA = {"split": "train", "index": 0}
NEIGHBORS: dict[str, dict[str, Any]] = {
    "Search-R1": {"id": "train_0", "question": "Where?", "golden_answers": ["Ramsey", "Ramsey, England"]}
    | {"data_source": "nq", "prompt": ASKED, "reward_model": TRUTH, "extra_info": EXTRA},
    "verl": {"data_source": "nq", "prompt": POLITE, "reward_model": TRUTH, "metadata": None}
    | {"extra_info": EXTRA | {"question": "Where?", "need_tools_kwargs": True}},
    "SkyRL": {"data_source": "nq", "prompt": POLITE, "reward_spec": TRUTH, "env_class": "search"}
    | {"extra_info": EXTRA | {"question": "Where?"}},
    "IGPO": {"data_source": "nq", "prompt": BARE, "extra_info": {"index": "0", "split": "train"}}
    | {"reward_model": {"ground_truth": "Ramsey<|answer_split|>Ramsey, England", "style": "unknown"}},
} | {
    kind: {"data_source": "nq", "prompt": ASKED, "question": "Where?", "extra_info": EXTRA}
    | {"reward_model": {"ground_truth": truth}}
    for kind, truth in (
        ("a list as ground truth", ["Ramsey", "Ramsey, England"]),
        ("JSON text as ground truth", '{"target": ["Ramsey", "Ramsey, England"]}'),
    )
}


@pytest.mark.parametrize("project", NEIGHBORS)
def test_rows_of_neighboring_projects(tmp_path: Path, project: str) -> None:
    row = NEIGHBORS[project]
    (question,) = load([write(tmp_path / "a.parquet", row)])
    prompt = (
        FORMAT.write_prompt("Where?")
        if project == "IGPO"
        else tuple(Message(**message) for message in row["prompt"])
    )
    assert question == Question(
        uid="nq/train/0",
        text="Where?",
        messages=prompt,
        golds=("Ramsey", "Ramsey, England"),
        data_source="nq",
    )


def test_prompts_of_verl_with_tool_calls_are_those_of_that_format(tmp_path: Path) -> None:
    shown = "Search with <tool_call> query </tool_call>, then give <answer> x </answer>. Question: Where?"
    row = NEIGHBORS["verl"] | {"prompt": [POLITE[0], {"role": "user", "content": shown}]}
    file = write(tmp_path / "a.parquet", row)
    tool_calls = make_format(CharTokenizer(), name="tool_calls")
    (question,) = load_questions([file], prompt_format=tool_calls)
    assert question.messages == tuple(Message(**message) for message in row["prompt"])
    (bare,) = load_questions([write(file, NEIGHBORS["IGPO"])], prompt_format=tool_calls)
    assert bare.messages == tool_calls.write_prompt("Where?")
    with pytest.raises(DataError, match="never says to write between <tool_call>"):
        load_questions([write(file, NEIGHBORS["verl"])], prompt_format=tool_calls)


@pytest.mark.parametrize("prompt", [BARE, [POLITE[0], *BARE]])
def test_a_prompt_that_does_not_show_how_to_answer_is_refused(tmp_path: Path, prompt: object) -> None:
    """As that of verl's gsm8k example, which asks for `####`: nothing could ever be rewarded."""
    file = write(tmp_path / "a.parquet", make_row(prompt=prompt))
    with pytest.raises(DataError, match=r"a\.parquet, row 0: prompt never says .*data\.prompt=file"):
        load([file])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"reward_model": None}, r"none of reward_model\.ground_truth, .* \(there are data_source"),
        ({"target": [""]}, r"reward_model\.ground_truth\.target is \[''\]"),
        ({"question": "  "}, "question is '  '"),
        ({"question": None}, r"none of question, extra_info\.question"),
        ({"data_source": None}, "data_source is None"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": "Who?"}, "prompt is 'Who"),
        ({"prompt": [{"role": "user", "content": ""}]}, r"prompt\[0\]\.content is ''"),
        ({"extra_info": {"split": "train"}}, r"extra_info\.index is None"),
        ({"extra_info": {"index": 1}}, r"extra_info\.split is None"),
        ({"extra_info": "x"}, r"extra_info\.split is None"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    file = write(tmp_path / "bad.parquet", make_row(**changes))
    with pytest.raises(DataError, match=rf"bad\.parquet, row 0: .*{complaint}.*correct or drop"):
        load([file])


def test_a_uid_that_occurs_twice_names_both_places(tmp_path: Path) -> None:
    files = [
        write(tmp_path / name, make_row(0, source=name), make_row(7)) for name in ("a.parquet", "b.parquet")
    ]
    with pytest.raises(DataError, match=r"b\.parquet, row 1: uid 'nq/train/7'.*a\.parquet, row 1"):
        load(files)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        load([tmp_path / "none.parquet"])
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"text\.parquet: not a readable parquet file"):
        load([tmp_path / "text.parquet"])
    flipped = pyarrow.Table.from_pylist([make_row()]).set_column(
        0, "data_source", pyarrow.array([b"nq\xff"]).cast(pyarrow.string(), safe=False)
    )
    parquet.write_table(flipped, tmp_path / "flipped.parquet")
    with pytest.raises(DataError, match=r"flipped\.parquet: not a readable parquet file .*UTF"):
        load([tmp_path / "flipped.parquet"])
    parquet.write_table(pyarrow.table({"question": ["q"]}), tmp_path / "short.parquet")
    with pytest.raises(DataError, match=r"short\.parquet, row 0: extra_info\.split is None"):
        load([tmp_path / "short.parquet"])
    parquet.write_table(pyarrow.Table.from_pylist([make_row()]).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no questions"):
        load([tmp_path / "empty.parquet"])


def test_prompts_that_are_too_long_are_named_with_the_length_they_need(tmp_path: Path) -> None:
    questions = load([write(tmp_path / "a.parquet", make_row(0), make_row(100))])
    check_prompt_lengths(questions, prompt_format=FORMAT, max_start_length=16)
    with pytest.raises(
        DataError, match=r"1 of 2 prompts .*=14, as nq/train/100 \(16\); set it to at least 16"
    ):
        check_prompt_lengths(questions, prompt_format=FORMAT, max_start_length=14)


def extra(**fields: object) -> dict[str, object]:
    return {"extra_info": {"split": "train", "index": 0, **fields}}


@pytest.mark.parametrize(
    ("fields", "ids", "texts"),
    [
        ({}, (), ()),
        ({"supporting_ids": None, "supporting_texts": []}, (), ()),
        ({"supporting_ids": [7, 12]}, ("7", "12"), ()),
        ({"supporting_ids": ["a"], "supporting_texts": ["About a."]}, ("a",), ("About a.",)),
    ],
)
def test_supporting_passages_are_read(
    tmp_path: Path, fields: dict[str, object], ids: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    (question,) = load([write(tmp_path / "a.parquet", make_row(**extra(**fields)))])
    assert (question.supporting_ids, question.supporting_texts) == (ids, texts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"supporting_ids": "a"}, "supporting_ids is 'a', expected a list of ids"),
        ({"supporting_ids": [0.5]}, "supporting_ids is .*0.5.*, expected a list of ids"),
        (
            {"supporting_ids": ["a"], "supporting_texts": [" "]},
            "supporting_texts is .* a list of texts",
        ),
        ({"supporting_texts": ["x"]}, "expected one text for each of the 0 extra_info.supporting_ids"),
    ],
)
def test_wrong_supporting_passages_are_named(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"row 0: extra_info.*{message}"):
        load([write(tmp_path / "a.parquet", make_row(**extra(**fields)))])


def test_data_without_supporting_passages_is_refused_and_a_part_of_it_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_ids = extra(supporting_ids=["a"])
    rows = [make_row(0, **with_ids), make_row(1)]
    some = load([write(tmp_path / "a.parquet", *rows)])
    require_supporting_ids(some, method="stepsearch")
    assert (
        "1 of 2 training questions have no extra_info.supporting_ids: algorithm=stepsearch rewards them by "
        "their outcome alone"
    ) in caplog.text
    with pytest.raises(DataError, match=r"algorithm=stepsearch needs extra_info\.supporting_ids"):
        require_supporting_ids(some[1:], method="stepsearch")
