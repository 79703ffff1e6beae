from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from petals_server.placement.coverage import Coverage, Placed
from petals_server.placement.intents import (
    MAX_PROPOSAL_S,
    SETTLE_S,
    Intent,
    holds,
    may_leave,
    may_propose,
)


def intent(name: str, start: int, end: int, issued_at_s: float = 0.0) -> Intent:
    return Intent(peer_id=name.encode(), start=start, end=end, issued_at_s=issued_at_s)


def test_one_server_at_a_time_moves_into_a_region() -> None:
    assert not may_propose(intent("a", 0, 4).region, [intent("b", 1, 5)])
    assert may_propose(intent("a", 0, 4).region, [intent("b", 8, 12)])


def test_of_rivals_exactly_one_holds_whoever_looks() -> None:
    rivals = [intent(name, 0, 4, 100.0) for name in "abcd"]
    for order in permutations(rivals):
        assert sum(holds(each, order) for each in rivals) == 1


def test_precedence_changes_from_intent_to_intent() -> None:
    winners = {
        min([intent("a", 0, 4, float(when)), intent("b", 0, 4, float(when))], key=lambda each: each.precedence).peer_id
        for when in range(20)
    }
    assert winners == {b"a", b"b"}


def test_a_block_is_left_only_to_those_who_stay() -> None:
    me = Placed(peer_id=b"me", start=0, end=2, tokens_per_s=1)
    stays = Placed(peer_id=b"stays", start=0, end=2, tokens_per_s=1)
    goes = Placed(peer_id=b"goes", start=0, end=2, tokens_per_s=1, is_steady=False)
    assert may_leave(me, (4, 6), Coverage(8, [stays]), min_witnesses=1, reloads=True)
    assert not may_leave(me, (4, 6), Coverage(8, [stays]), min_witnesses=2, reloads=True)
    assert not may_leave(me, (4, 6), Coverage(8, [goes]), min_witnesses=1, reloads=True)
    assert not may_leave(me, (1, 3), Coverage(8, []), min_witnesses=1, reloads=False)
    left_of_it = Placed(peer_id=b"left", start=0, end=1, tokens_per_s=1)
    assert may_leave(me, (1, 3), Coverage(8, [left_of_it]), min_witnesses=1, reloads=False)
    assert not may_leave(me, (1, 3), Coverage(8, [left_of_it]), min_witnesses=1, reloads=True)


proposals = st.lists(
    st.tuples(st.integers(0, 7), st.floats(0, 12), st.floats(0.01, MAX_PROPOSAL_S)), min_size=2, max_size=6
)


@given(st.lists(st.integers(0, 7), min_size=2, max_size=7), proposals, st.data())
def test_movers_that_cannot_all_see_each_other_leave_no_block_dark(
    starts: list[int], times: list[tuple[int, float, float]], data: st.DataObject
) -> None:
    """The protocol with every delay that it allows: an announcement is seen by all when announcing has returned, and by
    some before."""
    num_blocks, length = 10, 3
    servers = {
        number: Placed(peer_id=b"%d" % number, start=start, end=start + length, tokens_per_s=1)
        for number, start in enumerate(starts)
    }
    events: list[tuple[float, int, int]] = []
    begun: dict[int, float] = {}
    for which, at_s, took_s in times:
        number = which % len(starts)
        if number in begun:
            continue
        begun[number] = at_s
        events += [(at_s, 0, number), (at_s + took_s, 1, number), (at_s + took_s + SETTLE_S, 2, number)]
    announced: dict[int, Intent] = {}
    in_flight: dict[int, Intent] = {}
    gone: set[int] = set()

    def seen_intents(reader: int) -> dict[int, Intent]:
        """All that were announced, and any of those that are being announced."""
        early = {number: each for number, each in in_flight.items() if number != reader and data.draw(st.booleans())}
        return {**early, **{number: each for number, each in announced.items() if number != reader}}

    def others(reader: int, intents: dict[int, Intent]) -> Coverage:
        return Coverage(
            num_blocks,
            [
                Placed(
                    peer_id=each.peer_id,
                    start=each.start,
                    end=each.end,
                    tokens_per_s=1,
                    is_steady=number not in intents,
                )
                for number, each in servers.items()
                if number != reader and number not in gone
            ],
        )

    to = (0, 3)
    held_at_first = {block for start in starts for block in range(start, start + length)}
    for at_s, phase, number in sorted(events):
        me = servers[number]
        if phase == 0:
            intents = seen_intents(number)
            if may_leave(me, to, others(number, intents), min_witnesses=1, reloads=True):
                in_flight[number] = Intent(peer_id=me.peer_id, start=0, end=3, issued_at_s=at_s)
        elif number in in_flight and phase == 1:
            announced[number] = in_flight.pop(number)
        elif number in announced and phase == 2:
            intents = seen_intents(number)
            if may_leave(me, to, others(number, intents), min_witnesses=1, reloads=True):
                gone.add(number)
            else:
                del announced[number]
    held = {block for number, each in servers.items() if number not in gone for block in range(each.start, each.end)}
    assert held == held_at_first
