"""Circuit breaker: stops sending requests to a backend that keeps failing (Nygard, Release It!, 2007)."""

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
    """State of a circuit.

    `CLOSED`: all calls pass. `OPEN`: all calls are refused. `HALF_OPEN`: a few probes pass, to test whether the backend
    has recovered.
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a circuit breaker.

    `failure_threshold` consecutive failures open the circuit. After `recovery` seconds, up to `half_open_max` probes at
    a time may pass. `success_threshold` successful probes close the circuit; one failed probe opens it again. If
    `enabled` is false, the circuit stays closed.
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
            raise CacheConfigurationError(
                f"recovery: expected a number of seconds greater than 0, not {self.recovery!r}"
            )


class CircuitBreaker:
    """Circuit breaker of one backend. Not thread-safe: use it on the event loop of its actor.

    `admit` returns a ticket. Return each ticket exactly once, to `succeeded`, `failed` or `abandoned`. A ticket from an
    earlier `period` has no effect, so a late result from before an outage neither closes the circuit nor prolongs the
    outage. An open circuit becomes half open when the first call arrives after the recovery time. `changed` is called
    with the new state at each transition.
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
        """Seconds until an open circuit lets a probe pass; 0 if a call may pass now."""
        if self.state is not CircuitState.OPEN:
            return 0.0
        now = self._clock.monotonic()
        if now < self._opened_at:
            # If the clock went back, for example after a suspended machine was restored, the circuit must still close.
            self._opened_at = now
        return max(0.0, self._opened_at + self._policy.recovery - now)

    def admit(self) -> int:
        """Return the ticket of a call that may pass. Raises `CircuitOpen` if it may not."""
        if self.state is not CircuitState.CLOSED:
            if (refusal := self.refusal()) is not None:
                raise refusal
            if self.state is CircuitState.OPEN:
                self._enter(CircuitState.HALF_OPEN)
            self._probes += 1
        return self.period

    def refusal(self) -> CircuitOpen | None:
        """Return the error for a call that may not pass now, or `None` if it may. Does not change the state."""
        if (wait := self.retry_after) > 0:
            return CircuitOpen(address=self._address, retry_after=wait)
        if self.state is CircuitState.HALF_OPEN and self._probes >= self._policy.half_open_max:
            return CircuitOpen(
                f"the circuit of {self._address} is half open and its probes are in flight", self._address
            )
        return None

    def succeeded(self, ticket: int) -> None:
        """Record a success and take the ticket back."""
        if ticket != self.period:
            return
        self.failures = 0
        if self.state is CircuitState.HALF_OPEN:
            self._probes -= 1
            self._successes += 1
            if self._successes >= self._policy.success_threshold:
                self._enter(CircuitState.CLOSED)

    def failed(self, ticket: int) -> None:
        """Record a failure and take the ticket back."""
        if ticket != self.period:
            return
        self.failures += 1
        if not self._policy.enabled:
            return
        if self.state is CircuitState.HALF_OPEN or self.failures >= self._policy.failure_threshold:
            self._opened_at = self._clock.monotonic()
            self._enter(CircuitState.OPEN)

    def abandoned(self, ticket: int) -> None:
        """Take back the ticket of a call without an outcome, such as a cancelled call."""
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
    """Outcome of a batch for the circuit breaker. `IGNORED` outcomes count neither as a success nor as a failure."""

    SUCCESS = auto()
    FAILURE = auto()
    IGNORED = auto()


def outcome_of(replies: Sequence[Reply], excluded: tuple[type[CacheError], ...]) -> tuple[Outcome, str | None]:
    """Return the outcome of a batch, and the reason if the backend cannot be reached (else `None`).

    A batch has failed if all of its requests failed, at least one of them with a transient error. Errors of `excluded`
    classes are ignored. So are refusals, such as a wrong password, because the backend did not process the request.
    """
    failures = [(error_class(each.code), each.detail) for each in replies if isinstance(each, Failed)]
    counted = [(kind, detail) for kind, detail in failures if kind.transient and not issubclass(kind, excluded)]
    lost = next((detail for kind, detail in counted if issubclass(kind, CacheConnectionError)), None)
    if len(failures) == len(replies):
        if counted:
            return Outcome.FAILURE, lost
        refusals = ("configuration", "closed")
        if all(kind.transient or issubclass(kind, excluded) or kind.code in refusals for kind, _ in failures):
            return Outcome.IGNORED, lost
    return Outcome.SUCCESS, lost
