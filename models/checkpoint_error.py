"""What every checkpoint reader raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint cannot be served; the message names the file, what was found there and what is supported."""
