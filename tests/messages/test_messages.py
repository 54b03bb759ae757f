"""Messages: frozen through and through, each with a wire name of its own, and errors that build from their fields."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import typing
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from cachebus import Health, RateLimit
from cachebus.actors import Capabilities, Gauges, RetryPolicy
from cachebus.messages import (
    WIRE_NAMES,
    CacheConnectionError,
    CacheError,
    CacheKeyError,
    CacheTimeoutError,
    Failed,
    Found,
    FoundMany,
    Get,
    LockNotAcquired,
    LockNotOwned,
    Message,
    SetMany,
    error_class,
    error_codes,
)

from ..golden.examples import example

KINDS = {name: cls for name, cls in WIRE_NAMES.items() if cls.__module__.startswith("cachebus.")}
ALL = pytest.mark.parametrize("kind", sorted(KINDS))

MUTABLE = (list, dict, set, bytearray)


def contents(message: Any) -> list[Any]:
    """Everything that a message holds, at every depth, but for the values of its users."""
    found: list[Any] = []
    for field in msgspec.structs.fields(type(message)):
        held = getattr(message, field.name)
        if field.type is not Any:
            found.append(held)
        if isinstance(held, msgspec.Struct):
            found += contents(held)
        if type(held) is MappingProxyType and typing.get_args(field.type)[1:] not in ((), (Any,)):
            for each in held.values():
                found += contents(each) if isinstance(each, msgspec.Struct) else [each]
    return found


@ALL
def test_no_message_can_be_changed_nor_what_is_in_it(kind: str) -> None:
    message: Any = example(KINDS[kind])
    for name in message.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(message, name, None)
        with pytest.raises(AttributeError):
            delattr(message, name)
    with pytest.raises(AttributeError):
        message.other = 1
    assert [held for held in contents(message) if isinstance(held, MUTABLE)] == []
    for held in contents(message):
        if isinstance(held, Mapping):
            writable: Any = held
            with pytest.raises(TypeError):
                writable["new"] = 1


@ALL
def test_every_class_says_that_it_is_frozen_and_has_a_wire_name(kind: str) -> None:
    cls: Any = KINDS[kind]
    assert cls.__struct_config__.frozen
    assert kind == cls.WIRE_NAME == cls.__struct_config__.tag
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*(\.[a-z]+(_[a-z]+)*)+", kind)
    assert "kind" not in cls.__struct_fields__


@ALL
def test_a_message_that_may_hold_a_value_of_the_users_is_known_to_the_garbage_collector(kind: str) -> None:
    cls: Any = KINDS[kind]
    held = {field.name: field.type for field in msgspec.structs.fields(cls)}
    if any(hint is Any or _HOLDERS.search(str(hint)) for hint in held.values()):
        assert cls.__struct_config__.gc is not False


_HOLDERS = re.compile(r"typing\.Any|Found|Stale")


def test_a_value_that_refers_to_its_own_reply_is_collected() -> None:
    class Value:
        reply: Any = None

    value = Value()
    value.reply = Found(value)
    gone = weakref.ref(value)
    del value
    gc.collect()
    assert gone() is None


def test_wire_names_are_given_once() -> None:
    classes: list[type[Message]] = []
    waiting: list[type[Message]] = [Message]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        classes.append(cls)
    names = [cls.WIRE_NAME for cls in classes if cls.WIRE_NAME]
    assert sorted(names) == sorted(set(names)) == sorted(WIRE_NAMES)
    assert WIRE_NAMES["backend.get"] is Get
    assert Message.WIRE_NAME == ""


def test_a_mapping_is_copied_into_its_message() -> None:
    items = {"k": 1}
    request = SetMany(items)
    items["k"] = 2
    assert request.items == {"k": 1}
    assert type(FoundMany({"k": Found(1)}).entries) is MappingProxyType
    assert msgspec.structs.replace(request, items={"j": 3}).items == {"j": 3}


def test_messages_compare_show_copy_and_pickle_by_their_fields() -> None:
    one = Found(1, version=2.0, tags=("a",))
    assert one == Found(1, 2.0, None, ("a",))
    assert one != Found(2, 2.0, None, ("a",))
    assert repr(one) == "Found(value=1, version=2.0, ttl=None, tags=('a',), stored_at=0.0)"
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again == one
    match one:
        case Found(value, version):
            assert (value, version) == (1, 2.0)


def test_small_values_of_other_floors_are_frozen_too() -> None:
    for made in (RateLimit(True, 3), Health(True, "b", 0.1), Capabilities(), Gauges(), RetryPolicy()):
        changeable: Any = made
        with pytest.raises(AttributeError):
            setattr(changeable, changeable.__struct_fields__[0], None)
    assert RateLimit(allowed=True, remaining=3) == RateLimit(True, 3)
    with pytest.raises(ValueError, match="attempts"):
        RetryPolicy(attempts=0)


# --- Errors


def test_an_error_takes_its_fields_by_place_and_by_name() -> None:
    error = CacheTimeoutError("no answer", address="backend.primary", timeout=0.5)
    assert (error.detail, error.address, error.timeout, error.in_doubt) == ("no answer", "backend.primary", 0.5, False)
    assert str(error) == "backend.primary: no answer within 0.5 s"
    assert LockNotOwned(name="n", owner="o").wire_fields() == {"detail": "", "name": "n", "owner": "o"}
    assert isinstance(LockNotAcquired(name="n"), TimeoutError)
    assert isinstance(CacheConnectionError("refused", "primary"), ConnectionError)


anything: Any = CacheError  # takes what the type checker forbids


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (anything, "CacheError is missing arguments: detail"),
        (lambda: anything("a", "b"), r"CacheError takes at most 1 arguments \(detail\), but 2 were given"),
        (lambda: anything("a", detail="b"), "CacheError got unexpected or repeated arguments: detail"),
        (lambda: anything("a", size=1), "CacheError got unexpected or repeated arguments: size"),
    ],
)
def test_an_error_with_other_fields_is_refused(make: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make()


@pytest.mark.parametrize("code", sorted(error_codes()))
def test_every_error_crosses_the_bus_and_a_pickle(code: str) -> None:
    cls = error_class(code)
    fields: dict[str, Any] = {name: 1.5 if name in _NUMBERS else name == "in_doubt" or name for name in cls.field_names}
    made = cls(**fields)
    for back in (Failed.of(made).error(), pickle.loads(pickle.dumps(made))):
        assert type(back) is cls
        assert (str(back), back.wire_fields()) == (str(made), made.wire_fields())


_NUMBERS = {"timeout", "size", "limit", "retry_after", "capacity", "remaining"}


def test_an_error_of_an_application_may_do_without_a_code_and_a_code_is_given_once() -> None:
    class Ours(CacheKeyError):
        pass

    assert Ours("detail", "key").code == "key"
    assert error_class("key") is CacheKeyError
    with pytest.raises(ValueError, match="error code 'key' of Theirs is already used by CacheKeyError"):

        class Theirs(CacheError, code="key"):
            pass
