"""The actor base class, its handlers, and the context that an actor works with."""

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
    """The handlers of an actor, by kind of message.

    * `plain` handlers (`def`) cannot wait and may run on the sender's stack.
    * `waiting` handlers (`async def`) run in the actor's task.
    * `batch` handlers receive all messages that have arrived since the previous turn.
    * `eager` handlers are tried before another handler of the same kind, on the sender's stack, while the mailbox is
      empty. They cannot wait; they return `None` to decline.
    """

    plain: dict[type[Message], PlainHandler] = field(default_factory=dict)
    waiting: dict[type[Message], AsyncHandler] = field(default_factory=dict)
    batch: dict[type[Message], BatchHandler] = field(default_factory=dict)
    eager: dict[type[Message], EagerHandler] = field(default_factory=dict)


class Context(Protocol):
    """The environment of an actor: its address, the clock, events, deferred replies and timers.

    * `deadline` is the deadline of the request of the current turn, on `clock.monotonic`. It is `None` if no caller
      waits, and in plain handlers, which do not wait.
    * `subscriptions.kinds` holds the kinds of events that have listeners. Check it before you build an event.
    * `restarts` counts the incarnations after the first.
    * `overloaded` counts the requests that were rejected because the mailbox was full.
    * `timers` schedule callbacks, which may run during a turn, until the actor ends.
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
        """The trace context of each request of a batch. Valid in a batch turn, until its first await."""
        ...

    def emit(self, kind: type[Event], /, *fields: Any, **named: Any) -> None:
        """Publish an event with these fields. The event is only built if it has listeners and is in the sample."""

    def defer(self) -> DeferredReply:
        """Create a reply to answer later; return it from the handler. It is answered automatically on stop."""
        ...

    def send_after(self, delay: float, message: Message) -> Timer:
        """Send `message` to this actor after `delay` seconds. Cancel the returned timer to prevent it."""
        ...

    def start_soon(self, function: Callable[[], Awaitable[None]], /) -> None:
        """Run `function` concurrently with the turns. It is cancelled when the actor's supervisor ends."""

    def crash(self, error: BaseException, /) -> None:
        """Crash this incarnation of the actor because of an error that occurred outside its turns."""


class Actor:
    """State with message handlers. An actor runs one turn at a time; it works with messages and its `ctx` only.

    A public method with one parameter that is annotated with a message class, or with several (`A | B`), handles these
    messages. It returns the reply, or a `DeferredReply` from `ctx.defer()`.

    An `async def` with a parameter of type `Sequence[A | B]` is a batch handler. It returns one reply per message, in
    order.

    If a handler raises a `CacheError`, that is the reply. Any other exception is a crash, and the supervisor replaces
    the actor.
    """

    ctx: Context

    max_batch: int = 512
    """Maximum number of messages in one batch turn."""
    max_batch_bytes: int = 1 << 20
    """Size in bytes at which a batch turn takes no more messages. Only values of type `bytes` count."""

    async def on_start(self) -> None:
        """Prepare this incarnation. Called once, before its first turn. If it raises, the start has failed."""

    async def on_stop(self) -> None:
        """Release the resources of this incarnation. Called once, after its last turn or a crash."""

    def repair(self) -> Collection[DeferredReply] | None:
        """Restore consistency after a turn was interrupted at an arbitrary instruction.

        Return the deferred replies that this actor will still answer; all others are answered as lost. Return `None`,
        the default, to be replaced by a new incarnation; that does not count as a restart. This method may be
        interrupted too, and is then called again.
        """
        return None

    def on_ping(self, request: Ping) -> Pong:
        """Answer a `Ping`. Every actor does."""
        return Pong(self.ctx.address)

    def handlers(self) -> Handlers:
        """Return the bound handlers of this actor."""
        table = Handlers()
        for name, kinds, shape in _signatures(type(self)):  # type: ignore[arg-type]  # mypy 2.4 takes type[Actor] for unhashable
            into: dict[type[Message], Any] = getattr(table, shape)
            for kind in kinds:
                into[kind] = getattr(self, name)
        return table


@functools.lru_cache(maxsize=None)  # noqa: UP033 (functools.cache, mypy 2.4 says, takes no class for hashable)
def _signatures(cls: type[Actor]) -> tuple[tuple[str, tuple[type[Message], ...], str], ...]:
    """Return the handlers of a class: name, kinds of message, and the table of `Handlers` that they belong to."""
    found: list[tuple[str, tuple[type[Message], ...], str]] = []
    taken: dict[type[Message], str] = {}
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        if name.startswith("_"):
            continue
        parameters = list(inspect.signature(function).parameters.values())[1:]
        if len(parameters) != 1:
            continue
        batch, kinds = _message_kinds(_type_of(cls, function, parameters[0].name))
        if not kinds:
            continue
        waits = inspect.iscoroutinefunction(function)
        if batch and not waits:
            raise TypeError(f"{cls.__name__}.{name} takes a batch, so it must be an async def")
        for kind in kinds:
            if kind in taken:
                raise TypeError(f"{cls.__name__} has two handlers for {kind.__name__}: {taken[kind]} and {name}")
            taken[kind] = name
        _check_replies(f"{cls.__name__}.{name}", kinds, _type_of(cls, function, "return"))
        found.append((name, kinds, "batch" if batch else "waiting" if waits else "plain"))
    return tuple(found)


def _type_of(cls: type[Actor], function: Callable[..., Any], name: str) -> Any:
    """Return the type of a parameter of a method, or of its result with `"return"`; `None` if it has no annotation.

    Each annotation is read alone, because methods that are no handlers may have types that cannot be imported.
    """
    annotations = {name: function.__annotations__[name]} if name in function.__annotations__ else {}
    # Modules import most of these for type checkers only.
    namespace = {**vars(typing), **vars(collections.abc), **function.__globals__}
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__=annotations), globalns=namespace).get(name)
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
    requests: list[type[Request[Any]]] = [kind for kind in kinds if issubclass(kind, Request)]
    declared = list(dict.fromkeys(reply for kind in requests for reply in reply_types(kind)))
    for reply in _members(annotation):
        if not (isinstance(reply, type) and issubclass(reply, Reply)) or issubclass(reply, Failed):
            continue
        if not any(issubclass(reply, each) or issubclass(each, reply) for each in declared):
            wanted = ", ".join(each.__name__ for each in declared) or "no reply"
            raise TypeError(f"{handler} returns {reply.__name__}, but its request declares {wanted}")


def check_batch(envelopes: Sequence[Envelope], replies: Sequence[Any]) -> None:
    """Raise `TypeError` unless there is exactly one reply per message."""
    if len(replies) != len(envelopes):
        raise TypeError(f"the handler returned {len(replies)} replies to a batch of {len(envelopes)} messages")


def as_batch_handler(handler: AsyncHandler) -> BatchHandler:
    """Adapt a handler of single messages to batches of one message."""

    async def handle(batch: Sequence[Any]) -> Sequence[Any]:
        return [await handler(batch[0])]

    return handle
