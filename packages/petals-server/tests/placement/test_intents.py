from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from petals_server.placement.coverage import Coverage, Placed
from petals_server.placement.intents import (
    MAX_PROPOSAL_S,
    SETTLE_S,
    Intent,
    find_yielding,
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
def test_movers_that_do_not_all_see_each_other_leave_no_block_dark(
    starts: list[int], times: list[tuple[int, float, float]], data: st.DataObject
) -> None:
    """The protocol with every delay that it allows: an announcement is seen by all when announcing has returned, and by
    some before."""
    num_blocks, length = 10, 3
    events: list[tuple[float, int, int]] = []
    begun: set[int] = set()
    for which, at_s, took_s in times:
        number = which % len(starts)
        if number not in begun:
            begun.add(number)
            events += [(at_s, 0, number), (at_s + took_s, 1, number), (at_s + took_s + SETTLE_S, 2, number)]
    announced: dict[int, Intent] = {}
    in_flight: dict[int, Intent] = {}
    seen_before: dict[int, set[bytes]] = {}
    gone: set[int] = set()

    def read(reader: int) -> dict[int, Intent]:
        """All that was announced, and any of what is being announced."""
        early = {number: each for number, each in in_flight.items() if data.draw(st.booleans())}
        return {number: each for number, each in {**early, **announced}.items() if number != reader}

    def others(reader: int, intents: dict[int, Intent], staying: set[bytes]) -> Coverage:
        return Coverage(
            num_blocks,
            [
                Placed(
                    peer_id=b"%d" % number,
                    start=start,
                    end=start + length,
                    tokens_per_s=1,
                    is_steady=number not in intents or b"%d" % number in staying,
                )
                for number, start in enumerate(starts)
                if number != reader and number not in gone
            ],
        )

    for at_s, phase, number in sorted(events):
        me = Placed(peer_id=b"%d" % number, start=starts[number], end=starts[number] + length, tokens_per_s=1)
        if phase == 0:
            seen_before[number] = {each.peer_id for each in read(number).values()}
            in_flight[number] = Intent(
                peer_id=me.peer_id,
                start=0,
                end=1 + 8 * number,  # regions of their own: only the sources rival
                issued_at_s=at_s,
                source=(me.start, me.end),
            )
        elif phase == 1:
            announced[number] = in_flight.pop(number)
        else:
            intents = read(number)
            mine = announced[number]
            staying = find_yielding(mine, intents.values(), seen_before=seen_before[number])
            if holds(mine, intents.values()) and may_leave(
                me, (8, 9), others(number, intents, staying), min_witnesses=1, reloads=True
            ):
                gone.add(number)
                announced[number] = replace(mine, source=(0, 0), has_left=True)
            else:
                del announced[number]

    def held(numbers: Iterable[int]) -> set[int]:
        return {block for number in numbers for block in range(starts[number], starts[number] + length)}

    assert held(set(range(len(starts))) - gone) == held(range(len(starts)))


def test_of_two_that_could_both_go_one_goes() -> None:
    rivals = [replace(intent(name, 8, 10, 5.0), source=(0, 2)) for name in "ab"]
    going = [each for each in rivals if holds(each, rivals)]
    assert len(going) == 1
    (other,) = (each for each in rivals if each is not going[0])
    assert find_yielding(going[0], rivals, seen_before=()) == {other.peer_id}
    assert find_yielding(going[0], rivals, seen_before=(other.peer_id,)) == set()
    assert find_yielding(other, rivals, seen_before=()) == set()
