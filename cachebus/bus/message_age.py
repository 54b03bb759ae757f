"""The age of a message, although the clocks of its sender and its receiver have nothing in common.

There are two sources. Neither is enough alone (decision 42 has the figures):

* **Delays.** A message carries the time of sending, by the sender's clock. The difference to the time of arrival is the
  delay plus the difference of the two clocks. The smallest recent difference stands for a message that was not held up;
  the excess of another one is its age. A new sender has no smallest difference.
* **Pings.** What a connection delivers after the answer to a ping was sent after that ping. If a process was stopped, or
  if something between it and the server holds bytes back, the last answered ping is old, and so may be the message.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from msgspec import Struct

from .clock import SYSTEM_CLOCK, Clock

PING_INTERVAL = 0.1  # Seconds between two pings of a connection over which requests come in.
SLACK = 0.25  # Seconds that the last answered ping may be old: two intervals, and some time for the answer.
_DRIFT = 0.0005  # Seconds a second by which two clocks may come apart while a sender is silent.
_WINDOW = 10.0  # Seconds of messages after which the smallest difference is the smallest of these.
_SENDERS = 10_000  # Of those not heard for longest, the next message counts as the first.


class _Sender(Struct, eq=False):
    least: float
    recent: float  # The smallest difference since `since`.
    since: float
    heard: float


class MessageAges:
    """Estimates the age of messages from many senders. Bounded, and not safe for threads."""

    def __init__(self) -> None:
        self._senders: OrderedDict[str, _Sender] = OrderedDict()

    def __repr__(self) -> str:
        return f"<MessageAges of {len(self._senders)}/{_SENDERS} senders>"

    def age(self, now: float, proven: float, sender: str = "", sent: float = 0.0) -> float:
        """Seconds that a message has been on its way.

        It is looked at `now`, and the last answered ping was sent at `proven`; `sender` sent it when its own clock said
        `sent`. An empty `sender` has said nothing.
        """
        link = max(0.0, now - proven - SLACK)
        if not sender:
            return link
        difference = now - sent
        known = self._senders.get(sender)
        if known is None:
            if link > 0.0:
                return link  # It may have been held up, and so its delay says nothing about the next one.
            self._senders[sender] = _Sender(difference, difference, now, now)
            if len(self._senders) > _SENDERS:
                self._senders.popitem(last=False)
            return 0.0
        most = difference - known.least
        # The clocks may have come apart since the sender was heard last. If the link is slow, that decides.
        known.least += _DRIFT * (now - known.heard)
        excess = difference - known.least
        if excess < 0.0:
            known.least, excess = difference, 0.0
        # Forget the smallest difference when `_WINDOW` seconds of messages have had none as small. A message that was held
        # up does not count, and neither does silence.
        if link > 0.0 or now - known.heard > _WINDOW:
            known.recent, known.since = difference, now
        elif difference < known.recent:
            known.recent = difference
        if now - known.since > _WINDOW:
            known.least, known.recent, known.since = known.recent, difference, now
        known.heard = now
        self._senders.move_to_end(sender)
        return max(excess, min(most, link))


def age_clock(clock: Clock) -> Callable[[], float]:
    """The clock by which ages are measured: one that goes on while the machine sleeps, where there is one."""
    if clock is SYSTEM_CLOCK and hasattr(time, "CLOCK_BOOTTIME"):
        return partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    return clock.monotonic
