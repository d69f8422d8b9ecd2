from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from verl.workers.weight_folder import WeightFolder


def test_weights_go_where_there_is_room(tmp_path: Path) -> None:
    folder = WeightFolder(4, shared=tmp_path)
    assert folder.path.parent == tmp_path
    for num_bytes, shared in ((shutil.disk_usage(tmp_path).free, tmp_path), (4, tmp_path / "none")):
        elsewhere = WeightFolder(num_bytes, shared=shared)
        assert elsewhere.path.parent == Path(tempfile.gettempdir())
        elsewhere.remove()
    folder.remove()
    folder.remove()
    assert not list(tmp_path.iterdir())


def test_folders_of_killed_runs_are_removed_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    running = WeightFolder(4, shared=tmp_path)
    stale_folder = tmp_path / "verl-weights-stale"
    stale_folder.mkdir()
    (stale_folder / "lock").touch()
    for folder in tmp_path.iterdir():
        os.utime(folder, (0, 0))
    WeightFolder(4, shared=tmp_path).remove()
    assert list(tmp_path.iterdir()) == [running.path]
    running.remove()


def test_links_and_folders_of_other_users_are_neither_opened_nor_removed(tmp_path: Path) -> None:
    memory, elsewhere = tmp_path / "memory", tmp_path / "elsewhere"
    trap = memory / "verl-weights-trap"  # opening its lock must not block
    for folder in (memory, elsewhere, trap):
        folder.mkdir()
    (elsewhere / "lock").touch()
    (memory / "verl-weights-link").symlink_to(elsewhere)
    os.mkfifo(trap / "lock")
    if is_foreign := os.geteuid() == 0:  # only root can give a folder away
        os.chown(trap, 65534, 65534)
    for path in (*memory.iterdir(), elsewhere):
        os.utime(path, (0, 0), follow_symlinks=False)
    WeightFolder(4, shared=memory).remove()
    assert trap.exists() is is_foreign
    assert (memory / "verl-weights-link").is_symlink()
    assert (elsewhere / "lock").exists()
