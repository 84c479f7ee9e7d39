"""The Python client on real servers: ours, and scripted ones for what ours does not do on demand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client_streams import AT_ONCE, both, step, texts
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import STALL, plain, scripted, self_signed, stream
from serving_processes import Serving, eventually

from agent.arithmetic_model import answer
from client import AsyncMindsporeInferenceClient, MindsporeInferenceClient
from client.answers import AnswerLines, Lines, Response, StreamResponse, Token
from client.client_errors import (
    BrokenAnswer,
    ClientError,
    GenerationError,
    InvalidRequest,
    NoConnection,
    NotAuthorized,
    NotFound,
    NotServing,
    Overloaded,
    TimedOut,
)
from client.http_session import Session
from client.patience import Retries, Timeouts
from client.remote_server import Server
from client.server_status import read_status
from config.free_ports import free_ports


@pytest.mark.parametrize("prompt", ["hi", "你好,世界 🙂"])
def test_an_answer_whole_and_as_it_comes(standin: Serving, prompt: str) -> None:
    with MindsporeInferenceClient(model_type="llama2", server_url=f"{standin.url}/") as client:
        expected = Response(answer(prompt, 300))
        assert client.generate(prompt) == expected
        *steps, last = client.generate_stream(prompt, do_sample=False)
        assert texts(steps) == expected.generated_text
        assert last == StreamResponse(generated_text=expected.generated_text)
        assert texts(list(client.generate_stream(prompt, return_full_text=False))) == expected.generated_text


def test_the_same_for_asyncio(standin: Serving) -> None:
    async def ask() -> tuple[Response, list[StreamResponse]]:
        async with AsyncMindsporeInferenceClient("llama2", standin.url) as client:
            return await client.generate("hi"), [one async for one in client.generate_stream("hi")]

    whole, steps = asyncio.run(ask())
    assert texts(steps) == whole.generated_text == steps[-1].generated_text == answer("hi", 300)


def test_parameters_and_details_arrive(standin: Serving) -> None:
    with MindsporeInferenceClient("llama2", standin.url) as client:
        sampled = {
            "do_sample": True,
            "temperature": 1.5,
            "top_k": 0,
            "seed": 7,
            "max_new_tokens": 9,
            "ignore_eos": True,
        }
        found = client.generate("hi", details=True, top_n_tokens=2, decoder_input_details=True, **sampled)
        assert found.details is not None
        assert (found.details.finish_reason, found.details.generated_tokens, found.details.seed) == ("length", 9, 7)
        assert [len(best) for best in found.details.top_tokens] == [2] * 9
        assert [token.logprob is None for token in found.details.prefill] == [True, False, False]
        *_, last = client.generate_stream("hi", details=True, **sampled)
        assert last.generated_text == found.generated_text
        assert last.details is not None
        assert last.details.tokens == found.details.tokens


@both
def test_a_refusal_has_its_type_status_and_field(standin: Serving, streamed: Callable[..., None]) -> None:
    with pytest.raises(InvalidRequest, match="temperature") as caught:
        streamed(standin.url, do_sample=True, temperature=-1.0)
    assert (caught.value.status, caught.value.field) == (422, "temperature")
    assert caught.value.request_id
    with pytest.raises(InvalidRequest, match="max_tokens: is not a field"):
        streamed(standin.url, max_tokens=5)
    with pytest.raises(NotFound, match="llama2, internlm"):
        streamed(standin.url, name="gpt 4?")
    with pytest.raises(NoConnection, match="Connection refused"):
        streamed(f"http://127.0.0.1:{free_ports(1)[0]}", retries=Retries(times=1, first_wait=0.0))


@pytest.mark.parametrize(
    ("status", "body", "kind", "field"),
    [
        (401, '{"error": {"message": "no key", "param": null, "type": "x", "code": "y"}}', NotAuthorized, None),
        (400, '{"error": {"message": "bad", "param": "seed"}}', InvalidRequest, "seed"),
        (424, '{"error": "failed", "error_type": "generation"}', GenerationError, None),
        (500, "<h1>Sorry</h1>", GenerationError, None),
        (302, "", BrokenAnswer, None),
        (413, "[1]", InvalidRequest, None),
    ],
)
def test_errors_of_every_protocol_are_read(status: int, body: str, kind: type[ClientError], field: str | None) -> None:
    with scripted(plain(status, body)) as server, MindsporeInferenceClient("m", server.url) as client:
        with pytest.raises(kind) as caught:
            client.generate("hi")
        assert (caught.value.status, caught.value.field) == (status, field)
        assert caught.value.message
        assert len(server.requests) == 1


@both
@pytest.mark.parametrize(("status", "kind"), [(429, Overloaded), (503, NotServing)])
def test_what_is_refused_for_the_moment_is_asked_again(
    streamed: Callable[..., None], status: int, kind: type[ClientError]
) -> None:
    seen: list[StreamResponse] = []
    refused = plain(status, '{"error": "later", "field": null}', "Retry-After: 0")
    with scripted(refused, refused, stream(step("a"), {"generated_text": "a"})) as server:
        streamed(server.url, seen=seen, retries=AT_ONCE)
        assert texts(seen) == "a"
        assert len(server.requests) == 3
        assert server.requests[0] == server.requests[2]
    with scripted(refused) as server:
        with pytest.raises(kind):
            streamed(server.url, retries=Retries(times=2, first_wait=0.0))
        assert len(server.requests) == 3
    with scripted(plain(status, '{"error": "later"}', "Retry-After: 60")) as server:
        with pytest.raises(kind) as caught:
            streamed(server.url)
        assert caught.value.retry_after == 60  # type: ignore[attr-defined]
        assert len(server.requests) == 1


@both
@pytest.mark.parametrize(
    ("script", "kind", "text"),
    [
        (stream(step("a"), end=b""), BrokenAnswer, "a"),
        (stream(step("a")), BrokenAnswer, "a"),
        (stream(end=b""), BrokenAnswer, ""),
        (stream(step("a"), {"error": "the agents are gone"}), GenerationError, "a"),
        (stream(step("a"), {"error": {"message": "the agents are gone"}}), GenerationError, "a"),
        (stream(step("a"), "no JSON"), BrokenAnswer, "a"),
        (stream({"token": "a"}), BrokenAnswer, ""),
        ([b"HTTP/1.1 200 OK\r\n"], BrokenAnswer, ""),
    ],
    ids=["broken off", "no whole text", "nothing", "error", "error object", "no JSON", "other JSON", "no head"],
)
def test_an_answer_that_has_begun_is_not_asked_for_again(
    streamed: Callable[..., None], script: list[bytes], kind: type[ClientError], text: str
) -> None:
    seen: list[StreamResponse] = []
    with scripted(script) as server:
        with pytest.raises(kind):
            streamed(server.url, seen=seen, retries=AT_ONCE)
        assert texts(seen) == text
        assert len(server.requests) == 1


def test_a_stream_that_is_closed_frees_its_request(slow_standin: Serving) -> None:
    looking = Session(Server(slow_standin.url))

    def running() -> float:
        return read_status(looking).models["llama2"]["num_requests_running"]

    with contextlib.closing(looking):
        leave_blocking(slow_standin.url, running)
        asyncio.run(leave_asyncio(slow_standin.url, running))


def leave_blocking(url: str, running: Callable[[], float]) -> None:
    with MindsporeInferenceClient("llama2", url) as client:
        for _ in client.generate_stream("hi", ignore_eos=True, max_new_tokens=4000):
            assert running() == 1
            break
        eventually(lambda: running() == 0)


async def leave_asyncio(url: str, running: Callable[[], float]) -> None:
    async with AsyncMindsporeInferenceClient("llama2", url) as client:
        async with contextlib.aclosing(client.generate_stream("hi", ignore_eos=True, max_new_tokens=4000)) as steps:
            await anext(steps)
            assert running() == 1
        eventually(lambda: running() == 0)


def test_a_task_can_be_cancelled_at_any_moment(standin: Serving) -> None:
    """Also when a token has just come, which waiting with a limit must not take for the answer to the cancellation."""
    asyncio.run(cancel_often(standin.url))


async def cancel_often(url: str) -> None:
    async with AsyncMindsporeInferenceClient("llama2", url) as client:

        async def listen() -> None:
            async for _ in client.generate_stream("hi", ignore_eos=True, max_new_tokens=2000):
                pass

        for moment in range(60):
            task = asyncio.create_task(listen())
            asyncio.get_running_loop().call_later(0.03 + moment * 1e-3, task.cancel)
            await asyncio.wait({task}, timeout=60)
            assert task.cancelled(), f"cancelled after {30 + moment} ms"


def test_the_key_goes_along_and_is_not_shown() -> None:
    with scripted(plain(200, '{"generated_text": "a"}')) as server:
        with MindsporeInferenceClient("m", server.url, token="secret-1") as client:
            assert client.generate("hi", stop=["x"]).generated_text == "a"
        [request] = server.requests
        assert request.headers["authorization"] == "Bearer secret-1"
        assert request.body == {"inputs": "hi", "parameters": {"stop": ["x"], "return_protocol": "lines"}}
    assert "secret-1" not in repr(Server("http://test", "secret-1"))


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("127.0.0.1:9811", None),
        ("ftp://test", None),
        ("http://test:x", None),
        ("http://test", "a\nb"),
        ("http://test\n", None),
        ("http://" + "a" * 64, None),
        ("http://test/?a", None),
    ],
)
def test_what_cannot_be_used_is_said_at_once(url: str, key: str | None) -> None:
    with pytest.raises(ValueError, match=r"URL|ASCII|[Pp]ort"):
        MindsporeInferenceClient("m", url, key)


@pytest.mark.parametrize("name", ["", "  ", "a/b", "..", "llama2\n", "\ud800"])
def test_what_can_be_no_served_name_is_refused_at_once(name: str) -> None:
    for kind in (MindsporeInferenceClient, AsyncMindsporeInferenceClient):
        with pytest.raises(ValueError, match="is no served name, such as 'llama2'"):
            kind(name, "http://127.0.0.1:1")


@both
@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"stop": ["a", "b\ud83d"]}, "stop[1]", "lone surrogate"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"top_p": float("-inf")}, "top_p", "finite"),
        ({"stop": {"a"}}, "stop", "of type set"),
        ({"seed": 10**5000}, None, "digits"),
    ],
)
def test_what_no_json_can_hold_is_refused_before_it_is_sent(
    streamed: Callable[..., None], given: dict[str, Any], field: str | None, words: str
) -> None:
    with scripted(stream(step("a"))) as server:
        with pytest.raises(InvalidRequest, match=words) as caught:
            streamed(server.url, **given)
        assert (caught.value.field, caught.value.status, server.requests) == (field, None, [])
        with (
            MindsporeInferenceClient("m", server.url) as client,
            pytest.raises(InvalidRequest, match=r"^inputs: has a lone surrogate, '\\udcff', at character 1"),
        ):
            client.generate("a\udcff")
        assert server.requests == []


@both
def test_certificates_are_checked(streamed: Callable[..., None], tmp_path: Path) -> None:
    certificate, context = self_signed(tmp_path)
    seen: list[StreamResponse] = []
    with scripted(stream(step("a"), {"generated_text": "a"}), stream(step("a"), end=STALL), context=context) as server:
        streamed(server.url, seen=seen, ca=certificate)
        assert texts(seen) == "a"
        with pytest.raises(TimedOut):
            streamed(server.url, ca=certificate, timeout=Timeouts(between_tokens=0.05))
        with pytest.raises(NoConnection, match=r"(?i)certificate") as caught:
            streamed(server.url, retries=Retries(first_wait=60.0))  # is not tried again
        assert caught.value.lasting  # type: ignore[attr-defined]


@given(text=st.text(st.characters(exclude_categories=["Cs"])), cuts=st.lists(st.integers(0, 300), max_size=9))
def test_a_stream_is_read_however_it_is_cut_and_whatever_its_characters(text: str, cuts: list[int]) -> None:
    lines = [step(f"\u2028\x85{text}"), {"generated_text": text}]
    raw = b": ping\n\n" + b"".join(part.split(b"\r\n")[1] for part in stream(*lines)[1:-1]) + b"data: [DONE]\n\n"
    places = sorted({0, *(cut for cut in cuts if cut < len(raw)), len(raw)})
    reader = AnswerLines(whole=True)
    found = [one for a, b in itertools.pairwise(places) for one in reader.feed(raw[a:b])]
    reader.end()
    assert found == [StreamResponse(token=Token(f"\u2028\x85{text}", 1)), StreamResponse(generated_text=text)]


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.answers.MAX_LINE_BYTES", 10)
    reader = Lines(StreamResponse)
    assert reader.feed(b"data: {}\n" + b"x" * 10) == [StreamResponse()]
    with pytest.raises(BrokenAnswer, match="longer"):
        reader.feed(b"x")


def test_threads_share_a_session(standin: Serving) -> None:
    with MindsporeInferenceClient("llama2", standin.url) as client, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: client.generate("hi", max_new_tokens=i).generated_text, range(1, 9)))
    assert found == [answer("hi", i).encode()[:i].decode(errors="replace") for i in range(1, 9)]
