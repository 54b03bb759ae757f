"""Logs for machines: one line for each fact, as `name=value` or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from cachebus.messages import Event

LogForm: TypeAlias = Literal["text", "json"]

_FIELDS = "cachebus_fields"
"""The attribute of a log record that holds its named values."""


class OneLine(logging.Formatter):
    """Formats a record as one line: line breaks and control characters are escaped."""

    def __init__(self, form: LogForm = "text") -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        if self._form == "json":
            return json.dumps(values, default=str)
        return " ".join(f"{name}={_word(value)}" for name, value in values.items())


def log_to_stderr(form: LogForm, level: str) -> None:
    """Send the logs of this process to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def say(logger: logging.Logger, level: int, message: str, **values: Any) -> None:
    """Log a message with named values."""
    logger.log(level, message, extra={_FIELDS: values})


def own_fields(event: Event) -> dict[str, Any]:
    """Return the fields of an event that not every event has."""
    own = [name for name in event.__struct_fields__ if name not in Event.__struct_fields__]
    return {name: getattr(event, name) for name in own}


def _word(value: Any) -> str:
    text = str(value)
    if text and text.isascii() and text.isprintable() and not set(text) & set(' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
