"""Plans for an agent or a runner, written down row by row; and a request that grows through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.protocol import SamplingParams, SeatReset, StepPlan, pack_ints

BLOCK_SIZE = 16


@dataclass(frozen=True)
class PlanRow:
    """New tokens of one request that follow ``start`` cached ones; its blocks hold all of them."""

    seat: int
    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sampled: bool = True
    known: dict[int, int] = field(default_factory=dict)  # index among the new tokens → the token that follows it


def make_plan(rows: Sequence[PlanRow], *, step_id: int = 1, resets: Sequence[SeatReset] = (), top: int = 0) -> StepPlan:
    """The rows as one step."""
    positions = [row.start + place for row in rows for place in range(len(row.tokens))]
    slots = [
        row.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for row in rows
        for position in range(row.start, row.start + len(row.tokens))
    ]
    width = max(len(row.blocks) for row in rows)
    firsts = [sum(len(row.tokens) for row in rows[:i]) for i in range(len(rows))]
    sampled = [i for i, row in enumerate(rows) if row.sampled]
    known = [
        (first + place, target) for first, row in zip(firsts, rows, strict=True) for place, target in row.known.items()
    ]
    return StepPlan(
        step_id=step_id,
        token_ids=pack_ints([token for row in rows for token in row.tokens]),
        positions=pack_ints(positions),
        slot_mapping=pack_ints(slots),
        block_tables=pack_ints([[*row.blocks, *[0] * (width - len(row.blocks))] for row in rows]),
        query_lens=pack_ints([len(row.tokens) for row in rows]),
        context_lens=pack_ints([row.start + len(row.tokens) for row in rows]),
        seats=pack_ints([row.seat for row in rows]),
        sampled_rows=pack_ints(sampled),
        logits_indices=pack_ints([firsts[i] + len(rows[i].tokens) - 1 for i in sampled] + [at for at, _ in known]),
        prompt_targets=pack_ints([target for _, target in known]),
        prompt_top_logprobs=top,
        resets=tuple(resets),
    )


@dataclass
class Sequenced:
    """One request that an agent works on: its tokens, how many of them are cached, and where."""

    seat: int
    tokens: list[int]
    blocks: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    num_prompt: int = 0
    num_cached: int = 0

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def reset(self) -> SeatReset:
        prompt, output = self.tokens[: self.num_prompt], self.output
        return SeatReset(seat=self.seat, params=self.params, prompt_ids=pack_ints(prompt), output_ids=pack_ints(output))

    def row(self, count: int | None = None) -> PlanRow:
        """The next ``count`` uncached tokens (all of them if None); the last one of the request is sampled."""
        end = len(self.tokens) if count is None else min(self.num_cached + count, len(self.tokens))
        row = PlanRow(
            self.seat, self.tokens[self.num_cached : end], self.num_cached, self.blocks, end == len(self.tokens)
        )
        self.num_cached = end
        return row
