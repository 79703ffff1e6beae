"""What servers compute for clients is signed by both, and who contributes gets more: real servers on loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_client.swarm import Swarm
from petals_core.announcement import OBSERVED_ID_BYTES
from petals_core.errors import RemoteFailureError
from petals_core.identity import Identity
from petals_server.contribution.weights import weigh
from petals_server.testing import InProcessSwarm

PROMPT = torch.tensor([[5, 6, 7, 8]])
NEW_TOKENS = 12
NUM_STEPS = NEW_TOKENS - 1  # the last token is not sent back


def connect(folder: Path, swarm: InProcessSwarm, **settings: Any) -> Any:
    options = ClientOptions.make(initial_peers=swarm.initial_peers, **settings)
    return AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[], options=options)


def generate(model: Any) -> None:
    model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)


def swarm_of(model: Any) -> Swarm:
    found: Swarm = model.remote_blocks.chain._swarm
    return found


def test_receipts_bring_a_weight(
    checkpoints: Callable[[str], Path], new_swarm: Callable[..., InProcessSwarm], tmp_path: Path
) -> None:
    folder, swarm = checkpoints("llama"), new_swarm()
    giving = swarm.add(folder, 0, 3, receipts=tmp_path / "giving.bin")
    preferring = swarm.add(folder, 3, 6, receipts=tmp_path / "preferring.bin", prefer_contributors=True)
    for _ in range(2):
        stranger = connect(folder, swarm)
        generate(stranger)
        assert swarm_of(stranger).contribution.weights == {}
        stranger.close()
    for server in (giving, preferring):
        receipts = server._desk._book.receipts
        assert [each.statement.block_tokens for each in receipts] == [3 * (PROMPT.shape[1] + NUM_STEPS)] * 2
        assert len({each.client_id for each in receipts}) == 2
        assert all(each.server_signature is not None and each.server_id == server.peer_id for each in receipts)
    # Clients tell what they saw of servers' speed, and servers announce it.
    beginnings = {server.peer_id.digest[:OBSERVED_ID_BYTES] for server in (giving, preferring)}
    assert preferring._desk.votes.keys() == beginnings
    assert {beginning for beginning, _ in preferring._describe(1.0, 2.0).observed} == beginnings

    # Who has failed since it was last of use is not asked to sign.
    stranger = connect(folder, swarm)
    generate(stranger)

    async def blame(client: Swarm) -> None:
        client.blame(giving.peer_id, RemoteFailureError("said for the test's sake"))

    stranger.remote_blocks.chain.run(blame)
    stranger.close()
    assert [len(server._desk._book.receipts) for server in (giving, preferring)] == [2, 3]

    # The same owner's client: it is known by another id than the server, and always by the same.
    for _ in range(2):
        contributor = connect(folder, swarm, identity=giving.config.identity, receipts=tmp_path / "giving.bin")
        generate(contributor)
        client = swarm_of(contributor)
        client_id = client._dialer.peer_id
        contributor.close()
        given = sum(each.statement.block_tokens for each in giving._desk._book.receipts[:2])
        taken = preferring.ledger.block_tokens_of(client_id)
        assert client_id not in {giving.peer_id, preferring.peer_id}
        assert client.contribution.weights[preferring.peer_id] == preferring._desk.weight(client_id)
        assert preferring._desk.weight(client_id) >= weigh(given, taken) > 1.0
        assert giving._desk.weight(client_id) == 1.0  # it prefers nobody
    assert preferring.ledger.num_peers == 4


def test_an_identity_is_made_where_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "client.key"
    first, second = (ClientOptions.make(initial_peers=["127.0.0.1:1"], identity=path) for _ in range(2))
    assert first.identity is not None
    assert second.identity is not None
    assert first.identity.derived("client").peer_id == second.identity.derived("client").peer_id
    held = Identity.load(path)  # as by a running server
    assert ClientOptions.make(initial_peers=["127.0.0.1:1"], identity=path).identity is not None
    held.release()
