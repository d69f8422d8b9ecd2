from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prepare_data import main

from search_r1.agent.prompts import search_instruction
from verl.data.dataset import load_questions


def write_lines(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def line(question: str, *golds: str) -> dict[str, object]:
    return {
        "id": f"id of {question}",
        "question": question,
        "golden_answers": list(golds),
        "metadata": {"x": 1},
    }


def test_flashrag_folders_become_search_r1_parquet(tmp_path: Path) -> None:
    source = tmp_path / "flashrag"
    write_lines(source / "nq/train.jsonl", line("who wrote hamlet", "Shakespeare", "William Shakespeare"))
    write_lines(source / "nq/test.jsonl", line("who painted guernica?", "Picasso"))
    write_lines(source / "nq/dev.jsonl", line("not this one", "x"))
    write_lines(source / "hotpotqa/train.jsonl", line("q1", "a"), line("q2", "b"))
    write_lines(source / "hotpotqa/dev.jsonl", line("q3", "c"))
    out = tmp_path / "out"
    arguments = ["--flashrag-dir", str(source), "--train", "nq", "hotpotqa", "--test", "nq", "hotpotqa"]
    assert main([*arguments, "--out-dir", str(out)]) == 0

    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert rows[0] == {
        "id": "id of who wrote hamlet",
        "question": "who wrote hamlet",
        "golden_answers": ["Shakespeare", "William Shakespeare"],
        "data_source": "nq",
        "prompt": [{"role": "user", "content": search_instruction("who wrote hamlet")}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["Shakespeare", "William Shakespeare"]}},
        "extra_info": {"split": "train", "index": 0},
    }
    assert [(row["data_source"], row["extra_info"]["index"]) for row in rows] == [
        ("nq", 0), ("hotpotqa", 0), ("hotpotqa", 1),
    ]  # fmt: skip
    held_out = load_questions([str(out / "test.parquet")])
    assert [question.text for question in held_out] == ["who painted guernica?", "q3?"]
    assert held_out[1].golds == ("c",)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{not json", "not JSON"),
        ("", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"golden_answers": ["a"]}, '"question" must be a text that is not empty, got None'),
        (line("  ", "a"), '"question" must be'),
        (line("q"), '"golden_answers" must be a text, a number or a list of these with at least one that'),
        ({"question": "q", "golden_answers": ["a", True]}, "got ['a', True]"),
        (line("q", ""), "got ['']"),
    ],
)
def test_a_malformed_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: object, told: str
) -> None:
    file = write_lines(tmp_path / "mine.jsonl", line("fine", "a"), bad, line("fine too", "b"))
    assert main(["--train", f"mine={file}", "--out-dir", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert f"{file}:2: " in message
    assert told in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give --train or --test"),
        (["--train", "nq"], "a bare name needs --flashrag-dir"),
        (["--train", "mine=nowhere.jsonl"], "expected NAME=FILE with an existing file"),
        (["--flashrag-dir", "nowhere", "--test", "nq"], "FlashRAG's names: nq, triviaqa"),
    ],
)
def test_a_missing_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main([*arguments, "--out-dir", str(tmp_path)]) == 1
    assert told in capsys.readouterr().err


def test_an_empty_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "mine.jsonl")
    assert main(["--test", f"mine={file}", "--out-dir", str(tmp_path)]) == 1
    assert "the file is empty" in capsys.readouterr().err
