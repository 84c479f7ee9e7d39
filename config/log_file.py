"""Where log lines go: a rotating file beside the deployment's others, and the console for warnings and worse.

A log line is one line whatever a client sends: control characters are escaped, and the lines of a traceback are marked,
so that no request can forge an entry. As JSON, an entry is one object a line. Its fields are those of ``RECORD_FIELDS``
and whatever the caller gave as ``extra``; all that is logged while a request is handled has its ``request_id``.
"""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import datetime, timezone
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from config.serving_config import LoggingConfig

TRACEBACK_MARK = "    | "
RECORD_FIELDS = ("time", "level", "logger", "message", "exception")

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that a task handles

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PLAIN_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime"}  # what else a record has is ``extra``


class EscapedFormatter(logging.Formatter):
    """Time, level, logger and message in one line; a traceback follows on marked lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape(super().formatMessage(record))

    def formatException(self, ei: logging._SysExcInfoType) -> str:
        return "\n".join(TRACEBACK_MARK + escape(line) for line in super().formatException(ei).split("\n"))


class JsonFormatter(logging.Formatter):
    """One JSON object in one line of ASCII; the time is UTC, to the millisecond."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        entry: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            entry["request_id"] = request_id
        entry |= {name: value for name, value in vars(record).items() if name not in _PLAIN_RECORD}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def escape(text: str) -> str:
    r"""``text`` with its control characters written as ``\x1b`` or ``\u2028``, so that it stays on one line.

    >>> escape("one\ntwo")
    'one\\ntwo'
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def log_to_file(settings: LoggingConfig, name: str) -> None:
    """Send this process's log to ``<folder>/<name>.log``; the folder is made if it is not there.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = Path(settings.folder) / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    size, kept = settings.file_bytes, settings.files_kept
    _add(RotatingFileHandler(path, maxBytes=size, backupCount=kept, encoding="utf-8"), settings)
    logging.root.setLevel(settings.level.upper())


def log_to_console(settings: LoggingConfig, level: int = logging.WARNING) -> None:
    """Send what is at least as grave as ``level`` to standard error too."""
    console = logging.StreamHandler()
    console.setLevel(level)
    _add(console, settings)


def _add(handler: logging.Handler, settings: LoggingConfig) -> None:
    handler.setFormatter(JsonFormatter() if settings.format == "json" else EscapedFormatter())
    logging.root.addHandler(handler)
