"""One deployment's configuration: ``load(path)`` reads a YAML file into frozen records.

Everything may read this module; it reads nothing of ours. A mistake in the file is a ``ConfigError`` that names the
file, the key and what is allowed there, before anything starts.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from config.server_config import Port, Positive, PositiveSeconds, Seconds, ServerConfig, is_loopback, server_problems

Target = Literal["cpu", "ascend", "standin"]
Device = Annotated[int, msgspec.Meta(ge=0)]  # as the agents' processes see them
Runtime = Literal["mindspore", "mindspore_lite"]
WeightFormat = Literal["float32", "bfloat16", "float16", "int8", "gguf"]  # of the large weights: models.weight_format
CacheDtype = Literal["float32", "bfloat16", "float16", "int8"]
StandinFault = Literal["raise", "crash", "hang", "differ"]

# A prompt template names one of these, or spells itself out with "{prompt}" in it.
PROMPT_TEMPLATES = {
    "internlm": "<s><|User|>:{prompt}<eoh>\n<|Bot|>:",
    "llama2": "[INST] {prompt} [/INST]",
}
ChatTemplateName = Literal["internlm", "llama2"]
ANSWER_ENDS = {"internlm": "<eoa>"}  # by template, of a prompt or a chat: what models write after an answer
AUTO = "auto"  # of models.cache_memory
CHAT_TEMPLATE = "chat"  # the exported model's own chat template, as one user message


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file and the key."""


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one model accepts at a time; beyond it a request is refused by name, never dropped."""

    max_num_seqs: Positive = 64  # rows of one step
    max_num_batched_tokens: Positive = 512  # tokens of one step
    max_waiting: Positive = 1024  # requests in the queue
    max_queue_seconds: PositiveSeconds | None = 300.0  # until a request's first step
    max_seconds: PositiveSeconds | None = None  # from arrival to the answer's end, which is cut then
    max_prompt_tokens: Positive | None = None  # None: what the context and the cache hold
    max_new_tokens: Positive | None = None
    prefix_caching: bool = True  # requests share the cache blocks of a begin that they have in common
    max_connections: Positive = 4096  # of clients; each takes a file of this process
    max_body_bytes: Positive = 2 << 20
    max_stop_strings: Positive = 16
    max_top_n_tokens: Positive = 20
    max_answers: Positive = 128  # to one request: its prompts times n, or best_of; each takes a place in the queue
    max_grammar_bytes: Positive = 32 << 10  # of a JSON schema, regular expression or grammar
    max_grammar_seconds: PositiveSeconds = 0.5  # of one core, to compile it
    start_seconds: PositiveSeconds = 1800.0  # of a group of agents until all are ready; graphs may be compiled in it
    step_seconds: Seconds = 30.0  # of a step, and for each of its tokens …
    step_seconds_per_token: Seconds = 0.5  # … before its agent is taken to hang; far more than any honest step

    def step_deadline(self, num_tokens: int) -> float:
        """Seconds after which a step of so many tokens is overdue: its agent hangs and is started anew."""
        return self.step_seconds + self.step_seconds_per_token * num_tokens


class LoggingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the logs go and what may stand in them."""

    folder: str = "output"
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"  # json: one object a line
    file_size: str = "16MiB"  # of each process's log before it is rotated
    files_kept: Positive = 4  # of those that were rotated away
    prompts: bool = False  # prompts are private: off unless asked for

    @property
    def file_bytes(self) -> int:
        """The size of a log file before it is rotated."""
        return parse_size(self.file_size)


class MetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How ``/metrics`` names what it counts."""

    prefix: str = "mindspore_llm_"  # "vllm:" for boards and alerts that were made for vLLM


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One exported model, the names it answers to and the agents that run it."""

    path: str
    names: tuple[str, ...]
    agent_ports: tuple[Port, ...]  # one group after another, in each the ranks in order
    data_parallel: Positive = 1  # groups of agents, each with the whole model
    target: Target = "cpu"
    runtime: Runtime = "mindspore"
    agent_host: str = "127.0.0.1"
    weights: WeightFormat | None = None  # what the export must have; None: any
    cache_memory: str = "1GiB"  # of each agent, for keys and values; AUTO: most of what an NPU has left
    cache_dtype: CacheDtype = "float16"  # half the memory traffic of float32, and its text but for near ties
    threads: Positive | None = None  # of each agent; None: its share of the physical cores
    device_start: Device | None = None  # the first agent's; the others have the next ones; None: 0, unless …
    devices: tuple[Device, ...] | None = None  # … they are listed, one for each agent
    prompt_templates: dict[str, str] = {}  # by served name, for the /models routes
    chat_templates: dict[str, ChatTemplateName] = {}  # by served name; not listed: the exported model's own
    step_seconds: Seconds = 0.0  # stand-in only: the least time of a step
    standin_faults: dict[str, StandinFault] = {}  # stand-in only: what a text in prompt or answer does to its step
    secret_file: str | None = None  # shared by app and agents; None: one beside the logs
    prefill_lengths: tuple[Positive, ...] = ()  # mindspore_lite only, as the next four: tokens of its prefill gears …
    decode_rows: tuple[Positive, ...] = ()  # … and rows of its decode gears; (): powers of two up to the limits
    prefill_ini: str | None = None  # the graph's own configuration file, in place of one with these gears
    decode_ini: str | None = None
    rank_table: str | None = None  # the file that tells HCCL of the ranks; None: one rank

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The ports of each group of agents, in the order of its ranks."""
        size = len(self.agent_ports) // self.data_parallel
        return tuple(self.agent_ports[first : first + size] for first in range(0, len(self.agent_ports), size))

    @property
    def device_ids(self) -> tuple[int, ...]:
        """The device of each agent, in the order of ``agent_ports``."""
        first = self.device_start or 0
        return tuple(range(first, first + len(self.agent_ports))) if self.devices is None else self.devices

    @property
    def cache_bytes(self) -> int | None:
        """The cache budget of one agent, in bytes; None: its agent sees what its device has left."""
        return None if self.cache_memory == AUTO else parse_size(self.cache_memory)

    def prompt_template(self, name: str) -> str | None:
        """The template of one served name with ``{prompt}`` in it, ``CHAT_TEMPLATE``, or None: the text as it came."""
        template = self.prompt_templates.get(name)
        return None if template is None else PROMPT_TEMPLATES.get(template, template)


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole deployment."""

    models: tuple[ModelConfig, ...]
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    logging: LoggingConfig = LoggingConfig()
    metrics: MetricsConfig = MetricsConfig()

    def model(self, name: str) -> ModelConfig | None:
        """The model that serves ``name``, if one does."""
        return next((model for model in self.models if name in model.names), None)

    def secret_path(self, model: ModelConfig) -> Path:
        """The file with the secret that this model's agents and the app share."""
        return Path(model.secret_file or Path(self.logging.folder) / f"agents-{model.agent_ports[0]}.secret")

    def state_path(self, model: ModelConfig, group: int = 0) -> Path:
        """The file in which the launcher of this model's agents says how those of one group are."""
        return Path(self.logging.folder) / f"agents-{model.groups[group][0]}.state"


