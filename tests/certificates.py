"""Certificates for tests of TLS, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

AUTHORITY = ("-x509", "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
"""What Python 3.13 wants of one."""


class Certificates:
    """An authority, and a certificate of a server and of a client signed by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = self._make("ca", *AUTHORITY)
        signed = ("-x509", "-CA", str(self.ca), "-CAkey", str(self.key("ca")), "-addext", "basicConstraints=CA:FALSE")
        self.server = self._make("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
        self.client = self._make("client", *signed, "-addext", "extendedKeyUsage=clientAuth")
        self.stranger = self._make("stranger", *AUTHORITY)

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def _make(self, name: str, *options: str) -> Path:
        out = self.folder / f"{name}.crt"
        command = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        command += ["-keyout", str(self.key(name)), "-out", str(out), *options]
        subprocess.run(
            command,
            check=True,
            capture_output=True,
        )
        return out
