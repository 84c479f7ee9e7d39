"""Greedy text of the default model as another implementation computes it, and how many tokens of ours are the same.

``golden_text.json`` holds the tokens of transformers on PyTorch, in float32, with how far the best logit of each was
ahead of the second. Where that is less than the error of the numbers, either choice is right, and what follows differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec

FILE = Path(__file__).with_suffix(".json")
ANSWER_SECONDS = 600.0


class GoldenText(msgspec.Struct, frozen=True):
    """One prompt and its answer."""

    prompt: str
    token_ids: tuple[int, ...]
    leads: tuple[float, ...]  # of each token's logit before the next best


def read() -> tuple[GoldenText, ...]:
    """All of them."""
    return msgspec.json.decode(FILE.read_bytes(), type=tuple[GoldenText, ...])


def ask(url: str, model: str, golden: GoldenText) -> list[int]:
    """The tokens that a server answers the prompt with.

    Raises:
        httpx.HTTPError: it does not.
    """
    parameters = {"max_new_tokens": len(golden.token_ids), "ignore_eos": True, "details": True}
    body = {"inputs": golden.prompt, "parameters": parameters}
    with httpx.Client(trust_env=False, timeout=ANSWER_SECONDS) as client:
        response = client.post(f"{url}/models/{model}/generate", json=body)
    response.raise_for_status()
    return [token["id"] for token in response.json()["details"]["tokens"]]


def decided(golden: GoldenText, near_tie: float) -> int:
    """How many tokens can be compared: those before the first one whose lead is less than ``near_tie``."""
    return next((i for i, lead in enumerate(golden.leads) if lead < near_tie), len(golden.leads))


def same(golden: GoldenText, token_ids: Sequence[int], near_tie: float) -> int:
    """How many of the tokens that can be compared are the same before one differs."""
    pairs = zip(golden.token_ids[: decided(golden, near_tie)], token_ids, strict=False)
    return next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), decided(golden, near_tie))
