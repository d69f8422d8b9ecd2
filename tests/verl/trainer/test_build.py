"""The composition root, as far as it goes without models."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.fakes import CharTokenizer, FakeGainService, Reply, ScriptedSearch, ScriptedServer, make_question
from verl.agent.prompts import PACKAGED_FILE
from verl.algorithms.inforeasoner import InfoReasoner
from verl.errors import ConfigError, ServiceError
from verl.run.manifest import MANIFEST_FILE, make_manifest, write_manifest
from verl.trainer.build import connect_services, make_format, make_tools
from verl.trainer.config.schema import Config
from verl.utils.reward_score.IG_client import GainRequest

TOKEN = "geheim-4711"
RETRIEVER_TOKEN = "verborgen-4712"
HEALTHY = Reply('{"status": "healthy", "mode": "single-CPU", "device": "cpu"}')
VERSION = Reply('{"version": "0.1.0", "generator_digest": "abc"}')
NO_ITEMS = Reply('{"scores": [], "errors": [], "details": null}')
FOUND_NOTHING = Reply('{"result": [[]]}')
INDEX = Reply('{"index_sha256": "abc"}')
REQUEST = GainRequest(question="Where?", context="There.", golds=("Bolton",))


def make_config(retriever: ScriptedServer, service: ScriptedServer | FakeGainService) -> Config:
    config = Config()
    config.retriever.url = f"{retriever.url}/retrieve"
    config.reward.semantic.url = service.url
    config.reward.semantic.timeout_s = 2.0
    config.trainer.service_wait_s = 2.0
    return config


async def test_the_token_reaches_the_service_and_no_file_or_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv("IG_TOKEN", TOKEN)
    monkeypatch.setenv("RETRIEVER_TOKEN", RETRIEVER_TOKEN)
    retriever, service = (
        ScriptedServer([FOUND_NOTHING, INDEX]),
        ScriptedServer([NO_ITEMS, HEALTHY, VERSION, NO_ITEMS]),
    )
    async with retriever.running(), service.running(), AsyncExitStack() as stack:
        config = make_config(retriever, service)
        _, gains, services = await connect_services(config, stack, needs=InfoReasoner.needs)
        assert gains is not None
        await gains.submit(REQUEST)
    assert [headers["authorization"] for _, headers, _ in service.requests] == [f"Bearer {TOKEN}"] * 4
    assert [headers["authorization"] for _, headers, _ in retriever.requests] == [
        f"Bearer {RETRIEVER_TOKEN}"
    ] * 2
    write_manifest(tmp_path, make_manifest(config, services=services, prompt=make_question().text))
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert manifest["services"]["ig_service"]["health"]["mode"] == "single-CPU"
    assert manifest["services"]["ig_service"]["version"]["generator_digest"] == "abc"
    assert manifest["services"]["retriever"]["version"]["index_sha256"] == "abc"
    told = (tmp_path / MANIFEST_FILE).read_text() + caplog.text
    assert TOKEN not in told
    assert RETRIEVER_TOKEN not in told


async def test_a_wrong_token_is_noticed_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IG_TOKEN", TOKEN)
    retriever, service = ScriptedServer([FOUND_NOTHING]), ScriptedServer([Reply("{}", 401)])
    async with retriever.running(), service.running(), AsyncExitStack() as stack:
        with pytest.raises(ServiceError, match=r"401.*not its token") as caught:
            await connect_services(make_config(retriever, service), stack, needs=InfoReasoner.needs)
    assert TOKEN not in str(caught.value)


def test_importing_it_loads_neither_matplotlib_nor_jinja2() -> None:
    code = "import sys, verl.trainer.build; print({'matplotlib', 'jinja2'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_instruction_that_does_not_show_how_to_answer_is_refused(tmp_path: Path) -> None:
    config = Config()
    tools = make_tools(config, ScriptedSearch())
    tokenizer = CharTokenizer()
    assert make_format(config, tokenizer=tokenizer, tools=tools).stop_strings
    texts = PACKAGED_FILE.read_text().replace("<answer>", "<result>")
    (tmp_path / "prompts.yaml").write_text(texts)
    config.data.prompt_file = str(tmp_path / "prompts.yaml")
    with pytest.raises(ConfigError, match=r"prompts\.yaml': the instruction of search_r1 never says to"):
        make_format(config, tokenizer=tokenizer, tools=tools)
