"""What shares a turn, how prompts are cut beside sessions that decode, and whom the device waits for."""

from __future__ import annotations

import pytest

from petals_core.errors import CacheLostError
from petals_server.scheduling.pace import MIN_BULK_TOKENS, Pace
from petals_server.scheduling.plan import Plan, Take
from petals_server.scheduling.request import Request, Urgency
from petals_server.scheduling.scheduler import MAX_TURNS_LEFT_OUT, Scheduler, Wait
from petals_server.scheduling.shares import Shares


def scheduler(**changes: float) -> Scheduler:
    speeds = {"decode_tokens_per_s": 20.0, "bulk_tokens_per_s": 400.0} | changes
    return Scheduler(Shares(), Pace(max_turn_tokens=512, **speeds))


def request(
    num_tokens: int = 1, *, key: str | None = "span", urgency: Urgency | None = None, **more: object
) -> Request:
    if urgency is None:
        urgency = Urgency.DECODE if num_tokens <= 16 else Urgency.BULK
    return Request(urgency=urgency, num_tokens=num_tokens, arrived_s=0.0, deadline_s=None, key=key, **more)  # type: ignore[arg-type]


def planned(plan: Plan | Wait) -> list[tuple[Request, int]]:
    assert isinstance(plan, Plan)
    return [(part.request, part.num_tokens) for part in plan.parts]


def test_all_that_decode_share_a_turn_and_a_prompt_rides_along_in_chunks() -> None:
    server = scheduler()
    decoding, prompt = [request() for _ in range(8)], request(1000)
    for each in (prompt, *decoding):
        server.add(each, 0.0)
    plan = server.plan(0.0)
    parts = dict(planned(plan))
    assert set(parts) == {prompt, *decoding}
    assert MIN_BULK_TOKENS <= parts[prompt] < 100  # what takes about as long as the turn does without it
    assert isinstance(plan, Plan)
    assert server.absorb(plan, 0.1, 0.1) == decoding
    assert prompt.num_tokens_left == 1000 - parts[prompt]


def test_a_prompt_alone_gets_whole_turns() -> None:
    server = scheduler()
    server.add(prompt := request(1000), 0.0)
    counts = []
    for turn in range(2):
        plan = server.plan(float(turn))
        counts += [count for _, count in planned(plan)]
        assert isinstance(plan, Plan)
        server.absorb(plan, 0.5, turn + 0.5)
    assert counts == [512, 488]
    assert prompt not in server
    assert server.plan(9.0) == Wait(until_s=None)


def test_requests_without_a_key_and_of_other_keys_have_turns_of_their_own() -> None:
    server = scheduler()
    first, alone, other = request(key="a"), request(key=None), request(key="b")
    for each in (first, alone, other):
        server.add(each, 0.0)
    seen = []
    for turn in range(3):
        plan = server.plan(float(turn))
        seen.append([each for each, _ in planned(plan)])
        assert isinstance(plan, Plan)
        server.absorb(plan, 0.01, turn + 0.01)
        server.remove(alone) if seen[-1] == [alone] else None
    assert sorted(map(len, seen)) == [1, 1, 1]


def test_bulk_that_can_not_join_is_not_starved() -> None:
    server = scheduler()
    server.add(forward := request(100, key=None), 0.0)
    for turn in range(MAX_TURNS_LEFT_OUT + 1):
        server.add(request(), float(turn))
        plan = server.plan(float(turn))
        if planned(plan)[0][0] is forward:
            break
        assert isinstance(plan, Plan)
        server.absorb(plan, 0.01, turn + 0.01)
    assert turn == MAX_TURNS_LEFT_OUT


@pytest.mark.parametrize("urgency", [Urgency.BULK, Urgency.TRAINING])
def test_what_has_turns_of_its_own_is_cut_for_those_who_decode(urgency: Urgency) -> None:
    server = scheduler()
    server.add(work := request(1000, key=None, urgency=urgency), 0.0)
    assert planned(server.plan(0.0)) == [(work, 512)]
    sizes = []
    for turn in range(20):
        server.add(request(session="decoding"), 0.1 * turn)
        plan = server.plan(0.1 * turn)
        sizes += [count for each, count in planned(plan) if each is work]
        assert isinstance(plan, Plan)
        server.absorb(plan, 0.1, 0.1 * turn + 0.1)
    assert sizes
    assert all(MIN_BULK_TOKENS <= size < 100 for size in sizes)


class Picky(Request):
    """Finds no room as long as it is told so."""

    has_room: bool | None = False

    def take(self, count: int) -> Take | None:
        if self.has_room is None:
            raise CacheLostError("gone")
        return super().take(count) if self.has_room else None


