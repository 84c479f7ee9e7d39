"""The Cells that are exported for Ascend, run on the CPU with mirrors of the NPU's operators, against portable ones."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.common.np_dtype import bfloat16
from mirrored_network import BLOCK_SIZE, Array, MirroredModel, portable_logits
from paged_rows import Row, step
from tiny_checkpoints import VOCAB_SIZE, write_tiny

from agent.step_batch import StepBatch
from models import ascend_mirror
from models.checkpoint import open_checkpoint
from models.collectives import Share
from models.sharding import shards

TOLERANCE = 1e-4  # of a logit, in float32
SLOW = ("llama3", "internlm2", "qwen2")
FAMILIES = ("internlm", "qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))


def random_tokens(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_chunks_and_decoding_have_the_logits_of_portable_operators(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = MirroredModel(checkpoint)
    a, b, c = (
        Row([5, 3, 9], random_tokens(1, 40)),
        Row([1, 8, 2], random_tokens(2, 40)),
        Row([4, 7], random_tokens(3, 30)),
    )
    expected = [portable_logits(checkpoint, row.tokens) for row in (a, b, c)]

    prompts = model.run("prefill", step([a, b], [19, 5], BLOCK_SIZE, every_position=True))
    assert_close(prompts, [expected[0][:19], expected[1][:5]])
    mixed = model.run("chunk", step([b, a, c], [27, 1, 17], BLOCK_SIZE, every_position=True))  # a chunk, one, a prompt
    assert_close(mixed, [expected[1][5:32], expected[0][19:20], expected[2][:17]])
    decoded = model.run("decode", step([c, a, b], [1, 1, 1], BLOCK_SIZE))
    assert_close(decoded, [expected[2][17:18], expected[0][20:21], expected[1][32:33]])


def assert_close(actual: Array, expected: list[Array]) -> None:
    assert np.abs(actual - np.concatenate(expected)).max() < TOLERANCE


def test_negative_slots_are_not_written() -> None:
    cache = [Tensor.from_numpy(np.zeros((2, 4, 1, 2), np.float16)) for _ in range(2)]
    new = Tensor(np.arange(1, 7, dtype=np.float16).reshape(3, 2))
    ascend_mirror.ReshapeAndCache()(new, new, *cache, Tensor(np.array([5, -1, 0], np.int32)))
    written = np.zeros((8, 2))
    written[5], written[0] = (1, 2), (5, 6)
    for tensor in cache:
        assert tensor.asnumpy().reshape(8, 2).tolist() == written.tolist()


def test_what_the_operators_documentation_rules_out_is_refused() -> None:
    numbers = Tensor(np.zeros((3, 4), bfloat16))
    lengths = Tensor(np.array([3], np.int64))
    triangle = Tensor(np.triu(np.ones((128, 128), bfloat16), 1))
    flash = ascend_mirror.FlashAttentionScore(2, 1.0, 9, 9, "TH")
    with pytest.raises(ValueError, match="int64 where Ascend's operators take int32"):
        flash(numbers, numbers, numbers, None, None, None, triangle, None, lengths, lengths)
    lengths = Tensor(np.array([1, 3], np.int32))  # summed up, as layout TND would have it
    with pytest.raises(ValueError, match="lengths do not add up to the tokens"):
        flash(numbers, numbers, numbers, None, None, None, triangle, None, lengths, lengths)
    cache = Tensor(np.zeros((2, 2, 2, 2), np.float16))
    with pytest.raises(ValueError, match=r"BFloat16 into a cache of Float16"):
        ascend_mirror.ReshapeAndCache()(numbers, numbers, cache, cache, Tensor(np.array([1, 2, 3], np.int32)))
    paged = ascend_mirror.PagedAttention(2, 1.0, 2)
    one = Tensor(np.array([1], np.int32))
    with pytest.raises(ValueError, match="a block is beyond the cache"):
        paged(numbers[:1], cache, cache, Tensor(np.array([[2]], np.int32)), one)


class Meeting(nn.Cell):  # type: ignore[misc]
    """Stands for AllReduce among ranks that are threads: each brings a tensor and goes on with the sum.

    Only one of them runs MindSpore's operators at a time, as they do not stand being launched by two threads: it has
    the ``turn``, and gives it away while it waits.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(auto_prefix=False)
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.brought: dict[int, Array] = {}

    def construct(self, x: Tensor) -> Tensor:
        self.brought[threading.get_ident()] = x.asnumpy()
        self.wait()
        total = np.sum(list(self.brought.values()), axis=0)
        self.wait()
        return Tensor(total)

    def wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["internlm", "qwen3"])
def test_two_ranks_have_the_logits_of_the_whole(family: str, tmp_path: Path) -> None:
    """In a process of its own: MindSpore runs no operators in threads once others have run in a process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(compare_two_ranks, family, tmp_path).result()


def compare_two_ranks(family: str, folder: Path) -> None:
    write_tiny(family, folder)
    checkpoint = open_checkpoint(folder)
    reduce = Meeting(2)
    ranks = [MirroredModel(shard, Share(shard.first_token, reduce)) for shard in shards(checkpoint, 2)]
    expected = portable_logits(checkpoint, random_tokens(1, 40))
    row = Row([5, 3, 9], random_tokens(1, 40))
    batches = [
        (phase, step([row], [length], BLOCK_SIZE, every_position=True))
        for phase, length in (("prefill", 19), ("chunk", 7), ("decode", 1))
    ]

    def run(rank: MirroredModel, phase: str, batch: StepBatch) -> Array:
        with reduce.turn:
            return rank.run(phase, batch)

    with ThreadPoolExecutor(2) as threads:
        for phase, batch in batches:
            parts = threads.map(run, ranks, [phase] * 2, [batch] * 2)
            assert_close(np.concatenate(list(parts), axis=1), [expected[batch.positions]])
