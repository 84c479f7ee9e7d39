"""How long the Python client waits for what, how often it tries, and how its waiting ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from client_streams import both, step, texts
from scripted_server import PAUSE, PAUSE_SECONDS, STALL, scripted, stream

from client import AsyncMindsporeInferenceClient, MindsporeInferenceClient
from client.answers import StreamResponse
from client.client_errors import (
    BrokenAnswer,
    ClientClosed,
    ClientError,
    GenerationError,
    InvalidRequest,
    NoConnection,
    Overloaded,
    TimedOut,
)
from client.http_call import Call
from client.patience import Retries, Timeouts
from client.remote_server import Server


@both
@pytest.mark.parametrize(
    ("timeouts", "script", "text", "named"),
    [
        (
            Timeouts(first_token=0.05),
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", STALL],
            "",
            "first_token",
        ),
        (Timeouts(first_token=0.05), [STALL], "", "first_token"),
        (Timeouts(first_token=0.05), [*stream(end=STALL)], "", "first_token"),
        (Timeouts(between_tokens=0.05), [*stream(step("a"), end=STALL)], "a", "between_tokens"),
        (Timeouts(first_token=30.0, between_tokens=0.05), [*stream(step("a"), end=STALL)], "a", "between_tokens"),
    ],
    ids=["first", "head", "head alone", "between", "both"],
)
def test_a_server_that_stalls_is_given_up(
    streamed: Callable[..., None], timeouts: Timeouts, script: list[bytes], text: str, named: str
) -> None:
    seen: list[StreamResponse] = []
    with scripted(script) as server:
        with pytest.raises(TimedOut, match=rf"^{server.url} sent .* 0\.05 seconds.* timeout \({named}\)"):
            streamed(server.url, seen=seen, timeout=timeouts)
        assert texts(seen) == text
        assert server.left.wait(20)
        assert len(server.requests) == 1


@both
def test_a_pause_between_tokens_may_be_longer_than_the_wait_for_the_first(streamed: Callable[..., None]) -> None:
    seen: list[StreamResponse] = []
    with scripted(stream(step("a"), PAUSE, step("b"), {"generated_text": "ab"})) as server:
        streamed(server.url, seen=seen, timeout=Timeouts(first_token=PAUSE_SECONDS / 2))
    assert texts(seen) == "ab"


@both
def test_what_is_no_token_puts_no_end_of_patience_off(streamed: Callable[..., None]) -> None:
    comments = [part for _ in range(100) for part in (b"7\r\n: ping\n\r\n", PAUSE)]
    with scripted([*stream(end=b""), *comments]) as server:
        begin = time.monotonic()
        with pytest.raises(TimedOut, match="first_token"):
            streamed(server.url, timeout=Timeouts(first_token=2 * PAUSE_SECONDS))
        assert time.monotonic() - begin < 50 * PAUSE_SECONDS


@both
def test_a_server_that_takes_no_connection_is_named_with_the_time_it_had(streamed: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        port = listener.getsockname()[1]
        for _ in range(2):  # they fill its queue, and it takes none of them out
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        words = rf"no connection to http://127.0.0.1:{port} within 0\.2 seconds; see that .* \(connect\)"
        with pytest.raises(NoConnection, match=words):
            streamed(f"http://127.0.0.1:{port}", timeout=Timeouts(connect=0.2), retries=Retries(times=0))


@pytest.mark.parametrize("error", [httpx.ConnectTimeout("timed out"), httpx.ReadTimeout("timed out")])
def test_who_waits_for_ever_is_told_when_the_system_gives_up(error: httpx.TimeoutException) -> None:
    call = Call(Server("http://127.0.0.1:1", timeouts=Timeouts.all(None)), "/", None, "answer")
    with (
        pytest.raises(ClientError, match="the time that the system gives it; ") as caught,
        call.errors(threading.Event()),
    ):
        raise error
    assert "longer timeout" not in caught.value.message


def test_an_answer_in_one_piece_has_its_own_time() -> None:
    with (
        scripted([STALL]) as server,
        MindsporeInferenceClient("m", server.url, timeout=Timeouts(answer=0.05)) as client,
    ):
        with pytest.raises(TimedOut, match=r"sent nothing for 0\.05 seconds; .* timeout \(answer\)"):
            client.generate("hi")
        assert server.left.wait(20)


def test_a_closed_client_says_so() -> None:
    client = MindsporeInferenceClient("m", "http://127.0.0.1:1")
    client.close()
    with pytest.raises(ClientClosed, match="make a new one"):
        client.generate("hi")
    with pytest.raises(ClientClosed):
        next(client.generate_stream("hi"))
    asyncio.run(ask_after_closing())


async def ask_after_closing() -> None:
    client = AsyncMindsporeInferenceClient("m", "http://127.0.0.1:1")
    await client.close()
    with pytest.raises(ClientClosed, match="make a new one"):
        await client.generate("hi")
    with pytest.raises(ClientClosed):
        await anext(client.generate_stream("hi"))


@pytest.mark.parametrize("streaming", [True, False])
def test_closing_ends_what_another_thread_waits_for(streaming: bool) -> None:
    with scripted(stream(step("a"), end=STALL) if streaming else [STALL]) as server:
        client = MindsporeInferenceClient("m", server.url)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(lambda: list(client.generate_stream("hi")) if streaming else client.generate("hi"))
            assert server.arrived.acquire(timeout=20)
            threading.Timer(0.1, client.close).start()  # it waits for the answer by then, or finds the client closed
            with pytest.raises(ClientClosed):
                waiting.result(20)


def test_a_reader_that_takes_its_time_is_not_a_server_that_stalls() -> None:
    at_once = b"".join(stream(step("a"), step("b"), {"generated_text": "ab"}))
    with scripted([at_once]) as server:
        client = MindsporeInferenceClient("m", server.url, timeout=Timeouts(first_token=30.0, between_tokens=0.05))
        with client, contextlib.closing(client.generate_stream("hi")) as steps:
            next(steps)
            assert not server.left.wait(0.2)  # longer than any token may take
            assert texts(list(steps)) == "b"


def test_waits_grow_are_bounded_and_never_earlier_than_asked_for() -> None:
    assert Timeouts.all(3) == Timeouts(3, 3, 3, 3)
    random.seed(1)
    retries, later = Retries(times=3, first_wait=1.0, longest_wait=3.0), Overloaded("later")
    waits = [retries.wait(tried, later) for tried in (1, 2, 3, 4)]
    assert waits[2:] == [None, None]  # four seconds are too long, and three tries were enough
    assert 1.0 <= waits[0] <= 1.5  # type: ignore[operator]
    assert 2.0 <= waits[1] <= 3.0  # type: ignore[operator]
    later.retry_after = 2.5
    assert 2.5 <= (retries.wait(1, later) or 0) <= 3.75
    for error in (TimedOut("x"), BrokenAnswer("x"), GenerationError("x"), InvalidRequest("x")):
        assert retries.wait(1, error) is None


def test_times_that_nobody_can_wait_are_refused() -> None:
    for seconds in (0, -1, float("nan"), float("inf"), 1e10):
        with pytest.raises(ValueError, match=r"timeout connect: .* None waits forever"):
            Timeouts.all(seconds)
    for settings in ({"times": -1}, {"longest_wait": float("nan")}, {"first_wait": float("inf")}):
        with pytest.raises(ValueError, match=f"retries {next(iter(settings))}"):
            Retries(**settings)  # type: ignore[arg-type]
