"""The quickstart with stand-ins for services and trainer; scripts, processes and sockets are real."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from quickstart import ROOT, choose_overrides, parse, summarize, write_ask_command
from worlds import WorldError, open_world

from search_r1.search.online.options import MOCK_VARIABLE
from search_r1.search.settings import RETRIEVER_SETTINGS, SERVER_SETTINGS
from verl.trainer.config.loading import compose_config
from verl.trainer.config.overrides import check_overrides, in_quotes
from verl.trainer.config.validate import validate
from verl.utils.supervise import is_service_variable

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

SERVICE = """
import os, sys, http.server
class Handler(http.server.BaseHTTPRequestHandler):
    loading = int(os.environ.get("LOADING", 0))
    def do_GET(self):
        Handler.loading -= 1
        self.send_response(200 if Handler.loading < 0 else 503); self.end_headers()
    def log_message(self, *args): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
print("loading the weights", flush=True)
host = os.environ.get("IG_HOST") or sys.argv[sys.argv.index("--host") + 1]
http.server.HTTPServer((host, port), Handler).serve_forever()
"""
TRAINER = """
import json, pathlib, subprocess, sys, time, urllib.request
from hydra.core.override_parser.overrides_parser import OverridesParser
parsed = OverridesParser.create().parse_overrides(sys.argv[1:])
given = {item.key_or_group: item.value() for item in parsed}
for key in ("data.train_files", "data.val_files", "actor_rollout_ref.model.path"):
    assert pathlib.Path(given[key]).exists(), given[key]
directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
directly.open(given["reward.semantic.url"]).read()
run_dir = pathlib.Path(given["trainer.default_local_dir"])
# A detached process, as Ray and vLLM leave them when they are killed.
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("the trainer says hello", flush=True)
with (run_dir / "metrics.jsonl").open("w") as out:
    def write(**row): print(json.dumps(row), file=out, flush=True)
    write(**{"step": 0, "kind": "val", "val/em": 0.25})
    for step in range(1, int(given["trainer.total_training_steps"]) + 1):
        write(**{"step": step, "kind": "train", "ig/gain_mean": step / 10 if step != 2 else None})
    time.sleep(float(given.get("wait", 0)))
    write(**{"step": step, "kind": "val", "val/em": 0.5})
sys.exit(int(given.get("code", 0)))
"""
DYING_SERVICE = "import sys; sys.exit('no such model: world/models/generator')"


def make_world(folder: Path) -> Path:
    """Make the files that a world must have, all empty."""
    models = [f"models/{name}/config.json" for name in ("policy", "generator", "encoder", "entailment")]
    for name in ("corpus.jsonl", "train.parquet", "test.parquet", "index/e5_Flat.index", *models):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with the real runner and stand-ins for what it starts; its path needs quotes."""
    root = tmp_path / "é (1),[x]=~'&张"
    (root / "scripts").mkdir(parents=True)
    for name in ("quickstart.py", "screen.py", "worlds.py"):
        shutil.copy(SCRIPTS / name, root / "scripts")
    make_world(root / "world")
    for module, code in {
        "search_r1/search/retrieval_server": SERVICE,
        "IG/service/IG_server": SERVICE,
        "verl/trainer/main_ppo": TRAINER,
    }.items():
        path = root / f"{module}.py"
        path.parent.mkdir(parents=True)
        path.write_text(code)
        for package in path.relative_to(root).parents[:-1]:
            (root / package / "__init__.py").touch()
    return root


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tree: Path) -> Iterator[Start]:
    """Start the quickstart; it is killed after the test if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "scripts/quickstart.py", "--run-dir", "run", *arguments]
        process = subprocess.Popen(
            command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for_trainer(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until the trainer runs; return all processes below the quickstart."""
    assert process.stdout is not None
    assert any("the trainer says hello" in line for line in process.stdout)
    return psutil.Process(process.pid).children(recursive=True)


