"""What can be known to go wrong before an agent is started."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from agent.listener import bind
from agent.lite_gears import GearError
from agent.lite_ini import pair_gears
from agent.lite_runner import WHERE_FROM
from agent.placement import PlacementError, host_device
from config.manifest import ManifestError, read_manifest
from config.secret_file import SecretError, read_secret
from config.serving_config import LimitsConfig, ModelConfig, ServingConfig

MIN_BLOCKS = 3  # the null block, and two for the proof that prefill and decode share a cache


class LaunchError(Exception):
    """The agents cannot be started; the message is for the operator."""


def check(config: ServingConfig) -> None:
    """Check folders, ports, sizes and secrets of a deployment, and create its logging folder.

    Raises:
        LaunchError: the first problem, by the key of the configuration that names it.
    """
    try:
        Path(config.logging.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"logging.folder: {config.logging.folder}: {error.strerror}") from None
    if not os.access(config.logging.folder, os.W_OK):
        raise LaunchError(f"logging.folder: {config.logging.folder}: not writable")
    for problem in problems(config):
        raise LaunchError(problem)


def problems(config: ServingConfig) -> Iterator[str]:
    """All that is wrong with folders, ports, sizes and secrets, each by the key of the configuration that names it."""
    for index, model in enumerate(config.models):
        checks = (
            _model_problems(model),
            _lite_problems(model, config.limits),
            _port_problems(model),
            _device_problems(model),
            _secret_problems(model),
        )
        for key, problem in itertools.chain.from_iterable(checks):
            yield f"models[{index}].{key}: {problem}"


def _model_problems(model: ModelConfig) -> Iterator[tuple[str, str]]:
    try:
        manifest = read_manifest(model.path)
    except ManifestError as error:
        yield "path", str(error)
        return
    if manifest.target != model.target:
        yield "target", f"{model.path} is exported for {manifest.target}, not for {model.target}"
    ranks = len(model.groups[0])
    if model.target != "standin" and manifest.world_size != ranks:  # each rank of a stand-in computes the whole rule
        yield (
            "agent_ports",
            f"{model.path} is exported for {manifest.world_size} rank(s), so each group needs as many, not {ranks}",
        )
    cache_dtype = "int32" if model.target == "standin" else model.cache_dtype
    if model.target != "standin":
        try:
            manifest.check_cache_dtype(cache_dtype)
        except ManifestError as error:
            yield "cache_dtype", str(error)
        try:
            manifest.check_weights(model.weights)
        except ManifestError as error:
            yield "weights", str(error)
    block_bytes = manifest.cache_block_bytes(cache_dtype)
    blocks = manifest.pair.num_blocks if manifest.pair else MIN_BLOCKS
    if manifest.pair and manifest.world_size > 1 and model.runtime == "mindspore":
        yield "runtime", f"the pairs of {model.path} are of {manifest.world_size} ranks, which only mindspore_lite runs"
    if model.cache_bytes is None and manifest.pair:
        yield "cache_memory", f"the graphs of {model.path} hold their cache: write at least {blocks * block_bytes}B"
    if model.cache_bytes is not None and model.cache_bytes < blocks * block_bytes:
        yield "cache_memory", f"{model.cache_memory} holds fewer than {blocks} blocks of {block_bytes} bytes"


def _lite_problems(model: ModelConfig, limits: LimitsConfig) -> Iterator[tuple[str, str]]:
    """What is wrong with a model that MindSpore Lite is to run, beside what ``_model_problems`` finds."""
    if model.runtime != "mindspore_lite":
        return
    try:
        manifest = read_manifest(model.path)
    except ManifestError:
        return
    if manifest.pair is None:
        yield "runtime", f"mindspore_lite runs adopted pairs only, and {model.path} is an export of ours"
        return
    if manifest.world_size > 1 and not model.rank_table:
        yield "rank_table", f"{model.path} has {manifest.world_size} ranks, which find each other by a rank table"
    if model.rank_table and not Path(model.rank_table).is_file():
        yield "rank_table", f"{model.rank_table}: no such file"
    try:
        pair_gears(model, limits, manifest)
    except GearError as error:
        yield error.key, str(error)
    if find_spec("mindspore_lite") is None:
        yield "runtime", f"mindspore_lite is not installed: {WHERE_FROM}"


def _port_problems(model: ModelConfig) -> Iterator[tuple[str, str]]:
    for port in model.agent_ports:
        try:
            bind(model.agent_host, port).close()
        except OSError as error:
            yield "agent_ports", f"cannot listen on {model.agent_host}:{port}: {error.strerror}"


def _device_problems(model: ModelConfig) -> Iterator[tuple[str, str]]:
    wrong: dict[str, None] = {}  # in their order; a variable that cannot be read is wrong for every device alike
    for device in model.device_ids if model.target == "ascend" else ():
        try:
            host_device(device)
        except PlacementError as error:
            wrong[str(error)] = None
    yield from (("devices", problem) for problem in wrong)


def _secret_problems(model: ModelConfig) -> Iterator[tuple[str, str]]:
    if model.secret_file:
        try:
            read_secret(Path(model.secret_file))
        except SecretError as error:
            yield "secret_file", str(error)
