"""The options of a Redis store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, SecretStr, model_validator

from .guard_settings import GuardSettings
from .options import AtLeastOne, BackendOptions, MaybeSeconds, NotNegative, Seconds, Switch, refuse_wrong

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


class RedisSettings(GuardSettings, BackendOptions):
    """A store in a Redis server, version 6.2 or newer. Durations are seconds.

    As a URL: `redis://user:password@host:6379/0?window=8`, `rediss://` for TLS, `unix:///path/of/socket`,
    `redis+sentinel://host:26379,host2/service/0`, `redis+cluster://host:6379,host2`. What is in a user or a password and not a
    letter or a digit is escaped with `%`.
    """

    type: Literal["redis"] = "redis"
    default_ttl: MaybeSeconds = None
    """The time to live, in seconds, of what is stored without one; `None` is no expiry."""
    topology: Literal["single", "sentinel", "cluster"] = "single"
    """`sentinel`: `hosts` are sentinels, and know the master of `service`. `cluster`: `hosts` are servers of a Redis
    Cluster, and know the others."""
    hosts: Hosts = ("localhost",)
    """Names or addresses, each with or without a port: 6379 if left out, of a sentinel 26379."""
    socket: str | None = None
    """The path of a unix socket, instead of a host."""
    service: str | None = None
    """What the sentinels call the master."""
    user: str = ""
    """Who we are to the server; empty is its default user."""
    password: SecretStr | None = None
    """Of `user`, or of the server."""
    sentinel_user: str = ""
    """Who we are to the sentinels, which know other users than the server."""
    sentinel_password: SecretStr | None = None
    """Of `sentinel_user`, or of the sentinels."""
    database: NotNegative = 0
    """The number of the database within the server."""
    tls: Switch = False
    """Whether to talk TLS. Certificates and host names are always checked."""
    tls_ca_file: str | None = None
    """Whom to trust, as a PEM file; the system's authorities if left out."""
    tls_cert_file: str | None = None
    """Our own certificate, as a PEM file, where the server asks for one."""
    tls_key_file: str | None = None
    """The key to our certificate, unencrypted, where it is not in the same file."""
    allow_insecure: Switch = False
    """Whether production may talk plain text to this server, because the network is trusted."""
    window: AtLeastOne = 8
    """How many batches may be under way on a connection."""
    max_connections: AtLeastOne = 2
    """How many connections there may be to one server: one takes all requests, the others walk over keys for `clear` and
    `delete_pattern`."""
    connect_timeout: Seconds = 1.0
    """How long connecting may take, greeting included."""
    health_check_interval: MaybeSeconds = 2.0
    """How often a server is asked for a sign of life. One that says nothing for so long is given up and connected to
    anew; `None` asks never."""

    @model_validator(mode="after")
    def _fits_together(self) -> RedisSettings:
        refuse_wrong(
            (self.topology == "sentinel" and not self.service, "service: sentinels need the name of the master"),
            (self.topology != "sentinel" and self.service, "service: only sentinels know one"),
            (self.topology != "sentinel" and self.sentinel_password, "sentinel_password: there is no sentinel"),
            (self.topology == "single" and len(self.hosts) > 1, "hosts: several need the topology sentinel or cluster"),
            (self.topology == "cluster" and self.database, "database: a cluster has only the database 0"),
            (
                self.socket and (self.tls or self.topology != "single"),
                "socket: neither TLS nor a topology goes with it",
            ),
            (self.user and self.password is None, "user: there is no password"),
            (self.sentinel_user and self.sentinel_password is None, "sentinel_user: there is no sentinel_password"),
            (not self.tls and (self.tls_ca_file or self.tls_cert_file), "tls_ca_file, tls_cert_file: need tls"),
            (self.tls_key_file and not self.tls_cert_file, "tls_key_file: there is no tls_cert_file"),
        )
        return self


def host_and_port(host: str, port: int) -> tuple[str, int]:
    """The two parts of an entry of `hosts`; `port` where it has none."""
    matched = _HOST.fullmatch(host)
    assert matched is not None
    return matched[1].strip("[]"), int(matched[2] or port)
