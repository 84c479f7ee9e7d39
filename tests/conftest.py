"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import httpx
import pytest
from browser import COMPLETIONS, Browser, Ui, chromium, go_on_for_ever, running, ui
from native_call import NativeLibrary
from serving_processes import Serving, eventually, serving

TEMPLATES = {"internlm-chat": "internlm", "chat": "chat"}

# A shell's background job ignores Ctrl-C, and so would all processes that tests start and interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium. Only for one module: while it is open, an event loop runs in this thread."""
    with chromium() as opened:
        yield opened


@pytest.fixture
def shown(browser: Browser, standin: Serving) -> Iterator[Ui]:
    """The page of ``standin``, at hand."""
    with ui(browser, standin.url) as opened:
        yield opened.open()


@pytest.fixture
def slow(browser: Browser, slow_standin: Serving) -> Iterator[Ui]:
    """The page of ``slow_standin``, whose answers go on until they are stopped: the page has no setting for that."""
    with ui(browser, slow_standin.url) as opened:
        opened.page.route(COMPLETIONS, go_on_for_ever)
        yield opened.open()
    eventually(lambda: running(slow_standin) == 0)
