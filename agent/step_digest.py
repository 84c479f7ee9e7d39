"""What a rank says of a step in a few bytes, so that ranks of a group can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np

from agent.protocol import SeatReset
from agent.step_batch import StepBatch, StepSampling

DIGEST_BYTES = 16
Digest = hashlib.blake2b


def step_digest(step_id: int, resets: Sequence[SeatReset], batch: StepBatch, sampling: StepSampling) -> Digest:
    """BLAKE2b over all of a plan. The latest tokens, and then those that the step samples, are still to come.

    Two ranks with the same digest run the same step on the same tokens, and so pass through the same collectives.
    """
    digest = Digest(digest_size=DIGEST_BYTES)
    for record in (batch, sampling):
        for field in dataclasses.fields(record):
            array = np.asarray(getattr(record, field.name), dtype="<i4")
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
    digest.update(msgspec.msgpack.encode((step_id, resets)))
    return digest
