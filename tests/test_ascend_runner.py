"""The runner of models for Ascend, on the CPU: with mirrored graphs in the place of the files that only an NPU runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import msgspec
import numpy as np
import pytest
from mindspore import Tensor
from mirrored_network import BLOCK_SIZE, NUM_BLOCKS, Array, MirroredModel, portable_logits
from paged_rows import Row, step
from tiny_checkpoints import BOS, VOCAB_SIZE, write_tiny

from agent.acceptance import PROOF
from agent.ascend_runner import AscendRunner, Graphs, auto_bytes, open_ascend_runner, step_inputs, take_device
from agent.placement import Place
from agent.runner import RunnerBroken
from config.manifest import GraphTensor, Manifest, ManifestError, TokenizerRules, write_manifest
from config.serving_config import LimitsConfig
from models.ascend_graphs import NAMES, input_names
from models.checkpoint import Checkpoint, open_checkpoint

LIMITS = LimitsConfig(max_num_seqs=2, max_num_batched_tokens=8)
PLACE = Place(rank=0, world_size=1, device=0, threads=1, cpus=frozenset())
TOLERANCE = 1e-4  # of a logit, in float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny("llama", folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def graphs(checkpoint: Checkpoint) -> Graphs:
    return MirroredModel(checkpoint).graphs


@pytest.fixture(scope="module")
def runner(checkpoint: Checkpoint, graphs: Graphs) -> AscendRunner:
    return open_runner(manifest_of(checkpoint), graphs)


def manifest_of(checkpoint: Checkpoint) -> Manifest:
    """What an export would say of the mirrored network."""
    config = checkpoint.config
    cache = (-1, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    shapes = [(-1, -1) if name == "block_tables" else (-1,) for name in NAMES] + [cache] * 2 * config.num_layers
    dtypes = ["int32"] * len(NAMES) + ["float32"] * 2 * config.num_layers
    names = input_names(config.num_layers)
    return Manifest(
        name="tiny",
        architecture=config.architecture,
        target="ascend",
        source="tiny",
        source_digest="0",
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        cache_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        block_size=BLOCK_SIZE,
        cache_write="graph",
        tokenizer=TokenizerRules(bos_token_id=BOS, add_bos=True, eos_token_ids=(1,)),
        inputs=tuple(GraphTensor(*entry) for entry in zip(names, dtypes, shapes, strict=True)),
    )


def open_runner(manifest: Manifest, graphs: Graphs) -> AscendRunner:
    def cache(tensor: GraphTensor, blocks: int) -> Tensor:
        return Tensor.from_numpy(np.zeros((blocks, *tensor.shape[1:]), np.float32))

    return AscendRunner(Path("tiny"), manifest, graphs, cache, lambda: NUM_BLOCKS, LIMITS)


def random_tokens(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]


def assert_close(actual: Array, *expected: Array) -> None:
    assert np.abs(actual - np.concatenate(expected)).max() < TOLERANCE


def test_steps_of_every_kind_have_the_logits_of_portable_operators(
    checkpoint: Checkpoint, runner: AscendRunner
) -> None:
    a, b = Row([5, 3, 9], random_tokens(1, 40)), Row([1, 8, 2], random_tokens(2, 40))
    expected = [portable_logits(checkpoint, row.tokens) for row in (a, b)]
    prompts = runner.run(step([a, b], [19, 5], BLOCK_SIZE, every_position=True)).values
    assert_close(prompts, expected[0][:19], expected[1][:5])
    mixed = runner.run(step([b, a], [12, 1], BLOCK_SIZE)).values
    assert_close(mixed, expected[1][16:17], expected[0][19:20])
    decoded = runner.run(step([a, b], [1, 1], BLOCK_SIZE)).values
    assert_close(decoded, expected[0][20:21], expected[1][17:18])


def test_rows_that_fill_up_a_step_change_none_of_its_logits(checkpoint: Checkpoint, runner: AscendRunner) -> None:
    """Three rows of 16 tokens become four: prompts get a row of padding with them, chunks are cut."""
    rows = [Row([1, 2], random_tokens(7, 30)), Row([3, 4], random_tokens(8, 30)), Row([5, 6], random_tokens(9, 30))]
    expected = [portable_logits(checkpoint, row.tokens) for row in rows]
    prompts = runner.run(step(rows, [2, 13, 1], BLOCK_SIZE, every_position=True)).values
    assert_close(prompts, expected[0][:2], expected[1][:13], expected[2][:1])
    chunks = runner.run(step(rows, [1, 1, 14], BLOCK_SIZE, every_position=True)).values
    assert_close(chunks, expected[0][2:3], expected[1][13:14], expected[2][1:15])
    more = runner.run(step(rows, [9, 5, 3], BLOCK_SIZE)).values  # 17 tokens become 32
    assert_close(more, expected[0][11:12], expected[1][18:19], expected[2][17:18])


def test_a_copied_block_is_read_like_the_one_it_comes_from(checkpoint: Checkpoint, runner: AscendRunner) -> None:
    row = Row([4], random_tokens(3, 10))
    runner.run(step([row], [9], BLOCK_SIZE))
    runner.copy_blocks(np.array([[4, 6], [4, 7], [4, 10]], np.int32))
    expected = portable_logits(checkpoint, row.tokens)[9:]
    for block in (6, 7, 10):
        copied = Row([block], row.tokens, computed=9)
        assert_close(runner.run(step([copied], [1], BLOCK_SIZE)).values, expected)


def test_a_step_may_want_no_logits(runner: AscendRunner) -> None:
    batch = replace(step([Row([1], random_tokens(5, 4))], [4], BLOCK_SIZE), logits_indices=np.zeros(0, np.int32))
    assert runner.run(batch).values.shape == (0, VOCAB_SIZE)


def recorded(graph: Callable[..., Any], calls: list[list[Tensor]]) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> Any:
        calls.append(list(inputs))
        return graph(*inputs)

    return run


@pytest.mark.slow
def test_every_size_of_every_graph_is_run_before_the_cache_is_made(checkpoint: Checkpoint, graphs: Graphs) -> None:
    calls: dict[str, list[list[Tensor]]] = {phase: [] for phase in graphs.steps}
    steps = {phase: recorded(graph, calls[phase]) for phase, graph in graphs.steps.items()}
    open_runner(manifest_of(checkpoint), replace(graphs, steps=steps))
    for phase, sizes in (("prefill", [16, 8, 4, 2]), ("chunk", [8, 4, 2]), ("decode", [2, 1])):
        warm_up = [inputs for inputs in calls[phase] if inputs[-1].shape[0] == 3]
        assert list(dict.fromkeys(inputs[0].shape[0] for inputs in warm_up)) == sizes, phase
        proof = [inputs for inputs in calls[phase] if inputs[-1].shape[0] == NUM_BLOCKS]
        assert proof, phase


@pytest.mark.slow
def test_the_log_has_the_proof_that_an_acceptance_looks_for(
    checkpoint: Checkpoint, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="agent"):
        open_runner(manifest_of(checkpoint), graphs)
    assert len([record for record in caplog.messages if PROOF in record]) == 1


@pytest.mark.slow
def test_graphs_are_fed_in_the_order_of_the_manifest(checkpoint: Checkpoint, graphs: Graphs) -> None:
    manifest = manifest_of(checkpoint)
    reversed_inputs = tuple(reversed(manifest.inputs[: len(NAMES)])) + manifest.inputs[len(NAMES) :]
    other = msgspec.structs.replace(manifest, inputs=reversed_inputs)

    def in_our_order(graph: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: graph(*reversed(inputs[: len(NAMES)]), *inputs[len(NAMES) :])

    steps = {phase: in_our_order(graph) for phase, graph in graphs.steps.items()}
    assert [tensor.name for tensor in step_inputs(other)] == list(reversed(NAMES))
    runner = open_runner(other, replace(graphs, steps=steps))
    tokens = random_tokens(6, 7)
    logits = runner.run(step([Row([2], tokens)], [7], BLOCK_SIZE, every_position=True)).values
    assert_close(logits, portable_logits(checkpoint, tokens))


@pytest.mark.parametrize("phase", [pytest.param("decode", marks=pytest.mark.slow), "chunk"])
def test_a_graph_with_a_cache_of_its_own_is_found_out(checkpoint: Checkpoint, graphs: Graphs, phase: str) -> None:
    def apart(*inputs: Tensor) -> Any:
        caches = [Tensor(np.zeros_like(cache.asnumpy())) for cache in inputs[len(NAMES) :]]
        return graphs.steps[phase](*inputs[: len(NAMES)], *caches)

    steps = {**graphs.steps, phase: apart}
    with pytest.raises(ManifestError, match=f"prefill and {phase} do not share their caches"):
        open_runner(manifest_of(checkpoint), replace(graphs, steps=steps))


def test_an_operator_that_fails_breaks_the_runner(checkpoint: Checkpoint, graphs: Graphs) -> None:
    def fail(*inputs: Tensor) -> Any:
        raise RuntimeError("Launch kernel failed, name: PagedAttention\nmore")

    with pytest.raises(RunnerBroken, match=r"^Launch kernel failed, name: PagedAttention$"):
        open_runner(manifest_of(checkpoint), replace(graphs, steps={**graphs.steps, "decode": fail}))


@pytest.mark.skipif(ms.hal.is_available("Ascend"), reason="there is an NPU")
def test_where_there_is_no_npu_it_says_so_in_one_sentence(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"^target: ascend needs an Ascend NPU .* finds none here$"):
        take_device(0)
    write_manifest(tmp_path, manifest_of(checkpoint))
    with pytest.raises(ManifestError, match="finds none here"):
        open_ascend_runner(tmp_path, PLACE, cache_bytes=None, cache_dtype="float32", limits=LIMITS)


def test_auto_takes_most_of_what_the_device_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    free = [1000, 0]

    def properties(device: int, target: str) -> SimpleNamespace:
        asked.append((device, target))
        return SimpleNamespace(free_memory=free[len(asked) - 1])

    monkeypatch.setattr(ms.hal, "get_device_properties", properties)
    assert auto_bytes(3) == 900
    with pytest.raises(ManifestError, match=r"^cache_memory: auto: .* write a size$"):
        auto_bytes(3)
    assert asked == [(3, "Ascend")] * 2


def test_the_cache_has_the_dtype_of_the_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest_of(checkpoint))
    with pytest.raises(ManifestError, match="a cache of its weights' dtype on Ascend: float32, not float16"):
        open_ascend_runner(tmp_path, PLACE, cache_bytes=None, cache_dtype="float16", limits=LIMITS)
