"""The commands that speak to a running cache: `get set delete invalidate ping events topology`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from cachebus.__main__ import main
from cachebus.cli.events import as_json, as_line, kinds_of
from cachebus.cli.topology import rows, table
from cachebus.messages import CacheConfigurationError, CacheEvicted, CacheSet, CircuitOpened, Event
from cachebus.testing.servers import Server, run_redis

from .conftest import LIMIT, ROOT, RunWorker

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def run(nats_server: Server, namespace: str, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command on the bus of the test: its exit code, and what it wrote."""

    def run(command: str, *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([command, "--bus", nats_server.url, "--namespace", namespace, *arguments])
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return run


def test_what_is_set_can_be_read_and_removed(run_worker: RunWorker, run: Run) -> None:
    run_worker("--backend", "primary=memory://")
    assert run("set", "k", "naïve ☕", "--ttl", "60", "--tag", "a", "--tag", "b") == (0, "", "")
    assert run("get", "k") == (0, "naïve ☕\n", "")
    found = json.loads(run("get", "k", "--json")[1])
    assert (found["kind"], found["value"], found["tags"]) == ("reply.found", "naïve ☕", ["a", "b"])
    assert 50 < found["ttl"] <= 60
    assert run("set", "k", '{"n": [1, null]}', "--as", "json")[0] == 0
    assert run("get", "k") == (0, '{"n": [1, null]}\n', "")
    assert run("set", "other", "x", "--tag", "t") == (0, "", "")
    assert run("delete", "k", "absent") == (0, "1 removed\n", "")
    code, out, err = run("get", "k")
    assert (code, out) == (1, "")
    assert "no value" in err
    assert json.loads(run("get", "k", "--json")[1])["kind"] == "reply.missing"
    assert run("invalidate", "t") == (0, "", "")
    assert run("get", "other")[0] == 1


def test_a_condition_that_does_not_hold_is_exit_code_1(run_worker: RunWorker, run: Run) -> None:
    run_worker("--backend", "primary=memory://")
    assert run("set", "k", "v", "--only-if", "present")[0] == 1
    assert run("set", "k", "v", "--only-if", "absent")[0] == 0
    assert run("set", "k", "w", "--only-if", "absent", "--json")[0] == 1
    assert run("get", "k")[1] == "v\n"


def test_an_address_chooses_who_is_asked(run_worker: RunWorker, run: Run) -> None:
    run_worker("--backend", "primary=memory://", "--backend", "other=memory://")
    assert run("set", "k", "there", "--address", "backend.other")[0] == 0
    assert run("get", "k")[0] == 1
    assert run("get", "k", "--address", "backend.other")[1] == "there\n"
    code, out, _ = run("ping", "--address", "backend.other")
    assert code == 0
    assert re.fullmatch(r"backend\.other answered in \d+\.\d ms\n", out)
    told = json.loads(run("ping", "--json")[1])
    assert (told["kind"], told["address"]) == ("reply.pong", "backend.primary")
    assert 0 < told["seconds"] < LIMIT


def test_a_cache_of_ones_own_is_asked_without_a_bus(capfd: pytest.CaptureFixture[str]) -> None:
    with run_redis() as redis:
        assert main(["set", "k", "v", "--cache", redis.url]) == 0
        assert main(["get", "k", "--cache", redis.url]) == 0
    assert capfd.readouterr().out == "v\n"
    assert main(["ping", "--cache", "memory://"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["ping"], 3, "no actor serves the address 'backend.primary'"),
        (["get", "k", "--address", "a b"], 2, "--address"),
        (["get", ""], 2, "key"),
        (["set", "k", "{", "--as", "json"], 2, "VALUE is not valid JSON"),
        (["set", "k", "v", "--ttl", "-1"], 2, "ttl"),
        (["events", "--kind", "coffee"], 2, "unknown kind of event 'coffee'"),
        (["topology", "--interval", "-1"], 2, "--interval"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_an_exit_code(
    run: Run, arguments: list[str], code: int, sentence: str
) -> None:
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert sentence in err


def test_a_bus_that_is_not_there_is_exit_code_3(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--bus", "nats://127.0.0.1:1"]) == 3
    assert main(["ping"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_the_time_budget_is_kept(run_worker: RunWorker, run: Run) -> None:
    with run_redis() as redis:
        run_worker("--backend", f"primary={redis.url}?timeout_min=30&timeout_max=30&connect_timeout=30", "--grace", "1")
        redis.pause()
        code, _, err = run("get", "k", "--timeout", "0.3")
        assert code == 3
        assert "within 0.3 s" in err
        redis.resume()


def listen(nats_server: Server, namespace: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "cachebus", "events", "--bus", nats_server.url, "--namespace", namespace),
            *arguments,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_events_are_lines_as_they_happen(run_worker: RunWorker, run: Run, nats_server: Server, namespace: str) -> None:
    run_worker("--backend", "primary=memory://", "--backend", "other=memory://")
    arguments = ["--kind", "set", "--kind", "cache_del*", "--backend", "primary", "--count", "2"]
    listeners = [listen(nats_server, namespace, *arguments), listen(nats_server, namespace, *arguments, "--json")]
    try:
        # It listens when it hears, so the first event is told until then.
        while any(each.poll() is None for each in listeners):
            assert run("set", "k", "v", "--tag", "t")[0] == 0
            assert run("set", "k", "v", "--address", "backend.other")[0] == 0
        lines = [each.communicate(timeout=LIMIT) for each in listeners]
    finally:
        for each in listeners:
            each.kill()
            each.communicate()
    assert [each.returncode for each in listeners] == [0, 0]
    assert [err for _, err in lines] == ["", ""]
    people, machines = (out.splitlines() for out, _ in lines)
    assert len(people) == len(machines) == 2
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:.]{12}  cache_set +primary +key=k .*tags=t", line) for line in people)
    events = [json.loads(line) for line in machines]
    assert [(each["kind"], each["backend"], each["key"]) for each in events] == [
        ("event.cache_set", "primary", "k")
    ] * 2


def stamped(event: Event) -> Event:
    return replace(event, time=1.0, backend="primary", origin="1-ab", seq=7)


def test_a_line_cannot_command_a_terminal_and_is_one_line() -> None:
    text = as_line(stamped(CacheSet(key="a\x1b[2Jb\nc d", tags=("x y",))), coloured=False)
    assert text.isprintable()
    assert r'key="a\\x1b[2Jb\\nc d"' in text
    assert text.endswith("(1-ab #7)")
    assert "\n" not in as_json(stamped(CacheSet(key="a\nb")))


def test_kinds_have_colours_on_a_terminal() -> None:
    plain, coloured = partial(as_line, coloured=False), partial(as_line, coloured=True)
    event = stamped(CacheEvicted(key="k"))
    assert re.sub(r"\x1b\[\d+m", "", coloured(event)) == plain(event)
    colours = {re.findall(r"\x1b\[(\d+)m", coloured(stamped(each)))[0] for each in (
        CacheEvicted(key="k"), CacheSet(key="k"), CircuitOpened("a", 1, 1.0))}  # fmt: skip
    assert len(colours) == 3


def test_kinds_are_named_in_short() -> None:
    assert kinds_of("hit") == ("cache_hit",)
    assert kinds_of("circuit_*") == ("circuit_*",)
    with pytest.raises(CacheConfigurationError, match="'tea'"):
        kinds_of("tea")


def test_the_topology_says_what_runs_where(run_worker: RunWorker, run: Run) -> None:
    assert run("topology", "--wait", "0.1", "--interval", "0") == (1, "no worker answered\n", "")
    with run_redis() as redis:
        workers = [run_worker("--backend", f"primary={redis.url}") for _ in range(2)]
        sole = run_worker("--backend", "near=memory://")
        for _ in range(4):
            assert run("get", "k", "--address", "backend.near")[0] == 1
        code, out, _ = run("topology", "--json", "--interval", "0")
        assert code == 0
        everything = json.loads(out)
        found = [each for each in everything if each["address"].startswith("backend.")]
        assert [each["address"] for each in found] == ["backend.near", "backend.primary", "backend.primary"]
        locks = [each for each in everything if each not in found]
        assert [each["address"] for each in locks] == ["locks.near", "locks.primary", "locks.primary"]
        assert [each["shared"] for each in locks] == [False, True, True]
        assert [each["breaker"] for each in locks] == ["", "closed", "closed"]
        assert [each["shared"] for each in found] == [False, True, True]
        assert [each["breaker"] for each in found] == ["", "closed", "closed"]
        assert found[0]["requests"] == 4
        assert 0 < found[0]["requests_per_second"] <= 4 / found[0]["uptime"] + 1
        pids = [int(each["worker"].partition("-")[0]) for each in found]
        assert pids[0] == sole.process.pid
        assert set(pids[1:]) == {each.process.pid for each in workers}
        code, out, _ = run("topology", "--interval", "0.1")
        assert code == 0
        lines = out.splitlines()
        assert lines[0].split() == [
            *("ADDRESS", "WORKER", "HOST", "VERSION", "SHARED", "UPTIME", "MAILBOX", "REQUESTS/S", "ERRORS", "BREAKER")
        ]
        assert len(lines) == 7
        assert lines[1].split()[7] == "0.0"
    assert main_topology_of_another_namespace(run) == 1


def main_topology_of_another_namespace(run: Run) -> int:
    """The exit code where only others have workers."""
    return run("topology", "--namespace", "nobodys", "--interval", "0")[0]


def test_every_namespace_is_shown_if_asked(run_worker: RunWorker, run: Run, namespace: str) -> None:
    run_worker("--backend", "primary=memory://")
    code, out, _ = run("topology", "--namespace", "nobodys", "--all", "--json", "--interval", "0")
    assert code == 0
    assert namespace in {each["namespace"] for each in json.loads(out)}


def worker(requests: int, **data: Any) -> dict[str, Any]:
    endpoint = {
        "subject": "s", "queue_group": "q", "num_requests": requests, "num_errors": 3, "last_error": "timeout",
        "data": {"address": "backend.primary", "mailbox": 5, **data},
    }  # fmt: skip
    metadata = {"namespace": "n", "host": "h"}
    return {
        "id": "w", "version": "1.0.0", "started": "2020-01-01T00:00:00Z", "metadata": metadata, "endpoints": [endpoint],
    }  # fmt: skip


def test_requests_are_counted_between_two_looks() -> None:
    guard = {"statistics": {"guard": {"state": "open"}}}
    (place,) = rows([worker(100)], [worker(300, **guard)], 2.0)
    assert (place.requests_per_second, place.mailbox, place.errors, place.breaker) == (100.0, 5, 3, "open")
    (ill,) = rows([], [worker(300, error="timeout")], 2.0)
    assert ill.requests_per_second < 1
    assert "? (timeout)" in table([ill])