def parse_size(text: str) -> int:
    """``"512MiB"`` → bytes. Units: B, KiB, MiB, GiB, TiB (powers of 1,024) and KB, MB, GB, TB (powers of 1,000)."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB or 1GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def load(path: str | Path) -> ServingConfig:
    """Read and check one deployment file.

    Relative paths in it are meant from the current folder, as on a command line.

    Raises:
        ConfigError: the file is missing, is not YAML, has an unknown key, a wrong type or a value out of range.
    """
    raw = read_yaml(path)
    try:
        config = msgspec.convert(raw, ServingConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_explain(str(error))}") from None
    for problem in _problems(config):
        raise ConfigError(f"{path}: {problem}")
    return config


def read_yaml(path: str | Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or has a key twice.
    """
    path = Path(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain values. A key given twice is an error: the last one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """One mapping of the file.

        Raises:
            ConfigError: one of its keys is there twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConfigError(f"{key.value}: given twice, the second time in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _explain(error: str) -> str:
    """msgspec's message in the words of the file: ``server.prot: unknown key, did you mean port?``"""
    message, _, place = error.partition(" - at `")
    place = place.rstrip("`").removeprefix("$").removeprefix(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message)
    record = _record_at(place)
    if not unknown:
        place = place.removesuffix("[...]")  # one of a mapping's values
        field = typing.get_type_hints(record).get(place.rpartition(".")[2])
        if typing.get_origin(field) is dict:
            field = typing.get_args(field)[1]
        choices = typing.get_args(field) if typing.get_origin(field) is Literal else ()
        message += f"; one of {', '.join(choices)}" if choices else ""
        return f"{place}: {message}" if place else message
    known = record.__struct_fields__
    close = difflib.get_close_matches(unknown[1], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
    return f"{place + '.' if place else ''}{unknown[1]}: unknown key, {hint}"


def _record_at(place: str) -> type[msgspec.Struct]:
    """The record that a place like ``models[0]`` or ``server`` in the file is read into."""
    records: dict[str, type[msgspec.Struct]] = {
        "models": ModelConfig,
        "server": ServerConfig,
        "limits": LimitsConfig,
        "logging": LoggingConfig,
        "metrics": MetricsConfig,
    }
    return records.get(re.split(r"[.\[]", place)[0], ServingConfig)


def _problems(config: ServingConfig) -> Iterator[str]:
    """What the types cannot say: each problem names its key."""
    if not config.models:
        yield "models: needs at least one model"
    for key in config.limits.__struct_fields__:
        if isinstance(value := getattr(config.limits, key), float) and not math.isfinite(value):
            yield f"limits.{key}: needs a finite number"
    hosts = [("server.host", config.server.host)]
    hosts += [(f"models[{i}].agent_host", model.agent_host) for i, model in enumerate(config.models)]
    for key, host in hosts:
        if not is_loopback(host) and not config.server.allow_remote:
            yield f"{key}: {host} is not loopback; set server.allow_remote: true if other machines may connect"
    yield from server_problems(config.server)
    try:
        if config.logging.file_bytes < 1:
            yield "logging.file_size: must be more than nothing"
    except ValueError as error:
        yield f"logging.file_size: {error}"
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", config.metrics.prefix):
        yield f"metrics.prefix: {config.metrics.prefix!r} cannot begin a Prometheus name; use letters, digits, '_', ':'"
    names: dict[str, str] = {}
    owners: dict[int, str] = {}  # of devices
    addresses = {(config.server.host, config.server.port): "server.port"}
    for i, model in enumerate(config.models):
        yield from _model_problems(f"models[{i}]", model)
        for name in model.names:
            if name in names:
                yield f"models[{i}].names: {name} is served by {names[name]} already"
            names[name] = f"models[{i}]"
        for device in model.device_ids if model.target == "ascend" else ():
            if device in owners:
                yield f"models[{i}].devices: device {device} has an agent of {owners[device]} already; choose others"
            owners[device] = f"models[{i}]"
        for port in model.agent_ports:
            owner = addresses.setdefault((model.agent_host, port), f"models[{i}].agent_ports")
            if owner != f"models[{i}].agent_ports" or model.agent_ports.count(port) > 1:
                yield f"models[{i}].agent_ports: port {port} is taken by {owner} already"


def _model_problems(key: str, model: ModelConfig) -> Iterator[str]:
    if not model.names:
        yield f"{key}.names: needs at least one name"
    for name in model.names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            yield f"{key}.names: {name!r} cannot stand in a URL; use letters, digits, '.', '_' and '-'"
    if not model.agent_ports:
        yield f"{key}.agent_ports: needs one port for each rank of the model"
    if len(model.agent_ports) % model.data_parallel:
        ports, groups = len(model.agent_ports), model.data_parallel
        yield f"{key}.agent_ports: {ports} ports do not make {groups} groups of one size (data_parallel)"
    if model.cache_memory == AUTO and model.target != "ascend":
        yield f"{key}.cache_memory: {AUTO} is for target ascend; write a size like 1GiB"
    try:
        _ = model.cache_bytes
    except ValueError as error:
        yield f"{key}.cache_memory: {error}"
    for name, template in model.prompt_templates.items():
        if name not in model.names:
            yield f"{key}.prompt_templates: {name} is not among the names of this model"
        if template not in (*PROMPT_TEMPLATES, CHAT_TEMPLATE) and "{prompt}" not in template:
            known = ", ".join((*PROMPT_TEMPLATES, CHAT_TEMPLATE))
            yield f"{key}.prompt_templates.{name}: {template!r} is none of {known}, nor a text with {{prompt}} in it"
    for name in model.chat_templates:
        if name not in model.names:
            yield f"{key}.chat_templates: {name} is not among the names of this model"
    if not math.isfinite(model.step_seconds):
        yield f"{key}.step_seconds: needs a finite number"
    if model.step_seconds and model.target != "standin":
        yield f"{key}.step_seconds: only the stand-in model has a chosen step time"
    if model.standin_faults and model.target != "standin":
        yield f"{key}.standin_faults: only the stand-in model has faults of choice"
    yield from _lite_problems(key, model)
    if "" in model.standin_faults:
        yield f"{key}.standin_faults: an empty text would be in every prompt"
    if model.cache_dtype != "float16" and model.target == "standin":
        yield f"{key}.cache_dtype: the stand-in model has a cache of its own kind"
    for name in ("devices", "device_start"):
        if getattr(model, name) is not None and model.target != "ascend":
            yield f"{key}.{name}: only models with target ascend have devices"
    if model.devices is not None and model.device_start is not None:
        yield f"{key}.device_start: devices are listed already; leave one of the two out"
    elif len(model.device_ids) != len(model.agent_ports):
        devices, agents = len(model.device_ids), len(model.agent_ports)
        yield f"{key}.devices: {devices} devices are not one for each of {agents} agents"
    if model.weights is not None and model.target == "standin":
        yield f"{key}.weights: the stand-in model has none"
    if model.threads is not None and model.target == "standin":
        yield f"{key}.threads: the stand-in model computes in one thread"


def _lite_problems(key: str, model: ModelConfig) -> Iterator[str]:
    """What is wrong with the keys of the runtime mindspore_lite."""
    if model.runtime == "mindspore_lite" and model.target != "ascend":
        yield f"{key}.runtime: mindspore_lite runs models for target ascend only"
    for name in ("prefill_lengths", "decode_rows", "prefill_ini", "decode_ini", "rank_table"):
        if getattr(model, name) and model.runtime != "mindspore_lite":
            yield f"{key}.{name}: only with runtime mindspore_lite"
    if model.rank_table and model.data_parallel > 1:
        yield f"{key}.rank_table: is of one group; serve each of the {model.data_parallel} groups as a model of its own"
    for sizes, ini in (("prefill_lengths", "prefill_ini"), ("decode_rows", "decode_ini")):
        if getattr(model, sizes) and getattr(model, ini):
            yield f"{key}.{sizes}: the gears stand in {ini} already; give one of the two"
