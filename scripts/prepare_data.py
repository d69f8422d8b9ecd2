"""Convert question files (JSON lines, JSON arrays, parquet) to parquet files for training and evaluation.

A row is {"question": "...", "golden_answers": ["...", ...]}, with an optional "id": the format of the
FlashRAG data sets (nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique, bamboogle) and of your own
questions. HotpotQA's own JSON and the parquet files of Search-R1, verl, SkyRL and IGPO are read as well, and
{"problem": "...", "answer": "..."}, the format of MATH-500, for reward.outcome=math. The files that are
written hold no prompt: training takes the instruction from data.prompt_file. Supporting passages (HotpotQA,
2WikiMultihopQA, MuSiQue) are kept for algorithm=stepsearch. A corpus of BEIR or pyserini becomes the JSON
lines of the retriever. The decrypted questions of BrowseComp-Plus (query_id, query, answer, evidence_docs)
keep their query_id as index, and its corpus its docid. Files are local; nothing is downloaded.

The number of questions of a set that papers evaluate or train on is compared with theirs: another one is a
warning, and is recorded in the metadata of the parquet file (key question_sets).

  python scripts/prepare_data.py --flashrag-dir FlashRAG_datasets --train nq hotpotqa \\
      --test nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle --out-dir data/nq_hotpotqa_train
  python scripts/prepare_data.py --corpus scifact/corpus.jsonl --out-dir data/scifact
  python scripts/prepare_data.py --train mine=questions.jsonl --test mine=held_out.jsonl --out-dir data/mine

With --flashrag-dir a bare name is the folder FlashRAG_datasets/NAME: train.jsonl for --train, and for --test
the first of test.jsonl, dev.jsonl, train.jsonl that exists.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from serving.files import replacing_file
from serving.questions import (
    MATH,
    QuestionError,
    Row,
    find_golds,
    find_question,
    read_rows,
    refuse,
    require_text,
)
from serving.web.settings import expand_home
from verl.errors import ConfigError, DataError
from verl.evaluation.protocols import SETS, find_set
from verl.evaluation.published import FLASHRAG_SETS
from verl.utils.entry import error_line

SETS_KEY = "question_sets"
"""Of the metadata of the files: per set the number of questions, that of papers, and the source files."""
SPLIT_FILES = {"train": ("train.jsonl",), "test": ("test.jsonl", "dev.jsonl", "train.jsonl")}
MAX_PROBLEMS_SHOWN = 10


def find_source(argument: str, *, split: str, flashrag_dir: Path | None) -> tuple[str, Path]:
    """Return name and file of `NAME=FILE`, or of `NAME` below the FlashRAG folder. Raises ConfigError."""
    name, separator, file = argument.partition("=")
    if separator:
        if not name or not Path(file).is_file():
            raise ConfigError(
                f"--{split} {argument}: expected NAME=FILE with an existing file, found none at {file!r}"
            )
        return name, Path(file)
    if flashrag_dir is None:
        raise ConfigError(
            f"--{split} {argument}: a bare name needs --flashrag-dir; or give {argument}=FILE.jsonl"
        )
    candidates = [flashrag_dir / name / file for file in SPLIT_FILES[split]]
    for path in candidates:
        if path.is_file():
            return name, path
    raise ConfigError(
        f"--{split} {argument}: none of {', '.join(map(str, candidates))} exists; "
        f"FlashRAG's names: {', '.join(FLASHRAG_SETS)}"
    )


def read_questions(path: Path, *, source: str, split: str, start: int) -> list[Row]:
    """Return Search-R1's parquet rows of a file, counted from `start`.

    Raises DataError that names the first malformed rows.
    """
    rows: list[Row] = []
    problems: list[str] = []
    try:
        for number, (where, row) in enumerate(read_rows(path)):
            try:
                row, index = read_browsecomp(row, where=where)
                is_math = "problem" in row and "question" not in row
                question, golds = (find_problem if is_math else find_answers)(row, where=where)
            except QuestionError as error:
                problems.append(f"  {error}")
                if len(problems) == MAX_PROBLEMS_SHOWN:
                    break
                continue
            rows.append(
                {
                    "id": str(row.get("id", row.get("_id", number))),
                    "question": question,
                    "golden_answers": golds,
                    "data_source": source,
                    "ability": MATH if is_math else "fact-reasoning",
                    "reward_model": {"style": "rule", "ground_truth": {"target": golds}},
                    "extra_info": {
                        "split": split,
                        "index": start + len(rows) if index is None else index,
                        **find_support(row),
                    },
                }
            )
    except QuestionError as error:  # the file as a whole, or a line that is not JSON
        problems.append(f"  {error}")
    if problems:
        raise DataError("malformed rows:\n" + "\n".join(problems))
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return rows


def find_answers(row: Row, *, where: str) -> tuple[str, list[str]]:
    """Return the question and its gold answers. Raises QuestionError."""
    return find_question(row, where=where), list(find_golds(row, where=where))


def read_browsecomp(row: Row, *, where: str) -> tuple[Row, int | None]:
    """Return a row of BrowseComp-Plus with the names of other sets, and its index; any other row and None.

    Raises QuestionError.
    """
    if "query_id" not in row or "query" not in row:
        return row, None
    number = str(row["query_id"])
    if not number.isdecimal():
        refuse(row["query_id"], where=where, name="query_id", expected="a whole number")
    documents = row.get("evidence_docs")
    ids = (
        [str(one["docid"]) for one in documents if isinstance(one, dict) and "docid" in one]
        if isinstance(documents, list)
        else []
    )
    return {**row, "id": number, "question": row["query"], "supporting_ids": ids}, int(number)


def find_problem(row: Row, *, where: str) -> tuple[str, list[str]]:
    """Return a mathematical problem and its answer in LaTeX, as in MATH. Raises QuestionError.

    The answer is one text as it is: `[1, 2]` is an interval, no list of answers.
    """
    problem = require_text(row["problem"], where=where, name="problem").strip()
    answer = row.get("answer")
    if isinstance(answer, int | float):
        answer = str(answer)
    return problem, [require_text(answer, where=where, name="answer")]


def find_support(row: Row) -> dict[str, list[str]]:
    """Return `supporting_ids` and `supporting_texts` of a row, as far as it has them; {} without any.

    Ids are taken as they are. HotpotQA, 2WikiMultihopQA and MuSiQue name supporting passages by their title,
    which becomes the id, with title and paragraph as the text; paragraphs of one article have the same id.
    All are read from the row or from its `metadata`.
    """
    places = [row, *(found for key in ("extra_info", "metadata") if isinstance(found := row.get(key), dict))]
    for place in places:
        ids, texts = place.get("supporting_ids"), place.get("supporting_texts")
        if isinstance(ids, list) and ids:
            given = {"supporting_ids": ids, "supporting_texts": texts if isinstance(texts, list) else []}
            return {name: [str(one) for one in found] for name, found in given.items()}
    for place in places:
        paragraphs = read_paragraphs(place)
        if paragraphs:
            texts = [f"{title}\n{text}" for title, text in paragraphs if text]
            is_complete = len(texts) == len(paragraphs)
            titles = [title for title, _ in paragraphs]
            return {"supporting_ids": titles, "supporting_texts": texts if is_complete else []}
    return {}


def read_paragraphs(place: Row) -> list[tuple[str, str]]:
    """Return title and text of each supporting paragraph; the text is empty where only the title is there."""
    paragraphs = place.get("paragraphs")
    if isinstance(paragraphs, list):  # MuSiQue
        supporting = [one for one in paragraphs if isinstance(one, dict) and one.get("is_supporting")]
        return [(str(one.get("title")), str(one.get("paragraph_text") or "")) for one in supporting]
    context = dict(read_pairs(place.get("context"), "sentences", "content"))
    # A fact is a sentence: several of one paragraph have the same title.
    titles = dict.fromkeys(title for title, _ in read_pairs(place.get("supporting_facts"), "sent_id"))
    return [(title, join_text(context.get(title, ""))) for title in titles]


def read_pairs(value: object, *names: str) -> list[tuple[str, object]]:
    """Return (title, value) of a list of pairs, or of an object of lists `title` and one of `names`."""
    if isinstance(value, dict):
        columns = [value.get("title"), *(value[name] for name in names if name in value)][:2]
        is_table = len(columns) == 2 and all(isinstance(column, list) for column in columns)
        value = [[*pair] for pair in zip(*columns, strict=False)] if is_table else []
    pairs = value if isinstance(value, list) else []
    return [(str(pair[0]), pair[1]) for pair in pairs if isinstance(pair, list) and len(pair) == 2]


def join_text(text: object) -> str:
    """Return a paragraph that is a text or a list of sentences."""
    sentences = text if isinstance(text, list) else [text]
    return " ".join(" ".join(map(str, sentences)).split())


def convert_questions(sources: Sequence[tuple[str, Path]], *, split: str, out: Path) -> Counter[str]:
    """Write one parquet file; the index counts within each name. Return rows per name. Raises DataError."""
    counts: Counter[str] = Counter()
    files: dict[str, list[str]] = {}
    rows: list[Row] = []
    for name, path in track(sources, description=f"reading {split}", transient=True):
        found = read_questions(path, source=name, split=split, start=counts[name])
        counts[name] += len(found)
        files.setdefault(name, []).append(path.name)
        rows += found
    facts = {
        name: {"questions": count, "published": published_size(name, split=split), "files": files[name]}
        for name, count in counts.items()
    }
    table = pa.Table.from_pylist(rows)
    with replacing_file(out) as partial:
        pq.write_table(table.replace_schema_metadata({SETS_KEY: json.dumps(facts)}), partial)
    return counts


def published_size(name: str, *, split: str) -> int | None:
    """Return how many questions of a set papers evaluate (test) or train on; None for any other set."""
    known = SETS.get(find_set(name) or "")
    if known is None:
        return None
    return known.num_questions if split == "test" else known.num_training


def warn_of_size(console: Console, name: str, count: int, *, split: str) -> None:
    """Print a warning if a set has not as many questions as papers ask."""
    published = published_size(name, split=split)
    if published is not None and published != count:
        console.print(
            f"warning: --{split} {name} has {count} questions, papers ask {published}: its numbers cannot be "
            "set beside theirs (recorded in the file's metadata)",
            style="yellow",
            highlight=False,
        )


def to_passage(row: Row, *, where: str) -> Row:
    """Return the retriever's corpus line of a passage in the columns of BEIR, pyserini or BrowseComp-Plus.

    The first of several lines is the title. Raises QuestionError.
    """
    passage_id, contents = row.get("_id", row.get("id", row.get("docid"))), row.get("contents")
    if isinstance(passage_id, bool) or not isinstance(passage_id, str | int):
        refuse(passage_id, where=where, name="_id, id or docid", expected="a text or a number")
    if contents is None:
        text = require_text(row.get("text"), where=where, name="contents or text")
        title = row.get("title")
        contents = f'"{" ".join(str(title).split())}"\n{text}' if title else " ".join(text.split())
    return {"id": str(passage_id), "contents": require_text(contents, where=where, name="contents")}


def require_other_files(outputs: Iterable[Path], sources: Iterable[Path]) -> None:
    """Raise ConfigError if an output would replace a source, which has more than what is written."""
    read = {path.resolve() for path in sources}
    for out in outputs:
        if out.resolve() in read:
            raise ConfigError(f"{out} is a source and would be replaced; name another --out-dir")


def convert_corpus(path: Path, *, out: Path) -> int:
    """Write the corpus file of the retriever. Return the number of passages. Raises DataError."""
    count = 0
    try:
        with replacing_file(out) as partial, partial.open("w", encoding="utf-8") as file:
            for where, row in read_rows(path):
                file.write(json.dumps(to_passage(row, where=where)) + "\n")
                count += 1
            if not count:
                raise DataError(f"{path}: the file is empty")
    except QuestionError as error:
        raise DataError(str(error)) from error
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files, or exit with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", nargs="*", default=[], metavar="NAME[=FILE]", help="training questions")
    parser.add_argument("--test", nargs="*", default=[], metavar="NAME[=FILE]", help="held-out questions")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="passages of BEIR or pyserini")
    parser.add_argument("--flashrag-dir", type=Path, help="folder with one folder per FlashRAG data set")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the files that are written")
    arguments = parser.parse_args(expand_home(argv))
    console = Console()
    with error_line():
        if not arguments.train and not arguments.test and arguments.corpus is None:
            raise ConfigError("nothing to do: give --train, --test or --corpus")
        folder: Path = arguments.out_dir
        chosen = {
            split: [find_source(name, split=split, flashrag_dir=arguments.flashrag_dir) for name in names]
            for split, names in (("train", arguments.train), ("test", arguments.test))
            if names
        }
        sources = [path for of_split in chosen.values() for _, path in of_split]
        outputs = {split: folder / f"{split}.parquet" for split in chosen}
        if arguments.corpus is not None:
            sources.append(arguments.corpus)
            outputs["corpus"] = folder / "corpus.jsonl"
        require_other_files(outputs.values(), sources)
        if arguments.corpus is not None:
            count = convert_corpus(arguments.corpus, out=outputs["corpus"])
            console.print(f"{outputs['corpus']}: {count} passages", highlight=False)
        for split, of_split in chosen.items():
            out = outputs[split]
            for name, count in convert_questions(of_split, split=split, out=out).items():
                console.print(f"{out}: {count} questions from {name}", highlight=False)
                warn_of_size(console, name, count, split=split)


if __name__ == "__main__":
    main()
