"""A stand-in for a model, to test and try the server without one: a person can compute its answers by hand.

Tokens 0 to 255 are bytes; above them are the special tokens. Let t1 … tn be the tokens of prompt and answer so far. The
next token follows from them:

- If they end inside a character of ``ALPHABET`` that takes several bytes, it is that character's next byte.
- Otherwise take 1·t1 + 2·t2 + … + n·tn, drop its last digit, and divide by 37: the remainder is the number, from 0, of
  the next character in ``ALPHABET``, and the next token is its first byte. The alphabet has 36 characters; number 36 is
  the end token. (Without dropping a digit, answers soon run in circles and never end.)

For example ``hi``, with the begin token in front, is 256, 104, 105. The sum is 1·256 + 2·104 + 3·105 = 779, and
77 = 2·37 + 3: the answer begins with character 3, ``d``, which is token 100. Now the sum is 779 + 4·100 = 1179, and
117 = 3·37 + 6: the next character is ``g``. So it goes on:

>>> answer("hi", 8)
'dgvsykж好'

The sum is not taken from the request but from the key/value cache: each step writes its tokens through the slot mapping
and reads all tokens of a row back through its block table. An entry holds the token (for a key) and its position from 1
(for a value). A token that was written to or read from a wrong place changes the sum; an entry that was written for
another position, or never, makes the next token ``#``, which is not in the alphabet.

To try what the server does when a model fails, a deployment may name texts that a step does not bear in prompt or
answer of one of its rows (``standin_faults``): the step raises, the process crashes in it, it never ends, or its tokens
differ from rank to rank.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.logits import Logits
from agent.protocol import Floats, Ints
from agent.step_batch import StepBatch
from config.manifest import Manifest, TokenizerRules, file_digest, read_manifest, verify_files, write_manifest
from config.serving_config import StandinFault

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,!\néж中好🙂"
BEGIN, END = 256, 257
SPECIAL_TOKENS = {BEGIN: "<s>", END: "</s>", 258: "<|system|>", 259: "<|user|>", 260: "<|assistant|>"}
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
BROKEN = ord("#")
CHAT_TEMPLATE = """{{ bos_token }}
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>
{"name": …, "arguments": …}
</tool_call>
{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}

