"""Events of the past: a JetStream stream keeps them, and a listener who says since when is told them again.

The stream belongs to the server; whoever names one in the settings makes sure that it is there. A replay reads the stream
and nothing else, also when it has come to the present, so there is no seam where an event could be told twice or not at
all. It takes no more than its subscription has room for, so it loses nothing to a slow listener.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, DiscardPolicy, StreamConfig
from nats.js.errors import APIError, BadRequestError, NotFoundError, ServiceUnavailableError

from cachebus.messages import CacheConfigurationError, CacheConnectionError, CacheError, Event, EventsMissed

from .address import Subjects
from .codec import JSON, decode
from .nats_connection import NatsConnection, end_task
from .subscription import EventKind, Subscription, event_kinds

logger = logging.getLogger("cachebus.bus")

MESSAGE_ID = "Nats-Msg-Id"
"""The header by which a stream keeps each event once."""

_DUPLICATES = 120.0  # Seconds in which a stream knows an id again, if it keeps messages for as long.
_BATCH = 256
_EXPIRES = 2.0  # Seconds that one question for more events may stay open.
_IDLE = 60.0  # Seconds after which the server forgets a reader that has gone without a word.
_AGAIN, _AGAIN_MAX = (
    0.25,
    2.0,
)  # Seconds until an interrupted replay tries again: below the first, doubling up to the second.
_NUMBERINGS = 10_000  # That are remembered; of those not heard for longest, the next event begins anew.


async def ensure_stream(connection: NatsConnection, subjects: Subjects) -> None:
    """Make sure that the stream of the options is there and takes the events of the namespace. What else somebody has
    settled about it stays as it is. Raises `CacheConfigurationError` where the server keeps no streams."""
    options = connection.options
    name, subject = options.events_stream, subjects.all_events()
    assert name is not None
    config = StreamConfig(
        name=name,
        description="events of cachebus",
        subjects=[subject],
        discard=DiscardPolicy.OLD,
        max_age=options.events_stream_max_age,
        max_bytes=options.events_stream_max_bytes,
        duplicate_window=min(_DUPLICATES, options.events_stream_max_age),
    )
    try:
        stream = _jetstream(connection)
        try:
            await stream.add_stream(config)
        except BadRequestError:
            # There is one of the name with other options: somebody's choice.
            found = (await stream.stream_info(name)).config
            known: list[str] = list(found.subjects or ())
            if subject not in known:
                found.subjects = [*known, subject]
                await stream.update_stream(found)
        return
    except (ServiceUnavailableError, nats.errors.NoRespondersError):
        problem = f"events_stream {name!r}: the server has no JetStream (nats-server --jetstream)"
    except APIError as error:
        problem = f"events_stream {name!r}: the server refuses it: {error.description}"
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise CacheConnectionError(f"events_stream {name!r}: {type(error).__name__}", "nats") from None
    raise CacheConfigurationError(problem)


class _NoStream(Exception):
    """Nobody keeps the events."""


class _Paced(Subscription):
    """A subscription that says when something was taken from it, from any thread."""

    def __init__(
        self, kinds: frozenset[EventKind], capacity: int, on_close: Callable[[], None], on_taken: Callable[[], None]
    ) -> None:
        super().__init__(kinds, capacity, lambda _: on_close())
        self._on_taken = on_taken

    @property
    def room(self) -> int:
        """How many events it takes now."""
        return self.capacity - len(self)

    def _pop(self) -> Event:
        event = super()._pop()
        self._on_taken()
        return event


class Replay:
    """Tells one subscription what a stream has kept since a time, and goes on with what happens now.

    `since` is Unix time in seconds. Where events were lost, because the stream no longer has them or they never came to
    it, `EventsMissed` is told in their place.
    """

    def __init__(
        self,
        connection: NatsConnection,
        subjects: Subjects,
        what: tuple[EventKind | str, ...],
        since: float,
        capacity: int,
        on_end: Callable[[Replay], None],
    ) -> None:
        self.subscription = _Paced(event_kinds(what), capacity, self._closed, self._taken)
        self._connection = connection
        self._subjects = subjects
        self._since = since
        self._on_end = on_end
        self._loop: asyncio.AbstractEventLoop = connection.loop
        self._last: OrderedDict[tuple[str, int, str], int] = OrderedDict()
        self._full = False  # Somebody waits for room.
        self._room = asyncio.Event()
        self._place = 0  # In the stream: the number of the last message that was read.
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self._tries = 0
        self._ended = False

    def __repr__(self) -> str:
        return f"<Replay at {self._place} of {len(self._last)}/{_NUMBERINGS} numberings for {self.subscription!r}>"

    def start(self) -> None:
        """Begin to read. On the loop of the connection."""
        if not self._ended:
            self._task = asyncio.create_task(self._run(), name="cachebus-replay")

    def _closed(self) -> None:
        self._ended = True
        self._on_loop(self._end)

    def _taken(self) -> None:
        if self._full:
            self._on_loop(self._room.set)

    def _on_loop(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            return  # The loop is closed, and the task with it.

    def _end(self) -> None:
        self._on_end(self)
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """End the subscription too."""
        self.subscription.close()
        if self._task is not None:
            await end_task(self._task)

    async def _run(self) -> None:
        try:
            while not self._ended:
                try:
                    await self._read()
                except (nats.errors.Error, CacheError, OSError, TimeoutError) as error:
                    # Away, or the server has forgotten us: begin again where we were.
                    logger.info("a replay is interrupted: %s", type(error).__name__)
                    self._tries += 1
                    longest = min(_AGAIN_MAX, _AGAIN * 2.0 ** min(self._tries - 1, 10))
                    await asyncio.sleep(random.uniform(0.0, longest))
        except _NoStream:
            logger.error("no stream keeps the events of %s", self._subjects.namespace)
            await self._missed("", "", 0)
        except Exception:
            # Ours or nats-py's. A listener that is told nothing any more must not take it for silence.
            logger.exception("a replay has failed")
            await self._missed("", "", 0)
        finally:
            self.subscription.close()

    async def _read(self) -> None:
        jetstream = _jetstream(self._connection)
        try:
            stream = await jetstream.find_stream_name_by_subject(self._subjects.all_events())
        except (NotFoundError, ServiceUnavailableError):
            # After a restart of the server its streams may need a moment.
            if self._begun:
                raise
            raise _NoStream from None
        await self._look_for_a_beginning(jetstream, stream)
        created = await jetstream.add_consumer(stream, self._consumer())
        self._begun = True
        reader: Any = await jetstream.pull_subscribe_bind(consumer=created.name, stream=stream)
        try:
            while not self._ended:
                room = await self._some_room()
                try:
                    messages: list[Msg] = await reader.fetch(min(room, _BATCH), timeout=_EXPIRES)
                except TimeoutError:
                    if not self._connection.up:
                        raise
                    await jetstream.consumer_info(stream, created.name)  # Not found: begin again.
                    messages = []
                self._tries = 0
                for msg in messages:
                    await self._tell(msg)
        finally:
            if self._connection.up:
                await reader.unsubscribe()

    async def _look_for_a_beginning(self, jetstream: Any, stream: str) -> None:
        state = (await jetstream.stream_info(stream)).state
        if state.first_seq <= self._place + 1:
            return
        if self._place:
            await self._missed("", "", 0)
        elif state.messages:
            # Something was given up: was it later than what we are asked for?
            oldest = await jetstream.get_msg(stream, state.first_seq)
            if oldest.time is None or oldest.time.timestamp() > self._since:
                await self._missed("", "", 0)
        else:
            await self._missed("", "", 0)

    def _consumer(self) -> ConsumerConfig:
        wanted = [self._subjects.events(kind) for kind in self.subscription.kinds - {EventsMissed}]
        everything = self.subscription.kinds == event_kinds(())
        start: dict[str, Any]
        if self._place:
            start = {"deliver_policy": DeliverPolicy.BY_START_SEQUENCE, "opt_start_seq": self._place + 1}
        else:
            when = datetime.fromtimestamp(0, UTC) + timedelta(seconds=self._since)
            start = {"deliver_policy": DeliverPolicy.BY_START_TIME, "opt_start_time": when}
        return ConsumerConfig(
            ack_policy=AckPolicy.NONE,
            filter_subjects=[self._subjects.all_events()] if everything else sorted(wanted),
            inactive_threshold=_IDLE,
            mem_storage=True,
            **start,
        )

    async def _tell(self, msg: Msg) -> None:
        self._place = max(self._place, msg.metadata.sequence.stream)
        try:
            event = decode(msg.data, (msg.headers or {}).get("Content-Type", JSON))
        except CacheError:
            return
        if not isinstance(event, Event) or event.namespace != self._subjects.namespace:
            return
        numbering = (event.origin, event.epoch, msg.subject)
        last = self._last.get(numbering)
        self._last[numbering] = event.seq
        self._last.move_to_end(numbering)
        if len(self._last) > _NUMBERINGS:
            self._last.popitem(last=False)
        if last is not None and event.seq > last + 1:
            await self._missed(event.origin, event.WIRE_NAME, event.seq - last - 1)
        await self._some_room()
        self.subscription.offer(event)

    async def _missed(self, source: str, event: str, count: int) -> None:
        if EventsMissed in self.subscription.kinds:
            told = EventsMissed(source=source, event=event, count=count, namespace=self._subjects.namespace)
            await self._some_room()
            self.subscription.offer(told)

    async def _some_room(self) -> int:
        """Wait until the listener takes something, if the subscription is full, and say how much fits."""
        while (room := self.subscription.room) <= 0:
            self._room.clear()
            # Announced before looking again: what is taken in between finds us waiting or is found by the look.
            self._full = True
            if self.subscription.room <= 0:
                await self._room.wait()
            self._full = False
        return room


def _jetstream(connection: NatsConnection) -> Any:
    client: Any = connection.client  # Not all of its hints are there.
    return client.jetstream(timeout=connection.options.connect_timeout)
