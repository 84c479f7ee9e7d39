"""A device of a few lines: runs plans on a cache of (token, position) pairs and checks what it reads.

Its next token depends on all tokens before it and their order, so a plan that is wrong anywhere changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.protocol import LATEST_TOKEN, StepPlan, ints

VOCAB_SIZE = 50
END = 7


def next_token(tokens: Sequence[int]) -> int:
    """The token that follows: a hash of all tokens so far."""
    state = 0
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state % VOCAB_SIZE


def solo(prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The answer to a prompt that is alone."""
    answer: list[int] = []
    while len(answer) < max_new_tokens and answer[-1:] != [END]:
        answer.append(next_token([*prompt, *answer]))
    return answer


class PlanReader:
    """Runs plans; a plan that contradicts itself or reads what was not written fails an assertion."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._cache: dict[int, tuple[int, int]] = {}  # slot → token, position
        self.seats: dict[int, tuple[list[int], list[int]]] = {}  # seat → prompt, answer

    def run(self, plan: StepPlan) -> list[int]:
        """The next tokens of the sampled rows."""
        for reset in plan.resets:
            self.seats[reset.seat] = (ints(reset.prompt_ids).tolist(), ints(reset.output_ids).tolist())
        self._copy(plan)
        self._write(plan)
        contexts = self._contexts(plan)
        sampled = ints(plan.sampled_rows).tolist()
        seats = ints(plan.seats).tolist()
        assert len(set(seats)) == len(seats), "two rows in one seat"
        lasts = [sum(ints(plan.query_lens)[: row + 1].tolist()) - 1 for row in range(len(seats))]
        assert ints(plan.logits_indices).tolist()[: len(sampled)] == [lasts[row] for row in sampled]
        self._check_prompt_targets(plan, len(sampled), contexts, lasts)
        tokens = [next_token(contexts[row]) for row in sampled]
        for row, token in zip(sampled, tokens, strict=True):
            prompt, answer = self.seats[seats[row]]
            assert contexts[row] == prompt + answer, "a sampled row has not all its tokens"
            answer.append(token)
        return tokens

    def _copy(self, plan: StepPlan) -> None:
        pairs = ints(plan.block_copies).reshape(-1, 2).tolist()
        assert not {old for old, _ in pairs} & {new for _, new in pairs}, "a block is copied from and to"
        for old, new in pairs:
            for offset in range(self._block_size):
                if entry := self._cache.get(old * self._block_size + offset):
                    self._cache[new * self._block_size + offset] = entry

    def _tokens(self, plan: StepPlan) -> list[int]:
        """The step's tokens, also those that were not known when it was planned."""
        tokens = ints(plan.token_ids).tolist()
        lasts = (ints(plan.query_lens).cumsum() - 1).tolist()
        for seat, last in zip(ints(plan.seats).tolist(), lasts, strict=True):
            if tokens[last] == LATEST_TOKEN:
                tokens[last] = self.seats[seat][1][-1]
        return tokens

    def _write(self, plan: StepPlan) -> None:
        slots, positions = ints(plan.slot_mapping).tolist(), ints(plan.positions).tolist()
        assert len(set(slots)) == len(slots), "two tokens in one slot"
        assert all(self._block_size <= slot < self._num_blocks * self._block_size for slot in slots)
        for slot, token, position in zip(slots, self._tokens(plan), positions, strict=True):
            self._cache[slot] = (token, position)

    def _contexts(self, plan: StepPlan) -> list[list[int]]:
        """Each row's tokens, read through its block table."""
        context_lens = ints(plan.context_lens).tolist()
        tables = ints(plan.block_tables).reshape(len(context_lens), -1).tolist()
        contexts = []
        for table, length in zip(tables, context_lens, strict=True):
            places = [divmod(position, self._block_size) for position in range(length)]
            entries = [self._cache[table[block] * self._block_size + offset] for block, offset in places]
            assert [position for _, position in entries] == list(range(length)), "a position is at the wrong place"
            contexts.append([token for token, _ in entries])
        return contexts

    def _check_prompt_targets(
        self, plan: StepPlan, num_sampled: int, contexts: list[list[int]], lasts: list[int]
    ) -> None:
        """Each target must be the prompt token after the position that its logits are taken from."""
        indices = ints(plan.logits_indices).tolist()[num_sampled:]
        seats, positions = ints(plan.seats).tolist(), ints(plan.positions).tolist()
        for index, target in zip(indices, ints(plan.prompt_targets).tolist(), strict=True):
            row = next(row for row, last in enumerate(lasts) if index <= last)
            prompt, _ = self.seats[seats[row]]
            assert prompt[: positions[index] + 1] == contexts[row][: positions[index] + 1]
            assert target == prompt[positions[index] + 1]
