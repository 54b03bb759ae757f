"""Actors: state, handlers that are found by the type of their parameter, and the context that the actor sees."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cachebus.bus import Address, Clock, DeferredReply, Envelope, Pending, SubscriptionRegistry
from cachebus.messages import Event, Failed, Message, Ping, Pong, Reply, Request, reply_types

from ..ports import Timer, Timers

PlainHandler = Callable[[Any], "Reply | Pending | None"]
EagerHandler = Callable[[Any], "Reply | Pending | None"]
AsyncHandler = Callable[[Any], Awaitable["Reply | Pending | None"]]
BatchHandler = Callable[[Sequence[Any]], Awaitable["Sequence[Reply | Pending]"]]


@dataclass(slots=True)
class Handlers:
    """An actor's handlers by the kind of message that they take.

    `plain` ones (`def`) cannot wait and may run on the sender's stack. `waiting` ones (`async def`) run in the actor's
    own task. `batch` ones take everything that has come in meanwhile. An `eager` one of the same kind is asked first, on
    the sender's stack, while the mailbox is empty. It cannot wait either: it returns `None` to decline.
    """

    plain: dict[type[Message], PlainHandler] = field(default_factory=dict)
    waiting: dict[type[Message], AsyncHandler] = field(default_factory=dict)
    batch: dict[type[Message], BatchHandler] = field(default_factory=dict)
    eager: dict[type[Message], EagerHandler] = field(default_factory=dict)


class Context(Protocol):
    """An actor's surroundings: its name, the time, and ways to publish, to reply later and to be called back.

    `deadline` is until when the request of the current turn is worth working on, on `clock.monotonic`. It is `None` if
    no caller waits, and in plain handlers, which do not wait. `subscriptions.kinds` holds the kinds of events that have
    listeners: look before you build one. `restarts` counts the incarnations after the first, `overloaded` the requests
    that the full mailbox turned away. `timers` call functions back, even during a turn, until the actor ends.
    """

    address: Address
    clock: Clock
    subscriptions: SubscriptionRegistry
    deadline: float | None
    restarts: int

    @property
    def timers(self) -> Timers: ...

    @property
    def overloaded(self) -> int: ...

    @property
    def traces(self) -> list[str | None]:
        """In the turn of a batch, until its first await: the trace context of each request."""
        ...

    def emit(self, kind: type[Event], /, *fields: Any, **named: Any) -> None:
        """Publish an event of a kind with these fields. It is built only if it has listeners and the sample has it."""

    def defer(self) -> DeferredReply:
        """Promise a reply: return it from the handler, and answer it later. On stop it is answered for you."""
        ...

    def send_after(self, delay: float, message: Message) -> Timer:
        """Send `message` to this actor after `delay` seconds, unless the timer is cancelled."""
        ...

    def start_soon(self, function: Callable[[], Awaitable[None]], /) -> None:
        """Run `function` beside the turns. It ends with the actor's supervisor at the latest."""

    def crash(self, error: BaseException, /) -> None:
        """End this incarnation of the actor, for an error that was met beside its turns."""


class Actor:
    """State with handlers. It sees messages and its `ctx`, never a bus, a subject or bytes, and has one turn at a time.

    Every public method whose one parameter is annotated with a message class (or several, `A | B`) is the handler of
    these messages and returns the reply, or a `DeferredReply` from `ctx.defer()`. A parameter `Sequence[A | B]` of an
    `async def` makes it a batch handler, which returns one reply a message, in order. A `CacheError` raised is an
    answer. Any other exception is a crash, and the supervisor replaces the actor.
    """

    ctx: Context

    max_batch: int = 512
    """The most messages of one batch turn."""
    max_batch_bytes: int = 1 << 20
    """The size at which a batch turn takes no more messages, counting the values that are `bytes`."""

    async def on_start(self) -> None:
        """Called once before the first turn of this incarnation. Raising is a failed start."""

    async def on_stop(self) -> None:
        """Called once after the last turn of this incarnation, also after a crash."""

    def repair(self) -> Collection[DeferredReply] | None:
        """Repair the state after a turn that was interrupted at any instruction, and return the replies that this actor
        still owes; any others are answered as lost. `None`, the default, asks for a new incarnation, which counts as no
        restart. May itself be interrupted, and is then called again."""
        return None

    def on_ping(self, request: Ping) -> Pong:
        """Every actor answers `Ping`."""
        return Pong(self.ctx.address)

    def handlers(self) -> Handlers:
        """The handlers of this actor, bound to it."""
        table = Handlers()
        for name, kinds, shape in _signatures(type(self)):  # type: ignore[arg-type]  # mypy 2.4 takes type[Actor] for unhashable
            into: dict[type[Message], Any] = getattr(table, shape)
            for kind in kinds:
                into[kind] = getattr(self, name)
        return table


