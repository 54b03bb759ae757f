"""The options of a connection to NATS, and its counters."""

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
"""The kinds of events that go out by default: changes, not reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsOptions:
    """How to reach a NATS server, and how a bus over it behaves. Durations are seconds, sizes are bytes. Secrets are
    not in `repr`. A file with a seed or with credentials is read at every connect, so it may be renewed."""

    servers: tuple[str, ...] = ("localhost:4222",)  # `host:port` of each; one that answers is enough.
    user: str = ""
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkey_seed_file: str | None = None
    credentials_file: str | None = None
    tls: bool = False  # Whether a server that offers no TLS is refused, before it learns any secret.
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    name: str = "cachebus"  # The name of this connection in the server's reports.
    inbox_prefix: str = "_INBOX"  # The beginning of the subjects of answers, for accounts that are limited to one.
    connect_timeout: float = 2.0
    reconnect_wait: float = 0.05  # Bound of the first random pause before a reconnect; it doubles (full jitter).
    reconnect_wait_max: float = 2.0
    ping_interval: float = 2.0  # Seconds between two pings; after two without an answer, the connection is given up.
    batch: int = 256  # The most requests in one NATS message.
    batch_bytes: int = 262_144  # The most bytes in such a message, unless the server sets a lower limit.
    window: int = 2  # The most unanswered NATS messages to one address before requests wait to be sent together.
    max_waiting: int = 10_000  # The most requests to one address that wait to be sent; more are answered `Overloaded`.
    resend_after: float = 1.0  # After so long, an idempotent request is sent once more: its receiver may be dead.
    budget: float = 5.0  # Seconds that a request from elsewhere may take if it does not say.
    max_budget: float = 300.0  # Seconds that a request from elsewhere may take at most.
    reply_prefixes: tuple[str, ...] = ("_INBOX",)
    """The allowed beginnings of reply subjects of requests from elsewhere, next to `inbox_prefix`. A request with another
    one is dropped and counted: its sender could choose what this process publishes."""
    claim_wait: float = 0.25  # Seconds that a claim to an address waits for objections.
    events: tuple[str, ...] = SHARED_KINDS  # Globs over the kinds of events that go out.
    events_as_json: bool = True  # For listeners in any language; otherwise msgpack.
    events_stream: str | None = None  # The JetStream stream with the events for `since`; created if missing.
    events_stream_max_age: float = 86_400.0  # How long a created stream keeps them.
    events_stream_max_bytes: int = 67_108_864  # How much a created stream keeps; the oldest is dropped.
    heartbeat: float | None = 1.0  # Seconds between two heartbeats, which show the loss of the last events.
    outbox: int = 10_000  # The most events that wait to go out; more are lost and counted.
    pending_messages: int = 65_536  # The most messages of a subscription that are read at once; more are lost.
    pending_bytes: int = 67_108_864

    def __post_init__(self) -> None:
        credentials = (self.user, self.token, self.nkey_seed_file, self.credentials_file)
        for wrong, problem in (
            (not self.servers, "servers: at least one is needed"),
            (not all(self.reply_prefixes), "reply_prefixes: an empty one would allow every subject"),
            (any("@" in each for each in self.servers), "servers: a user and a password have options of their own"),
            (bool(self.user) != (self.password is not None), "user, password: one needs the other"),
            (sum(map(bool, credentials)) > 1, "user, token, nkey_seed_file and credentials_file exclude each other"),
            (self.tls_key_file and not self.tls_cert_file, "tls_key_file: there is no tls_cert_file"),
            (not self.tls and (self.tls_ca_file or self.tls_cert_file), "tls_ca_file, tls_cert_file: need tls"),
            (self.heartbeat is not None and not self.heartbeat > 0, "heartbeat: expected seconds above 0, or none"),
            (self.reconnect_wait_max < self.reconnect_wait, "reconnect_wait_max: less than reconnect_wait"),
        ):
            if wrong:
                raise CacheConfigurationError(problem)
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in {"int", "float"} and not value > 0:
                raise CacheConfigurationError(f"{each.name}: expected more than 0, not {value!r}")

    @property
    def inboxes(self) -> tuple[str, ...]:
        """The allowed beginnings of the subjects of answers."""
        return (f"{self.inbox_prefix}.", *self.reply_prefixes)


@dataclass(slots=True)
class NatsCounters:
    """What happened on a bus over NATS since it was opened. Counted on its loop."""

    requests_sent: int = 0
    messages_sent: int = 0  # NATS messages of requests: fewer than requests if there are many callers.
    requests_resent: int = 0
    requests_served: int = 0
    requests_expired: int = 0  # Requests that came in too late, and were not worked on.
    replies_refused: int = 0  # Messages that were dropped because their reply subject is outside of the inboxes.
    bad_messages: int = 0
    late_replies: int = 0  # Answers that came after their callers had gone.
    lost_replies: int = 0  # Answers that could not be sent, because the connection was away or full.
    slow_consumer: int = 0  # Messages that were thrown away, because too many came in at once.
    reconnects: int = 0
    events_sent: int = 0
    events_dropped: int = 0
    heartbeats_sent: int = 0
    events_received: int = 0
    events_missed: int = 0  # Events of other processes that did not arrive.