{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

# The first token of each choice, and for each unfinished character its last bytes (newest first) and the next one.
_FIRST = np.array([*(character.encode()[0] for character in ALPHABET), END])
_UNFINISHED = [
    (tuple(reversed(code[:length])), code[length])
    for code in map(str.encode, ALPHABET)
    for length in range(1, len(code))
]
_LONGEST = max(len(tail) for tail, _ in _UNFINISHED)


class ArithmeticModel:
    """A ``Runner`` that follows the rule above over a real block cache."""

    cache_dtype = "int32"

    def __init__(
        self,
        folder: Path,
        *,
        cache_bytes: int,
        step_seconds: float = 0.0,
        faults: Mapping[str, StandinFault] | None = None,
        rank: int = 0,
    ) -> None:
        """Read the model's folder; ``step_seconds`` is the least time of a step, that of the device it stands for.

        ``faults`` says what a text in a row's tokens does to every step that the row takes part in. ``rank`` matters
        to the fault ``differ`` only: every rank computes the whole rule.

        Raises:
            ManifestError: the folder does not hold what ``write_model`` wrote.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        verify_files(folder, self.manifest)
        block_size = self.manifest.block_size
        self.num_blocks = cache_bytes // self.manifest.cache_block_bytes(self.cache_dtype)
        self._step_seconds = step_seconds
        self._faults = {_searchable(text.encode()): fault for text, fault in (faults or {}).items()}
        self._rank = rank
        self._cache = np.zeros((self.num_blocks, block_size, 2), np.int32)  # token id, position + 1
        self._logits = _logits_table(self.manifest.vocab_size)

    def copy_blocks(self, copies: Ints) -> None:
        """Copy the entries of blocks, from and to ``[C, 2]``."""
        self._cache[copies[:, 1]] = self._cache[copies[:, 0]]

    def agree(self, digest: bytes) -> None:
        """Each rank computes the whole rule; none waits for another."""

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        """The next token of the rule is clearly the best, the others follow in a fixed order."""
        end = time.monotonic() + self._step_seconds
        self._write(batch)
        tokens, positions = self._read(batch)
        following = _next_tokens(tokens, positions, *_prefixes(batch))
        if self._faults and self._fault(tokens, batch.context_lens) == "differ":
            following = (following + self._rank) % self.manifest.vocab_size
        logits = Logits.of(self._logits[following])
        if (left := end - time.monotonic()) > 0:
            time.sleep(left)  # stands for the device, which would be computing
        return logits

    def _write(self, batch: StepBatch) -> None:
        """Write the new tokens. What goes to the null block is dropped, so a row that lives there is found out."""
        kept = batch.slot_mapping >= self.manifest.block_size
        entries = np.stack([batch.token_ids[kept], batch.positions[kept] + 1], axis=1)
        self._cache.reshape(-1, 2)[batch.slot_mapping[kept]] = entries

    def _read(self, batch: StepBatch) -> tuple[Ints, Ints]:
        """Token ids and positions (from 1) that the rows' block tables lead to, each ``[R, longest context]``."""
        longest = int(batch.context_lens.max())
        tables = batch.block_tables[:, : -(-longest // self.manifest.block_size)]
        entries = self._cache[tables].reshape(len(tables), -1, 2)[:, :longest]
        return entries[..., 0], entries[..., 1]

    def _fault(self, tokens: Ints, lengths: Ints) -> StandinFault | None:
        """The fault whose text a row holds, if one does; this is where it happens, but for ``differ``.

        Raises:
            RuntimeError: that is to raise.
        """
        rows = [_searchable(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        fault = next((fault for text, fault in self._faults.items() if any(text in row for row in rows)), None)
        if fault == "raise":
            raise RuntimeError("a row holds a text that raises")
        if fault == "crash":
            os.abort()
        if fault == "hang":
            threading.Event().wait()
        return fault


def _searchable(tokens: bytes | Ints) -> str:
    """Tokens, or the bytes that they stand for, one character each."""
    return "".join(map(chr, tokens))


def _prefixes(batch: StepBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each wanted position its row and how many tokens of the row it follows from, each ``[L]``."""
    ends = np.cumsum(batch.query_lens, dtype=np.int64)
    rows = np.searchsorted(ends, batch.logits_indices, side="right")
    return rows, batch.context_lens[rows] - (ends[rows] - batch.logits_indices - 1)


def _next_tokens(
    tokens: Ints, positions: Ints, rows: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The rule: the token after the first ``lengths`` cache entries of ``rows``, ``[L]``."""
    places = np.arange(1, tokens.shape[1] + 1, dtype=np.int64)
    sums = np.cumsum(tokens * places, axis=1)[rows, lengths - 1]
    following = _FIRST[sums // 10 % len(_FIRST)]
    lasts = [lengths - 1 - back for back in range(_LONGEST)]
    newest = [np.where(last >= 0, tokens[rows, np.maximum(last, 0)], -1) for last in lasts]
    for tail, byte in _UNFINISHED:
        inside = np.logical_and.reduce([newest[back] == token for back, token in enumerate(tail)])
        following = np.where(inside, byte, following)
    misplaced = np.cumsum(positions != places, axis=1)[rows, lengths - 1] > 0
    return np.where(misplaced, BROKEN, following)


def _logits_table(vocab_size: int) -> Floats:
    """Logits by next token, ``[vocab, vocab]``: 2 for it, then falling by 0.5 along the ring of the vocabulary."""
    distance = (np.arange(vocab_size)[None, :] - np.arange(vocab_size)[:, None]) % vocab_size
    return np.where(distance == 0, 2.0, -0.5 * distance).astype(np.float32)


def answer(prompt: str, num_characters: int) -> str:
    """The first characters of the greedy answer to ``prompt``, by the rule alone: no cache, no arrays."""
    tokens, text = [BEGIN, *prompt.encode()], ""
    while len(text) < num_characters:
        number = sum(place * token for place, token in enumerate(tokens, start=1)) // 10 % (len(ALPHABET) + 1)
        if number == len(ALPHABET):
            break
        text += ALPHABET[number]
        tokens += ALPHABET[number].encode()
    return text


def write_model(folder: Path) -> None:
    """Write the stand-in's model folder (``config/standin``): manifest, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = msgspec.json.format(msgspec.json.encode(_tokenizer()), indent=1)
    (folder / "tokenizer.json").write_bytes(tokenizer + b"\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    names = ("tokenizer.json", "chat_template.jinja")
    manifest = Manifest(
        name="standin",
        architecture="arithmetic",
        target="standin",
        source="agent/arithmetic_model.py",
        source_digest="",
        weights="none",
        num_layers=1,  # with one head of size 1: a block holds one key and one value a token
        num_heads=1,
        num_kv_heads=1,
        cache_heads=1,
        head_dim=1,
        vocab_size=VOCAB_SIZE,
        context_length=8192,
        block_size=16,
        cache_write="host",
        tokenizer=TokenizerRules(bos_token_id=BEGIN, add_bos=True, eos_token_ids=(END,)),
        files={name: file_digest(folder / name) for name in names},
    )
    write_manifest(folder, manifest)


def _tokenizer() -> dict[str, object]:
    """A ``tokenizer.json`` in which every byte is a token: byte-level BPE without merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {name: byte for byte, name in enumerate(_byte_names())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": text, **special} for token, text in SPECIAL_TOKENS.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary | {text: token for token, text in SPECIAL_TOKENS.items()},
            "merges": [],
        },
    }


def _byte_names() -> list[str]:
    """The character by which byte-level BPE names each byte: itself if printable, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in printable else next(hidden)) for byte in range(256)]
