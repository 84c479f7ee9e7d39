"""What faces clients: the app's routes, and the Python client with its command line.

``from client import MindsporeInferenceClient`` is how the older system's users import it. It is loaded when it is asked
for: the app lives in this package too, and has no use for an HTTP client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.inference_client import AsyncMindsporeInferenceClient, MindsporeInferenceClient

__all__ = ["AsyncMindsporeInferenceClient", "MindsporeInferenceClient"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("client.inference_client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
