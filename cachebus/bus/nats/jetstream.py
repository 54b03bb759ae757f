"""Events of the past: a JetStream stream keeps them, and replays them to subscriptions with `since`.

A replay reads the stream and nothing else, also when it has come to the present, so there is no seam at which an event
could come twice or not at all. It takes no more than its subscription has room for, so a slow listener loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, DiscardPolicy, StreamConfig
from nats.js.errors import APIError, BadRequestError, NotFoundError, ServiceUnavailableError

from cachebus.messages import CacheConfigurationError, CacheConnectionError, CacheError, Event, EventsMissed

from ..address import Subjects
from ..codec.messages import JSON, decode
from ..events.subscription import EventKind, Subscription, event_kinds
from .connection import NatsConnection, end_task

logger = logging.getLogger("cachebus.bus")

MESSAGE_ID = "Nats-Msg-Id"  # The header by which a stream keeps each event once.
_DUPLICATES = 120.0  # Seconds in which a stream knows an id again, if it keeps messages for as long.
_BATCH = 256
_EXPIRES = 2.0  # Seconds that one question for more events may stay open.
_IDLE = 60.0  # Seconds after which the server forgets a reader that has gone without a word.
_AGAIN = 0.25  # Seconds until an interrupted replay tries again, at most; doubles up to `_AGAIN_MAX`.
_AGAIN_MAX = 2.0
_NUMBERINGS = 10_000  # The most that are remembered; those not seen for longest are forgotten.


async def ensure_stream(connection: NatsConnection, subjects: Subjects) -> None:
    """Make sure that the stream of the options exists and takes the events of the namespace. Its other options stay as they
    are. Raises `CacheConfigurationError` if the server keeps no streams."""
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
            # One of the name exists, with other options: the operator's choice.
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


class Replay:
    """Replays to one subscription what a stream has kept since a time, and goes on with new events. `since` is Unix
    time in seconds. `EventsMissed` stands in for events that were lost, because the stream no longer has them or
    they never came to it."""

    def __init__(
        self,
        connection: NatsConnection,
        subjects: Subjects,
        what: tuple[EventKind | str, ...],
        since: float,
        capacity: int,
        on_end: Callable[[Replay], None],
    ) -> None:
        self.subscription = Subscription(
            event_kinds(what), capacity, lambda _: self._on_loop(self._end), on_taken=self._taken
        )
        self._connection = connection
        self._subjects = subjects
        self._since = since
        self._on_end = on_end
        self._loop = connection.loop
        self._last: OrderedDict[tuple[str, int, str], int] = OrderedDict()
        self._full = False  # The task waits for room.
        self._room = asyncio.Event()
        self._place = 0  # In the stream: the number of the last message that was read.
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self._tries = 0

    def __repr__(self) -> str:
        return f"<Replay at {self._place} of {len(self._last)}/{_NUMBERINGS} numberings for {self.subscription!r}>"

    def start(self) -> None:
        """Begin to read. On the loop of the connection."""
        if not self.subscription.closed:
            self._task = asyncio.create_task(self._run(), name="cachebus-replay")

    def _taken(self) -> None:
        if self._full:
            self._on_loop(self._room.set)

    def _on_loop(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # The loop is closed, and the task with it.
            self._loop.call_soon_threadsafe(call)

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
            while not self.subscription.closed:
                try:
                    await self._read()
                except (nats.errors.Error, CacheError, OSError, TimeoutError) as error:
                    # Away, or the server has forgotten us: begin again where we were.
                    logger.info("a replay is interrupted: %s", type(error).__name__)
                    self._tries += 1
                    longest = min(_AGAIN_MAX, _AGAIN * 2.0 ** min(self._tries - 1, 10))
                    await asyncio.sleep(random.uniform(0.0, longest))
        except Exception:
            # A bug of ours or of nats-py. The listener must not take the end of its events for silence.
            logger.exception("a replay has failed")
            await self._missed()
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
            logger.error("no stream keeps the events of %s", self._subjects.namespace)
            await self._missed()
            self.subscription.close()
            return
        await self._look_for_a_beginning(jetstream, stream)
        created = await jetstream.add_consumer(stream, self._consumer())
        self._begun = True
        reader: Any = await jetstream.pull_subscribe_bind(consumer=created.name, stream=stream)
        try:
            while not self.subscription.closed:
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
        if not self._place and state.messages:
            # The stream has dropped something: was that before `since`?
            oldest = await jetstream.get_msg(stream, state.first_seq)
            if oldest.time is not None and oldest.time.timestamp() <= self._since:
                return
        await self._missed()

    def _consumer(self) -> ConsumerConfig:
        kinds = self.subscription.kinds
        start: dict[str, Any]
        if kinds == event_kinds(()):
            subjects = [self._subjects.all_events()]
        else:
            subjects = sorted(self._subjects.events(kind) for kind in kinds - {EventsMissed})
        if self._place:
            start = {"deliver_policy": DeliverPolicy.BY_START_SEQUENCE, "opt_start_seq": self._place + 1}
        else:
            when = datetime.fromtimestamp(0, UTC) + timedelta(seconds=self._since)
            start = {"deliver_policy": DeliverPolicy.BY_START_TIME, "opt_start_time": when}
        return ConsumerConfig(
            ack_policy=AckPolicy.NONE, filter_subjects=subjects, inactive_threshold=_IDLE, mem_storage=True, **start
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

    async def _missed(self, source: str = "", event: str = "", count: int = 0) -> None:
        if EventsMissed in self.subscription.kinds:
            missed = EventsMissed(source=source, event=event, count=count, namespace=self._subjects.namespace)
            await self._some_room()
            self.subscription.offer(missed)

    async def _some_room(self) -> int:
        """Wait until the listener takes something, if the subscription is full, and return how much fits."""
        subscription = self.subscription
        while len(subscription) >= subscription.capacity:
            self._room.clear()
            # Announced before looking again: what is taken in between finds us waiting or is found by the look.
            self._full = True
            if len(subscription) >= subscription.capacity:
                await self._room.wait()
            self._full = False
        return subscription.capacity - len(subscription)


def _jetstream(connection: NatsConnection) -> Any:
    client: Any = connection.client  # Not all of its hints are there.
    return client.jetstream(timeout=connection.options.connect_timeout)
