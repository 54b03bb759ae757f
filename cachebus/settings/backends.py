"""Settings of remote stores: servers, connections and the guard."""

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
            raise CacheConfigurationError(f"unknown error {shown(code)}{did_you_mean(code, (*codes, *by_class))}")
    return tuple(found)


def _hosts(value: object) -> tuple[str, ...]:
    expected = "expected hosts, each as name, name:port or [IPv6]:port"
    hosts = texts(value, expected)
    if not hosts or not all(map(HOST.fullmatch, hosts)):
        raise ValueError(expected)
    return hosts


Hosts = Annotated[tuple[str, ...], "list of hosts", BeforeValidator(_hosts)]
"""One or more hosts, each as `name`, `name:port` or `[IPv6]:port`."""


def host_and_port(host: str, port: int) -> tuple[str, int]:
    """Return the host and the port of an entry of `hosts`. `port` is the default."""
    matched = HOST.fullmatch(host)
    assert matched is not None
    return matched[1].strip("[]"), int(matched[2] or port)


class GuardSettings(Options):
    """Retries, timeouts, circuit breaker and concurrency limit of the guard in front of a remote store.

    Durations are seconds. A batch is one or more requests sent to the server together.
    """

    breaker: Switch = True  # Enable the circuit breaker.
    breaker_failure_threshold: AtLeastOne = 5  # Consecutive failed batches that open the circuit.
    breaker_success_threshold: AtLeastOne = 3  # Successful probes that close a half-open circuit.
    breaker_recovery: Seconds = 30.0  # Time for which an open circuit rejects requests.
    breaker_half_open_max: AtLeastOne = 3  # Maximum number of concurrent probes in a half-open circuit.
    breaker_excluded: Annotated[tuple[str, ...], "list of errors", BeforeValidator(_errors)] = ()
    """Errors, by code or class, that the circuit breaker does not count as failures. Subclasses are included."""
    retry_attempts: AtLeastOne = 3  # Maximum number of attempts of an idempotent request, including the first.
    retry_backoff_base: Seconds = 0.05  # Upper bound of the first random pause; it doubles per retry (full jitter).
    retry_backoff_max: Seconds = 1.0  # Maximum pause between two attempts.
    retry_budget: Share = 0.2  # Average retries per batch, so that retries never multiply the load of a server.
    timeout_initial: Seconds = 1.0  # Timeout before latencies are known; then three times the 95th percentile.
    timeout_min: Seconds = 0.1  # Lower bound of the timeout.
    timeout_max: Seconds = 10.0  # Upper bound of the timeout.
    timeout_window: AtLeastOne = 1000  # Number of recent batches used for the percentile.
    max_concurrent: AtLeastOne = 100  # Maximum number of concurrent batches.
    max_waiting: NotNegative = 1000  # Maximum number of waiting batches; more raise `Overloaded`.

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> GuardSettings:
        for low, high in (("retry_backoff_base", "retry_backoff_max"), ("timeout_min", "timeout_max")):
            least, most = getattr(self, low), getattr(self, high)
            refuse_wrong((most < least, f"{high} {most:g} is less than {low} {least:g}"))
        return self

    @model_serializer(mode="wrap")
    def _guard_options_last(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        last = {name: values.pop(name) for name in GuardSettings.model_fields if name in values}
        return values | last

    def guard_policy(self) -> GuardPolicy:
        """Return the guard policy for these options."""
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
    """A backend on one or more servers. Durations are seconds."""

    default_ttl: MaybeSeconds = None  # Time to live of values stored without one; `None` means no expiry.
    hosts: Hosts = ("localhost",)  # Host names or addresses, each with an optional port.
    tls: Switch = False  # Connect with TLS. Certificates and host names are always verified.
    tls_ca_file: str | None = None  # PEM file with the trusted authorities; by default those of the system.
    tls_cert_file: str | None = None  # PEM file with the client certificate, if the server requires one.
    tls_key_file: str | None = None  # PEM file with the unencrypted client key, if not in `tls_cert_file`.
    allow_insecure: Switch = False  # Allow connections without TLS in production, on a trusted network.
    connect_timeout: Seconds = 1.0  # Timeout for connecting, including authentication.

    @model_validator(mode="after")
    def _certificates_need_tls(self) -> ServerSettings:
        refuse_wrong(
            (not self.tls and (self.tls_ca_file or self.tls_cert_file), "tls_ca_file, tls_cert_file: require tls"),
            (self.tls_key_file and not self.tls_cert_file, "tls_key_file: requires tls_cert_file"),
        )
        return self


class RedisSettings(ServerSettings):
    """A Redis store, version 6.2 or newer. Durations are seconds.

    URL forms: `redis://user:password@host:6379/0?window=8`, `rediss://` for TLS, `unix:///path/of/socket`,
    `redis+sentinel://host:26379,host2/service/0`, `redis+cluster://host:6379,host2`. In a user name and a password,
    escape everything but letters and digits with `%`.
    """

    type: Literal["redis"] = "redis"
    topology: Literal["single", "sentinel", "cluster"] = "single"
    """`sentinel`:

    `hosts` are sentinels that know the master of `service`. `cluster`: `hosts` are nodes of a Redis Cluster.
    """
    hosts: Hosts = ("localhost",)  # Host names or addresses. The default port is 6379, for sentinels 26379.
    socket: str | None = None  # Path of a Unix socket, instead of a host.
    service: str | None = None  # Name of the master in the sentinels' configuration.
    user: str = ""  # User name; empty means the server's default user.
    password: SecretStr | None = None  # Password of `user` or, without a user, of the server.
    sentinel_user: str = ""  # User name for the sentinels, whose users are separate from the server's.
    sentinel_password: SecretStr | None = None  # Password of `sentinel_user` or, without a user, of the sentinels.
    database: NotNegative = 0  # Number of the database on the server.
    window: AtLeastOne = 8  # Maximum number of batches in flight per connection.
    max_connections: AtLeastOne = 2
    """Connections per server. One carries all requests; the others scan keys for `clear` and `delete_pattern`."""
    health_check_interval: MaybeSeconds = 2.0
    """Interval of health checks.

    The connection is replaced if no reply arrives within it; `None` disables the checks.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> RedisSettings:
        single, sentinel = self.topology == "single", self.topology == "sentinel"
        refuse_wrong(
            (sentinel and not self.service, "service: the topology sentinel requires the name of the master"),
            (self.service and not sentinel, "service: is allowed only with the topology sentinel"),
            (self.sentinel_password and not sentinel, "sentinel_password: is allowed only with the topology sentinel"),
            (single and len(self.hosts) > 1, "hosts: several hosts require the topology sentinel or cluster"),
            (self.topology == "cluster" and self.database, "database: a cluster supports only database 0"),
            (self.socket and (self.tls or not single), "socket: cannot be combined with TLS or a topology"),
            (self.user and self.password is None, "user: requires a password"),
            (self.sentinel_user and self.sentinel_password is None, "sentinel_user: requires sentinel_password"),
        )
        return self


class MemcachedSettings(ServerSettings):
    """A store on one or more Memcached servers, version 1.6.10 or newer. Durations are seconds.

    URL form: `memcached://host1:11211,host2?timeout=0.5`.
    """

    type: Literal["memcached"] = "memcached"
    default_ttl: MaybeSeconds = None
    """Time to live of values stored without one, rounded up to whole seconds; `None` means no expiry."""
    hosts: Hosts = ("localhost",)
    """Host names or addresses.

    The default port is 11211. Keys are distributed over the hosts: use the same list, spelled identically, in every
    process.
    """
    timeout: Seconds = 1.0  # Time limit of a batch, plus transfer time. A slower server is disconnected.
    max_connections: AtLeastOne = 2
    """Maximum number of pending DNS lookups per server, which cannot be cancelled. Only one connection is used."""
    chunked: Switch = False  # Split values larger than the server's item size limit instead of rejecting them.

    @model_validator(mode="after")
    def _fits_together(self) -> MemcachedSettings:
        refuse_wrong((len(set(self.hosts)) < len(self.hosts), "hosts: the same host is listed twice"))
        return self


def guard_policy(settings: object) -> GuardPolicy:
    """Return the guard policy of a backend, or the default policy if its settings have no guard options."""
    return settings.guard_policy() if isinstance(settings, GuardSettings) else GuardPolicy()
