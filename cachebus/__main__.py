"""The command line: `python -m cachebus`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cachebus.cli import ask, events, info, topology, worker
from cachebus.cli.common import FAILED, NO, WRONG
from cachebus.messages import CacheConfigurationError, CacheError, CacheKeyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. An error prints one line to standard error.

    Exit codes: 0 success; 1 negative result, such as a miss; 2 usage or configuration error; 3 failure of the system.
    """
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except CacheError as error:
        print("cachebus:", " ".join(str(error).split()), file=sys.stderr)
        return WRONG if isinstance(error, CacheConfigurationError | CacheKeyError) else FAILED
    except BrokenPipeError:
        # The reader of the pipe, such as `head`, has exited. Without this, Python would print an error at exit.
        sys.stdout = None
        return NO
    except KeyboardInterrupt:
        return 130
    return code


def parser() -> argparse.ArgumentParser:
    """Return the argument parser for all commands."""
    parser = argparse.ArgumentParser(prog="cachebus", description="Run workers and query caches, events and settings.")
    parser.add_argument("--version", action="version", version=f"cachebus {info.installed_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for each in (info, worker, ask, events, topology):
        each.add(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
