"""The options of remote stores, the same for every technology: their servers, and the guard in front of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, model_serializer, model_validator

from cachebus.actors import BreakerPolicy, GuardPolicy, RetryPolicy
from cachebus.messages import CacheConfigurationError, error_class, error_codes

from .options import (
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
)
from .urls import did_you_mean


def _errors(value: object) -> tuple[str, ...]:
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        raise ValueError("expected errors by code or class, such as timeout or CacheTimeoutError")
    codes = error_codes()
    by_class = {error_class(code).__name__: code for code in codes}
    found: list[str] = []
    for name in cast("Sequence[Any]", given):
        code = by_class.get(name, name) if isinstance(name, str) else name
        if code == "":
            continue  # What an empty option of a URL leaves.
        if code not in codes:
            hint = did_you_mean(code, (*codes, *by_class)) if isinstance(code, str) else ""
            raise CacheConfigurationError(f"no error is called {shown(code)}{hint}")
        found.append(code)
    return tuple(dict.fromkeys(found))


_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


def _hosts(value: object) -> object:
    hosts = value.split(",") if isinstance(value, str) else value
    if isinstance(hosts, list | tuple):
        given = cast("Sequence[Any]", hosts)
        found = [str(each) for each in given if isinstance(each, str) and _HOST.fullmatch(each)]
        if found and len(found) == len(given):
            return tuple(found)
    raise ValueError("expected hosts, each as name, name:port or [IPv6]:port")


Hosts = Annotated[tuple[str, ...], "list of hosts", BeforeValidator(_hosts)]
"""At least one of name, name:port and [IPv6]:port."""


def host_and_port(host: str, port: int) -> tuple[str, int]:
    """Return the two parts of an entry of `hosts`; `port` is the default."""
    matched = _HOST.fullmatch(host)
    assert matched is not None
    return matched[1].strip("[]"), int(matched[2] or port)


class GuardSettings(Options):
    """How the guard in front of a remote store retries, times out, limits, and leaves a failing server alone.

    Durations are seconds. A batch is what goes to the server at once, one request or many.
    """

    breaker: Switch = True
    """Whether a server that fails again and again is left alone for a while."""
    breaker_failure_threshold: AtLeastOne = 5
    """Batches in a row that fail and open the circuit."""
    breaker_success_threshold: AtLeastOne = 3
    """Probes that succeed and close a half-open circuit."""
    breaker_recovery: Seconds = 30.0
    """How long an open circuit lets nothing through."""
    breaker_half_open_max: AtLeastOne = 3
    """How many probes of a half-open circuit are under way at a time."""
    breaker_excluded: Annotated[tuple[str, ...], "list of errors", BeforeValidator(_errors)] = ()
    """Errors that are no failures to the circuit, by code or class, those derived from them included."""
    retry_attempts: AtLeastOne = 3
    """How often a request that may be done twice is tried, the first time included."""
    retry_backoff_base: Seconds = 0.05
    """The upper end of the first pause. It doubles with each; the pause is drawn below it (full jitter)."""
    retry_backoff_max: Seconds = 1.0
    """The longest pause."""
    retry_budget: Share = 0.2
    """How many repetitions a batch allows for, on the average: they never multiply the load of a server in trouble."""
    timeout_initial: Seconds = 1.0
    """How long an answer is waited for while nothing is known; then three times the 95th percentile."""
    timeout_min: Seconds = 0.1
    """How long an answer is waited for at least."""
    timeout_max: Seconds = 10.0
    """How long an answer is waited for at most."""
    timeout_window: AtLeastOne = 1000
    """Of how many last batches the percentile is."""
    max_concurrent: AtLeastOne = 100
    """How many batches the server may be asked at a time."""
    max_waiting: NotNegative = 1000
    """How many more may wait for that; the rest is `Overloaded`."""

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
        same = ("timeout_initial", "timeout_min", "timeout_max", "timeout_window", "max_concurrent", "max_waiting")
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
            **{name: getattr(self, name) for name in same},
        )


class ServerSettings(GuardSettings, BackendOptions):
    """A backend in one or several servers. Durations are seconds."""

    default_ttl: MaybeSeconds = None
    """The time to live, in seconds, of what is stored without one; `None` is no expiry."""
    hosts: Hosts = ("localhost",)
    """Names or addresses, each with or without a port."""
    tls: Switch = False
    """Whether to talk TLS. Certificates and host names are always checked."""
    tls_ca_file: str | None = None
    """The authorities to trust, as a PEM file; those of the system if left out."""
    tls_cert_file: str | None = None
    """Our own certificate, as a PEM file, if the server asks for one."""
    tls_key_file: str | None = None
    """The key to our certificate, unencrypted, if it is not in the same file."""
    allow_insecure: Switch = False
    """Whether production may talk plain text to these servers, because the network is trusted."""
    connect_timeout: Seconds = 1.0
    """How long connecting may take, greeting included."""

    @model_validator(mode="after")
    def _certificates_need_tls(self) -> ServerSettings:
        refuse_wrong(
            (not self.tls and (self.tls_ca_file or self.tls_cert_file), "tls_ca_file, tls_cert_file: need tls"),
            (self.tls_key_file and not self.tls_cert_file, "tls_key_file: there is no tls_cert_file"),
        )
        return self


def guard_policy(settings: object) -> GuardPolicy:
    """Return the guard's policy of a backend: the default one if its settings have no such options."""
    return settings.guard_policy() if isinstance(settings, GuardSettings) else GuardPolicy()
