from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_data import SETS_KEY, main

from search_r1.search.corpus import open_corpus
from tests.agents import make_format
from tests.fakes import CharTokenizer
from tests.flashrag_sample import SPLITS, write_sample
from verl.data.dataset import load_questions

FORMAT = make_format(CharTokenizer())


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
    source, out = tmp_path / "flashrag", tmp_path / "out"
    write_lines(source / "nq/train.jsonl", line("who wrote hamlet", "Shakespeare", "William Shakespeare"))
    write_lines(source / "nq/test.jsonl", line("who painted guernica?", "Picasso"))
    write_lines(source / "nq/dev.jsonl", line("not this one", "x"))
    write_lines(source / "hotpotqa/train.jsonl", line("q1", "a"), line("q2", "b"))
    write_lines(source / "hotpotqa/dev.jsonl", line("q3", "c"))
    arguments = ["--flashrag-dir", str(source), "--train", "nq", "hotpotqa", "--test", "nq", "hotpotqa"]
    main([*arguments, "--out-dir", str(out)])

    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert rows[0] == {
        "id": "id of who wrote hamlet",
        "question": "who wrote hamlet",
        "golden_answers": ["Shakespeare", "William Shakespeare"],
        "data_source": "nq",
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["Shakespeare", "William Shakespeare"]}},
        "extra_info": {"split": "train", "index": 0},
    }
    indexes = [(row["data_source"], row["extra_info"]["index"]) for row in rows]
    assert indexes == [("nq", 0), ("hotpotqa", 0), ("hotpotqa", 1)]
    held_out = load_questions([out / "test.parquet"], prompt_format=FORMAT)
    assert [question.text for question in held_out] == ["who painted guernica?", "q3?"]
    assert held_out[1].golds == ("c",)


HOTPOTQA = [{"_id": "5a", "question": "q1", "answer": "yes", "supporting_facts": []}]
VERL_GSM8K = {"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "q1 Use `####`."}]} | {
    "reward_model": {"ground_truth": "5"},
    "extra_info": {"split": "train", "index": 0, "question": "q1"},
}


@pytest.mark.parametrize(
    ("name", "content", "golds"),
    [
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(HOTPOTQA, indent=1).encode(), ("yes",)),
        ("crlf.jsonl", b'\xef\xbb\xbf{"question": "q1", "golden_answers": [1990.0]}\r\n\r\n', ("1990",)),
        ("no_newline.jsonl", b'\n{"question": "q1", "answers": "a"}', ("a",)),
        ("gsm8k.parquet", VERL_GSM8K, ("5",)),
    ],
)
def test_other_forms_of_question_files(
    tmp_path: Path, name: str, content: bytes | dict[str, object], golds: tuple[str, ...]
) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        pq.write_table(pa.Table.from_pylist([content]), file)
    main(["--train", f"mine={file}", "--out-dir", str(tmp_path / "out")])
    (question,) = load_questions([tmp_path / "out" / "train.parquet"], prompt_format=FORMAT)
    assert (question.uid, question.text, question.golds) == ("mine/train/0", "q1?", golds)
    assert question.messages == FORMAT.write_prompt("q1?")


def test_a_corpus_of_beir_or_pyserini_becomes_that_of_the_retriever(tmp_path: Path) -> None:
    passages = [
        {"_id": "7", "title": "T", "text": "a\nb", "metadata": {}},
        {"_id": 8, "title": "", "text": "a\nb"},
        {"id": "9", "contents": "T\na"},
    ]
    file = write_lines(tmp_path / "corpus.jsonl", "\ufeff", *passages, "\r")
    main(["--corpus", str(file), "--out-dir", str(tmp_path / "out")])
    found = {document.id: document.contents for document in open_corpus(tmp_path / "out" / "corpus.jsonl")}
    assert found == {"7": '"T"\na\nb', "8": "a b", "9": "T\na"}


