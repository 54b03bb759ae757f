"""Layout: the files on disk, the content of the wheel, and a working installation."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import cachebus

from .paths import ROOMS, ROOT

LINES = 420
"""Maximum number of lines in a module."""

LARGE = {
    "facade/cache.py": 910,  # One method for each verb, with its documentation and example.
    "actors/runtime/cell.py": 540,  # the mailbox's turns, and the repair of turns that were interrupted
    "bus/nats/requester.py": 455,  # the inbox of a bus, and what is sent to one address
}
"""Modules above the limit, with their own limits. Do not add one: split it into parts instead."""


def files_on_disk(folder: Path) -> set[str]:
    found = {
        file.relative_to(folder.parent).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert found, f"no file under {folder}"
    return found


def long_modules(folder: Path, limit: int, large: Mapping[str, int] = MappingProxyType({})) -> list[str]:
    files = sorted(folder.rglob("*.py"))
    assert files, f"no Python file under {folder}"
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    named = {file.relative_to(folder).as_posix(): length for file, length in lengths.items()}
    return [f"{name}: {length} lines" for name, length in named.items() if length > large.get(name, limit)]


def link_faults(root: Path, rooms: Iterable[str]) -> list[str]:
    faults: list[str] = []
    for room in rooms:
        link = root / room
        if not link.is_symlink():
            faults.append(f"{room} is no link")
        elif os.readlink(link) != f"cachebus/{room}":
            faults.append(f"{room} points to {os.readlink(link)}")
        elif not link.is_dir():
            faults.append(f"{room} points to no folder")
    return faults


@pytest.mark.skipif(sys.platform == "win32", reason="a clone without symlinks loses nothing")
def test_each_room_opens_from_the_root() -> None:
    assert link_faults(ROOT, ROOMS) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs symlinks")
def test_a_bad_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "cachebus" / "bus").mkdir(parents=True)
    (tmp_path / "messages").mkdir()
    (tmp_path / "bus").symlink_to(tmp_path / "cachebus" / "bus")
    (tmp_path / "actors").symlink_to("cachebus/actors")
    assert link_faults(tmp_path, ["messages", "bus", "actors"]) == [
        "messages is no link",
        f"bus points to {tmp_path}/cachebus/bus",
        "actors points to no folder",
    ]


def test_no_module_is_longer_than_a_reader_bears() -> None:
    assert long_modules(ROOT / "cachebus", LINES, LARGE) == []


def test_a_large_module_that_has_shrunk_is_large_no_more() -> None:
    lengths = {name: len((ROOT / "cachebus" / name).read_text(encoding="utf-8").splitlines()) for name in LARGE}
    assert [name for name, length in lengths.items() if length <= LINES] == []


def test_a_long_module_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x\n" * 5)
    (tmp_path / "b.py").write_text("x\n" * 6)
    assert long_modules(tmp_path, 5) == ["b.py: 6 lines"]
    with pytest.raises(AssertionError, match="no Python file"):
        long_modules(tmp_path / "nowhere", 5)


def test_the_tools_are_given_folders_and_no_links() -> None:
    tools: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert not set(ROOMS) & set(tools["mypy"]["files"])
    assert not set(ROOMS) & set(tools["basedpyright"]["include"])
    assert tools["coverage"]["run"]["source"] == ["cachebus"]
    assert tools["pytest"]["ini_options"]["testpaths"] == ["tests"]
    seen = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    folders = {Path(line).relative_to(ROOT).parts[0] for line in seen.stdout.splitlines()}
    assert {"cachebus", "tests"} <= folders
    assert not set(ROOMS) & folders


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the sdist, built from this tree without a network."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (found,) = built.glob("cachebus-*.whl")
    return found


@pytest.fixture(scope="session")
def sdist(built: Path) -> Path:
    (found,) = built.glob("cachebus-*.tar.gz")
    return found


def test_the_wheel_holds_what_is_on_disk_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    packaged = {name for name in names if name.startswith("cachebus/")}
    assert packaged == files_on_disk(ROOT / "cachebus")
    assert {"cachebus/__init__.py", "cachebus/py.typed"} <= packaged
    assert {name.split("/")[0] for name in names - packaged} == {f"cachebus-{version()}.dist-info"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_package_and_not_the_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
        assert not [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
    assert {name for name in names if name.startswith("cachebus/")} == files_on_disk(ROOT / "cachebus")
    assert not {name.split("/")[0] for name in names} & set(ROOMS)
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names


def version() -> str:
    """The version, which stands in one place."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "cachebus/__init__.py"
    return cachebus.__version__


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with the built wheel. Its dependencies come from the current environment."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "--python", str(python)]
    done = subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A line of a .pth file comes after the environment's own folder on the path. The .pth files in the added folder,
    # such as the editable installation of this tree, are not read.
    (site,) = folder.glob("**/site-packages")
    (site / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python


PROGRAM = """
import asyncio, importlib.metadata, pathlib, sys
import cachebus

here = pathlib.Path(cachebus.__file__).resolve()
assert here.is_relative_to(pathlib.Path(sys.prefix).resolve()), here

async def main():
    async with cachebus.open_cache("memory://?max_entries=100") as cache:
        await cache.set("greeting", "hello", ttl=60)
        assert await cache.get("greeting") == "hello"
        assert await cache.get("nothing", default=None) is None

asyncio.run(main())
(script,) = importlib.metadata.entry_points(group="console_scripts", name="cachebus")
assert callable(script.load())
print(importlib.metadata.version("cachebus"))
"""


def test_the_built_wheel_works_in_an_empty_environment(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(installed), "-I", "-W", "error", "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version()


def test_pytest_finds_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """Check that the patterns for the links at the root do not exclude folders such as `tests/actors`."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    hidden = [
        str(folder)
        for folder in folders
        for pattern in pytestconfig.getini("norecursedirs")
        if any(fnmatch.fnmatch(part, pattern) for part in folder.parts)
    ]
    assert len(folders) >= 6
    assert hidden == []