@functools.lru_cache(maxsize=None)  # noqa: UP033 (functools.cache, mypy 2.4 says, takes no class for hashable)
def _signatures(cls: type[Actor]) -> tuple[tuple[str, tuple[type[Message], ...], str], ...]:
    """The handlers of a class: name, kinds of message, and which table of `Handlers` they belong in."""
    found: list[tuple[str, tuple[type[Message], ...], str]] = []
    taken: dict[type[Message], str] = {}
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        if name.startswith("_"):
            continue
        parameters = list(inspect.signature(function).parameters.values())[1:]
        if len(parameters) != 1:
            continue
        hints = _hints(cls, function)
        batch, kinds = _message_kinds(hints.get(parameters[0].name))
        if not kinds:
            continue
        waits = inspect.iscoroutinefunction(function)
        if batch and not waits:
            raise TypeError(f"{cls.__name__}.{name} takes a batch, so it must be async def")
        for kind in kinds:
            if kind in taken:
                raise TypeError(f"{cls.__name__} has two handlers of {kind.__name__}: {taken[kind]} and {name}")
            taken[kind] = name
        _check_replies(f"{cls.__name__}.{name}", kinds, hints.get("return"))
        found.append((name, kinds, "batch" if batch else "waiting" if waits else "plain"))
    return tuple(found)


def _hints(cls: type[Actor], function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a handler. What modules import for type checkers only is mostly of these two."""
    namespace = {**vars(typing), **vars(collections.abc), **function.__globals__}
    try:
        return typing.get_type_hints(function, globalns=namespace)
    except NameError as error:
        raise TypeError(
            f"{cls.__name__}.{function.__name__}: the types of its parameter and its reply must be importable at run "
            f"time, because handlers are found by them ({error})"
        ) from None


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _message_kinds(annotation: Any) -> tuple[bool, tuple[type[Message], ...]]:
    batch = typing.get_origin(annotation) is collections.abc.Sequence
    if batch:
        (annotation,) = typing.get_args(annotation)
    members = _members(annotation)
    return batch, members if all(isinstance(each, type) and issubclass(each, Message) for each in members) else ()


def _check_replies(handler: str, kinds: tuple[type[Message], ...], annotation: Any) -> None:
    """Raise `TypeError` if a handler returns a reply that none of its requests declares."""
    if typing.get_origin(annotation) is collections.abc.Sequence:
        (annotation,) = typing.get_args(annotation)
    requests = [kind for kind in kinds if issubclass(kind, Request)]
    declared = list(dict.fromkeys(reply for kind in requests for reply in reply_types(kind)))
    for reply in _members(annotation):
        if not (isinstance(reply, type) and issubclass(reply, Reply)) or issubclass(reply, Failed):
            continue
        if not any(issubclass(reply, each) or issubclass(each, reply) for each in declared):
            wanted = ", ".join(each.__name__ for each in declared) or "no reply"
            raise TypeError(f"{handler} returns {reply.__name__}, but its request declares {wanted}")


def check_batch(envelopes: Sequence[Envelope], replies: Sequence[Any]) -> None:
    """Raise `TypeError` unless there is one reply for each message."""
    if len(replies) != len(envelopes):
        raise TypeError(f"a batch of {len(envelopes)} messages got {len(replies)} replies")


def alone(handler: AsyncHandler) -> BatchHandler:
    """A handler of one message as a handler of a batch of one."""

    async def handle(batch: Sequence[Any]) -> Sequence[Any]:
        return [await handler(batch[0])]

    return handle
