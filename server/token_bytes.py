"""What each token of a vocabulary adds to a text, in bytes, and text from tokens as they come.

A tokenizer's own ``decode`` looks at all tokens at once. Its rule is read here from the ``decoder`` of
``tokenizer.json`` instead, as bytes a token, so that text can be passed on token by token, in linear time and without
splitting a character. The two agree on every valid text. Where a model writes bytes that are none, a SentencePiece
model's ``decode`` turns a whole run of byte tokens into U+FFFD; here, as in SentencePiece itself, it is only the broken
bytes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """The exported tokenizer cannot be used; the message says what was found and what is supported."""


class TokenBytes:
    """The bytes of every token.

    Two kinds of decoder are known: ``ByteLevel`` (GPT-2, Llama 3, Qwen), whose tokens spell bytes as printable
    characters, and the sequence that SentencePiece models get (Llama 1 and 2, InternLM): ``Replace`` of strings,
    ``ByteFallback``, ``Fuse``, ``Strip`` of the space before the text.

    Raises:
        TokenizerError: the decoder is of another kind.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.leading_spaces = 0  # stripped at the start of a text
        self.errors = "replace"  # one U+FFFD for each broken sequence
        self.special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._tokenizer = tokenizer
        self._replacements: list[tuple[str, str]] = []
        self._byte_level = self._byte_fallback = False
        self._known: dict[int, bytes] = {}  # at most the vocabulary
        self._read(json.loads(tokenizer.to_str())["decoder"])

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes, those of a special token too; nothing for an id beyond the vocabulary."""
        data = self._known.get(token_id)
        if data is None:
            token = self._tokenizer.id_to_token(token_id)
            data = self._known[token_id] = b"" if token is None else self._decode(token)
        return data

    def _read(self, decoder: dict[str, Any] | None) -> None:
        match decoder:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "Sequence", "decoders": steps}:
                for step in steps:
                    self._read(step)
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                self._replacements.append((old, new))
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
                self.errors = _EACH_BYTE
            case {"type": "Fuse"}:
                pass  # joins the tokens' texts, as we do anyway
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                self.leading_spaces = start
            case _:
                kind = json.dumps(decoder, ensure_ascii=False)
                known = "ByteLevel, or a Sequence of Replace, ByteFallback, Fuse and Strip"
                raise TokenizerError(f"the tokenizer's decoder is {kind[:200]}; supported: {known}")

    def _decode(self, token: str) -> bytes:
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._byte_level:
            data = [_BYTE_OF_CHARACTER.get(character) for character in token]
            if None not in data:
                return bytes(byte for byte in data if byte is not None)
        return token.encode()


class IncrementalDecoder:
    """Text from tokens as they come: the pieces joined are the text of all tokens decoded at once.

    A piece ends between two characters. Special tokens leave no trace, unless ``show_special``. Bytes that cannot
    become a character are U+FFFD.
    """

    def __init__(self, token_bytes: TokenBytes, *, show_special: bool = False) -> None:
        self._bytes = token_bytes
        self._hidden = frozenset() if show_special else token_bytes.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(token_bytes.errors)
        self._to_strip = token_bytes.leading_spaces

    def feed(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        hidden = self._hidden
        data = b"".join([self._bytes[token_id] for token_id in token_ids if token_id not in hidden])
        return self._strip(self._utf8.decode(data))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was begun and not completed."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] == " ":
                text, self._to_strip = text[1:], self._to_strip - 1
            else:
                self._to_strip = 0
        return text


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece writes one U+FFFD for each byte that it cannot decode, not for each broken sequence."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte, inverted: printable bytes stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()
_EACH_BYTE = "replace_each_byte"
codecs.register_error(_EACH_BYTE, _replace_each_byte)
