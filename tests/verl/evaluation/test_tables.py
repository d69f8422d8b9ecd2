from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from tests.scripted_evaluation import make_result
from verl.evaluation.records import ResultRecord
from verl.evaluation.summary import make_bins, summarize, summary_json
from verl.evaluation.tables import Table, as_latex, as_markdown, as_rich, curve_table, results_table


def make_results() -> list[ResultRecord]:
    """20 questions of one source, of which 5 are right and one failed; 4 of another, all right."""
    results = [make_result(f"2wiki_hop/test/{k}", em=float(k < 5), num_searches=k % 3) for k in range(19)]
    results.append(make_result("2wiki_hop/test/19", failure="search_failed: HTTP 500"))
    return results + [make_result(f"nq/test/{k}", num_searches=1) for k in range(4)]


def test_averages_over_questions_and_over_sources_without_the_failed() -> None:
    summary = summarize(make_results())
    assert [group.name for group in summary.sources] == ["2wiki_hop", "nq"]
    assert summary.micro.estimates["em"].value == pytest.approx(9 / 23)
    assert summary.macro.estimates["em"].value == pytest.approx((5 / 19 + 1) / 2)
    assert (summary.sources[0].num_questions, summary.sources[0].num_failed) == (20, 1)
    assert summary.failures == {"search_failed": 1}
    # All four are right: resampling them says nothing.
    assert summary.sources[1].estimates["em"].interval is None
    assert summary.macro.estimates["em"].interval is not None


def test_a_source_without_results_leaves_the_macro_average_undefined() -> None:
    results = [*make_results(), make_result("musique/test/0", failure="search_failed: HTTP 500")]
    summary = summarize(results)
    assert summary.macro.estimates == {}
    assert summary.micro.estimates["em"].value == pytest.approx(9 / 23)
    row = results_table(summary).rows[1]
    assert row[:4] == ("musique", "1", "1", "-")


def test_a_measure_that_some_questions_lack_has_no_mean() -> None:
    results = make_results()
    for result in results[:5]:
        result["metrics"]["judge"] = 1.0
    summary = summarize(results)
    assert summary.sources[0].missing == {"judge": 14}
    assert "judge" not in summary.micro.estimates
    assert "No mean of judge, which 18 of 24 questions lack." in results_table(summary).note


def test_samples_add_pass_at_k_and_majority() -> None:
    results = [
        make_result(f"nq/test/{k}", sample=sample, em=float(sample < k), prediction=f"{sample < k}")
        for k in range(4)
        for sample in range(3)
    ]
    results[-1] = make_result("nq/test/3", sample=2, failure="search_failed: HTTP 500")
    table = results_table(summarize(results))
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["pass@2"].startswith("66.7")  # 0, 2/3, 1, 1 (of two)
    assert cells["pass@3"].startswith("66.7")  # 0, 1, 1; the fourth has two samples only
    assert cells["majority"].startswith("50.0")


def test_exact_match_by_searches_and_tokens() -> None:
    summary = summarize(make_results())
    table = curve_table(summary, "num_searches")
    assert [row[:2] for row in table.rows] == [("0", "7"), ("1", "10"), ("2", "6")]
    assert table.rows[0][2].startswith("28.6")  # questions 0 and 3 of 0, 3, 6, ... 18
    many = [make_result(f"nq/test/{k}", output_tokens=k) for k in range(50)]
    assert make_bins(many, "output_tokens") == [(0, 9), (10, 19), (20, 29), (30, 39), (40, 49)]
    few = [make_result(f"nq/test/{k}", output_tokens=7) for k in range(50)]
    assert make_bins(few, "output_tokens") == [(7, 7)]


HOSTILE = Table(
    title="A & B [/u]",
    header=("source", "EM"),
    rows=(("2wiki_100% #1 \\x{} ~^$ <b> a|b\nc", "1.0 [0.5, 1.5]"), ("[red]x[/red]", "-1.5")),
    note="[b]n[/x]",
    rules=frozenset({1}),
)


def test_texts_of_the_data_are_escaped_in_every_format() -> None:
    markdown = as_markdown(HOSTILE).splitlines()
    assert markdown[4] == r"| 2wiki\_100% #1 \\x{} ~^$ \<b> a\|b c | 1.0 [0.5, 1.5] |"
    latex = as_latex(HOSTILE)
    expected = (
        r"2wiki\_100\% \#1 \textbackslash{}x\{\} \textasciitilde{}\textasciicircum{}\$ "
        r"\textless{}b\textgreater{} a\textbar{}b c & 1.0 [0.5, 1.5] \\"
    )
    assert expected in latex.splitlines()
    assert r"\caption{A \& B [/u]. [b]n[/x]}" in latex
    plain = re.sub(r"\\[\\&%$#_{}]", "", latex)
    assert plain.count("{") == plain.count("}")
    assert {line.count("&") + 1 for line in plain.splitlines() if "&" in line} == {len(HOSTILE.header)}
    assert latex.splitlines()[-6:-3] == [r"\midrule", r"{}[red]x[/red] & $-$1.5 \\", r"\bottomrule"]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(as_rich(HOSTILE))
    shown = console.export_text()
    assert all(text in shown for text in ("A & B [/u]", "[red]x[/red]", "[b]n[/x]"))


def test_figures_are_json_with_counts_and_intervals() -> None:
    figures = json.loads(json.dumps(summary_json(summarize(make_results())), allow_nan=False))
    em = figures["sources"]["2wiki_hop"]["metrics"]["em"]
    assert (em["value"], em["questions"]) == (pytest.approx(5 / 19), 19)
    assert 0.0 < em["low"] < em["value"] < em["high"] < 1.0
    assert figures["sources"]["nq"]["metrics"]["em"]["low"] is None
    assert figures["em_by"]["num_searches"][0]["from"] == 0


def test_tables_name_what_says_whether_answers_are_right() -> None:
    graded, plain = make_result("math500/test/0", em=0.0), make_result("nq/test/0")
    graded["metrics"]["math"] = 1.0
    titles = [curve_table(summarize(of), "num_searches").title for of in ([graded], [plain], [graded, plain])]
    assert titles == [
        "Equal expressions by executed searches",
        "EM by executed searches",
        "EM or equal expressions by executed searches",
    ]
    assert curve_table(summarize([graded]), "num_searches").rows == (("1", "1", "100.0"),)
