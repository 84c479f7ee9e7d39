"""A server's plans, received and checked in a thread of their own: the next is ready when the model has run one."""

from __future__ import annotations

import queue
import threading

from agent.connection import Connection
from agent.protocol import ProtocolError, StepPlan
from agent.step_batch import PlanError, StepBatch, StepSampling, StepShapes, read_plan
from agent.step_digest import Digest, step_digest

MAX_AHEAD = 4  # plans; a server sends one ahead, and one that sends more has to wait

Checked = tuple[StepBatch, StepSampling, Digest] | PlanError  # what a plan says, or what is wrong with it


class Intake:
    """The plans of one server, in order. Use it as a context; no thread is left behind."""

    def __init__(self, server: Connection, shapes: StepShapes) -> None:
        self._server = server
        self._shapes = shapes
        self._plans: queue.SimpleQueue[tuple[StepPlan, Checked] | Exception | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(MAX_AHEAD)
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="intake", daemon=True)

    def __enter__(self) -> Intake:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._room.release()
        self._server.interrupt(writing=False)
        self._thread.join()

    def next(self) -> tuple[StepPlan, Checked] | None:
        """Wait for the next plan; None if the server has closed the connection.

        Raises:
            OSError: the connection broke, or brought something else than plans.
        """
        taken = self._plans.get()
        self._room.release()
        if isinstance(taken, Exception):
            raise taken
        return taken

    def _read(self) -> None:
        try:
            while self._room.acquire() and not self._closed and (plan := self._server.receive()):
                if not isinstance(plan, StepPlan):
                    raise ProtocolError(f"a server sends plans, not {type(plan).__name__}")
                self._plans.put((plan, check(plan, self._shapes)))
            self._plans.put(None)
        except Exception as error:  # whatever it is: an agent that waits for a plan must hear of it
            self._plans.put(error)


def check(plan: StepPlan, shapes: StepShapes) -> Checked:
    """The plan taken apart, or what is wrong with it."""
    try:
        batch, sampling = read_plan(plan, shapes)
    except PlanError as error:
        return error
    return batch, sampling, step_digest(plan.step_id, plan.resets, batch, sampling)
