"""Write the trajectories of a run to `trajectories/` and `evaluation/`, one file per step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from serving.files import replacing_file
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
        records = (
            to_record(t, score=score, credit=credit, step=step, kind="train", decode=self._decode)
            for t, score, credit in scored.samples()
        )
        return self._write(TRAJECTORIES, step, records)

    def write_evaluation(
        self, step: int, trajectories: Sequence[Trajectory], scores: Sequence[Score]
    ) -> Path:
        """Record an evaluation after `step` updates; return the file."""
        records = (
            to_record(t, score=score, credit=None, step=step, kind="val", decode=self._decode)
            for t, score in zip(trajectories, scores, strict=True)
        )
        return self._write(EVALUATION, step, records)

    def has_evaluation(self, step: int) -> bool:
        """Return whether an evaluation after `step` updates is recorded."""
        return step_file(self._run_dir, EVALUATION, step).is_file()

    def _write(self, folder: str, step: int, records: Iterable[TrajectoryRecord]) -> Path:
        """Write the records one by one: those of a large step together would take hundreds of MB."""
        path = step_file(self._run_dir, folder, step)
        with replacing_file(path) as partial, partial.open("wb") as file:
            for record in records:
                line = json.dumps(record, ensure_ascii=False, allow_nan=False)
                file.write(f"{line}\n".encode(errors="backslashreplace"))
        return path
