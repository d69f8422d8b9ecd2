"""Write the trajectories of a run to `trajectories/` and `evaluation/`, one file per step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from serving.files import write_atomically
from verl.run.records import (
    EVALUATION,
    TRAJECTORIES,
    Decode,
    TrajectoryRecord,
    step_file,
    to_record,
)
from verl.types import Score, ScoredGroups, Trajectory


class Recorder:
    """Writes trajectories with their scores and credit, each file atomically."""

    def __init__(self, run_dir: Path, *, decode: Decode) -> None:
        self._run_dir = run_dir
        self._decode = decode

    def write(self, step: int, scored: ScoredGroups) -> Path:
        """Record a training step; return the file."""
        records = [
            to_record(t, score=score, credit=credit, step=step, kind="train", decode=self._decode)
            for t, score, credit in scored.samples()
        ]
        return self._write(TRAJECTORIES, step, records)

    def write_evaluation(
        self, step: int, trajectories: Sequence[Trajectory], scores: Sequence[Score]
    ) -> Path:
        """Record an evaluation after `step` updates; return the file."""
        records = [
            to_record(t, score=score, credit=None, step=step, kind="val", decode=self._decode)
            for t, score in zip(trajectories, scores, strict=True)
        ]
        return self._write(EVALUATION, step, records)

    def _write(self, folder: str, step: int, records: Sequence[TrajectoryRecord]) -> Path:
        path = step_file(self._run_dir, folder, step)
        write_atomically(
            path, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
        )
        return path
