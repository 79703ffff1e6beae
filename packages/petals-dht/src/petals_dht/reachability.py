"""Finding out for another peer whether it can be reached from outside."""

from __future__ import annotations

from petals_core.addresses import Address
from petals_core.errors import PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.swarm_key import SwarmKey
from petals_dht.protocol import Reach

_CONNECT_TIMEOUT_S = 5.0


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
