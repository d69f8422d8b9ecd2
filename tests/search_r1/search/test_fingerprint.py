from __future__ import annotations

from pathlib import Path

import pytest

from search_r1.search.fingerprint import fingerprint

SIZE = 50_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "file"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.mark.parametrize(
    "position", [0, (1 << 20) - 1, SIZE - 1, SIZE - (1 << 20), SIZE * 100 // 256, SIZE // 2]
)
def test_a_change_where_it_looks_changes_it(large: Path, position: int) -> None:
    before = fingerprint(large)
    with large.open("r+b") as file:
        file.seek(position)
        file.write(b"x")
        file.flush()
        assert fingerprint(large) != before
        file.seek(position)
        file.write(b"\0")
    assert fingerprint(large) == before


def test_any_change_of_a_small_file_or_of_the_size_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2_000_000))
    before = fingerprint(path)
    for position in range(0, 2_000_000, 400_001):
        spoilt = bytearray(2_000_000)
        spoilt[position] = 1
        path.write_bytes(spoilt)
        assert fingerprint(path) != before
    path.write_bytes(bytes(2_000_001))
    assert fingerprint(path) != before


def test_it_does_not_read_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert len(fingerprint(path)) == 64
