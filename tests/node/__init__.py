"""Packages of npm for tests: installed once into a cache folder of the user's, by the exact versions in a `package.json`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def tool(program: str) -> str:
    """Where `node` or `npm` is. Fails, and says what to do, if there is none."""
    found = shutil.which(program)
    if found is None:
        pytest.fail(
            f"this test needs {program}, and there is none on the PATH: apt-get install nodejs npm, or brew install node"
        )
    return found


def packages(manifest: Path) -> Path:
    """A folder with a `package.json` and everything that it names. Blocks: the first time npm fetches it."""
    text = manifest.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cachebus-tests"
    folder = cache / hashlib.sha256(text).hexdigest()[:16]
    if folder.is_dir():
        return folder
    npm = tool("npm")
    cache.mkdir(parents=True, exist_ok=True)
    # Beside its place and then moved there, so that what is there is whole, also when two test runs meet.
    making = Path(tempfile.mkdtemp(dir=cache))
    try:
        (making / "package.json").write_bytes(text)
        command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
        done = subprocess.run(command, cwd=making, capture_output=True, text=True, timeout=110)
        if done.returncode:
            pytest.fail(f"npm could not install what {manifest.name} names:\n{done.stdout}{done.stderr}")
        try:
            making.rename(folder)
        except OSError:
            assert folder.is_dir()
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder
