"""The options of remote stores: their servers, and the guard in front of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, SecretStr, SerializerFunctionWrapHandler, model_serializer, model_validator

from cachebus.actors import BreakerPolicy, GuardPolicy, RetryPolicy
from cachebus.messages import CacheConfigurationError, error_class, error_codes

from .fields import (
    AtLeastOne,
    BackendOptions,
    MaybeSeconds,
    NotNegative,
    Options,
    Seconds,
    Share,
    Switch,
    refuse_wrong,
    shown,
    texts,
)
from .urls import HOST, did_you_mean


def _errors(value: object) -> tuple[str, ...]:
    codes = error_codes()
    by_class = {error_class(code).__name__: code for code in codes}
    given = texts(value, "expected errors by code or class, such as timeout or CacheTimeoutError")
    found = dict.fromkeys(by_class.get(name, name) for name in given if name)  # An empty option of a URL leaves "".
    for code in found:
        if code not in codes:
            raise CacheConfigurationError(f"no error is called {shown(code)}{did_you_mean(code, (*codes, *by_class))}")
    return tuple(found)


def _hosts(value: object) -> tuple[str, ...]:
    expected = "expected hosts, each as name, name:port or [IPv6]:port"
    hosts = texts(value, expected)
    if not hosts or not all(map(HOST.fullmatch, hosts)):
        raise ValueError(expected)
    return hosts


Hosts = Annotated[tuple[str, ...], "list of hosts", BeforeValidator(_hosts)]
"""At least one of name, name:port and [IPv6]:port."""


def host_and_port(host: str, port: int) -> tuple[str, int]:
    """Return the two parts of an entry of `hosts`; `port` is the default."""
    matched = HOST.fullmatch(host)
    assert matched is not None
    return matched[1].strip("[]"), int(matched[2] or port)


class GuardSettings(Options):
    """How the guard in front of a remote store retries, times out, limits, and leaves a failing server alone.

    Durations are seconds. A batch is what goes to the server at once, one request or many.
    """

    breaker: Switch = True  # Whether a server that fails again and again is left alone for a while.
    breaker_failure_threshold: AtLeastOne = 5  # Batches in a row that fail and open the circuit.
    breaker_success_threshold: AtLeastOne = 3  # Probes that succeed and close a half-open circuit.
    breaker_recovery: Seconds = 30.0  # How long an open circuit lets nothing through.
    breaker_half_open_max: AtLeastOne = 3  # How many probes of a half-open circuit are under way at a time.
    breaker_excluded: Annotated[tuple[str, ...], "list of errors", BeforeValidator(_errors)] = ()
    """Errors that are no failures to the circuit, by code or class, those derived from them included."""
    retry_attempts: AtLeastOne = 3  # How often a request that may be done twice is tried, the first time included.
    retry_backoff_base: Seconds = 0.05  # Upper end of the first random pause; it doubles with each (full jitter).
    retry_backoff_max: Seconds = 1.0  # The longest pause.
    retry_budget: Share = 0.2  # Repetitions for each batch, on the average: they never multiply the load of a server.
    timeout_initial: Seconds = 1.0  # How long to wait while nothing is known; then three times the 95th percentile.
    timeout_min: Seconds = 0.1  # How long an answer is waited for at least.
    timeout_max: Seconds = 10.0  # How long an answer is waited for at most.
    timeout_window: AtLeastOne = 1000  # Of how many last batches the percentile is.
    max_concurrent: AtLeastOne = 100  # How many batches the server may be asked at a time.
    max_waiting: NotNegative = 1000  # How many more may wait for that; the rest is `Overloaded`.

    @model_validator(mode="after")
    def _highest_are_not_below_lowest(self) -> GuardSettings:
        for low, high in (("retry_backoff_base", "retry_backoff_max"), ("timeout_min", "timeout_max")):
            least, most = getattr(self, low), getattr(self, high)
            refuse_wrong((most < least, f"{high} {most:g} is less than {low} {least:g}"))
        return self

    @model_serializer(mode="wrap")
    def _what_it_is_comes_first(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        last = {name: values.pop(name) for name in GuardSettings.model_fields if name in values}
        return values | last

    def guard_policy(self) -> GuardPolicy:
        """Return the policy that the options describe."""
        breaker = ("failure_threshold", "success_threshold", "recovery", "half_open_max")
        return GuardPolicy(
            breaker=BreakerPolicy(enabled=self.breaker, **{name: getattr(self, f"breaker_{name}") for name in breaker}),
            retry=RetryPolicy(
                attempts=self.retry_attempts,
                backoff=self.retry_backoff_base,
                backoff_max=self.retry_backoff_max,
                budget=self.retry_budget,
            ),
            excluded=tuple(map(error_class, self.breaker_excluded)),
            **self.pick(
                "timeout_initial", "timeout_min", "timeout_max", "timeout_window", "max_concurrent", "max_waiting"
            ),
        )


class ServerSettings(GuardSettings, BackendOptions):
    """A backend in one or several servers. Durations are seconds."""

    default_ttl: MaybeSeconds = None  # Seconds that values without a time to live are kept; `None` is no expiry.
    hosts: Hosts = ("localhost",)  # Names or addresses, each with or without a port.
    tls: Switch = False  # Whether to talk TLS. Certificates and host names are always checked.
    tls_ca_file: str | None = None  # The authorities to trust, as a PEM file; those of the system if left out.
    tls_cert_file: str | None = None  # Our own certificate, as a PEM file, if the server asks for one.
    tls_key_file: str | None = None  # The key to our certificate, unencrypted, if it is not in the same file.
    allow_insecure: Switch = False  # Whether production may talk plain text to them, because the network is trusted.
    connect_timeout: Seconds = 1.0  # How long connecting may take, greeting included.

    @model_validator(mode="after")
    def _certificates_need_tls(self) -> ServerSettings:
        refuse_wrong(
            (not self.tls and (self.tls_ca_file or self.tls_cert_file), "tls_ca_file, tls_cert_file: need tls"),
            (self.tls_key_file and not self.tls_cert_file, "tls_key_file: there is no tls_cert_file"),
        )
        return self


class RedisSettings(ServerSettings):
    """A store in a Redis server, version 6.2 or newer. Durations are seconds.

    As a URL: `redis://user:password@host:6379/0?window=8`, `rediss://` for TLS, `unix:///path/of/socket`,
    `redis+sentinel://host:26379,host2/service/0`, `redis+cluster://host:6379,host2`. In a user and a password, everything but
    letters and digits is escaped with `%`.
    """

    type: Literal["redis"] = "redis"
    topology: Literal["single", "sentinel", "cluster"] = "single"
    """`sentinel`: `hosts` know the master of `service`. `cluster`: `hosts` know the other servers of a Redis Cluster."""
    hosts: Hosts = ("localhost",)  # Names or addresses; port 6379 if left out, of a sentinel 26379.
    socket: str | None = None  # The path of a unix socket, instead of a host.
    service: str | None = None  # The sentinels' name of the master.
    user: str = ""  # The user to sign in as; empty is the server's default user.
    password: SecretStr | None = None  # Of `user`, or of the server.
    sentinel_user: str = ""  # The user to sign in as at the sentinels, which know other users than the server.
    sentinel_password: SecretStr | None = None  # Of `sentinel_user`, or of the sentinels.
    database: NotNegative = 0  # The number of the database within the server.
    window: AtLeastOne = 8  # How many batches may be under way on a connection.
    max_connections: AtLeastOne = 2
    """Connections to one server: one takes all requests, the others scan keys for `clear` and `delete_pattern`."""
    health_check_interval: MaybeSeconds = 2.0
    """How often a server is asked for a sign of life. A server that is silent for so long is reconnected; `None` never asks."""

    @model_validator(mode="after")
    def _fits_together(self) -> RedisSettings:
        single, sentinel = self.topology == "single", self.topology == "sentinel"
        refuse_wrong(
            (sentinel and not self.service, "service: sentinels need the name of the master"),
            (self.service and not sentinel, "service: only sentinels know one"),
            (self.sentinel_password and not sentinel, "sentinel_password: there is no sentinel"),
            (single and len(self.hosts) > 1, "hosts: several need the topology sentinel or cluster"),
            (self.topology == "cluster" and self.database, "database: a cluster has only the database 0"),
            (self.socket and (self.tls or not single), "socket: neither TLS nor a topology goes with it"),
            (self.user and self.password is None, "user: there is no password"),
            (self.sentinel_user and self.sentinel_password is None, "sentinel_user: there is no sentinel_password"),
        )
        return self


class MemcachedSettings(ServerSettings):
    """A store in one or several Memcached servers, version 1.6.10 or newer. Durations are seconds.

    As a URL: `memcached://host1:11211,host2?timeout=0.5`.
    """

    type: Literal["memcached"] = "memcached"
    default_ttl: MaybeSeconds = None
    """The time to live, in seconds, of what is stored without one, rounded up to whole seconds; `None` is no expiry."""
    hosts: Hosts = ("localhost",)
    """Names or addresses; port 11211 if left out. Keys are spread over them: give every process the same ones, written alike."""
    timeout: Seconds = 1.0  # Limit of a batch, besides the time of its bytes. A slower server is disconnected.
    max_connections: AtLeastOne = 2
    """Attempts to connect to one server whose name is still being looked up, which nothing can break off. One connection is used."""
    chunked: Switch = False  # Whether values over the server's limit for items are split into several, not refused.

    @model_validator(mode="after")
    def _fits_together(self) -> MemcachedSettings:
        refuse_wrong((len(set(self.hosts)) < len(self.hosts), "hosts: one is named twice"))
        return self


def guard_policy(settings: object) -> GuardPolicy:
    """Return the guard's policy of a backend: the default one if its settings have no such options."""
    return settings.guard_policy() if isinstance(settings, GuardSettings) else GuardPolicy()
