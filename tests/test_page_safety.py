"""What a model or a person writes never runs in the page, and its key goes to its server only."""

from __future__ import annotations

import pytest
from browser import NET_ERROR, Ui, answer_with, stream_of, ui
from playwright.sync_api import Browser, Route, expect
from serving_processes import Serving

pytestmark = pytest.mark.slow

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg onload=alert(1)><iframe src='javascript:alert(1)'></iframe>",
    "[click](javascript:alert(1)) [click](JaVaScRiPt:alert(1)) [click](java\nscript:alert(1)) <javascript:alert(1)>",
    "[click](data:text/html,<script>alert(1)</script>) [click](vbscript:x) [click](//test/) [click](/ui)",
    '![picture](https://test/track.png) ![x](x" onerror="alert(1))',
    '[a](https://test/" onclick="alert(1))',
    "```html\n<script>alert(1)</script>\n```\n`<b onclick=alert(1)>`",
    "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <script>alert(1)</script> | [x](javascript:alert(1)) |",
    "# <img src=x onerror=alert(1)>\n\n> <script>alert(1)</script>\n\n- <a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    '<https://test/><img src=x onerror=alert(1)> <https://test/"onclick=alert(1)> <javascript:alert(1)> <data:x>',
    "&#x3c;script&#x3e;alert(1)&lt;/script&gt; <script>alert(1)</script>\n===\n- [x] <img src=x onerror=alert(1)>",
    "<think><script>alert(1)</script>[x](javascript:alert(1))</think><img src=x onerror=alert(1)>",
    "</div></article><script>alert(1)</script><style>*{display:none}</style><base href=//test>",
]
MADE = "node => [...new Set([...node.querySelectorAll('*')].map((one) => one.localName))]"
HARMLESS = (
    "article h3 div p span code pre figure figcaption button svg path a br em strong del ul ol li blockquote hr input"
)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("who", ["model", "person"])
def test_text_never_runs(shown: Ui, text: str, who: str) -> None:
    if who == "model":
        answer_with(shown.page, stream_of([text[i : i + 5] for i in range(0, len(text), 5)]))
    shown.set(max_tokens=2)
    shown.send("hi" if who == "model" else text)
    shown.answer()
    check_harmless(shown)
    shown.page.reload()  # from the history
    shown.answer()
    check_harmless(shown)


def check_harmless(shown: Ui) -> None:
    log = shown.page.locator("#log")
    assert set(log.evaluate(MADE)) <= {
        *HARMLESS.split(),
        "details",
        "summary",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    links = log.locator("a").evaluate_all("all => all.map((one) => [one.protocol, one.target, one.rel])")
    assert all(link == ["https:", "_blank", "noopener noreferrer nofollow"] for link in links)
    attributes = log.evaluate("""node => [...node.querySelectorAll('*')]
        .flatMap((one) => one.getAttributeNames()).filter((name) => /^on|^style$|^src/.test(name))""")
    assert attributes == []
    shown.check()


def test_a_page_that_is_named_by_the_history_is_text_too(shown: Ui) -> None:
    shown.set(max_tokens=2)
    shown.send("<img src=x onerror=alert(1)>")
    shown.answer()
    expect(shown.page.locator("#conversations .open")).to_have_text("<img src=x onerror=alert(1)>")
    assert shown.page.locator("#conversations img").count() == 0


@pytest.mark.parametrize("stored", ["{", "null", "[]", '{"id": 3}', '{"id": "x", "messages": [{"content": 3}]}'])
def test_a_broken_history_is_left_alone(shown: Ui, stored: str) -> None:
    shown.page.evaluate("stored => localStorage.setItem('mindspore-ui/conversation/x', stored)", stored)
    shown.page.reload()
    shown.page.wait_for_selector("#model:enabled")
    expect(shown.page.locator("#conversations li")).to_have_count(0)


def guarded(route: Route) -> None:
    """A server with a key, before one that has none."""
    if route.request.headers.get("authorization") == "Bearer right":
        route.continue_()
    else:
        error = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}}
        route.fulfill(status=401, json=error)


def test_a_key_is_asked_for_sent_and_kept_for_the_tab(browser: Browser, standin: Serving) -> None:
    with ui(browser, standin.url) as opened:
        opened.forgiven = NET_ERROR
        page = opened.page
        for guarded_path in ("**/v1/**", "**/serving/**"):
            page.route(guarded_path, guarded)
        page.goto(f"{standin.url}/ui")
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible()
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("#banner")).to_contain_text("asks for an API key")
        opened.button("Enter the key").click()
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("does not accept this API key")
        page.locator("#key").fill("right")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:enabled")
        expect(page.locator("#banner")).to_be_hidden()
        opened.set(max_tokens=3)
        opened.send("hi")
        opened.answer()
        kept = "[sessionStorage.getItem('mindspore-ui/key'), localStorage.getItem('mindspore-ui/key')]"
        assert page.evaluate(kept) == ["right", None]
        opened.button("Forget the key").click()
        expect(dialog).to_be_visible()
        page.get_by_label("Remember it on this device").check()
        page.locator("#key").fill("right")
        opened.button("Use this key").click()
        expect(page.locator("#banner")).to_be_hidden()
        assert page.evaluate(kept) == [None, "right"]
