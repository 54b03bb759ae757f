"""`cachebus worker`: serve backends on the bus until a signal arrives."""

from __future__ import annotations

import argparse
import asyncio
import re
from typing import Any

from cachebus.bus import check_word
from cachebus.messages import CacheConfigurationError
from cachebus.node.worker import Worker, log_to_stderr
from cachebus.settings import BackendSettings, Settings, backend_from_url
from cachebus.settings.urls import is_url

from .common import Commands, add_bus, bus_settings

_NAMED = re.compile(r"([^=:/?]*)=(.*)", re.DOTALL)


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    worker = commands.add_parser("worker", help="serve backends on the bus until a signal arrives")
    worker.add_argument("--config", metavar="SOURCE", help="settings file (default: only the environment)")
    backend = "backend to serve, such as primary=redis://localhost; may be repeated"
    worker.add_argument("--backend", action="append", default=[], metavar="NAME=URL", help=backend)
    add_bus(worker)
    seconds: Any = {"type": _seconds, "metavar": "SECONDS"}
    worker.add_argument(
        "--grace", **seconds, default=10.0, help="time limit for answering pending requests when stopping (default: 10)"
    )
    worker.add_argument("--wait", **seconds, default=30.0, help="how long to wait for the bus at startup (default: 30)")
    worker.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="format of a log line (default: text)"
    )
    worker.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="lowest level to log (default: info)",
    )
    worker.set_defaults(command=_worker)


def _worker(arguments: argparse.Namespace) -> int:
    log_to_stderr(arguments.log_format, arguments.log_level)
    settings = worker_settings(arguments)

    async def serve() -> int:  # A worker must be created on its event loop.
        return await Worker(settings, grace=arguments.grace, wait=arguments.wait).run()

    return asyncio.run(serve())


def worker_settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings from the options of `cachebus worker`. Raises `CacheConfigurationError`."""
    more: dict[str, Any] = {}
    if arguments.backend:
        backends = [_backend(each) for each in arguments.backend]
        # Any backend may be the default, because callers of a worker name the address.
        more["backends"] = [each.model_copy(update={"default": number == 0}) for number, each in enumerate(backends)]
    return bus_settings(arguments, arguments.config, **more)


def _backend(text: str) -> BackendSettings:
    found = _NAMED.fullmatch(text)
    if found is None or not is_url(found[2]):
        return backend_from_url(text)
    try:
        name = check_word(found[1], "name")
    except ValueError as error:
        raise CacheConfigurationError(f"--backend: {error}") from None
    return backend_from_url(found[2]).model_copy(update={"name": name})


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0 and below 86400, not {text}")
    return seconds