def test_what_finds_no_room_waits_and_lets_no_later_prompt_pass() -> None:
    server = scheduler()
    options = {"urgency": Urgency.BULK, "num_tokens": 50, "deadline_s": None, "key": "span"}
    first, second = (Picky(arrived_s=arrived_s, **options) for arrived_s in (0.0, 1.0))  # type: ignore[arg-type]
    second.has_room = True
    for each in (first, second):
        server.add(each, 1.0)
    assert isinstance(server.plan(1.0), Wait)
    assert first.is_blocked
    first.has_room = True
    assert [each for each, _ in planned(server.plan(2.0))] == [first, second]
    first.has_room = None
    assert [each for each, _ in planned(server.plan(3.0))] == [second]
    assert [each for each, _ in server.failures] == [first]


@pytest.mark.parametrize(("turnaround_s", "is_waited_for"), [(0.002, True), (0.1, False)])
def test_the_device_waits_for_those_who_come_back_at_once(turnaround_s: float, is_waited_for: bool) -> None:
    server, sessions, now_s = scheduler(), ["one", "other"], 0.0
    for _ in range(4):
        for session in sessions:
            server.add(request(session=session), now_s)
        plan = server.plan(now_s)
        assert len(planned(plan)) == 2
        assert isinstance(plan, Plan)
        server.absorb(plan, 0.05, now_s + 0.05)
        now_s += 0.05 + turnaround_s
    server.add(request(session="one"), now_s)
    waits = server.plan(now_s)
    assert isinstance(waits, Wait) is is_waited_for
    if isinstance(waits, Wait):
        assert waits.until_s is not None
        assert now_s < waits.until_s <= now_s + 0.05
        assert len(planned(server.plan(waits.until_s))) == 1  # and not for ever
        server.pace.forget("other")
    assert len(planned(server.plan(now_s))) == 1


@pytest.mark.parametrize("delay_s", [0.01, 0.05, 0.2])
def test_sessions_that_step_together_come_together_again_after_delays(delay_s: float) -> None:
    server, turn_s, sizes, now_s = scheduler(), 0.08, [], 0.0
    arrivals = dict.fromkeys(range(4), 0.0)
    for turn in range(48):
        for session, time_s in sorted(arrivals.items(), key=lambda item: item[1]):
            if time_s <= now_s:
                server.add(request(session=session), time_s)
                del arrivals[session]
        while isinstance(plan := server.plan(now_s), Wait):
            now_s = min(arrivals.values()) if plan.until_s is None else min(plan.until_s, *arrivals.values())
            for session in [each for each, time_s in arrivals.items() if time_s <= now_s]:
                server.add(request(session=session), now_s)
                del arrivals[session]
        sizes.append(len(plan.parts))
        arrivals = {session: time_s + 0.03 for session, time_s in arrivals.items()}  # a busy device slows down the rest
        now_s += turn_s
        for done in server.absorb(plan, turn_s, now_s):
            assert isinstance(done.session, int)
            slow_s = delay_s * done.session if turn == 8 else 0.0
            arrivals[done.session] = now_s + 0.002 * (1 + done.session) + slow_s
    assert sizes[:9] == [4] * 9
    assert sizes[-8:] == [4] * 8


def test_pace_follows_what_turns_take() -> None:
    pace = Pace(decode_tokens_per_s=20, bulk_tokens_per_s=100, max_turn_tokens=512)
    slow = pace.bulk_tokens(8, 0.0)
    for turn in range(30):
        pace.note_turn(num_decode=8, num_bulk=0, seconds=0.1, decoded=["one"], now_s=float(turn))
        pace.note_turn(num_decode=8, num_bulk=50, seconds=0.15, decoded=["one"], now_s=float(turn))
    assert pace.decode_turn_s(8) == pytest.approx(0.1)
    assert pace.bulk_tokens(8, 30.0) == pytest.approx(100, abs=2) != slow  # 1 ms each, as long as the turn itself
    assert pace.bulk_tokens(0, 29.5) < 512  # who decoded a moment ago will be back
    assert pace.bulk_tokens(0, 29.5, {"two"}) < 512
    assert pace.bulk_tokens(0, 29.5, {"one", "two"}) == 512  # both have prompts now
    assert pace.bulk_tokens(0, 40.0) == 512


def test_nobody_is_held_up_by_a_prompt_of_his_own() -> None:
    """A conversation goes on, or a session is computed again: its last step was a moment ago."""
    server = scheduler()
    for session in ("chat", "other"):
        server.add(request(session=session), 0.0)
    plan = server.plan(0.0)
    assert isinstance(plan, Plan)
    server.absorb(plan, 0.05, 0.1)
    server.add(request(400, session="chat"), 0.2)
    assert planned(server.plan(0.2))[0][1] < 100, "the other one comes back"
    server.pace.forget("other")
    assert planned(server.plan(0.2))[0][1] == 400
