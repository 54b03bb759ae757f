"""The options of a Redis store."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr, model_validator

from .guard_settings import Hosts, ServerSettings
from .options import AtLeastOne, MaybeSeconds, NotNegative, refuse_wrong


class RedisSettings(ServerSettings):
    """A store in a Redis server, version 6.2 or newer. Durations are seconds.

    As a URL: `redis://user:password@host:6379/0?window=8`, `rediss://` for TLS, `unix:///path/of/socket`,
    `redis+sentinel://host:26379,host2/service/0`, `redis+cluster://host:6379,host2`. In a user and a password, everything but
    letters and digits is escaped with `%`.
    """

    type: Literal["redis"] = "redis"
    topology: Literal["single", "sentinel", "cluster"] = "single"
    """`sentinel`: `hosts` know the master of `service`. `cluster`: `hosts` know the other servers of a Redis Cluster."""
    hosts: Hosts = ("localhost",)
    """Names or addresses, each with or without a port: 6379 if left out, of a sentinel 26379."""
    socket: str | None = None
    """The path of a unix socket, instead of a host."""
    service: str | None = None
    """The sentinels' name of the master."""
    user: str = ""
    """The user to sign in as; empty is the server's default user."""
    password: SecretStr | None = None
    """Of `user`, or of the server."""
    sentinel_user: str = ""
    """The user to sign in as at the sentinels, which know other users than the server."""
    sentinel_password: SecretStr | None = None
    """Of `sentinel_user`, or of the sentinels."""
    database: NotNegative = 0
    """The number of the database within the server."""
    window: AtLeastOne = 8
    """How many batches may be under way on a connection."""
    max_connections: AtLeastOne = 2
    """Connections to one server: one takes all requests, the others scan keys for `clear` and `delete_pattern`."""
    health_check_interval: MaybeSeconds = 2.0
    """How often a server is asked for a sign of life. A server that is silent for so long is reconnected; `None` never asks."""

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
        )
        return self
