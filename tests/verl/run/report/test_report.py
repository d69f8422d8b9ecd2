from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.fakes import make_action
from tests.methods import make_method
from tests.scripted_run import decode, make_question, make_turn, write_run
from verl.errors import DataError
from verl.run.recorder import Recorder
from verl.run.report.report import write_report
from verl.types import Action, ActionKind, Passage, Score, Stop, Trajectory


class _Elements(HTMLParser):
    """Every element with its attributes, and the text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, text: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += text

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def _read(path: Path) -> tuple[str, _Elements]:
    html = path.read_text(encoding="utf-8")
    elements = _Elements()
    elements.feed(html)
    return html, elements


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("finished") / "run", steps=12)


def test_a_finished_run(finished: Path) -> None:
    path = write_report(finished)
    html, elements = _read(path)
    text = " ".join(elements.text.split())
    for expected in (
        "completed",
        "EM, inforeasoner (gain_weight 0.6)",
        "Step 0 against step 12",
        "world_one_hop",
        "First step (1)",
        "Middle step (7)",
        "Last step (12)",
        "trainer.seed 0",
    ):
        assert expected in text, expected
    charts = 12
    assert sum(tag == "svg" for tag, _ in elements.found) == charts
    assert path.stat().st_size < 2_000_000
    assert html.count("<figure>") == charts


def test_where_the_time_of_a_step_went(tmp_path: Path) -> None:
    """What was measured and what was not, with the traces of steps in their order."""
    run_dir = write_run(tmp_path / "run", steps=4)
    (run_dir / "profile").mkdir()
    for name in ("step_10_rank_0", "step_2_rank_1", "step_2_rank_0"):
        (run_dir / "profile" / f"{name}.json.gz").touch()
    html, elements = _read(write_report(run_dir))
    table = html[html.index('<table class="phases">') :].partition("</table>")[0]
    rows = [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in table.split("<tr>")[2:]]
    none = "\N{EN DASH}"
    assert rows[1:] == [
        f"reward gains: waited 0.4 s, 1.9 s more during the rollout 1.10 20 % {none} {none} {none}",
        f"log-probs 0.50 9 % {none} {none} {none}",
        "update 1.30 24 % 9,150 169 17.1 %",
        f"publish 6.2 GB at 41.0 GB/s 0.15 3 % {none} {none} {none}",
    ]
    assert rows[0].startswith("rollout tokens sampled; 2,140/s read 2.")
    assert rows[0].endswith(f"% 812 {none} {none}")
    links = [attributes.get("href") for tag, attributes in elements.found if tag == "a"]
    assert [link for link in links if link and link.startswith("profile/")] == [
        "profile/step_2_rank_0.json.gz",
        "profile/step_2_rank_1.json.gz",
        "profile/step_10_rank_0.json.gz",
    ]


def test_sampled_text_has_the_color_of_its_credit(tmp_path: Path) -> None:
    """With the components of the turn as the title, and the gains of its turns above."""
    run_dir = write_run(tmp_path / "run", steps=3, method=make_method("ig_search"))
    _, elements = _read(write_report(run_dir))
    text = " ".join(elements.text.split())
    assert "Gain per turn" in text
    assert "Advantage by kind of token" in text
    assert "Gains per turn have the same colors" in text
    titles = {a["title"] or "" for tag, a in elements.found if "credit" in (a.get("class") or "").split()}
    expected = re.compile(
        r"query: advantage [+-]\d\.\d+ on each of \d+ tokens\n"
        r"turn 1: gain [+-]0\.\d+, query_gain [+-]0\.\d+\nattempt: reward [+-]\d\.\d+, outcome [+-]\d\.\d+"
    )
    assert any(map(expected.fullmatch, titles))
    classes = {name for _, a in elements.found for name in (a.get("class") or "").split()}
    assert {"pos6", "neg6"} <= classes
    strips = [a["title"] for _, a in elements.found if "gain-of-turn" in (a.get("class") or "")]
    assert {title and title[:13] for title in strips} >= {"turn 1: gain ", "turn 2: no ga"}


def test_a_run_of_before_text_cuts_is_shown_without_colors(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=1)
    (path,) = (run_dir / "trajectories").iterdir()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for turn in (turn for record in records for turn in record["turns"]):
        del turn["text_cuts"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    _, elements = _read(write_report(run_dir))
    assert not any("credit" in (a.get("class") or "").split() for _, a in elements.found)
    assert "I should look this up first." in elements.text
    assert "No credit by token was recorded" in elements.text


def test_it_needs_no_network(finished: Path) -> None:
    html, elements = _read(write_report(finished))
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "img", "object", "base"), tag
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_a_crashed_run(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=12, crashed_at=2)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "kind": "tr')
    _, elements = _read(write_report(run_dir))
    text = " ".join(elements.text.split())
    assert "no end recorded" in text
    assert "Only one evaluation was recorded (step 0)" in text
    assert "needs two evaluations" in text
    assert "Last step (2)" in text


def test_a_run_that_crashed_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "run_manifest.json").write_text(
        json.dumps({"status": "failed", "reason": "retriever: no answer"})
    )
    _, elements = _read(write_report(tmp_path))
    assert "retriever: no answer" in elements.text
    assert "No training step was logged" in elements.text


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "train", "time": 1.0, "reward/mean": null, "policy/kl": 0.1}\n'
    )
    _, elements = _read(write_report(tmp_path))
    assert "KL to the reference" in elements.text
    assert sum(tag == "svg" for tag, _ in elements.found) == 1


def test_every_turn_whose_gain_was_measured_has_a_curve(tmp_path: Path) -> None:
    gains = {f"ig/gain_turn_{turn}_mean": 0.1 * turn for turn in (1, 3, *range(5, 13))}
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "kind": "train", "time": 1.0, **gains}) + "\n"
    )
    _, elements = _read(write_report(tmp_path))
    (description,) = (attributes["aria-label"] or "" for tag, attributes in elements.found if tag == "svg")
    assert re.findall(r"turn (\d+): ", description) == ["1", "3", *map(str, range(5, 13))]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run folder"):
        write_report(tmp_path)


HOSTILE = (
    '</script></pre><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }} " onfocus="alert(3)'
)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    question = replace(make_question(0), text=HOSTILE, golds=(HOSTILE,), data_source=HOSTILE)
    passage = Passage(id=HOSTILE, title=HOSTILE, text=HOSTILE, score=1.0)
    turn = make_turn(
        f"<think>{HOSTILE}</think><search>{HOSTILE}</search>{HOSTILE}",
        make_action(ActionKind.TOOL, HOSTILE),
        passages=[passage],
        observation=HOSTILE,
    )
    answer = make_turn(f"<answer>{HOSTILE}</answer>", make_action(ActionKind.ANSWER, HOSTILE))
    prompt = make_turn(HOSTILE, Action(kind=ActionKind.INVALID)).output_ids
    trajectory = Trajectory(
        question=question, sample=0, prompt_ids=prompt, turns=(turn, answer), stop=Stop.ANSWERED
    )
    failed = replace(trajectory, stop=Stop.FAILED, failure=HOSTILE)
    recorder = Recorder(tmp_path, decode=decode)
    recorder.write_evaluation(0, [trajectory], [Score(outcome=0.0, metrics={"em": 0.0})])
    recorder.write_evaluation(9, [trajectory], [Score(outcome=1.0, metrics={"em": 1.0})])
    recorder.write_evaluation(5, [failed], [Score(outcome=None, failure=HOSTILE)])
    (tmp_path / "run_manifest.json").write_text(
        json.dumps(
            {"status": HOSTILE, "reason": HOSTILE, "config": {"trainer": {"experiment_name": HOSTILE}}}
        )
    )

    _, elements = _read(write_report(tmp_path))
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert not any(tag == "img" for tag, _ in elements.found)
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert elements.text.count("<script>alert(1)</script>") >= 10
    assert "{{ 7 * 7 }}" in elements.text


def test_failures_are_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=2, num_questions=30)
    recorded = (run_dir / "trajectories" / "step_000001.jsonl").read_text()
    assert "search_failed" in recorded, "the script must contain a failure"
    _, elements = _read(write_report(run_dir))
    assert re.search(r"Failed in this step:\s+search_failed . \d", elements.text)
