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

from config.old_config import OldConfig
from config.server_config import is_loopback
from config.serving_config import AUTO, ConfigError, load, read_yaml

ROUTES = ("llama2", "internlm")  # of the older app, whatever its model was
MODELS_FOLDER = "output/models"
API_KEYS = "output/api-keys.txt"
RANK_TABLE = "output/rank_table.json"
OF_EXPORTS = {"cache_memory": AUTO, "cache_dtype": "bfloat16"}  # what models.export makes for Ascend, by its defaults
OF_LITE = ("runtime", "prefill_ini", "decode_ini", "rank_table")  # keys that only an adopted pair has

Pairs = tuple[tuple[str, str], ...]  # a prefill and a decode file for each rank


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
    pairs, why_not = pairs_of(old, len(ports))
    by_lite = bool(pairs) and old.text("model_config.backend") != "kbk"  # before there was kbk, all was GE's
    if not pairs:
        model |= OF_EXPORTS
    if by_lite:
        model |= lite_keys(old, len(ports))
    else:
        old.drop("model_config.backend", "MindSpore runs this model, kernel by kernel as kbk did")
        for key in ("model_path.prefill_ini", "model_path.decode_ini"):
            old.drop(key, "the shapes that GE compiles for; MindSpore, which runs this model, takes any")
    steps = [folder_step(old, pairs, model, why_not)]
    if "rank_table" in model:
        steps.append(
            f"Put HCCL's rank table of these devices, the rank_table_file of the old ini files, at {RANK_TABLE}, "
            "or write its path into models.rank_table"
        )
    return model, steps


def pairs_of(old: OldConfig, ranks: int) -> tuple[Pairs, str]:
    """The files of each rank, or none and why they are not adopted; empty where there are none."""
    prefill, decode = old.texts("model_path.prefill_model"), old.texts("model_path.decode_model")
    if not prefill and not decode:
        return (), ""
    if not len(prefill) == len(decode) == ranks:
        return (), f"{len(prefill)} prefill and {len(decode)} decode files are not a pair for each of {ranks} rank(s)"
    if ranks > 1 and old.text("model_config.backend") == "kbk":
        return (), "pairs of several ranks are adopted for MindSpore Lite only, and this file has backend: kbk"
    return tuple(zip(prefill, decode, strict=True)), ""


def lite_keys(old: OldConfig, ranks: int) -> dict[str, str]:
    """What a model says that MindSpore Lite runs, as it ran all models with ``backend: ge``."""
    keys = {"runtime": "mindspore_lite"}
    if prefill := old.texts("model_path.prefill_ini"):
        keys["prefill_ini"] = prefill[0]  # the older system gave it to all ranks
    decode = old.texts("model_path.decode_ini")
    if len(set(decode)) == 1:
        keys["decode_ini"] = decode[0]
    elif decode:
        reason = "one file for each zactivate_len; a paged graph has one: name it in models.decode_ini"
        old.drop("model_path.decode_ini", reason)
    if ranks > 1:
        keys["rank_table"] = RANK_TABLE
    return keys


def folder_step(old: OldConfig, pairs: Pairs, model: dict[str, Any], why_not: str) -> str:
    """How to make the model folder, of pairs or without them."""
    vocabulary, cell = old.text("tokenizer.vocab_file"), old.text("model_config.model_cfg_path")
    longest = old.number("pa_config.decode_seq_length", 0)
    ranks, folder = len(model["agent_ports"]), model["path"]
    cut = f"--tp {ranks} " if ranks > 1 else ""
    export = f"python -m models.export CHECKPOINT --target ascend {cut}--output {shlex.quote(folder)}"
    if not pairs:
        where = f" of {cell}" if cell else ""
        return f"Export the checkpoint{where}: {export}" + (f" ({why_not})" if why_not else "")
    words = ["python", "-m", "models.adopt"]
    for pair in pairs:
        words += [*(["--rank"] if ranks > 1 else []), *pair]
    words += ["--tokenizer", str(PurePosixPath(vocabulary).parent) if vocabulary else "FOLDER", "--output", folder]
    if longest:
        words += ["--context-length", str(longest)]
    keys = ", ".join(f"{key}: {value}" for key, value in OF_EXPORTS.items())
    without = ", ".join(key for key in OF_LITE if key in model)
    return (
        f"Make the model folder: {shlex.join(words)} (it says which target, cache_dtype and cache_memory to set here); "
        f"if the files are not ones that are served, {export}, set {keys}"
        + (f" and take out {without}" if without else "")
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
