"""The options of a bus over NATS, and of a backend that is reached over it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, SecretStr, model_validator

from cachebus.bus import event_kinds
from cachebus.bus.nats_options import NatsOptions
from cachebus.messages import CacheConfigurationError

from .guard_settings import Hosts, host_and_port
from .options import AtLeastOne, BackendOptions, MaybeSeconds, Options, Seconds, Switch, named, optional, texts, word
from .urls import parse_bus_url, redact_url

_DEFAULT = NatsOptions()


def _kinds(value: object) -> tuple[str, ...]:
    given = [each for each in value.split(",") if each] if isinstance(value, str) else value
    kinds = texts(given, "expected kinds of events, such as cache_set or cache_*")
    if kinds:
        event_kinds(kinds)
    return kinds


def _prefixes(value: object) -> tuple[str, ...]:
    expected = "expected beginnings of subjects, such as _INBOX"
    if not all(prefixes := texts(value, expected)):
        raise ValueError(expected)
    return prefixes


def _text(value: object) -> str:
    if isinstance(value, str) and value:
        return str(value)
    raise ValueError("expected text")


MaybeText = Annotated[str | None, "text or none", BeforeValidator(optional(_text))]


class BusSettings(BackendOptions):
    """A backend that some worker on the bus has; as a string, `bus:primary`. The worker's settings say what it is."""

    type: Literal["bus"] = "bus"


class NatsSettings(Options):
    """A bus over NATS. Durations are seconds, sizes are bytes.

    As a URL: `nats://user:password@host:4222,host2?window=4`, `nats://token@host`, and `tls://` to refuse a server without
    TLS. In a user, a password or a token, everything but letters and digits is escaped with `%`. Options without a description
    here are those of `cachebus.bus.nats_options.NatsOptions`.
    """

    type: Literal["nats"] = "nats"
    hosts: Hosts = ("localhost",)
    """Servers of one cluster, each with or without a port: 4222 if left out."""
    user: str = ""
    """The user to sign in as, with `password`."""
    password: SecretStr | None = None
    """The password of `user`."""
    token: SecretStr | None = None
    """The token to sign in with, instead of a user."""
    nkey_seed_file: MaybeText = None
    """A file with the seed of an nkey. Read at every connect."""
    credentials_file: MaybeText = None
    """A `.creds` file, with a JWT and a seed. Read at every connect."""
    tls: Switch = False
    """Whether a server without TLS is refused. Certificates and host names are always checked."""
    tls_ca_file: MaybeText = None
    """The authorities to trust, as a PEM file; those of the system if left out."""
    tls_cert_file: MaybeText = None
    """Our own certificate, as a PEM file, if the server asks for one."""
    tls_key_file: MaybeText = None
    """The key to our certificate, unencrypted, if it is not in the same file."""
    allow_insecure: Switch = False
    """Whether production may talk plain text to these servers, because the network is trusted."""
    inbox_prefix: Annotated[str, "text", BeforeValidator(_text)] = _DEFAULT.inbox_prefix
    reply_prefixes: Annotated[tuple[str, ...], "list of prefixes", BeforeValidator(_prefixes)] = _DEFAULT.reply_prefixes
    max_budget: Seconds = _DEFAULT.max_budget
    connect_timeout: Seconds = _DEFAULT.connect_timeout
    """How long connecting may take, greeting included."""
    reconnect_wait: Seconds = _DEFAULT.reconnect_wait
    reconnect_wait_max: Seconds = _DEFAULT.reconnect_wait_max
    """The upper end of the longest pause before a reconnect."""
    ping_interval: Seconds = _DEFAULT.ping_interval
    batch: AtLeastOne = _DEFAULT.batch
    batch_bytes: AtLeastOne = _DEFAULT.batch_bytes
    window: AtLeastOne = _DEFAULT.window
    max_waiting: AtLeastOne = _DEFAULT.max_waiting
    resend_after: Seconds = _DEFAULT.resend_after
    claim_wait: Seconds = _DEFAULT.claim_wait
    events: Annotated[tuple[str, ...], "list of kinds", BeforeValidator(_kinds)] = _DEFAULT.events
    events_format: Literal["json", "msgpack"] = "json"
    """`json` is for listeners in any language."""
    events_stream: Annotated[str | None, "one word or none", BeforeValidator(optional(word))] = None
    events_stream_max_age: Seconds = _DEFAULT.events_stream_max_age
    events_stream_max_bytes: AtLeastOne = _DEFAULT.events_stream_max_bytes
    heartbeat: MaybeSeconds = _DEFAULT.heartbeat
    outbox: AtLeastOne = _DEFAULT.outbox
    pending_messages: AtLeastOne = _DEFAULT.pending_messages
    pending_bytes: AtLeastOne = _DEFAULT.pending_bytes
    """How many bytes of them may be taken at once."""

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
