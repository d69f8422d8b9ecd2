"""The page in a real browser: an episode as it happens, stopped, failed, hostile, and behind a token."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.verl.ask.asking import CHARS, ReadingGenerate
from tests.verl.ask.conftest import serving
from verl.ask.gains import GainMeter
from verl.errors import RolloutError
from verl.types import FloatArray, IntArray

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURE = os.environ.get("ASK_PICTURE")
"""A file that a screenshot of an episode is written to, if it is set."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    with sync_playwright() as playwright:
        expect.set_options(timeout=120_000)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which every error of a script or of its policy fails the test."""
    page = browser.new_page(viewport={"width": 900, "height": 760})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if "Security Policy" in said.text else None)
    yield page
    page.close()
    assert problems == []


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")


def test_an_episode_is_shown_as_it_happens(page: Page) -> None:
    generate = ReadingGenerate()
    with serving(generate) as url:
        page.goto(url)
        expect(page.locator("#model")).to_have_text("policy")
        ask(page, "Was this slow?")
        expect(page.locator(".call")).to_contain_text("Gilbert Nash")
        expect(page.locator(".found li")).to_contain_text("The birthplace is Harwick <b>&</b>.")  # no markup
        expect(page.locator(".waiting")).to_be_visible()
        expect(page.locator(".answer")).to_have_count(0)
        assert generate.is_held.wait(60)
        generate.is_free.set()
        expect(page.locator("p.answer")).to_have_text("Harwick")
        expect(page.get_by_role("status")).to_have_text("Answer: Harwick")
        expect(page.locator(".waiting")).to_have_count(0)
        ask(page, "Is this lost?")
        end = page.locator("article").first.locator(".failure")
        expect(end).to_contain_text("No answer within its turns")
        expect(page.locator("article h2").first).to_have_text("Is this lost?")
        ask(page, "Is this empty?")
        latest = page.locator("article").first
        expect(latest.locator("p.answer")).to_have_text("(an empty answer)")
        expect(latest.locator(".failure")).to_have_count(0)


def test_stop_ends_the_episode_and_failures_are_named(page: Page) -> None:
    generate = ReadingGenerate()
    with serving(generate) as url:
        page.goto(url)
        ask(page, "Was this slow?")
        assert generate.is_held.wait(60)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("article .failure")).to_have_text("Stopped.")
        assert generate.is_cancelled.wait(60)
        ask(page, "<img src=x onerror=alert(1)> broken?")
        first = page.locator("article").first
        expect(first.locator(".failure")).to_contain_text("engine-0 is gone")
        expect(first.locator("h2")).to_contain_text("<img src=x")
        assert page.locator("img").count() == 0


def test_the_answer_is_shown_before_its_gains_and_why_there_are_none(page: Page) -> None:
    is_free = threading.Event()

    async def fail(_: IntArray) -> FloatArray:
        await asyncio.to_thread(is_free.wait, 60)
        raise RolloutError("engine-0 is gone: https://user:secret@host/")

    with serving(ReadingGenerate(), meter=GainMeter.by_log_prob(fail, codec=CHARS, wrapper="auto")) as url:
        page.goto(url)
        ask(page, "Where?")
        expect(page.locator("p.answer")).to_have_text("Harwick")
        expect(page.locator(".waiting")).to_contain_text("gains are measured after the answer")
        is_free.set()
        expect(page.locator("article")).to_contain_text("not measured: gain_failed: engine-0 is gone")
        expect(page.locator(".gain")).to_have_count(0)
        assert "secret" not in page.content()


def test_the_page_asks_for_the_token(page: Page) -> None:
    with serving(ReadingGenerate(), token="s3cret") as url:
        page.goto(url)
        page.get_by_label("This server asks for its token").fill("s3cret")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#model")).to_have_text("policy")
        ask(page, "Where?")
        expect(page.locator("p.answer")).to_have_text("Harwick")
        expect(page.locator("#login")).to_be_hidden()
        if PICTURE is not None:
            page.screenshot(path=Path(PICTURE))
