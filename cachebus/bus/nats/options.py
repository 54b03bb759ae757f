"""The options of a NATS connection, and its counters."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from cachebus.messages import CacheConfigurationError

SHARED_KINDS = (
    "cache_set",
    "cache_deleted",
    "cache_evicted",
    "cache_expired",
    "cache_cleared",
    "tags_invalidated",
    "backend_*",
    "circuit_*",
    "actor_*",
)
"""The kinds of events that are published to NATS by default: changes, not reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsOptions:
    """The options of a NATS connection and of the bus that uses it.

    Durations are in seconds, sizes in bytes. `repr` does not show secrets. Seed and credentials files are read at every
    connect, so you can replace them at any time.
    """

    servers: tuple[str, ...] = ("localhost:4222",)  # `host:port` of each server; one reachable server is enough.
    user: str = ""
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkey_seed_file: str | None = None
    credentials_file: str | None = None
    tls: bool = False  # Require TLS. A server that does not offer it is rejected before any secret is sent.
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    name: str = "cachebus"  # Name of this connection in the server's reports.
    inbox_prefix: str = "_INBOX"  # Prefix of reply subjects, for accounts that are restricted to one.
    connect_timeout: float = 2.0
    reconnect_wait: float = 0.05  # Upper bound of the first random delay before a reconnect; it doubles (full jitter).
    reconnect_wait_max: float = 2.0
    ping_interval: float = 2.0  # Interval between pings. After two unanswered pings the connection is closed.
    batch: int = 256  # Maximum number of requests in one NATS message.
    batch_bytes: int = 262_144  # Maximum size of such a message, unless the server has a lower limit.
    window: int = 2  # Maximum number of unanswered NATS messages per address; further requests are batched.
    max_waiting: int = 10_000  # Maximum number of unsent requests per address; more are answered with `Overloaded`.
    resend_after: float = 1.0  # Delay before an idempotent request is sent again, because its receiver may be dead.
    budget: float = 5.0  # Budget of an incoming request that does not specify one.
    max_budget: float = 300.0  # Maximum budget of an incoming request.
    reply_prefixes: tuple[str, ...] = ("_INBOX",)
    """Allowed prefixes of the reply subjects of incoming requests, besides `inbox_prefix`. Requests with other reply
    subjects are dropped and counted, because the sender could choose any subject for this process to publish to."""
    claim_wait: float = 0.25  # Time that a claim to an address waits for objections.
    events: tuple[str, ...] = SHARED_KINDS  # Globs over the kinds of events to publish.
    events_as_json: bool = True  # JSON for listeners in any language; otherwise MessagePack.
    events_stream: str | None = None  # JetStream stream that stores the events for `since`; created if missing.
    events_stream_max_age: float = 86_400.0  # Maximum age of events in a created stream.
    events_stream_max_bytes: int = 67_108_864  # Maximum size of a created stream; the oldest events are dropped.
    heartbeat: float | None = 1.0  # Interval between heartbeats, by which listeners detect lost events.
    outbox: int = 10_000  # Maximum number of unsent events; more are dropped and counted.
    pending_messages: int = 65_536  # Maximum number of messages per subscription in one read; more are dropped.
    pending_bytes: int = 67_108_864  # The same limit in bytes.

    def __post_init__(self) -> None:
        credentials = (self.user, self.token, self.nkey_seed_file, self.credentials_file)
        for wrong, problem in (
            (not self.servers, "servers: at least one server is required"),
            (not all(self.reply_prefixes), "reply_prefixes: an empty prefix would allow every subject"),
            (any("@" in each for each in self.servers), "servers: use the options user and password for credentials"),
            (bool(self.user) != (self.password is not None), "user, password: both are required if one is set"),
            (sum(map(bool, credentials)) > 1, "user, token, nkey_seed_file, credentials_file: only one may be set"),
            (self.tls_key_file and not self.tls_cert_file, "tls_key_file: there is no tls_cert_file"),
            (not self.tls and (self.tls_ca_file or self.tls_cert_file), "tls_ca_file, tls_cert_file: need tls"),
            (self.heartbeat is not None and not self.heartbeat > 0, "heartbeat: expected seconds above 0, or none"),
            (self.reconnect_wait_max < self.reconnect_wait, "reconnect_wait_max: must not be less than reconnect_wait"),
        ):
            if wrong:
                raise CacheConfigurationError(problem)
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in {"int", "float"} and not value > 0:
                raise CacheConfigurationError(f"{each.name}: expected a number above 0, not {value!r}")

    @property
    def inboxes(self) -> tuple[str, ...]:
        """The allowed prefixes of reply subjects."""
        return (f"{self.inbox_prefix}.", *self.reply_prefixes)


@dataclass(slots=True)
class NatsCounters:
    """Counters of a NATS bus since it was opened. They are updated on its event loop."""

    requests_sent: int = 0
    messages_sent: int = 0  # NATS messages with requests. Concurrent requests share a message.
    requests_resent: int = 0
    requests_served: int = 0
    requests_expired: int = 0  # Incoming requests that were past their deadline and not handled.
    replies_refused: int = 0  # Incoming messages that were dropped because their reply subject is not allowed.
    bad_messages: int = 0
    late_replies: int = 0  # Replies that arrived after their callers had stopped waiting.
    lost_replies: int = 0  # Replies that could not be sent because the connection was down or its buffer was full.
    slow_consumer: int = 0  # Incoming messages that were dropped because too many arrived at once.
    reconnects: int = 0
    events_sent: int = 0
    events_dropped: int = 0
    heartbeats_sent: int = 0
    events_received: int = 0
    events_missed: int = 0  # Events of other processes that did not arrive.
