"""One list of cases for every retriever: see conformance.py for what they must do, subjects.py for who."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

pytest.register_assert_rewrite("tests.search_r1.search.conformance")

from tests.search_r1.search.conformance import CASES, LIFE_CASES, Case, LifeCase, Open, Subject  # noqa: E402
from tests.search_r1.search.subjects import BACK_ENDS, Files, open_remote  # noqa: E402

pytestmark = pytest.mark.asyncio(loop_scope="module")

REMOTE = "behind the server: "
QUICKLY_SERVED = ("bm25",)
"""The others take the same way through server and client."""
NAMES = [
    *BACK_ENDS,
    *(
        pytest.param(REMOTE + name, marks=() if name in QUICKLY_SERVED else pytest.mark.slow)
        for name in BACK_ENDS
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("conformance"))


def open_named(files: Files, name: str) -> Open:
    if name.startswith(REMOTE):
        return partial(open_remote, files, name=name.removeprefix(REMOTE))
    return partial(BACK_ENDS[name], files)


# First, while no other subject is open.
@pytest.mark.parametrize("case", LIFE_CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", [*BACK_ENDS, *(REMOTE + name for name in QUICKLY_SERVED)])
async def test_at_the_end(files: Files, name: str, case: LifeCase) -> None:
    await case(open_named(files, name))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=NAMES)
async def subject(request: pytest.FixtureRequest, files: Files) -> AsyncIterator[Subject]:
    async with open_named(files, request.param)() as subject:
        yield subject


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_while_open(subject: Subject, case: Case) -> None:
    await case(subject)
