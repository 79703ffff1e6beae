from dataclasses import replace

from petals_server.placement.coverage import Coverage, Offer, Placed
from petals_server.placement.moves import Move, MoveCost, MoveRules, check_interval_s, consider_move, is_settled

RULES = MoveRules()


def server(name: str, start: int, end: int, speed: float = 1.0) -> Placed:
    return Placed(peer_id=name.encode(), start=start, end=end, tokens_per_s=speed)


LOPSIDED = [server(f"left {number}", 0, 4) for number in range(7)] + [
    server(f"right {number}", 4, 8) for number in range(3)
]
ME = LOPSIDED[0]


def decide(servers: list[Placed], me: Placed, rules: MoveRules = RULES, **changes: float) -> Move | None:
    facts = {"cost_s": 100.0, "stayed_s": 1e5, "num_moving": 0, **changes}
    return consider_move(
        Coverage(8, [other for other in servers if other is not me]),
        me,
        [Offer(num_blocks=4, tokens_per_s=1.0)],
        cost=MoveCost(fixed_s=facts["cost_s"], new_block_s=1.0),
        stayed_s=facts["stayed_s"],
        num_moving=int(facts["num_moving"]),
        rules=rules,
    )


def test_a_server_moves_from_where_there_are_many_to_where_there_are_few() -> None:
    move = decide(LOPSIDED, ME)
    assert move is not None
    assert (move.start, move.end, move.is_repair, move.min_witnesses) == (4, 8, False, 2)
    assert move.gain > 0


def test_nobody_moves_in_a_balanced_swarm() -> None:
    balanced = LOPSIDED[:3] + LOPSIDED[7:]
    assert is_settled(Coverage(8, balanced), RULES)
    assert decide(balanced, balanced[0]) is None


def test_a_move_must_be_worth_the_time_it_takes() -> None:
    assert decide(LOPSIDED, ME, cost_s=1e7) is None


def test_a_server_stays_for_a_while_unless_it_is_urgent() -> None:
    calm = replace(RULES, urgent_balance=0.1)
    assert decide(LOPSIDED, ME, calm, stayed_s=RULES.min_stay_s - 1) is None
    assert decide(LOPSIDED, ME, calm, stayed_s=RULES.min_stay_s) is not None
    assert decide(LOPSIDED, ME, stayed_s=RULES.min_urgent_stay_s) is not None


def test_only_so_many_move_at_once() -> None:
    assert decide(LOPSIDED, ME, num_moving=1) is None


def test_the_last_but_one_holder_of_a_block_stays() -> None:
    few = [server("a", 0, 4), server("b", 0, 4), server("c", 4, 8, 0.5)]
    assert decide(few, few[0]) is None


def test_a_slower_server_that_nobody_believes_is_no_reason_to_stay() -> None:
    liars = [replace(other, tokens_per_s=0.05) for other in LOPSIDED[7:]]
    move = decide([*LOPSIDED[:7], *liars], ME)
    assert move is not None
    assert move.start == 4


def test_servers_of_a_large_swarm_look_more_seldom() -> None:
    assert check_interval_s(6, base_s=15) == 3
    assert check_interval_s(25, base_s=15) == 7.5
    assert check_interval_s(250, base_s=15) == 15
    assert check_interval_s(10_000, base_s=15) == 600
