"""The agent's signs of life, from a thread of their own, and the end of a step that hangs.

As long as this thread runs and no step is overdue, launcher and server hear from the agent twice a second, whatever its
main thread does. They act on silence: the server takes the connection for lost, the launcher starts the agent anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from agent.logits import Logits
from agent.protocol import Ints
from agent.runner import Runner
from agent.step_batch import StepBatch
from config.serving_config import LimitsConfig
from config.silence import BEAT_SECONDS

EXIT_CODE = 3  # of an agent that ends itself because of a hung step

logger = logging.getLogger(__name__)


class TimedRunner:
    """A runner that knows whether its step is overdue, see ``LimitsConfig.step_deadline``."""

    def __init__(self, runner: Runner, limits: LimitsConfig) -> None:
        self.folder = runner.folder
        self.manifest = runner.manifest
        self.num_blocks = runner.num_blocks
        self.cache_dtype = runner.cache_dtype
        self._runner = runner
        self._limits = limits
        self._end: float | None = None  # of the step that runs, on the monotonic clock

    @property
    def overdue(self) -> bool:
        end = self._end
        return end is not None and time.monotonic() > end

    def copy_blocks(self, copies: Ints) -> None:
        """``Runner.copy_blocks``, on the clock: on an NPU it is a graph like others."""
        with self._within(self._limits.step_deadline(0)):
            self._runner.copy_blocks(copies)

    def agree(self, digest: bytes) -> None:
        """``Runner.agree``, on the clock: a rank that does not come keeps the others waiting."""
        with self._within(self._limits.step_deadline(0)):
            self._runner.agree(digest)

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        """``Runner.run``, on the clock."""
        with self._within(self._limits.step_deadline(batch.token_ids.size)):
            return self._runner.run(batch, best_only=best_only)

    @contextlib.contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        self._end = time.monotonic() + seconds
        try:
            yield
        finally:
            self._end = None


def start_heartbeat(runner: TimedRunner, beats: Sequence[Callable[[], None]]) -> None:
    """Call ``beats`` for ever, none of which may block; end the process when a step of ``runner`` is overdue."""

    def run() -> None:
        while not runner.overdue:
            for beat in beats:
                beat()
            time.sleep(BEAT_SECONDS)
        logger.critical("a step is overdue: this process ends, so that the launcher starts another")
        os._exit(EXIT_CODE)  # the main thread is inside the model and would not notice anything gentler

    threading.Thread(target=run, name="heartbeat", daemon=True).start()
