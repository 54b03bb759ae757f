"""The payload pipeline against its bare serializers and primitives."""

from __future__ import annotations

import datetime as dt
import json
import os
import pickle
import uuid
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import orjson
import pandas as pd

from cachebus.payload.pipeline import PayloadPipeline
from cachebus.payload.sealing import Sealer

from .timing import Bar, Contender, Figure, Row, measure

KILOBYTE: dict[str, Any] = {
    "id": 123456,
    "name": "Ada Lovelace",
    "email": "ada@example.com",
    "active": True,
    "score": 98.6,
    "bio": "The Analytical Engine has no pretensions whatever to originate anything. " * 6,
    "tags": ["mathematics", "engines", "poetry"],
    "address": {"street": "St James's Square 12", "city": "London", "zip": "SW1Y", "country": "GB"},
    "history": [{"at": 1700000000 + day, "event": "login", "ip": "192.0.2.7"} for day in range(6)],
    "parent": None,
}
"""Typical value of about 1 KB."""

RICH: dict[str, Any] = {
    **KILOBYTE,
    "id": uuid.UUID(int=5),
    "born": dt.date(1815, 12, 10),
    "seen": dt.datetime(2024, 5, 1, tzinfo=dt.UTC),
    "roles": ("author", "admin"),
}
"""The same with types that msgpack and JSON lack, so there is no bare serializer to compare with."""

MEGABYTE = os.urandom(2**20)


def times(function: Callable[[], Any]) -> Callable[[int], None]:
    """Return work that calls a function repeatedly."""

    def work(operations: int) -> None:
        for _ in range(operations):
            function()

    return work


def both(pipeline: PayloadPipeline, value: Any) -> Callable[[int], None]:
    """Return work that encodes and decodes a value."""
    return times(lambda: pipeline.decode("user:1", pipeline.encode("user:1", value)))


def row_of(title: str, ours: Callable[[int], None], peers: dict[str, Callable[[int], None]], bar: float = 0) -> Row:
    """Return a row. `bar` applies to the first peer."""
    contenders = [Contender(name, work) for name, work in peers.items()]
    bars = [Bar(contenders[0].name, at_most=bar)] if bar else []
    return Row(title, Contender("cachebus", ours), contenders, bars, clock="processor")


def rows() -> list[Row]:
    """Return the rows for encoding and decoding 1 KB."""
    bare_msgpack = times(lambda: msgpack.unpackb(msgpack.packb(KILOBYTE)))
    bare_orjson = times(lambda: orjson.loads(orjson.dumps(KILOBYTE)))
    bare_pickle = times(lambda: pickle.loads(pickle.dumps(RICH, 5)))
    packed = PayloadPipeline("msgpack", compression="lz4", threshold=512)
    made = [
        row_of("msgpack, 1 KB dict", both(PayloadPipeline("msgpack"), KILOBYTE), {"bare msgpack": bare_msgpack}, 1.2),
        row_of("json, 1 KB dict", both(PayloadPipeline("json"), KILOBYTE), {"bare orjson": bare_orjson}, 1.6),
        row_of(
            "msgpack, checksum",
            both(PayloadPipeline("msgpack", checksum=True), KILOBYTE),
            {"bare msgpack": bare_msgpack},
        ),
        row_of("msgpack, lz4", both(packed, KILOBYTE), {"bare msgpack": bare_msgpack}),
        row_of("msgpack, rich types", both(PayloadPipeline("msgpack"), RICH), {"bare pickle": bare_pickle}),
        row_of(
            "json, rich types",
            both(PayloadPipeline("json"), RICH),
            {"json, no rich types": times(lambda: json.loads(json.dumps(KILOBYTE)))},
        ),
    ]
    return [measure(row, 2_000, 15) for row in made]


def figures() -> list[Figure]:
    """Return the figures of sealing and of data frames."""
    plain, sealed = PayloadPipeline("msgpack"), PayloadPipeline("msgpack", sealer=Sealer({"k": bytes(32)}))
    row = measure(row_of("", both(sealed, KILOBYTE), {"plain": both(plain, KILOBYTE)}), 2_000, 15)
    added = (row.ours.seconds(row.clock) - row.peers[0].seconds(row.clock)) * 1e6 / 2
    seal, open_ = _sealing()
    # Since pandas 3, text is already in Arrow's format. The second frame has its text as Python objects, as before.
    frame = _frame(100_000)
    old = frame.astype({"text": object})
    return [
        Figure("sealing adds to one step, 1 KB", f"{added:.1f} us", "<= 6 us", added <= 6),
        Figure("sealing 1 MB", f"{seal:.2f} GB/s", "> 1 GB/s", seal > 1),
        Figure("opening 1 MB", f"{open_:.2f} GB/s", "> 1 GB/s", open_ > 1),
        *_frames("100,000 rows: numbers, times, text", frame),
        *_frames("100,000 rows, text as Python objects", old, arrow=frame),
    ]


def _sealing() -> tuple[float, float]:
    sealer = Sealer({"k": bytes(32)})
    sealed = memoryview(sealer.seal(MEGABYTE, b"head", b"bound"))[4:]
    row = measure(
        row_of(
            "",
            times(lambda: sealer.seal(MEGABYTE, b"head", b"bound")),
            {"open": times(lambda: sealer.open(sealed, b"head", b"bound"))},
        ),
        20,
        15,
    )
    return 2**20 / row.ours.seconds(row.clock) / 1e9, 2**20 / row.peers[0].seconds(row.clock) / 1e9


def _frame(rows: int) -> Any:
    return pd.DataFrame(
        {
            "number": np.arange(rows),
            "float": np.random.default_rng(5).random(rows),
            "time": pd.date_range("2024", periods=rows, freq="s"),
            "text": [f"user-{number}" for number in range(rows)],
        }
    )


def _frames(title: str, frame: Any, arrow: Any = None) -> list[Figure]:
    pipeline = PayloadPipeline("arrow")
    ours = frame if arrow is None else arrow
    payload, pickled = pipeline.encode("k", ours), pickle.dumps(frame, 5)
    writing = measure(
        row_of("", times(lambda: pipeline.encode("k", ours)), {"pickle": times(lambda: pickle.dumps(frame, 5))}), 5, 7
    )
    reading = measure(
        row_of("", times(lambda: pipeline.decode("k", payload)), {"pickle": times(lambda: pickle.loads(pickled))}), 5, 7
    )
    said = []
    for what, row in (("write", writing), ("read", reading)):
        faster = 1 / row.ratio(row.peers[0])
        text = f"{row.ours.seconds(row.clock) * 1e3:.1f} ms, pickle {row.peers[0].seconds(row.clock) * 1e3:.1f} ms: {faster:.2f}x as fast"
        said.append(Figure(f"arrow, {what} {title}", text))
    return said
