"""The headers of requests over NATS and of their answers: their names, and what they say for each request of an array."""

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

_LONGEST_SENDER = 64


def write_budgets(budgets: Sequence[float]) -> str:
    """The seconds left: one number, or one for each request if they differ."""
    longest = max(budgets)
    if longest - min(budgets) <= TICK:
        return f"{longest:.3f}"
    return ",".join([f"{each:.3f}" for each in budgets])


def read_budgets(headers: Mapping[str, str], count: int, default: float, most: float) -> list[float]:
    """The seconds left of each of `count` requests, or of all, and at most `most`. Raises `BadMessage`."""
    text = headers.get(BUDGET)
    if text is None:
        return [default]
    try:
        budgets = [float(text)] if "," not in text else list(map(float, text.split(",")))
    except ValueError:
        budgets = []
    # Not a number is in no range, and spoils neither the smallest nor the largest: it is looked for.
    if (
        len(budgets) not in {1, count}
        or not 0.0 <= min(budgets) <= max(budgets) < math.inf
        or sum(budgets) != sum(budgets)
    ):
        raise BadMessage(f"the header {BUDGET} is not the seconds left, one number or one for each request")
    if max(budgets) > most:
        return [min(each, most) for each in budgets]
    return budgets


def read_sent(headers: Mapping[str, str]) -> tuple[str, float]:
    """The sender of a message and when it was sent by the sender's clock; an empty name if the message does not say."""
    sender, _, text = headers.get(SENT, "").partition(" ")
    try:
        sent = float(text)
    except ValueError:
        return "", 0.0
    if not abs(sent) < 1e12 or len(sender) > _LONGEST_SENDER:
        return "", 0.0
    return sender, sent


def write_traces(traces: Sequence[str | None]) -> str:
    """The header with the trace context of all requests, or of each if they differ, empty for one that has none."""
    first = traces[0]
    if traces.count(first) != len(traces):
        return f"{TRACES}: {','.join([each or '' for each in traces])}\r\n"
    return "" if first is None else f"{TRACE}: {first}\r\n"


def read_traces(headers: Mapping[str, str], count: int) -> list[str | None]:
    """The trace context of each of `count` requests, or of all. What is malformed is left out: no reason to refuse a
    request."""
    several = headers.get(TRACES)
    if several is not None and len(traces := several.split(",")) == count:
        return [valid_trace(each) for each in traces]
    one = headers.get(TRACE)
    return [None if one is None else valid_trace(one)]