@pytest.mark.parametrize(
    ("option", "bad", "message"),
    [
        ("--train", "{not json", "not JSON"),
        ("--train", {"golden_answers": ["a"]}, "none of question, extra_info.question"),
        ("--train", line("  ", "a"), "question is '  '"),
        ("--train", line("q"), "golden_answers is [], expected a text, a number or a list of these"),
        ("--corpus", {"title": "T", "text": "a"}, "_id, id or docid is None"),
        ("--corpus", {"_id": "7", "title": "T"}, "contents or text is None"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, option: str, bad: object, message: str) -> None:
    good = line("fine", "a") | {"text": "fine"}
    file = write_lines(tmp_path / "mine.jsonl", good, bad, good)
    argument = str(file) if option == "--corpus" else f"mine={file}"
    with pytest.raises(SystemExit) as end:
        main([option, argument, "--out-dir", str(tmp_path / "out")])
    assert f"{file}:2: {message}" in str(end.value.code)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give --train, --test or --corpus"),
        ("--train nq", "a bare name needs --flashrag-dir"),
        ("--train mine=nowhere.jsonl", "expected NAME=FILE with an existing file"),
        ("--flashrag-dir nowhere --test nq", "FlashRAG's names: nq, triviaqa"),
        ("--test mine=empty.jsonl", "the file is empty"),
        ("--train mine=mine.jsonl --out-dir mine.jsonl/out", "mine.jsonl/out: Not a directory"),
        ("--corpus mine.jsonl --out-dir mine.jsonl/out", "mine.jsonl/out: Not a directory"),
    ],
)
def test_what_cannot_be_read_or_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    write_lines(tmp_path / "mine.jsonl", line("fine", "a") | {"id": 1, "contents": "fine"})
    with pytest.raises(SystemExit) as end:
        main(["--out-dir", "out", *arguments.split()])
    assert message in str(end.value.code)


def test_the_seven_sets_take_the_published_files_and_other_sizes_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_sample(tmp_path / "flashrag", per_set=2)
    main(["--flashrag-dir", str(source), "--test", *SPLITS, "--out-dir", str(tmp_path)])
    table = pq.read_table(tmp_path / "test.parquet")
    facts = json.loads(table.schema.metadata[SETS_KEY.encode()])
    assert facts["hotpotqa"] == {"questions": 2, "published": 7405, "files": ["dev.jsonl"]}
    assert {name: fact["files"] for name, fact in facts.items()} == {
        name: [f"{split}.jsonl"] for name, split in SPLITS.items()
    }
    assert " ".join(capsys.readouterr().out.split()).count("papers ask") == 7
    questions = load_questions([tmp_path / "test.parquet"], prompt_format=FORMAT)
    assert len(questions) == 14
    supported = {q.data_source for q in questions if len(q.supporting_ids) == len(q.supporting_texts) == 2}
    assert supported == {"hotpotqa", "2wikimultihopqa", "musique"}


def test_browsecomp_plus_keeps_the_ids_of_its_queries_and_documents(tmp_path: Path) -> None:
    row = {"query_id": "769", "query": "Which one?", "answer": "That", "evidence_docs": [{"docid": "41"}]}
    source = write_lines(tmp_path / "queries.jsonl", row, row | {"query_id": "12"})
    corpus = write_lines(tmp_path / "corpus.jsonl", {"docid": "41", "text": "a\nb", "url": "u"})
    arguments = ["--test", f"browsecomp_plus={source}", "--corpus", str(corpus)]
    main([*arguments, "--out-dir", str(tmp_path / "out")])
    found = load_questions([tmp_path / "out/test.parquet"], prompt_format=FORMAT)
    assert [q.uid for q in found] == [f"browsecomp_plus/test/{k}" for k in (769, 12)]
    assert (found[0].text, found[0].golds, found[0].supporting_ids) == ("Which one?", ("That",), ("41",))
    assert [passage.id for passage in open_corpus(tmp_path / "out/corpus.jsonl")] == ["41"]


def test_an_id_of_a_query_in_another_set_is_no_index(tmp_path: Path) -> None:
    row = {"query_id": "q-7", "question": "Which one?", "answer": "That"}
    source = write_lines(tmp_path / "mine.jsonl", row, {"question": "Which other?", "answer": "This"})
    main(["--test", f"mine={source}", "--out-dir", str(tmp_path / "out")])
    found = load_questions([tmp_path / "out/test.parquet"], prompt_format=FORMAT)
    assert [question.uid for question in found] == ["mine/test/0", "mine/test/1"]


