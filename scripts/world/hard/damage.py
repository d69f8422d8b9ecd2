"""The damaged world: a world without a share of its supporting passages, as with a corpus that has gaps.

Questions, gold answers, models and the ids of passages stay as they are, so that runs on both worlds
compare, and `index audit` names what is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
from worlds import SETTINGS_FILE, describe_source

from world import dataset, making

SHARE = 0.37
COPIED = ("train.parquet", "test.parquet", "doctor.jsonl", SETTINGS_FILE)


def damage(source: Path, out: Path, *, share: float, seed: int) -> dict[str, int]:
    """Write the damaged copy of a world; return counts of passages.

    Raises ValueError for a share outside [0, 1], FileNotFoundError if `source` is not a world and
    FileExistsError if `out` is not empty.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"--share is {share:g}, expected 0 to 1")
    if not (source / "manifest.json").is_file():
        raise FileNotFoundError(f"--from {source} has no manifest.json, expected the folder of a world")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out {out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    routes = {split: find_routes(source / f"{split}.parquet") for split in dataset.SPLITS}
    found = {passage for asked in routes.values() for hops in asked for hop in hops for passage in hop}
    supporting = sorted(found, key=int)
    removed = set(Random(f"damage {seed}").sample(supporting, round(share * len(supporting))))
    lines = (source / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["id"] not in removed]
    (out / "corpus.jsonl").write_text("".join(kept), encoding="utf-8")
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    shutil.copytree(source / "models", out / "models")
    making.index_corpus(out)
    counts = {"passages": len(kept), "supporting": len(supporting), "removed": len(removed)} | {
        f"{split}_questions_with_a_route": sum(
            all(set(hop) - removed for hop in hops) for hops in routes[split]
        )
        for split in dataset.SPLITS
    }
    manifest = {
        "damaged_from": describe_source(source),
        "seed": seed,
        "share": share,
        "counts": counts,
        "sha256": making.hash_files(out),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return counts


def find_routes(path: Path) -> list[list[list[str]]]:
    """Return for each question and hop the ids of all passages that state the hop's fact."""
    extras = [row["extra_info"] for row in pq.read_table(path).to_pylist()]
    return [extra.get("routes") or [[one] for one in extra["supporting_ids"]] for extra in extras]


def main(arguments: Sequence[str]) -> None:
    """Make the damaged world; exit with status 2, and with what to do, if it cannot be made."""
    parser = argparse.ArgumentParser(
        prog="make_world.py damaged",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from", dest="source", type=Path, default=Path("world/hard"), help="a world (default world/hard)"
    )
    parser.add_argument(
        "--share", type=float, default=SHARE, help=f"share of supporting passages to remove (default {SHARE})"
    )
    parser.add_argument("--seed", type=int, default=0, help="what is removed is drawn from it (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    chosen = parser.parse_args(arguments)
    try:
        counts = damage(chosen.source, chosen.out, share=chosen.share, seed=chosen.seed)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(json.dumps(counts))
