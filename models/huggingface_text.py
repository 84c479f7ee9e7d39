"""The text side of a Hugging Face folder: tokenizer, chat template, begin and end tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer

from config.manifest import TokenizerRules
from models.byte_level_tokenizer import byte_level_tokenizer
from models.checkpoint_error import CheckpointError
from models.config_fields import ConfigFields
from models.sentencepiece_tokenizer import AddedPiece, begin_and_end, sentencepiece_tokenizer
from models.text_files import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, TextFiles, text_files, unique_ids

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
ADDED_TOKENS_FILE = "added_tokens.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TEXT_FILES = (
    TOKENIZER_FILE,
    SENTENCEPIECE_FILE,
    VOCABULARY_FILE,
    MERGES_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    GENERATION_CONFIG_FILE,
    CHAT_TEMPLATE_FILE,
)

SPLIT_BY_CLASS = {"Qwen2Tokenizer": "qwen2", "Qwen2TokenizerFast": "qwen2"}
NOTHING: Mapping[str, Any] = MappingProxyType({})


def huggingface_text(
    folder: Path,
    config: ConfigFields,
    vocab_size: int,
    *,
    assumed: Mapping[str, Any] = NOTHING,
    told: Mapping[str, Any] = NOTHING,
) -> TextFiles:
    """The tokenizer, chat template and rules of a folder.

    ``assumed`` settings are those of a ``tokenizer_config.json`` where it says nothing, ``told`` ones come before it.

    Raises:
        CheckpointError: it has no tokenizer that can be read, or one whose rules are not implemented.
    """
    settings = {
        **assumed,
        **_read_json(folder / SPECIAL_TOKENS_FILE),
        **_read_json(folder / TOKENIZER_CONFIG_FILE),
        **told,
    }
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = _tokenizer_file(folder / TOKENIZER_FILE)
        starts_with = _template_tokens(folder / TOKENIZER_FILE, tokenizer)
        add_bos_by_default = bool(starts_with)
    elif (folder / SENTENCEPIECE_FILE).is_file():
        settings = {**begin_and_end(folder / SENTENCEPIECE_FILE), **settings}
        tokenizer = _sentencepiece_file(folder, settings)
        starts_with = []
        add_bos_by_default = True
    elif (folder / VOCABULARY_FILE).is_file():
        tokenizer = _vocabulary_files(folder, settings)
        starts_with = []
        add_bos_by_default = False
    else:
        raise CheckpointError(f"{folder}: has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE} nor {VOCABULARY_FILE}")
    if settings.get("add_eos_token"):
        raise CheckpointError(f"{folder / TOKENIZER_CONFIG_FILE}: add_eos_token is set, which is not implemented")
    bos = _bos_id(tokenizer, settings, config, starts_with)
    add_bos = settings.get("add_bos_token")
    rules = TokenizerRules(
        bos_token_id=bos,
        add_bos=bos is not None and (add_bos_by_default if add_bos is None else bool(add_bos)),
        eos_token_ids=_end_tokens(folder, tokenizer, settings, config),
    )
    return text_files(folder, tokenizer, _chat_template(folder, settings), rules, vocab_size)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return content


def _tokenizer_file(path: Path) -> Tokenizer:
    content = _read_json(path)
    if not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path}: holds no tokenizer model")
    try:
        return Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None}))
    except Exception as error:  # the library raises no narrower one
        raise CheckpointError(f"{path}: is not a tokenizer: {error}") from None


def _template_tokens(path: Path, tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer's own template puts around a text: nothing, or one begin token."""
    around: list[int] = tokenizer.encode("").ids
    text = "a"
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    if len(around) > 1 or tokenizer.encode(text).ids != around + plain:
        raise CheckpointError(f"{path}: adds more to a text than one begin token, which is not implemented")
    return around


def _sentencepiece_file(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    return sentencepiece_tokenizer(
        folder / SENTENCEPIECE_FILE,
        _added_tokens(folder, settings),
        prefix_space=settings.get("add_prefix_space"),
        legacy=settings.get("legacy") is not False,
    )


def _vocabulary_files(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """A vocabulary and its merges in two files. How a text is split, only the tokenizer's class says."""
    path = folder / VOCABULARY_FILE
    kind = settings.get("tokenizer_class")
    if kind not in SPLIT_BY_CLASS:
        raise CheckpointError(
            f"{path}: is a vocabulary of {kind!r}; supported without a {TOKENIZER_FILE}: {', '.join(SPLIT_BY_CLASS)}"
        )
    ids = _read_json(path)
    added = _added_tokens(folder, settings)
    ids |= {piece.text: piece.id for piece in added}
    if sorted(ids.values()) != list(range(len(ids))):
        raise CheckpointError(
            f"{path}: has no token, or several, for some id below {len(ids)}, its added ones included"
        )
    merges = (folder / MERGES_FILE).read_text(encoding="utf-8").splitlines()
    merges = [merge for merge in merges if merge and not merge.startswith("#version")]
    tokenizer = byte_level_tokenizer(folder / MERGES_FILE, ids, merges, SPLIT_BY_CLASS[kind])
    for piece in added:
        tokenizer.add_tokens([AddedToken(piece.text, normalized=False, special=piece.special)])
    return tokenizer


def _added_tokens(folder: Path, settings: dict[str, Any]) -> list[AddedPiece]:
    path = folder / TOKENIZER_CONFIG_FILE
    added = [AddedPiece(i, text, special=True) for text, i in _read_json(folder / ADDED_TOKENS_FILE).items()]
    declared = settings.get("added_tokens_decoder") or {}
    for token in declared.values():
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise CheckpointError(f"{path}: {flag} is set for {token['content']!r}, which is not implemented")
    by_id = {piece.id: piece for piece in added}
    by_id |= {int(i): AddedPiece(int(i), token["content"], bool(token.get("special"))) for i, token in declared.items()}
    return list(by_id.values())


def _token_text(settings: dict[str, Any], name: str) -> str | None:
    """``bos_token`` and its like are texts, or objects with their ``content``."""
    token = settings.get(name)
    return token.get("content") if isinstance(token, dict) else token


def _bos_id(tokenizer: Tokenizer, settings: dict[str, Any], config: ConfigFields, starts_with: list[int]) -> int | None:
    text = _token_text(settings, "bos_token")
    named = None if text is None else tokenizer.token_to_id(text)
    for candidate in (*starts_with, named, config.fields.get("bos_token_id")):
        if isinstance(candidate, int):
            return candidate
    return None


def _end_tokens(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], config: ConfigFields) -> tuple[int, ...]:
    """Every end token that any of the files names: chat models name theirs here and there."""
    text = _token_text(settings, "eos_token")
    named = None if text is None else tokenizer.token_to_id(text)
    generation = _read_json(folder / GENERATION_CONFIG_FILE).get("eos_token_id")
    ids = unique_ids(named, *_ids(generation), *_ids(config.fields.get("eos_token_id")))
    if not ids:
        raise CheckpointError(
            f"{folder}: names no end token in any of its files; "
            f"put the model's {GENERATION_CONFIG_FILE} or {TOKENIZER_CONFIG_FILE} there"
        )
    return ids


def _ids(value: Any) -> list[int]:
    """``eos_token_id`` is a number, a list of them, or null."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int)]


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template
