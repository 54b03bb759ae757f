"""The command line: `python -m cachebus`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cachebus.cli import ask, events, info, topology, worker
from cachebus.cli.common import FAILED, NO, WRONG
from cachebus.messages import CacheConfigurationError, CacheError, CacheKeyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. One line on stderr says why.

    0 done; 1 the answer is no, such as a miss; 2 an error of the user; 3 the system could not do it.
    """
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except CacheError as error:
        print("cachebus:", " ".join(str(error).split()), file=sys.stderr)
        return WRONG if isinstance(error, CacheConfigurationError | CacheKeyError) else FAILED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has left. Python would complain again at exit.
        sys.stdout = None
        return NO
    except KeyboardInterrupt:
        return 130
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="cachebus", description="A cache built of actors and messages.")
    parser.add_argument("--version", action="version", version=f"cachebus {info.installed_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for each in (info, worker, ask, events, topology):
        each.add(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
