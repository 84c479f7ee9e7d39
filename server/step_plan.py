"""A scheduled step as the message that an agent runs. Pure: no clock, no sockets."""

from __future__ import annotations

from itertools import chain

import numpy as np

from agent.protocol import LATEST_TOKEN, Ints, SamplingParams, SeatReset, StepPlan, pack_ints
from server.block_manager import NULL_BLOCK
from server.request import Request
from server.step import Row, Step


def make_plan(step: Step, block_size: int) -> StepPlan:
    """Flatten the rows of ``step`` one after another; shapes and order as in ``StepPlan``."""
    rows = step.rows
    query_lens = np.array([row.num_new_tokens for row in rows], np.int32)
    starts = np.array([row.start for row in rows], np.int32)
    tables = _padded_tables(rows)  # [R, M]
    ends = np.cumsum(query_lens, dtype=np.int32)  # [R]
    row_of_token = np.repeat(np.arange(len(rows)), query_lens)  # [T]
    positions = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - (ends - query_lens), query_lens)  # [T]
    blocks = tables[row_of_token, positions // block_size]
    sampled = np.flatnonzero([row.samples for row in rows])
    prompt_indices, prompt_targets = _prompt_logits(rows, ends - query_lens)
    return StepPlan(
        step_id=step.step_id,
        token_ids=pack_ints(list(chain.from_iterable(map(_new_tokens, rows)))),
        positions=pack_ints(positions),
        slot_mapping=pack_ints(blocks * block_size + positions % block_size),
        block_tables=pack_ints(tables),
        query_lens=pack_ints(query_lens),
        context_lens=pack_ints(starts + query_lens),
        seats=pack_ints([row.request.seat for row in rows]),
        sampled_rows=pack_ints(sampled),
        logits_indices=pack_ints(np.concatenate([ends[sampled] - 1, prompt_indices])),
        prompt_targets=pack_ints(prompt_targets),
        prompt_top_logprobs=max(
            (row.request.params.prompt_top_logprobs for row in rows if row.prompt_logits), default=0
        ),
        resets=tuple(map(_reset, step.admitted)),
        block_copies=pack_ints(step.block_copies),
    )


def make_probe() -> StepPlan:
    """A plan that asks an idle agent for a sign of life: one token, written to the null block and read from it."""
    zero, one = pack_ints([0]), pack_ints([1])
    return StepPlan(
        step_id=0,
        token_ids=zero,
        positions=zero,
        slot_mapping=zero,
        block_tables=pack_ints([NULL_BLOCK]),
        query_lens=one,
        context_lens=one,
        seats=zero,
        sampled_rows=zero,
        logits_indices=zero,
        resets=(SeatReset(seat=0, params=SamplingParams(), prompt_ids=zero, output_ids=b""),),
    )


def _new_tokens(row: Row) -> list[int]:
    """The row's share of prompt and answer; its last token may be one that only the agent knows, or will know."""
    known = row.request.tokens(row.start, row.start + row.num_new_tokens)
    return known if len(known) == row.num_new_tokens else [*known, LATEST_TOKEN]


def _padded_tables(rows: tuple[Row, ...]) -> Ints:
    """The rows' block tables, ``[R, M]``, padded with the null block."""
    tables = [row.request.block_table for row in rows]
    lengths = np.array([len(table) for table in tables], np.int32)
    padded = np.full((len(tables), int(lengths.max())), NULL_BLOCK, np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = list(chain.from_iterable(tables))
    return padded


def _prompt_logits(rows: tuple[Row, ...], firsts: Ints) -> tuple[list[int], list[int]]:
    """Indices into the step's tokens whose log-probability is wanted, and the token that follows each of them.

    ``firsts`` are the indices of each row's first token.
    """
    indices: list[int] = []
    targets: list[int] = []
    for row, first in zip(rows, firsts.tolist(), strict=True):
        indices += [first + position - row.start for position in row.prompt_logits]
        targets += [row.request.prompt_ids[position + 1] for position in row.prompt_logits]
    return indices, targets


def _reset(request: Request) -> SeatReset:
    assert request.seat is not None
    return SeatReset(
        seat=request.seat,
        params=request.params.sampling,
        prompt_ids=pack_ints(request.prompt_ids),
        output_ids=pack_ints(request.output_ids),
    )
