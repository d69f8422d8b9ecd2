"""Run files of BrowseComp-Plus: what its evaluator reads, one JSON file per query in one folder.

Its `scripts_evaluation/evaluate_run.py --input_dir FOLDER` reads each `run_*.json` (texttron/BrowseComp-Plus,
commit b90a68c): `query_id`, `status` (`completed`, or it counts as wrong), `retrieved_docids` (recall),
`tool_call_counts`, and of `result` the last entry, the answer that its judge reads.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from serving.files import write_json_atomically
from verl.errors import DataError
from verl.evaluation.protocols import BROWSECOMP_PLUS, find_set
from verl.evaluation.records import ResultRecord

logger = logging.getLogger(__name__)


def write_run_files(folder: Path, results: Sequence[ResultRecord], *, model: str) -> Path:
    """Write the run files of an evaluation in place of earlier ones, and return their folder.

    Questions of other sets have none, nor has an answer that failed: it is neither right nor wrong, and asked
    again by the next start. Raises DataError for two queries of one name.
    """
    answers = [r for r in results if r["sample"] == 0 and find_set(r["data_source"]) == BROWSECOMP_PLUS]
    failed = [result for result in answers if result["failure"] is not None]
    runs: dict[str, dict[str, object]] = {}
    for result in answers:
        run = to_run(result, model=model)
        name = "run_" + re.sub(r"[^\w.-]", "_", str(run["query_id"])) + ".json"
        if name in runs:
            raise DataError(
                f"{result['uid']} is the second query with the run file {name}; expected each query_id once: "
                "prepare the questions again (scripts/prepare_data.py) from one file of queries"
            )
        runs[name] = {} if result["failure"] is not None else run
    target = folder / BROWSECOMP_PLUS
    target.mkdir(exist_ok=True)
    for path in target.glob("run_*.json"):
        path.unlink()
    for name, run in runs.items():
        if run:
            write_json_atomically(target / name, run)
    if failed:
        logger.warning("%d of %d queries failed and have no run file", len(failed), len(answers))
    return target


def to_run(result: ResultRecord, *, model: str) -> dict[str, object]:
    """Return the run of one query; its id is the index of the question (scripts/prepare_data.py)."""
    answer = (result["prediction"] or "").strip()
    return {
        "metadata": {"model": model},
        "query_id": result["uid"].split("/", 2)[2],
        "tool_call_counts": result["num_calls"],
        "status": "completed" if answer else "incomplete",
        "retrieved_docids": list(dict.fromkeys(name for of_turn in result["passages"] for name in of_turn)),
        "result": [{"type": "output_text", "tool_name": None, "arguments": None, "output": answer}],
    }
