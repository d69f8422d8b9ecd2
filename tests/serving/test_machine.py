from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from serving.machine import has_bfloat16, socket_root


@pytest.mark.parametrize(
    ("folder", "root"), [("/var/tmp", "/var/tmp"), ("/var/" + "t" * 90, "/tmp"), ("/a folder", "/tmp")]
)
def test_sockets_go_where_their_paths_fit(folder: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", folder)
    assert socket_root() == root


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16 avx512vl\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features : fp asimd bf16\n", True),  # ARM
        ("flags : fpu avx512f avx512vl\n", False),
        (None, False),
    ],
)
def test_bfloat16_is_known_by_its_instructions(flags: str | None, expected: bool, tmp_path: Path) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    assert has_bfloat16(cpu_info=tmp_path / "cpuinfo") is expected
