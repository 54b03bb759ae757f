"""Imports go down: checks of cachebus, then small packages with one fault each, which the checks must find."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .imports import (
    FLOORS,
    Package,
    crowded_rooms,
    cycles,
    driver_faults,
    floor_faults,
    misplaced_modules,
    read_package,
    third_party_faults,
    unknown_folders,
)
from .paths import ROOMS, ROOT


@pytest.fixture(scope="module")
def house() -> Package:
    """Return the real package. It has modules on every floor, so that no test passes by reading none."""
    package = read_package(ROOT / "cachebus")
    rooms = {file.parts[0] for file in package.modules.values() if len(file.parts) > 1}
    assert set(ROOMS) <= rooms
    assert set(FLOORS) - rooms <= {"integrations"}  # Integrations come later.
    assert len(package.imports) > 50
    return package


def test_every_folder_has_a_floor(house: Package) -> None:
    assert "cachebus" in house.modules, "cachebus/__init__.py is missing"
    assert unknown_folders(house) == []
    assert misplaced_modules(house) == []


def test_no_room_is_crowded(house: Package) -> None:
    assert crowded_rooms(house) == []


def test_imports_go_down_only(house: Package) -> None:
    assert floor_faults(house) == []


def test_each_floor_touches_only_its_own_third_parties(house: Package) -> None:
    assert third_party_faults(house) == []


def test_no_driver_is_imported_by_importing_cachebus(house: Package) -> None:
    assert driver_faults(house) == []


def test_no_modules_import_each_other(house: Package) -> None:
    assert cycles(house) == []


def test_nothing_imports_through_the_links_at_the_root() -> None:
    faults: list[str] = []
    files = [
        file for folder in ("tests", "examples", "benchmarks", "cachebus") for file in (ROOT / folder).rglob("*.py")
    ]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            faults += [f"{file.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in ROOMS]
    assert faults == []


def plant(tmp_path: Path, **files: str) -> Package:
    """Create a small package without faults and add ``files``: ``bus__codec="..."`` is ``bus/codec.py``."""
    folder = tmp_path / "cachebus"
    sound = {
        "__init__": "from cachebus.bus import Bus\nfrom cachebus.facade.cache import Cache\n",
        "facade____init__": "",
        "facade__cache": "import anyio\nfrom cachebus.node.node import Node\n",
        "node____init__": "",
        "node__node": "from cachebus.adapters import memory\n",
        "messages____init__": "from .reads import Get\n",
        "messages__reads": "import dataclasses\n",
        "bus____init__": "from .local import Bus\n",
        "bus__local": "from cachebus.messages import Get\nimport anyio\n",
        "actors____init__": "",
        "actors__ports": "from cachebus.messages.reads import Get\n",
        "adapters____init__": "",
        "adapters__memory": "from cachebus.actors.ports import Store\nfrom .eviction import lru\n",
        "adapters__redis____init__": "",
        "adapters__redis__store": "import redis.asyncio\n",
        "adapters__eviction____init__": "",
        "adapters__eviction__lru": "import heapq\n",
    }
    for name, text in {**sound, **files}.items():
        parts = (
            name.replace("____init__", "/__init__")
            .replace("__init__", "\0")
            .replace("__", "/")
            .replace("\0", "__init__")
        )
        file = folder / f"{parts}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return read_package(folder)


def test_a_sound_house_has_no_faults(tmp_path: Path) -> None:
    house = plant(tmp_path)
    assert unknown_folders(house) == []
    assert misplaced_modules(house) == []
    assert crowded_rooms(house) == []
    assert floor_faults(house) == []
    assert third_party_faults(house) == []
    assert driver_faults(house) == []
    assert cycles(house) == []


def test_an_empty_folder_is_not_a_sound_house(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no Python file"):
        read_package(tmp_path)


def test_a_new_folder_needs_a_floor(tmp_path: Path) -> None:
    assert unknown_folders(plant(tmp_path, utils__text="")) == ["utils"]


def test_a_module_at_the_root_is_found(tmp_path: Path) -> None:
    assert misplaced_modules(plant(tmp_path, helpers="", __main__="")) == ["helpers.py"]


def test_a_crowded_room_is_found(tmp_path: Path) -> None:
    many = {f"bus__part{number}": "" for number in range(4)}
    assert crowded_rooms(plant(tmp_path, **many), most=4) == ["bus: 5 modules"]


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"messages__reads": "from cachebus.bus import Bus\n"}, id="messages-to-bus"),
        pytest.param({"bus__local": "import cachebus.actors.ports\n"}, id="bus-to-actors"),
        pytest.param({"bus__local": "from cachebus import Cache\n"}, id="bus-to-facade"),
        pytest.param({"bus__local": "from cachebus import adapters\n"}, id="a-room-from-the-facade"),
        pytest.param({"actors__ports": "from cachebus.adapters.memory.store import Memory\n"}, id="actors-to-adapters"),
        pytest.param({"adapters__memory": "from cachebus.bus import Bus\n"}, id="adapters-to-bus"),
        pytest.param({"adapters__memory": "from cachebus.actors import backend\n"}, id="adapters-to-more-than-ports"),
        pytest.param(
            {"adapters__memory": "from cachebus.actors import ports_x\n"}, id="adapters-to-the-actors-package"
        ),
        pytest.param(
            {"adapters__memory": "from cachebus.actors.portside import X\n"}, id="a-name-that-begins-like-ports"
        ),
        pytest.param(
            {"adapters__eviction__lru": "import cachebus.facade.cache\n"}, id="a-package-in-adapters-to-facade"
        ),
        pytest.param(
            {
                "messages__reads": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cachebus.bus import Bus\n"
            },
            id="in-a-type-checking-block",
        ),
        pytest.param(
            {"messages__reads": "import typing\nif typing.TYPE_CHECKING:\n    from cachebus.bus import Bus\n"},
            id="in-a-typing-type-checking-block",
        ),
        pytest.param({"messages__reads": "def late():\n    from cachebus.bus import Bus\n"}, id="in-a-function"),
        pytest.param(
            {"messages__reads": "class A:\n  async def f(self):\n    import cachebus.bus\n"}, id="in-a-method"
        ),
        pytest.param(
            {"messages__reads": "import importlib\nbus = importlib.import_module('cachebus.bus')\n"},
            id="by-import-module",
        ),
        pytest.param({"bus__local": "from ..messages import Get\n"}, id="relative-between-floors"),
        pytest.param({"bus__local": "from .. import messages\n"}, id="relative-from-the-root"),
        pytest.param({"bus__local": "from .. import Cache\n"}, id="relative-to-the-facade"),
        pytest.param({"facade__cache": "from cachebus.adapters import memory\n"}, id="facade-to-adapters"),
        pytest.param({"node__node": "from cachebus.facade.cache import Cache\n"}, id="node-to-facade"),
        pytest.param({"__init__": "from .facade.cache import Cache\n"}, id="relative-from-the-root-module"),
        pytest.param({"bus__local": "import cachebus.bus.codec.messages\n"}, id="absolute-inside-a-room"),
        pytest.param({"facade__cache": "import cachebus.facade.locks\n"}, id="absolute-inside-the-facade"),
        pytest.param(
            {"facade__cache": "from cachebus.testing import suite\n", "testing____init__": ""}, id="facade-to-testing"
        ),
    ],
)
def test_a_planted_upward_or_misspelt_import_is_found(tmp_path: Path, files: dict[str, str]) -> None:
    assert len(floor_faults(plant(tmp_path, **files))) == 1


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"messages__reads": "import pydantic\n"}, id="messages-to-anything"),
        pytest.param({"messages__reads": "def f():\n    import typing_extensions\n"}, id="in-a-function"),
        pytest.param({"bus__local": "import nats\n"}, id="nats-outside-its-file"),
        pytest.param({"bus__local": "import trio\n"}, id="trio-at-module-level"),
        pytest.param({"actors__ports": "def f():\n    import trio\n"}, id="trio-outside-the-bus"),
        pytest.param({"actors__ports": "import pydantic\n"}, id="actors-to-pydantic"),
        pytest.param({"adapters__memory": "import redis\n"}, id="a-driver-in-another-adapter"),
        pytest.param({"adapters__redis__store": "from pymemcache import x\n"}, id="one-driver-in-the-file-of-another"),
        pytest.param({"facade__cache": "import redis\n"}, id="facade-to-a-driver"),
        pytest.param({"bus__testing": "import pytest\n"}, id="pytest-outside-testing"),
        pytest.param(
            {"facade__cache": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import redis\n"},
            id="under-type-checking",
        ),
    ],
)
def test_a_planted_third_party_is_found(tmp_path: Path, files: dict[str, str]) -> None:
    assert len(third_party_faults(plant(tmp_path, **files))) == 1


def test_the_table_grants_what_it_says(tmp_path: Path) -> None:
    house = plant(
        tmp_path,
        bus__nats____init__="",
        bus__nats__client="import nats\n",
        bus__local="def f():\n    import trio\n",
        adapters__redis__store="import redis\nimport hiredis\nimport anyio\n",
        testing____init__="import pytest\n",
        adapters__memcached____init__="",
        adapters__memcached__meta="import pymemcache\n",
    )
    assert third_party_faults(house) == []


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"__init__": "from cachebus.adapters.redis import store\n"}, id="straight"),
        pytest.param(
            {"adapters____init__": "from .redis import store\n"}, id="through-the-init-of-a-package-on-the-way"
        ),
        pytest.param({"facade__cache": "try:\n    import numpy\nexcept ImportError:\n    pass\n"}, id="in-a-try"),
        pytest.param({"facade__cache": "class A:\n    import nats\n"}, id="in-a-class-body"),
    ],
)
def test_a_planted_driver_is_found(tmp_path: Path, files: dict[str, str]) -> None:
    assert len(driver_faults(plant(tmp_path, **files))) == 1


def test_a_package_that_cannot_be_imported_is_not_free_of_drivers(tmp_path: Path) -> None:
    plant(tmp_path)
    (tmp_path / "cachebus" / "__init__.py").unlink()
    with pytest.raises(AssertionError, match="is missing"):
        driver_faults(read_package(tmp_path / "cachebus"))


def test_a_driver_imported_late_or_for_types_is_no_fault(tmp_path: Path) -> None:
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import redis\ndef f():\n    import redis\n"
    assert driver_faults(plant(tmp_path, facade__cache=late)) == []


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        pytest.param(
            {"bus__a": "from . import b\n", "bus__b": "from .a import x\n"},
            ["cachebus.bus.a", "cachebus.bus.b"],
            id="two-modules",
        ),
        pytest.param(
            {"bus__local": "from . import Bus\n"}, ["cachebus.bus", "cachebus.bus.local"], id="a-module-and-its-package"
        ),
        pytest.param(
            {
                "bus__a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B\n",
                "bus__b": "from .a import x\n",
            },
            ["cachebus.bus.a", "cachebus.bus.b"],
            id="for-types-only",
        ),
    ],
)
def test_a_planted_cycle_is_found(tmp_path: Path, files: dict[str, str], cycle: list[str]) -> None:
    assert cycles(plant(tmp_path, **files)) == [cycle]
