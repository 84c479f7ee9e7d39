"""Log lines as text and as JSON: one line each, whatever is in them, in files that do not grow for ever."""

from __future__ import annotations

import contextvars
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving_processes import ROOT

from config.log_file import REQUEST_ID, EscapedFormatter, JsonFormatter

HOSTILE = 'one\n2026-01-01 00:00:00.000 INFO forged\r\x1b[31m\x00\x85\u2028\u2029\ud800"},\n{"message": "forged"}'


def record(message: str, *arguments: object, error: BaseException | None = None, **extra: Any) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    logger = logging.getLogger("test")
    return logger.makeRecord("test", logging.WARNING, __file__, 1, message, arguments, info, extra=extra)


def raised(message: str) -> BaseException:
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("formatter", [EscapedFormatter(), JsonFormatter()])
def test_an_entry_is_one_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record("asks: %s", HOSTILE, path=HOSTILE))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    line.encode("utf-8")


def test_a_traceback_as_text_is_on_marked_lines() -> None:
    first, *rest = EscapedFormatter().format(record("failed", error=raised(HOSTILE))).split("\n")
    assert first.endswith("WARNING test: failed")
    assert rest
    assert all(line.startswith("    | ") and line.isprintable() for line in rest)


def test_an_object_says_everything() -> None:
    entry = json.loads(
        JsonFormatter().format(record("asks: %s", HOSTILE, error=raised(HOSTILE), step_id=7, path=HOSTILE))
    )
    assert entry.pop("time").endswith("+00:00")
    exception = entry.pop("exception")
    assert exception.startswith("Traceback")
    assert HOSTILE in exception
    assert entry == {
        "level": "warning",
        "logger": "test",
        "message": f"asks: {HOSTILE}",
        "step_id": 7,
        "path": HOSTILE,
    }


def test_what_is_logged_while_a_request_is_handled_has_its_id() -> None:
    def handle() -> None:
        REQUEST_ID.set("r-1")
        assert json.loads(JsonFormatter().format(record("x")))["request_id"] == "r-1"
        assert json.loads(JsonFormatter().format(record("x", request_id="r-1-0")))["request_id"] == "r-1-0"

    contextvars.copy_context().run(handle)
    assert "request_id" not in json.loads(JsonFormatter().format(record("x")))


def test_what_json_cannot_say_is_said_as_text() -> None:
    assert json.loads(JsonFormatter().format(record("x", path=Path("a"))))["path"] == "a"


@pytest.mark.parametrize("format_name", ["text", "json"])
def test_files_are_rotated_and_only_so_many_kept(tmp_path: Path, format_name: str) -> None:
    code = f"""
import logging
from config.log_file import log_to_file
from config.serving_config import LoggingConfig
log_to_file(LoggingConfig(folder={str(tmp_path)!r}, format={format_name!r}, file_size="2KiB", files_kept=2), "app")
for number in range(100):
    logging.getLogger("test").info("line %d", number)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"app.log", "app.log.1", "app.log.2"}
    assert all(0 < path.stat().st_size <= 2048 for path in tmp_path.iterdir())
    assert "line 99" in (tmp_path / "app.log").read_text().splitlines()[-1]
