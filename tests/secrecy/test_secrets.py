"""Secrets in every place that takes one, and then all that can be seen of a cache: none of them is to be found in it."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis as redis_py
from msgspec.structs import astuple

from cachebus import CacheError, open_cache
from cachebus.__main__ import main
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.options import NatsOptions
from cachebus.node.node import Node
from cachebus.settings import load_settings
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server, run_nats, run_redis

from ..conftest import CANARY

ROOT = Path(__file__).resolve().parents[2]
PASSWORD, TOKEN = f"{CANARY}-p@ss:w/rd?#", f"{CANARY}-token"
SIGNING, SEALING, HASHING = ((each + CANARY * 5)[:32] for each in ("sign-", "seal-", "hash-"))


@pytest.fixture
def anyio_backend() -> str:
    """nats-py knows asyncio only."""
    return "asyncio"


@pytest.fixture(scope="module")
def redis() -> Iterator[Server]:
    with run_redis(password=PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def nats() -> Iterator[Server]:
    with run_nats("--auth", TOKEN) as server:
        yield server


def source(redis: Any, nats: Server, **more: Any) -> dict[str, Any]:
    """Settings with a secret in every place that takes one."""
    return {
        "backends": [f"redis://:{quote(PASSWORD, safe='')}@{redis.host}:{redis.port}?retry_attempts=1"],
        "bus": f"nats://{TOKEN}@{nats.host}:{nats.port}",
        "payload": {"serializer": "pickle", "signing_keys": [SIGNING], "encryption_keys": {"k1": SEALING}},
        "events": {"keys": "hash", "hash_key": HASHING},
        "on_error": "raise",
        "timeout": 2.0,
        **more,
    }


def clean(shown: list[str]) -> None:
    """Each form in which a secret could be shown is looked for."""
    secret = [PASSWORD, TOKEN, SIGNING, SEALING, HASHING, CANARY]
    forms = [form for each in secret for form in (each, quote(each), each.encode().hex(), each.encode().hex(" "))]
    forms += [base64.b64encode(each.encode()).decode().rstrip("=") for each in secret if each != CANARY]
    assert "".join(shown)
    found = [(form, text[:2000]) for text in shown for form in forms if form in text]
    assert not found


class Sight:
    """All that was seen."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.errors = 0

    def see(self, *things: Any) -> None:
        """Take in how things show themselves."""
        for thing in things:
            self.texts += [repr(thing), str(thing)]

    async def fails(self, what: Callable[[], Any]) -> None:
        """Take in the error of something that does not work, and of all that led to it."""
        try:
            await what()
        except Exception as error:
            self.errors += 1
            self.see(error)
            told: BaseException | None = error
            while told is not None:
                self.texts.append("".join(traceback.format_exception(told)))
                told = told.__context__
        else:
            raise AssertionError("it works")


