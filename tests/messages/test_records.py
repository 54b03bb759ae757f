"""Messages and records whose constructors are written late behave as ordinary dataclasses do."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from cachebus import RateLimit
from cachebus.actors import Capabilities, Gauges, RetryPolicy
from cachebus.messages import Message, Record, message, record


@record(kw_only=True)
class Sample(Record):
    """What the tests make."""

    number: int
    words: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ordinary:
    """The same without us."""

    number: int
    words: list[str] = dataclasses.field(default_factory=list)


def test_a_constructor_takes_what_that_of_a_dataclass_takes() -> None:
    assert inspect.signature(Sample) == inspect.signature(Ordinary)
    assert Sample.__init__.__qualname__ == "Sample.__init__"
    first, second = Sample(number=1), Sample(number=1)
    assert first == second
    assert first.words is not second.words
    with pytest.raises(TypeError):
        Sample()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        Sample(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        Sample(number=1, other=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_a_record_is_frozen_and_slotted() -> None:
    made: Any = Sample(number=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.number = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del made.number
    assert not hasattr(made, "__dict__")


def test_records_compare_hash_show_copy_and_pickle_by_their_fields() -> None:
    one = RateLimit(allowed=True, remaining=3)
    assert one == RateLimit(True, 3)
    assert one != RateLimit(True, 4)
    assert one != (True, 3, 0.0, 0.0, False)
    assert hash(one) == hash(RateLimit(True, 3))
    assert repr(one) == "RateLimit(allowed=True, remaining=3, retry_after=0.0, reset_after=0.0, unchecked=False)"
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one)), dataclasses.replace(one)):
        assert again == one
    assert dataclasses.replace(one, remaining=0).remaining == 0
    assert dataclasses.asdict(one)["remaining"] == 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(Gauges())


def test_what_follows_the_constructor_is_called() -> None:
    with pytest.raises(ValueError, match="attempts"):
        RetryPolicy(attempts=0)


def test_a_class_that_inherits_is_constructed_before_and_after_its_base_is() -> None:
    @message("test.early_base")
    class Base(Message):
        """Never made by itself before the other."""

        word: str = "a"

    @message("test.early_heir")
    class Heir(Base):
        """Made first."""

        number: int = 1

    class Plain(Base):
        __slots__ = ()

    assert (Plain("x").word, Heir("y", 2).number, Base("z").word) == ("x", 2, "z")
    assert list(inspect.signature(Heir).parameters) == ["word", "number"]
    assert list(inspect.signature(Base).parameters) == ["word"]


def test_defaults_can_be_read_where_a_dataclass_keeps_them() -> None:
    defaults = {each.name: each.default for each in dataclasses.fields(Capabilities)}
    assert defaults["patterns"] is False
