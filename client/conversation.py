"""A conversation with a model over ``/v1/chat/completions``: what was said, and the next answer as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

from client.answers import ChatChunk, Lines, Usage
from client.http_session import Session

ROUTE = "/v1/chat/completions"


class Conversation:
    """The server keeps nothing of it: each question carries all that was said before.

    Attributes:
        finish_reason, usage: of the last answer; None if it did not come to its end, or the server did not say.
    """

    def __init__(self, session: Session, model: str, system: str | None, settings: Mapping[str, Any]) -> None:
        """``settings`` go into each request, such as ``{"temperature": 0.7}``."""
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self._session = session
        self._request = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **settings}

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer to ``text``, piece by piece. Question and answer are kept, as far as the answer came.

        Raises:
            ClientError: there is none, or it broke off. Without any text of an answer, the question is forgotten.
        """
        self.finish_reason, self.usage = None, None
        question = {"role": "user", "content": text}
        answer = ""
        body = {**self._request, "messages": [*self.messages, question]}
        try:
            with contextlib.closing(self._session.stream(ROUTE, body, Lines(ChatChunk))) as chunks:
                for chunk in chunks:
                    self.usage = chunk.usage or self.usage
                    for choice in chunk.choices:
                        self.finish_reason = choice.finish_reason or self.finish_reason
                        if choice.delta.content:
                            answer += choice.delta.content
                            yield choice.delta.content
        finally:
            if answer or self.finish_reason:
                self.messages += [question, {"role": "assistant", "content": answer}]
