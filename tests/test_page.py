"""The page in a real browser, before a real server on the stand-in model: answers, errors, figures."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import httpx
import pytest
from browser import (
    COMPLETIONS,
    NET_ERROR,
    Ui,
    answer_with,
    expected,
    go_on_for_ever,
    running,
    same_words,
    stream_of,
    ui,
)
from playwright.sync_api import Browser, expect
from serving_processes import Serving, eventually, serving, standin_deployment

pytestmark = pytest.mark.slow


def test_an_answer_comes_with_its_figures(shown: Ui, client: httpx.Client) -> None:
    shown.set(temperature=0, max_tokens=40)
    shown.send("hi")
    assert same_words(shown.text(), expected(client, "hi", temperature=0, max_tokens=40))
    meta = shown.answer().locator(".meta").inner_text()
    for part in ("tokens/s", "first token after", "40 tokens", "limit of tokens", "llama2"):
        assert part in meta


def test_the_next_question_carries_what_was_said(shown: Ui, client: httpx.Client) -> None:
    settings = {"temperature": 0, "max_tokens": 12}
    shown.set(**settings)
    shown.send("first")
    shown.answer()
    shown.send("second")
    expect(shown.page.locator(".message")).to_have_count(4)
    first = expected(client, "first", **settings)
    assert same_words(shown.text(), expected(client, "first", first, "second", **settings))


def test_every_setting_is_sent_and_an_empty_one_is_not(shown: Ui) -> None:
    bodies = []
    shown.page.on("request", lambda request: bodies.append(request.post_data_json) if "/chat/" in request.url else None)
    shown.set(
        system="Be brief",
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        max_tokens=3,
        seed=11,
        stop="one\ntwo three\n\\nQ:\\\\n\\d",
    )
    shown.send("hi")
    shown.answer()
    shown.set(system="", temperature="", top_p="", top_k="", max_tokens=3, seed="", stop="")
    shown.send("again")
    expect(shown.page.locator(".message")).to_have_count(4)
    shown.answer()
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 3, "seed": 11}
    sampling["stop"] = ["one", "two three", "\nQ:\\n\\d"]
    always = {"model": "llama2", "stream": True, "stream_options": {"include_usage": True}}
    assert bodies[0] == {"messages": messages, **sampling, **always}
    assert {name for name in bodies[1] if name not in always} == {"messages", "max_tokens"}
    assert bodies[1]["messages"][0] == {"role": "user", "content": "hi"}


def test_stop_texts_are_shown_as_they_were_written(shown: Ui) -> None:
    stop = "two three\n\\nQ:\\tA\\\\n"
    shown.set(max_tokens=2, stop=stop)
    shown.send("hi")
    shown.answer()
    shown.page.reload()
    expect(shown.page.locator("#settings [name=stop]")).to_have_value(stop)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 100, "top_p": 0.000001, "top_k": -1, "seed": -5}, {"temperature": 0, "top_k": 2147483647}],
)
def test_what_the_server_takes_can_be_set(shown: Ui, settings: dict[str, float]) -> None:
    shown.set(max_tokens=2, **settings)
    with shown.page.expect_request(COMPLETIONS) as sent:
        shown.send("hi")
    shown.answer()
    assert settings.items() <= sent.value.post_data_json.items()


WRONG = {
    "temperature": ("100.5", "A number from 0 to 100"),
    "top_p": ("0", "A number above 0, 1 at most"),
    "top_k": ("1.5", "A whole number from -1 to 2,147,483,647"),
    "max_tokens": ("0", "A whole number from 1 to 2,147,483,647"),
    "stop": ("x" * 1025, "1,024 characters in a line at most"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_that_the_server_would_refuse_is_explained_and_nothing_is_sent(shown: Ui, name: str) -> None:
    value, allowed = WRONG[name]
    asked: list[str] = []
    shown.page.on("request", lambda request: asked.append(request.url) if "/chat/" in request.url else None)
    shown.set(**{"max_tokens": 2, name: value})
    shown.send("hi")
    field = shown.page.locator(f"#settings [name={name}]")
    expect(field).to_be_focused()  # the panel is open again
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_accessible_description(re.compile(f"^{allowed}"))
    expect(shown.page.get_by_text(allowed)).to_be_visible()
    expect(shown.page.locator("#notice")).to_contain_text("Not sent: “")
    expect(shown.page.locator("#prompt")).to_have_value("hi")
    expect(shown.page.locator(".message")).to_have_count(0)
    assert asked == []
    shown.button("Back to defaults").click()
    expect(field).to_have_value("")
    expect(field).to_have_attribute("aria-invalid", "false")
    expect(shown.page.get_by_text(allowed)).to_be_hidden()
    shown.page.locator("#settings [name=max_tokens]").fill("2")
    shown.page.locator("#prompt").press("Enter")
    shown.answer()


def test_a_wrong_setting_keeps_an_answer_from_being_made_anew(shown: Ui) -> None:
    shown.set(max_tokens=2)
    shown.send("hi")
    text = shown.text()
    shown.set(temperature=-1)
    shown.button("Answer again").click()
    expect(shown.page.locator("#notice")).to_contain_text("Not sent: “Temperature”")
    assert shown.text() == text


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_the_text_and_frees_the_request(slow: Ui, slow_standin: Serving, how: str) -> None:
    slow.send("hi")
    slow.answer("answering")
    body = slow.page.locator(".message.assistant > .body")
    expect(body).not_to_be_empty()
    assert running(slow_standin) == 1
    if how == "button":
        slow.button("Stop").click()
    else:
        slow.page.keyboard.press("Escape")
    text = slow.text("stopped")
    assert text.strip()
    assert "stopped" in slow.answer("stopped").locator(".meta").inner_text()
    eventually(lambda: running(slow_standin) == 0)
    assert slow.text("stopped") == text
    expect(slow.button("Send")).to_be_visible()


def test_the_text_is_shown_while_it_comes_and_followed(slow: Ui) -> None:
    slow.send("line\n" * 60)
    slow.answer("answering")
    body = slow.page.locator(".message.assistant > .body")
    lengths = [0]
    while len(lengths) < 4:  # it grows at least three times
        length = len(body.inner_text())
        if length > lengths[-1]:
            lengths.append(length)
    log = slow.page.locator("#log")
    rest = "node => node.scrollHeight - node.scrollTop - node.clientHeight"
    assert log.evaluate(rest) < 60
    log.evaluate("node => { node.scrollTop = 0; }")  # who reads above is left there
    expect(slow.button("To the latest message")).to_be_visible()
    before = len(body.inner_text())
    eventually(lambda: len(body.inner_text()) > before)
    assert log.evaluate("node => node.scrollTop") == 0
    slow.button("To the latest message").click()
    assert log.evaluate(rest) < 60
    slow.button("Stop").click()
    slow.answer("stopped")


def test_the_page_itself_never_scrolls(shown: Ui) -> None:
    for _ in range(3):
        shown.send("line\n" * 30)
        shown.answer()
    assert shown.page.evaluate("document.documentElement.scrollHeight <= window.innerHeight")
    assert shown.page.evaluate("document.querySelector('#log').scrollHeight > window.innerHeight"), "too short to tell"


def test_what_the_server_refuses_is_said_and_can_be_tried_again(shown: Ui) -> None:
    shown.forgiven = NET_ERROR
    shown.set(max_tokens=100000)
    shown.send("hi")
    error = shown.answer("failed").locator(".error")
    expect(error).to_contain_text("shorten the question")
    expect(error.locator(".detail")).to_contain_text("max_tokens:")
    shown.set(max_tokens=3)
    error.get_by_role("button", name="Try again").click()
    shown.answer()
    expect(shown.page.locator(".message")).to_have_count(2)


def test_an_error_in_the_middle_keeps_the_text_so_far(shown: Ui) -> None:
    shown.set(max_tokens=3)
    error = {"error": {"message": "the model is out of ink", "type": "server_error", "param": None, "code": None}}
    answer_with(shown.page, stream_of(["So ", "far"], end=[error, "[DONE]"]), times=1)
    shown.send("hi")
    failed = shown.answer("failed")
    expect(failed.locator("> .body")).to_have_text("So far")
    expect(failed.locator(".error")).to_contain_text("The server could not finish. the model is out of ink")
    failed.get_by_role("button", name="Try again").click()
    assert "So far" not in shown.text()


# Status and code of an error, and what a Chinese page says of it.
TOLD = {
    (401, "invalid_api_key"): "不接受此 API 密钥",
    (400, "context_length_exceeded"): "超出模型的上下文长度",
    (400, None): "服务器拒绝了此请求",
    (429, "queue_full"): "服务器繁忙",
    (429, None): "服务器繁忙",
    (429, "queue_timeout"): "未能及时处理",
    (408, None): "未能及时处理",
    (503, "agents_unavailable"): "代理进程尚未就绪",
    (503, "shutting_down"): "服务器正在关闭",
    (500, None): "服务器未能完成回答",
}


@pytest.mark.parametrize(
    ("status", "code", "streamed"),
    [(*case, False) for case in TOLD] + [(status, code, True) for status, code in TOLD if code or status == 500],
)
def test_an_error_is_said_in_the_language_of_the_page(
    browser: Browser, standin: Serving, status: int, code: str | None, streamed: bool
) -> None:
    error = {"error": {"message": "in the server's words", "type": "x", "param": None, "code": code}}
    with ui(browser, standin.url, locale="zh-CN") as opened:
        opened.forgiven = NET_ERROR
        page = opened.open().page
        if streamed:  # it has begun, so that only the code says what kind of error it is
            answer_with(page, stream_of(["So far"], end=[error]))
        else:
            page.route(COMPLETIONS, lambda route: route.fulfill(status=status, json=error))
        opened.send("hi")
        told = opened.answer("failed").locator(".error")
        expect(told).to_contain_text(TOLD[status, code])
        expect(told.locator(".detail")).to_have_text("in the server's words")


def test_a_network_that_fails_is_said_in_the_language_of_the_page(browser: Browser, standin: Serving) -> None:
    with ui(browser, standin.url, locale="zh-CN") as opened:
        opened.forgiven = NET_ERROR
        opened.open().page.route(COMPLETIONS, lambda route: route.abort())
        opened.send("hi")
        expect(opened.answer("failed").locator(".error")).to_contain_text("无法连接服务器")
        expect(opened.page.locator(".error .detail")).to_have_count(0)


def test_a_failed_question_is_not_sent_along_and_can_be_changed(shown: Ui, client: httpx.Client) -> None:
    shown.forgiven = NET_ERROR
    settings = {"temperature": 0, "max_tokens": 12}
    shown.set(**settings)
    shown.send("first")
    first = shown.text()
    shown.send("long " * 5000)
    failed = shown.answer("failed")
    expect(failed.locator(".error")).to_contain_text("does not fit into the model")
    expect(failed.locator(".meta")).to_contain_text("this question is not sent along with the next one")
    expect(shown.button("Answer again")).to_have_count(0)  # it would do what "Try again" does
    expect(shown.button("Try again")).to_have_count(1)
    expect(shown.page.locator(".message.user").last.locator(".buttons")).to_have_css("opacity", "1")
    with shown.page.expect_request(COMPLETIONS) as sent:
        shown.send("second")
    spoken = [(one["role"], one["content"].strip()) for one in sent.value.post_data_json["messages"]]
    assert [role for role, _ in spoken] == ["user", "assistant", "user"]
    assert (spoken[0][1], spoken[2][1]) == ("first", "second")
    assert same_words(first, spoken[1][1])
    expect(shown.page.locator(".message")).to_have_count(6)
    shown.answer()
    shown.page.locator(".message.user").nth(1).hover()
    shown.button("Edit").nth(1).click()
    shown.page.get_by_label("Edit the message").fill("short")
    shown.page.keyboard.press("Enter")
    expect(shown.page.locator(".message")).to_have_count(4)
    expect(shown.page.locator(".message.user .body").last).to_have_text("short")
    shown.answer()


def test_what_a_model_thinks_first_is_folded_away(shown: Ui) -> None:
    answer_with(shown.page, stream_of(["<thi", "nk>Two and ", "*two*</thi", "nk>\n\nThe answer is **4**."]))
    shown.send("hi")
    assert shown.text() == "The answer is 4."
    thought = shown.page.get_by_text("Two and two")
    expect(thought).to_be_hidden()
    shown.page.get_by_text("What it thought").click()
    expect(thought).to_be_visible()


@pytest.mark.parametrize(("pieces", "tokens"), [(["one", " two"], 2), (["all at once"], 9)])
def test_a_short_answer_has_no_rate(shown: Ui, pieces: list[str], tokens: int) -> None:
    usage = {"choices": [], "usage": {"completion_tokens": tokens}}
    answer_with(shown.page, stream_of(pieces, end=[usage, "[DONE]"]))
    shown.send("hi")
    meta = shown.answer().locator(".meta")
    expect(meta).to_contain_text(f"{tokens} tokens")
    expect(meta).not_to_contain_text("tokens/s")


def test_a_stream_without_its_end_is_an_error(shown: Ui) -> None:
    answer_with(shown.page, stream_of(["So ", "far"], end=[]))
    shown.send("hi")
    failed = shown.answer("failed")
    expect(failed.locator("> .body")).to_have_text("So far")
    expect(failed.locator(".error")).to_contain_text("connection broke")


def test_a_server_that_dies_is_missed_and_found_again(browser: Browser, tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path, [{"step_seconds": 0.02}])
    try:
        deployment.start_agents()
        app = deployment.start_app()
        with ui(browser, deployment.url) as opened:
            opened.forgiven = NET_ERROR
            page = opened.open().page
            page.route(COMPLETIONS, go_on_for_ever)
            opened.send("hi")
            body = page.locator(".message.assistant > .body")
            expect(body).not_to_be_empty()
            app.send(signal.SIGKILL)
            app.wait()
            expect(opened.answer("failed").locator(".error")).to_contain_text("connection broke")
            assert body.inner_text().strip()
            expect(page.locator("#banner")).to_contain_text("The server is away")
            deployment.start_app()
            expect(page.locator("#banner")).to_be_hidden()
            expect(page.locator("#announcer")).to_have_text("The server is back")
            page.unroute(COMPLETIONS)
            opened.set(max_tokens=3)
            opened.button("Try again").click()
            opened.answer()
    finally:
        deployment.stop()


def test_agents_that_are_away_are_shown(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path) as deployment, ui(browser, deployment.url) as opened:
        opened.forgiven = NET_ERROR
        page = opened.open().page
        agents = page.locator(".agents li")
        expect(agents).to_have_attribute("data-state", "ready")
        assert deployment.agents
        deployment.agents.stop()
        expect(agents).to_have_attribute("data-state", "away")
        expect(page.locator("#banner")).to_contain_text("waits for its agents")
        deployment.start_agents()
        expect(agents).to_have_attribute("data-state", "ready")
        expect(page.locator("#banner")).to_be_hidden()


def test_the_charts_say_what_they_span(browser: Browser, standin: Serving) -> None:
    with ui(browser, standin.url) as opened:
        clock = opened.page.clock
        clock.install()
        opened.open()
        caption = opened.page.locator("#figures")
        expect(caption).to_contain_text("The charts show the last 1 min")
        for minutes in range(1, 6):
            clock.fast_forward(60_000)
            expect(caption).to_contain_text(f"The charts show the last {minutes} min")
        clock.fast_forward(600_000)  # as if the page had been hidden meanwhile
        for _ in range(2):  # the second question follows the figures of the first answer
            with opened.page.expect_request("**/serving/status"):
                pass
        expect(caption).to_contain_text("The charts show the last 5 min")


def test_the_figures_are_those_of_the_moment(slow: Ui) -> None:
    chart = slow.page.locator(".chart", has_text="Running")
    expect(chart.locator(".value")).to_have_text("0")
    expect(chart.locator(".unit")).to_have_text("of 2")
    slow.send("hi " * 1000)  # enough to be seen in the cache
    expect(chart.locator(".value")).to_have_text("1")
    expect(slow.page.locator(".chart", has_text="Cache").locator(".value")).not_to_have_text("0.0")
    expect(slow.page.locator(".chart", has_text="Output").locator(".value")).not_to_have_text("0")
    expect(slow.page.locator("#figures")).to_contain_text("The charts show the last 1 min")
    picture = slow.page.locator(".chart", has_text="Output").get_by_role("img")
    assert "Output: now" in (picture.get_attribute("aria-label") or "")
    slow.button("Stop").click()
    expect(chart.locator(".value")).to_have_text("0")
