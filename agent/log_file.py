"""One rotating log file of a process, in which every entry starts a line of its own and nothing can forge another."""

from __future__ import annotations

import logging
import logging.handlers
import re
from pathlib import Path

from config.serving_config import LoggingConfig

MAX_BYTES = 10 << 20
KEPT_FILES = 3


class EscapedFormatter(logging.Formatter):
    """Control characters of a message, line ends included, appear as escapes; a traceback keeps its lines, indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        lines = super().formatException(ei).splitlines()  # type: ignore[arg-type]
        return "\n".join("    " + escape(line) for line in lines)


def escape(text: str) -> str:
    """``text`` on one line: control characters, and what terminals and editors take for them, as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match[0])[1:-1], text)


def log_to_file(config: LoggingConfig, name: str) -> None:
    """Send this process's log to ``<folder>/<name>.log``."""
    path = Path(config.folder) / f"{name}.log"
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
    handler.setFormatter(EscapedFormatter())
    logging.root.addHandler(handler)
    logging.root.setLevel(config.level.upper())
