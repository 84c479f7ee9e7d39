"""The text side of a model: its tokenizer, its chat template and the rules around them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from config.manifest import TokenizerRules

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


def plain_tokenizer_json(tokenizer: Tokenizer) -> str:
    """The tokenizer's file without what it would do to a prompt beside splitting it: add tokens, cut, pad."""
    content = json.loads(tokenizer.to_str())
    return json.dumps(content | {"post_processor": None, "truncation": None, "padding": None}, ensure_ascii=False)


def unique_ids(*ids: int | None) -> tuple[int, ...]:
    """The given ids in order, each once."""
    return tuple(dict.fromkeys(token for token in ids if token is not None))
