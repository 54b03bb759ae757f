"""README.md: its examples run, and the names in its commands exist."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from .paths import ROOT
from .readme import (
    SHELLS,
    Block,
    Promises,
    cachebus_arguments,
    command_faults,
    commands,
    extras,
    make_targets,
    read_blocks,
)

README = ROOT / "README.md"
BLOCKS = read_blocks(README.read_text(encoding="utf-8")) if README.is_file() else []
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in SHELLS]


def promises() -> Promises:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return Promises(make_targets(makefile), extras(project), frozenset(compose["services"]), ROOT)


def run_python(arguments: list[str], folder: Path) -> str:
    """Run a new interpreter in ``folder``, with warnings as errors, and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_block(block: Block, folder: Path) -> None:
    script = folder / "readme_block.py"
    script.write_text(block.text, encoding="utf-8")
    printed = run_python([str(script)], folder)
    if block.expect is not None:
        assert printed.strip() == block.expect


def run_cachebus(block: Block, folder: Path) -> int:
    """Run the ``python -m cachebus`` commands of a block, and return their number."""
    calls = [arguments for command in commands(block) if (arguments := cachebus_arguments(command)) is not None]
    for arguments in calls:
        words = [word for word in arguments if not word.startswith("-")]
        run_python(["-m", "cachebus", *([*words[:1], "--help"] if block.serves else arguments)], folder)
    return len(calls)


def test_the_readme_shows_python_and_commands() -> None:
    assert README.is_file(), "README.md is missing"
    assert PYTHON
    assert SHELL
    assert all(commands(block) for block in SHELL)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_each_python_block_of_the_readme_runs(block: Block, tmp_path: Path) -> None:
    run_block(block, tmp_path)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_each_command_of_the_readme_names_what_is_there(block: Block) -> None:
    faults = [fault for command in commands(block) for fault in command_faults(command, promises())]
    assert faults == []


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_each_cachebus_command_of_the_readme_runs(block: Block, tmp_path: Path) -> None:
    run_cachebus(block, tmp_path)


PAGE = """
# Planted

<!-- expect: 3 -->
```python
print(1 + 2)
```

<!-- expect:
one
two
-->

```python
print("one\\ntwo")
```

* in a list

  ~~~python
  if True:
      print("indented")
  ~~~

```console
$ make demo
something printed
$ pip install 'cachebus[redis]' \\
    rich
```

<!-- serves -->
```sh
# a comment
python -m cachebus worker --bus nats://localhost:4222
```
"""


def test_blocks_and_commands_are_read(tmp_path: Path) -> None:
    first, second, third, console, served = read_blocks(PAGE)
    assert (first.expect, second.expect, third.expect) == ("3", "one\ntwo", None)
    for block in (first, second, third):
        run_block(block, tmp_path)
    assert third.text == 'if True:\n    print("indented")\n'
    assert commands(console) == ["make demo", "pip install 'cachebus[redis]'      rich"]
    assert commands(served) == ["python -m cachebus worker --bus nats://localhost:4222"]
    assert (console.serves, served.serves) == (False, True)
    with pytest.raises(ValueError, match="not closed"):
        read_blocks("```python\nx\n")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("```python\nraise SystemExit(2)\n```\n", id="exit-code"),
        pytest.param("```python\nimport warnings\nwarnings.warn('old')\n```\n", id="warning"),
        pytest.param("<!-- expect: 4 -->\n```python\nprint(1 + 2)\n```\n", id="other-output"),
    ],
)
def test_a_python_block_that_does_not_keep_its_word_is_found(text: str, tmp_path: Path) -> None:
    (block,) = read_blocks(text)
    with pytest.raises(AssertionError):
        run_block(block, tmp_path)


def test_a_cachebus_command_that_fails_is_found(tmp_path: Path) -> None:
    (block,) = read_blocks("```console\n$ python -m cachebus no-such-command\n```\n")
    with pytest.raises(AssertionError, match="exit code"):
        run_cachebus(block, tmp_path)


@pytest.mark.parametrize(
    ("command", "faults"),
    [
        ("make demo", 0),
        ("make test ARGS='-k lease' PYTHON=python3.12", 0),
        ("make", 1),
        ("make coffee", 1),
        ("pip install cachebus", 0),
        ("pip install 'cachebus[redis,nats]'", 0),
        ("pip install 'cachebus[redis,coffee]'", 1),
        ("pip install -e '.[coffee]'", 1),
        ("docker compose up --wait", 0),
        ("docker compose up -d nats coffee", 1),
        ("CACHEBUS_URL=memory:// python -m cachebus asyncapi", 0),
        ("python -m coffee", 1),
        ("python examples/coffee.py", 1),
        ("python Makefile", 0),
        ("git clone somewhere", 0),
        ("brew-coffee", 1),
    ],
)
def test_a_command_that_names_what_is_not_there_is_found(command: str, faults: int) -> None:
    assert len(list(command_faults(command, promises()))) == faults
