from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripted_evaluation import write_evaluation_folder
from verl.errors import DataError
from verl.evaluation.compare import main, name_runs
from verl.evaluation.records import RESULTS_FILE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("evaluations")
    skills = {"no_search": 0.0, "base": 0.4, "trained": 0.95}
    return [
        write_evaluation_folder(root / name, skill=skill, num_questions=80, seed=k)
        for k, (name, skill) in enumerate(skills.items())
    ]


def test_runs_side_by_side_on_the_terminal_in_files_and_as_json(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*map(str, folders), "--metric", "em", "--metric", "f1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / "comparison.json").read_text()) == found
    assert [*found["metrics"]] == ["em", "f1"]
    em = {(d["run"], d["set"]): d for d in found["metrics"]["em"]["differences"]}
    assert len(em) == 2 * 3  # runs by two sets and the macro average
    trained = em["trained", "macro average"]
    assert trained["p_holm"] < 0.05 < trained["value"]
    assert trained["low"] < trained["value"] < trained["high"]
    assert found["answers"] == 80 - sum(found["left_out"].values())
    shown = f"{100 * trained['value']:+.1f}"
    for name in ("comparison.md", "comparison.html"):
        assert shown in (tmp_path / name).read_text(), name
    assert shown in out
    assert r"\toprule" in (tmp_path / "comparison.tex").read_text()
    assert (tmp_path / "comparison.html").read_text().count("<svg") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}", "{0}"], "error: a run is given twice"),
        (["{0}", "{0}/nowhere"], "nowhere/results.jsonl is not there"),
        (["{0}", "{1}", "--metric", "searches"], "has no metric searches"),
        (["{0}"], "give at least two runs"),
    ],
)
def test_one_line_says_what_is_wrong(
    folders: list[Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([argument.format(*folders) for argument in arguments])
    assert message in f"{ended.value}{capsys.readouterr().err}"


def test_other_questions_are_counted(folders: list[Path], tmp_path: Path) -> None:
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    lines = (folders[0] / RESULTS_FILE).read_bytes().splitlines(keepends=True)
    (shorter / RESULTS_FILE).write_bytes(b"".join(lines[:50]))
    with pytest.raises(SystemExit, match="shorter lacks 30 of the 80 answers of base"):
        main([str(folders[1]), str(shorter)])
    main([str(folders[1]), str(shorter), "--intersect"])


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert [*name_runs([tmp_path / "a", tmp_path / "b"])] == ["a", "b"]
    assert [*name_runs([tmp_path / "x/eval", tmp_path / "y/eval"])] == ["x/eval", "y/eval"]
    with pytest.raises(DataError, match="twice"):
        name_runs([tmp_path, tmp_path / "a/.."])
