from __future__ import annotations

import pytest

from IG.__main__ import main


@pytest.mark.parametrize(("command", "flag"), [("serve", "--port"), ("doctor", "--max-samples")])
def test_every_command_has_its_own_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert flag in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_gpus_that_are_not_there_are_refused_before_any_model_loads(
    command: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([command, "--num-gpus", "4"]) == 1
    assert "--num-gpus is 4" in caplog.text
    assert "PyTorch sees 0 GPUs here" in caplog.text
    assert "loading" not in caplog.text
