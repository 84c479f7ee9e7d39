"""One checked step: the arrays of a ``StepPlan``, safe to index with.

Native kernels trust these numbers, so everything that is used as an index is checked here, once, against the shapes of
the model and the limits of the agent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from agent.protocol import LATEST_TOKEN, Ints, SeatReset, StepPlan, ints


class PlanError(ValueError):
    """A plan that this agent cannot run; the message says which number is wrong."""


@dataclass(frozen=True, kw_only=True)
class StepShapes:
    """What bounds the numbers of a plan."""

    vocab_size: int
    context_length: int
    block_size: int
    num_blocks: int  # with the null block
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What a model is run on: R rows with T new tokens, logits wanted at L positions; all arrays int32.

    Block 0 is the null block: rows for padding or probing write there, and nothing that is read from it matters.
    """

    token_ids: Ints  # [T], the rows one after another
    positions: Ints  # [T], within the request
    slot_mapping: Ints  # [T], block * block_size + offset; -1: not written
    block_tables: Ints  # [R, M], padded with 0
    query_lens: Ints  # [R], new tokens of the row
    context_lens: Ints  # [R], cached and new tokens of the row
    logits_indices: Ints  # [L], indices into token_ids


@dataclass(frozen=True, kw_only=True)
class StepSampling:
    """What is done before a step and after it.

    Of its logits, the first S are sampled, the other P have known successors.
    """

    latest_places: Ints  # [K], indices into token_ids, which get the latest tokens
    latest_seats: Ints  # [K], of these seats
    block_copies: Ints  # [C, 2], from and to
    seats: Ints  # [S]
    prompt_targets: Ints  # [P]
    prompt_top_logprobs: int


def read_plan(plan: StepPlan, shapes: StepShapes) -> tuple[StepBatch, StepSampling]:
    """Take a plan apart and check every number in it.

    Raises:
        PlanError: a number is out of range, or two fields do not fit together.
    """
    query_lens, tables = _numbers("query_lens", plan.query_lens), _numbers("block_tables", plan.block_tables)
    rows = query_lens.size
    _require(rows > 0 and tables.size % rows == 0, f"block_tables: {tables.size} numbers do not fit {rows} rows")
    token_ids = _numbers("token_ids", plan.token_ids)
    latest_places = np.flatnonzero(token_ids == LATEST_TOKEN).astype(np.int32)
    if latest_places.size:
        token_ids = np.where(token_ids == LATEST_TOKEN, 0, token_ids)  # takes the tokens when they are there
    batch = StepBatch(
        token_ids=token_ids,
        positions=_numbers("positions", plan.positions),
        slot_mapping=_numbers("slot_mapping", plan.slot_mapping),
        block_tables=tables.reshape(rows, -1),
        query_lens=query_lens,
        context_lens=_numbers("context_lens", plan.context_lens),
        logits_indices=_numbers("logits_indices", plan.logits_indices),
    )
    seats, sampled_rows = _numbers("seats", plan.seats), _numbers("sampled_rows", plan.sampled_rows)
    targets = _numbers("prompt_targets", plan.prompt_targets)
    copies = _numbers("block_copies", plan.block_copies)
    _check_batch(batch, shapes)
    _require(copies.size % 2 == 0, "block_copies: not pairs")
    _check_range("block_copies", copies, 1, shapes.num_blocks)
    _require(seats.size == rows, "seats: not one for each row")
    _check_range("seats", seats, 0, shapes.max_num_seqs)
    _require(_all_different(seats), "seats: two rows share one")
    _check_range("sampled_rows", sampled_rows, 0, rows)
    _require(_all_different(sampled_rows), "sampled_rows: a row is listed twice")
    _require(batch.logits_indices.size == sampled_rows.size + targets.size, "logits_indices: not S + P numbers")
    last = np.cumsum(batch.query_lens) - 1
    latest_rows = np.searchsorted(last, latest_places)
    _require(np.array_equal(last[latest_rows], latest_places), "token_ids: a latest token is not the last of its row")
    sampled = batch.logits_indices[: sampled_rows.size]
    _require(np.array_equal(sampled, last[sampled_rows]), "logits_indices: not the last tokens of the sampled rows")
    _check_range("prompt_targets", targets, 0, shapes.vocab_size)
    _require(0 <= plan.prompt_top_logprobs <= shapes.vocab_size, "prompt_top_logprobs: more than the vocabulary")
    for reset in plan.resets:
        _check_reset(reset, shapes)
    sampling = StepSampling(
        latest_places=latest_places,
        latest_seats=seats[latest_rows],
        block_copies=copies.reshape(-1, 2),
        seats=seats[sampled_rows],
        prompt_targets=targets,
        prompt_top_logprobs=plan.prompt_top_logprobs,
    )
    return batch, sampling


