"""Cost of ``import cachebus``: it loads no drivers, and no modules for commands or settings files only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .paths import ROOT

LATE = {
    *("redis", "hiredis", "pymemcache", "nats", "faiss", "numpy", "prometheus_client", "opentelemetry"),
    *("orjson", "pyarrow", "pandas", "lz4", "zstandard", "xxhash", "cryptography", "msgpack"),
    *("pydantic", "yaml", "rich", "trio", "pytest"),
    *("tenacity", "hashlib", "multiprocessing", "importlib.metadata", "sqlite3", "http", "urllib"),
    *("cachebus.settings", "cachebus.node.stores", "cachebus.payload.pipeline", "cachebus.bus.codec.messages"),
}
"""Modules that are loaded only when a URL, a command or a settings file needs them."""

MOST_MODULES = 122
"""Maximum number of modules that `import cachebus` adds to `import asyncio`. 80 of them are ours."""


def loaded_by_importing(package: str, folder: Path) -> set[str]:
    """Return the modules that a new interpreter has loaded after ``import package``."""
    program = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import {package}, json;"
        f" print(json.dumps([{package}.__file__, list(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    file: str
    modules: list[str]
    file, modules = json.loads(done.stdout)
    assert Path(file).is_relative_to(folder), f"{package} was imported from another tree: {file}"
    return set(modules)


def test_importing_cachebus_loads_no_driver() -> None:
    loaded = loaded_by_importing("cachebus", ROOT)
    assert "cachebus" in loaded
    assert loaded & LATE == set()


def test_importing_cachebus_loads_few_modules() -> None:
    """Check the number of modules, because many small files cost as much as a large one."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import asyncio, sys, json; print(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    more = loaded_by_importing("cachebus", ROOT) - set(json.loads(done.stdout))
    assert "cachebus.facade.cache" in more
    assert len(more) <= MOST_MODULES, sorted(more)


def test_importing_cachebus_compiles_few_constructors() -> None:
    """Check the number of compiled constructors.

    A dataclass compiles one, which takes longer than reading the class.
    """
    program = (
        "import builtins; seen = []; real = builtins.exec\n"
        "def counted(text, *more):\n"
        "    if isinstance(text, str) and 'def __init__' in text: seen.append(text)\n"
        "    return real(text, *more)\n"
        "import dataclasses; builtins.exec = counted\n"
        "import cachebus; cachebus.RateLimited('k'); print(len(seen))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 3


def test_a_planted_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("import yaml\n")
    assert loaded_by_importing("planted", tmp_path) & LATE == {"yaml"}
