"""What can go wrong with a request, with its HTTP status::

    ServingError
    ├── InvalidRequest      422  a field cannot be used; ``field`` names it
    │   └── ContextExceeded      the prompt, or the answer after it, has no room in the model's context
    ├── UnknownModel        404  no such name is served
    ├── Overloaded          429  the queue is full; try again after ``retry_after`` seconds
    │   └── NoTurn               it was in the queue for too long
    ├── NotServing          503  the agents are not there
    │   └── ShuttingDown         nor will be: the server goes
    └── GenerationFailed    500  the request was accepted and could not be finished

Routes of every protocol map these, and nothing else, to their own error bodies, in one place each. A message does not
repeat the field's name: fields are named here as in ``GenerationParams`` (and ``prompt``), and each protocol puts its
own name in front.
"""

from __future__ import annotations


class ServingError(Exception):
    """A request ends with ``message``, meant for the client."""

    status = 500
    code: str | None = None  # for programs, where the status does not say enough

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequest(ServingError):
    status = 422


class ContextExceeded(InvalidRequest):
    code = "context_length_exceeded"


class UnknownModel(ServingError):
    status = 404
    code = "model_not_found"


class Overloaded(ServingError):
    status = 429
    code = "queue_full"
    retry_after = 1  # seconds


class NoTurn(Overloaded):
    code = "queue_timeout"


class NotServing(ServingError):
    status = 503
    code = "agents_unavailable"
    retry_after = 5  # seconds


class ShuttingDown(NotServing):
    code = "shutting_down"


class GenerationFailed(ServingError):
    status = 500