@pytest.mark.anyio
async def test_secrets_are_nowhere_to_be_seen(redis: Server, nats: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    sight = Sight()
    with Proxy.before(redis) as proxy:
        settings = load_settings(source(proxy, nats))
        sight.see(settings, settings.backends, settings.bus, settings.payload, settings.events)
        sight.texts += [settings.model_dump_json(), repr(settings.model_dump()), repr(settings.model_dump(mode="json"))]
        async with open_cache(settings) as cache:
            events = cache.events(capacity=10_000)
            await cache.set("k", {"v": 1})
            assert await cache.get("k") == {"v": 1}
            sight.see(cache, cache.payloads, await cache.health(), await cache.statistics())
            plain = redis_py.Redis(host=redis.host, port=redis.port, password=PASSWORD)
            for name in await asyncio.to_thread(plain.keys, "*"):
                body: Any = await asyncio.to_thread(plain.get, name)
                await asyncio.to_thread(plain.set, name, body[:-3] + b"abc")
            await asyncio.to_thread(plain.close)
            assert await cache.get("k") is None  # Rejected: a warning, an event.
            await sight.fails(lambda: cache.set("k", lambda: None))  # No value for any serializer.
            for mode in ("reset", "garbage", "lose_reply", "refuse"):
                await asyncio.to_thread(proxy.switch, mode)
                await sight.fails(lambda: cache.set("k", 1))
                sight.see(await cache.health(), await cache.statistics())
            sight.see(cache)
            cache_events = [await anext(events) for _ in range(len(events))]
        kinds = {type(event).__name__ for event in cache_events}
        assert {"CacheSet", "PayloadRejected", "BackendDisconnected"} <= kinds
        sight.see(*cache_events)
        sight.texts += [repr(value) for event in cache_events for value in astuple(event)]
    assert sight.errors == 5
    clean([*sight.texts, caplog.text])


@pytest.mark.anyio
async def test_refused_secrets_are_nowhere_to_be_seen(
    redis: Server, nats: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sight = Sight()
    right = source(redis, nats)
    wrong_password = right["backends"][0].replace("@127", "x@127")
    wrong_token = right["bus"].replace("@127", "x@127")
    for part in (
        {"backends": [wrong_password]},
        {"bus": wrong_token},
        {"backends": [wrong_password.replace("redis://", "rediss://")]},
        {"bus": wrong_token.replace("nats://", "tls://")},
    ):

        async def opens(part: dict[str, Any] = part) -> None:
            async with open_cache(load_settings({**right, **part})) as cache:
                await cache.get("k")

        await sight.fails(opens)
    options = NatsOptions(servers=(f"{nats.host}:{nats.port}",), token=f"{TOKEN}x")
    sight.see(options, NatsBus("shop", options), Node(load_settings(right)))
    await sight.fails(NatsBus("shop", options).open)
    assert sight.errors == 5
    clean([*sight.texts, caplog.text])


MISTAKES: list[dict[str, Any]] = [
    {"backends": [f"redis://:{CANARY}@host?nonsense=1"]},
    {"backends": [f"redis://:{CANARY}@host:port"]},
    {"backends": [f"redis+sentinel://:{CANARY}@host?sentinel_password={CANARY}"]},
    {"backends": [f"mongodb://:{CANARY}@host"]},
    {"backends": [{"type": "redis", "hosts": ["h"], "password": [CANARY]}]},
    {"backends": [{"type": "redis", "url": f"redis://:{CANARY}@h", "pasword": CANARY}]},
    {"backends": [f"memcached://u:{CANARY}@host"]},
    {"bus": f"nats://{CANARY}@host?token=x"},
    {"bus": f"nats://u:{CANARY}@host?nonsense=1"},
    {"bus": f"http://{CANARY}@host"},
    {"bus": {"servers": ["h"], "token": [CANARY]}},
    {"payload": {"signing_keys": [CANARY]}},
    {"payload": {"encryption_keys": {"k1": CANARY}}},
    {"payload": {"encryption_keys": CANARY}},
    {"events": {"keys": "hash", "hash_key": CANARY}},
    {"events": {"keys": "plain", "hash_key": HASHING}},
    {"environment": "production", "backends": [f"redis://:{CANARY}@host"], "payload": {"signing_keys": [SIGNING]}},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_mistake_beside_a_secret_does_not_show_it(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    mistake = MISTAKES[number]
    shown: list[str] = []
    with pytest.raises((CacheError, TypeError)) as caught:
        load_settings(mistake)
    told: BaseException | None = caught.value
    while told is not None:
        shown += [repr(told), str(told), "".join(traceback.format_exception(told))]
        told = told.__context__
    path = tmp_path / "settings.yaml"
    path.write_text(repr(mistake), encoding="utf-8")  # Dicts, lists and texts of Python are YAML too.
    for command in (["config", "show"], ["config", "check"], ["worker", "--config"]):
        assert main([*command, str(path)]) == 2
        printed = capsys.readouterr()
        shown += [printed.out, printed.err]
    clean([*shown, caplog.text])


def test_the_commands_show_no_secret(redis: Server, nats: Server, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(repr(source(redis, nats)), encoding="utf-8")
    environment = {**os.environ, "CACHEBUS_BUS__TOKEN": TOKEN, "CACHEBUS_PAYLOAD__SIGNING_KEYS": f'["{SIGNING}"]'}

    def ran(*words: str, timeout: float = 60) -> str:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-m", "cachebus", *words],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    shown = [
        ran("config", "show", str(path)),
        ran("config", "show", "--json", str(path)),
        ran("config", "check", str(path)),
        ran("info"),
        ran("topology", "--bus", f"nats://{TOKEN}x@{nats.host}:{nats.port}"),
        ran("ping", "backend.primary", "--bus", f"nats://{TOKEN}x@{nats.host}:{nats.port}"),
        ran("worker", "--backend", f"redis://:{CANARY}x@{redis.host}:{redis.port}", "--bus", f"nats://{CANARY}@nowhere.invalid",
            "--wait", "0.2", "--log-level", "debug"),
    ]  # fmt: skip
    assert all(shown)
    clean(shown)


LEAKS = {
    "logs": "import logging\n\ndef test() -> None:\n    logging.getLogger('cachebus').debug('a %s', {canary!r})\n",
    "prints": "def test() -> None:\n    print({canary!r})\n",
    "logs later": "import logging\nfrom cachebus.node.worker import log_to_stderr\n\ndef test_a() -> None:\n    log_to_stderr('text', 'info')\n\n"
    "def test_b() -> None:\n    logging.getLogger('cachebus').debug('a %s', {canary!r})\n",
    "keeps": "def test() -> None:\n    {canary!r}\n",
}


@pytest.mark.parametrize(("leak", "failed"), [("logs", 1), ("prints", 1), ("logs later", 1), ("keeps", 0)])
def test_the_suite_looks_out_for_secrets(leak: str, failed: int, tmp_path: Path) -> None:
    (tmp_path / "test_leak.py").write_text(LEAKS[leak].format(canary=CANARY), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == failed, done.stdout
    assert ("shows a secret" in done.stdout) == bool(failed)
