"""Whether a peer can be reached from outside: finding it out for another one, and asking others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from petals_core.addresses import Address
from petals_core.errors import PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.swarm_key import SwarmKey
from petals_dht.contacts import Contact, node_id
from petals_dht.messages import CheckReachable, Reached
from petals_dht.node import Node
from petals_dht.protocol import Reach

CHECK_TIMEOUT_S = 8.0
"""For a peer to see whether it can connect to another one."""
_CONNECT_TIMEOUT_S = 5.0
_MAX_CHECKERS = 3
_CHECKERS_PATIENCE_S = 0.25
"""How long at least nodes may take that are to be asked."""


@dataclass(frozen=True, slots=True)
class Reachability:
    """What other peers say about this one."""

    observed_host: str | None
    """Where our datagrams come from, as others see it."""
    is_reachable: bool | None
    """Whether somebody could connect to the port; None if nobody could be asked."""
    reason: str
    """Why not, in one line; empty if reachable."""


def dial_back(identity: Identity, swarm_key: SwarmKey | None) -> Reach:
    """A ``Reach`` that connects, goes through the whole hello and hangs up.

    Each check has a dialer of its own, so that a connection which is open already proves nothing.
    """

    async def reach(host: str, port: int, peer_id: PeerId) -> str:
        from petals_core.net.dialer import Dialer  # TLS takes a while to import, and few nodes are ever asked.

        dialer = Dialer(identity=identity, swarm_key=swarm_key, connect_timeout_s=_CONNECT_TIMEOUT_S)
        try:
            await dialer.connect([Address(host, port)], peer_id=peer_id)
        except PetalsError as error:
            return error.message
        finally:
            await dialer.close()
        return ""

    return reach


async def check_reachable(node: Node, port: int, peer_id: PeerId) -> Reachability:
    """Let up to three peers try to connect to this machine at TCP ``port`` and to meet ``peer_id`` there.

    The first that could decides. Nobody is waited for longer than 8 s.
    """
    nearest = await node.nearest_nodes(node_id(peer_id), min_patience_s=_CHECKERS_PATIENCE_S)

    async def ask(contact: Contact, token: bytes) -> Reached | None:
        answer = await node.protocol.call(
            contact.address,
            CheckReachable(token=token, port=port, peer_id=peer_id.digest),
            destination=contact.id,
            timeout_s=CHECK_TIMEOUT_S,
            num_attempts=1,
        )
        return answer.response if answer is not None and isinstance(answer.response, Reached) else None

    answers: list[Reached] = []
    asking = [asyncio.create_task(ask(contact, token)) for contact, token in nearest[:_MAX_CHECKERS]]
    try:
        for coming in asyncio.as_completed(asking):
            answer = await coming
            if answer is None:
                continue
            if answer.is_reachable:
                return Reachability(node.observed_host(), True, "")
            answers.append(answer)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    observed = node.observed_host()
    tried = [answer for answer in answers if answer.is_reachable is not None]
    if tried:
        return Reachability(observed, False, tried[0].reason)
    return Reachability(observed, None, answers[0].reason if answers else "no other peer could be asked")
