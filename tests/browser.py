"""A real Chromium, and pages in it that watch for everything that must not happen."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright
from serving_processes import PATIENCE_SECONDS, Serving

# Without these, Chromium asks hosts of its own at every start; the sandbox does not work for root.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1360, "height": 860}
COMPLETIONS = "**/v1/chat/completions"
NET_ERROR = ("Failed to load resource",)  # what Chromium says of any answer that is no success
# Before any script of the page: what the policy stopped, and a name for injected code to call.
WATCH = """
    window.stopped = [];
    window.injected = 0;
    window.alert = () => { window.injected += 1; };
    document.addEventListener('securitypolicyviolation', (event) => window.stopped.push(event.violatedDirective));
"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, without a window."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "the tests of the page need Chromium; on Debian: apt install chromium"
    expect.set_options(timeout=1000 * PATIENCE_SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Ui:
    """The page of one server in a browser profile of its own."""

    page: Page
    url: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    forgiven: tuple[str, ...] = ()  # console messages that the test provokes: Chromium tells of every failed request

    def open(self) -> Ui:
        """Load the page and wait until it knows its models."""
        self.page.goto(f"{self.url}/ui")
        self.page.wait_for_selector("#model:enabled")
        return self

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def set(self, **settings: object) -> None:
        """Fill in fields of the settings; on a wide page, whose settings can be open at the same time."""
        self.page.get_by_role("button", name="Settings", exact=True).click()
        for name, value in settings.items():
            self.page.locator(f"#settings [name={name}]").fill(str(value))
        self.page.locator("#settings").get_by_role("button", name="Close").click()

    def send(self, text: str) -> None:
        self.page.locator("#prompt").fill(text)
        self.page.keyboard.press("Enter")

    def answer(self, state: str = "done") -> Locator:
        """The last answer, once it is in ``state``."""
        self.page.wait_for_selector(f".message.assistant:last-child[data-state={state}]")
        return self.page.locator(".message.assistant").last

    def text(self, state: str = "done") -> str:
        """The text of the last answer."""
        return self.answer(state).locator("> .body").inner_text()

    def narrower_than_the_window(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))

    def check(self) -> None:
        """Nothing was asked of another host, the policy had nothing to stop, no code ran, nothing went wrong."""
        host = urlsplit(self.url).netloc
        foreign = [url for url in self.requests if urlsplit(url).scheme != "blob" and urlsplit(url).netloc != host]
        assert foreign == []
        assert [error for error in self.errors if not any(text in error for text in self.forgiven)] == []
        assert self.page.evaluate("[window.stopped, window.injected]") == [[], 0]


@contextlib.contextmanager
def ui(browser: Browser, url: str, **context: Any) -> Iterator[Ui]:
    """A page that has not been loaded yet; at the end it is checked."""
    settings = {"viewport": DESKTOP, "locale": "en-US", **context}
    opened = browser.new_context(**settings)
    opened.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.add_init_script(WATCH)
    page = opened.new_page()
    shown = Ui(page, url)
    page.on("request", lambda request: shown.requests.append(request.url))
    page.on("pageerror", lambda error: shown.errors.append(str(error)))
    page.on(
        "console", lambda message: shown.errors.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("dialog", lambda dialog: (shown.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    try:
        yield shown
        shown.check()
    finally:
        opened.close()


def stream_of(pieces: Sequence[str], *, end: Sequence[object] = ("[DONE]",)) -> str:
    """A chat stream that a server might send: these pieces, then the data of ``end``."""
    chunks: list[object] = [
        {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    return "".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in (*chunks, *end))


def answer_with(page: Page, body: str, *, times: int | None = None) -> None:
    """Let the model answer with ``body``: what no model of ours can be made to say."""

    def fulfil(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=body)

    page.route(COMPLETIONS, fulfil, times=times)


def contrast(page: Page, selector: str, of: str = "color") -> float:
    """Of the first such element's text, or other colour, with what is behind it, as WCAG defines it: 1 to 21."""
    ratio: float = page.locator(selector).first.evaluate(
        """(element, of) => {
        const parse = (color) => {
            const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
            return [r, g, b, a / 255];
        };
        const layers = [];
        for (let node = element; node; node = node.parentElement) {
            layers.push(parse(getComputedStyle(node).backgroundColor));
        }
        let behind = [255, 255, 255];
        for (const [r, g, b, a] of layers.reverse()) {
            behind = behind.map((old, i) => [r, g, b][i] * a + old * (1 - a));
        }
        const luminance = (rgb) => {
            const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = rgb.map((v) => linear(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const both = [luminance(parse(getComputedStyle(element)[of])), luminance(behind)];
        return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    }""",
        of,
    )
    return ratio


def go_on_for_ever(route: Route) -> None:
    route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True, "max_tokens": 4000})


def expected(client: httpx.Client, *messages: str, **params: object) -> str:
    """What the server answers to these messages, user's and assistant's in turn, when it is not streamed."""
    roles = ["user", "assistant"] * len(messages)
    spoken = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=False)]
    body = {"model": "llama2", "messages": spoken, **params}
    text: str = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return text


def same_words(shown: str, text: str) -> bool:
    """Whether a page shows a text: line ends and spaces may differ."""
    return shown.split() == text.split()


def running(serving: Serving) -> int:
    """The requests that have a seat."""
    models = serving.client().get("/serving/status").json()["models"]
    return sum(model["running"] for model in models)
