"""Where a server starts, alone or with others that start at the same time."""

from __future__ import annotations

from collections.abc import Iterable

from petals_server.placement.coverage import Coverage, Offer, Placed, Window
from petals_server.placement.intents import Intent
from petals_server.placement.offers import Ability


def choose_together(
    settled: Coverage, joining: Iterable[Intent], ability: Ability, *, peer_id: bytes, tokens_per_s: float
) -> Window:
    """The place of ``peer_id``, which is one of the servers that are ``joining``: each chooses after those before it.

    Everybody who sees the same servers comes to the same places, so that servers that start at once do not all take the
    blocks that were missing when they looked. Of the others only the length that they announced is known;
    ``tokens_per_s`` is what each of them is taken for.

    Raises:
        KeyError: ``peer_id`` is not among them.
    """
    coverage = settled.copy()
    for intent in sorted(joining, key=lambda intent: intent.precedence):
        if intent.peer_id == peer_id:
            return coverage.choose_window(ability.offers)
        window = coverage.choose_window((Offer(num_blocks=intent.end - intent.start, tokens_per_s=tokens_per_s),))
        coverage.add(
            Placed(
                peer_id=intent.peer_id,
                start=window.start,
                end=window.end,
                tokens_per_s=tokens_per_s,
                is_steady=False,
            )
        )
    raise KeyError(peer_id)
