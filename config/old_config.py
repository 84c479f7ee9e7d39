"""A configuration of the older system, read key by key: ``config.migrate`` translates it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from config.serving_config import ConfigError

_MODEL = "the model folder says it"
_SAMPLING = "agents sample on the host, each row with its own settings; no graph is needed for it"
_INPUTS = "the inputs of a graph are read from its MindIR"
_WAITING = "a step begins when the one before is over, and takes in who has come meanwhile"
# Why a key has no counterpart, whatever else is in its file.
DROPPED = {
    "model_path.argmax_model": _SAMPLING,
    "model_path.topk_model": _SAMPLING,
    "model_path.post_model_ini": _SAMPLING,
    "model_config.end_token": "the tokenizer's files say which tokens end an answer",
    "model_config.pad_token_id": "padding is masked, so it needs no token",
    "model_config.vocab_size": _MODEL,
    "model_config.model_type": _MODEL,
    "model_config.seq_type": _MODEL,
    "model_config.model_dtype": _MODEL,
    "model_config.page_attention": "every model here has a cache of blocks",
    "model_config.current_index": _INPUTS,
    "model_config.zactivate_len": "attention reads the blocks that a request has, and no more",
    "model_config.prefill_batch_size": "a step takes as many prompts as fit into limits.max_num_batched_tokens",
    "model_config.batching_strategy": "batching is continuous always",
    "model_config.batch_waiting_time": _WAITING,
    "model_config.decode_batch_waiting_time": _WAITING,
    "model_config.fastserve": "requests are served in the order of arrival and priority",
    "fa_config.time_slice": "requests are served in the order of arrival and priority",
    "serving_config.prefill_batch_waiting_time": _WAITING,
    "serving_config.decode_batch_waiting_time": _WAITING,
    "serving_config.enable_host_post_sampling": _SAMPLING,
    "pa_config.num_blocks": "models.cache_memory says how much memory the cache takes, and an adopted pair fixes it",
    "pa_config.block_size": _MODEL,
    "tokenizer.type": "the tokenizer's files say it",
    "basic_inputs.type": _INPUTS,
    "extra_inputs.type": _INPUTS,
    "warmup_inputs.type": _INPUTS,
}


class OldConfig:
    """The values of an old file by ``section.key``; those that are asked for are known."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._values = dict(flat(content))
        self._asked: set[str] = set()
        self._dropped = dict(DROPPED)

    def value(self, key: str) -> Any:
        """A value; None if the file has none, or null."""
        self._asked.add(key)
        return self._values.get(key)

    def number(self, key: str, default: int) -> int:
        """A whole number, not negative."""
        return max(self.numbers(key, (default,)))

    def numbers(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Whole numbers: one, or a list of them.

        Raises:
            ConfigError: they are none.
        """
        found = self.value(key)
        values = tuple(found) if isinstance(found, list) else default if found is None else (found,)
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{key}: {value!r} is no whole number")
        return values or default

    def text(self, key: str) -> str | None:
        """A text.

        Raises:
            ConfigError: it is none.
        """
        found = self.value(key)
        if found is not None and not isinstance(found, str):
            raise ConfigError(f"{key}: {found!r} is no text")
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        """Texts: one, or a list of them.

        Raises:
            ConfigError: they are none.
        """
        found = self.value(key)
        values = found if isinstance(found, list) else [] if found is None else [found]
        for value in values:
            if not isinstance(value, str):
                raise ConfigError(f"{key}: {value!r} is no text")
        return tuple(values)

    def drop(self, key: str, reason: str) -> None:
        """Say why a key has no counterpart in what this file becomes."""
        self._dropped[key] = reason

    @property
    def dropped(self) -> dict[str, str]:
        """Keys of the file that have no counterpart, and why."""
        return {key: self._dropped[key] for key in self._values if key in self._dropped}

    @property
    def unknown(self) -> tuple[str, ...]:
        """Keys of the file that nothing has asked for."""
        return tuple(key for key in self._values if key not in self._dropped and key not in self._asked)


def flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of nested mappings, joined by dots."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
