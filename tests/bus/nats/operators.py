"""A NATS operator for tests, with an account and users, as `nsc` would create them: keys and signed claims."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped]

_UNLIMITED = -1


class _Key:
    """Key pair. `seed` is the secret half."""

    def __init__(self, prefix: int) -> None:
        self.seed: bytes = nkeys.encode_seed(os.urandom(32), prefix)
        self._pair: Any = nkeys.from_seed(bytearray(self.seed))
        self.public: str = self._pair.public_key.decode()

    def sign(self, subject: str, name: str, claims: dict[str, Any]) -> str:
        """Return a NATS JWT, version 2, with claims of this key about another one."""
        body = {
            "jti": os.urandom(16).hex(), "iat": int(time.time()), "iss": self.public, "name": name, "sub": subject,
            "nats": {**claims, "version": 2},
        }  # fmt: skip
        text = f"{_part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_part(body)}"
        return f"{text}.{_encoded(self._pair.sign(text.encode()))}"


class Operator:
    """Operator with a JetStream account and the server's system account."""

    def __init__(self) -> None:
        self._operator, self._account, system = (
            _Key(nkeys.PREFIX_BYTE_OPERATOR), _Key(nkeys.PREFIX_BYTE_ACCOUNT), _Key(nkeys.PREFIX_BYTE_ACCOUNT)
        )  # fmt: skip
        claims = {self._account: _account(streams=True), system: _account(streams=False)}
        accounts = {key.public: self._operator.sign(key.public, "account", each) for key, each in claims.items()}
        token = self._operator.sign(
            self._operator.public, "operator", {"type": "operator", "system_account": system.public}
        )
        preload = "\n".join(f"  {public}: {jwt}" for public, jwt in accounts.items())
        self.config = f"operator: {token}\nsystem_account: {system.public}\nresolver: MEMORY\nresolver_preload {{\n{preload}\n}}\n"
        """Return the configuration of a server that trusts this operator."""

    def credentials(self, file: Path, **permissions: Any) -> str:
        """Write the credentials of a new user, and return the path."""
        user = _Key(nkeys.PREFIX_BYTE_USER)
        claims = {"type": "user", "subs": _UNLIMITED, "data": _UNLIMITED, "payload": _UNLIMITED, **permissions}
        jwt = self._account.sign(user.public, "user", claims)
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )
        return str(file)


def _account(*, streams: bool) -> dict[str, Any]:
    usual = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
    of_streams = ("mem_storage", "disk_storage", "streams", "consumer") if streams else ()
    return {"type": "account", "limits": {**dict.fromkeys((*usual, *of_streams), _UNLIMITED), "wildcards": True}}


def _part(value: object) -> str:
    return _encoded(json.dumps(value).encode())


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
