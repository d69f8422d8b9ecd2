from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.scripted_evaluation import write_evaluation_folder
from tests.scripted_run import answer_turn, decode, make_question, make_trajectory, score
from verl.errors import DataError
from verl.evaluation.page import write_report
from verl.evaluation.records import RESULTS_FILE, SETTINGS_FILE, TRAJECTORIES_FILE, ResultWriter


class _Elements(HTMLParser):
    """Tags with their attributes, and the verdicts of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.verdicts: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.loaded += [value for key, value in attrs if key in ("src", "href") and value and value[0] != "#"]
        if "data-verdict" in named:
            self.verdicts.append(named["data-verdict"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_folder(
        tmp_path_factory.mktemp("evaluations") / "run", skill=0.6, num_questions=120, num_samples=2
    )


def test_the_files_of_an_evaluation_have_the_same_figures(folder: Path) -> None:
    page = write_report(folder)
    html = page.read_text(encoding="utf-8")
    elements = _Elements()
    elements.feed(html)
    em = json.loads((folder / "summary.json").read_text())["macro"]["metrics"]["em"]
    shown = f"{100 * em['value']:.1f}"
    interval = f"[{100 * em['low']:.1f}, {100 * em['high']:.1f}]"
    assert f"{shown} {interval}" in (folder / "table.md").read_text()
    assert f"{shown} {interval}" in (folder / "table.tex").read_text()
    assert f'{shown} <span class="delta">{interval}</span>' in html
    assert elements.tags.count("svg") == 2
    assert elements.loaded == []  # self-contained
    assert page.stat().st_size < 2_000_000


def test_examples_of_every_verdict_with_their_trajectories(folder: Path) -> None:
    elements = _Elements()
    html = write_report(folder).read_text(encoding="utf-8")
    elements.feed(html)
    assert {"right", "wrong", "failed"} == set(elements.verdicts)
    assert elements.verdicts.count("right") == elements.verdicts.count("wrong") == 16
    assert elements.verdicts == sorted(elements.verdicts, key=["failed", "wrong", "right"].index)
    assert "search_failed" in html
    assert "I should look this up first." in html


def test_long_and_hostile_trajectories_neither_break_the_page_nor_its_size(tmp_path: Path) -> None:
    rng = random.Random(0)
    writer = ResultWriter(tmp_path, decode=decode)
    for number in range(40):
        played = make_trajectory(make_question(number), 0, rng, skill=0.5)
        attack = answer_turn("<script>alert(1)</script>" + "x" * 60_000)
        played = replace(played, turns=(*played.turns[:-1], attack), failure=None)
        writer.write(played, score=score(played, rng, with_gain=False))
    writer.close()
    (tmp_path / SETTINGS_FILE).write_text("{}")
    page = write_report(tmp_path)
    assert "<script>alert" not in page.read_text(encoding="utf-8")
    assert page.stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / TRAJECTORIES_FILE).unlink(), "trajectories.jsonl is not there"),
        (lambda folder: (folder / RESULTS_FILE).unlink(), "results.jsonl is not there"),
        (lambda folder: (folder / SETTINGS_FILE).unlink(), "settings.json is not there"),
        (lambda folder: (folder / SETTINGS_FILE).write_text("[1]"), "settings.json: Input should be"),
        (lambda folder: drop_first_line(folder / TRAJECTORIES_FILE), "is not the trajectory of"),
    ],
)
def test_a_damaged_folder_is_an_error_that_names_the_file(
    folder: Path, tmp_path: Path, damage, message
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(DataError, match=message):
        write_report(copy)


def drop_first_line(path: Path) -> None:
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
