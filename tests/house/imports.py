"""Import rules: reads imports with ``ast`` and finds those that break a rule.

Functions take a package, so that the tests can also apply them to small packages with a fault.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

FLOORS = (
    *("messages", "bus", "actors", "adapters", "payload", "client", "loading"),
    *("settings", "node", "facade", "integrations", "cli"),
)
"""Floors, from the lowest up. The root (`__init__` and `__main__`) is above all of them."""

ROOT = "root"

ALLOWED: Mapping[str, tuple[str, ...]] = {
    **{floor: tuple(below for below in FLOORS[:number] if below != "adapters") for number, floor in enumerate(FLOORS)},
    "adapters": ("messages", "actors.ports"),  # Of the actors, only the ports.
    "node": ("messages", "bus", "actors", "adapters", "payload", "client", "loading", "settings"),
    ROOT: FLOORS,
}
"""Floors that each floor may import. Only the node imports adapters, because it creates the stores."""

MOST_MODULES = 22
"""Maximum number of modules in a room."""

THIRD_PARTIES: Mapping[str, frozenset[str]] = {
    "messages": frozenset({"msgspec"}),
    "bus": frozenset({"anyio", "msgspec"}),
    "bus/nats/*": frozenset({"nats", "pydantic"}),
    "actors": frozenset({"anyio", "msgspec", "tenacity"}),
    "adapters": frozenset({"anyio", "msgspec"}),  # For worker threads of blocking drivers.
    "adapters/common/encoding*": frozenset({"msgpack"}),
    "adapters/redis/*": frozenset({"redis", "hiredis"}),
    "adapters/memcached/*": frozenset({"pymemcache"}),
    "payload": frozenset({"msgspec"}),
    "payload/serializers/json*": frozenset({"msgpack"}),  # Its strict packer checks for plain types.
    "payload/serializers/msgpack*": frozenset({"msgpack"}),
    "client": frozenset({"anyio", "msgspec", "pydantic"}),
    "loading": frozenset({"anyio", "msgspec"}),
    "settings": frozenset({"pydantic", "yaml"}),
    "node": frozenset({"anyio", "pydantic"}),
    "facade": frozenset({"anyio", "msgspec", "pydantic"}),
    "integrations": frozenset(),
    "cli": frozenset({"anyio", "msgspec", "yaml"}),
    ROOT: frozenset(),
    # The published test suites. `import cachebus` does not load them.
    "testing": frozenset({"anyio", "msgspec", "pytest", "testcontainers", "docker"}),
}
"""Third parties allowed for a floor, and in addition for modules whose path matches a pattern."""

INSIDE_FUNCTIONS_ONLY: Mapping[str, frozenset[str]] = {"bus": frozenset({"trio"})}
"""Third parties allowed only inside functions."""

DRIVERS = frozenset(
    {"redis", "hiredis", "pymemcache", "nats", "faiss", "numpy"}
    | {"orjson", "pyarrow", "pandas", "lz4", "zstandard", "xxhash", "cryptography"}
)
"""Drivers that ``import cachebus`` never loads. They are loaded when a URL needs them."""


@dataclass(frozen=True)
class Import:
    """One import of one name in a file."""

    module: str
    """Dotted name of the importing module."""
    file: Path
    """Path relative to the package's folder."""
    line: int
    target: str
    """Dotted name of the imported module."""
    relative: bool
    in_function: bool
    type_checking: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


@dataclass(frozen=True)
class Package:
    """A package on disk: its modules and their imports."""

    name: str
    modules: Mapping[str, Path]
    """Dotted name to path, relative to the package's folder."""
    imports: tuple[Import, ...]


