"""Results of evaluations from a script, without a model: single records, and whole folders."""

from __future__ import annotations

import random
from pathlib import Path

from serving.files import write_json_atomically
from tests.scripted_run import decode, make_question, make_trajectory, score
from verl.evaluation.records import SETTINGS_FILE, ResultRecord, ResultWriter


def make_result(
    uid: str = "nq/test/0",
    *,
    sample: int = 0,
    em: float | None = 1.0,
    prediction: str | None = "Bolton",
    num_searches: int = 1,
    output_tokens: int = 10,
    failure: str | None = None,
) -> ResultRecord:
    """A result whose data source is the first part of its uid; with a failure it has no metrics."""
    return {
        "format": 1,
        "uid": uid,
        "sample": sample,
        "data_source": uid.split("/")[0],
        "question": f"Question {uid}?",
        "golds": ["Bolton"],
        "prediction": prediction,
        "stop": "answered" if failure is None else "failed",
        "failure": failure,
        "metrics": {} if failure is not None or em is None else {"em": em, "f1": em},
        "num_turns": num_searches + 1,
        "num_searches": num_searches,
        "num_calls": {"search": num_searches} if num_searches else {},
        "output_tokens": output_tokens,
        "context_tokens": 3 * output_tokens,
        "seconds": 0.5,
        "passages": [["a"]] * num_searches + [[]],
    }


def write_evaluation_folder(
    folder: Path, *, skill: float, num_questions: int = 60, num_samples: int = 1, seed: int = 0
) -> Path:
    """Write settings, results and trajectories of an agent; it is right more often the higher its skill."""
    rng = random.Random(seed)
    writer = ResultWriter(folder, decode=decode)
    for number in range(num_questions):
        for sample in range(num_samples):
            trajectory = make_trajectory(make_question(number, split="test"), sample, rng, skill=skill)
            writer.write(trajectory, score=score(trajectory, rng, with_gain=False))
    writer.close()
    model = {"model": {"path": f"models/{folder.name}"}}
    settings = {
        "config": {"actor_rollout_ref": model, "data": {"val_files": ["test.parquet"]}, "max_turns": 2},
        "model": {"path": f"models/{folder.name}", "files": {"config.json": folder.name}},
        "data": [{"path": "test.parquet", "sha256": "abc"}],
        "prompt_file": None,
        "services": {},
    }
    write_json_atomically(folder / SETTINGS_FILE, settings)
    return folder
