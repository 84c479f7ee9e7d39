"""The text side of a model: its tokenizer, its chat template and the rules around them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from tokenizers import Tokenizer

from config.manifest import TokenizerRules
from models.checkpoint_error import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class TextFiles:
    """What the server needs beside the network.

    The tokenizer adds no begin or end token by itself, and neither cuts nor pads: that is in ``rules`` alone. The
    first of ``rules.eos_token_ids`` is the tokenizer's own end token, which a chat template may name.
    """

    tokenizer_json: str
    chat_template: str | None
    rules: TokenizerRules

    def write(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and, if there is a template, ``chat_template.jinja`` into ``folder``."""
        (folder / TOKENIZER_FILE).write_text(self.tokenizer_json, encoding="utf-8")
        if self.chat_template is not None:
            (folder / CHAT_TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")


def text_files(
    source: Path, tokenizer: Tokenizer, chat_template: str | None, rules: TokenizerRules, vocab_size: int
) -> TextFiles:
    """Join a model's text side. What the tokenizer would add around a text is taken from it: ``rules`` say that.

    Raises:
        CheckpointError: a token's id is beyond the network's ``vocab_size``.
    """
    last, i = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=itemgetter(1))
    if i >= vocab_size:
        raise CheckpointError(f"{source}: the token {last!r} has id {i}, the network only knows {vocab_size} tokens")
    for end in unique_ids(rules.bos_token_id, *rules.eos_token_ids):
        if not 0 <= end < vocab_size:
            raise CheckpointError(f"{source}: names {end} as begin or end token, the network knows {vocab_size} tokens")
    content = json.loads(tokenizer.to_str()) | {"post_processor": None}
    return TextFiles(json.dumps(content, ensure_ascii=False), chat_template, rules)


def unique_ids(*ids: int | None) -> tuple[int, ...]:
    """The given ids in order, each once."""
    return tuple(dict.fromkeys(token for token in ids if token is not None))
