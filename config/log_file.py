"""Where log lines go: a rotating file beside the deployment's others, and the console for warnings and worse.

A log line is one line whatever a client sends: control characters are escaped, and the lines of a traceback are marked,
so that no request can forge an entry.
"""

from __future__ import annotations

import logging
import re
from logging.handlers import RotatingFileHandler
from pathlib import Path

from config.serving_config import LoggingConfig

FILE_BYTES = 16 << 20  # a file's size before it is rotated
FILES_KEPT = 4
TRACEBACK_MARK = "    | "

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class EscapedFormatter(logging.Formatter):
    """Time, level, logger and message in one line; a traceback follows on marked lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape(super().formatMessage(record))

    def formatException(self, ei: logging._SysExcInfoType) -> str:
        return "\n".join(TRACEBACK_MARK + escape(line) for line in super().formatException(ei).split("\n"))


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
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    _add(RotatingFileHandler(folder / f"{name}.log", maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"))
    logging.root.setLevel(settings.level.upper())


def log_to_console(level: int = logging.WARNING) -> None:
    """Send what is at least as grave as ``level`` to standard error too."""
    console = logging.StreamHandler()
    console.setLevel(level)
    _add(console)


def _add(handler: logging.Handler) -> None:
    handler.setFormatter(EscapedFormatter())
    logging.root.addHandler(handler)
