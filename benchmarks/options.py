"""Values on a command line: what each may be, with an error that says so."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def option(read: Callable[[str], T]) -> Callable[[str], T]:
    """``read`` for argparse, which shows only its own errors' messages."""

    def read_option(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_option


def positive(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(f"{text} is not above 0")
    return number


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    if (number := int(text)) < 0:
        raise ValueError(f"{text} is below 0")
    return number


def count(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise ValueError(f"{text} is not above 0")
    return number
