"""The circuit breaker: a backend that fails again and again is left alone for a while (Nygard, Release It!, 2007)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, StrEnum, auto

import msgspec

from cachebus.bus import Clock
from cachebus.messages import (
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CircuitOpen,
    Failed,
    Reply,
    error_class,
)


class CircuitState(StrEnum):
    """`CLOSED`: everything passes. `OPEN`: nothing does. `HALF_OPEN`: a few may try whether it works again."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a circuit opens and closes.

    `failure_threshold` failures in a row open it. After `recovery` seconds at most `half_open_max` probes at a time are
    let through; `success_threshold` of them that succeed close it, and one that fails opens it again. One that
    is not `enabled` stays closed.
    """

    enabled: bool = True
    failure_threshold: int = 5
    success_threshold: int = 3
    recovery: float = 30.0
    half_open_max: int = 3

    def __post_init__(self) -> None:
        for option in ("failure_threshold", "success_threshold", "half_open_max"):
            if getattr(self, option) < 1:
                raise CacheConfigurationError(f"{option}: expected at least 1, not {getattr(self, option)!r}")
        if not 0 < self.recovery < float("inf"):
            raise CacheConfigurationError(f"recovery: expected a number of seconds over 0, not {self.recovery!r}")


class CircuitBreaker:
    """The state of one circuit. Not safe for use from several threads: its actor's loop makes it so.

    `admit` gives a ticket, and every ticket is given back once, to `succeeded`, `failed` or `abandoned`. A ticket of an
    earlier `period` changes nothing: a straggler from before an outage neither closes the circuit nor prolongs the outage.
    An open circuit is half open only once a call tries it. `changed` is called at every transition, with the new `state`.
    """

    def __init__(
        self, policy: BreakerPolicy, clock: Clock, address: str, changed: Callable[[CircuitState], None]
    ) -> None:
        self.failures = 0
        self._policy = policy
        self._clock = clock
        self._address = address
        self._changed = changed
        self.state = CircuitState.CLOSED
        self.period = 0
        self._opened_at = 0.0
        self._probes = 0
        self._successes = 0

    def __repr__(self) -> str:
        return f"<CircuitBreaker of {self._address}, {self.state}>"

    @property
    def retry_after(self) -> float:
        """Seconds until an open circuit lets a probe through; 0 if something may pass now."""
        if self.state is not CircuitState.OPEN:
            return 0.0
        now = self._clock.monotonic()
        if now < self._opened_at:
            # A clock that went back, as after a suspended machine's restore, must not keep the circuit open for ever.
            self._opened_at = now
        return max(0.0, self._opened_at + self._policy.recovery - now)

    def admit(self) -> int:
        """The ticket of a call that may pass. Raises `CircuitOpen`."""
        if self.state is not CircuitState.CLOSED:
            if (refusal := self.refusal()) is not None:
                raise refusal
            if self.state is CircuitState.OPEN:
                self._enter(CircuitState.HALF_OPEN)
            self._probes += 1
        return self.period

    def refusal(self) -> CircuitOpen | None:
        """Why a call may not pass now; `None` if it may. Changes nothing."""
        if (wait := self.retry_after) > 0:
            return CircuitOpen(address=self._address, retry_after=wait)
        if self.state is CircuitState.HALF_OPEN and self._probes >= self._policy.half_open_max:
            return CircuitOpen(f"circuit of {self._address} is half open, and its probes are under way", self._address)
        return None

    def succeeded(self, ticket: int) -> None:
        """Take back the ticket of a call that the backend answered."""
        if ticket != self.period:
            return
        self.failures = 0
        if self.state is CircuitState.HALF_OPEN:
            self._probes -= 1
            self._successes += 1
            if self._successes >= self._policy.success_threshold:
                self._enter(CircuitState.CLOSED)

    def failed(self, ticket: int) -> None:
        """Take back the ticket of a call that the backend failed."""
        if ticket != self.period:
            return
        self.failures += 1
        if not self._policy.enabled:
            return
        if self.state is CircuitState.HALF_OPEN or self.failures >= self._policy.failure_threshold:
            self._opened_at = self._clock.monotonic()
            self._enter(CircuitState.OPEN)

    def abandoned(self, ticket: int) -> None:
        """Take back the ticket of a call without an outcome, such as a cancelled one."""
        if ticket == self.period and self.state is CircuitState.HALF_OPEN:
            self._probes -= 1

    def _enter(self, state: CircuitState) -> None:
        self.state = state
        self.period += 1
        self._probes = self._successes = 0
        if state is CircuitState.CLOSED:
            self.failures = 0
        self._changed(state)


class Outcome(Enum):
    """What a batch of which something failed says about its backend; `IGNORED` is nothing."""

    SUCCESS = auto()
    FAILURE = auto()
    IGNORED = auto()


def outcome_of(replies: Sequence[Reply], excluded: tuple[type[CacheError], ...]) -> tuple[Outcome, str | None]:
    """The outcome of a batch, and why the backend cannot be reached, if that is so. A batch has failed if nothing of it
    was done, and for a reason that may pass. Errors of `excluded` classes count neither way. Neither does a refusal,
    such as that of a password: the backend has not looked at the request."""
    failures = [(error_class(each.code), each.detail) for each in replies if isinstance(each, Failed)]
    counting = [(kind, detail) for kind, detail in failures if kind.transient and not issubclass(kind, excluded)]
    lost = next((detail for kind, detail in counting if issubclass(kind, CacheConnectionError)), None)
    if len(failures) == len(replies):
        if counting:
            return Outcome.FAILURE, lost
        refusals = ("configuration", "closed")
        if all(kind.transient or issubclass(kind, excluded) or kind.code in refusals for kind, _ in failures):
            return Outcome.IGNORED, lost
    return Outcome.SUCCESS, lost
