"""The load client: what it computes, how it reads answers however they are cut, and one short load on a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import STALL, ScriptedServer, plain, scripted, self_signed, stream
from serving_processes import ROOT
from tokenizers import Tokenizer

from benchmarks import serve_report
from benchmarks.arrivals import PATTERNS, Pattern, arrival_times
from benchmarks.exchange import Exchange, LoadError, events
from benchmarks.latency import Answer, limits_of, spread
from benchmarks.prompts import Prompt
from benchmarks.serve_report import CONFIRMED, COUNTED, EVENTS, SAID, Run
from benchmarks.target import Kind, Reading, Target, read
from benchmarks.traffic import Outcome, Traffic

TOKENIZER = ROOT / "config" / "standin" / "tokenizer.json"


def chunked(*chunks: bytes) -> bytes:
    """An answer of these chunks."""
    parts = (b"%x\r\n%s\r\n" % (len(one), one) for one in (*chunks, b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(parts)


def cut(answer: bytes, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """The pieces of an answer, from where to where."""
    return list(itertools.pairwise(sorted({0, *(place for place in cuts if place < len(answer)), len(answer)})))


@given(cuts=st.lists(st.integers(0, 200), max_size=20))
def test_events_are_read_however_an_answer_is_cut(cuts: list[int]) -> None:
    answer = chunked(b'data: {"data": "a"}\r\n\r\n', b'data: {"da', b'ta": "\xc3', b'\xa9"}\n\ndata: [DONE]\n\n')
    pieces = cut(answer, cuts)
    found = list(events([(float(i), answer[a:b]) for i, (a, b) in enumerate(pieces)]))
    assert [event["data"] for _, event in found] == ["a", "é"]
    ends = [answer.index(end) + len(end) for end in (b'"a"}\r\n', b'"}\n')]
    assert [when for when, _ in found] == [next(i for i, (_, b) in enumerate(pieces) if b >= end) for end in ends]


def ends(answer: bytes, pieces: Sequence[tuple[int, int]], closed: bool = False) -> tuple[list[bool], str | None]:
    """Whether the answer has ended after each piece, and what was wrong with it."""

    async def receive() -> tuple[list[bool], str | None]:
        exchange = Exchange()
        end_of_answer = exchange.expect()
        seen = []
        for start, end in pieces:
            exchange.data_received(answer[start:end])
            seen.append(end_of_answer.done())
        if closed:
            exchange.connection_lost(None)
        error = end_of_answer.exception() if end_of_answer.done() else None
        return seen, None if error is None else str(error)

    return asyncio.run(receive())


@given(cuts=st.lists(st.integers(0, 200), max_size=20))
def test_an_answer_ends_with_its_last_byte_however_it_is_cut(cuts: list[int]) -> None:
    for answer, error in [
        (chunked(b"data: 1\n\n", b"data: 20\r\n\r\n"), None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ndata: 1\n\n", None),
        (b"HTTP/1.1 429 No\r\nContent-Length: 5\r\n\r\nlater", "status 429: later"),
        (chunked(b"later").replace(b"200 OK", b"503 No"), "status 503: later"),
    ]:
        pieces = cut(answer, cuts)
        assert ends(answer, pieces) == ([False] * (len(pieces) - 1) + [True], error)


def test_an_answer_may_end_with_its_connection() -> None:
    old = b"HTTP/1.0 200 OK\r\n\r\ndata: {}\n\n"
    assert ends(old, [(0, len(old))], closed=True) == ([False], None)
    broken = chunked(b"data: 1\n\n")[:-3]
    assert "broke off" in (ends(broken, [(0, len(broken))], closed=True)[1] or "")
    assert "no HTTP/1 answer" in (ends(b"SSH-2.0\r\n\r\n", [(0, 11)])[1] or "")


USAGE = {"choices": [], "usage": {"completion_tokens": 7}}


@pytest.mark.parametrize(
    ("kind", "sent", "text", "tokens"),
    [
        ("ours", [{"event": "message", "data": "a"}, {"event": "message", "data": "b"}], "ab", None),
        ("tgi", [{"token": {"text": "a"}, "details": None}, {"token": {"text": ""}}], "a", 2),
        ("tgi", [{"token": {"text": "a"}}, {"token": {"text": "b"}, "details": {"generated_tokens": 3}}], "ab", 3),
        ("openai", [{"choices": [{"text": "a"}], "usage": None}, {"choices": [{"text": "b"}]}, USAGE], "ab", 7),
        ("openai", [{"choices": [{"text": "a"}]}, {"choices": [{"text": ""}]}], "a", None),
        ("chat", [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, USAGE], "", 7),
        ("chat", [{"choices": [{"delta": {"content": "a"}}]}, {"choices": [{"delta": {}}]}, "[DONE]"], "a", None),
    ],
)
def test_every_protocol_is_read(kind: Kind, sent: list[Any], text: str, tokens: int | None) -> None:
    pieces = [(float(i), part) for i, part in enumerate(stream(*sent))]
    times = tuple(float(i + 1) for i, event in enumerate(sent) if event != "[DONE]" and read(kind, _alone(event)).text)
    assert read(kind, pieces) == Reading(times or (pieces[-1][0],), text, tokens)


def _alone(event: object) -> list[tuple[float, bytes]]:
    return [(0.0, b"".join(stream(event)))]


@pytest.mark.parametrize(
    "event", ["[DONE]", {"event": "error", "data": "x"}, {"error": "x"}, {"error": {"message": "x"}}, {}, 3, "x"]
)
@pytest.mark.parametrize("kind", ["ours", "tgi", "openai", "chat"])
def test_what_is_no_answer_is_an_error(kind: Kind, event: object) -> None:
    with pytest.raises(LoadError):
        read(kind, _alone(event))


def test_requests_are_those_of_each_protocol() -> None:
    def sent(kind: Kind, **more: Any) -> tuple[str, dict[str, Any]]:
        head, _, body = (
            Target(kind, "http://test:1/x", "m", token="k", **more).request(Prompt("é", 5)).partition(b"\r\n\r\n")
        )
        assert f"Content-Length: {len(body)}".encode() in head
        assert b"\r\nAuthorization: Bearer k" in head
        assert b"\r\nHost: test:1\r\n" in head
        return head.decode().split()[1], json.loads(body)

    path, body = sent("ours")
    assert (path, body["inputs"]) == ("/x/models/m/generate_stream", "é")
    assert body["parameters"] == {"max_new_tokens": 5, "ignore_eos": True, "return_full_text": False}
    assert sent("tgi")[0] == "/x/generate_stream"
    path, body = sent("chat", ignore_eos=False, extra={"temperature": 1, "seed": 3})
    assert (path, body["messages"]) == ("/x/v1/chat/completions", [{"role": "user", "content": "é"}])
    assert (body["temperature"], body["seed"], "ignore_eos" in body) == (1, 3, False)
    assert sent("openai")[1]["prompt"] == "é"


@given(st.sampled_from(list(PATTERNS)), st.floats(0.1, 1000), st.integers(1, 300), st.integers(1, 9))
def test_arrivals_are_fixed_in_advance(pattern: Pattern, rate: float, count: int, burst: int) -> None:
    times = arrival_times(pattern, rate, count, burst=burst, random=Random(1))
    assert times == arrival_times(pattern, rate, count, burst=burst, random=Random(1)) == sorted(times)
    assert (len(times), times[0]) == (count, 0)
    if pattern == "bursts":
        assert [times.count(time) for time in dict.fromkeys(times)][:-1] == [burst] * ((count - 1) // burst)
    if pattern == "steady" and count > 1:
        assert times[-1] == pytest.approx((count - 1) / rate)


def test_the_rate_is_kept_in_the_long_run() -> None:
    times = arrival_times("poisson", 50.0, 20_000, burst=1, random=Random(7))
    assert len(times) / times[-1] == pytest.approx(50, rel=0.03)
    gaps = spread([after - before for before, after in itertools.pairwise(times)])
    assert gaps is not None
    assert gaps.p50 == pytest.approx(0.6931 / 50, rel=0.05)  # of an exponential distribution


def test_limits_are_read_and_held_against_answers() -> None:
    assert limits_of("ttft:500, tpot:50.5") == {"ttft": 500, "tpot": 50.5}
    for wrong in ("", "ttft", "ttft:x", "itl:5", "ttft:1,ttft:2"):
        with pytest.raises(ValueError, match="NAME:MILLISECONDS, like ttft:500 or ttft:500,tpot:50"):
            limits_of(wrong)
    for wrong in ("ttft:0", "ttft:nan", "e2e:-1"):
        with pytest.raises(ValueError, match="a limit is above 0"):
            limits_of(wrong)
    answer = Answer(3, 10.0, (10.5, 10.6, 10.7))
    assert answer.meets({})
    assert answer.meets({"ttft": 501, "tpot": 101, "e2e": 701})
    assert not any(answer.meets({name: limit}) for name, limit in {"ttft": 499, "tpot": 99, "e2e": 699}.items())


def outcome(reading: Reading | None, asked: int, due: float, late: float = 0.0) -> Outcome:
    return Outcome(Prompt("hi", asked), due, due + late, due + 9, reading, None if reading else "status 429: later")


def test_a_report_counts_from_when_a_request_was_due() -> None:
    two = Reading((11.0, 11.5), "ab", 3)
    outcomes = [outcome(two, 3, due=10.0, late=0.2), outcome(two, 3, due=10.5), outcome(None, 3, due=10.5)]
    run = Run(outcomes, begin=10.0, seconds=4.0, client_cpu=0.1, most=2, made=None, planned=3)
    report, values = serve_report.report_of(
        run, Target("openai", "http://test", "m"), None, load="some", seed=0, limits={"ttft": 600}
    )
    assert (report.requests, report.failed, report.errors) == (3, 1, {"status 429: later": 1})
    assert (report.tokens, report.tokens_are, report.tokens_per_second) == (6, SAID, 1.5)
    assert values == {"TTFT": [1000, 500], "TPOT": [250, 250], "ITL": [500, 500], "E2E": [1500, 1000]}
    assert (report.within_limits, report.goodput) == (1, 0.25)
    assert report.late is not None
    assert report.late.max == pytest.approx(200)
    first, _, last = report.answers
    assert (first.due, first.tokens, first.ttft, first.tpot, first.e2e) == (0, 3, 1000, 250, 1500)
    assert (last.error, last.ttft) == ("status 429: later", None)
    shown = serve_report.table(report)
    assert "1 x status 429: later" in shown
    assert "1 within ttft 600 ms: goodput 0.25 requests/s" in shown


def test_tokens_are_counted_as_well_as_can_be() -> None:
    target, tokenizer = Target("ours", "http://test", "m"), Tokenizer.from_file(str(TOKENIZER))
    outcomes = [outcome(Reading((1.0, 2.0), "abé", None), 5, due=0.0), outcome(None, 5, due=0.0)]

    def count(made: int | None, tokenizer: Tokenizer | None, **more: Any) -> tuple[int, str]:
        run = Run(outcomes, begin=0.0, seconds=1.0, client_cpu=0.0, most=1, made=made, planned=2)
        answers, words = serve_report.counted(run, Target("ours", "http://test", "m", **more), tokenizer)
        assert answers[1] is None
        assert answers[0] is not None
        return answers[0].tokens, words

    assert target.ignore_eos
    assert count(5, tokenizer) == (5, CONFIRMED)
    assert count(6, tokenizer) == (4, COUNTED)  # bytes
    assert count(5, None, ignore_eos=False) == (2, EVENTS)
    assert count(None, None) == (2, EVENTS)


def test_a_report_of_failures_alone_is_still_a_report(tmp_path: Path) -> None:
    run = Run([outcome(None, 3, due=0.0)], begin=0.0, seconds=1.0, client_cpu=0.0, most=1, made=0, planned=1)
    report, values = serve_report.report_of(
        run, Target("ours", "http://test", "<m>"), None, load="x", seed=0, limits={}
    )
    assert (report.ttft, report.tokens) == (None, 0)
    assert "1 failed" in serve_report.table(report)
    written = serve_report.write(report, values, tmp_path / "new" / "folder.of.results")
    assert [path.name for path in written] == ["folder.of.results.json", "folder.of.results.svg"]
    assert json.loads(written[0].read_text(encoding="utf-8"))["failed"] == 1
    assert ElementTree.fromstring(written[1].read_text(encoding="utf-8")).tag.endswith("svg")


def test_failures_are_counted_and_the_others_go_on() -> None:
    event = {"choices": [{"text": "a"}]}
    scripts = [stream(event, USAGE), plain(429, "later"), stream(event, end=b""), stream(event, USAGE)]
    with scripted(*scripts) as server:
        traffic = Traffic(Target("openai", server.url, "m"), answer_seconds=30.0)
        found = asyncio.run(traffic.closed_loop([Prompt("hi", 7)] * 5, 1))
    assert [one.error and one.error.partition(":")[0] for one in found] == [
        None,
        "status 429",
        "the answer broke off",
        None,
        None,
    ]
    assert (traffic.done, traffic.failed, traffic.running, traffic.most) == (5, 2, 0, 1)


def test_an_answer_that_takes_too_long_is_a_failure() -> None:
    with scripted([STALL]) as server:
        traffic = Traffic(Target("openai", server.url, "m"), answer_seconds=0.05)
        [found] = asyncio.run(traffic.open_loop([Prompt("hi", 7)], [0.0]))
        assert server.left.wait(20)
    assert found.error == "no answer within 0.05 seconds"


def test_an_open_loop_waits_for_no_answer_and_leaves_nothing_open() -> None:
    async def stop_when_all_run(server: ScriptedServer) -> None:
        traffic = Traffic(Target("openai", server.url, "m"), answer_seconds=30.0)
        load = asyncio.create_task(traffic.open_loop([Prompt("hi", 7)] * 3, [0.0, 0.001, 0.002]))
        for _ in range(3):
            assert await asyncio.to_thread(server.arrived.acquire, timeout=20)
        assert traffic.running == 3
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load

    with scripted([STALL]) as server:
        asyncio.run(stop_when_all_run(server))
        assert server.left.wait(20)


def test_a_kept_connection_that_the_server_closes_is_made_anew() -> None:
    answer = stream({"choices": [{"text": "a"}]}, USAGE)
    with scripted(answer, [b""], answer) as server:
        traffic = Traffic(Target("openai", server.url, "m"), answer_seconds=30.0)
        found = asyncio.run(traffic.closed_loop([Prompt("hi", 7)] * 2, 1))
        assert len(server.requests) == 3
    assert [one.error for one in found] == [None, None]


def test_a_load_over_tls_checks_the_certificate(tmp_path: Path) -> None:
    certificate, context = self_signed(tmp_path)
    with scripted(stream({"choices": [{"text": "a"}]}, USAGE), context=context) as server:
        for ca, error in ((str(certificate), None), (None, "certificate verify failed")):
            traffic = Traffic(Target("openai", server.url, "m", ca=ca), answer_seconds=30.0)
            [found] = asyncio.run(traffic.closed_loop([Prompt("hi", 7)], 1))
            assert found.error == error or (error and error in (found.error or ""))
