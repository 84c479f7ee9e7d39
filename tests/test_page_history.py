"""The page's conversations: kept in the browser, changed, deleted, taken along."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from browser import Ui, answer_with, expected, running, same_words, stream_of
from playwright.sync_api import expect
from serving_processes import Serving, eventually

pytestmark = pytest.mark.slow


def test_the_history_stays_in_the_browser(shown: Ui) -> None:
    shown.set(max_tokens=3, system="Be kind")
    shown.send("first one")
    first = shown.text()
    shown.button("New conversation").click()
    expect(shown.page.get_by_role("heading", name="Ask the model something")).to_be_visible()
    shown.send("second one")
    shown.answer()
    titles = shown.page.locator("#conversations .open")
    expect(titles).to_have_text(["second one", "first one"])
    shown.page.reload()
    expect(titles).to_have_text(["second one", "first one"])
    expect(titles.first).to_have_attribute("aria-current", "true")
    titles.last.click()
    assert shown.text() == first
    shown.button("Settings").click()
    expect(shown.page.locator("#settings [name=system]")).to_have_value("Be kind")


def test_a_conversation_can_be_deleted_and_brought_back(shown: Ui) -> None:
    shown.set(max_tokens=3)
    shown.send("gone")
    text = shown.text()
    shown.page.locator("#conversations li").hover()
    shown.button("Delete “gone”").click()
    expect(shown.page.locator("#conversations li")).to_have_count(0)
    expect(shown.page.locator(".message")).to_have_count(0)
    shown.button("Undo").click()
    assert shown.text() == text
    shown.button("Delete all").click()
    shown.page.reload()
    shown.page.wait_for_selector("#model:enabled")
    expect(shown.page.locator("#conversations li")).to_have_count(0)


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_away(slow: Ui, slow_standin: Serving) -> None:
    slow.send("gone")
    expect(slow.page.locator(".message.assistant > .body")).not_to_be_empty()
    slow.button("Delete all").click()
    eventually(lambda: running(slow_standin) == 0)
    slow.page.reload()
    slow.page.wait_for_selector("#model:enabled")
    expect(slow.page.locator("#conversations li")).to_have_count(0)


def test_another_conversation_can_be_read_while_one_is_answered(slow: Ui) -> None:
    slow.send("long")
    body = slow.page.locator(".message.assistant > .body")
    expect(body).not_to_be_empty()
    slow.button("New conversation").click()
    expect(slow.page.locator(".message")).to_have_count(0)
    expect(slow.button("Send")).to_be_visible()
    slow.page.locator("#conversations .open").click()
    before = len(slow.text("answering"))
    eventually(lambda: len(body.inner_text()) > before)
    slow.button("Stop").click()
    slow.answer("stopped")


def test_a_page_that_is_closed_in_the_middle_says_so_later(slow: Ui) -> None:
    slow.send("long")
    expect(slow.page.locator(".message.assistant > .body")).not_to_be_empty()
    slow.page.reload()
    failed = slow.answer("failed")
    expect(failed.locator(".error")).to_contain_text("The page was closed")
    assert failed.locator("> .body").inner_text().strip()


def test_the_export_is_in_the_words_of_the_protocol(shown: Ui) -> None:
    shown.set(max_tokens=3, seed=5, system="Be kind")
    shown.send("hi")
    text = shown.text()
    with shown.page.expect_download() as download:
        shown.button("Export this conversation").click()
    content = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert download.value.suggested_filename == "conversation.json"
    assert (content["model"], content["max_tokens"], content["seed"]) == ("llama2", 3, 5)
    assert [message["role"] for message in content["messages"]] == ["system", "user", "assistant"]
    assert same_words(text, content["messages"][2]["content"])


def test_a_message_can_be_edited_and_an_answer_made_anew(shown: Ui, client: httpx.Client) -> None:
    settings = {"temperature": 0, "max_tokens": 12}
    shown.set(**settings)
    shown.send("first")
    shown.answer()
    shown.send("second")
    expect(shown.page.locator(".message")).to_have_count(4)
    shown.answer()
    shown.page.locator(".message.user").first.hover()
    shown.button("Edit").first.click()
    expect(shown.page.locator(".edit")).to_contain_text("Messages after this one are dropped.")
    shown.page.get_by_label("Edit the message").fill("third")
    shown.page.locator(".edit").get_by_role("button", name="Send").click()
    expect(shown.page.locator(".message")).to_have_count(2)
    assert same_words(shown.text(), expected(client, "third", **settings))
    shown.set(max_tokens=20)
    shown.button("Answer again").click()
    expect(shown.answer().locator(".meta")).to_contain_text("20 tokens")
    assert same_words(shown.text(), expected(client, "third", temperature=0, max_tokens=20))


def test_an_answer_and_its_code_can_be_copied(shown: Ui) -> None:
    source = "Run **this**:\n\n```sh\nmake\n\tserve\n```"
    answer_with(shown.page, stream_of([source]))
    shown.send("hi")
    shown.answer().get_by_role("button", name="Copy", exact=True).click()
    expect(shown.page.locator("#announcer")).to_have_text("Copied")
    assert shown.page.evaluate("navigator.clipboard.readText()") == source
    shown.button("Copy code").click()
    expect(shown.button("Copied").last).to_be_visible()
    assert shown.page.evaluate("navigator.clipboard.readText()") == "make\n\tserve"
    expect(shown.button("Copied")).to_have_count(0)


def test_two_tabs_do_not_undo_each_others_work(shown: Ui, standin: Serving) -> None:
    shown.set(max_tokens=3)
    shown.send("one")
    shown.answer()
    other = shown.page.context.new_page()
    other.goto(f"{standin.url}/ui")
    other.wait_for_selector("#model:enabled")
    other.locator("#prompt").fill("two")
    other.keyboard.press("Enter")
    other.wait_for_selector(".message.assistant[data-state=done]")
    expect(shown.page.locator("#conversations .open")).to_have_text(["two", "one"])
    expect(shown.page.locator(".message.user .body")).to_have_text("one")
    other.get_by_role("button", name="Delete all").click()
    expect(shown.page.locator("#conversations li")).to_have_count(0)


def other_tab(shown: Ui) -> Ui:
    """Another tab of the same browser, on the newest conversation."""
    other = Ui(shown.page.context.new_page(), shown.url).open()
    other.page.locator("#conversations .open").first.click()
    other.answer()
    return other


def test_a_conversation_that_another_tab_deletes_is_closed_and_stays_away(shown: Ui) -> None:
    shown.set(max_tokens=3, system="Be kind")
    shown.send("old")
    shown.answer()
    other = other_tab(shown)
    other.button("Delete all").click()
    expect(shown.page.locator("#notice")).to_contain_text("deleted in another tab")
    expect(shown.page.locator(".message")).to_have_count(0)
    expect(shown.page.locator("#settings [name=system]")).to_have_value("Be kind")
    shown.send("new")
    shown.answer()
    for tab in (shown, other):
        expect(tab.page.locator("#conversations .open")).to_have_text(["new"])
    other.button("Delete all").click()
    expect(shown.page.locator("#conversations li")).to_have_count(0)


def test_an_answer_ends_when_another_tab_deletes_its_conversation(slow: Ui, slow_standin: Serving) -> None:
    slow.send("old")
    expect(slow.page.locator(".message.assistant > .body")).not_to_be_empty()
    other = Ui(slow.page.context.new_page(), slow.url).open()
    expect(other.page.locator("#conversations .open")).to_have_text(["old"])
    other.button("Delete all").click()
    eventually(lambda: running(slow_standin) == 0)
    expect(slow.page.locator(".message")).to_have_count(0)
    expect(slow.button("Send")).to_be_visible()
    expect(other.page.locator("#conversations li")).to_have_count(0)


def test_a_tab_that_has_not_heard_of_it_brings_nothing_back(shown: Ui) -> None:
    shown.set(max_tokens=3)
    shown.send("old")
    shown.answer()
    # A tab hears nothing of what it removes itself, as one that sleeps hears nothing of the others.
    shown.page.evaluate(
        "localStorage.removeItem(Object.keys(localStorage).find((key) => key.includes('conversation/')))"
    )
    shown.send("new")
    expect(shown.page.locator("#notice")).to_contain_text("deleted in another tab")
    expect(shown.page.locator("#prompt")).to_have_value("new")
    expect(shown.page.locator(".message")).to_have_count(0)
    shown.page.locator("#prompt").press("Enter")
    shown.answer()
    expect(shown.page.locator(".message.user .body")).to_have_text(["new"])
    expect(shown.page.locator("#conversations .open")).to_have_text(["new"])


def test_a_full_storage_is_said_and_nothing_breaks(shown: Ui) -> None:
    shown.page.evaluate("""() => {
        for (let size = 1 << 22; size > 0; size >>= 1) {
            try {
                for (let i = 0; ; i += 1) localStorage.setItem(`filler ${size} ${i}`, 'x'.repeat(size));
            } catch { /* no room for one of this size */ }
        }
    }""")
    shown.set(max_tokens=3)
    shown.send("hi")
    shown.answer()
    expect(shown.page.locator("#notice")).to_contain_text("storage is full")
