"""The headers of NATS requests and replies: their names, and their values for arrays of requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cachebus.messages import BadMessage

from ..clock import TICK
from ..tracing import valid_trace

BUDGET, SENT, PARTIAL, INDEX = "Cachebus-Budget", "Cachebus-Sent", "Cachebus-Partial", "Cachebus-Index"
CONTENT_TYPE = "Content-Type"
TRACE, TRACES = "traceparent", "Cachebus-Traceparents"
REQUEST_ID, ERROR, ERROR_CODE = "Cachebus-Request-Id", "Nats-Service-Error", "Nats-Service-Error-Code"

_MAX_SENDER_LENGTH = 64


def write_budgets(budgets: Sequence[float]) -> str:
    """Format the remaining budgets in seconds: one number, or one per request if they differ."""
    longest = max(budgets)
    if longest - min(budgets) <= TICK:
        return f"{longest:.3f}"
    return ",".join([f"{each:.3f}" for each in budgets])


def read_budgets(headers: Mapping[str, str], count: int, default: float, most: float) -> list[float]:
    """Return the remaining budget in seconds of each of `count` requests, or one for all. Raises `BadMessage`.

    A budget is capped at `most`.
    """
    text = headers.get(BUDGET)
    if text is None:
        return [default]
    try:
        budgets = [float(text)] if "," not in text else list(map(float, text.split(",")))
    except ValueError:
        budgets = []
    # NaN must be checked explicitly, because it may not show up in `min` or `max`.
    if (
        len(budgets) not in {1, count}
        or not 0.0 <= min(budgets) <= max(budgets) < math.inf
        or sum(budgets) != sum(budgets)
    ):
        raise BadMessage(f"the header {BUDGET} must be the remaining seconds: one number, or one per request")
    if max(budgets) > most:
        return [min(each, most) for each in budgets]
    return budgets


def read_sent(headers: Mapping[str, str]) -> tuple[str, float]:
    """Return the sender of a message and its send time on the sender's clock. The name is empty if it is unknown."""
    sender, _, text = headers.get(SENT, "").partition(" ")
    try:
        sent = float(text)
    except ValueError:
        return "", 0.0
    if not abs(sent) < 1e12 or len(sender) > _MAX_SENDER_LENGTH:
        return "", 0.0
    return sender, sent


def write_traces(traces: Sequence[str | None]) -> str:
    """Format the header with the trace contexts: one for all requests, or one per request if they differ.

    A request without a trace context gets an empty value.
    """
    first = traces[0]
    if traces.count(first) != len(traces):
        return f"{TRACES}: {','.join([each or '' for each in traces])}\r\n"
    return "" if first is None else f"{TRACE}: {first}\r\n"


def read_traces(headers: Mapping[str, str], count: int) -> list[str | None]:
    """Return the trace context of each of `count` requests, or one for all. Malformed contexts are ignored."""
    several = headers.get(TRACES)
    if several is not None and len(traces := several.split(",")) == count:
        return [valid_trace(each) for each in traces]
    one = headers.get(TRACE)
    return [None if one is None else valid_trace(one)]
