"""``python -m client`` where its user has something else in mind: closed streams, empty values, keys, long prompts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line_runs import PLAIN, run, run_process
from scripted_server import STALL, plain, scripted, stream
from serving_processes import ROOT, Serving

from client.command_line import KEY, URL, main
from config.free_ports import free_ports


def in_shell(line: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a line of shell, in which $C stands for the command."""
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=ROOT,
        env={**PLAIN, "C": f"{sys.executable} -m client"},
        capture_output=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_closed_streams_hold_nothing_and_take_nothing(standin: Serving) -> None:
    where = f"--model llama2 --url {standin.url} --max-tokens 4"
    assert in_shell(f"$C ask hi {where} >&-") == (0, "", "")
    assert in_shell(f"$C ask {where} <&-") == (
        2,
        "",
        "there is no prompt: give one as an argument or at standard input\n",
    )
    assert in_shell(f"$C chat {where} <&-") == (0, "", "")
    assert in_shell(f"$C ask hi {where} --top-k many 2>&-") == (2, "", "")
    assert in_shell(f"$C ask hi --model nobody --url {standin.url} 2>&-") == (1, "", "")  # no error among answers
    assert in_shell(f"$C ask hi {where} <&- >&- 2>&-") == (0, "", "")


def test_a_full_disk_is_said() -> None:
    with scripted(stream({"token": {"text": "a", "index": 1}})) as server:
        code, _, err = in_shell(f"$C ask hi --model m --url {server.url} > /dev/full")
    assert (code, err) == (2, "[Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", ""), "model_type '' is no served name"),
        (("--model", "a/b"), "model_type 'a/b' is no served name"),
        (("--api-key", ""), "an API key is made of printable ASCII characters"),
        (("--api-key", "key "), "with no space around them"),
        (("--timeout", "nan"), "--timeout: nan is no time above 0"),
        (("--timeout", "0"), "--timeout: 0 is no time above 0"),
        (("--timeout", "soon"), "--timeout: soon is no time above 0"),
    ],
)
def test_values_that_say_nothing_are_refused(words: tuple[str, ...], message: str) -> None:
    with scripted(stream()) as server:
        code, out, err = run("ask", "hi", "--url", server.url, *words)
        assert (code, out, server.requests) == (2, "", [])
    assert message in err
    assert "Traceback" not in err


def test_a_number_that_no_json_can_hold_is_named() -> None:
    with scripted(stream()) as server:
        for command in ("ask", "chat"):
            words = (command, "--model", "m", "--url", server.url, "--temperature", "nan")
            assert run(*words, given="hi") == (
                1,
                "",
                "error: temperature: must be a finite number, not nan; leave it out to have the server's default\n",
            )
        assert server.requests == []


def test_empty_variables_are_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(URL, "")
    monkeypatch.setenv(KEY, "")
    with scripted(plain(200, '{"data": [{"id": "a"}]}')) as server:
        assert run("models", "--url", f"{server.url}/v1/") == (0, "a\n", "")  # an address as OpenAI's clients have it
        [request] = server.requests
    assert "authorization" not in request.headers
    assert request.line == "GET /v1/models HTTP/1.1"
    with pytest.raises(SystemExit):
        main(["ask", "--help"])
    assert "default: $MINDSPORE_LLM_URL, or http://127.0.0.1:9811" in " ".join(capsys.readouterr().out.split())


def test_an_error_says_which_option_is_meant() -> None:
    with scripted(plain(401, '{"error": "this API key is not known"}')) as server:
        code, _, err = run("ask", "hi", "--model", "m", "--url", server.url, "--api-key", "wrong")
        assert (code, err) == (1, f"error: this API key is not known; --api-key or ${KEY} says the key\n")
    with scripted([STALL]) as server:
        code, _, err = run("ask", "hi", "--model", "m", "--url", server.url, "--timeout", "0.1")
        assert code == 1
        assert err.startswith(f"error: {server.url} sent no token within 0.1 seconds; ")
        assert err.endswith("; --timeout sets all of them\n")
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    code, _, err = run("status", "--url", url)
    assert err == f"error: no connection to {url}: Connection refused; --url or ${URL} says where the server is\n"


def test_long_prompts_and_odd_characters_arrive_as_they_are() -> None:
    prompt = "长" * 40_000 + "\x00\x1b🙂\u2028 "
    with scripted(stream({"token": {"text": "a", "index": 1}})) as server:
        assert run_process("ask", "--model", "m", "--url", server.url, given=prompt.encode()) == (0, "a\n", "")
        assert server.requests[0].body["inputs"] == prompt


def test_a_reader_that_wants_the_first_line_only_sees_no_error(standin: Serving) -> None:
    for command in (f"ask hi --model llama2 --max-tokens 2000 --url {standin.url}", f"models --url {standin.url}"):
        assert in_shell(f"$C {command} | head -c 1 > {os.devnull}") == (0, "", "")
