"""Names of leases: what was asked for, a dot, and a nonce of the store's own.

A question for a lease may be asked twice, by whoever got no answer in time, and the first copy may be carried out when all
is over: late enough to grant anew what an invalidation has taken away. The nonce makes that another lease, under which
nobody loads, so that the one who held the first stores nothing with it.
"""

from __future__ import annotations

import os

NONCE_LENGTH = 16
"""Characters of a nonce."""

ASKED_MAX = 255 - NONCE_LENGTH - 1
"""Bytes of what is asked for, at most. So the length of a name fits into a byte."""


def new_lease_name(asked: str) -> str:
    """A name for the lease that somebody has asked for as `asked`, unlike any other."""
    return f"{asked}.{os.urandom(NONCE_LENGTH // 2).hex()}"


def asked_as(name: str) -> str:
    """What the lease of this name was asked for as."""
    return name[: -NONCE_LENGTH - 1]
