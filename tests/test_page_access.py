"""The page for everybody: by keyboard and by ear, on a phone, in both colours and both languages."""

from __future__ import annotations

import re

import pytest
from browser import COMPLETIONS, PHONE, Ui, answer_with, contrast, go_on_for_ever, stream_of, ui
from playwright.sync_api import Browser, Page, expect
from serving_processes import Serving

pytestmark = pytest.mark.slow


def test_everything_works_by_keyboard(shown: Ui) -> None:
    page, press = shown.page, shown.page.keyboard.press
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("one")
    press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#prompt")).to_have_value("one\ntwo")
    press("Control+a")
    page.keyboard.type("hi")
    press("Enter")
    shown.answer()
    expect(page.locator("#prompt")).to_be_focused()
    reached = set()
    for _ in range(60):  # once around
        press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        focused = page.evaluate("document.activeElement.id")
        assert outline != "none" or focused in ("prompt", ""), focused
    wanted = {
        "new",
        "theme",
        "language",
        "model",
        "Settings",
        "Status",
        "log",
        "Copy",
        "Answer again",
        "prompt",
        "send",
    }
    assert wanted <= reached
    page.locator("#log").focus()
    press("/")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#prompt")).to_have_value("")


def test_the_first_tab_leads_past_the_sides(browser: Browser, standin: Serving) -> None:
    with ui(browser, standin.url, has_touch=True, is_mobile=True) as opened:  # where the box has not the focus at once
        opened.open().page.keyboard.press("Tab")
        expect(opened.page.get_by_role("link", name="To the message box")).to_be_focused()
        opened.page.keyboard.press("Enter")
        expect(opened.page.locator("#prompt")).to_be_focused()


