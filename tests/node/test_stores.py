from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cachebus.node.stores
from cachebus.actors.ports import SYSTEM_CLOCK, InlineStore
from cachebus.adapters.null import NullStore
from cachebus.messages import CacheConfigurationError
from cachebus.node.stores import build_store
from cachebus.settings import BackendSettings, MemorySettings, NullSettings, PluginSettings, load_settings

from ..facade.plugins import announce


def build(settings: BackendSettings) -> Any:
    return build_store(settings, namespace="tests", clock=SYSTEM_CLOCK)


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_entries", 7), ("max_entries", None), ("max_bytes", 12_345), ("default_ttl", 2.5), ("policy", "sieve")],
)
def test_the_memory_store_is_given_every_option(option: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def record(**options: object) -> NullStore:
        given.update(options)
        return NullStore()

    monkeypatch.setattr("cachebus.adapters.memory.store.MemoryStore", record)
    build(load_settings({"backends": [{"type": "memory", option: value}]}).default_backend)
    expected = {
        "max_entries": 10_000,
        "max_bytes": None,
        "default_ttl": None,
        "policy": "s3fifo",
        "clock": SYSTEM_CLOCK,
    }
    assert given == {**expected, option: value}


def test_the_memory_store_itself_takes_these_options() -> None:
    store = build(MemorySettings(max_entries=7, max_bytes=12_345, default_ttl=2.5, policy="lru"))
    assert isinstance(store, InlineStore)
    assert store.gauges().max_entries == 7
    assert store.gauges().max_bytes == 12_345


def test_the_null_settings_make_a_null_store() -> None:
    assert isinstance(build(NullSettings()), NullStore)


def test_the_store_of_a_plugin_is_given_url_namespace_and_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(tmp_path, monkeypatch)
    store = build(PluginSettings(url="SHELF://user:pw@there/x?y=z"))
    assert store.given == ("SHELF://user:pw@there/x?y=z", "tests", SYSTEM_CLOCK)


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, made_by="shelf_of_nobody:Shelf")
    with pytest.raises(
        CacheConfigurationError, match=r"shelf:// is shelf_of_nobody:Shelf, which cannot be loaded: No module"
    ):
        build(PluginSettings(url="shelf://"))


def test_a_plugin_without_its_callable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, made_by="shelf_of_tests:Missing")
    with pytest.raises(CacheConfigurationError, match=r"shelf:// is shelf_of_tests:Missing, which cannot be loaded:"):
        build(PluginSettings(url="shelf://"))


def test_what_is_no_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, made_by="shelf_of_tests:not_a_store")
    with pytest.raises(CacheConfigurationError, match=r"not_a_store, which returned a value of type object"):
        build(PluginSettings(url="shelf://"))


def test_a_scheme_that_two_packages_announce_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch)
    announce(tmp_path, monkeypatch, made_by="shelf_of_tests:not_a_store")
    with pytest.raises(CacheConfigurationError, match=r"shelf_of_tests:Shelf and shelf_of_tests:not_a_store"):
        build(PluginSettings(url="shelf://"))


def test_a_plugin_that_was_removed_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as installed:
        announce(tmp_path, installed)
        settings = PluginSettings(url="shelf://user:pw@host")
    with pytest.raises(CacheConfigurationError, match=r"no installed package provides a store for shelf://$"):
        build(settings)


def test_only_the_adapter_in_use_is_imported() -> None:
    program = (
        "import sys; from cachebus.node.stores import *; from cachebus.settings import *;"
        "from cachebus.actors.ports import SYSTEM_CLOCK;"
        "build_store(NullSettings(), namespace='n', clock=SYSTEM_CLOCK);"
        "print(*sorted(name for name in sys.modules if name.startswith('cachebus.adapters.')))"
    )
    root = Path(cachebus.node.stores.__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["cachebus.adapters.null"], "")
