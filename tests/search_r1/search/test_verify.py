from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from search_r1.search.bm25 import build_bm25
from search_r1.search.index_cli import main
from search_r1.search.manifest import locate_manifest
from tests.search_r1.search.small_world import World, save_encoder


def command(world: World, *flags: str, with_encoder: bool = True) -> list[str]:
    files = ["--index_path", str(world.index), "--corpus_path", str(world.corpus)]
    model = ["--retriever_model", str(world.encoder)] if with_encoder else []
    return ["verify", *files, *model, *flags]


def flip_a_vector(world: World) -> None:
    content = bytearray(world.index.read_bytes())
    content[-2] ^= 0x40
    world.index.write_bytes(content)


def change_a_word(world: World) -> None:
    world.corpus.write_text(world.corpus.read_text().replace("Bolton", "Dalton"))


def change_the_encoder(world: World) -> None:
    save_encoder(world.encoder, seed=1)


def break_a_line(world: World) -> None:
    world.corpus.write_text(world.corpus.read_text().replace('"contents"', '"content"', 1))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (flip_a_vector, "files.e5_Flat.index.fingerprint: index was built with"),
        (change_a_word, "corpus.sha256: index was built with"),
        (change_the_encoder, "encoder_sha256: index was built with"),
        (break_a_line, "corpus.jsonl:1: no 'contents'"),
    ],
)
def test_what_differs_is_named(
    copied_world: World, spoil: Callable[[World], None], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert main(command(copied_world)) == 0
    assert "whole, and of this corpus and encoder" in caplog.text
    spoil(copied_world)
    assert main(command(copied_world)) == 1
    assert complaint in caplog.text


def test_without_a_manifest_what_can_be_checked_is(
    copied_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    locate_manifest(copied_world.index).unlink()
    assert main(command(copied_world, with_encoder=False)) == 0
    assert "there is no manifest" in caplog.text
    assert main(command(copied_world)) == 1
    assert "--passage_prefix" in caplog.text
    flags = ["--pooling_method", "mean", "--query_prefix", "query: ", "--passage_prefix", "passage: "]
    assert main(command(copied_world, *flags)) == 0
    copied_world.index.unlink()
    assert main(command(copied_world)) == 1
    assert "is not a file" in caplog.text


def test_a_bm25_index_is_verified_as_well(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    build_bm25(world.corpus, index_path=tmp_path / "bm25")
    assert main(["verify", "--index_path", str(tmp_path / "bm25"), "--corpus_path", str(world.corpus)]) == 0
    assert "(6 passages)" in caplog.text
