from petals_server.placement.coverage import Coverage, Placed
from petals_server.placement.intents import Intent
from petals_server.placement.joining import choose_together
from petals_server.placement.observation import MIN_TRUST, lower_votes, trust
from petals_server.placement.offers import Ability


def test_servers_that_start_at_once_take_different_blocks() -> None:
    joining = [Intent(peer_id=b"%d" % number, start=0, end=3, issued_at_s=7.0) for number in range(4)]
    ability = Ability(max_blocks=3, block_tokens_per_s=300, min_blocks=3)
    windows = [
        choose_together(Coverage(12), joining, ability, peer_id=each.peer_id, tokens_per_s=100) for each in joining
    ]
    assert sorted(window.start for window in windows) == [0, 3, 6, 9]


def test_newcomers_choose_by_what_is_there() -> None:
    settled = Coverage(6, [Placed(peer_id=b"old", start=0, end=3, tokens_per_s=1)])
    joining = [Intent(peer_id=b"new", start=0, end=3, issued_at_s=7.0)]
    ability = Ability(max_blocks=3, block_tokens_per_s=3, min_blocks=3)
    window = choose_together(settled, joining, ability, peer_id=b"new", tokens_per_s=1)
    assert (window.start, window.end) == (3, 6)


def test_offers_are_limited_by_computing_or_by_the_line() -> None:
    ability = Ability(max_blocks=10, block_tokens_per_s=1000, link_tokens_per_s=120)
    assert [offer.num_blocks for offer in ability.offers] == [10, 9, 8, 7]
    assert [round(offer.tokens_per_s) for offer in ability.offers] == [100, 111, 120, 120]
    assert [offer.num_blocks for offer in ability.some_offers(8, (0.0, 0.99))] == [10, 8, 7]
    assert [offer.num_blocks for offer in Ability(max_blocks=1, block_tokens_per_s=5).offers] == [1]


def test_a_few_observers_condemn_nobody_and_friends_of_a_liar_gain_nothing() -> None:
    assert trust([]) == 1.0
    assert trust([0.1]) == 1.0
    assert trust([0.1, 0.1, 0.1]) == 0.1
    assert trust([5.0] * 9) == 1.0
    honest, lying = [0.1, 0.12, 0.09, 0.11, 0.1, 0.1], [1.0, 1.0]
    assert trust(honest + lying) <= 0.12
    assert trust([0.0] * 9) == MIN_TRUST


def test_of_two_sources_the_worse_counts() -> None:
    clients, timed = {b"a" * 8: 0.5, b"b" * 8: 0.9}, {b"a" * 8: 1.0, b"b" * 8: 0.2, b"c" * 8: 0.7}
    assert lower_votes(clients, timed) == [(b"b" * 8, 0.2), (b"a" * 8, 0.5), (b"c" * 8, 0.7)]
    assert lower_votes({}, {}) == []
