from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from serving.files import FileRecord
from verl.errors import ConfigError
from verl.workers.checkpoint import CHECKPOINTS, CheckpointStore, find_damage, find_policy


async def write_step(store: CheckpointStore, step: int) -> Path:
    async def writer(folder: Path) -> dict[Path, FileRecord]:
        content = b"w" * 100 + str(step).encode()
        (folder / "weights.pt").write_bytes(content)
        (folder / "huggingface").mkdir()
        (folder / "huggingface" / "config.json").write_text("{}")
        return {folder / "weights.pt": {"size": len(content), "sha256": sha256(content).hexdigest()}}

    return store.folder_of(await store.write(step, writer))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


async def test_the_newest_is_found_and_the_oldest_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    assert store.take_written() is None
    for step in (5, 10, 100):
        assert await write_step(store, step) == tmp_path / f"global_step_{step}"
        assert find_damage(tmp_path / f"global_step_{step}") is None
    written = store.take_written()
    assert written is not None
    assert written.num_bytes == len(b"w" * 100 + b"100") + len("{}")
    assert store.take_written() is None
    assert names(tmp_path) == ["global_step_10", "global_step_100", "latest"]
    assert store.latest() == CheckpointStore(tmp_path, keep=2).latest() == tmp_path / "global_step_100"
    assert (tmp_path / "latest").read_text() == "global_step_100\n"


async def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    good = await write_step(store, 1)

    async def failing(folder: Path) -> dict[Path, FileRecord]:
        (folder / "weights.pt").write_bytes(b"half")
        raise OSError("no space left on device")

    for step in (1, 2):
        with pytest.raises(OSError, match="no space"):
            await store.write(step, failing)
    assert names(tmp_path) == ["global_step_1", "latest"]
    assert find_damage(good) is None


def truncate(folder: Path) -> str:
    (folder / "weights.pt").write_bytes(b"w")
    return "weights.pt has 1 bytes"


def flip(folder: Path) -> str:
    content = bytearray((folder / "weights.pt").read_bytes())
    content[3] ^= 1
    (folder / "weights.pt").write_bytes(content)
    return "weights.pt has changed"


def remove(folder: Path) -> str:
    (folder / "huggingface" / "config.json").unlink()
    return "config.json is missing"


def spoil_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"files": ')
    return "manifest.json cannot be read"


def remove_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


@pytest.mark.parametrize("damage", [truncate, flip, remove, spoil_manifest, remove_manifest])
async def test_an_older_checkpoint_is_used_where_the_newest_is_damaged(
    tmp_path: Path, damage: object
) -> None:
    assert callable(damage)
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        await write_step(store, step)
    expected = damage(tmp_path / "global_step_3")
    assert expected in str(find_damage(tmp_path / "global_step_3"))
    assert CheckpointStore(tmp_path, keep=3).latest() == tmp_path / "global_step_2"


async def test_a_damaged_checkpoint_is_read_once_until_it_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        await write_step(store, step)
    flip(tmp_path / "global_step_2")
    resumed = CheckpointStore(tmp_path, keep=3)
    assert [resumed.latest() for _ in range(2)] == [tmp_path / "global_step_1"] * 2
    assert caplog.text.count("is damaged") == 1
    assert resumed.latest() != await write_step(resumed, 2) == resumed.latest()


async def test_a_run_that_went_back_replaces_its_later_steps_and_follows_its_own(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    await write_step(store, 4)
    truncate(await write_step(store, 8))
    again = CheckpointStore(tmp_path, keep=1)
    await write_step(again, 6)
    assert again.latest() == CheckpointStore(tmp_path, keep=1).latest() == tmp_path / "global_step_6"
    rewritten = await write_step(again, 8)
    assert find_damage(rewritten) is None
    assert names(tmp_path) == ["global_step_8", "latest"]


async def test_an_unfinished_write_is_removed(tmp_path: Path) -> None:
    partial = tmp_path / ".global_step_9.partial"
    partial.mkdir()
    (partial / "weights.pt").write_bytes(b"half")
    assert CheckpointStore(tmp_path, keep=1).latest() is None
    assert not partial.exists()


async def test_the_policy_of_a_run_is_that_of_its_newest_good_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / CHECKPOINTS, keep=3)
    steps = [await write_step(store, step) for step in (5, 10)]
    unfinished = tmp_path / CHECKPOINTS / ".global_step_15.partial"
    unfinished.mkdir()
    assert find_policy(str(tmp_path)) == str(steps[1] / "huggingface")
    for path in (str(steps[0]), str(steps[0] / "huggingface")):
        assert find_policy(path) == str(steps[0] / "huggingface")
    truncate(steps[1])  # a file that only a resumed run reads
    assert find_policy(str(tmp_path)) == str(steps[1] / "huggingface")
    (steps[1] / "huggingface" / "config.json").write_text("")
    assert find_policy(str(tmp_path)) == str(steps[0] / "huggingface")
    assert unfinished.is_dir(), "it belongs to the run, which may be going on"
    with pytest.raises(ConfigError, match=r"model\.path=\S+global_step_10: .*config\.json has 0 bytes"):
        find_policy(str(steps[1]))
    for name in ("Qwen/Qwen2.5-3B", str(tmp_path / "nowhere")):
        assert find_policy(name) == name
