"""Measured table of types and serializers in docs/payloads.md, written by `python -m tests.payload.table`."""

from __future__ import annotations

import collections
import datetime as dt
import re
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel

from cachebus.messages import CacheSerializationError

from .pipelines import Color, Point, pipeline, same

PAGE = Path(__file__).parents[2] / "docs" / "payloads.md"
MARKS = re.compile(r"(<!-- types:start -->\n).*?(<!-- types:end -->)", re.DOTALL)
SERIALIZERS = ("msgpack", "json", "auto", "arrow", "pickle")


class Model(BaseModel):
    a: int = 1


VALUES: dict[str, list[Any]] = {
    "`None`, `bool`, `str`": [None, True, "naïve"],
    "`int` of any size": [5, 2**64, -(2**200)],
    "`float`, infinities and NaN too": [0.1, -0.0, float("inf"), float("nan")],
    "`bytes`": [b"\x00\xff"],
    "`list`; `dict` with `str` keys": [[1, [2]], {"a": {"b": 1}}],
    "`dict` with other keys": [{1: 2, None: 3, (1, 2): 4}],
    "`tuple`, `set`, `frozenset`": [(1, (2,)), {1, 2}, frozenset({(1,)})],
    "`datetime`, naive or with an offset": [dt.datetime(2024, 1, 2, 3), dt.datetime(2024, 1, 2, tzinfo=dt.UTC)],  # noqa: DTZ001
    "`datetime` with a `ZoneInfo`, and its fold": [
        dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))
    ],
    "`date`, `time`, `timedelta`": [dt.date(2024, 1, 2), dt.time(1, 2, 3, 4), dt.timedelta(-1, 2, 3)],
    "`UUID`, `Decimal`": [uuid.UUID(int=7), Decimal("1.20")],
    "`bytearray`, `complex`": [bytearray(b"x"), 1j],
    "`OrderedDict` and other subclasses of these": [collections.OrderedDict(a=1)],
    "registered dataclasses, enums, named tuples": [Point(1, (2,)), Color.RED],
    "registered pydantic models": [Model(a=2)],
    "NumPy arrays and scalars": [np.arange(6).reshape(2, 3), np.float32(1.5)],
    "pandas `DataFrame`": [pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})],
    "pandas `Series`": [pd.Series([1.5, 2.5], name="s")],
    "pyarrow `Table`": [pa.table({"a": [1, 2]})],
}


def outcome(serializer: str, value: Any) -> str:
    """Return the outcome for a value: `lossless`, `error`, or `CHANGED`, which must never happen."""
    made = pipeline(serializer, types=[Point, Color, Model])
    try:
        payload = made.encode("k", value)
    except CacheSerializationError:
        return "error"
    back = made.decode("k", payload)
    equal = (
        back.equals(value)
        if hasattr(value, "equals")
        else same_array(back, value)
        if hasattr(value, "dtype")
        else same(back, value)
    )
    return "lossless" if type(back) is type(value) and equal else "CHANGED"


def same_array(left: Any, right: Any) -> bool:
    return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())


def table() -> str:
    lines = [f"| type | {' | '.join(f'`{name}`' for name in SERIALIZERS)} |", "| --- |" + " --- |" * len(SERIALIZERS)]
    for title, values in VALUES.items():
        cells = []
        for serializer in SERIALIZERS:
            outcomes = {outcome(serializer, value) for value in values}
            cells.append(" / ".join(sorted(outcomes)))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    assert MARKS.search(page), "the marks of the table are missing"
    return MARKS.sub(lambda found: found[1] + table() + found[2], page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
