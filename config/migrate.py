"""``python -m config.migrate OLD.yaml``: a configuration of the older system becomes a deployment file of this one.

Every key of the old file falls under one rule: it is translated, or it is dropped for a reason that is said, or it is
unknown and named. The result is loaded before it is written, so it is a deployment file that works once its models are
there; what must be done for that stands at its head.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from config.server_config import is_loopback
from config.serving_config import AUTO, ConfigError, load, read_yaml

ROUTES = ("llama2", "internlm")  # of the older app, whatever its model was
MODELS_FOLDER = "output/models"
API_KEYS = "output/api-keys.txt"
OF_EXPORTS = {"cache_memory": AUTO, "cache_dtype": "bfloat16"}  # what models.export makes for Ascend, by its defaults

_MODEL = "the model folder says it"
_SAMPLING = "agents sample on the host, each row with its own settings; no graph is needed for it"
_INI = (
    "the settings of MindSpore-Lite's GE graphs; MindSpore runs graphs for any shape that they take, and with "
    "runtime: mindspore_lite the models.prefill_ini and models.decode_ini name such files: docs/lite.md"
)
_INPUTS = "the inputs of a graph are read from its MindIR"
_WAITING = "a step begins when the one before is over, and takes in who has come meanwhile"
# Why a key has no counterpart.
DROPPED = {
    "model_path.argmax_model": _SAMPLING,
    "model_path.topk_model": _SAMPLING,
    "model_path.post_model_ini": _SAMPLING,
    "model_path.prefill_ini": _INI,
    "model_path.decode_ini": _INI,
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
    "model_config.backend": "MindSpore runs models kernel by kernel, as kbk was; runtime: mindspore_lite is as ge was",
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


@dataclass(frozen=True)
class Migration:
    """What became of an old file."""

    deployment: dict[str, Any]  # a deployment file's content
    steps: tuple[str, ...]  # what must still be done, in order
    dropped: dict[str, str]  # key → reason
    unknown: tuple[str, ...]

    def text(self, source: str) -> str:
        """The new file, with what is to be known of it at its head."""
        head = [f"Translated from {source} by config.migrate.", "", "To do before it is started:"]
        head += [f"{number}. {step}" for number, step in enumerate(self.steps, 1)]
        head += ["", *self.notes()]
        body = yaml.safe_dump(self.deployment, sort_keys=False, allow_unicode=True)
        comments = (" ".join(["#", *line.split()]) for line in head)  # of one line each, whatever is in a key
        return "\n".join(comments) + "\n\n" + body

    def notes(self) -> Iterator[str]:
        """A line for each key that has no counterpart."""
        for key, reason in self.dropped.items():
            yield f"dropped {key}: {reason}"
        for key in self.unknown:
            yield f"unknown {key}: no key of the older system that is known here; nothing was made of it"


class OldConfig:
    """The values of an old file by ``section.key``; those that are asked for are known."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._values = dict(flat(content))
        self._asked: set[str] = set()

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

    @property
    def dropped(self) -> dict[str, str]:
        """Keys of the file that have no counterpart, and why."""
        return {key: DROPPED[key] for key in self._values if key in DROPPED}

    @property
    def unknown(self) -> tuple[str, ...]:
        """Keys of the file that nothing has asked for."""
        return tuple(key for key in self._values if key not in DROPPED and key not in self._asked)


def flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of nested mappings, joined by dots."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def migrate(content: Any) -> Migration:
    """Translate the content of an old file.

    Raises:
        ConfigError: it is not one, or one of its values cannot be what its key says.
    """
    if not isinstance(content, Mapping) or not {"model_config", "serving_config"} & content.keys():
        raise ConfigError("has neither model_config nor serving_config: it is no configuration of the older system")
    old = OldConfig(content)
    server, server_steps = server_section(old)
    model, model_steps = model_section(old)
    limits = limits_section(old)
    deployment = {"models": [model], "server": server, **({"limits": limits} if limits else {})}
    return Migration(deployment, (*model_steps, *server_steps), old.dropped, old.unknown)


