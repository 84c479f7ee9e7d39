"""The times of a request that are worth knowing. Pure: no clock, times are passed in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestTimes:
    """When what happened to a request, in seconds of one clock; None: it has not.

    The properties are seconds between two of these, None as long as one of them is missing.
    """

    arrival: float
    first_step: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_tokens: int = 0  # that went to the client

    @property
    def queue(self) -> float | None:
        return _between(self.arrival, self.first_step)

    @property
    def to_first_token(self) -> float | None:
        return _between(self.arrival, self.first_token)

    @property
    def prefill(self) -> float | None:
        """From the first step to the first token, with all other chunks of the prompt."""
        return _between(self.first_step, self.first_token)

    @property
    def decode(self) -> float | None:
        """From the first token to the last."""
        return _between(self.first_token, self.last_token)

    @property
    def inference(self) -> float | None:
        """From the first step to the last token."""
        return _between(self.first_step, self.last_token)

    @property
    def per_output_token(self) -> float | None:
        """Between neighbouring tokens, on average."""
        decode = self.decode
        return decode / (self.num_tokens - 1) if decode is not None and self.num_tokens > 1 else None


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
