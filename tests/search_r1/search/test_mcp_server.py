"""The retriever as tools of the Model Context Protocol, called by the protocol's own client."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from search_r1.search.mcp_server import main
from tests.fakes import AnsweringServer, Reply
from tests.processes import free_port, wait_for

COMMAND = [sys.executable, "-m", "search_r1.search.mcp_server"]
FOUND = {"document": {"id": "7", "contents": '"Bolton"\nBolton is a town.'}, "score": 0.5}


def connect(*flags: str) -> AbstractAsyncContextManager[Client]:
    return Client(StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], *flags]))


def answer(body: dict[str, Any]) -> Reply:
    """Find Bolton, nothing for `nothing`, and fail on `broken`."""
    (query,) = body["queries"]
    if query == "broken":
        error = {"kind": "quota", "reason": "key=abcdefghijklmnop is used up"}
        return Reply(json.dumps({"result": [None], "errors": [error]}))
    found = [] if query == "nothing" else [FOUND] * body["topk"]
    return Reply(json.dumps({"result": [found], "errors": [None]}))


async def call(client: Client, tool: str, **arguments: object) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert isinstance(result.structured_content, dict)
    return result.structured_content


async def test_a_running_retriever_over_stdio() -> None:
    async with AnsweringServer(answer).running() as server, connect("--retriever_url", server.url) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search", "describe"}
        assert tools["search"].output_schema is not None
        found = await call(client, "search", query="bolton", topk=2)
        passage = {"id": "7", "title": '"Bolton"', "text": "Bolton is a town.", "score": 0.5}
        assert found == {"passages": [passage] * 2}
        assert len((await call(client, "search", query="bolton"))["passages"]) == 3
        assert await call(client, "search", query="nothing") == {"passages": []}
        for arguments, message in (
            ({"query": "broken"}, "quota: "),
            ({"query": "bolton", "topk": 0}, "topk"),
            ({"query": "x" * 20_001}, "query"),
        ):
            failed = await client.call_tool("search", arguments)
            assert failed.is_error
            assert message in failed.content[0].text
            assert "abcdefghijklmnop" not in failed.content[0].text


@pytest.mark.slow
async def test_the_embedded_world_over_stdio() -> None:
    async with connect() as client:
        found = await call(client, "search", query="birthplace of Gilbert Nash", topk=1)
        assert found["passages"][0]["text"].startswith("The birthplace of Gilbert Nash is Harwick")
        facts = await call(client, "describe")
        assert facts["passages"] == 2580
        assert facts["retriever"]["corpus_sha256"]


async def test_over_http_on_loopback() -> None:
    port = free_port()
    async with AnsweringServer(answer).running() as server:
        flags = ["--transport", "http", "--port", str(port), "--retriever_url", server.url]
        process = subprocess.Popen([*COMMAND, *flags])
        try:
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, trust_env=False) as probe:
                wait_for(probe, "/", 404)  # it listens
            async with Client(f"{url}/mcp") as client:
                assert (await call(client, "search", query="bolton", topk=1))["passages"][0]["id"] == "7"
        finally:
            process.terminate()
            process.wait()


def test_a_taken_port_is_named_before_anything_is_ready(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--transport", "http", "--port", str(taken.getsockname()[1])]) == 1
    (line,) = caplog.messages
    assert ("cannot listen" in line, line.endswith("another with --port")) == (True, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_over_stdio(number: signal.Signals) -> None:
    flags = ["--retriever_url", "http://127.0.0.1:9"]
    with subprocess.Popen([*COMMAND, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # The answer shows that it serves.
        process.stdin.write(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(number)
        assert process.wait() == 128 + number


def test_the_description_is_a_tool_of_openais_api(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tool-description", "--topk", "5"]) == 0
    tool = json.loads(capsys.readouterr().out)
    assert (tool["type"], tool["function"]["name"]) == ("function", "search")
    parameters = tool["function"]["parameters"]
    assert (parameters["required"], parameters["properties"]["topk"]["default"]) == (["query"], 5)
    assert parameters["properties"]["query"]["description"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retriever_url", "ftp://x"], "URL"),
        (["--corpus_path", "/nowhere"], "--corpus_path /nowhere is not a file"),
    ],
)
def test_what_is_not_there_ends_it_with_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(flags) == 1
    (line,) = caplog.messages
    assert message in line
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topk", "0"], "--topk must be from 1"),
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
    ],
)
def test_wrong_settings_end_it_with_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err.splitlines()[-1]
