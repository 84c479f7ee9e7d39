"""The text side of an exported model: text → tokens, tokens → text, messages → prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from config.manifest import TokenizerRules
from server.chat_template import ChatTemplate
from server.errors import InvalidRequest
from server.token_bytes import IncrementalDecoder, TokenBytes, TokenizerError
from server.tool_calls import OPEN

TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """Reads ``tokenizer.json`` and, if there is one, ``chat_template.jinja`` of an exported model's folder.

    Raises:
        TokenizerError: a file is missing or of a kind that is not supported.
    """

    def __init__(self, folder: str | Path, rules: TokenizerRules) -> None:
        path = Path(folder) / TOKENIZER_FILE
        try:
            source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
        self._tokenizer = tokenizers.Tokenizer.from_str(source)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bytes = TokenBytes(self._tokenizer)
        self._rules = rules
        self._chat = self._chat_template(Path(folder) / CHAT_TEMPLATE_FILE)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self._rules.eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of ``text``; special tokens written out in it count as such.

        With ``add_special_tokens`` they start with the begin token, if the model has that rule and the text not yet it.
        A megabyte takes about a second. As a batch of one it runs without the interpreter's lock, which ``encode`` of
        the library holds.

        Raises:
            InvalidRequest: ``text`` holds half a surrogate pair.
        """
        try:
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequest("is not valid Unicode text: it holds half a surrogate pair", "prompt") from None
        bos = self._rules.bos_token_id
        if add_special_tokens and self._rules.add_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def decode(self, token_ids: Iterable[int], *, show_special: bool = False) -> str:
        """The text of a whole answer: special tokens leave no trace unless shown, broken characters are U+FFFD."""
        decoder = self.incremental_decoder(show_special=show_special)
        return decoder.feed(token_ids) + decoder.flush()

    def incremental_decoder(self, *, show_special: bool = False) -> IncrementalDecoder:
        """A decoder for one answer."""
        return IncrementalDecoder(self._bytes, show_special=show_special)

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, which may be a part of a character."""
        return self._bytes[token_id]

    def token_id(self, text: str) -> int | None:
        """The token that is written so; None if the model has none."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id

    def token_text(self, token_id: int) -> str:
        """One token's own text, special tokens and leading spaces included."""
        return self._bytes[token_id].decode(errors=self._bytes.errors)

    def is_special(self, token_id: int) -> bool:
        """Whether the token leaves no trace in an answer's text."""
        return token_id in self._bytes.special_ids

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template shows tools to the model and asks for calls in the form of ``tool_calls``."""
        if self._chat is None or not self._chat.takes_tools or OPEN not in self._chat.source:
            return False
        return not any(map(self.is_special, self.encode(OPEN, add_special_tokens=False)))  # those leave no trace

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation, special tokens written out: encode it without adding any.

        Raises:
            InvalidRequest: the model has no chat template, the template refuses the messages, or it takes no tools.
        """
        if self._chat is None:
            raise InvalidRequest("this model has no chat template", "messages")
        if tools and not self.takes_tools:
            raise InvalidRequest("this model's chat template shows it no tools; leave them out", "tools")
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def chat_template(self, source: str) -> ChatTemplate:
        """A Jinja template that knows this model's special tokens.

        Raises:
            TokenizerError: it cannot be parsed.
        """
        bos, ends = self._rules.bos_token_id, self._rules.eos_token_ids
        variables = {
            "bos_token": "" if bos is None else self.token_text(bos),
            "eos_token": self.token_text(ends[0]) if ends else "",
        }
        return ChatTemplate(source, variables)

    def _chat_template(self, path: Path) -> ChatTemplate | None:
        if not path.exists():
            return None
        try:
            return self.chat_template(path.read_text(encoding="utf-8"))
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None
