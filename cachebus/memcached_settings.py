"""The options of a Memcached store."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .guard_settings import GuardSettings
from .options import AtLeastOne, BackendOptions, MaybeSeconds, Seconds, Switch, refuse_wrong
from .redis_settings import Hosts


class MemcachedSettings(GuardSettings, BackendOptions):
    """A store in one or several Memcached servers, version 1.6.10 or newer. Durations are seconds.

    As a URL: `memcached://host1:11211,host2?timeout=0.5`.
    """

    type: Literal["memcached"] = "memcached"
    default_ttl: MaybeSeconds = None
    """The time to live, in seconds, of what is stored without one; `None` is no expiry. Memcached counts whole seconds:
    a part of one is rounded up."""
    hosts: Hosts = ("localhost",)
    """Names or addresses, each with or without a port: 11211 if left out. Keys are shared out among several, and every
    process must be given the same ones, written alike."""
    tls: Switch = False
    """Whether to talk TLS. Certificates and host names are always checked."""
    tls_ca_file: str | None = None
    """Whom to trust, as a PEM file; the system's authorities if left out."""
    tls_cert_file: str | None = None
    """Our own certificate, as a PEM file, where the server asks for one."""
    tls_key_file: str | None = None
    """The key to our certificate, unencrypted, where it is not in the same file."""
    allow_insecure: Switch = False
    """Whether production may talk plain text to these servers, because the network is trusted."""
    connect_timeout: Seconds = 1.0
    """How long connecting may take, greeting included."""
    timeout: Seconds = 1.0
    """How long a server may take for a batch, besides what its bytes take; a server that takes longer is disconnected
    from."""
    max_connections: AtLeastOne = 2
    """How many attempts to connect to one server there may be at a time whose name is still being looked up, by a thread
    that nothing can break off. One connection is used."""
    chunked: Switch = False
    """Whether values over the server's limit for items are stored in several of them, instead of being refused."""

    @model_validator(mode="after")
    def _fits_together(self) -> MemcachedSettings:
        refuse_wrong(
            (len(set(self.hosts)) < len(self.hosts), "hosts: one is named twice"),
            (not self.tls and (self.tls_ca_file or self.tls_cert_file), "tls_ca_file, tls_cert_file: need tls"),
            (self.tls_key_file and not self.tls_cert_file, "tls_key_file: there is no tls_cert_file"),
        )
        return self
