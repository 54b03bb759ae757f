"""What a message is: the decorator that makes one, the three kinds, and the register of wire names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar, cast, dataclass_transform

from .late_init import write_init_late

M = TypeVar("M", bound="Message")
ReplyT_co = TypeVar("ReplyT_co", covariant=True)

_WIRE_NAME = re.compile(r"[a-z]+(?:_[a-z]+)*(?:\.[a-z]+(?:_[a-z]+)*)+")
_registry: dict[str, type[Message]] = {}


class Message:
    """A typed, slotted record with a wire name. Treat it as immutable: it may be shared between threads.

    It is frozen for the type checker only, because a dataclass that is frozen at run time takes three times
    as long to build (see `docs/decisions/0002-messages-frozen-for-the-type-checker.md`).
    """

    __slots__ = ()
    WIRE_NAME: ClassVar[str]

    # Written once here, because dataclass compiles both anew for each of sixty classes: a fifth of the time of importing
    # cachebus.

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self._names())

    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._names())})"

    def _names(self) -> tuple[str, ...]:
        return tuple(each.name for each in fields(cast("Any", self)))


class Reply(Message):
    """What became of a request."""

    __slots__ = ()


class Request(Message, Generic[ReplyT_co]):
    """Something that an actor is asked to do; the parameter names the replies that may come back."""

    __slots__ = ()

    IDEMPOTENT: ClassVar[bool] = False
    """Doing it twice does what doing it once does: a crashed actor's next life may be handed it again."""

    INVALIDATES: ClassVar[bool] = False
    """It removes what is out of date: a full mailbox still takes it, because losing one means stale reads."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _header(cls: type[M]) -> type[M]:
    made = dataclass(slots=True, kw_only=True, eq=False, repr=False, init=False)(cls)
    write_init_late(made)
    return made


@_header
class Event(Message):
    """A fact about the past, published to whoever listens. Whoever emits it fills in the subject; the context
    of the actor stamps the rest.

    `id` names the event for ever; `origin` is the process; `epoch` names the life of the actor that spoke, and
    `seq` counts what it said in that life, from 1, so that a listener notices a gap. `time` is Unix time in
    seconds. `trace` is the W3C `traceparent` of the call, if there is one.
    """

    id: str = ""
    namespace: str = ""
    backend: str = ""
    origin: str = ""
    epoch: int = 0
    seq: int = 0
    time: float = 0.0
    trace: str | None = None

    def stamp(self, header: Mapping[str, Any]) -> None:
        """Fill in the common fields, once, before anybody else sees the event."""
        for name, value in header.items():
            object.__setattr__(self, name, value)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def message(wire_name: str) -> Callable[[type[M]], type[M]]:
    """Make a class a message and register it under `wire_name`, such as `backend.get`.

    A wire name is lower-case words joined by dots. It is given once and never given again.

    Raises `ValueError` for a malformed name and for one that is taken.
    """
    if not _WIRE_NAME.fullmatch(wire_name):
        raise ValueError(f"wire name {wire_name!r} is not lower-case words joined by dots, such as 'backend.get'")

    def make(cls: type[M]) -> type[M]:
        # Registered here and not in __init_subclass__, because slots=True builds a second class.
        made = dataclass(slots=True, eq=False, repr=False, init=False)(cls)
        if (holder := _registry.get(wire_name)) is not None:
            raise ValueError(f"wire name {wire_name!r} of {made.__name__} belongs to {holder.__name__}")
        write_init_late(made)
        made.WIRE_NAME = wire_name
        _registry[wire_name] = made
        return made

    return make


class WireNames(Mapping[str, type[Message]]):
    """The register of every message class by its wire name, read-only."""

    def __getitem__(self, wire_name: str) -> type[Message]:
        return _registry[wire_name]

    def __iter__(self) -> Iterator[str]:
        return iter(_registry)

    def __len__(self) -> int:
        return len(_registry)


bare: Callable[[type[Message]], Any] = object.__new__
"""Make a message with empty slots, for the hot paths that fill them by hand: two thirds of the time of calling the
class. Every slot must be filled."""


WIRE_NAMES: Mapping[str, type[Message]] = WireNames()


def reply_types(request: type[Request[Any]]) -> tuple[type[Reply], ...]:
    """The replies that a request names, without `Failed`, which any request may get."""
    for base in getattr(request, "__orig_bases__", ()):
        if getattr(base, "__origin__", None) is Request:
            (answer,) = base.__args__
            return tuple(getattr(answer, "__args__", (answer,)))
    raise TypeError(f"{request.__name__} does not say Request[...] with its reply types")
