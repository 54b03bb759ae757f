"""A row of `make bench` is judged by the median of what stood side by side, by the clock and the bar that it names."""

from __future__ import annotations

import pytest

from benchmarks.timing import Bar, Contender, Row, measure


def row(bar: Bar, ours: list[float], theirs: list[float]) -> Row:
    mine, peer = Contender("cachebus", print), Contender("peer", print)
    mine.times["wall"], peer.times["wall"] = ours, theirs
    return Row("row", mine, [peer], [bar])


@pytest.mark.parametrize(
    ("bar", "ratio", "good"),
    [
        (Bar("peer", at_most=0.5), 0.5, True),
        (Bar("peer", at_most=0.5), 0.51, False),
        (Bar("peer", at_least=4), 0.25, True),
        (Bar("peer", at_least=4), 0.26, False),
        (Bar("peer"), 100.0, True),
    ],
)
def test_a_bar_is_a_share_of_the_time_or_a_multiple_of_the_rate(bar: Bar, ratio: float, good: bool) -> None:
    assert bar.reached(ratio) is good


def test_a_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    judged = row(Bar("peer", at_least=2), [1.0, 1.0, 9.0], [2.0, 3.0, 9.0])
    assert judged.ratio(judged.peers[0]) == 0.5
    assert str(judged.bar(judged.peers[0])) == ">= 2x rate"


def test_every_contender_is_timed_in_every_round_by_both_clocks() -> None:
    done: list[str] = []
    contenders = [Contender(name, lambda _, name=name: done.append(name)) for name in ("cachebus", "peer")]  # type: ignore[misc]
    measure(Row("row", contenders[0], contenders[1:]), operations=1, rounds=3)
    # The first pair warms up, and each begins as often as the other.
    assert done == ["cachebus", "peer", "cachebus", "peer", "peer", "cachebus", "cachebus", "peer"]
    assert [len(rounds) for each in contenders for rounds in each.times.values()] == [3, 3, 3, 3]
