"""Batches whose replies come after their turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachebus.bus import Envelope
from cachebus.messages import CacheError, Failed, Reply

from .actor import AsyncHandler, BatchHandler


def check_batch(envelopes: Sequence[Envelope], replies: Sequence[Any]) -> None:
    """Raise `TypeError` unless there is one reply for each message."""
    if len(replies) != len(envelopes):
        raise TypeError(f"a batch of {len(envelopes)} messages got {len(replies)} replies")


def alone(handler: AsyncHandler) -> BatchHandler:
    """A handler of one message as a handler of a batch of one."""

    async def handle(batch: Sequence[Any]) -> Sequence[Any]:
        return [await handler(batch[0])]

    return handle


class BatchPort:
    """A port on which all the messages of a batch wait: it takes one sequence of replies, or one `Failed` for all.

    `answer_one` gives a message its reply; `crashed` is told if the replies are not as many as the messages.
    """

    __slots__ = ("_answer_one", "_crashed", "_envelopes")

    def __init__(
        self,
        envelopes: list[Envelope],
        answer_one: Callable[[Envelope, Reply | CacheError], None],
        crashed: Callable[[Exception, Envelope], None],
    ) -> None:
        self._envelopes = envelopes
        self._answer_one = answer_one
        self._crashed = crashed

    @property
    def waiting(self) -> bool:
        """Whether anybody still waits."""
        return any(each.port is not None and each.port.waiting for each in self._envelopes)

    def answer(self, reply: Any) -> None:
        """Give the answers: a sequence of replies, or a `Failed`. Does not wait."""
        replies: Sequence[Reply] = [reply] * len(self._envelopes) if isinstance(reply, Failed) else reply
        try:
            check_batch(self._envelopes, replies)
        except TypeError as error:
            for envelope in reversed(self._envelopes):
                self._crashed(error, envelope)
            return
        for envelope, each in zip(self._envelopes, replies, strict=True):
            if envelope.port is not None:
                envelope.port.answer(each)
            else:
                self._answer_one(envelope, each)