def test_a_run_waits_for_its_services_and_ends_with_one_json_line_and_no_process(
    start: Start, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("IG_HOST", "no such address")
    monkeypatch.setenv("INDEX_PATH", "of another corpus")
    monkeypatch.setenv("LOADING", "3")
    process = start("--steps", "12", "--", "wait=1")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    summary = json.loads(output.splitlines()[-1])
    assert list(summary) == [
        "em_before", "em_after", "gain_first", "gain_last", "steps", "seconds", "peak_rss_gb", "run_dir",
    ]  # fmt: skip
    assert (summary["em_before"], summary["em_after"], summary["steps"]) == (0.25, 0.5, 12)
    assert summary["gain_first"] == pytest.approx((0.1 + 0.3 + 0.4 + 0.5 + 0.6) / 5)
    assert summary["gain_last"] == pytest.approx((0.8 + 0.9 + 1.0 + 1.1 + 1.2) / 5)
    assert summary["run_dir"] == str(tree / "run")
    assert 0.02 < summary["peak_rss_gb"] < 2
    assert "the trainer says hello" in output
    assert "the trainer says hello" in (tree / "run" / "console.log").read_text()
    assert "ignored, the services are configured here: IG_HOST, INDEX_PATH" in output
    assert not [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(tree)]


def test_no_setting_of_the_callers_retriever_reaches_ours() -> None:
    settings = (*RETRIEVER_SETTINGS, *SERVER_SETTINGS)
    assert [setting.env for setting in settings if not is_service_variable(setting.env)] == []
    assert is_service_variable(MOCK_VARIABLE)
    assert not is_service_variable("PATH")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_stops_everything(start: Start, number: signal.Signals, code: int) -> None:
    process = start("--", "wait=600")
    family = wait_for_trainer(process)
    assert len(family) == 5  # with the process guard, and the trainer's detached child
    process.send_signal(number)
    assert process.wait() == code
    assert not [member for member in family if member.is_running()]


def test_children_die_with_a_killed_quickstart(start: Start) -> None:
    process = start("--", "wait=600")
    family = wait_for_trainer(process)
    children = psutil.Process(process.pid).children()
    assert len(children) == 4  # with the process guard
    orphans = [member for member in family if member not in children]
    process.kill()
    psutil.wait_procs(children)
    for orphan in orphans:
        orphan.kill()


@pytest.mark.parametrize(
    ("service", "arguments", "messages"),
    [
        (
            DYING_SERVICE,
            [],
            ["the IG service ended with exit code 1", "no such model: world/models/generator"],
        ),
        (
            SERVICE.replace("loading = int(", "loading = 10**6 + int("),
            ["--service-timeout", "0.5"],
            ["was not ready after 0.5 s", ".log ends:\n"],
        ),
        (
            SERVICE,
            ["--", "code=7"],
            ["the trainer ended with exit code 7", "console.log ends:\n  the trainer says hello"],
        ),
        (SERVICE, ["--run-dir", "."], ["is not empty; name a new folder"]),
        (SERVICE, ["--world", "scripts"], ["--world scripts: ", "corpus.jsonl is missing", "or make real"]),
        (SERVICE, ["--policy", "world"], ["--policy ", "world is no model folder"]),
    ],
)
def test_what_fails_is_named_with_the_end_of_its_log(
    start: Start, tree: Path, service: str, arguments: list[str], messages: list[str]
) -> None:
    (tree / "IG/service/IG_server.py").write_text(service)
    process = start(*arguments)
    output, _ = process.communicate()
    assert process.returncode == 1
    assert [message for message in messages if message not in output] == [], output
    assert "error: " in output
    assert "Traceback" not in output
    assert "em_before" not in output


def test_a_world_may_bring_arguments_and_other_models(tmp_path: Path) -> None:
    folder = make_world(tmp_path / "w")
    given = {"ig_service": ["--prompt-file", "{world}/p.json"], "trainer": ["max_turns=1"]}
    (folder / "quickstart.json").write_text(json.dumps(given))
    world = open_world(folder, policy=folder / "models/generator", generator=None)
    assert world.overrides[-2:] == (
        f"actor_rollout_ref.model.path={in_quotes(str(folder / 'models/generator'))}", "max_turns=1",
    )  # fmt: skip
    assert world.ig_service_flags[-2:] == ("--prompt-file", f"{folder}/p.json")
    assert world.ig_service_flags[:2] == ("--model-path", str(folder / "models/generator"))
    assert world.retriever_flags[2:4] == ("--index_path", str(folder / "index/e5_Flat.index"))


@pytest.mark.parametrize("text", ["{", "[]", '{"other": []}', '{"trainer": "x=1"}', '{"trainer": [1]}'])
def test_malformed_arguments_of_a_world_are_named(tmp_path: Path, text: str) -> None:
    folder = make_world(tmp_path)
    (folder / "quickstart.json").write_text(text)
    with pytest.raises(WorldError, match=r"quickstart.json.*expected an object with lists of arguments"):
        open_world(folder, policy=None, generator=None)


@pytest.mark.parametrize("arguments", [[], ["--smoke", "--gain-weight", "0"]])
def test_its_overrides_are_a_valid_configuration(arguments: list[str]) -> None:
    config = compose_config(check_overrides(choose_overrides(parse(arguments))))
    for num_gpus in (0, 1):
        validate(config, num_gpus=num_gpus, cpu_has_bfloat16=False)
    assert config.data.train_batch_size == (4 if arguments else 16)


def test_it_says_how_to_ask_its_checkpoint() -> None:
    assert write_ask_command(ROOT / "runs" / "quickstart-20260101-000000") == "make ask"
    elsewhere = write_ask_command(Path("/tmp/a b"))
    variable, _, value = elsewhere.removeprefix("make ask ").partition("=")
    assert (variable, shlex.split(shlex.split(value)[0])) == ("ASK_ARGS", ["--model", "/tmp/a b"])


def test_unmeasured_figures_are_null(tmp_path: Path) -> None:
    rows = [{"step": 1, "val/em": 0.5, "ig/gain_mean": None}]
    summary = summarize(rows, seconds=1.0, peak_bytes=os.getpid(), run_dir=tmp_path)
    assert (summary.em_before, summary.em_after) == (None, 0.5)
    assert (summary.gain_first, summary.gain_last) == (None, None)