class _Reader(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[tuple[ast.Import | ast.ImportFrom | ast.Call, bool, bool]] = []
        self._in_function = False
        self._type_checking = False

    def visit_Import(self, node: ast.Import) -> None:
        self.found.append((node, self._in_function, self._type_checking))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found.append((node, self._in_function, self._type_checking))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in {"import_module", "__import__"} and _literal(node):
            self.found.append((node, self._in_function, self._type_checking))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if _is_type_checking(node.test):
            before, self._type_checking = self._type_checking, True
            for child in node.body:
                self.visit(child)
            self._type_checking = before
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        before, self._in_function = self._in_function, True
        self.generic_visit(node)
        self._in_function = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_function(node)


def _literal(call: ast.Call) -> str:
    argument = call.args[0] if call.args else None
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ""


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def read_package(folder: Path) -> Package:
    """Read a package.

    Raises ``AssertionError`` if the folder has no modules, so that a test cannot pass by reading none.
    """
    files = sorted(folder.rglob("*.py"))
    assert files, f"no Python file under {folder}"
    modules: dict[str, Path] = {}
    for file in files:
        relative = file.relative_to(folder)
        parts = [folder.name, *relative.with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        modules[".".join(parts)] = relative
    imports = [found for module, file in modules.items() for found in _read_module(folder, module, file, modules)]
    return Package(folder.name, modules, tuple(imports))


def _read_module(folder: Path, module: str, file: Path, modules: Mapping[str, Path]) -> Iterator[Import]:
    reader = _Reader()
    reader.visit(ast.parse((folder / file).read_text(encoding="utf-8"), filename=str(file)))
    parents = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node, in_function, type_checking in reader.found:
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            targets = [_literal(node)]
        else:
            base = parents[: len(parents) - node.level + 1] if relative else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            targets = _targets_of_from(origin, node, folder, modules)
        for target in dict.fromkeys(targets):
            yield Import(module, file, node.lineno, target, relative, in_function, type_checking)


def _targets_of_from(origin: str, node: ast.ImportFrom, folder: Path, modules: Mapping[str, Path]) -> list[str]:
    """Return the modules that ``from a import b`` names:

    ``a.b`` if it is a module or a folder of the package, else ``a``.
    """

    def is_module(name: str) -> bool:
        inside = name.split(".")[1:]
        return name in modules or (name.startswith(f"{folder.name}.") and folder.joinpath(*inside).is_dir())

    joined = [f"{origin}.{alias.name}" for alias in node.names]
    return [name if is_module(name) else origin for name in joined]


def floor_of(module: str, package: Package) -> str:
    """Return the floor of a module: the name of its folder, or `root`."""
    return module.split(".")[1] if _in_folder(module, package) else ROOT


def _in_folder(module: str, package: Package) -> bool:
    parts = module.split(".")
    if len(parts) < 2:
        return False
    file = package.modules.get(".".join(parts[:2]))
    return len(parts) > 2 or parts[1] in FLOORS or file is None or file.name == "__init__.py"


def unknown_folders(package: Package) -> list[str]:
    """Return the folders that are not floors. A new folder must be added to `FLOORS` first."""
    folders = {file.parts[0] for file in package.modules.values() if len(file.parts) > 1}
    return sorted(folders - set(FLOORS) - {"testing"})


def misplaced_modules(package: Package) -> list[str]:
    """Return the modules at the root other than `__init__` and `__main__`."""
    at_root = {file.name for file in package.modules.values() if len(file.parts) == 1}
    return sorted(at_root - {"__init__.py", "__main__.py"})


def crowded_rooms(package: Package, most: int = MOST_MODULES) -> list[str]:
    """Return the folders with more than `most` modules."""
    counts = Counter(file.parent.as_posix() for file in package.modules.values() if file.name != "__init__.py")
    return sorted(f"{room}: {count} modules" for room, count in counts.items() if count > most)


def floor_faults(package: Package) -> list[str]:
    """Find imports inside the package that go up or sideways, or that have the wrong form."""
    faults: list[str] = []
    for found in package.imports:
        if found.target.split(".")[0] != package.name:
            continue
        here, there = floor_of(found.module, package), floor_of(found.target, package)
        inside = found.target.partition(".")[2]
        if here == there:
            if not found.relative:
                faults.append(f"{found}: imports inside a floor must be relative")
        elif found.relative:
            faults.append(f"{found}: imports between floors must be absolute")
        elif there == "testing":
            faults.append(f"{found}: only tests may import cachebus.testing")
        elif here != "testing" and not any(inside == room or inside.startswith(f"{room}.") for room in ALLOWED[here]):
            faults.append(f"{found}: {here} may import {' and '.join(ALLOWED[here]) or 'no other floor'}")
    return faults


def third_party_faults(package: Package) -> list[str]:
    """Find imports of third parties that the table does not allow."""
    faults: list[str] = []
    for found in package.imports:
        top = found.target.split(".")[0]
        if top == package.name or top in sys.stdlib_module_names:
            continue
        floor = floor_of(found.module, package)
        granted: set[str] = set(THIRD_PARTIES[floor])
        for pattern, names in THIRD_PARTIES.items():
            if fnmatchcase(found.file.as_posix(), pattern):
                granted |= names
        if found.in_function:
            granted |= INSIDE_FUNCTIONS_ONLY.get(floor, frozenset())
        if top not in granted:
            faults.append(f"{found}: not allowed for {floor}")
    return faults


def _loads(found: Import, package: Package) -> Iterator[str]:
    """Yield the package's modules that an import runs: the target and its parents, except parents of the importer."""
    parts = found.target.split(".")
    if parts[0] != package.name:
        return
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        ours = found.module == name or found.module.startswith(f"{name}.")
        if name in package.modules and (name == found.target or not ours):
            yield name


def loaded_by(package: Package, module: str) -> set[str]:
    """Return the modules that ``import module`` loads: imports outside functions and ``TYPE_CHECKING`` blocks."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for found in package.imports:
            if found.module == current and not found.in_function and not found.type_checking:
                waiting.extend(_loads(found, package))
    return seen


def driver_faults(package: Package) -> list[str]:
    """Find drivers that ``import cachebus`` would load. Raises ``AssertionError`` if the package cannot be imported."""
    assert package.name in package.modules, f"{package.name}/__init__.py is missing"
    loaded = loaded_by(package, package.name)
    return [
        f"{found}: loaded by `import {package.name}`"
        for found in package.imports
        if found.module in loaded
        and found.target.split(".")[0] in DRIVERS
        and not found.in_function
        and not found.type_checking
    ]


def cycles(package: Package) -> list[list[str]]:
    """Find groups of modules that import each other at their top level, ``TYPE_CHECKING`` blocks included."""
    graph: dict[str, set[str]] = {module: set() for module in package.modules}
    for found in package.imports:
        if not found.in_function:
            graph[found.module].update(_loads(found, package))
    reach = {module: _reachable(graph, graph[module]) for module in graph}
    groups = {
        frozenset({m for m in reach[module] if module in reach[m]}) for module in graph if module in reach[module]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Mapping[str, Iterable[str]], start: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(graph[current])
    return seen
