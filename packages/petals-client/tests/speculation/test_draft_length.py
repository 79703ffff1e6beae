"""Draft lengths follow what trips cost and what holds: they pay, and where nothing pays there are none."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from petals_client.speculation.draft_length import (
    MAX_DRAFTS,
    MIN_GAIN,
    NO_DRAFTS,
    PROBE_SHARE,
    DraftLength,
    Offer,
    RowOutcome,
    TripCost,
)

SECONDS = st.floats(1e-4, 1.0)
RATES = st.floats(0.0, 0.99)


class World:
    """A swarm whose trips take ``base_s``, each column more ``column_s`` and each draft ``draft_s``.

    Servers take ``preparing_s`` more when a number of columns comes for the first time, which ``elapsed_s`` leaves out.
    """

    def __init__(self, *, base_s: float, column_s: float, draft_s: float, rate: float, seed: int, noise: float = 0.0):
        self.base_s, self.column_s, self.draft_s, self.rate, self.noise = base_s, column_s, draft_s, rate, noise
        self.random = random.Random(seed)
        self.preparing_s = 0.0
        self.are_prepared: set[int] = set()
        self.lengths = DraftLength()
        self.elapsed_s = 0.0
        self.num_tokens = 0
        self.widths: list[int] = []

    def step(self) -> None:
        offer = Offer(sources=("model",), max_drafts=MAX_DRAFTS, is_free=False)
        choice = self.lengths.choose(1, [offer])
        width = choice.num_drafts
        if width:
            self.lengths.note_drafting("model", 1, width, width * self.draft_s, is_probe=choice.is_probe)
        held = 0
        while held < width and self.random.random() < self.rate:
            held += 1
        trip_s = (self.base_s + width * self.column_s) * (1 + self.noise * self.random.random())
        preparing_s = 0.0 if width in self.are_prepared else self.preparing_s
        self.are_prepared.add(width)
        outcomes = [RowOutcome(source="model", num_held=held, has_failed=held < width)] if width else []
        self.lengths.note_trip(1, width, trip_s + preparing_s, outcomes)
        self.elapsed_s += trip_s + width * self.draft_s
        self.num_tokens += held + 1
        self.widths.append(width)

    def best_rate(self) -> float:
        """Tokens per second of the best fixed number of drafts."""
        rates = []
        for width in range(MAX_DRAFTS + 1):
            tokens = sum(self.rate**index for index in range(width + 1))
            rates.append(tokens / (self.base_s + width * (self.column_s + self.draft_s)))
        return max(rates)


@settings(max_examples=25)
@example(base_s=1.0, column=0.97, draft=0.0, rate=0.9, noise=0.5, seed=4)
@given(
    base_s=SECONDS, column=RATES, draft=RATES, rate=RATES, noise=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99)
)
def test_never_much_slower_than_without(
    base_s: float, column: float, draft: float, rate: float, noise: float, seed: int
) -> None:
    world = World(base_s=base_s, column_s=column * base_s, draft_s=draft * base_s, rate=rate, seed=seed, noise=noise)
    for _ in range(600):
        world.step()
    plain_s = world.num_tokens * base_s * (1 + noise / 2)
    assert world.elapsed_s <= plain_s / 0.95


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.9])
@pytest.mark.parametrize(("column_s", "draft_s"), [(0.0, 0.001), (0.002, 0.001), (0.01, 0.005)])
def test_close_to_the_best_number(rate: float, column_s: float, draft_s: float) -> None:
    world = World(base_s=0.1, column_s=column_s, draft_s=draft_s, rate=rate, seed=1, noise=0.2)
    for _ in range(1000):
        world.step()
    assert world.num_tokens / world.elapsed_s * 1.1 >= 0.9 * world.best_rate()


def test_drafts_that_never_hold_are_given_up_but_for_a_few_probes() -> None:
    world = World(base_s=0.01, column_s=0.001, draft_s=0.001, rate=0.0, seed=0)
    for _ in range(100):
        world.step()
    num_early = sum(map(bool, world.widths))
    before_s = world.elapsed_s
    for _ in range(2000):
        world.step()
    assert num_early < 20
    assert 0 < sum(map(bool, world.widths)) - num_early < 120, "it never looked again, or all the time"
    assert world.elapsed_s - before_s < 2000 * 0.01 * (1 + 2 * PROBE_SHARE)
    world.rate = 0.95
    for _ in range(1500):
        world.step()
    assert sum(world.widths[-200:]) > 200, "it did not find out that drafts hold now"


def test_servers_that_have_to_prepare_themselves_do_not_spoil_what_pays() -> None:
    world = World(base_s=0.0115, column_s=0.0005, draft_s=0.004, rate=0.75, seed=0)
    world.preparing_s = 0.3
    for _ in range(400):
        world.step()
    assert sum(world.widths[-100:]) > 100


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_servers_that_have_to_prepare_themselves_do_not_make_drafts_look_good(rate: float) -> None:
    world = World(base_s=0.0115, column_s=0.0005, draft_s=0.004, rate=rate, seed=0)
    world.preparing_s = 0.3
    for _ in range(200):
        world.step()
    assert world.elapsed_s <= 1.05 * world.num_tokens * world.base_s


@pytest.mark.parametrize("draft_s", [0.05, 0.2])
def test_a_slow_beginning_is_looked_at_again(draft_s: float) -> None:
    world = World(base_s=0.01, column_s=0.0005, draft_s=draft_s, rate=0.75, seed=0)
    for _ in range(100):
        world.step()
    assert not any(world.widths[-50:]), "drafts that take so long are not worth it"
    world.draft_s = 0.001
    for _ in range(round(2 * 2 * draft_s / (PROBE_SHARE * world.base_s)) + 4000):
        world.step()
    assert sum(world.widths[-100:]) > 100


def test_what_a_probe_takes_is_saved_for_first() -> None:
    world = World(base_s=0.01, column_s=0.0, draft_s=0.0001, rate=0.0, seed=0)
    for _ in range(1000):
        world.step()
    offer = Offer(sources=("model",), max_drafts=MAX_DRAFTS, is_free=False)

    def wait() -> int:
        num_waiting = 0
        while not (choice := world.lengths.choose(1, [offer])).num_drafts:
            world.lengths.note_trip(1, 0, 0.01, [])
            num_waiting += 1
        assert choice.is_probe
        return num_waiting

    wait()
    world.lengths.note_drafting("model", 1, 2, 0.1, is_probe=True, is_typical=False)
    assert wait() >= 0.09 / (PROBE_SHARE * 0.01)
    world.lengths.note_drafting("model", 1, 8, 0.1, is_typical=False)  # asked for, and no probe
    assert wait() < 0.09 / (PROBE_SHARE * 0.01)


@given(
    durations=st.lists(st.tuples(st.integers(0, MAX_DRAFTS), SECONDS), min_size=1, max_size=20),
    held=st.integers(0, 30),
    failed=st.integers(0, 30),
    drafting_s=SECONDS,
    max_drafts=st.integers(0, 20),
)
def test_what_is_chosen_is_expected_to_pay(
    durations: list[tuple[int, float]], held: int, failed: int, drafting_s: float, max_drafts: int
) -> None:
    lengths, cost = DraftLength(), TripCost()
    for num_drafts, duration_s in [*durations, *durations]:
        lengths.note_trip(1, num_drafts, duration_s, ())
        cost.note(num_drafts + 1, duration_s)
    lengths.note_trip(1, 1, durations[-1][1], [RowOutcome(source="a", num_held=held, has_failed=False)] * (held > 0))
    cost.note(2, durations[-1][1])
    for _ in range(failed):
        lengths.note_trip(2, 1, 1.0, [RowOutcome(source="a", num_held=0, has_failed=True)])
    lengths.note_drafting("a", 1, 1, drafting_s)
    offer = Offer(sources=("a",), max_drafts=max_drafts, is_free=False)
    choice = lengths.choose(1, [offer])
    assert choice.num_drafts <= min(max_drafts, MAX_DRAFTS)
    if choice == NO_DRAFTS:
        return
    rate = lengths.chance(offer)
    gain = sum(rate**index for index in range(choice.num_drafts + 1))
    price = (cost.duration_s(choice.num_drafts + 1) + choice.num_drafts * drafting_s) / cost.duration_s(1)
    plain_s = 2 * sum(duration_s for num_drafts, duration_s in durations if not num_drafts)
    is_probe = price * cost.duration_s(1) - cost.duration_s(1) <= PROBE_SHARE * plain_s * (1 + 1e-9)
    assert is_probe or gain >= MIN_GAIN * price * (1 - 1e-9)


@given(first_s=SECONDS, durations=st.lists(st.tuples(st.integers(1, 17), SECONDS), max_size=50))
def test_more_columns_are_never_expected_to_be_cheaper(first_s: float, durations: list[tuple[int, float]]) -> None:
    cost = TripCost()
    for num_columns, duration_s in [(1, first_s), (1, first_s), *durations]:
        cost.note(num_columns, duration_s)
    expected = [cost.duration_s(num_columns) for num_columns in range(1, 18)]
    assert expected == sorted(expected)
    assert expected[0] > 0
    longest_s = max(first_s, *(duration_s for num_columns, duration_s in durations if num_columns == 1), 0.0)
    assert expected[-1] <= 17 * longest_s * (1 + 1e-9)


def test_rows_side_by_side_hold_together() -> None:
    lengths = DraftLength(priors={"a": 0.5, "b": 0.25})
    assert lengths.chance(Offer(sources=("a", "b", "a"), max_drafts=1, is_free=True)) == 0.0625
    for _ in range(2):
        lengths.note_trip(3, 0, 0.1, ())
    assert lengths.choose(2, [Offer(sources=("a", "a"), max_drafts=9, is_free=True)]) == NO_DRAFTS, "of other batches"
    offers = [
        Offer(sources=("b",) * 3, max_drafts=9, is_free=True),
        Offer(sources=("a",) * 3, max_drafts=9, is_free=True),
    ]
    assert lengths.choose(3, offers).index == 1
