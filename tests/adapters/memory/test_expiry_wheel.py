"""The timing wheel: what is due, without looking at what is not."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachebus.adapters.memory.eviction import NEVER, Entry
from cachebus.adapters.memory.expiry_wheel import DROPPED, RESOLUTION, ExpiryWheel

SPANS = (0.001, RESOLUTION, 1.0, 6.39, 6.4, 6.41, 60.0, 409.6, 3600.0, 26_214.4, 86_400.0, 1e7, 1.1e8, 1e12)


class Watched:
    """A wheel, and what it said and did."""

    def __init__(self) -> None:
        self.due: list[float] = []
        self.wheel = ExpiryWheel(self.due.append)

    def put(self, key: str, expires_at: float, now: float) -> Entry:
        entry = Entry(key, key, 1.0, expires_at)
        self.wheel.schedule(entry, now)
        return entry

    def take(self, now: float) -> list[str]:
        """What has expired, dropped as a store drops it."""
        taken: list[str] = []
        for entry in self.wheel.take_expired(now):
            entry.expires_at = DROPPED
            taken.append(entry.key)
        return taken

    def take_by_the_clock(self, now: float) -> tuple[float, list[str]]:
        """Let time pass as far as the wheel wants to be asked, and ask it."""
        due = self.wheel.due()
        assert due is not None
        now = max(now, due)
        return now, self.take(now)


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_an_empty_wheel_is_due_never(watched: Watched) -> None:
    assert watched.wheel.due() is None
    assert watched.take(1e9) == []


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("start", [0.0, 0.05, 128.0, 1e6 + 1 / 3])
def test_an_entry_is_taken_soon_after_its_time_and_never_before(watched: Watched, start: float, span: float) -> None:
    expires_at = start + span
    watched.put("key", expires_at, start)
    now, looks = start, 0
    taken: list[str] = []
    while not taken:
        now, taken = watched.take_by_the_clock(now)
        looks += 1
    assert taken == ["key"]
    assert expires_at <= now
    assert now <= expires_at + RESOLUTION + 4 * math.ulp(expires_at)
    assert looks <= 7, "it is touched a handful of times, whatever its time to live"
    assert watched.wheel.due() is None


@given(
    start=st.floats(0, 1e7),
    spans=st.lists(st.floats(0.001, 1e6) | st.sampled_from(SPANS), min_size=1, max_size=30),
    steps=st.lists(st.floats(0.01, 1e5), max_size=30),
)
def test_every_entry_is_taken_once_whenever_the_wheel_is_asked(
    start: float, spans: list[float], steps: list[float]
) -> None:
    watched = Watched()
    waiting = {str(number): start + span for number, span in enumerate(spans)}
    for key, expires_at in waiting.items():
        watched.put(key, expires_at, start)
    now = start
    for step in [*steps, 1e13]:
        now += step
        for key in watched.take(now):
            assert waiting.pop(key) <= now
        assert all(expires_at > now - RESOLUTION - math.ulp(now) for expires_at in waiting.values())
    assert not waiting


@given(place=st.integers(0, 100_000), width=st.sampled_from((6.4, 409.6, 26_214.4)), nudge=st.integers(-2, 2))
@example(place=20, width=6.4, nudge=0)  # 128.0 + 6.4 rounds to just below the slot's end.
def test_asking_at_the_very_edge_of_a_slot_comes_to_an_end(place: int, width: float, nudge: int) -> None:
    now = place * width
    expires_at = now + width
    for _ in range(abs(nudge)):
        expires_at = math.nextafter(expires_at, math.inf if nudge > 0 else 0.0)
    watched = Watched()
    watched.put("key", expires_at, now)
    assert watched.take(now) == []
    due = watched.wheel.due()
    assert due is not None
    assert due > now
    assert watched.take(expires_at + RESOLUTION * 2) == ["key"]


def test_it_says_when_the_next_expiry_has_become_an_earlier_one(watched: Watched) -> None:
    watched.put("late", 100.0, 0.0)
    watched.put("later", 5_000.0, 0.0)
    watched.put("soon", 1.05, 0.0)
    watched.put("as soon", 1.06, 0.0)
    assert watched.due == sorted(watched.due, reverse=True)
    assert len(watched.due) == 2
    assert watched.wheel.due() == watched.due[-1] == pytest.approx(1.1)


def test_an_entry_that_was_dropped_is_passed_over(watched: Watched) -> None:
    watched.put("key", 1.0, 0.0).expires_at = DROPPED
    assert watched.take(10.0) == []
    assert watched.wheel.due() is None


def test_an_entry_that_no_longer_expires_is_passed_over(watched: Watched) -> None:
    watched.put("key", 1.0, 0.0).expires_at = NEVER
    assert watched.take(10.0) == []
    assert watched.wheel.due() is None


def test_a_prolonged_entry_is_put_back_and_taken_when_it_is_due(watched: Watched) -> None:
    watched.put("key", 1.0, 0.0).expires_at = 50.0
    assert watched.take(2.0) == []
    assert watched.take(49.9) == []
    assert watched.take(50.2) == ["key"]


def test_a_shortened_entry_is_taken_once_though_it_is_in_two_slots(watched: Watched) -> None:
    entry = watched.put("key", 50.0, 0.0)
    entry.expires_at = 1.0
    watched.wheel.schedule(entry, 0.0)
    assert watched.take(2.0) == ["key"]
    assert watched.take(100.0) == []


def test_taking_can_be_given_up_in_the_middle_and_gone_on_with(watched: Watched) -> None:
    for number in range(5):
        watched.put(str(number), 1.0, 0.0)
    taken: list[str] = []
    for _ in range(5):
        entry = next(watched.wheel.take_expired(2.0))
        entry.expires_at = DROPPED
        taken.append(entry.key)
    assert sorted(taken) == list("01234")
    assert watched.take(2.0) == []
    assert watched.wheel.due() is None


def test_entries_of_one_slot_share_its_place(watched: Watched) -> None:
    for number in range(1_000):
        watched.put(str(number), 5.01 + number * 1e-5, 0.0)
    assert len(watched.wheel._slots) == 1
    assert len(watched.due) == 1


def test_there_are_few_slots_however_far_apart_the_entries_are(watched: Watched) -> None:
    for number in range(100_000):
        watched.put(str(number), 1.0 + number * 3.1, 0.0)
    assert len(watched.wheel._slots) <= 64 * 4


def test_looking_at_what_is_due_leaves_the_others_alone(watched: Watched) -> None:
    for number in range(100_000):
        watched.put(f"late {number}", 3_000.0 + number / 1_000, 0.0)
    watched.put("soon", 1.0, 0.0)
    looked = len_of_due_slots(watched, 2.0)
    assert looked == 1
    assert watched.take(2.0) == ["soon"]


def len_of_due_slots(watched: Watched, now: float) -> int:
    return sum(len(slot) for due, slot in watched.wheel._slots.items() if due <= now)


def test_it_is_crowded_when_most_of_it_must_be_leftovers(watched: Watched) -> None:
    entries = [watched.put(str(number), 10.0, 0.0) for number in range(265)]
    assert not watched.wheel.crowded(len(entries))
    assert not watched.wheel.crowded(101)
    assert watched.wheel.crowded(100)


def test_rebuilding_keeps_the_living_and_rids_it_of_the_rest(watched: Watched) -> None:
    living = [watched.put(f"living {number}", 10.0 + number, 0.0) for number in range(3)]
    for number in range(100):
        watched.put(f"dropped {number}", 5.0, 0.0).expires_at = DROPPED
    forever = Entry("forever", 1, 1.0)
    watched.wheel.rebuild([*living, forever], 1.0)
    assert watched.wheel._references == 3
    assert sorted(watched.take(1e6)) == ["living 0", "living 1", "living 2"]


def test_slots_are_taken_in_the_order_of_time(watched: Watched) -> None:
    for number in (4, 3, 6, 1, 5):
        watched.put(str(number), float(number), 0.0)
    assert watched.take(20.0) == ["1", "3", "4", "5", "6"]
    assert all(earlier > later for earlier, later in pairwise(watched.due))


def test_no_more_is_looked_at_in_one_go_than_the_budget_says(watched: Watched) -> None:
    for number in range(100):
        watched.put(str(number), 1.0, 0.0).expires_at = DROPPED if number % 2 else 1.0
    for left in range(90, -1, -10):
        for entry in watched.wheel.take_expired(2.0, 10):
            entry.expires_at = DROPPED
        assert watched.wheel._references == left
        due = watched.wheel.due()
        assert (due is None) if left == 0 else (due is not None and due <= 2.0), "there is more to do"
