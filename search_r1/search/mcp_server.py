"""Give a retriever to other programs as tools of the Model Context Protocol.

    python -m search_r1.search.mcp_server                                   # the embedded world, over stdio
    python -m search_r1.search.mcp_server --retriever_url http://127.0.0.1:8000      # of a running server
    python -m search_r1.search.mcp_server --transport http --port 8410      # http://127.0.0.1:8410/mcp
    python -m search_r1.search.mcp_server --tool-description                # the tool, for OpenAI's `tools`

Without --retriever_url it opens a retriever itself, by the flags of the retrieval server. A client waits
while it loads: for a large index start the retrieval server, and name its URL. Over HTTP it listens on
loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

from search_r1.search.assemble import open_retriever
from search_r1.search.errors import RetrieverError
from search_r1.search.remote import RemoteRetriever
from search_r1.search.retriever import Retriever, SearchFailure
from search_r1.search.schema import MAX_QUERY_CHARS, MAX_TOPK
from search_r1.search.settings import add_retriever_arguments, resolve_retriever
from serving.encoding import replace_surrogates
from serving.http import CallError
from serving.logs import configure_logging
from serving.redaction import redact_text
from serving.web.server import exit_now, listen, serve_on, url_of
from serving.web.settings import expand_home
from serving.web.version import package_version

logger = logging.getLogger("search_r1.search.mcp_server")

HOST = "127.0.0.1"
_TOKEN_VARIABLE = "RETRIEVER_TOKEN"
_INSTRUCTIONS = "Search a fixed collection of passages. It is not the web: what it lacks cannot be found."


class FoundPassage(BaseModel):
    """A passage that fits the query."""

    id: str
    title: str
    text: str
    score: float | None = Field(description="Higher is better, on a scale that depends on the retriever.")


class SearchResult(BaseModel):
    """Passages, best first; none when nothing was found."""

    passages: list[FoundPassage]


class RetrieverFacts(BaseModel):
    """What the passages depend on."""

    passages: int | None = Field(description="Number of passages in the collection; null when it is unknown.")
    retriever: dict[str, Any] | None = Field(
        description="Names, hashes and parameters of index and encoder; null when they are unknown."
    )


def make_server(retriever: Retriever | RemoteRetriever, *, topk: int, timeout_s: float) -> MCPServer[Any]:
    """Return a server with the tools `search` and `describe`; `topk` is for calls that name no number."""
    server = MCPServer[Any](
        name="retriever", instructions=_INSTRUCTIONS, version=package_version(), log_level="WARNING"
    )

    @server.tool(description="Search for passages that help to answer a question; returns the best ones.")
    async def search(
        query: Annotated[str, Field(max_length=MAX_QUERY_CHARS, description="What to search for.")],
        topk: Annotated[int, Field(ge=1, le=MAX_TOPK, description="Most passages to return.")] = topk,
    ) -> SearchResult:
        text = replace_surrogates(query)  # no encoder reads lone surrogates
        try:
            (outcome,) = await retriever.search([text], topk=topk, timeout_s=timeout_s)
        except RetrieverError as error:
            raise ToolError(redact_text(str(error))) from error
        if isinstance(outcome, SearchFailure):
            raise ToolError(f"{outcome.kind}: {redact_text(outcome.reason)}")
        return SearchResult(
            passages=[
                FoundPassage(
                    id=hit.document.id,
                    title=hit.document.title,
                    text=hit.document.text,
                    score=hit.score if math.isfinite(hit.score) else None,
                )
                for hit in outcome
            ]
        )

    @server.tool(description="Tell what the passages depend on: their number, the index, the encoder.")
    async def describe() -> RetrieverFacts:
        if not isinstance(retriever, RemoteRetriever):
            return RetrieverFacts(passages=retriever.num_passages, retriever=dict(retriever.describe()))
        try:
            facts = await retriever.fetch_description(timeout_s=timeout_s) or {}
        except CallError as error:
            raise ToolError(redact_text(str(error))) from error
        return RetrieverFacts.model_validate({"passages": None, "retriever": None} | facts)

    return server


async def describe_tool(*, topk: int) -> dict[str, Any]:
    """Return the tool `search` as an entry of `tools` in requests of OpenAI's API."""
    server = make_server(RemoteRetriever(f"http://{HOST}"), topk=topk, timeout_s=1.0)
    (tool,) = [tool for tool in await server.list_tools() if tool.name == "search"]
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
    }


async def serve(options: argparse.Namespace) -> int:
    """Serve until the client closes stdin, or until a signal; return the exit status.

    Raises RetrieverError, ValueError, and OSError for a port that cannot be taken.
    """
    retriever: Retriever | RemoteRetriever
    listener = listen(HOST, options.port) if options.transport == "http" else None
    if options.retriever_url:
        retriever = RemoteRetriever(options.retriever_url, token=os.environ.get(_TOKEN_VARIABLE) or None)
    else:
        retriever = await open_retriever(resolve_retriever(options))
    try:
        server = make_server(retriever, topk=options.topk, timeout_s=options.timeout_s)
        if listener is None:
            return await _serve_stdio(server)
        logger.info("ready: %s/mcp", url_of(HOST, listener.getsockname()[1]))
        await serve_on(listener, server.streamable_http_app(host=HOST))
        return 0
    finally:
        await retriever.aclose()


async def _serve_stdio(server: MCPServer[Any]) -> int:
    """Serve until the client closes stdin, or until SIGINT or SIGTERM; return the exit status.

    After a signal a thread still waits for a line of stdin, which cannot be interrupted.
    """
    loop = asyncio.get_running_loop()
    stopped: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.put_nowait, 128 + number)
    serving, stopping = asyncio.create_task(server.run_stdio_async()), asyncio.create_task(stopped.get())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        return stopping.result()
    stopping.cancel()
    await serving
    return 0


async def _run(options: argparse.Namespace) -> int:
    """Serve; end the process at once after a signal over stdio."""
    status = await serve(options)
    if status:
        exit_now(status)
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.search.mcp_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--retriever_url", metavar="URL", help="of a running retrieval server")
    parser.add_argument("--transport", choices=("stdio", "http"), default="stdio")
    parser.add_argument(
        "--port", type=int, default=8410, help="with --transport http (default 8410); 0 takes a free one"
    )
    parser.add_argument(
        "--topk", type=int, default=3, help="passages where a call names no number (default 3)"
    )
    parser.add_argument("--timeout_s", type=float, default=30.0, help="of a search (default 30)")
    parser.add_argument("--tool-description", action="store_true", help="print the tool as JSON and end")
    add_retriever_arguments(parser)
    options = parser.parse_args(expand_home(arguments))
    if not 1 <= options.topk <= MAX_TOPK:
        parser.error(f"--topk must be from 1 to {MAX_TOPK}, got {options.topk}")
    if not 0 <= options.port <= 65535:
        parser.error(f"--port must be from 0 to 65535, got {options.port}")
    if not options.timeout_s > 0:
        parser.error(f"--timeout_s must be greater than 0, got {options.timeout_s}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or print the description; return the exit status."""
    options = parse(arguments)
    # stdout belongs to the protocol.
    configure_logging(
        "%(asctime)s retriever %(levelname)s %(message)s",
        quiet=(
            "mcp",
            "uvicorn",
            "uvicorn.error",
            "uvicorn.access",
            "httpx",
            "faiss.loader",
            "sentence_transformers",
        ),
    )
    try:
        if options.tool_description:
            sys.stdout.write(json.dumps(asyncio.run(describe_tool(topk=options.topk)), indent=2) + "\n")
        else:
            return asyncio.run(_run(options))
    except (RetrieverError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
