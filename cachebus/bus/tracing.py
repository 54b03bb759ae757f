"""The trace context of the current call, as a W3C `traceparent`.

It is the first of these that exists:

1. the trace context of the request that is being handled,
2. the current OpenTelemetry span, if the application has imported OpenTelemetry (this module never imports it),
3. the value passed to `use_trace`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_NO_TURN: Final = ""

# An actor's task and a callback inherit the context of the code that opened the cache or scheduled the timer. So a turn
# always sets the trace of its request, even if it is `None`.
turn_trace: ContextVar[str | None] = ContextVar("cachebus_turn_trace", default=_NO_TURN)
"""The trace of the request that is being handled: `None` if it has none, an empty string outside of a turn."""

_given: ContextVar[str | None] = ContextVar("cachebus_trace", default=None)


def current_trace() -> str | None:
    """Return the `traceparent` of the current call, or `None`."""
    if (trace := turn_trace.get()) != _NO_TURN:
        return trace
    # `opentelemetry` may be an empty namespace package, so look for the module that has the span.
    opentelemetry = sys.modules.get("opentelemetry.trace")
    return (None if opentelemetry is None else _span(opentelemetry)) or _given.get()


def valid_trace(text: str | None) -> str | None:
    """Return `text` if it is a valid `traceparent`, or `None`."""
    return text if text is not None and _TRACEPARENT.fullmatch(text) else None


@contextmanager
def use_trace(traceparent: str | None) -> Generator[None]:
    """Set the trace context of calls within the block, for applications without OpenTelemetry.

    Raises `ValueError` if `traceparent` is not a valid W3C `traceparent`.
    """
    if traceparent is not None and valid_trace(traceparent) is None:
        raise ValueError("a traceparent must be 00-<32 hexadecimal digits>-<16>-<2>, lower case and not all zero")
    token = _given.set(traceparent)
    try:
        yield
    finally:
        _given.reset(token)


def _span(opentelemetry: Any) -> str | None:
    try:
        context = opentelemetry.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    except Exception:
        return None  # A partial import or another tracer must not make the call fail.