def test_a_word_that_is_being_composed_is_not_sent(shown: Ui) -> None:
    shown.page.locator("#prompt").fill("nihao")
    shown.page.locator("#prompt").evaluate(
        "node => node.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    expect(shown.page.locator("#prompt")).to_have_value("nihao")
    expect(shown.page.locator(".message")).to_have_count(0)


def test_escape_ends_the_input_of_a_word_and_not_the_answer(slow: Ui) -> None:
    slow.send("hi")
    slow.page.locator("#prompt").dispatch_event("keydown", {"key": "Escape", "isComposing": True, "bubbles": True})
    slow.page.locator("#prompt").dispatch_event("keydown", {"key": "Enter", "keyCode": 229, "bubbles": True})
    assert slow.answer("answering").is_visible()
    slow.page.locator("#prompt").dispatch_event("keydown", {"key": "Escape", "bubbles": True})
    assert slow.answer("stopped").is_visible()


def test_a_button_that_goes_away_hands_the_focus_on(slow: Ui) -> None:
    slow.page.locator("#prompt").fill("hi")
    slow.page.locator("#send").press("Enter")
    slow.page.wait_for_selector("#stop:focus")
    slow.page.keyboard.press("Enter")
    slow.page.wait_for_selector("#prompt:focus")


def test_a_screen_reader_hears_an_answer_once(shown: Ui) -> None:
    said = """() => {
        window.said = [];
        new MutationObserver(() => {
            const text = document.getElementById('announcer').textContent;
            if (text) window.said.push(text);
        }).observe(document.getElementById('announcer'), {childList: true});
    }"""
    shown.page.evaluate(said)
    shown.set(temperature=0, max_tokens=30)
    shown.send("hi")
    shown.answer()
    expect(shown.page.locator("#announcer")).to_contain_text("Answer: ")
    said_in_order = shown.page.evaluate("window.said")
    assert said_in_order[-1].startswith("Answer: ")
    assert len(said_in_order) <= 2
    assert shown.page.locator("#log[aria-live], #log [aria-live]").count() == 0
    fields = shown.page.locator("button:visible, input:visible, textarea:visible, select:visible")
    unnamed = "all => all.filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()).length"
    assert fields.evaluate_all(unnamed) == 0


def test_a_phone_needs_no_scrolling_sideways(browser: Browser, standin: Serving) -> None:
    wide = (
        "x" * 300
        + "\n\n```\n"
        + "y" * 300
        + "\n```\n\n|"
        + " wide |" * 30
        + "\n|"
        + "---|" * 30
        + "\n\nhttps://test/"
        + "z" * 300
    )
    with ui(browser, standin.url, viewport=PHONE, has_touch=True, is_mobile=True) as opened:
        page = opened.open().page
        assert opened.narrower_than_the_window()
        answer_with(page, stream_of([wide]))
        opened.send("w" * 300)
        opened.answer()
        assert opened.narrower_than_the_window()
        for name, side in (("Show conversations", "#sidebar"), ("Settings", "#settings"), ("Status", "#status")):
            opened.button(name).tap()
            expect(page.locator(side)).to_be_in_viewport()
            assert page.locator("main").evaluate("node => node.inert")
            assert opened.narrower_than_the_window()
            page.keyboard.press("Escape")
            expect(page.locator(side)).not_to_be_in_viewport()
            expect(opened.button(name)).to_be_focused()
        opened.button("Show conversations").tap()
        opened.button("New conversation").tap()
        expect(page.locator("#sidebar")).not_to_be_in_viewport()
        expect(page.get_by_role("heading", name="Ask the model something")).to_be_visible()


TEXTS = """.message.user .body, .message.assistant > .body p, .body a, .body code, .body blockquote, .body th, .meta,
    .code figcaption, .chart .title, .chart .unit, .chart .top, .fine, #hint, .pill, #conversations .open, .error span,
    .error .quiet, .link"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_colours(browser: Browser, standin: Serving, scheme: str) -> None:
    source = "A [link](https://test/) and `code`.\n\n> quote\n\n```py\nx\n```\n\n| a |\n|---|\n| b |"
    with ui(browser, standin.url, color_scheme=scheme) as opened:
        page = opened.open().page
        answer_with(page, stream_of([source], end=[]))
        opened.send("hi")
        opened.answer("failed")
        assert {text: ratio for text in TEXTS.split(",") if (ratio := contrast(page, text)) < 4.5} == {}
        assert is_dark(page) == (scheme == "dark")


EDGES = "#composer, #new, .examples button, #settings [name=system], #settings [name=top_k], #settings [name=stop]"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_edges_of_controls_can_be_seen_in_both_colours(browser: Browser, standin: Serving, scheme: str) -> None:
    with ui(browser, standin.url, color_scheme=scheme) as opened:
        page = opened.open().page
        opened.button("Settings").click()
        edges = {edge: contrast(page, edge, "borderTopColor") for edge in EDGES.split(",")}
        assert {edge: ratio for edge, ratio in edges.items() if ratio < 3} == {}
        page.locator("#settings [name=top_k]").fill("-2")
        assert contrast(page, "#set-top_k-wrong") >= 4.5


def test_an_answer_stands_near_its_question(shown: Ui) -> None:
    shown.set(max_tokens=3)
    shown.send("hi")
    shown.answer()
    question = shown.page.locator(".message.user .body").bounding_box()
    answer = shown.page.locator(".message.assistant > .body").bounding_box()
    assert question
    assert answer
    assert 4 < answer["y"] - question["y"] - question["height"] < 20


def test_what_is_told_of_an_answer_has_one_line_on_a_phone(browser: Browser, standin: Serving) -> None:
    for locale in ("en-US", "zh-CN"):
        with ui(browser, standin.url, viewport=PHONE, has_touch=True, is_mobile=True, locale=locale) as opened:
            opened.open()
            pieces = (
                {"choices": [{"delta": {}, "finish_reason": "length"}]},
                {"choices": [], "usage": {"completion_tokens": 1234}},
            )
            answer_with(opened.page, stream_of(["one", "two"], end=[*pieces, "[DONE]"]))
            opened.send("hi")
            meta = opened.answer().locator(".meta")
            assert meta.evaluate("node => node.scrollWidth <= node.clientWidth")
            assert meta.evaluate("node => node.clientHeight < 2 * parseFloat(getComputedStyle(node).fontSize)")


def is_dark(page: Page) -> bool:
    color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", color))
    return red + green + blue < 3 * 128


def test_colours_and_language_can_be_chosen_and_are_remembered(shown: Ui) -> None:
    page = shown.page
    shown.button("Colours: as the system").click()
    assert not is_dark(page)
    shown.button("Colours: light").click()
    assert is_dark(page)
    shown.button("切换到中文").click()
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    page.reload()
    page.wait_for_selector("#model:enabled")
    assert is_dark(page)
    expect(page.get_by_role("heading", name="向模型提个问题")).to_be_visible()
    expect(shown.button("配色：深色")).to_be_visible()  # noqa: RUF001
    expect(page.locator(".chart .title").first).to_have_text("输出")


def test_a_chinese_browser_gets_a_chinese_page(browser: Browser, standin: Serving) -> None:
    with ui(browser, standin.url, locale="zh-CN") as opened:
        page = opened.open().page
        page.locator("#prompt").fill("你好")
        page.keyboard.press("Enter")
        expect(opened.answer().locator(".meta")).to_contain_text("首个词元")
        seen = page.locator("body").inner_text()
        assert not {word for word in ("Send", "Status", "Queue", "tokens", "Ready", "default") if word in seen}
        assert opened.narrower_than_the_window()
        expect(page.locator("#figures")).to_contain_text(re.compile(r"已运行 \d+(秒|分钟|小时)"))
        expect(page.locator("#figures")).to_contain_text("图表显示最近 1分钟")
        opened.button("设置").click()
        page.locator("#settings [name=temperature]").fill("101")
        expect(page.get_by_text("0 到 100 之间的数")).to_be_visible()


def test_motion_is_left_out_if_asked(browser: Browser, slow_standin: Serving) -> None:
    with ui(browser, slow_standin.url, reduced_motion="reduce") as opened:
        page = opened.open().page
        moving = "() => document.getAnimations().length"
        page.route(COMPLETIONS, go_on_for_ever)
        opened.send("hi")
        opened.answer("answering")
        assert page.evaluate(moving) == 0
        opened.button("Stop").click()
        opened.answer("stopped")
