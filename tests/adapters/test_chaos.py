from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cachebus.actors.ports import BatchStore, Capabilities, Gauges, InlineStore
from cachebus.adapters.chaos import ChaosCounts, ChaosStore
from cachebus.adapters.null import NullStore
from cachebus.messages import (
    CacheBackendError,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CacheTimeoutError,
    CapabilityError,
    Delete,
    Deleted,
    Failed,
    Get,
    Increment,
    Incremented,
    Ping,
    Reply,
    Request,
    WrongType,
)


class Ledger:
    """A batch store that writes down what it did."""

    name = "ledger"
    capabilities = Capabilities(counters=True, max_key_bytes=250)

    def __init__(self) -> None:
        self.done: list[str] = []
        self.batches = 0
        self.opened = 0
        self.error: CacheError | None = None

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.opened -= 1

    def gauges(self) -> Gauges:
        return Gauges(entries=len(self.done))

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        if self.error is not None:
            raise self.error
        self.batches += 1
        self.done.extend(request.key for request in batch if isinstance(request, Increment))
        return [Incremented(len(request.key)) for request in batch if isinstance(request, Increment)]


class Sundial:
    """A clock that stands still, and writes down until when somebody slept."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        self.monotonic: Callable[[], float] = lambda: self.now
        self.wall: Callable[[], float] = lambda: self.now

    async def sleep_until(self, instant: float) -> None:
        self.slept.append(instant - self.now)


def operations(count: int) -> list[Increment]:
    return [Increment("x" * length) for length in range(1, count + 1)]


async def outcomes(chaos: ChaosStore, batches: int = 200, size: int = 3) -> list[object]:
    """What became of each batch: the class of the error, or for each operation whether it was done."""
    seen: list[object] = []
    for _ in range(batches):
        try:
            replies = await chaos.execute(operations(size))
        except CacheError as error:
            seen.append(type(error))
        else:
            seen.append(tuple(not isinstance(reply, Failed) for reply in replies))
    return seen


async def test_without_rates_it_only_hands_on() -> None:
    inner, clock = Ledger(), Sundial()
    chaos = ChaosStore(inner, seed=1, clock=clock)
    assert isinstance(chaos, BatchStore)
    assert not isinstance(chaos, InlineStore)
    assert await chaos.execute(operations(3)) == [Incremented(1), Incremented(2), Incremented(3)]
    assert (inner.done, inner.batches, clock.slept) == (["x", "xx", "xxx"], 1, [])
    assert chaos.counts == ChaosCounts(batches=1, operations=3)
    assert chaos.name == "chaos+ledger"
    assert chaos.capabilities is inner.capabilities
    assert chaos.gauges() == Gauges(entries=3)
    await chaos.open()
    assert inner.opened == 1
    await chaos.close()
    assert inner.opened == 0


async def test_an_outage_fails_every_batch_and_nothing_is_done() -> None:
    inner = Ledger()
    chaos = ChaosStore(inner, seed=1, failure_rate=1.0)
    assert await outcomes(chaos, 10) == [CacheConnectionError] * 10
    assert inner.done == []
    assert chaos.counts == ChaosCounts(batches=10, operations=30, failed_batches=10)
    chaos.failure_rate = 0.0
    assert await outcomes(chaos, 2) == [(True, True, True)] * 2


async def test_a_batch_fails_as_often_as_the_rate_says() -> None:
    chaos = ChaosStore(Ledger(), seed=1, failure_rate=0.25)
    failed = (await outcomes(chaos, 2000)).count(CacheConnectionError)
    assert failed == chaos.counts.failed_batches
    assert 400 < failed < 600


async def test_single_operations_fail_and_the_others_are_done() -> None:
    inner = Ledger()
    chaos = ChaosStore(inner, seed=1, operation_failure_rate=0.25)
    failed = 0
    for _ in range(500):
        inner.done.clear()
        replies = await chaos.execute(operations(4))
        kept = [
            request.key for request, reply in zip(operations(4), replies, strict=True) if isinstance(reply, Incremented)
        ]
        assert inner.done == kept
        assert [reply for reply in replies if isinstance(reply, Incremented)] == [Incremented(len(key)) for key in kept]
        for reply in replies:
            if isinstance(reply, Failed):
                failed += 1
                assert isinstance(reply.error(), CacheConnectionError)
    assert chaos.counts == ChaosCounts(batches=500, operations=2000, failed_operations=failed)
    assert 400 < failed < 600


async def test_when_every_operation_fails_the_store_is_not_asked() -> None:
    inner = Ledger()
    replies = await ChaosStore(inner, seed=1, operation_failure_rate=1.0).execute(operations(3))
    assert all(isinstance(reply, Failed) for reply in replies)
    assert (len(replies), inner.batches) == (3, 0)


async def test_a_lost_reply_is_lost_after_all_was_done() -> None:
    inner = Ledger()
    chaos = ChaosStore(inner, seed=1, lost_reply_rate=1.0)
    with pytest.raises(
        CacheTimeoutError, match=r"^chaos\+ledger: no reply, although the batch was carried out, within 0 s$"
    ):
        await chaos.execute(operations(2))
    assert inner.done == ["x", "xx"]
    assert chaos.counts == ChaosCounts(batches=1, operations=2, lost_replies=1)
    chaos.lost_reply_rate = 0.25
    lost = (await outcomes(chaos, 2000)).count(CacheTimeoutError)
    assert 400 < lost < 600
    assert len(inner.done) == 2 + 3 * 2000


async def test_a_delay_lies_between_its_bounds_and_comes_before_everything() -> None:
    clock = Sundial()
    chaos = ChaosStore(Ledger(), seed=1, delay=(0.25, 0.75), failure_rate=1.0, clock=clock)
    await outcomes(chaos, 200)
    assert len(clock.slept) == chaos.counts.delays == chaos.counts.failed_batches == 200
    assert 0.25 <= min(clock.slept) < 0.3
    assert 0.7 < max(clock.slept) <= 0.75


def wrong_type(sentence: str) -> CacheError:
    return WrongType(f"made here: {sentence}")


@pytest.mark.parametrize("error", [CacheBackendError, wrong_type])
async def test_the_error_is_the_one_that_was_asked_for(error: Callable[[str], CacheError]) -> None:
    expected = type(error("x"))
    with pytest.raises(expected, match="chaos: the batch failed and was not carried out"):
        await ChaosStore(Ledger(), seed=1, failure_rate=1.0, error=error).execute(operations(1))
    (reply,) = await ChaosStore(Ledger(), seed=1, operation_failure_rate=1.0, error=error).execute(operations(1))
    assert isinstance(reply, Failed)
    assert type(reply.error()) is expected


async def test_the_same_seed_does_the_same_and_another_one_does_not() -> None:
    def chaos(seed: int) -> ChaosStore:
        return ChaosStore(
            Ledger(), seed=seed, failure_rate=0.2, operation_failure_rate=0.2, lost_reply_rate=0.2, delay=(0.1, 0.2),
            clock=Sundial(),
        )  # fmt: skip

    story = await outcomes(chaos(1))
    assert await outcomes(chaos(1)) == story
    assert await outcomes(chaos(2)) != story
    assert {CacheConnectionError, CacheTimeoutError, (True, True, True)} <= set(story)


async def test_one_rate_does_not_change_what_another_one_hits() -> None:
    def failed(story: list[object]) -> list[int]:
        return [number for number, each in enumerate(story) if each is CacheConnectionError]

    alone = await outcomes(ChaosStore(Ledger(), seed=1, failure_rate=0.2))
    together = await outcomes(
        ChaosStore(
            Ledger(), seed=1, failure_rate=0.2, lost_reply_rate=0.5, operation_failure_rate=0.5, delay=(0.0, 1.0),
            clock=Sundial(),
        )
    )  # fmt: skip
    assert failed(alone) == failed(together) != []


async def test_an_inline_store_is_asked_verb_by_verb() -> None:
    class Strict(NullStore):
        def verb(self, kind: type[Request[Any]]) -> Callable[[Any], Reply] | None:
            return self.refuse if kind is Increment else super().verb(kind)

        def refuse(self, request: Increment) -> Reply:
            raise WrongType(f"{request.key} is no number")

    chaos = ChaosStore(Strict(), seed=1)
    deleted, wrong, unknown = await chaos.execute([Delete("a"), Increment("b"), Ping()])
    assert deleted == Deleted(0)
    assert isinstance(wrong, Failed)
    assert isinstance(unknown, Failed)
    assert str(wrong.error()) == "b is no number"
    assert type(unknown.error()) is CapabilityError
    assert await chaos.execute([]) == []
    await chaos.execute([Get("a")])
    assert chaos.gauges().misses == 1


async def test_an_error_of_the_inner_store_is_raised_as_it_is() -> None:
    inner = Ledger()
    inner.error = CacheBackendError("out of memory", "ledger")
    with pytest.raises(CacheBackendError, match="out of memory"):
        await ChaosStore(inner, seed=1).execute(operations(3))


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("option", ["failure_rate", "operation_failure_rate", "lost_reply_rate"])
def test_a_rate_is_a_probability(option: str, rate: float) -> None:
    options: dict[str, Any] = {option: rate}
    with pytest.raises(CacheConfigurationError, match=f"{option}: expected a probability from 0 to 1, not {rate}"):
        ChaosStore(Ledger(), seed=1, **options)


@pytest.mark.parametrize("delay", [(-1.0, 0.0), (2.0, 1.0), (0.0, float("inf")), (0.0, float("nan"))])
def test_a_delay_has_a_shortest_and_a_longest(delay: tuple[float, float]) -> None:
    with pytest.raises(CacheConfigurationError, match="delay: expected 0 <= shortest <= longest"):
        ChaosStore(Ledger(), seed=1, delay=delay)


def test_it_shows_what_it_did() -> None:
    assert repr(ChaosStore(NullStore(), seed=1)).startswith("<ChaosStore around <NullStore 0 misses>, ChaosCounts(")
