"""The default model in each format of its weights: how far its greedy text goes with that of float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from default_model import NEW_TOKENS, PROMPTS, default_model
from paged_rows import Row, step
from tiny_checkpoints import write_tiny
from tokenizers import Tokenizer

from agent.logits import Logits
from agent.model_runner import ModelRunner
from config.manifest import read_manifest
from config.serving_config import WeightFormat
from kernels import library
from models import export
from models.checkpoint import Checkpoint, open_checkpoint
from models.weight_format import read_blocks

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")

Tokens = list[list[int]]
# The least mean number of tokens, of 48: below what benchmarks.quality measures on four times as many prompts
BOUNDS: dict[WeightFormat, float] = {"bfloat16": 36.0, "int8": 18.0, "gguf": 20.0}


def open_model(folder: Path) -> ModelRunner:
    return ModelRunner(folder, cache_bytes=512 << 20, cache_dtype="float32", threads=None)


@pytest.fixture(scope="module")
def prompts() -> Tokens:
    tokenizer = Tokenizer.from_file(str(default_model("float32") / "tokenizer.json"))
    return [encoding.ids for encoding in tokenizer.encode_batch(PROMPTS)]


@pytest.fixture(scope="module")
def reference(prompts: Tokens) -> Tokens:
    """float32's greedy answers, whatever their tokens are."""
    runner = open_model(default_model("float32"))
    size = runner.manifest.block_size
    rows = [Row(blocks_of(i, prompt, size), list(prompt)) for i, prompt in enumerate(prompts)]
    for row in rows:
        row.tokens.append(best(runner, runner.run(step([row], [len(row.tokens)], size)))[0])
    for _ in range(NEW_TOKENS - 1):
        for row, token in zip(rows, best(runner, runner.run(step(rows, [1] * len(rows), size))), strict=True):
            row.tokens.append(token)
    return [row.tokens[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def blocks_of(index: int, prompt: list[int], size: int) -> range:
    """Blocks of its own for a row: enough for any of the prompts and its answer."""
    most = -(-(200 + NEW_TOKENS) // size)
    assert len(prompt) <= 200
    return range(1 + index * most, 1 + (index + 1) * most)


def best(runner: ModelRunner, step_logits: Logits) -> list[int]:
    """The best tokens that do not end an answer."""
    logits = step_logits.values.copy()
    logits[:, list(runner.manifest.tokenizer.eos_token_ids)] = -np.inf
    return [int(token) for token in logits.argmax(axis=1)]


def matched(folder: Path, prompts: Tokens, reference: Tokens) -> float:
    """Tokens, in the mean, until the model at ``folder`` would have chosen another one than float32 did."""
    runner = open_model(folder)
    lengths = []
    for prompt, answer in zip(prompts, reference, strict=True):
        row = Row(blocks_of(0, prompt, runner.manifest.block_size), prompt + answer[:-1])
        logits = runner.run(step([row], [len(row.tokens)], runner.manifest.block_size, every_position=True))
        chosen = best(runner, logits[len(prompt) - 1 :])
        differs = [i for i, (ours, theirs) in enumerate(zip(chosen, answer, strict=True)) if ours != theirs]
        lengths.append(differs[0] if differs else len(answer))
    return sum(lengths) / len(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["gguf", "bfloat16", "int8"])
def test_greedy_text_goes_a_long_way_with_that_of_float32(
    weights: WeightFormat, prompts: Tokens, reference: Tokens, capsys: pytest.CaptureFixture[str]
) -> None:
    mean = matched(default_model(weights), prompts, reference)
    with capsys.disabled():
        print(f"\n{weights}: {mean:.1f} of {NEW_TOKENS} tokens as in float32")
    assert mean >= BOUNDS[weights]


@pytest.mark.slow
def test_float32_goes_all_the_way_with_itself(prompts: Tokens, reference: Tokens) -> None:
    assert matched(default_model("float32"), prompts, reference) > NEW_TOKENS - 2  # but for near ties


@pytest.mark.slow
def test_auto_takes_what_is_known_to_be_best_for_the_default_model(tmp_path: Path) -> None:
    assert export.main(["--output", str(tmp_path / "model")]) == 0
    assert read_manifest(tmp_path / "model").weights == "gguf"


def chosen(wish: WeightFormat | Literal["auto"], operators: export.Operators, checkpoint: Checkpoint) -> WeightFormat:
    options = export.ExportOptions(operators=operators, weights=wish)
    return export.choose_weights(options, checkpoint, "0" * 64)


def test_auto_is_careful_with_other_models_and_exact_without_a_compiler(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "tiny")
    checkpoint = open_checkpoint(tmp_path / "tiny")
    assert chosen("auto", "native", checkpoint) == "bfloat16"
    assert chosen("auto", "portable", checkpoint) == "float32"
    assert chosen("int8", "native", checkpoint) == "int8"
    with pytest.raises(export.CheckpointError, match="--weights int8: standard operators read float32 only"):
        chosen("int8", "portable", checkpoint)


def test_rows_that_are_no_whole_blocks_stay_float32(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "tiny")
    checkpoint = open_checkpoint(tmp_path / "tiny")
    odd = replace(checkpoint, config=replace(checkpoint.config, hidden_size=48))
    assert chosen("auto", "native", odd) == "float32"
    with pytest.raises(export.CheckpointError, match=r"rows of 48 numbers; .*: export with --weights float32"):
        read_blocks(odd, "embed_tokens", "int8")
