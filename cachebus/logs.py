"""Logs of a process that nobody watches: one line for each fact, as `name=value` or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

LogForm: TypeAlias = Literal["text", "json"]

FIELDS = "cachebus_fields"
"""The attribute of a log record that holds its named values."""


class OneLine(logging.Formatter):
    """Writes a record as one line, whatever is in it: line breaks and control characters are escaped."""

    def __init__(self, form: LogForm = "text") -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        if self._form == "json":
            return json.dumps(said, default=str)
        return " ".join(f"{name}={_word(value)}" for name, value in said.items())


def log_to_stderr(form: LogForm, level: str) -> None:
    """Send what this process logs to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def say(logger: logging.Logger, level: int, message: str, **values: Any) -> None:
    """Log a message with named values."""
    logger.log(level, message, extra={FIELDS: values})


def _word(value: Any) -> str:
    text = str(value)
    if text and text.isascii() and text.isprintable() and not set(text) & set(' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
