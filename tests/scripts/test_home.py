"""A `~` that no shell expanded, in the paths of every program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import bundle
import doctor
import download
import prepare_data
import pytest
import report
import view_rollouts

import IG.__main__
from IG.service import IG_server
from search_r1.search import index_builder, index_cli, retrieval_server
from verl.evaluation import compare, judge, long_horizon

PROGRAMS = {
    "report": (report.main, "~/nowhere"),
    "bundle": (bundle.main, "~/nowhere"),
    "view_rollouts": (view_rollouts.main, "~/nowhere"),
    "prepare_data": (prepare_data.main, "--train nq=~/nowhere --out-dir=~/out"),
    "download": (download.main, "--save_path=~/file/nowhere"),
    "doctor": (doctor.main, "--lock=~/nowhere"),
    "index": (index_cli.main, "verify --index_path=~/nowhere"),
    "index_builder": (index_builder.main, "--corpus_path=~/nowhere --save_dir=~/out"),
    "retrieval_server": (retrieval_server.main, "--index_path=~/nowhere"),
    "compare": (compare.main, "~/nowhere ~/nowhere --output=~/out"),
    "judge": (judge.main, "~/nowhere --settings=~/nowhere.yaml"),
    "long_horizon": (long_horizon.main, "~/nowhere --data=~/nowhere"),
    "IG_server": (IG_server.main, "--model-path=~/nowhere"),
    "IG": (IG.__main__.main, "doctor --questions=~/nowhere"),
}


@pytest.mark.parametrize(("main", "command"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_tilde_is_the_home_folder(
    main: Callable[[Sequence[str]], object],
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("no folder can be made below it")
    monkeypatch.setenv("HOME", str(tmp_path))
    message = ""
    try:
        main(command.split())
    except SystemExit as end:
        message = str(end.code)
    shown = "".join([message, caplog.text, *capfd.readouterr()])
    assert f"{tmp_path}/" in shown
    assert "~/" not in shown
