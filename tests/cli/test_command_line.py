from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachebus.__main__ import main
from cachebus.cli import info
from cachebus.cli.info import extras
from cachebus.settings import load_settings
from cachebus.settings.urls import BUILT_IN

from ..facade.plugins import announce

SECRET = "hunter" + str(2)
ROOT = Path(info.__file__).parents[2]


@pytest.fixture(autouse=True)
def an_environment_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("CACHEBUS_"):
            monkeypatch.delenv(name)


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], *requirements: str) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    def requires(package: str) -> list[str] | None:
        version(package)
        return list(requirements) or None

    monkeypatch.setattr(info, "version", version)
    monkeypatch.setattr(info, "requires", requires)


def test_the_version_is_that_of_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, {"cachebus": "7.8.9"})
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == "cachebus 7.8.9\n"


def test_a_source_tree_has_no_version_and_no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {})
    assert info.installed_version() == "0+unknown"
    assert extras() == {}


def test_an_extra_is_installed_when_all_that_it_asks_for_is(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(
        monkeypatch,
        {"cachebus": "1", "redis": "5.2", "numpy": "2.0", "rich": "14"},
        "anyio>=4.9",
        "redis[hiredis]>=5.2; extra == 'redis'",
        'pymemcache>=4.0 ; extra == "memcached"',
        "faiss-cpu>=1.10; (python_version < '3.14') and extra == 'semantic'",
        "numpy>=2.0; extra == 'semantic'",
        "cachebus[redis, semantic]; extra == 'all'",
        "cachebus[redis]; extra == 'demo'",
        "rich>=13.9; extra == 'demo'",
    )
    assert extras() == {"redis": True, "memcached": False, "semantic": False, "all": False, "demo": True}


def test_info_says_what_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(tmp_path, monkeypatch)
    installed(monkeypatch, {"cachebus": "7.8.9", "redis": "5.2"}, "redis>=5; extra == 'redis'")
    expected = {
        "cachebus": "7.8.9",
        "python": platform.python_version(),
        "schemes": [*BUILT_IN, "shelf"],
        "policies": ["s3fifo", "lru", "lfu", "sieve"],
        "extras": {"redis": True},
    }
    assert main(["info"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == expected
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_settings_shows_what_a_source_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CACHEBUS_TIMEOUT", "7")
    path = tmp_path / "settings.toml"
    path.write_text('backends = ["memory://?max_entries=5"]\n', encoding="utf-8")
    shown: list[dict[str, Any]] = []
    for source in (["memory://?max_entries=5"], [str(path)]):
        assert main(["config", "show", *source]) == 0
        shown.append(yaml.safe_load(capsys.readouterr().out))
        assert main(["config", "show", "--json", *source]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert all(each == shown[0] for each in shown)
    assert load_settings(shown[0]) == load_settings("memory://?max_entries=5", timeout=7)


def test_settings_without_a_source_shows_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CACHEBUS_NAMESPACE", "shop")
    assert main(["config", "show"]) == 0
    assert capsys.readouterr().out.startswith(
        "namespace: shop\ntimeout: 5.0\non_error: miss\nbackends:\n- type: memory\n"
    )


def test_settings_are_shown_without_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(tmp_path, monkeypatch)
    for options in ([], ["--json"]):
        assert main(["config", "show", f"shelf://user:{SECRET}@localhost", *options]) == 0
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        assert "shelf://user:***@localhost" in printed.out


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("memory://?max_entres=5", "did you mean 'max_entries'?"),
        ("absent.yaml", "'absent.yaml' cannot be read: "),
        (f"mongodb://user:{SECRET}@localhost", "unknown scheme 'mongodb'"),
        ("memory://?name=a\nb", "control character"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    source: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", source]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("cachebus: ")
    assert printed.err.endswith("\n")
    assert len(printed.err.splitlines()) == 1
    assert sentence in printed.err
    assert SECRET not in printed.err


@pytest.mark.parametrize("arguments", [[], ["coffee"], ["info", "coffee"], ["config", "show", "a", "b"], ["--coffee"]])
def test_a_wrong_command_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: cachebus")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "cachebus", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_module_can_be_run() -> None:
    done = run("config", "show", "null://?name=off", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["backends"] == [{"type": "null", "name": "off", "default": True}]
    done = run("config", "show", "nulll://")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert run("--version").stdout.startswith("cachebus ")
