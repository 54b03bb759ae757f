"""Batches whose replies come after their turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachebus.bus import Envelope
from cachebus.messages import CacheError, Failed, Reply


def check_batch(envelopes: Sequence[Envelope], replies: Sequence[Any]) -> None:
    """Raise `TypeError` unless there is one reply for each message."""
    if len(replies) != len(envelopes):
        raise TypeError(f"a batch of {len(envelopes)} messages got {len(replies)} replies")


class BatchPort:
    """A port on which all the messages of a batch wait: it takes one sequence of replies, or one `Failed` for all.

    `answer_one` gives a message its reply; `crashed` is told if the replies are not as many as the messages.
    """

    __slots__ = ("_answer_one", "_crashed", "_envelopes")

    def __init__(
        self,
        envelopes: list[Envelope],
        answer_one: Callable[[Envelope, Reply | CacheError], None],
        crashed: Callable[[Exception, list[Envelope]], None],
    ) -> None:
        self._envelopes = envelopes
        self._answer_one = answer_one
        self._crashed = crashed

    @property
    def waiting(self) -> bool:
        """Whether anybody still waits."""
        return any(each.port is not None and each.port.waiting for each in self._envelopes)

    def answer(self, replies: Sequence[Reply] | Failed) -> None:
        """Give the answers. Does not wait."""
        if isinstance(replies, Failed):
            replies = [replies] * len(self._envelopes)
        try:
            check_batch(self._envelopes, replies)
        except TypeError as error:
            self._crashed(error, self._envelopes)
            return
        for envelope, reply in zip(self._envelopes, replies, strict=True):
            if envelope.port is not None:
                envelope.port.answer(reply)
            else:
                self._answer_one(envelope, reply)
