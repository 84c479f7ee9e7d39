"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from native_call import NativeLibrary
from serving_processes import Serving, serving

TEMPLATES = {"internlm-chat": "internlm", "chat": "chat"}


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Agents and app on the stand-in model, for all tests that leave them as they were.

    ``internlm-chat`` and ``chat`` are served names with a prompt template, ``llama2`` and ``internlm`` have none. In
    chats ``internlm`` has InternLM's template, the others have the stand-in's own.
    """
    model = {
        "names": ["llama2", "internlm", *TEMPLATES],
        "prompt_templates": TEMPLATES,
        "chat_templates": {"internlm": "internlm"},
    }
    with serving(tmp_path_factory.mktemp("standin"), [model]) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def slow_standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The same with 20 ms a step and two seats, for requests that are still running while a test looks at them."""
    limits = {"max_num_seqs": 2, "max_waiting": 2}
    with serving(tmp_path_factory.mktemp("slow"), [{"step_seconds": 0.02}], limits=limits) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def client(standin: Serving) -> httpx.Client:
    """An HTTP client of ``standin``."""
    return standin.client()


@pytest.fixture(scope="module", params=[1, 3], ids=["1-thread", "3-threads"])
def native(request: pytest.FixtureRequest) -> NativeLibrary:
    """The C++ operators on one thread, then on three."""
    opened = NativeLibrary()
    opened.own.set_threads(request.param)
    return opened
