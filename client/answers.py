"""What a server answers, and the one place that reads its streams: bytes in, however they are cut, answers out.

Nothing here waits or knows of a connection, so the client that blocks and the one that does not share all of it.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import msgspec

from client.client_errors import BrokenAnswer, GenerationError

MAX_LINE_BYTES = 64 << 20  # of a stream; details of a long answer come as one line

T = TypeVar("T")


class DetailToken(msgspec.Struct, frozen=True):
    """A token of prompt or answer, or one that might have stood there."""

    id: int
    text: str
    logprob: float | None
    special: bool = False  # leaves no trace in the text


class Details(msgspec.Struct, frozen=True):
    """How an answer came about."""

    finish_reason: str  # length, eos_token or stop_sequence
    generated_tokens: int
    seed: int
    prefill: list[DetailToken] = []
    tokens: list[DetailToken] = []
    top_tokens: list[list[DetailToken]] = []


class Response(msgspec.Struct, frozen=True):
    """A whole answer. ``details`` are there if they were asked for."""

    generated_text: str
    details: Details | None = None


class Token(msgspec.Struct, frozen=True):
    """The text of one step, which may be that of several tokens; ``index`` counts the steps from 1."""

    text: str
    index: int = 0


class StreamResponse(msgspec.Struct, frozen=True):
    """A step of a stream: ``token``, or at its end ``generated_text``, the whole answer, and ``details``."""

    token: Token | None = None
    generated_text: str | None = None
    details: Details | None = None


class ChatDelta(msgspec.Struct, frozen=True):
    """What a message grows by."""

    content: str | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One of the messages that are being written."""

    delta: ChatDelta = ChatDelta()
    finish_reason: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """How many tokens an answer took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatChunk(msgspec.Struct, frozen=True):
    """A step of a chat."""

    choices: list[ChatChoice] = []
    usage: Usage | None = None


class Reader(Protocol[T]):
    """Reads one stream."""

    def feed(self, data: bytes) -> list[T]:
        """What is complete with ``data``.

        Raises:
            ClientError: the stream says that it failed, or is none.
        """

    def end(self) -> None:
        """Nothing more will come.

        Raises:
            BrokenAnswer: something should have.
        """


class Lines(Generic[T]):
    """Reads ``data:`` lines that hold JSON; comments, other fields and OpenAI's ``[DONE]`` say nothing."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._pieces: list[bytes] = []  # of the line that is coming
        self._size = 0

    def feed(self, data: bytes) -> list[T]:
        self._pieces.append(data)
        self._size += len(data)
        if b"\n" not in data:
            if self._size > MAX_LINE_BYTES:
                raise BrokenAnswer(f"a line of the stream is longer than {MAX_LINE_BYTES} bytes")
            return []
        # Only at newlines: JSON may hold every other character at which Python's splitlines() would split
        *lines, rest = b"".join(self._pieces).split(b"\n")
        self._pieces, self._size = [rest], len(rest)
        contents = (line[len(b"data:") :].strip() for line in lines if line.startswith(b"data:"))
        return [self._decode(content) for content in contents if content != b"[DONE]"]

    def end(self) -> None:
        if b"".join(self._pieces).strip():
            raise BrokenAnswer("the stream ended within a line")

    def _decode(self, content: bytes) -> T:
        failure = decode(content, _Failure).error
        if failure is not None:
            raise GenerationError(failure if isinstance(failure, str) else failure.message)
        try:
            return self._decoder.decode(content)
        except msgspec.MsgspecError as error:
            raise BrokenAnswer(f"the stream holds what is no answer: {error}") from None


class AnswerLines(Lines[StreamResponse]):
    """Reads the stream of a ``/models`` route."""

    def __init__(self, *, whole: bool) -> None:
        """``whole``: the whole text was asked for, so a stream without it has broken off."""
        super().__init__(StreamResponse)
        self._missing = whole

    def feed(self, data: bytes) -> list[StreamResponse]:
        found = super().feed(data)
        self._missing &= all(one.generated_text is None for one in found)
        return found

    def end(self) -> None:
        super().end()
        if self._missing:
            raise BrokenAnswer("the stream ended before the whole text")


def decode(content: bytes, kind: type[T]) -> T:
    """The JSON object of an answer.

    Raises:
        BrokenAnswer: it is none of this kind.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BrokenAnswer(f"this is no answer of such a server: {error}") from None


class _Message(msgspec.Struct):
    message: str


class _Failure(msgspec.Struct):
    """What a stream says when it fails: ``{"error": "…"}``, or OpenAI's object."""

    error: str | _Message | None = None
