"""From logits to the next token of each row, each with its own settings.

What a row's grammar does not allow is forbidden first. Then the order is that of Hugging Face: repetition, frequency
and presence penalty, logit bias, end tokens forbidden until ``min_new_tokens`` (unless the grammar allows nothing
else), temperature, top-k, top-p, min-p, typical-p, and the draw. Every row is worked out on its own, and its
random numbers come from its seed, a token and the place in the answer alone, so a row's token does not depend on what
else is in the batch or on how often the request was preempted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from agent.draw import SETTINGS, draw, require_numbers
from agent.grammar import GrammarState
from agent.logits import Logits, Places
from agent.logprobs import token_logprobs
from agent.protocol import Floats, Ints, SeatReset, ints
from agent.token_counts import PENALTIES, TokenCounts, penalized
from config.grammar_engine import GrammarEngine

BIAS = np.dtype([("token", np.int64), ("added", np.float32)])
MIN_TEMPERATURE = 1e-30  # a number that single precision can divide by


class Sampler:
    """What sampling must know of the requests in the seats; bounded by the number of seats."""

    def __init__(self, max_num_seqs: int, vocab_size: int, engine: GrammarEngine | None = None) -> None:
        """``engine``: of the model's vocabulary; without it no request may have a grammar."""
        self._vocab_size = vocab_size
        self._engine = engine
        self._grammars: list[GrammarState | None] = [None] * max_num_seqs
        self._constrained = np.zeros(max_num_seqs, bool)  # seats with a grammar
        self._complete = np.zeros(max_num_seqs, bool)  # of them, those whose answers can only end
        self._counts: list[TokenCounts | None] = [None] * max_num_seqs  # of seats with penalties
        self._biases = [np.zeros(0, BIAS)] * max_num_seqs
        self._biased = np.zeros(max_num_seqs, bool)
        self._end_tokens = [np.zeros(0, np.int64)] * max_num_seqs
        self._taken = np.zeros(max_num_seqs, bool)
        self._latest = np.full(max_num_seqs, -1, np.int32)  # -1: no token was sampled since the reset
        self._penalized = np.zeros(max_num_seqs, bool)
        self._penalties = np.zeros(max_num_seqs, PENALTIES)
        self._min_new_tokens = np.zeros(max_num_seqs, np.int64)
        self._num_logprobs = np.full(max_num_seqs, -1)  # -1: none wanted, 0: of the chosen token only
        self._settings = np.zeros(max_num_seqs, SETTINGS)
        self._greedy = np.zeros(max_num_seqs, bool)  # seats that want the best token and nothing else

    def clear(self) -> None:
        """All seats are free."""
        self._taken[:] = False
        self._counts = [None] * len(self._counts)
        self._grammars = [None] * len(self._grammars)
        self._constrained[:] = False

    def holds(self, seats: Ints) -> bool:
        """Whether all these seats are taken."""
        return bool(self._taken[seats].all())

    def latest(self, seats: Ints) -> Ints:
        """The last token of each of these seats, ``[S]``; negative if there is none since the seat was taken."""
        latest: Ints = self._latest[seats]
        return latest

    def reset(self, reset: SeatReset) -> None:
        """A request takes a seat."""
        seat, params, output_ids = reset.seat, reset.params, ints(reset.output_ids)
        penalized = bool(params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty)
        self._counts[seat] = TokenCounts(ints(reset.prompt_ids), output_ids) if penalized else None
        self._grammars[seat] = self._grammar(params.grammar, output_ids)
        self._constrained[seat] = bool(params.grammar)
        self._complete[seat] = False
        self._taken[seat] = True
        self._latest[seat] = -1
        self._penalized[seat] = penalized
        self._penalties[seat] = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._biases[seat] = np.array(list(params.logit_bias), BIAS)
        self._biased[seat] = bool(params.logit_bias)
        self._end_tokens[seat] = np.array(params.end_token_ids, np.int64)
        self._min_new_tokens[seat] = params.min_new_tokens if params.end_token_ids else 0
        scored = params.logprobs or params.top_logprobs
        self._num_logprobs[seat] = min(params.top_logprobs, self._vocab_size) if scored else -1
        too_short = output_ids.size < self._min_new_tokens[seat]
        self._greedy[seat] = not (
            params.temperature or params.grammar or params.logit_bias or penalized or scored or too_short
        )
        self._settings[seat] = (
            max(params.temperature, MIN_TEMPERATURE) if params.temperature else 0.0,
            min(params.top_k, self._vocab_size),
            params.top_p,
            params.min_p,
            params.typical_p,
            params.seed & (1 << 64) - 1,
            output_ids.size,
        )

    def takes_best(self, seats: Ints) -> bool:
        """Whether each of these seats wants its best token and nothing else, so that ``take_best`` will do."""
        return bool(self._greedy[seats].all())

    def take_best(self, logits: Logits, seats: Ints) -> NDArray[np.int64]:
        """What ``sample`` returns where ``takes_best``, in a few array operations: the device waits for them.

        Raises:
            FloatingPointError: as ``sample``.
        """
        require_numbers(logits.maxima.max(axis=1, initial=-np.inf))
        tokens = logits.best()
        self._settings["number"][seats] += 1
        self._latest[seats] = tokens
        return tokens

    def sample(self, logits: Logits, seats: Ints) -> NDArray[np.int64]:
        """The next token of each of S rows, ``[S]``. The logits are as before when it returns.

        Raises:
            FloatingPointError: a row holds NaN or infinity, so the model's numbers cannot be trusted.
        """
        require_numbers(logits.maxima.max(axis=1, initial=-np.inf))
        with self._restricted(logits, seats), self._edited(logits, seats), self._added(logits, seats):
            tokens = self._choose(logits, seats)
        self._append(tokens, seats)
        return tokens

    def failed(self, seats: Ints) -> list[int]:
        """Which of these rows have a grammar that cannot go on."""
        return [
            int(row)
            for row in np.flatnonzero(self._constrained[seats])
            if (state := self._grammars[seats[row]]) and state.failed
        ]

    def logprobs(self, logits: Logits, seats: Ints, token_ids: NDArray[np.int64]) -> tuple[Floats, Ints, Floats]:
        """Log-probabilities ``[S]`` of the chosen tokens, then ids and log-probabilities ``[S, N]`` of the best.

        NaN (and token 0) stand where a row did not ask; nobody asked: empty arrays.
        """
        wanted = self._num_logprobs[seats]
        most = int(wanted.max(initial=-1))
        if most < 0:
            return np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.float32)
        chosen = np.full(len(seats), np.nan, np.float32)
        ids = np.zeros((len(seats), most), np.int32)
        best = np.full((len(seats), most), np.nan, np.float32)
        rows = np.flatnonzero(wanted >= 0)
        chosen[rows], ids[rows], best[rows] = token_logprobs(logits, rows, token_ids[rows], wanted[rows])
        return chosen, ids, best

    def _choose(self, logits: Logits, seats: Ints) -> NDArray[np.int64]:
        settings = self._settings[seats]
        random = settings["temperature"] > 0
        if random.all():
            return draw(logits, np.arange(len(seats)), settings)
        tokens = logits.best()
        if random.any():
            drawn = np.flatnonzero(random)
            tokens[drawn] = draw(logits, drawn, settings[drawn])
        return tokens

    def _grammar(self, grammar: str, output_ids: Ints) -> GrammarState | None:
        if not grammar:
            return None
        assert self._engine is not None, "this sampler was made without an engine"
        return GrammarState(self._engine, grammar, output_ids)

    def _restricted(self, logits: Logits, seats: Ints) -> AbstractContextManager[None]:
        """Forbids what grammars do not allow."""
        rows = np.flatnonzero(self._constrained[seats])
        if not rows.size:
            return nullcontext()
        masks = [state.allowed() for seat in seats[rows] if (state := self._grammars[seat])]
        self._complete[seats[rows]] = [self._only_ends(mask) for mask in masks]
        return logits.restricted(rows.tolist(), masks)

    def _only_ends(self, mask: NDArray[np.bool_]) -> bool:
        assert self._engine is not None
        return np.count_nonzero(mask) == np.count_nonzero(mask[self._engine.end_token_ids])

    def _edited(self, logits: Logits, seats: Ints) -> AbstractContextManager[None]:
        """Does what penalties and forbidden end tokens do."""
        rows, ids, values = self._edits(logits, seats)
        return logits.changed(rows, ids, values) if rows.size else nullcontext()

    def _added(self, logits: Logits, seats: Ints) -> AbstractContextManager[None]:
        """Does what logit biases do to logits that are edited already: a forbidden token stays forbidden."""
        biased_rows = np.flatnonzero(self._biased[seats])
        if not biased_rows.size:
            return nullcontext()
        biases = [self._biases[seat] for seat in seats[biased_rows]]
        rows, bias = np.repeat(biased_rows, [one.size for one in biases]), np.concatenate(biases)
        return logits.changed(rows, bias["token"], logits.values[rows, bias["token"]] + bias["added"])

    def _edits(self, logits: Logits, seats: Ints) -> tuple[Places, Places, Floats]:
        """What penalties and forbidden end tokens change: rows, tokens and new logits, ``[n]`` each."""
        penalized_rows = np.flatnonzero(self._penalized[seats])
        too_short = self._settings["number"][seats] < self._min_new_tokens[seats]
        ending_rows = np.flatnonzero(too_short & ~self._complete[seats])
        if not (penalized_rows.size or ending_rows.size):
            nothing = np.zeros(0, np.int64)
            return nothing, nothing, np.zeros(0, np.float32)
        kept = [counts for seat in seats[penalized_rows] if (counts := self._counts[seat])]
        ends = [self._end_tokens[seat] for seat in seats[ending_rows]]
        sizes = [one.ids.size for one in kept]
        rows, ids = np.repeat(penalized_rows, sizes), _joined([one.ids for one in kept])
        penalties = np.repeat(self._penalties[seats[penalized_rows]], sizes)
        values = logits.values.reshape(-1).take(rows * logits.values.shape[1] + ids)
        values = penalized(values, _joined([one.counts for one in kept]), penalties)
        forbidden = np.repeat(ending_rows, [tokens.size for tokens in ends])
        return (
            np.concatenate([rows, forbidden]),
            np.concatenate([ids, _joined(ends)]),
            np.concatenate([values, np.full(forbidden.size, -np.inf, np.float32)]),
        )

    def _append(self, tokens: NDArray[np.int64], seats: Ints) -> None:
        self._settings["number"][seats] += 1
        self._latest[seats] = tokens
        for i in np.flatnonzero(self._penalized[seats]):
            if counts := self._counts[seats[i]]:
                counts.add(int(tokens[i]))
        for i in np.flatnonzero(self._constrained[seats]):
            if state := self._grammars[seats[i]]:
                state.advance(int(tokens[i]))


def _joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *arrays])
