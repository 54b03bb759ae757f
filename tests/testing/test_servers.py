from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from cachebus.testing import servers
from cachebus.testing.processes import answers
from cachebus.testing.servers import Server, redis_command, run_memcached, run_nats, run_redis, run_redis_cluster
from cachebus.testing.servers import run_sentinel as sentinel_of


@pytest.mark.parametrize("run", [run_redis, run_memcached, run_nats])
def test_a_server_answers_when_it_has_started_and_after_every_accident(
    run: Callable[[], AbstractContextManager[Server]],
) -> None:
    with run() as server:
        # Each returns once the server answers; that is the assertion.
        server.start()
        server.restart()
        server.pause()
        server.resume()
        server.kill()
        server.kill()
        server.start()
        assert server.url.endswith(f"://127.0.0.1:{server.port}")


def test_redis_takes_options_and_a_password() -> None:
    with run_redis("--maxmemory", "2mb", password="p@ss:w/rd") as server:
        assert server.url == f"redis://:p%40ss%3Aw%2Frd@127.0.0.1:{server.port}"
        with pytest.raises(RuntimeError, match="NOAUTH"):
            redis_command(server, "PING")


def test_a_user_of_redis_is_the_only_one_who_may_enter() -> None:
    with run_redis(user="u", password="p") as server, pytest.raises(RuntimeError, match="NOAUTH"):
        redis_command(server, "PING")


def test_a_cluster_serves_every_slot() -> None:
    with run_redis_cluster() as nodes:
        assert len(nodes) == 3
        assert b"cluster_slots_assigned:16384" in redis_command(nodes[2], "CLUSTER", "INFO")


def test_a_sentinel_names_its_primary() -> None:
    with run_redis() as primary, sentinel_of(primary) as sentinel:
        told = redis_command(sentinel, "SENTINEL", "get-master-addr-by-name", "primary")
        assert str(primary.port).encode() in told


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match=r"exited with code(?s:.*)no-such-option"),
        run_redis("--no-such-option", "1"),
    ):
        pass


def test_a_missing_server_fails_the_test_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "find_binary", lambda program: None)
    monkeypatch.setattr(servers, "docker_answers", lambda: False)
    with (
        pytest.raises(pytest.fail.Exception, match=r"apt-get install redis-server.*CACHEBUS_TEST_REDIS_URL"),
        run_redis(),
    ):
        pass


def test_a_server_of_the_environment_is_used_and_never_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEBUS_TEST_REDIS_URL", "redis://cache.example:7000/2")
    found = servers._external("CACHEBUS_TEST_REDIS_URL", 6379)
    assert found is not None
    with found as server:
        assert (server.host, server.port, server.url) == ("cache.example", 7000, "redis://cache.example:7000/2")
        server.start()
        server.stop()
        for verb in (server.kill, server.restart, server.pause, server.resume):
            with pytest.raises(pytest.fail.Exception, match="CACHEBUS_TEST_REDIS_URL"):
                verb()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kill is that of a POSIX system")
def test_nothing_is_left_of_a_test_run_that_was_killed() -> None:
    script = (
        "import os, sys\n"
        "from cachebus.testing.servers import run_redis\n"
        "running = run_redis()\n"
        "server = running.__enter__()\n"
        "print(server.port, server.folder, flush=True)\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60)
    port, folder = run.stdout.split()
    # The reaper holds the other end of our pipe, too: run() returns when it has closed it, having done its work.
    assert run.returncode == -signal.SIGKILL
    assert not os.path.exists(folder)
    limit = time.monotonic() + 30
    while answers(int(port), lambda _: True):  # What is killed takes a moment to end.
        assert time.monotonic() < limit
        time.sleep(0.01)
    with run_redis(port=int(port)):
        pass
