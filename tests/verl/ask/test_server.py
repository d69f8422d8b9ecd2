"""The endpoint as programs see it: OpenAI's own client, over a real socket."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.verl.ask.asking import ReadingGenerate
from tests.verl.ask.conftest import serving
from verl.ask.openai_errors import TOO_LONG

GONE = "engine-0 is gone"
QUESTION = "Where was Gilbert Nash born?"


def connect(url: str, *, token: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=60)


def ask(url: str, question: str = QUESTION, *, token: str = "none", **request: Any) -> Any:
    messages: Any = request.pop("messages", [{"role": "user", "content": question}])
    model = request.pop("model", "policy")
    client = connect(url, token=token)
    return client.chat.completions.create(model=model, messages=messages, **request)


def test_an_answer_has_its_trace_and_its_usage(endpoint: str) -> None:
    assert [model.id for model in connect(endpoint).models.list()] == ["policy"]
    done = ask(endpoint)
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Harwick")
    assert (choice.finish_reason, choice.message.search_stop, done.model) == ("stop", "answered", "policy")
    search, answer = choice.message.search_trace
    assert search["calls"][0]["arguments"] == {"query": "Gilbert Nash"}
    assert search["calls"][0]["passages"][0]["id"] == "637"
    assert (answer["kind"], answer["turn"]) == ("answer", 1)
    assert done.usage.completion_tokens == len(search["text"]) + len(answer["text"])
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.prompt_tokens > len(search["calls"][0]["text"])


def test_the_last_message_of_the_user_is_the_question(endpoint: str) -> None:
    parts = [{"type": "text", "text": "Is this"}, {"type": "text", "text": "lost"}]
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Harwick"},
        {"role": "user", "content": parts},
    ]
    (choice,) = ask(endpoint, messages=conversation, extra_body={"max_turns": 1}).choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)
    assert choice.message.search_stop == "budget"
    assert len(choice.message.search_trace) == 2


def test_a_stream_has_each_turn_as_it_happens() -> None:
    generate = ReadingGenerate()
    with serving(generate) as url:
        chunks = ask(url, "Was this slow?", stream=True, stream_options={"include_usage": True})
        seen = [next(chunks) for _ in range(3)]  # the second completion is held
        assert generate.is_held.wait(60)
        deltas = [chunk.choices[0].delta for chunk in seen]
        assert (deltas[0].role, deltas[0].content) == ("assistant", "")
        first, replied = deltas[1].search_trace[0], deltas[2].search_trace[0]
        assert first["calls"][0]["passages"] is None
        assert [passage["id"] for passage in replied["calls"][0]["passages"]] == ["637"]
        generate.is_free.set()
        *rest, last, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == "Harwick"
    assert (last.choices[0].finish_reason, last.choices[0].delta.search_stop) == ("stop", "answered")
    assert {chunk.id for chunk in (*seen, *rest, last, usage)} == {usage.id}
    assert usage.choices == []
    assert usage.usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_client_ends_its_episode(stream: bool) -> None:
    generate = ReadingGenerate()
    with serving(generate) as url:
        body = {"model": "policy", "messages": [{"role": "user", "content": "slow"}], "stream": stream}
        client = httpx.Client()
        request = client.build_request("POST", f"{url}/v1/chat/completions", json=body)
        if stream:
            response = client.send(request, stream=True)
            assert generate.is_held.wait(60)
            response.close()
        else:
            request.extensions["timeout"] = {"connect": 60, "read": 0.5, "write": 60, "pool": 60}
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
        client.close()
        assert generate.is_cancelled.wait(60)


@pytest.mark.parametrize(
    ("request_", "kind", "code", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model_not_found", "'gpt' is not here, expected 'policy'"),
        (
            {"extra_body": {"top_k": 5, "min_p": 0}},
            openai.UnprocessableEntityError, None, "'min_p', 'top_k': not supported",
        ),
        ({"question": "defective"}, openai.InternalServerError, None, "a defect of the server"),
        ({"n": 2}, openai.UnprocessableEntityError, None, "n is not supported here"),
        ({"temperature": 3}, openai.UnprocessableEntityError, None, "temperature: Input should be less than"),
        ({"messages": []}, openai.UnprocessableEntityError, None, "messages: List should have at least 1"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            openai.UnprocessableEntityError, None, "the last message of the user is the question",
        ),
        ({"question": "x" * 3000}, openai.BadRequestError, TOO_LONG, "tokens with its prompt"),
        ({"question": "x" * 60000}, openai.BadRequestError, TOO_LONG, "60000 characters"),
        ({"question": "x" * 2**20}, openai.APIStatusError, "request_too_large", "--max-body-mb"),
        (
            {"messages": [{"role": "user", "content": "a"}] * 1001},
            openai.APIStatusError, "request_too_large", "1001 messages",
        ),
        ({"question": "broken"}, openai.InternalServerError, "episode_failed", GONE),
        ({"question": "unlucky"}, openai.InternalServerError, "episode_failed", GONE),
        ({"question": "broken", "stream": True}, openai.InternalServerError, "episode_failed", GONE),
    ],
)  # fmt: skip
def test_errors_have_openais_shape(
    endpoint: str, request_: dict[str, Any], kind: type[openai.OpenAIError], code: str | None, message: str
) -> None:
    with pytest.raises(kind) as caught:
        ask(endpoint, **request_)
    described = getattr(caught.value, "body", None)
    assert isinstance(described, dict)
    assert set(described) == {"message", "type", "param", "code"}
    assert (described["code"], message in described["message"]) == (code, True), described
    assert "secret" not in described["message"]


def test_a_failure_in_a_stream_is_an_error_of_the_client(endpoint: str) -> None:
    chunks = ask(endpoint, "unlucky", stream=True)
    with pytest.raises(openai.APIError, match="engine-0 is gone"):
        list(chunks)
    with pytest.raises(openai.APIError, match=r"^a defect of the server$"):
        list(ask(endpoint, "defective", stream=True))


def test_a_seed_samples_the_same_again_and_what_concerns_no_answer_is_accepted() -> None:
    generate = ReadingGenerate()
    with serving(generate) as url:
        for seed in (3, 3, 4, None):
            ask(url, seed=seed, user="me", store=False, extra_body={"top_k": None})
    first, again, other, without = (generate.seeds[k : k + 2] for k in (0, 2, 4, 6))
    assert first == again
    assert len({*first, *other, *without}) == 6


def test_other_requests_get_a_status_and_a_reason(endpoint: str) -> None:
    for method, path, body, status in (
        ("POST", "/v1/chat/completions", "{", 422),
        ("GET", "/v1/chat/completions", "", 405),
        ("GET", "/v1/nothing", "", 404),
        ("GET", "/nothing", "", 404),
    ):
        answer = httpx.request(method, endpoint + path, content=body)
        assert answer.status_code == status
        assert ("error" in answer.json()) == path.startswith("/v1/")
    assert httpx.get(f"{endpoint}/readyz").status_code == 200
    assert httpx.get(f"{endpoint}/health").json() == {"status": "healthy", "model": "policy"}
    assert 'ask_requests_total{status="200"}' in httpx.get(f"{endpoint}/metrics").text


def test_another_host_is_answered_only_where_a_token_keeps_web_pages_out(endpoint: str) -> None:
    port = endpoint.rpartition(":")[2]
    for host, status in (
        (f"127.0.0.1:{port}", 200), ("localhost", 200), (f"[::1]:{port}", 200),
        (f"rebound.example:{port}", 403), ("localhost.example", 403), ("127.0.0.1.example:80", 403),
    ):  # fmt: skip
        answer = httpx.get(f"{endpoint}/v1/models", headers={"Host": host})
        assert answer.status_code == status, host
    message = answer.json()["error"]["message"]
    assert all(part in message for part in ("'127.0.0.1.example:80'", "--token-file or ASK_TOKEN", "--host"))
    elsewhere = {"Host": "ask.example", "Authorization": "Bearer s3cret"}
    for options in ({"token": "s3cret"}, {"host": "0.0.0.0"}):
        with serving(ReadingGenerate(), **options) as url:
            assert httpx.get(f"{url}/v1/models", headers=elsewhere).status_code == 200


def test_questions_beyond_the_limit_and_without_the_token_are_refused() -> None:
    generate = ReadingGenerate()
    with serving(generate, token="s3cret", max_questions="1") as url:
        with pytest.raises(openai.AuthenticationError, match="bearer token"):
            ask(url)
        page = httpx.get(url)
        assert page.status_code == 200
        assert "script-src 'sha256-" in page.headers["content-security-policy"]
        held = ask(url, "slow", token="s3cret", stream=True)
        assert generate.is_held.wait(60)
        with pytest.raises(openai.RateLimitError, match="queue is full: 1 of 1 questions") as caught:
            ask(url, token="s3cret")
        assert json.loads(caught.value.response.content)["error"]["code"] == "rate_limit_exceeded"
        generate.is_free.set()
        assert list(held)
