from hypothesis import given
from hypothesis import strategies as st

from petals_server.placement.coverage import Coverage, Offer, Placed
from petals_server.placement.moves import MoveCost, MoveRules, consider_move
from petals_server.placement.repair import plan_repair

RULES = MoveRules()


def swarm(starts: list[int], length: int) -> list[Placed]:
    return [
        Placed(peer_id=b"%d" % number, start=start, end=start + length, tokens_per_s=1.0)
        for number, start in enumerate(starts)
    ]


def repair_all(servers: list[Placed], num_blocks: int) -> tuple[list[Placed], int]:
    """Let servers move one after another, and see that none leaves a block dark that was held."""
    num_moves = 0
    while True:
        for number, me in enumerate(servers):
            others = [other for other in servers if other is not me]
            move = consider_move(
                Coverage(num_blocks, others),
                me,
                [Offer(num_blocks=me.end - me.start, tokens_per_s=1.0)],
                cost=MoveCost(fixed_s=1.0, new_block_s=1.0),
                stayed_s=0.0,
                num_moving=0,
                rules=RULES,
                servers=others,
            )
            if move is None or not move.is_repair:
                continue
            before = Coverage(num_blocks, servers)
            servers = list(servers)
            servers[number] = Placed(peer_id=me.peer_id, start=move.start, end=move.end, tokens_per_s=1.0)
            after = Coverage(num_blocks, servers)
            assert not (after.is_dark & ~before.is_dark).any()
            num_moves += 1
            break
        else:
            return servers, num_moves


def test_neighbours_shift_like_beads_where_no_server_is_to_spare() -> None:
    servers, num_moves = repair_all(swarm([0, 2, 4, 9], 3), 12)
    assert [server.start for server in servers] == [0, 3, 6, 9]
    assert num_moves >= 2


def test_a_server_to_spare_goes_where_it_is_dark() -> None:
    servers, num_moves = repair_all(swarm([0, 0, 3, 3, 6], 3), 12)
    assert not Coverage(12, servers).is_dark.any()
    assert num_moves == 1


@given(st.lists(st.integers(0, 9), min_size=4, max_size=6))
def test_servers_that_can_hold_all_blocks_come_to_hold_them(starts: list[int]) -> None:
    servers, num_moves = repair_all(swarm(starts, 3), 12)
    assert not Coverage(12, servers).is_dark.any()
    assert num_moves <= 2 * len(starts)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_the_plan_holds_as_many_blocks_as_can_be(starts: list[int]) -> None:
    servers = swarm(starts, 2)
    plan = plan_repair(servers, 6)
    held = {block for start in plan.values() for block in (start, start + 1)}
    assert len(held) == min(6, 2 * len(servers))
