"""What a step brought, told request by request. Pure: no clock, no sockets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from agent.protocol import StepOutput, floats, ints
from server.request import Request
from server.step import Step

Scored = tuple[int, float | None, tuple[tuple[int, float], ...]]  # token id, log-probability, the best of its position


class StepResult:
    """An agent's answer to the plan of ``step``."""

    def __init__(self, step: Step, output: StepOutput) -> None:
        self.output = output
        self.token_ids: list[int] = ints(output.token_ids).tolist()  # of the sampled rows, in their order
        self._step = step

    def tokens(self) -> Iterator[tuple[Request, Scored]]:
        """The next token of each sampled row."""
        output, count = self.output, len(self.token_ids)
        logprobs = floats(output.logprobs).tolist()
        top_ids, top_logprobs = _rows(ints(output.top_ids), count), _rows(floats(output.top_logprobs), count)
        sampled = (row.request for row in self._step.rows if row.samples)
        for i, (request, token_id) in enumerate(zip(sampled, self.token_ids, strict=True)):
            params = request.params.sampling
            wanted = params.top_logprobs
            top = tuple(zip(top_ids[i][:wanted], top_logprobs[i][:wanted], strict=True)) if wanted else ()
            yield request, (token_id, logprobs[i] if params.logprobs else None, top)

    def prompt_tokens(self) -> Iterator[tuple[Request, list[Scored]]]:
        """The prompt tokens whose log-probabilities the step computed."""
        output = self.output
        logprobs = floats(output.prompt_logprobs).tolist()
        top_ids = _rows(ints(output.prompt_top_ids), len(logprobs))
        top_logprobs = _rows(floats(output.prompt_top_logprobs), len(logprobs))
        done = 0
        for row in self._step.rows:
            wanted = row.request.params.prompt_top_logprobs
            scored: list[Scored] = []
            for i, position in enumerate(row.prompt_logits, start=done):
                top = tuple(zip(top_ids[i][:wanted], top_logprobs[i][:wanted], strict=True)) if wanted else ()
                scored.append((row.request.prompt_ids[position + 1], logprobs[i], top))
            done += len(scored)
            if scored:
                yield row.request, scored


def _rows(values: NDArray[Any], count: int) -> list[list[Any]]:
    """``[count * N]`` → ``count`` lists of N."""
    rows: list[list[Any]] = values.reshape(count, -1).tolist() if values.size else []
    return rows
