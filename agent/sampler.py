"""From logits to the next token of each row, each with its own settings.

The order is that of Hugging Face: repetition, frequency and presence penalty, end tokens forbidden until
``min_new_tokens``, temperature, top-k, top-p, min-p, typical-p, and the draw. Every row is worked out on its own, and
its randomness is a function of its seed and of the token's number in the answer, so a row's token does not depend on
what else is in the batch or on how often the request was preempted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.draw import SETTINGS, draw
from agent.logprobs import token_logprobs
from agent.protocol import Floats, Ints, SamplingParams, SeatReset, ints
from agent.token_counts import TokenCounts

MIN_TEMPERATURE = 1e-30  # a number that single precision can divide by
_NO_PARAMS = SamplingParams()


class Sampler:
    """What sampling must know of the requests in the seats; bounded by the number of seats."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._params = [_NO_PARAMS] * max_num_seqs
        self._counts: list[TokenCounts | None] = [None] * max_num_seqs  # of seats with penalties
        self._taken = np.zeros(max_num_seqs, bool)
        self._penalized = np.zeros(max_num_seqs, bool)
        self._min_new_tokens = np.zeros(max_num_seqs, np.int64)
        self._num_logprobs = np.full(max_num_seqs, -1)  # -1: none wanted, 0: of the chosen token only
        self._settings = np.zeros(max_num_seqs, SETTINGS)

    def clear(self) -> None:
        """All seats are free."""
        self._taken[:] = False
        self._params = [_NO_PARAMS] * len(self._params)
        self._counts = [None] * len(self._counts)

    def holds(self, seats: Ints) -> bool:
        """Whether all these seats are taken."""
        return bool(self._taken[seats].all())

    def reset(self, reset: SeatReset) -> None:
        """A request takes a seat."""
        seat, params, output_ids = reset.seat, reset.params, ints(reset.output_ids)
        penalized = bool(params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty)
        self._params[seat] = params
        self._counts[seat] = TokenCounts(ints(reset.prompt_ids), output_ids) if penalized else None
        self._taken[seat] = True
        self._penalized[seat] = penalized
        self._min_new_tokens[seat] = params.min_new_tokens if params.end_token_ids else 0
        scored = params.logprobs or params.top_logprobs
        self._num_logprobs[seat] = min(params.top_logprobs, self._vocab_size) if scored else -1
        self._settings[seat] = (
            max(params.temperature, MIN_TEMPERATURE) if params.temperature else 0.0,
            min(params.top_k, self._vocab_size),
            params.top_p,
            params.min_p,
            params.typical_p,
            params.seed & (1 << 64) - 1,
            output_ids.size,
        )

    def sample(self, logits: Floats, seats: Ints) -> NDArray[np.int64]:
        """The next token of each row: logits ``[S, vocab]``, not changed → ``[S]``.

        Raises:
            FloatingPointError: a row holds NaN or infinity, so the model's numbers cannot be trusted.
        """
        settings = self._settings[seats]
        edited = self._penalized[seats] | (settings["number"] < self._min_new_tokens[seats])
        random = settings["temperature"] > 0
        rows = {int(i): self._edit(logits[i].copy(), int(seats[i])) for i in np.flatnonzero(edited)}
        if random.all():
            tokens = np.zeros(len(seats), np.int64)
        else:
            tokens = logits.argmax(axis=1)
            _require_numbers(logits[np.arange(len(seats)), tokens])
            for i, row in rows.items():
                tokens[i] = row.argmax()
        if random.any():
            drawn = np.flatnonzero(random)
            tokens[drawn] = draw([rows.get(int(i), logits[i]) for i in drawn], settings[drawn])
        self._append(tokens, seats)
        return tokens

    def logprobs(self, logits: Floats, seats: Ints, token_ids: NDArray[np.int64]) -> tuple[Floats, Ints, Floats]:
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
        for i in np.flatnonzero(wanted >= 0):
            row, count = slice(i, i + 1), wanted[i]
            chosen[row], ids[row, :count], best[row, :count] = token_logprobs(logits[row], token_ids[row], count)
        return chosen, ids, best

    def _edit(self, row: Floats, seat: int) -> Floats:
        """Penalties and forbidden end tokens, in place."""
        params, counts = self._params[seat], self._counts[seat]
        if counts:
            counts.penalize(row, params)
        if self._settings["number"][seat] < self._min_new_tokens[seat]:
            row[list(params.end_token_ids)] = -np.inf
        return row

    def _append(self, tokens: NDArray[np.int64], seats: Ints) -> None:
        self._settings["number"][seats] += 1
        for i in np.flatnonzero(self._penalized[seats]):
            if counts := self._counts[seats[i]]:
                counts.add(int(tokens[i]))


def _require_numbers(largest: Floats) -> None:
    """``largest`` of each row: NaN or infinity if there is one in the row."""
    if np.isnan(largest).any() or np.isposinf(largest).any():
        raise FloatingPointError("the logits hold NaN or infinity")
