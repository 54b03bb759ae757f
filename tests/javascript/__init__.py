"""Packages of npm for tests: installed once into a cache folder of the user's, by the `package-lock.json` beside a
`package.json`, which names every version, down to the last, and the hash of what is fetched."""

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
    files = {each: manifest.with_name(each).read_bytes() for each in ("package.json", "package-lock.json")}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cachebus-tests"
    folder = cache / hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
    if folder.is_dir():
        return folder
    npm = tool("npm")
    cache.mkdir(parents=True, exist_ok=True)
    # Beside its place and then moved there, so that what is there is whole, also when two test runs meet.
    making = Path(tempfile.mkdtemp(dir=cache))
    try:
        for name, text in files.items():
            (making / name).write_bytes(text)
        command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
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
