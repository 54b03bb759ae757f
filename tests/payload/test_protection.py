"""Signatures, seals and checksums: changed, moved and forged payloads are rejected, and nonces never repeat."""

from __future__ import annotations

import ast
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachebus
from cachebus.messages import CacheConfigurationError, CacheSerializationError
from cachebus.payload.format import binding
from cachebus.payload.pipeline import PayloadPipeline
from cachebus.payload.sealing import Nonces, Sealer, Signer

from .pipelines import EXAMPLE, MASTER_KEY, SIGNING_KEY, pipeline


def reason(made: PayloadPipeline, payload: Any, key: str = "k") -> str:
    with pytest.raises(CacheSerializationError) as refused:
        made.decode(key, payload)
    return refused.value.reason


@pytest.mark.parametrize("protection", ["checksum", "signed", "sealed", "signed and sealed"])
@pytest.mark.parametrize("serializer", ["msgpack", "json", "pickle"])
def test_every_changed_bit_and_every_missing_byte_is_noticed(serializer: str, protection: str) -> None:
    made = pipeline(serializer, protection, compression="zlib", threshold=0)
    payload = made.encode("k", {"a": (1, "x" * 50)})
    for place in range(len(payload)):
        for bit in range(8):
            changed = bytearray(payload)
            changed[place] ^= 1 << bit
            reason(made, bytes(changed))
        reason(made, payload[:place])
        reason(made, payload[:place] + payload[place + 1 :])
    reason(made, payload + b"\x00")


@pytest.mark.parametrize("protection", ["signed", "sealed"])
def test_a_payload_belongs_to_its_key_its_namespace_and_its_tenant(protection: str) -> None:
    def made(**options: Any) -> PayloadPipeline:
        return pipeline(protection=protection, **options)

    payload = made(namespace="a:b").encode("c", EXAMPLE)
    expected = {"signed": "signature", "sealed": "seal"}[protection]
    assert reason(made(namespace="a:b"), payload, "d") == expected
    assert reason(made(namespace="a"), payload, "b:c") == expected
    if protection == "sealed":
        other = Sealer({"k1": MASTER_KEY}, tenant="other")
        assert reason(made(namespace="a:b", sealer=other), payload, "c") == expected


@given(st.lists(st.text(), min_size=3, max_size=3), st.lists(st.text(), min_size=3, max_size=3))
def test_no_two_places_are_bound_alike(one: list[str], other: list[str]) -> None:
    def bound(parts: list[str]) -> bytes:
        tenant, namespace, key = (part.encode("utf-8", "replace").decode() for part in parts)
        return binding(tenant, namespace, key)

    cleaned = [[part.encode("utf-8", "replace") for part in parts] for parts in (one, other)]
    assert (bound(one) == bound(other)) == (cleaned[0] == cleaned[1])


def test_without_protection_nothing_is_taken_where_it_is_demanded_and_none_can_be_taken_off() -> None:
    signed, sealed = pipeline(protection="signed"), pipeline(protection="sealed")
    plain = pipeline().encode("k", 1)
    for made in (signed, sealed, pipeline(protection="checksum")):
        assert reason(made, plain) == "protection"
        stripped = bytearray(made.encode("k", 1))
        stripped[3] = 0
        assert reason(made, bytes(stripped)) == "protection"
        reason(pipeline(), bytes(stripped))
    assert reason(sealed, signed.encode("k", 1)) == "protection"
    assert reason(pipeline(protection="signed and sealed"), sealed.encode("k", 1)) == "protection"


class Bomb:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_run_before_its_signature_is_verified(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    ours = pipeline("pickle")
    theirs = pipeline("pickle", signer=Signer([MASTER_KEY]))
    signed = theirs.encode("k", Bomb(trap))
    forged = [
        signed,
        ours.encode("other", Bomb(trap)),
        signed[:4] + signed[36:],
        b"\x01p-\x00" + signed[36:],
        b"\x01p-\x02" + bytes(32) + signed[36:],
        b"\x01p-\x04" + signed[36:],
        signed[36:],
    ]
    for payload in forged:
        reason(ours, payload)
        reason(pipeline("msgpack"), payload)
        reason(pipeline("auto"), payload)
        assert not trap.exists()
    # Proof that the test can fail: a payload signed with the right key, for this cache key, is executed.
    ours.decode("k", ours.encode("k", Bomb(trap)))
    assert trap.exists()


def test_pickle_does_not_exist_without_signing_keys() -> None:
    with pytest.raises(CacheConfigurationError, match=r"pickle.*signing keys"):
        PayloadPipeline("pickle")
    with pytest.raises(CacheConfigurationError, match=r"pickle.*signing keys"):
        PayloadPipeline("pickle", sealer=Sealer({"k1": MASTER_KEY}))


@pytest.mark.parametrize("size", [0, 1, 16, 31])
def test_short_keys_are_refused_everywhere(size: int) -> None:
    for make in (
        lambda: Signer([bytes(size)]),
        lambda: Signer([SIGNING_KEY]).rotate(bytes(size)),
        lambda: Sealer({"k1": bytes(size)}),
        lambda: Sealer({"k1": MASTER_KEY}).rotate("k2", bytes(size)),
    ):
        with pytest.raises(CacheConfigurationError, match=f"at least 32 bytes, not {size}"):
            make()


def test_rotating_with_live_traffic_loses_nothing() -> None:
    for protection in ("signed", "sealed"):
        made = pipeline(protection=protection)
        stop = threading.Event()
        failed: list[Any] = []

        def traffic(made: PayloadPipeline = made, stop: threading.Event = stop, failed: list[Any] = failed) -> None:
            kept = made.encode("k", 0)
            while not stop.is_set():
                try:
                    assert made.decode("k", made.encode("k", 1)) == 1
                    assert made.decode("k", kept) == 0
                except Exception as error:
                    failed.append(error)

        threads = [threading.Thread(target=traffic) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(50):
            made.rotate_key(bytes([number]) * 32, f"n{number}" if protection == "sealed" else None)
        stop.set()
        for thread in threads:
            thread.join()
        assert failed == []


def test_a_key_id_is_given_once_and_names_the_key_that_seals() -> None:
    made = pipeline(protection="sealed")
    with pytest.raises(CacheConfigurationError, match="is already used by another key"):
        made.rotate_key(bytes(32), "k1")
    made.rotate_key(bytes(32), "k2")
    payload = made.encode("k", 1)
    assert payload[4:7] == b"\x02k2"
    chosen = pipeline(
        protection="sealed", sealer=Sealer({"k1": MASTER_KEY, "k2": bytes(32)}, key_id="k2", tenant="shop")
    )
    assert chosen.encode("k", 1)[4:7] == b"\x02k2"
    assert chosen.decode("k", payload) == 1
    with pytest.raises(CacheConfigurationError, match="no encryption key has the id 'k9'"):
        Sealer({"k1": MASTER_KEY}, key_id="k9")


def test_a_million_nonces_of_eight_threads_are_all_different() -> None:
    nonces = Nonces()
    drawn: list[list[bytes]] = [[] for _ in range(8)]

    def draw(into: list[bytes]) -> None:
        into.extend(nonces.next() for _ in range(125_000))

    threads = [threading.Thread(target=draw, args=(each,)) for each in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [nonce for each in drawn for nonce in each]
    assert len(set(everything)) == len(everything) == 1_000_000
    assert {len(nonce) for nonce in everything} == {12}


def test_after_2_to_the_32_nonces_there_are_new_random_bytes() -> None:
    nonces = Nonces()
    first = nonces.next()
    pid, prefix, counter = nonces._state
    assert prefix == first[:8]
    nonces._state = (pid, prefix, type(counter)(2**32 - 1))
    assert nonces.next() == prefix + b"\xff\xff\xff\xff"
    assert nonces.next()[:8] != prefix
    assert nonces.next()[8:] == b"\x00\x00\x00\x01"


def _draw(nonces: Nonces, pipe: Any) -> None:
    pipe.send([nonces.next() for _ in range(1000)])


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_the_child_of_a_fork_has_nonces_of_its_own() -> None:
    nonces = Nonces()
    nonces.next()
    fork = multiprocessing.get_context("fork")
    near, far = fork.Pipe()
    child = fork.Process(target=_draw, args=(nonces, far))
    child.start()
    theirs = near.recv()
    child.join()
    assert not set(theirs) & {nonces.next() for _ in range(1000)}


def test_the_same_value_is_never_sealed_alike() -> None:
    made = pipeline(protection="sealed")
    assert made.encode("k", 1) != made.encode("k", 1)


def test_secrets_are_in_no_repr_and_no_error() -> None:
    canary = b"canary-canary-canary-canary-canary-canary"
    signer, sealer = Signer([canary]), Sealer({"k1": canary}, tenant="t")
    made = PayloadPipeline("pickle", signer=signer, sealer=sealer)
    shown = [repr(each) for each in (signer, sealer, made)]
    for act in (
        lambda: made.rotate_key(canary[:20]),
        lambda: made.rotate_key(canary[:20], "k2"),
        lambda: made.rotate_key(canary, "k1"),
        lambda: made.decode("k", b"\x01p-\x06" + bytes(100)),
    ):
        with pytest.raises((CacheConfigurationError, CacheSerializationError)) as refused:
            act()
        shown += [str(refused.value), repr(refused.value), repr(refused.value.__cause__)]
    assert not [text for text in shown if "canary" in text or "63616e617279" in text]


def test_signatures_are_compared_in_constant_time_only() -> None:
    folder = Path(cachebus.__file__).parent
    compared = []
    for file in folder.glob("payload_s*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                compared += (
                    [f"{file.name}:{node.lineno}"] if names & {"signature", "mac", "_mac", "tag", "digest"} else []
                )
    assert compared == []
    assert "hmac.compare_digest" in (folder / "payload/sealing.py").read_text(encoding="utf-8")
