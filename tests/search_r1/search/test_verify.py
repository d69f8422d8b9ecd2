from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from search_r1.search.bm25 import build_bm25
from search_r1.search.errors import RetrieverError
from search_r1.search.index_cli import main
from search_r1.search.manifest import locate_manifest
from search_r1.search.vector_index import locate_vectors
from search_r1.search.verify import Check, verify_index
from tests.search_r1.search.small_world import World, save_encoder


def verify(world: World, **changes: str | None) -> dict[str, Check]:
    settings = {"encoder_path": str(world.encoder)} | changes
    checks = verify_index(world.index, corpus_path=world.corpus, **settings)
    return {check.name: check for check in checks}


def test_everything_is_looked_at(world: World) -> None:
    checks = verify(world)
    assert all(check.verdict == "same" for check in checks.values())
    assert set(checks) >= {
        f"files.{world.index.name}.sha256",
        "corpus.sha256",
        "corpus passages",
        "kind",
        "dim",
        "count",
        "encoder_sha256",
        "6 known passages",
    }
    assert "encoder_sha256" not in verify(world, encoder_path=None)


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


def add_vectors_of_another(world: World) -> None:
    locate_vectors(world.index).write_bytes(world.index.read_bytes())


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (add_vectors_of_another, {"files.e5_Flat.index.vectors"}),
        (flip_a_vector, {"files.e5_Flat.index.sha256", "files.e5_Flat.index.fingerprint"}),
        (change_a_word, {"corpus.sha256", "corpus.fingerprint"}),
        (change_the_encoder, {"encoder_sha256", "6 known passages"}),
        (break_a_line, {"corpus.bytes", "corpus.sha256", "corpus.fingerprint", "corpus passages"}),
    ],
)
def test_what_differs_is_named(copied_world: World, spoil: Callable[[World], None], names: set[str]) -> None:
    spoil(copied_world)
    encoder_path = str(copied_world.encoder) if spoil is change_the_encoder else None
    checks = verify(copied_world, encoder_path=encoder_path)
    assert {name for name, check in checks.items() if not check.is_good} == names


def test_without_a_manifest_what_can_be_checked_is(copied_world: World) -> None:
    locate_manifest(copied_world.index).unlink()
    checks = verify(copied_world, encoder_path=None)
    assert checks["corpus.sha256"].verdict == "not recorded"
    assert checks["count"].verdict == "same"


def test_an_unknown_encoder_of_an_index_without_a_manifest_can_be_told_how_it_encodes(
    copied_world: World, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    files = ["--index_path", str(copied_world.index), "--corpus_path", str(copied_world.corpus)]
    command = ["verify", *files, "--retriever_model", str(copied_world.encoder)]
    told = ["--pooling_method", "mean", "--query_prefix", "query: ", "--passage_prefix"]
    assert main([*command, *told, "other: "]) == 1
    assert re.search(r"passage_prefix .*passage: .*other: .*differs", capsys.readouterr().out)
    locate_manifest(copied_world.index).unlink()
    assert main(command) == 1
    assert "--passage_prefix" in caplog.text
    assert main([*command, *told, "passage: "]) == 0


def test_a_missing_index_is_named(tmp_path: Path, world: World) -> None:
    with pytest.raises(RetrieverError, match="is not a file"):
        verify_index(tmp_path / "nowhere", corpus_path=world.corpus)


def test_the_command_shows_a_table(
    copied_world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    files = ["--index_path", str(copied_world.index), "--corpus_path", str(copied_world.corpus)]
    assert main(["verify", *files]) == 0
    assert "0 of them wrong" in capsys.readouterr().out
    flip_a_vector(copied_world)
    assert main(["verify", *files]) == 1
    shown = capsys.readouterr().out
    assert "differs" in shown
    assert "2 of them wrong" in shown


def test_an_index_of_words_is_verified_as_well(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_bm25(world.corpus, index_path=tmp_path / "bm25")
    assert main(["verify", "--index_path", str(tmp_path / "bm25"), "--corpus_path", str(world.corpus)]) == 0
    assert "(6 passages)" in capsys.readouterr().out
