"""The options of a bus over NATS, and of a backend that is reached over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, SecretStr, model_validator

from cachebus.bus import check_word, event_kinds
from cachebus.bus.nats_options import NatsOptions
from cachebus.messages import CacheConfigurationError

from .options import AtLeastOne, BackendOptions, MaybeSeconds, Options, Seconds, Switch, named
from .redis_settings import Hosts, host_and_port
from .urls import parse_bus_url, redact_url

_DEFAULT = NatsOptions()


def _texts(value: object, expected: str) -> tuple[str, ...]:
    """Return a list of texts, also from one text with commas between them."""
    parts = value.split(",") if isinstance(value, str) else value
    given = cast("Sequence[Any]", parts) if isinstance(parts, list | tuple) else [None]
    if not all(isinstance(each, str) for each in given):
        raise ValueError(expected)
    return tuple(map(str, given))


def _kinds(value: object) -> tuple[str, ...]:
    given = [each for each in value.split(",") if each] if isinstance(value, str) else value
    kinds = _texts(given, "expected kinds of events, such as cache_set or cache_*")
    if kinds:
        event_kinds(kinds)
    return kinds


def _prefixes(value: object) -> tuple[str, ...]:
    expected = "expected beginnings of subjects, such as _INBOX"
    if not all(prefixes := _texts(value, expected)):
        raise ValueError(expected)
    return prefixes


def _text(value: object) -> str:
    if isinstance(value, str) and value:
        return str(value)
    raise ValueError("expected text")


def _stream(value: object) -> str:
    try:
        return str(check_word(value, "stream"))
    except ValueError:
        raise ValueError("expected one word of 1 to 64 letters, digits, _ and -") from None


def _maybe(read: Callable[[object], str]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else read(value))


MaybeText = Annotated[str | None, "text or none", _maybe(_text)]
MaybeWord = Annotated[str | None, "one word or none", _maybe(_stream)]


class BusSettings(BackendOptions):
    """A backend that some worker on the bus has; as a string, `bus:primary`. The worker's settings say what it is."""

    type: Literal["bus"] = "bus"


class NatsSettings(Options):
    """A bus over NATS. Durations are seconds, sizes are bytes.

    As a URL: `nats://user:password@host:4222,host2?window=4`, `nats://token@host`, and `tls://` to refuse a server without
    TLS. In a user, a password or a token, everything but letters and digits is escaped with `%`.
    `cachebus.bus.nats_options.NatsOptions` explains the options in detail.
    """

    type: Literal["nats"] = "nats"
    hosts: Hosts = ("localhost",)
    """Servers of one cluster, each with or without a port: 4222 if left out."""
    user: str = ""
    password: SecretStr | None = None
    token: SecretStr | None = None
    nkey_seed_file: MaybeText = None
    """A file with the seed of an nkey. Read at every connect."""
    credentials_file: MaybeText = None
    """A `.creds` file, with a JWT and a seed. Read at every connect."""
    tls: Switch = False
    """Whether a server without TLS is refused. Certificates and host names are always checked."""
    tls_ca_file: MaybeText = None
    tls_cert_file: MaybeText = None
    tls_key_file: MaybeText = None
    allow_insecure: Switch = False
    """Whether production may talk plain text to this server, because the network is trusted."""
    inbox_prefix: Annotated[str, "text", BeforeValidator(_text)] = _DEFAULT.inbox_prefix
    """What the subjects of answers begin with."""
    reply_prefixes: Annotated[tuple[str, ...], "list of prefixes", BeforeValidator(_prefixes)] = _DEFAULT.reply_prefixes
    """What the reply subjects of requests begin with. A request with another one is dropped."""
    max_budget: Seconds = _DEFAULT.max_budget
    """What a request from elsewhere may take at most, whatever it says."""
    connect_timeout: Seconds = _DEFAULT.connect_timeout
    reconnect_wait: Seconds = _DEFAULT.reconnect_wait
    """The upper end of the first pause before a reconnect. It doubles with each try; the pause is drawn below it."""
    reconnect_wait_max: Seconds = _DEFAULT.reconnect_wait_max
    ping_interval: Seconds = _DEFAULT.ping_interval
    """How often the server is asked for a sign of life."""
    batch: AtLeastOne = _DEFAULT.batch
    """How many requests to one address may travel in one NATS message."""
    batch_bytes: AtLeastOne = _DEFAULT.batch_bytes
    window: AtLeastOne = _DEFAULT.window
    """How many NATS messages to one address may be unanswered before further requests wait to travel together."""
    max_waiting: AtLeastOne = _DEFAULT.max_waiting
    """How many requests to one address may wait to travel; more are answered `Overloaded`."""
    resend_after: Seconds = _DEFAULT.resend_after
    """When an idempotent request without an answer is sent once more."""
    claim_wait: Seconds = _DEFAULT.claim_wait
    """How long an actor that must be the only one at its address waits for objections."""
    events: Annotated[tuple[str, ...], "list of kinds", BeforeValidator(_kinds)] = _DEFAULT.events
    """Which kinds of events go out, as globs."""
    events_format: Literal["json", "msgpack"] = "json"
    events_stream: MaybeWord = None
    """The JetStream stream that keeps events, for `cache.events(since=...)`; made if there is none."""
    events_stream_max_age: Seconds = _DEFAULT.events_stream_max_age
    """How long a stream that is made keeps them."""
    events_stream_max_bytes: AtLeastOne = _DEFAULT.events_stream_max_bytes
    """How much a stream that is made keeps; the oldest goes."""
    heartbeat: MaybeSeconds = _DEFAULT.heartbeat
    """How often a process that has told events says how far their numbers go, so that others notice the loss of the last
    ones; `none` is never."""
    outbox: AtLeastOne = _DEFAULT.outbox
    """How many events may wait to go out; more are lost and counted."""
    pending_messages: AtLeastOne = _DEFAULT.pending_messages
    """How many messages that came in may wait to be looked at, by subscription."""
    pending_bytes: AtLeastOne = _DEFAULT.pending_bytes

    @model_validator(mode="after")
    def _fits_together(self) -> NatsSettings:
        self.nats_options(budget=_DEFAULT.budget, name=_DEFAULT.name)
        return self

    def nats_options(self, *, budget: float, name: str) -> NatsOptions:
        """Return the options for the bus. Raises `CacheConfigurationError` for options that exclude each other."""
        other = {"type", "hosts", "password", "token", "events_format", "allow_insecure"}
        same = {each: getattr(self, each) for each in type(self).model_fields if each not in other}
        return NatsOptions(
            servers=tuple(
                f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
                for name, port in (host_and_port(host, 4222) for host in self.hosts)
            ),
            password=None if self.password is None else self.password.get_secret_value(),
            token=None if self.token is None else self.token.get_secret_value(),
            events_as_json=self.events_format == "json",
            budget=budget,
            name=name,
            **same,
        )


def bus_from_url(url: str) -> NatsSettings:
    """Return the settings of the bus that a URL describes. Raises `CacheConfigurationError`."""
    options = parse_bus_url(url)
    try:
        return NatsSettings(**options)
    except CacheConfigurationError as error:
        raise CacheConfigurationError(f"{redact_url(url)!r}: {error}") from None


def read_bus(value: object) -> object:
    """Return the settings of a URL; let through named options."""
    return bus_from_url(value) if isinstance(value, str) else named(value)
