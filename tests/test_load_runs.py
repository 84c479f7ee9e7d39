"""The load client as its user starts it: its output, its errors, its exit codes, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_server import STALL, plain, scripted, stream
from serving_processes import ROOT, Serving

from benchmarks import result_files
from benchmarks.serve_report import CONFIRMED, SAID
from benchmarks.target import Kind
from config.free_ports import free_ports

USAGE = {"choices": [], "usage": {"completion_tokens": 7}}


def load_client(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.serve", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_a_short_load_on_a_server(standin: Serving, tmp_path: Path) -> None:
    output = tmp_path / "found"
    words = (standin.url, "-c", "4", "-n", "12", "--output-tokens", "uniform:2:9", "--slo", "e2e:60000", "--output")
    done = load_client(*words, str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (report["requests"], report["failed"], report["within_limits"], report["tokens_are"]) == (
        12,
        0,
        12,
        CONFIRMED,
    )
    assert report["tokens"] == sum(answer["asked"] for answer in report["answers"])
    assert report["most_at_a_time"] == 4
    assert f"{report['tokens']} tokens ({CONFIRMED})" in done.stdout
    assert "\x1b" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tgi", "openai", "chat"])
def test_our_server_says_its_tokens_in_every_protocol(standin: Serving, kind: Kind, tmp_path: Path) -> None:
    words = ("--protocol", kind, "--rate", "200", "-n", "9", "--output", str(tmp_path / "found"))
    done = load_client(standin.url, *words)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (report["failed"], report["tokens_are"]) == (0, SAID)
    assert all(0 < answer["tokens"] <= answer["asked"] for answer in report["answers"])
    if kind != "tgi":  # which has no word for going on past end tokens
        assert all(answer["tokens"] == answer["asked"] for answer in report["answers"])


def test_a_server_that_refuses_all_ends_the_load(standin: Serving) -> None:
    done = load_client(standin.url, "--rate", "100", "-n", "3", "--model", "nobody")
    assert (done.returncode, done.stdout) == (2, "")
    assert "status 404" in done.stderr


def test_results_that_cannot_be_written_are_known_before_the_load(standin: Serving, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old", encoding="utf-8")
    (tmp_path / "folder.svg").mkdir()
    for output, message in (
        ("file/found", "file: File exists"),
        ("folder", "folder.svg: Is a directory"),
        ("/", "/ is"),
    ):
        done = load_client(standin.url, "-c", "1", "--output", str(tmp_path / output))
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    result_files.check(tmp_path / "new" / "found", (".json",))
    assert not any((tmp_path / "new").iterdir())
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"


def test_ctrl_c_reports_what_there_is(tmp_path: Path) -> None:
    answer = stream({"choices": [{"text": "a"}]}, USAGE)
    words = ["--protocol", "openai", "-c", "1", "-n", "9", "--warm-up", "0", "--output", str(tmp_path / "found")]
    with scripted(answer, answer, [STALL]) as server:
        command = [sys.executable, "-m", "benchmarks.serve", server.url, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:  # type: ignore[call-overload]
            for _ in range(3):
                assert server.arrived.acquire(timeout=60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert server.left.wait(20)
    assert process.returncode == 130, err
    assert out.startswith("STOPPED by Ctrl-C: 2 of 9 requests had ended, 1 were cut off\n2 requests, 0 failed")
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (report["stopped"], report["planned"], report["requests"], report["cut_off"]) == (True, 9, 2, 1)


def test_a_server_that_goes_away_in_the_middle_does_not_take_the_report_along(tmp_path: Path) -> None:
    event = stream({"event": "message", "data": "a"})
    metrics = plain(200, "mindspore_llm_generation_tokens_total 5\n")
    gone = plain(503, "gone")
    with scripted(metrics, event, event, gone) as server:
        done = load_client(server.url, "-c", "1", "-n", "3", "--warm-up", "0", "--output", str(tmp_path / "found"))
    assert done.returncode == 1
    assert "3 requests, 1 failed" in done.stdout
    assert "1 x status 503: gone" in done.stdout
    assert "tokens are not confirmed: the server does not say" in done.stderr


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    for words in ([], ["--protocol", "chat"]):
        done = load_client(url, "-c", "1", "--output", str(tmp_path / "found"), *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"no connection to {url}: " in done.stderr
    assert load_client("nobody", "-c", "1").stderr.startswith("'nobody' is not the URL of a server")