def migrate_file(path: Path) -> tuple[Migration, str]:
    """Translate an old file: what became of it, and the new file, which was loaded once.

    Raises:
        ConfigError: it cannot be translated; the message names the file and the key.
    """
    content = read_yaml(path)
    try:
        migration = migrate(content)
        text = migration.text(path.name)
        check(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return migration, text


def model_section(old: OldConfig) -> tuple[dict[str, Any], list[str]]:
    """The one model of an old file, and what must be done to have its folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", old.text("model_config.model_name") or "model").strip("-._") or "model"
    ports = old.numbers("serving_config.agent_ports")
    if not ports:
        raise ConfigError("serving_config.agent_ports: lists no port, and each rank of the model needs one")
    model: dict[str, Any] = {
        "path": f"{MODELS_FOLDER}/{name}",
        "names": list(dict.fromkeys((*ROUTES, name))),
        "agent_ports": list(ports),
        "target": "ascend",
    }
    if first := old.number("serving_config.start_device_id", 0):
        model["device_start"] = first
    host = old.text("serving_config.agent_ip")
    if host and not is_loopback(host):
        model["agent_host"] = host
    files = *old.texts("model_path.prefill_model")[:1], *old.texts("model_path.decode_model")[:1]
    pair = files if len(files) == 2 and len(ports) == 1 else ()
    if not pair:
        model |= OF_EXPORTS
    return model, [folder_step(old, pair, model["path"], len(ports))]


def folder_step(old: OldConfig, pair: tuple[str, ...], folder: str, ranks: int) -> str:
    """How to make the model folder, of a pair or without one."""
    vocabulary, cell = old.text("tokenizer.vocab_file"), old.text("model_config.model_cfg_path")
    longest = old.number("pa_config.decode_seq_length", 0)
    cut = f"--tp {ranks} " if ranks > 1 else ""
    export = f"python -m models.export CHECKPOINT --target ascend {cut}--output {shlex.quote(folder)}"
    if not pair:
        where = f" of {cell}" if cell else ""
        why = " (files of several ranks are not adopted)" if ranks > 1 and old.texts("model_path.prefill_model") else ""
        return f"Export the checkpoint{where}: {export}{why}"
    words = ["python", "-m", "models.adopt", *pair, "--tokenizer"]
    words += [str(PurePosixPath(vocabulary).parent) if vocabulary else "FOLDER", "--output", folder]
    if longest:
        words += ["--context-length", str(longest)]
    keys = ", ".join(f"{key}: {value}" for key, value in OF_EXPORTS.items())
    return (
        f"Make the model folder: {shlex.join(words)} (it says which target, cache_dtype and cache_memory to set here; "
        "runtime: mindspore_lite runs it with MindSpore Lite); if the pair is not one that is served, "
        f"{export} and set {keys}"
    )


def server_section(old: OldConfig) -> tuple[dict[str, Any], list[str]]:
    """Where the app listens. What was open to everyone asks for a key now."""
    host = old.text("serving_config.server_ip") or "127.0.0.1"
    server: dict[str, Any] = {"host": host}
    if port := old.number("serving_config.server_port", 0):
        server["port"] = port
    agent_host = old.text("serving_config.agent_ip") or host
    steps = []
    if not (is_loopback(host) and is_loopback(agent_host)):
        server["allow_remote"] = True
    if not is_loopback(host):
        server["api_key_file"] = API_KEYS
        steps.append(
            f"Write the keys of your clients into {API_KEYS}, one a line, or set server.allow_without_key: true"
        )
    return server, steps


def limits_section(old: OldConfig) -> dict[str, int]:
    """What the old batch sizes and lengths are here; a key that the old file lacks keeps its default."""
    rows = old.number("model_config.decode_batch_size", 0)
    tokens = max(old.number("model_config.seq_length", 0), old.number("pa_config.decode_seq_length", 0))
    answer = old.number("model_config.max_generate_length", 0)
    limits = {"max_num_seqs": rows, "max_num_batched_tokens": max(tokens, rows), "max_new_tokens": answer}
    return {key: value for key, value in limits.items() if value}


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m config.migrate", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a YAML file of the older system")
    parser.add_argument("--output", type=Path, help="file to write, which must not exist; default: standard output")
    args = parser.parse_args(arguments)
    try:
        migration, text = migrate_file(args.old)
        if args.output:
            with args.output.open("x", encoding="utf-8") as file:
                file.write(text)
    except ConfigError as error:
        print(f"migrate: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        print(f"migrate: {args.output}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 1
    if not args.output:
        print(text, end="")  # noqa: T201
        return 0
    for number, step in enumerate(migration.steps, 1):
        print(f"{number}. {step}")  # noqa: T201
    for note in migration.notes():
        print(note)  # noqa: T201
    return 0


def check(text: str) -> None:
    """See that the new file can be loaded.

    Raises:
        ConfigError: it cannot, because of a value in the old one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "translated.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            load(path)
        except ConfigError as error:
            raise ConfigError(f"cannot be translated: {str(error).removeprefix(f'{path}: ')}") from None


if __name__ == "__main__":
    sys.exit(main())
