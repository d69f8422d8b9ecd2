"""A question gets the prompt that the questions of the run had."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.agents import make_format
from tests.fakes import CharTokenizer
from verl.ask.prompt import find_prompt
from verl.trainer.config.data import DataConfig
from verl.types import Message

OWN = "Answer in <answer> and </answer>. Q: {} !"
FORMAT = make_format(CharTokenizer())


def write_rows(path: Path, prompts: list[str]) -> DataConfig:
    rows = [
        {
            "data_source": "nq",
            "prompt": [{"role": "user", "content": prompt.format(f"who {number}?")}],
            "question": f"who {number}",
            "reward_model": {"ground_truth": {"target": ["x"]}},
            "extra_info": {"split": "test", "index": number},
        }
        for number, prompt in enumerate(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return DataConfig(val_files=[str(path)])


def test_it_is_that_of_the_rows(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", [OWN, OWN])
    assert find_prompt(data, prompt_format=FORMAT)("When?") == (
        Message(role="user", content=OWN.format("When?")),
    )


@pytest.mark.parametrize(
    ("prompts", "warning"),
    [
        ([OWN, OWN + "?"], "have no prompt in common"),
        ([OWN.replace("{}", "{0} {0}")], "have no prompt in common"),
        (None, "rows.parquet is not there"),
        (["{}"], ""),
    ],
)
def test_else_it_is_the_instruction_and_a_warning_says_so(
    tmp_path: Path, prompts: list[str] | None, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.parquet"
    data = DataConfig(val_files=[str(path)]) if prompts is None else write_rows(path, prompts)
    assert find_prompt(data, prompt_format=FORMAT)("When?") == FORMAT.write_prompt("When?")
    assert warning in caplog.text
    assert bool(warning) == ("instead" in caplog.text)
