"""``import cachebus`` loads no driver and nothing that only a command or a settings file needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .paths import ROOT

LATE = {
    *("redis", "hiredis", "pymemcache", "nats", "faiss", "numpy", "prometheus_client", "opentelemetry"),
    *("orjson", "pyarrow", "pandas", "lz4", "zstandard", "xxhash", "cryptography", "msgpack"),
    *("pydantic_settings", "yaml", "rich", "trio", "pytest"),
}
"""Loaded when a URL, a command or a settings file asks for it, not before."""


def loaded_by_importing(package: str, folder: Path) -> set[str]:
    """Names the top-level modules that a fresh interpreter holds after ``import package``."""
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
    assert Path(file).is_relative_to(folder), f"another {package} than this tree's: {file}"
    return {module.split(".")[0] for module in modules}


def test_importing_cachebus_loads_no_driver() -> None:
    loaded = loaded_by_importing("cachebus", ROOT)
    assert "cachebus" in loaded
    assert loaded & LATE == set()


def test_a_planted_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("import yaml\n")
    assert loaded_by_importing("planted", tmp_path) & LATE == {"yaml"}
