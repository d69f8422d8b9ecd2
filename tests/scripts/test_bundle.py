from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import bundle
import pytest

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "IG_TOKEN": 'a"b\\c é/%',
    "HF_TOKEN": "plain-looking value",
    "NETRC": "password-of-netrc",
    "CACHED": "token-of-the-hub",
    "PROXY": "proxypassword",
    "BY_NAME": "only known by its name",
    "KEY": "MIIEvQIBADANBgkqhkiG9w0BAQ",
}
HOME_NAMES = ("jane.doe", "build-machine-7")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a user with secrets, which are in every file of it."""
    home = tmp_path / "home" / "jane.doe"
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/token").write_text(SECRETS["CACHED"] + "\n")
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRETS['NETRC']}\n")
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "jane.doe")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("socket.gethostname", lambda: "build-machine-7")
    for name in ("WANDB_API_KEY", "IG_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRETS[name])
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRETS['PROXY']}@proxy:3128")
    monkeypatch.setenv("NCCL_TRAP", f"{home}/x {SECRETS['IG_TOKEN']}")
    run = home / "runs" / "mine"
    (run / "trajectories").mkdir(parents=True)
    everything = " | ".join([*SECRETS.values(), str(home), "jane.doe@build-machine-7"])
    everything = everything.replace(SECRETS["BY_NAME"], "").replace(SECRETS["KEY"], "")
    named = {"judge": {"api_key": SECRETS["BY_NAME"], "url": f"http://x:{SECRETS['PROXY']}@h/{everything}"}}
    (run / "run_manifest.json").write_text(json.dumps({"config": named, everything: [everything]}))
    (run / "metrics.jsonl").write_text(f'{{"step": 1, "kind": "train", "reward/mean": 0.25}}\n{everything}\n')
    log = f"{everything}\n{json.dumps(everything)}\napi_key={SECRETS['BY_NAME'].replace(' ', '')}\n"
    key = f"-----BEGIN PRIVATE KEY-----\n{SECRETS['KEY']}\n-----END PRIVATE KEY-----\n"
    (run / "train.log").write_text(log + key + "the end\n")
    for step in (1, 2, 3):
        record = {"question": f"who wrote {step}?", "text": everything, "passage": "one\u2028two"}
        line = json.dumps(record, ensure_ascii=False)
        (run / "trajectories" / f"step_{step:06d}.jsonl").write_text(line + "\n")
    return run


def pack(run_dir: Path, *arguments: str) -> dict[str, str]:
    """The texts of a bundle by name."""
    bundle.main([str(run_dir), "--no-doctor", *arguments])
    with tarfile.open("bundle-mine.tar.gz") as packed:
        entries = {entry.name: packed.extractfile(entry) for entry in packed}
        return {name: file.read().decode() for name, file in entries.items() if file is not None}


def test_no_secret_is_in_it_wherever_it_was(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = pack(run_dir, "--trajectories", "2")
    assert sorted(texts) == [
        "bundle/environment.txt",
        "bundle/files.txt",
        "bundle/nvidia-smi.txt",
        "bundle/run/metrics.jsonl",
        "bundle/run/run_manifest.json",
        "bundle/run/train.log",
        "bundle/run/trajectories/step_000002.jsonl",
        "bundle/run/trajectories/step_000003.jsonl",
    ]
    shown = capsys.readouterr().out
    assert all(name.removeprefix("bundle/") in shown for name in texts)
    forms = [
        form
        for value in SECRETS.values()
        for form in (value, json.dumps(value)[1:-1], value.replace(" ", ""))
    ]
    for name, text in texts.items():
        assert [form for form in (*forms, *HOME_NAMES) if form in text] == [], name
    assert "~/runs" not in texts["bundle/files.txt"]
    assert "NCCL_TRAP=~/x ***" in texts["bundle/environment.txt"]
    # What a report needs is still there.
    assert '"reward/mean": 0.25' in texts["bundle/run/metrics.jsonl"]
    (line,) = texts["bundle/run/trajectories/step_000003.jsonl"].split("\n")[:-1]
    record = json.loads(line)
    assert (record["question"], record["passage"]) == ("who wrote 3?", "one\u2028two")
    assert texts["bundle/run/train.log"].endswith("the end\n")


def test_trajectories_are_left_out_and_links_are_not_followed(run_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "step_000009.jsonl").write_text('{"private": 1}\n')
    (run_dir / "train.log").unlink()
    (run_dir / "train.log").symlink_to(outside / "step_000009.jsonl")
    assert not [name for name in pack(run_dir) if "trajectories/" in name]
    os.rename(run_dir / "trajectories", run_dir / "other")
    (run_dir / "trajectories").symlink_to(outside)
    texts = pack(run_dir, "--trajectories", "5")
    assert "private" not in "".join(texts.values())
    assert texts["bundle/run/train.log"] == ""
    assert texts["bundle/files.txt"].count("link  ") == 2


def test_of_what_is_too_large_the_end_is_kept(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the cut falls into a private key."""
    key = f"-----BEGIN PRIVATE KEY-----\n{'x' * 40}\n{SECRETS['KEY']}\n-----END PRIVATE KEY-----\n"
    (run_dir / "train.log").write_text("y" * 1000 + "\n" + key + "the end\n")
    for name in ("run_manifest.json", "metrics.jsonl"):
        (run_dir / name).write_text("{}")
    texts = pack(run_dir, "--max-mb", "0.0001")
    assert texts["bundle/run/train.log"] == "***\nthe end\n"
    assert "the last 0.0 of 0.0 MB" in capsys.readouterr().out


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .* holds no run_manifest.json; give the folder of a run"):
        bundle.main([str(tmp_path)])
