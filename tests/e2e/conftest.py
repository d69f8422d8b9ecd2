"""Both services, real, one of each for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.running import running_service

RETRIEVER = ("search_r1.search.retrieval_server",)
GAIN_SERVICE = ("IG.service.IG_server", "--num-generations", "4", "--max-new-tokens", "8")


@pytest.fixture(scope="session")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service(*RETRIEVER, folder=tmp_path_factory.mktemp("retriever")) as (_, url):
        yield url


@pytest.fixture(scope="session")
def gain_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service(*GAIN_SERVICE, folder=tmp_path_factory.mktemp("gain_service")) as (_, url):
        yield url
