"""Question files (JSON lines) to the parquet files that train and test a search agent.

A line is {"question": "...", "golden_answers": ["...", ...]}, with an optional "id": the format of the
FlashRAG data sets (nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique, bamboogle) and of your own
questions. Files are local; nothing is downloaded.

  python scripts/prepare_data.py --flashrag-dir FlashRAG_datasets --train nq hotpotqa \\
      --test nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle --out-dir data/nq_hotpotqa_train
  python scripts/prepare_data.py --train mine=questions.jsonl --test mine=held_out.jsonl --out-dir data/mine

With --flashrag-dir a bare name is the folder FlashRAG_datasets/NAME: train.jsonl for --train, and for --test
the first of test.jsonl, dev.jsonl, train.jsonl that exists.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from IG.web.settings import expand_home
from search_r1.agent.prompts import search_instruction
from serving.golds import EXPECTED_GOLDS, parse_golds
from verl.errors import ConfigError, DataError

FLASHRAG_NAMES = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
SPLIT_FILES = {"train": ("train.jsonl",), "test": ("test.jsonl", "dev.jsonl", "train.jsonl")}
MAX_PROBLEMS_SHOWN = 10

TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("golden_answers", TEXTS),
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        (
            "reward_model",
            pa.struct([("style", pa.string()), ("ground_truth", pa.struct([("target", TEXTS)]))]),
        ),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64())])),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of questions and the name under which its results are reported."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One valid line."""

    id: str
    question: str
    golds: tuple[str, ...]


def find_source(text: str, *, split: str, flashrag_dir: Path | None) -> Source:
    """`NAME=FILE`, or `NAME` below the FlashRAG folder. Raises ConfigError if there is no such file."""
    name, separator, file = text.partition("=")
    if separator:
        if not name or not Path(file).is_file():
            raise ConfigError(
                f"--{split} {text}: expected NAME=FILE with an existing file, found none at {file!r}"
            )
        return Source(name=name, path=Path(file))
    if flashrag_dir is None:
        raise ConfigError(f"--{split} {text}: a bare name needs --flashrag-dir; or give {text}=FILE.jsonl")
    candidates = [flashrag_dir / name / file for file in SPLIT_FILES[split]]
    for path in candidates:
        if path.is_file():
            return Source(name=name, path=path)
    known = ", ".join(FLASHRAG_NAMES)
    looked = ", ".join(str(path) for path in candidates)
    raise ConfigError(f"--{split} {text}: none of {looked} exists; FlashRAG's names: {known}")


def read_record(line: str, *, number: int) -> Record:
    """Raises ValueError saying what is wrong with the line and what is expected."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    question, golds = fields.get("question"), parse_golds(fields.get("golden_answers"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'"question" must be a text that is not empty, got {question!r}')
    if not golds:
        raise ValueError(f'"golden_answers" must be {EXPECTED_GOLDS}, got {fields.get("golden_answers")!r}')
    return Record(id=str(fields.get("id", number - 1)), question=question.strip(), golds=golds)


def read_source(source: Source) -> Iterator[Record]:
    """Every line of a file. Raises DataError that names file and line of the first malformed ones."""
    problems = []
    num_records = 0
    with source.path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                try:
                    record = read_record(line, number=number)
                except ValueError as error:
                    problems.append(f"  {source.path}:{number}: {error}")
                    if len(problems) == MAX_PROBLEMS_SHOWN:
                        break
                    continue
                num_records += 1
                yield record
        except UnicodeDecodeError as error:
            raise DataError(f"{source.path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    if problems:
        raise DataError("malformed lines; mend or delete them:\n" + "\n".join(problems))
    if not num_records:
        raise DataError(f"{source.path}: the file is empty")


def to_row(record: Record, *, source: Source, split: str, index: int) -> dict[str, object]:
    """Search-R1's parquet row."""
    return {
        "id": record.id,
        "question": record.question,
        "golden_answers": list(record.golds),
        "data_source": source.name,
        "prompt": [{"role": "user", "content": search_instruction(record.question)}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(record.golds)}},
        "extra_info": {"split": split, "index": index},
    }


def convert(sources: Sequence[Source], *, split: str, out: Path) -> Counter[str]:
    """Write one parquet file with all sources; the index counts within each name. Returns rows per name."""
    counts: Counter[str] = Counter()
    rows = []
    for source in track(sources, description=f"reading {split}", transient=True):
        for record in read_source(source):
            rows.append(to_row(record, source=source, split=split, index=counts[source.name]))
            counts[source.name] += 1
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
    partial.replace(out)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 after one message that names what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", nargs="*", default=[], metavar="NAME[=FILE]", help="training questions")
    parser.add_argument("--test", nargs="*", default=[], metavar="NAME[=FILE]", help="held-out questions")
    parser.add_argument("--flashrag-dir", type=Path, help="folder with one folder per FlashRAG data set")
    parser.add_argument("--out-dir", type=Path, required=True, help="train.parquet and test.parquet go here")
    arguments = parser.parse_args(expand_home(argv))
    console = Console()
    try:
        if not arguments.train and not arguments.test:
            raise ConfigError("nothing to do: give --train or --test")
        for split, names in (("train", arguments.train), ("test", arguments.test)):
            chosen = [find_source(name, split=split, flashrag_dir=arguments.flashrag_dir) for name in names]
            if chosen:
                out = arguments.out_dir / f"{split}.parquet"
                for name, count in convert(chosen, split=split, out=out).items():
                    console.print(f"{out}: {count} questions from {name}", highlight=False)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
