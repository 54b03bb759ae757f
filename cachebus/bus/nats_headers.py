"""The headers of requests over NATS and of their answers: their names, and what is said in them for each of an array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cachebus.messages import BadMessage

from .deadlines import TICK
from .tracing import valid_trace

BUDGET, PARTIAL, INDEX, CONTENT_TYPE = "Cachebus-Budget", "Cachebus-Partial", "Cachebus-Index", "Content-Type"
TRACE, TRACES = "traceparent", "Cachebus-Traceparents"
REQUEST_ID, ERROR, ERROR_CODE = "Cachebus-Request-Id", "Nats-Service-Error", "Nats-Service-Error-Code"


def say_budgets(budgets: Sequence[float]) -> str:
    """The seconds left: one number, or one for each request where they differ."""
    longest = max(budgets)
    if longest - min(budgets) <= TICK:
        return f"{longest:.3f}"
    return ",".join(f"{each:.3f}" for each in budgets)


def read_budgets(headers: Mapping[str, str], count: int, default: float) -> list[float]:
    """The seconds left of each of `count` requests, or of all. Raises `BadMessage`."""
    text = headers.get(BUDGET)
    if text is None:
        return [default]
    try:
        budgets = [float(each) for each in text.split(",")]
    except ValueError:
        budgets = []
    if len(budgets) not in {1, count} or any(each != each for each in budgets):  # Not a number is not itself.
        raise BadMessage(f"the header {BUDGET} is not the seconds left, one number or one for each request")
    return budgets


def say_traces(traces: Sequence[str | None]) -> dict[str, str]:
    """The trace context of all requests, or of each where they differ, empty where there is none."""
    first = traces[0]
    if any(each != first for each in traces):
        return {TRACES: ",".join(each or "" for each in traces)}
    return {} if first is None else {TRACE: first}


def read_traces(headers: Mapping[str, str], count: int) -> list[str | None]:
    """The trace context of each of `count` requests, or of all. What is none is left out: no reason to refuse a request."""
    several = headers.get(TRACES)
    if several is not None and len(traces := several.split(",")) == count:
        return [valid_trace(each) for each in traces]
    return [valid_trace(headers.get(TRACE))]
