"""Replaying past events from a JetStream stream, for subscriptions with `since`.

A replay reads only from the stream, even after it has caught up. So there is no switch to live events at which one
could be duplicated or lost. It reads no more than its subscription can hold, so a slow listener loses no events.
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

MESSAGE_ID = "Nats-Msg-Id"  # The header by which a stream drops duplicates.
_DUPLICATES = 120.0  # Seconds for which a stream detects duplicates, or less if it keeps messages for less.
_BATCH = 256
_EXPIRES = 2.0  # Seconds for which a request for more events stays open.
_IDLE = 60.0  # Seconds after which the server removes an inactive consumer.
_RETRY_WAIT = 0.25  # Upper bound in seconds of the delay before a retry; doubles up to `_RETRY_WAIT_MAX`.
_RETRY_WAIT_MAX = 2.0
_NUMBERINGS = 10_000  # Maximum number of remembered numberings; the least recently used ones are forgotten.


async def ensure_stream(connection: NatsConnection, subjects: Subjects) -> None:
    """Create the configured stream, or add the events of the namespace to an existing one and keep its other options.

    Raises `CacheConfigurationError` if the server has no JetStream or rejects the stream, and `CacheConnectionError`.
    """
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
            # A stream with this name but other options exists. The options are the operator's choice.
            found = (await stream.stream_info(name)).config
            known: list[str] = list(found.subjects or ())
            if subject not in known:
                found.subjects = [*known, subject]
                await stream.update_stream(found)
        return
    except (ServiceUnavailableError, nats.errors.NoRespondersError):
        problem = f"events_stream {name!r}: the server has no JetStream (nats-server --jetstream)"
    except APIError as error:
        problem = f"events_stream {name!r}: the server rejected the stream: {error.description}"
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise CacheConnectionError(f"events_stream {name!r}: {type(error).__name__}", "nats") from None
    raise CacheConfigurationError(problem)


class Replay:
    """Replays the stored events since a given time to one subscription, and continues with new events.

    `since` is a Unix time in seconds. If the stream has dropped events or never received them, the subscription gets
    `EventsMissed` instead.
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
        self.subscription = Subscription(
            event_kinds(what), capacity, lambda _: self._on_loop(self._end), on_taken=self._taken
        )
        self._connection = connection
        self._subjects = subjects
        self._since = since
        self._on_end = on_end
        self._loop = connection.loop
        self._last: OrderedDict[tuple[str, int, str], int] = OrderedDict()
        self._full = False  # The task waits until the subscription has room.
        self._room = asyncio.Event()
        self._position = 0  # Stream sequence number of the last message that was read.
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self._tries = 0

    def __repr__(self) -> str:
        return f"<Replay at {self._position} of {len(self._last)}/{_NUMBERINGS} numberings for {self.subscription!r}>"

    def start(self) -> None:
        """Start reading. Call it on the connection's loop."""
        if not self.subscription.closed:
            self._task = asyncio.create_task(self._run(), name="cachebus-replay")

    def _taken(self) -> None:
        if self._full:
            self._on_loop(self._room.set)

    def _on_loop(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # The loop is closed, so the task has ended.
            self._loop.call_soon_threadsafe(call)

    def _end(self) -> None:
        self._on_end(self)
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Stop the replay and close its subscription."""
        self.subscription.close()
        if self._task is not None:
            await end_task(self._task)

    async def _run(self) -> None:
        try:
            while not self.subscription.closed:
                try:
                    await self._read()
                except (nats.errors.Error, CacheError, OSError, TimeoutError) as error:
                    # The connection is down or the server has removed the consumer: resume at the last position.
                    logger.info("a replay of events was interrupted and will resume: %s", type(error).__name__)
                    self._tries += 1
                    longest = min(_RETRY_WAIT_MAX, _RETRY_WAIT * 2.0 ** min(self._tries - 1, 10))
                    await asyncio.sleep(random.uniform(0.0, longest))
        except Exception:
            # A bug. The listener must not mistake the end of the subscription for a lack of events.
            logger.exception("a replay of events failed")
            await self._missed()
        finally:
            self.subscription.close()

    async def _read(self) -> None:
        jetstream = _jetstream(self._connection)
        try:
            stream = await jetstream.find_stream_name_by_subject(self._subjects.all_events())
        except (NotFoundError, ServiceUnavailableError):
            # After a restart of the server, its streams may not be available immediately.
            if self._begun:
                raise
            logger.error("no stream stores the events of namespace %s", self._subjects.namespace)
            await self._missed()
            self.subscription.close()
            return
        await self._check_beginning(jetstream, stream)
        created = await jetstream.add_consumer(stream, self._consumer())
        self._begun = True
        reader: Any = await jetstream.pull_subscribe_bind(consumer=created.name, stream=stream)
        try:
            while not self.subscription.closed:
                room = await self._wait_for_room()
                try:
                    messages: list[Msg] = await reader.fetch(min(room, _BATCH), timeout=_EXPIRES)
                except TimeoutError:
                    if not self._connection.up:
                        raise
                    await jetstream.consumer_info(stream, created.name)  # If it is not found, `_run` starts again.
                    messages = []
                self._tries = 0
                for msg in messages:
                    await self._deliver(msg)
        finally:
            if self._connection.up:
                await reader.unsubscribe()

    async def _check_beginning(self, jetstream: Any, stream: str) -> None:
        state = (await jetstream.stream_info(stream)).state
        if state.first_seq <= self._position + 1:
            return
        if not self._position and state.messages:
            # The stream has dropped events. That does not matter if they were older than `since`.
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
        if self._position:
            start = {"deliver_policy": DeliverPolicy.BY_START_SEQUENCE, "opt_start_seq": self._position + 1}
        else:
            when = datetime.fromtimestamp(0, UTC) + timedelta(seconds=self._since)
            start = {"deliver_policy": DeliverPolicy.BY_START_TIME, "opt_start_time": when}
        return ConsumerConfig(
            ack_policy=AckPolicy.NONE, filter_subjects=subjects, inactive_threshold=_IDLE, mem_storage=True, **start
        )

    async def _deliver(self, msg: Msg) -> None:
        self._position = max(self._position, msg.metadata.sequence.stream)
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
        await self._wait_for_room()
        self.subscription.offer(event)

    async def _missed(self, source: str = "", event: str = "", count: int = 0) -> None:
        if EventsMissed in self.subscription.kinds:
            missed = EventsMissed(source=source, event=event, count=count, namespace=self._subjects.namespace)
            await self._wait_for_room()
            self.subscription.offer(missed)

    async def _wait_for_room(self) -> int:
        """Wait while the subscription is full. Return the number of events that it can take."""
        subscription = self.subscription
        while len(subscription) >= subscription.capacity:
            self._room.clear()
            # Set the flag before checking again: an event taken in between either wakes this task or is seen by the
            # check.
            self._full = True
            if len(subscription) >= subscription.capacity:
                await self._room.wait()
            self._full = False
        return subscription.capacity - len(subscription)


def _jetstream(connection: NatsConnection) -> Any:
    client: Any = connection.client  # `Any`, because its type hints are incomplete.
    return client.jetstream(timeout=connection.options.connect_timeout)
