"""What a rank says of a step in a few bytes, so that ranks of a group can be compared."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from agent.step_batch import StepBatch, StepSampling

DIGEST_BYTES = 16


def step_digest(step_id: int, batch: StepBatch, sampling: StepSampling) -> hashlib.blake2b:
    """BLAKE2b over all numbers of a step, the latest tokens filled in; the tokens that it samples are still to come.

    Two ranks with the same digest run the same step on the same tokens, and so pass through the same collectives.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for record in (batch, sampling):
        for field in dataclasses.fields(record):
            array = np.asarray(getattr(record, field.name), dtype="<i4")
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
    digest.update(b"step %d" % step_id)
    return digest
