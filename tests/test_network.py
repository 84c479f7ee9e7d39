"""Every family, exported to MindIR and run through the paged cache, gives the logits that transformers gives."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from paged_rows import Row, step
from tiny_checkpoints import FAMILIES, VOCAB_SIZE, write_tiny, write_tiny_gguf

from agent import step_parts
from agent.model_runner import ModelRunner
from agent.runner import RunnerBroken
from config.manifest import ManifestError
from config.serving_config import WeightFormat
from kernels import library
from models.export import ExportOptions, Operators, choose_operators
from models.export import export as export_checkpoint

BLOCK_SIZE = 8
TOLERANCE = 1e-3  # of a logit
PACKED_TOLERANCE = 0.1  # of the largest logit, where weights and activations are rounded
OPERATORS: list[Operators] = ["portable", *(["native"] if library.compiler() else [])]
needs_compiler = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")
QUICK = [("llama", "bfloat16"), ("qwen3", "int8")]  # of the packed ones; the others are among the slow tests
DISTINCT = ("llama", "internlm", "qwen3")  # plain, with biases, with norms: all that differs between operators
NATIVE = [("native", "internlm2"), ("native", "qwen3")]  # in make test, beside Llama on either; the others in test-full
CASES = [
    pytest.param((family, operators), id=f"{family}-{operators}", marks=marks)
    for family in FAMILIES
    for operators in OPERATORS
    for marks in [() if family == "llama" or (operators, family) in NATIVE else pytest.mark.slow]
]


def export(checkpoint: Path, folder: Path, operators: Operators, weights: WeightFormat = "float32") -> None:
    """Export as the command line does, in this process."""
    choose_operators(operators)
    export_checkpoint(checkpoint, folder, ExportOptions(operators=operators, weights=weights, block_size=BLOCK_SIZE))


def open_runner(folder: Path, cache_dtype: str = "float32") -> ModelRunner:
    return ModelRunner(folder, cache_bytes=1 << 20, cache_dtype=cache_dtype, threads=2)


def reference_logits(model: torch.nn.Module, tokens: list[int]) -> NDArray[np.float32]:
    """transformers' logits of every position."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def largest_difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module", params=CASES)
def network(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, ModelRunner]:
    family, operators = request.param
    folder = tmp_path_factory.mktemp("network")
    model = write_tiny(family, folder / "checkpoint")
    export(folder / "checkpoint", folder / "exported", operators)
    return model, open_runner(folder / "exported")


def random_tokens(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]


def test_prompts_chunks_mixed_steps_and_decoding_equal_the_reference(
    network: tuple[torch.nn.Module, ModelRunner],
) -> None:
    model, runner = network
    a, b, c = (
        Row([5, 3, 9], random_tokens(1, 20)),
        Row([1, 8, 2, 7], random_tokens(2, 30)),
        Row([4], random_tokens(3, 8)),
    )
    expected = [reference_logits(model, row.tokens) for row in (a, b, c)]

    prompts = runner.run(step([a, b], [13, 5], BLOCK_SIZE, every_position=True)).values
    assert largest_difference(prompts, np.concatenate([expected[0][:13], expected[1][:5]])) < TOLERANCE
    mixed = runner.run(
        step([b, a, c], [17, 1, 7], BLOCK_SIZE, every_position=True)
    ).values  # a chunk, a decoding row, a prompt
    expected_mixed = [expected[1][5:22], expected[0][13:14], expected[2][:7]]
    assert largest_difference(mixed, np.concatenate(expected_mixed)) < TOLERANCE
    decoded = runner.run(step([c, a, b], [1, 1, 1], BLOCK_SIZE)).values
    assert largest_difference(decoded, np.stack([expected[2][7], expected[0][14], expected[1][22]])) < TOLERANCE


def test_padding_rows_and_their_slots_change_nothing(network: tuple[torch.nn.Module, ModelRunner]) -> None:
    model, runner = network
    row, padding = Row([6, 2], random_tokens(4, 12)), Row([0], [0, 0])
    expected = reference_logits(model, row.tokens)
    runner.run(step([padding, row], [1, 9], BLOCK_SIZE))
    decoded = runner.run(step([padding, row], [1, 1], BLOCK_SIZE)).values
    assert largest_difference(decoded[1:], expected[9:10]) < TOLERANCE


def test_a_step_may_want_no_logits(network: tuple[torch.nn.Module, ModelRunner]) -> None:
    _, runner = network
    batch = step([Row([1], random_tokens(5, 4))], [4], BLOCK_SIZE)
    nothing = type(batch)(**{**vars(batch), "logits_indices": np.zeros(0, dtype=np.int32)})
    assert runner.run(nothing).values.shape == (0, VOCAB_SIZE)


