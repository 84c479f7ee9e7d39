"""A step in the inputs of a paged pair: a prefill graph of whole prompts, and a decode graph of single tokens.

Such pairs were made for servers that run prompts and single tokens in turns. Any step of ours runs on them:

- What a row begins with, up to the first token whose logits are wanted, is a prompt of the prefill graph.
- Every other token is a row of its own in the decode graph, with the block table of its request. A layer writes the
  keys and values of all rows before one of them attends, so a token sees those before it, also in the same call.

So a prompt's chunks on cached context, and logits in its middle, cost the decode graph a row for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agent.protocol import Floats, Ints
from agent.step_batch import StepBatch

Phase = Literal["prefill", "decode"]
Role = Literal["token_ids", "valid_lengths", "block_tables", "slot_mapping"]  # of a graph's input


@dataclass(frozen=True, kw_only=True)
class CallLimits:
    """The most that a call of the graphs takes, and what it takes for padding."""

    prompts: int  # rows of the prefill graph
    prompt_tokens: int  # of each of them
    tokens: int  # rows of the decode graph
    padding_slot: int  # -1, or 0: in the null block, for graphs that know no "not written"


@dataclass(frozen=True, kw_only=True)
class PagedCall:
    """One call of a graph: B rows of S tokens (decode: 1), M blocks a row; all arrays int32.

    The graph answers with one row of logits for each of its rows.
    """

    phase: Phase
    token_ids: Ints  # [B, S], padded with 0
    valid_lengths: Ints  # [B], cached and new tokens of the row
    block_tables: Ints  # [B, M], padded with 0
    slot_mapping: Ints  # [B, S], padded with the padding slot
    padding_slot: int
    rows: Ints  # [W], the rows whose logits are wanted …
    places: Ints  # [W], … and where among those of the step

    def input(self, role: Role) -> Ints:
        """The array for an input of this role."""
        array: Ints = getattr(self, role)
        return array

    def padded(self, *, rows: int, length: int, width: int) -> PagedCall:
        """The same call with so many rows and tokens of each, not fewer than it has, and so many blocks of each.

        A row that is only padding has one token. Blocks are cut off where no row has come to them.
        """
        more_rows, more_tokens = rows - self.token_ids.shape[0], length - self.token_ids.shape[1]
        tables = self.block_tables[:, :width]
        return PagedCall(
            phase=self.phase,
            token_ids=np.pad(self.token_ids, ((0, more_rows), (0, more_tokens))),
            valid_lengths=np.pad(self.valid_lengths, (0, more_rows), constant_values=1),
            block_tables=np.pad(tables, ((0, more_rows), (0, width - tables.shape[1]))),
            slot_mapping=np.pad(
                self.slot_mapping, ((0, more_rows), (0, more_tokens)), constant_values=self.padding_slot
            ),
            padding_slot=self.padding_slot,
            rows=self.rows,
            places=self.places,
        )

    def last_logits(self, answer: Floats, vocab_size: int) -> Floats:
        """The logits of each row's last token, ``[B, vocab]``; some prefill graphs answer with those of all."""
        logits = answer.reshape(self.token_ids.shape[0], -1, vocab_size)
        rows: Floats = logits[np.arange(len(logits)), self.valid_lengths - 1 if logits.shape[1] > 1 else 0]
        return rows


def paged_calls(batch: StepBatch, limits: CallLimits) -> Iterator[PagedCall]:
    """The calls that a step comes to, in the order in which they have to run."""
    heads = _prompt_lengths(batch, limits.prompt_tokens)
    prompts = np.flatnonzero(heads)
    prompts = prompts[np.argsort(heads[prompts], kind="stable")]  # those of like length together: little padding
    for first in range(0, prompts.size, limits.prompts):
        yield _prefill(batch, prompts[first : first + limits.prompts], heads, limits.padding_slot)
    firsts = np.cumsum(batch.query_lens) - batch.query_lens
    row_of = np.repeat(np.arange(batch.query_lens.size), batch.query_lens)
    single = np.flatnonzero(np.arange(batch.token_ids.size) >= (firsts + heads)[row_of])
    for first in range(0, single.size, limits.tokens):
        tokens = single[first : first + limits.tokens]
        yield _decode(batch, tokens, row_of[tokens], limits.padding_slot)


def _prompt_lengths(batch: StepBatch, longest: int) -> Ints:
    """How many of its first tokens each row gives to the prefill graph, ``[R]``: none, or two at least."""
    ends = np.cumsum(batch.query_lens)
    wanted = np.sort(batch.logits_indices)
    first_wanted = np.append(wanted, batch.token_ids.size)[np.searchsorted(wanted, ends - batch.query_lens)]
    lengths = np.minimum(np.minimum(first_wanted + 1, ends) - (ends - batch.query_lens), longest)
    whole = (batch.context_lens == batch.query_lens) & (lengths > 1)
    return np.where(whole, lengths, 0).astype(np.int32)


def _prefill(batch: StepBatch, rows: Ints, heads: Ints, padding_slot: int) -> PagedCall:
    lengths = heads[rows]
    shape = rows.size, int(lengths.max())
    tokens, slots = np.zeros(shape, np.int32), np.full(shape, padding_slot, np.int32)
    firsts = (np.cumsum(batch.query_lens) - batch.query_lens)[rows]
    for i, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        tokens[i, :length] = batch.token_ids[first : first + length]
        slots[i, :length] = batch.slot_mapping[first : first + length]
    return _call(batch, "prefill", tokens, slots, lengths, rows, firsts + lengths - 1, padding_slot)


def _decode(batch: StepBatch, tokens: Ints, rows: Ints, padding_slot: int) -> PagedCall:
    columns = batch.token_ids[tokens, None], batch.slot_mapping[tokens, None]
    return _call(batch, "decode", *columns, batch.positions[tokens] + 1, rows, tokens, padding_slot)


def _call(
    batch: StepBatch,
    phase: Phase,
    token_ids: Ints,
    slots: Ints,
    lengths: Ints,
    rows: Ints,
    last: Ints,
    padding_slot: int,
) -> PagedCall:
    """A call whose rows belong to ``rows`` of the step and have their logits at its tokens ``last``."""
    answered = np.full(batch.token_ids.size, -1, np.int32)
    answered[last] = np.arange(last.size)
    places = np.flatnonzero(answered[batch.logits_indices] >= 0)
    return PagedCall(
        phase=phase,
        token_ids=token_ids,
        valid_lengths=lengths.astype(np.int32),
        block_tables=batch.block_tables[rows],
        slot_mapping=np.where(slots < 0, np.int32(padding_slot), slots),
        padding_slot=padding_slot,
        rows=answered[batch.logits_indices[places]],
        places=places.astype(np.int32),
    )
