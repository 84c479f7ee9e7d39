"""What a client of the ``/models`` routes does: ask, and read the two stream formats byte by byte."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx


def ask(client: httpx.Client, inputs: str, name: str = "llama2", **parameters: Any) -> dict[str, Any]:
    """The full answer."""
    response = client.post(f"/models/{name}/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.content.endswith(b"}\n")
    answer: dict[str, Any] = json.loads(response.content)
    return answer


def stream(client: httpx.Client, inputs: str, **parameters: Any) -> bytes:
    """The stream, as it came."""
    response = client.post("/models/llama2/generate_stream", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.content


def events(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects of server-sent events; anything else in the stream is an error."""
    *messages, rest = content.split(b"\r\n\r\n")
    assert rest == b""
    assert all(message.startswith(b"data: {") for message in messages)
    return [json.loads(message.removeprefix(b"data: ")) for message in messages]


def lines(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects of ``data:`` lines; anything else in the stream is an error."""
    *messages, rest = content.split(b"\n")
    assert rest == b""
    assert all(message.startswith(b"data:{") for message in messages)
    return [json.loads(message.removeprefix(b"data:")) for message in messages]


def event_text(content: bytes) -> str:
    """The steps of a stream of events without a last one for the whole text."""
    return "".join(event["data"] for event in events(content))


def line_text(content: bytes) -> str:
    """The steps of a stream of lines."""
    return "".join(line["token"]["text"] for line in lines(content) if "token" in line)


@contextlib.contextmanager
def full_queue(client: httpx.Client) -> Iterator[None]:
    """Long streams on both seats and both places in the queue of ``slow_standin``."""
    busy = {"inputs": "hi", "parameters": {"ignore_eos": True, "max_new_tokens": 4000}}
    with contextlib.ExitStack() as streams:
        read = []  # a forgotten iterator would close its stream
        for number in range(4):
            opened = client.stream("POST", "/models/llama2/generate_stream", json=busy)
            response = streams.enter_context(opened)
            assert response.status_code == 200
            read.append(response.iter_raw())
            if number < 2:
                next(read[-1])  # it has its seat
        yield
