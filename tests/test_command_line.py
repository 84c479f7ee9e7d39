"""``python -m client`` as a person and a pipe meet it: its output, its errors, its exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line_runs import run, run_process, start
from scripted_server import STALL, plain, scripted, stream
from serving_processes import ROOT, Serving

from agent.arithmetic_model import answer
from client.command_line import DEFAULT_URL
from config.free_ports import free_ports


def chunk(text: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of /v1/chat/completions."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": None}
    return {"object": "chat.completion.chunk", "choices": [{**choice, **more}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


def spoken(*pieces: str) -> list[bytes]:
    """A whole answer of a chat."""
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    return stream(role, *map(chunk, pieces), chunk(finish_reason="stop"), USAGE, "[DONE]")


def test_a_prompt_is_answered_from_an_argument_or_a_pipe(standin: Serving) -> None:
    prompt = "你好,世界 🙂"
    expected = answer(prompt, 300)
    assert not expected.isascii()
    where = ("--url", standin.url, "--model", "llama2")
    assert run_process("ask", prompt, *where) == (0, f"{expected}\n", "")
    assert run_process("ask", *where, given=prompt.encode()) == (0, f"{expected}\n", "")
    code, out, err = run("ask", "--json", "--max-tokens", "4", "--stop", "v", "--seed", "3", "-", *where, given="hi\n")
    assert (code, err) == (0, "")
    told = {"finish_reason": "stop_sequence", "generated_tokens": 3, "seed": 3}
    assert json.loads(out) == {"generated_text": "dg", **told}


def test_sampling_settings_are_sent() -> None:
    with scripted(stream({"token": {"text": "a", "index": 1}})) as server:
        words = ("--temperature", "0.5", "--top-p", "0.9", "--top-k", "5", "--api-key", "k")
        assert run("ask", "hi", "--model", "m", "--url", server.url, *words)[:2] == (0, "a\n")
        assert run("ask", "hi", "--model", "m", "--url", server.url, "--temperature", "0")[0] == 0
        first, second = server.requests
    assert first.line == "POST /models/m/generate_stream HTTP/1.1"
    assert first.headers["authorization"] == "Bearer k"
    wanted = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 5}
    assert first.body["parameters"] == {**wanted, "return_full_text": False, "return_protocol": "lines"}
    assert second.body["parameters"]["do_sample"] is False


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("ask", "hi", "--model", "gpt", "--url", "{standin}"), 1, "llama2, internlm"),
        (("ask", "hi", "--model", "llama2", "--url", "{standin}", "--temperature", "-1"), 1, "temperature"),
        (("ask", "--model", "llama2", "--url", "{standin}"), 2, "there is no prompt"),
        (("status", "--url", "{nobody}"), 1, "no connection to {nobody}"),
        (("ask", "hi", "--url", "nobody"), 2, "'nobody' is not the URL of a server"),
        (("ask", "hi", "--ca", "/nowhere", "--url", "https://127.0.0.1"), 2, "No such file"),
        (("ask", "hi", "--top-k", "many"), 2, "invalid int value"),
        ((), 2, "COMMAND"),
    ],
)
def test_what_goes_wrong_is_said_on_the_side(standin: Serving, words: tuple[str, ...], code: int, message: str) -> None:
    places = {"standin": standin.url, "nobody": f"http://127.0.0.1:{free_ports(1)[0]}"}
    found = run(*(word.format(**places) for word in words))
    assert found[:2] == (code, "")
    assert message.format(**places) in found[2]
    assert "Traceback" not in found[2]


def test_what_is_not_utf8_is_refused(standin: Serving) -> None:
    where = ("ask", "--model", "llama2", "--url", standin.url)
    refused = (2, "", "this is not UTF-8, on the command line or at standard input\n")
    assert run_process(*where, given="é".encode("latin-1")) == refused
    assert run_process(*where, os.fsdecode(b"\xe9")) == refused


def test_a_reader_that_leaves_ends_it_quietly(slow_standin: Serving) -> None:
    words = ("ask", "hi", "--model", "llama2", "--url", slow_standin.url, "--max-tokens", "300")
    with start(*words) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"d"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_a_terminal_gets_no_control_characters() -> None:
    text = "\x1b]0;title\x07\x1b[31mred\x9b\ttab"
    with scripted(stream({"token": {"text": text, "index": 1}}, {"error": "\x1b[2J"})) as server:
        words = ("ask", "hi", "--model", "m", "--url", server.url)
        ours, theirs = pty.openpty()
        with start(*words, stdout=theirs) as process:
            os.close(theirs)
            _, err = process.communicate(timeout=60)
            shown = os.read(ours, 1000).decode()
            os.close(ours)
        assert shown == "\ufffd]0;title\ufffd\ufffd[31mred\ufffd\ttab\r\n".replace("\ufffd", "?")
        assert (process.returncode, err.decode()) == (1, "error: \ufffd[2J\n")
        assert run_process(*words)[1] == f"{text}\n"  # a pipe gets what came


def test_a_chat_remembers_what_was_said() -> None:
    with scripted(
        plain(200, '{"data": [{"id": "first"}, {"id": "other"}]}'), spoken("你", "好"), spoken("🙂")
    ) as server:
        words = ("chat", "--url", server.url, "--system", "Be brief.", "--max-tokens", "9", "--top-k", "2")
        assert run(*words, given="hello\n\n再见\n") == (0, "你好\n🙂\n", "")
        listed, first, second = server.requests
    assert listed.line == "GET /v1/models HTTP/1.1"
    begin = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    asked = {"model": "first", "max_tokens": 9, "top_k": 2, "stream": True, "stream_options": {"include_usage": True}}
    assert first.body == {**asked, "messages": begin}
    more = [{"role": "assistant", "content": "你好"}, {"role": "user", "content": "再见"}]
    assert second.body == {**asked, "messages": [*begin, *more]}


def test_a_chat_for_programs_says_all_in_lines_of_json() -> None:
    with scripted(spoken("a", "b"), spoken()) as server:
        code, out, _ = run("chat", "--json", "--model", "m", "--url", server.url, given="one\ntwo\n")
    common = {"role": "assistant", "finish_reason": "stop", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    assert code == 0
    assert list(map(json.loads, out.splitlines())) == [{**common, "content": "ab"}, {**common, "content": ""}]


def test_a_talk_at_a_terminal_ends_with_ctrl_d() -> None:
    with scripted(spoken("你好"), plain(400, '{"error": {"message": "too long"}}')) as server:
        ours, theirs = pty.openpty()
        words = ("chat", "--model", "m", "--url", server.url)
        with start(*words, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            screen = Screen(ours)
            screen.wait_for("> ")
            for typed, expected in ((b"hello\r", "2 tokens in"), (b"again\r", "error: too long")):
                os.write(ours, typed)
                screen.wait_for(expected)
                screen.wait_for("> ")
            os.write(ours, b"\x04")
            assert process.wait(60) == 0
        os.close(ours)
    assert "??" in screen.shown  # the characters that a terminal of ASCII does not have


class Screen:
    """What a terminal shows."""

    def __init__(self, terminal: int) -> None:
        self.shown = ""
        self._terminal = terminal
        self._seen = 0

    def wait_for(self, text: str) -> None:
        """Wait for ``text`` after what was waited for before."""
        while (found := self.shown.find(text, self._seen)) < 0:
            assert select.select([self._terminal], [], [], 30)[0], f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._terminal, 1000).decode()
        self._seen = found + len(text)


def test_ctrl_c_ends_an_answer_and_not_the_chat() -> None:
    with scripted(stream(chunk("half"), end=STALL), spoken("whole")) as server:
        with start("chat", "--model", "m", "--url", server.url) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"one\n")
            process.stdin.flush()
            assert process.stdout.read(4) == b"half"
            process.send_signal(signal.SIGINT)
            assert server.left.wait(60)  # its connection is closed
            out, err = process.communicate(b"two\n", timeout=60)
        assert (process.returncode, out, err) == (0, b"\nwhole\n", b"")
        assert [message["content"] for message in server.requests[1].body["messages"]] == ["one", "half", "two"]


def test_ctrl_c_ends_a_question() -> None:
    with scripted(stream({"token": {"text": "half", "index": 1}}, end=STALL)) as server:
        with start("ask", "hi", "--model", "m", "--url", server.url) as process:
            assert process.stdout is not None
            assert process.stdout.read(4) == b"half"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, b"\n", b"")
        assert server.left.wait(60)


def test_a_chat_in_a_pipe_ends_with_the_first_error() -> None:
    refused = plain(400, '{"error": {"message": "too long", "param": "messages"}}', "X-Request-Id: r1")
    with scripted(spoken("a"), refused) as server:
        found = run("chat", "--model", "m", "--url", server.url, given="one\ntwo\nthree\n")
        assert found == (1, "a\n", "error: too long (request id r1)\n")
        assert len(server.requests) == 2


def test_models_are_listed() -> None:
    with scripted(plain(200, '{"object": "list", "data": [{"id": "a"}, {"id": "b"}]}')) as server:
        assert run("models", "--url", server.url) == (0, "a\nb\n", "")
        assert run("models", "--json", "--url", server.url) == (0, '{"id": "a"}\n{"id": "b"}\n', "")
    with scripted(plain(200, "[]")) as server:
        assert run("models", "--url", server.url)[0] == 1


def test_the_status_of_a_server(standin: Serving, tmp_path: Path) -> None:
    code, out, err = run("status", "--url", standin.url)
    assert (code, err) == (0, "")
    assert out.startswith("ready\nbatch size 0, waiting 0\nllama2: ")
    found = json.loads(run("status", "--json", "--url", standin.url)[1])
    assert (found["ready"], found["reason"], found["models"]["llama2"]["agents_ready"]) == (True, None, 1)


def test_a_server_that_is_not_ready_says_why() -> None:
    number = stream({"event": "message", "retry": 30000, "data": 4})
    metrics = 'mindspore_llm_num_requests_running{engine="%d",model_name="m"} 1.0\n'
    metrics = metrics % 0 + metrics % 1 + 'other{model_name="m"} 1.0\n'
    refused = plain(503, '{"error": "waiting for m", "field": null}', "Retry-After: 5")
    with scripted(refused, number, number, plain(200, metrics)) as server:
        code, out, _ = run("status", "--url", server.url)
        assert [request.line.split()[1] for request in server.requests] == [
            "/health",
            "/serving/get_bs",
            "/serving/get_request_numbers",
            "/metrics",
        ]
    assert (code, out) == (1, "not ready: waiting for m\nbatch size 4, waiting 4\nm: num_requests_running 2\n")


def shown(language: str) -> list[str]:
    """The blocks of docs/client.md."""
    text = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.parametrize(
    "line", [line for block in shown("sh") for line in block.splitlines() if " -m client " in line]
)
def test_a_command_that_is_shown_does_what_it_says(line: str, standin: Serving) -> None:
    words = shlex.split(line.partition(" < ")[0])[3:]
    with scripted(plain(200, '{"data": [{"id": "llama2"}]}'), spoken("Yes.")) as server:
        chats = words[0] in ("chat", "models")
        code, out, err = run(*words, "--url", server.url if chats else standin.url, given="What is this?\n")
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize("code", shown("python"), ids=lambda code: code.splitlines()[0])
def test_python_that_is_shown_runs(code: str, standin: Serving) -> None:
    assert DEFAULT_URL in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace(DEFAULT_URL, standin.url)], cwd=ROOT, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout


@pytest.mark.slow
def test_a_chat_with_our_own_server(standin: Serving) -> None:
    where = ("--url", standin.url, "--max-tokens", "40")
    expected = run("ask", "hi 你好", "--model", "chat", *where)  # a served name with the chat template
    assert expected[0] == 0
    assert run("chat", "--model", "llama2", "--temperature", "0", *where, given="hi 你好\n") == expected
    assert run("models", "--url", standin.url) == (0, "llama2\ninternlm\ninternlm-chat\nchat\n", "")
    code, out, _ = run("chat", "--json", *where, given="one\ntwo\n")
    assert code == 0
    assert all(json.loads(line)["usage"]["completion_tokens"] > 0 for line in out.splitlines())
