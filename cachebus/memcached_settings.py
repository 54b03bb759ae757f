"""The options of a Memcached store."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .guard_settings import Hosts, ServerSettings
from .options import AtLeastOne, MaybeSeconds, Seconds, Switch, refuse_wrong


class MemcachedSettings(ServerSettings):
    """A store in one or several Memcached servers, version 1.6.10 or newer. Durations are seconds.

    As a URL: `memcached://host1:11211,host2?timeout=0.5`.
    """

    type: Literal["memcached"] = "memcached"
    default_ttl: MaybeSeconds = None
    """The time to live, in seconds, of what is stored without one, rounded up to whole seconds; `None` is no expiry."""
    hosts: Hosts = ("localhost",)
    """Names or addresses; port 11211 if left out. Keys are spread over them: give every process the same ones, written alike."""
    timeout: Seconds = 1.0
    """How long a server may take for a batch, besides the time of its bytes. A server that takes longer is disconnected."""
    max_connections: AtLeastOne = 2
    """Attempts to connect to one server whose name is still being looked up, which nothing can break off. One connection is used."""
    chunked: Switch = False
    """Whether values over the server's limit for items are stored in several of them, instead of being refused."""

    @model_validator(mode="after")
    def _fits_together(self) -> MemcachedSettings:
        refuse_wrong((len(set(self.hosts)) < len(self.hosts), "hosts: one is named twice"))
        return self
