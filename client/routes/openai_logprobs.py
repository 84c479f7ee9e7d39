"""Tokens with their log-probabilities as OpenAI's answers tell them, and when: never before their text is out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.request import TokenLogprob
from server.request_stream import Increment
from server.tokenizer import Tokenizer

ENDS_BY_TOKEN = ("eos", "stop_token")  # what ended an answer: its last token, which is no part of its text


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token, with the characters of the text that stand before it."""

    token: TokenLogprob
    offset: int


class TokensOfText:
    """The tokens of one answer, each handed out with the text that it is part of.

    So a stop string leaves no trace in them either: its tokens' text never comes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.incremental_decoder()
        self._waiting: deque[tuple[PlacedToken, int]] = deque()  # with the characters that must be out
        self._characters = 0  # of the tokens that were read
        self._out = 0  # of these, passed on

    def take(self, part: Increment) -> list[PlacedToken]:
        """The tokens whose text ends in this part of the answer."""
        self._out += len(part.text)
        for token in part.tokens:
            offset, text = self._characters, self._decoder.feed((token.token_id,))
            self._characters += len(text)
            opens = 0 if text or token.special else 1  # a character that a later token completes
            self._waiting.append((PlacedToken(token, offset), self._characters + opens))
        if part.stop_kind in ENDS_BY_TOKEN:
            self._waiting.pop()
        whole = part.finish_reason is not None and part.stop_kind != "stop_string"
        taken = []
        while self._waiting and (whole or self._waiting[0][1] <= self._out):
            taken.append(self._waiting.popleft()[0])
        return taken


def token_name(data: bytes) -> str:
    """A token's text; of one that is a part of a character, its bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokens: Sequence[PlacedToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """As in chat answers."""

    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_name(data), "logprob": logprob, "bytes": list(data)}

    content = [
        {**one(placed.token.token_id, placed.token.logprob), "top_logprobs": [one(*top) for top in placed.token.top]}
        for placed in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[PlacedToken], tokenizer: Tokenizer, start: int) -> dict[str, Any]:
    """As in completions; ``start`` is where in the text the answer begins."""
    return {
        "tokens": [token_name(tokenizer.token_bytes(placed.token.token_id)) for placed in tokens],
        "token_logprobs": [placed.token.logprob for placed in tokens],
        "top_logprobs": [_best(placed.token, tokenizer) for placed in tokens],
        "text_offset": [start + placed.offset for placed in tokens],
    }


def prompt_tokens(tokens: Sequence[TokenLogprob], length: int, tokenizer: Tokenizer) -> list[PlacedToken]:
    """The tokens of a prompt of ``length`` characters, placed so that the last one ends with it.

    A begin token that the text does not have stands at 0, as the first one does.
    """
    decoder = tokenizer.incremental_decoder(show_special=True)
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(decoder.feed((token.token_id,))))
    before = length - offsets.pop() - len(decoder.flush())
    return [PlacedToken(token, max(0, before + offset)) for token, offset in zip(tokens, offsets, strict=True)]


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """Successive ``completion_logprobs`` as one."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _best(token: TokenLogprob, tokenizer: Tokenizer) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    best = {token_name(tokenizer.token_bytes(token_id)): logprob for token_id, logprob in token.top}
    best.setdefault(token_name(tokenizer.token_bytes(token.token_id)), token.logprob)
    return best