def _check_batch(batch: StepBatch, shapes: StepShapes) -> None:
    tokens, (rows, width) = batch.token_ids.size, batch.block_tables.shape
    _require(1 <= rows <= shapes.max_num_seqs, f"{rows} rows; an agent takes 1 to {shapes.max_num_seqs}")
    limit = shapes.max_num_batched_tokens
    _require(1 <= tokens <= limit, f"{tokens} tokens; an agent takes 1 to {limit}")
    _require(batch.positions.size == tokens, "positions: not one for each token")
    _require(batch.slot_mapping.size == tokens, "slot_mapping: not one for each token")
    _require(batch.context_lens.size == rows, "context_lens: not one for each row")
    _require(width >= 1, "block_tables: empty")
    _check_range("token_ids", batch.token_ids, 0, shapes.vocab_size)
    _check_range("positions", batch.positions, 0, shapes.context_length)
    _check_range("slot_mapping", batch.slot_mapping, -1, shapes.num_blocks * shapes.block_size)
    _check_range("block_tables", batch.block_tables, 0, shapes.num_blocks)
    _check_range("query_lens", batch.query_lens, 1, tokens + 1)
    _require(int(batch.query_lens.sum()) == tokens, "query_lens: do not add up to the number of tokens")
    longest = min(shapes.context_length, width * shapes.block_size)
    _check_range("context_lens", batch.context_lens, 1, longest + 1)
    _require(bool((batch.query_lens <= batch.context_lens).all()), "context_lens: shorter than query_lens")
    _require(batch.logits_indices.size <= 2 * tokens, "logits_indices: more than two for each token")
    _check_range("logits_indices", batch.logits_indices, 0, tokens)


def _check_reset(reset: SeatReset, shapes: StepShapes) -> None:
    _require(
        0 <= reset.seat < shapes.max_num_seqs, f"resets: seat {reset.seat} is outside 0 … {shapes.max_num_seqs - 1}"
    )
    _check_range("resets: prompt_ids", _numbers("resets: prompt_ids", reset.prompt_ids), 0, shapes.vocab_size)
    _check_range("resets: output_ids", _numbers("resets: output_ids", reset.output_ids), 0, shapes.vocab_size)
    ends = reset.params.end_token_ids
    _require(all(0 <= token < shapes.vocab_size for token in ends), f"resets: end_token_ids: {ends} hold no tokens")
    biased = [token for token, _ in reset.params.logit_bias]
    _require(all(0 <= token < shapes.vocab_size for token in biased), f"resets: logit_bias: {biased} hold no tokens")
    _require(len(set(biased)) == len(biased), "resets: logit_bias: a token is listed twice")
    _require(all(math.isfinite(bias) for _, bias in reset.params.logit_bias), "resets: logit_bias: not finite")


def _numbers(name: str, data: bytes) -> Ints:
    _require(len(data) % 4 == 0, f"{name}: {len(data)} bytes are no int32 numbers")
    return ints(data)


def _check_range(name: str, values: Ints, low: int, end: int) -> None:
    """All ``values`` in [low, end)."""
    above = values - np.int32(low) if low else values  # wraps around, so that what is below ``low`` is very large
    if values.size and above.view(np.uint32).max() >= end - low:
        bad = values[(values < low) | (values >= end)].flat[0]
        raise PlanError(f"{name}: {bad} is outside {low} … {end - 1}")


def _all_different(values: Ints) -> bool:
    """Whether no number is there twice; they are small, and none is negative."""
    return int(np.bincount(values, minlength=1).max()) <= 1


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise PlanError(problem)
