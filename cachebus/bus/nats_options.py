"""What a connection to NATS can be told, and what it counts."""

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
"""The kinds of events that go out unless others are named: what changes, not what is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsOptions:
    """How to reach a NATS server, and how a bus over it behaves. Durations are seconds, sizes are bytes.

    Secrets are not in `repr`. A file with a seed or with credentials is read at every connect, so it may be renewed.
    """

    servers: tuple[str, ...] = ("localhost:4222",)
    """`host:port`, each; one that answers will do."""
    user: str = ""
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkey_seed_file: str | None = None
    credentials_file: str | None = None
    tls: bool = False
    """Whether a server that offers no TLS is refused, before it learns any secret."""
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    name: str = "cachebus"
    """What the server calls this connection in its reports."""
    inbox_prefix: str = "_INBOX"
    """What the subjects of answers begin with, for accounts that may listen only below a prefix of their own."""
    connect_timeout: float = 2.0
    reconnect_wait: float = 0.05
    """The upper end of the first pause before a reconnect; it doubles, and the pause is drawn below it (full jitter)."""
    reconnect_wait_max: float = 2.0
    ping_interval: float = 2.0
    """How often the server is asked for a sign of life; after two without one, the connection is given up."""
    batch: int = 256
    """How many requests may go out as one NATS message."""
    batch_bytes: int = 262_144
    """How large such a message may grow, if the server does not set a lower limit."""
    window: int = 2
    """How many NATS messages to one address may be unanswered before requests wait to be sent together."""
    max_waiting: int = 10_000
    """How many requests to one address may wait to be sent; more are answered `Overloaded`."""
    resend_after: float = 1.0
    """An idempotent request without an answer for so long is sent once more: whoever took it may be dead."""
    budget: float = 5.0
    """What a request from elsewhere may take if it does not say."""
    max_budget: float = 300.0
    """What a request from elsewhere may take at most, whatever it says."""
    reply_prefixes: tuple[str, ...] = ("_INBOX",)
    """What the reply subjects of requests from elsewhere begin with, next to `inbox_prefix`. A request with another one is
    dropped and counted: its sender would choose what this process publishes where."""
    claim_wait: float = 0.25
    """How long a claim to an address waits for those who have one too."""
    events: tuple[str, ...] = SHARED_KINDS
    """Globs over the kinds of events that go out."""
    events_as_json: bool = True
    """For listeners in any language; otherwise msgpack."""
    events_stream: str | None = None
    """The JetStream stream that keeps events, for listeners who ask since when; made if there is none."""
    events_stream_max_age: float = 86_400.0
    """How long it keeps them, where it is made."""
    events_stream_max_bytes: int = 67_108_864
    """How much it keeps, where it is made; the oldest goes."""
    heartbeat: float | None = 1.0
    """How often whoever has told events says how far their numbers go, so that the loss of the last ones is noticed;
    `None` is never."""
    outbox: int = 10_000
    """How many events may wait to go out; more are lost and counted."""
    pending_messages: int = 65_536
    """How many messages of a subscription may be taken from the socket at once; more are lost and counted."""
    pending_bytes: int = 67_108_864

    def __post_init__(self) -> None:
        for wrong, problem in (
            (not self.servers, "servers: at least one is needed"),
            (not all(self.reply_prefixes), "reply_prefixes: an empty one would allow every subject"),
            (any("@" in each for each in self.servers), "servers: a user and a password have options of their own"),
            (bool(self.user) != (self.password is not None), "user, password: one needs the other"),
            (self.ways_to_sign_in > 1, "user, token, nkey_seed_file and credentials_file exclude each other"),
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
        """What the subjects of answers may begin with."""
        return (f"{self.inbox_prefix}.", *self.reply_prefixes)

    @property
    def ways_to_sign_in(self) -> int:
        """How many kinds of credentials there are."""
        return sum(map(bool, (self.user, self.token, self.nkey_seed_file, self.credentials_file)))


@dataclass(slots=True)
class NatsCounters:
    """What happened on a bus over NATS since it was opened. Counted on its loop."""

    requests_sent: int = 0
    messages_sent: int = 0
    """NATS messages that the requests went out in: fewer, where callers are many."""
    requests_resent: int = 0
    requests_served: int = 0
    requests_expired: int = 0
    """Requests that came in when their callers had given up, and were not worked on."""
    replies_refused: int = 0
    """Messages that were dropped because they asked for a reply outside of the inboxes."""
    bad_messages: int = 0
    late_replies: int = 0
    """Answers that came when nobody waited for them any more."""
    lost_replies: int = 0
    """Answers that could not be sent, because the connection was away or stuffed."""
    slow_consumer: int = 0
    """Messages that came in and were thrown away, because too many came at once."""
    reconnects: int = 0
    events_sent: int = 0
    events_dropped: int = 0
    heartbeats_sent: int = 0
    events_received: int = 0
    events_missed: int = 0
    """Events of other processes that must have been told and did not arrive."""
