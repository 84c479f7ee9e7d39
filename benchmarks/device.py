"""How long a device takes for a step, from a few numbers, each of them in a file of ``devices/`` with its reason."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta

from server.step import Step

FOLDER = Path(__file__).parent / "devices"

Positive = Annotated[int, Meta(ge=1)]
Time = Annotated[float, Meta(ge=0)]


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model on one device.

    A step's time on the device is that of its tokens, of the cache that its rows read, and of its sampled rows. Around
    it there are ``agent_ms``, in which the device waits for its agent. ``server_ms`` are for each plan, in which the
    device waits only if it has nothing else to do.
    """

    name: str
    tokens_ms: dict[Positive, Time]  # by new tokens of a step; straight lines in between and beyond
    cached_us: Time  # for each token that a row has in the cache before the step
    pair_ns: Time  # for each pair of a new token and one that is cached before the step
    own_pair_ns: Time  # for each pair of a new token and one before it in the same row and step
    row_ms: Time  # for each sampled row
    agent_ms: Time
    server_ms: Time
    block_size: Positive
    cached_tokens: Positive  # that the cache holds
    context_length: Positive

    def step_seconds(self, step: Step) -> float:
        """Seconds on the device."""
        cached = pairs = own_pairs = sampled = 0
        for row in step.rows:
            new = row.num_new_tokens
            cached += row.start
            pairs += new * row.start
            own_pairs += new * (new - 1) // 2
            sampled += row.samples
        return (
            1e-3 * (self.tokens_time(step.num_tokens) + self.row_ms * sampled)
            + 1e-6 * self.cached_us * cached
            + 1e-9 * (self.pair_ns * pairs + self.own_pair_ns * own_pairs)
        )

    def tokens_time(self, num_tokens: int) -> float:
        """Milliseconds of a step's products of matrices."""
        points = list(self.tokens_ms.items())
        if len(points) == 1:
            return points[0][1]
        place = bisect_right(points, num_tokens, key=lambda point: point[0])
        (x0, y0), (x1, y1) = list(pairwise(points))[min(max(place - 1, 0), len(points) - 2)]
        return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)


def presets() -> list[str]:
    """The names of the devices that the project knows."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Device:
    """A device by the name of its preset or the path of its file.

    Raises:
        ValueError: there is no such preset or file, or what is in it is no device; the message says why.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        device = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Device)
    except OSError as error:
        known = ", ".join(presets())
        raise ValueError(f"{path}: {error.strerror}; a path ends in .yaml, and presets are {known}") from None
    except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    points = list(device.tokens_ms.items())
    if not points or any(x1 <= x0 or y1 < y0 for (x0, y0), (x1, y1) in pairwise(points)):
        raise ValueError(f"{path}: tokens_ms: needs tokens in rising order, and times that do not fall")
    return device
