"""Certificates for tests of TLS, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Certificates:
    """An authority, and a certificate of a server and of a client signed by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = self._make("ca", "-x509", "-addext", "basicConstraints=critical,CA:TRUE")
        signed = ("-x509", "-CA", str(self.ca), "-CAkey", str(self.key("ca")))
        self.server = self._make("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
        self.client = self._make("client", *signed)
        self.stranger = self._make("stranger", "-x509", "-addext", "basicConstraints=critical,CA:TRUE")

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