FACTS = {"title": ["Hull", "York"], "sent_id": [0, 1]}
CONTEXT = {"title": ["Leeds", "York", "Hull"], "sentences": [["x"], ["In ", " York."], ["In Hull."]]}
MUSIQUE = [
    {"title": "Leeds", "paragraph_text": "x", "is_supporting": False},
    {"title": "Hull", "paragraph_text": "In Hull.", "is_supporting": True},
    {"title": "York", "paragraph_text": "In York.", "is_supporting": True},
]


@pytest.mark.parametrize(
    ("fields", "ids", "texts"),
    [
        ({}, (), ()),
        (
            {
                "supporting_facts": [["Hull", 0], ["York", 1], ["York", 2]],
                "context": [["York", ["x"]]],
            },
            ("Hull", "York"),
            (),  # one paragraph is missing
        ),
        (
            {"metadata": {"supporting_facts": FACTS, "context": CONTEXT}},
            ("Hull", "York"),
            ("Hull\nIn Hull.", "York\nIn York."),
        ),
        (
            {"paragraphs": [*MUSIQUE, MUSIQUE[2] | {"paragraph_text": "By the Ouse."}]},
            ("Hull", "York", "York"),
            ("Hull\nIn Hull.", "York\nIn York.", "York\nBy the Ouse."),
        ),
        ({"extra_info": {"supporting_ids": [3]}, "paragraphs": MUSIQUE}, ("3",), ()),
        ({"supporting_facts": "?", "context": {"title": 3}, "paragraphs": None}, (), ()),
    ],
    ids=["none", "hotpotqa", "flashrag", "musique", "ids", "unknown"],
)
def test_supporting_passages_are_kept(
    tmp_path: Path, fields: dict[str, object], ids: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    source = write_lines(tmp_path / "questions.jsonl", {**line("q1", "a"), **fields})
    main(["--train", f"mine={source}", "--out-dir", str(tmp_path)])
    (question,) = load_questions([tmp_path / "train.parquet"], prompt_format=FORMAT)
    assert (question.supporting_ids, question.supporting_texts) == (ids, texts)


def test_problems_keep_their_text_and_their_answer_as_one(tmp_path: Path) -> None:
    # In the columns of MATH-500; the problems were made for this test.
    rows = [
        {
            "problem": "Solve $|x-1|\\le 2$.",
            "solution": "..",
            "answer": "[-1, 3]",
            "subject": "Algebra",
            "level": 2,
        },
        {"problem": "What is $\\frac12+\\frac13$?", "solution": "..", "answer": "\\frac{5}{6}", "level": 1},
        {"problem": "Compute $6!$.", "answer": 720},
    ]
    source = write_lines(tmp_path / "math.jsonl", *rows)
    main(["--test", f"math={source}", "--out-dir", str(tmp_path)])
    found = load_questions([tmp_path / "test.parquet"], prompt_format=FORMAT)
    assert [question.text for question in found] == [row["problem"] for row in rows]
    assert [question.golds for question in found] == [("[-1, 3]",), ("\\frac{5}{6}",), ("720",)]
    with pytest.raises(SystemExit):
        main(
            [
                "--test",
                f"math={write_lines(tmp_path / 'x.jsonl', {'problem': 'p'})}",
                "--out-dir",
                str(tmp_path),
            ]
        )


def test_a_source_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_lines(
        tmp_path / "corpus.jsonl", {"_id": "7", "text": "A port.", "metadata": {"year": 1990}}
    )
    questions = tmp_path / "train.parquet"
    pq.write_table(pa.table({"question": ["Where?"], "golden_answers": [["Hull"]], "level": [3]}), questions)
    for given in (
        ["--corpus", str(corpus)],
        ["--train", f"mine={questions}"],
        ["--train", f"mine={corpus}", "--test", f"mine={questions}"],
    ):
        before = corpus.read_bytes(), questions.read_bytes()
        with pytest.raises(SystemExit, match="is a source and would be replaced; name another --out-dir"):
            main([*given, "--out-dir", str(tmp_path)])
        assert (corpus.read_bytes(), questions.read_bytes()) == before
