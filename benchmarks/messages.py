"""Cost of building, encoding and decoding messages.

The rows over servers contain this cost, so there are no bars here.
"""

from __future__ import annotations

from collections.abc import Callable

from cachebus.bus.codec.messages import JSON, MSGPACK, decode, encode
from cachebus.messages import Found, Get, Message

from .timing import Contender, Figure, Row, measure

VALUE = bytes(100)
FORMS = {"MessagePack": MSGPACK, "JSON": JSON}


def build_get() -> Get:
    """Build a request."""
    return Get("user:1")


def build_found() -> Found:
    """Build a reply with 100 bytes."""
    return Found(VALUE, 1.0, 60.0, (), 1_700_000_000.0)


def nanoseconds(function: Callable[[], object], operations: int = 2_000) -> float:
    """Return the median processor time of a call in ns, less that of an empty call."""

    def repeated(function: Callable[[], object]) -> Callable[[int], None]:
        def work(operations: int) -> None:
            for _ in range(operations):
                function()

        return work

    contender, nothing = Contender("", repeated(function)), Contender("", repeated(lambda: None))
    measure(Row("", contender, [nothing], clock="processor"), operations)
    return (contender.seconds("processor") - nothing.seconds("processor")) * 1e9


def figures() -> list[Figure]:
    """Return all figures."""
    builders: dict[str, Callable[[], Message]] = {"Get": build_get, "Found of 100 bytes": build_found}
    done = [Figure(f"build {name}", f"{nanoseconds(build):.0f} ns") for name, build in builders.items()]
    for form, content_type in FORMS.items():
        for name, build in builders.items():
            message = build()
            body = encode(message, content_type)
            encoding = nanoseconds(lambda message=message, to=content_type: encode(message, to))  # type: ignore[misc]
            decoding = nanoseconds(lambda body=body, of=content_type: decode(body, of))  # type: ignore[misc]
            done.append(Figure(f"{form}, encode / decode {name}", f"{encoding:.0f} / {decoding:.0f} ns"))
    return done
