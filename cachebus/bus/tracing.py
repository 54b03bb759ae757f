"""The trace context of the call that is under way, as W3C `traceparent`.

It is that of the request that is being handled; else the current span of OpenTelemetry, if the application has imported
that (it is never imported here); else what `use_trace` was given.
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

# An actor's task and a callback inherit the context of the code that opened the cache or armed the timer. So a turn sets
# the trace of its request, `None` included.
turn_trace: ContextVar[str | None] = ContextVar("cachebus_turn_trace", default=_NO_TURN)
"""The trace of the request that is being handled: `None` if it has none, the empty string outside of a turn."""

_given: ContextVar[str | None] = ContextVar("cachebus_trace", default=None)


def current_trace() -> str | None:
    """The `traceparent` of the call that is under way, or `None`."""
    if (trace := turn_trace.get()) != _NO_TURN:
        return trace
    # `opentelemetry` alone may be an empty namespace, so this looks for the part that knows the span.
    opentelemetry = sys.modules.get("opentelemetry.trace")
    return (None if opentelemetry is None else _span(opentelemetry)) or _given.get()


def valid_trace(text: str | None) -> str | None:
    """A `traceparent` from elsewhere, or `None` if it is none."""
    return text if text is not None and _TRACEPARENT.fullmatch(text) else None


@contextmanager
def use_trace(traceparent: str | None) -> Generator[None]:
    """Give calls within the block a trace context, for applications that have no OpenTelemetry.

    Raises `ValueError` for what is no W3C `traceparent`.
    """
    if traceparent is not None and valid_trace(traceparent) is None:
        raise ValueError("a traceparent is 00-<32 hexadecimal digits>-<16>-<2>, lower case and not all zero")
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
        return None  # Half imported, or somebody's own tracer: no reason for a call to fail.
