"""Both services, real, one of each for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.running import start_gain_service, start_retriever, stop


@pytest.fixture(scope="session")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = start_retriever(tmp_path_factory.mktemp("retriever"))
    yield url
    stop(process)


@pytest.fixture(scope="session")
def gain_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = start_gain_service(tmp_path_factory.mktemp("gain_service"))
    yield url
    stop(process)