@needs_compiler
@pytest.mark.parametrize(
    ("family", "weights"),
    [
        pytest.param(family, weights, marks=[] if (family, weights) in QUICK else pytest.mark.slow)
        for family in DISTINCT
        for weights in ("bfloat16", "int8")
    ],
)
def test_packed_weights_change_logits_a_little(family: str, weights: WeightFormat, tmp_path: Path) -> None:
    model = write_tiny(family, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported", "native", weights)
    assert_similar(open_runner(tmp_path / "exported"), model)


@needs_compiler
@pytest.mark.parametrize(
    "kind", ["Q4_1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Q4_0", "Q8_0", "BF16", "Q5_0"))]
)
def test_the_blocks_of_a_gguf_file_are_served_as_they_are(kind: str, tmp_path: Path) -> None:
    write_tiny_gguf("llama", tmp_path / "tiny.gguf", quantization=getattr(gguf.GGMLQuantizationType, kind))
    runners = []
    for weights in ("float32", "gguf"):
        export(tmp_path / "tiny.gguf", tmp_path / weights, "native", weights)
        runners.append(open_runner(tmp_path / weights))
    sizes = [(tmp_path / weights / "weights.bin").stat().st_size for weights in ("float32", "gguf")]
    assert sizes[1] < sizes[0] * (0.6 if kind == "BF16" else 0.35)
    tokens = random_tokens(1, 40)
    exact, packed = (runner.run(step([Row([1, 2, 3, 4, 5], tokens)], [40], BLOCK_SIZE)).values for runner in runners)
    assert largest_difference(exact, packed) < PACKED_TOLERANCE * np.abs(exact).max()


def assert_similar(runner: ModelRunner, model: torch.nn.Module) -> None:
    """A prompt, a chunk on cached context and a decoded token have nearly the reference's logits."""
    row = Row([5, 3, 9], random_tokens(1, 20))
    expected = reference_logits(model, row.tokens)
    parts = [runner.run(step([row], [length], BLOCK_SIZE, every_position=True)).values for length in (9, 10, 1)]
    assert largest_difference(np.concatenate(parts), expected) < PACKED_TOLERANCE * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("operators", OPERATORS)
def test_the_cache_dtype_is_chosen_at_start(operators: Operators, tmp_path: Path) -> None:
    model = write_tiny("llama", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported", operators)
    tokens = random_tokens(6, 10)
    expected = reference_logits(model, tokens)
    blocks = open_runner(tmp_path / "exported").num_blocks
    narrow = {
        "float16": 2.0,
        **({"bfloat16": 2.0, "int8": 3.2} if operators == "native" else {}),
    }  # 16 numbers and a scale
    for dtype, times in narrow.items():
        runner = open_runner(tmp_path / "exported", dtype)
        assert runner.num_blocks == int(times * blocks)
        row = Row([3, 1], tokens)
        runner.run(step([row], [9], BLOCK_SIZE))
        decoded = runner.run(step([row], [1], BLOCK_SIZE)).values
        assert largest_difference(decoded, expected[9:]) < 0.1, dtype


@pytest.mark.slow
def test_standard_operators_refuse_a_cache_that_they_cannot_write(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported", "portable")
    with pytest.raises(ManifestError, match="whose cache is float32 or float16, not int8"):
        open_runner(tmp_path / "exported", "int8")


@pytest.mark.slow
def test_a_large_step_of_standard_operators_is_done_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny("llama", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported", "portable")
    runner = open_runner(tmp_path / "exported")
    assert runner.manifest.capabilities.max_num_batched_tokens == 128

    def logits() -> list[NDArray[np.float32]]:
        rows = [
            Row([5, 3, 9], random_tokens(1, 20)),
            Row([1, 8, 2], random_tokens(2, 20)),
            Row([4], random_tokens(3, 8)),
        ]
        steps = ((9, 1, 4), (1, 9, 1), (1, 1, 2))
        return [runner.run(step(rows, lengths, BLOCK_SIZE, every_position=True)).values for lengths in steps]

    whole = logits()
    calls = []
    call = runner._call
    monkeypatch.setattr(runner, "_call", lambda batch: calls.append(batch.query_lens.tolist()) or call(batch))
    monkeypatch.setattr(step_parts, "MAX_SCORES", 0)
    monkeypatch.setattr(step_parts, "MAX_KEYS", 2 * 2 * BLOCK_SIZE)  # two rows of up to two blocks
    for together, apart in zip(whole, logits(), strict=True):
        assert largest_difference(together, apart) < 1e-5
    assert calls == [[1], [9], [4], [1, 1], [9], [1, 1], [2]]


@needs_compiler
def test_a_runner_whose_operator_failed_says_that_it_is_broken(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported", "native")
    runner = open_runner(tmp_path / "exported")
    with pytest.raises(RunnerBroken, match="PagedAttention: row 0: block 30000 of"):
        runner.run(step([Row([30000], [1, 2])], [2], BLOCK_SIZE))
