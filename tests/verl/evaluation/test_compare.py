from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from serving.files import write_json_atomically
from tests.scripted_evaluation import write_evaluation_folder
from verl.errors import DataError
from verl.evaluation.compare import main, name_runs
from verl.evaluation.records import JUDGE_FILE, RESULTS_FILE, SETTINGS_FILE


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


def test_every_pair_and_another_base(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*map(str, folders), "--pairs", "all", "--output", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["em"]["differences"]
    assert [(d["run"], d["base"]) for d in found if d["set"] == "macro average"] == [
        ("base", "no_search"),
        ("trained", "no_search"),
        ("trained", "base"),
    ]
    # Holm over all nine tests: three pairs, two sets and the macro average.
    assert len(found) == 9
    smallest = min(d["p"] for d in found)
    assert min(d["p_holm"] for d in found) == pytest.approx(9 * smallest)
    shown = (tmp_path / "comparison.md").read_text()
    assert "## EM: differences of all pairs" in shown
    assert "| run | minus |" in shown.replace("| set ", "")
    assert ">a,b" in next(line for line in shown.splitlines() if line.startswith("| trained"))
    assert "higher than run a (a is no_search, b is base, c is trained)" in shown
    for name in ("comparison.tex", "comparison.html"):
        assert "differences of all pairs" in (tmp_path / name).read_text(), name

    main([*map(str, folders), "--base", "trained", "--output", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["em"]["differences"]
    assert {(d["run"], d["base"]) for d in found} == {("no_search", "trained"), ("base", "trained")}
    assert all(d["value"] < 0 for d in found if d["run"] == "no_search")
    assert "* differs from trained" in (tmp_path / "comparison.md").read_text()


def test_names_of_folders_are_shown_as_they_are(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [r"a$\frac$", "_<b>", "[red]"]
    for name, folder in zip(names, folders, strict=True):
        shutil.copytree(folder, tmp_path / name)
    main([*(str(tmp_path / name) for name in names), "--output", str(tmp_path / "out")])
    assert "differences to a$" in capsys.readouterr().out
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count(r">a$\frac$</text>") == page.count(">_&lt;b&gt;</text>") == 2  # in both charts
    assert "_<b>" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}", "{0}"], "error: a run is given twice"),
        (["{0}", "{0}/nowhere"], "nowhere/results.jsonl is not there"),
        (["{0}", "{1}", "--metric", "searches"], "has no metric searches"),
        (["{0}"], "give at least two runs"),
        (["{0}", "{1}", "--base", "x"], "--base x is none of the runs, which are no_search, base"),
        (["{0}", "{1}", "--base", "base", "--pairs", "all"], "leave out --base"),
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


def test_settings_that_differ_and_deviations_stand_under_the_scores(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[0], other)
    settings = json.loads((other / SETTINGS_FILE).read_text())
    settings["config"]["max_turns"] = 5
    protocol = {"name": "search_r1", "deviations": ["max_turns is 5, the protocol has 4"], "unchecked": []}
    write_json_atomically(other / SETTINGS_FILE, settings | {"protocol": protocol})
    main([str(folders[0]), str(other), "--output", str(tmp_path / "out")])
    notes = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]
    assert notes == [
        "Settings differ: max_turns of no_search is 2, of other 5.",
        "other DEVIATES from protocol search_r1: max_turns is 5, the protocol has 4.",
    ]
    assert all(note in (tmp_path / "out/comparison.md").read_text() for note in notes)


def test_verdicts_of_other_judges_are_not_compared(folders: list[Path], tmp_path: Path) -> None:
    paths = []
    for name, prompt in (("a", "Is it?"), ("b", "Is it not?")):
        shutil.copytree(folders[0], tmp_path / name)
        judge = dict.fromkeys(("answers", "not_judged", "calls", "tokens"), 0) | {"format": 1, "model": "m"}
        judge |= {
            "replied_as": [],
            "sources": {},
            "failures": {},
            "sha256": name,
            "settings": {"prompt": prompt},
        }
        write_json_atomically(tmp_path / name / JUDGE_FILE, judge)
        paths.append(str(tmp_path / name))
    with pytest.raises(SystemExit, match=r"judged by other models or prompts: a by m \(settings a\), b by m"):
        main([*paths, "--metric", "judge"])
    main(paths)


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert [*name_runs([tmp_path / "a", tmp_path / "b"])] == ["a", "b"]
    assert [*name_runs([tmp_path / "x/eval", tmp_path / "y/eval"])] == ["x/eval", "y/eval"]
    with pytest.raises(DataError, match="twice"):
        name_runs([tmp_path, tmp_path / "a/.."])
