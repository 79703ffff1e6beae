"""Who is used and who is not: several models in one swarm, impostors, and those who do not know the swarm's key.

What nodes of the directory refuse (forged, altered, expired and repeated) is tested in ``petals-dht/tests``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_core.addresses import Address
from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.errors import AuthenticationError, NoPeersError, VersionMismatchError
from petals_core.identity import Identity
from petals_core.net.tls import listener_context
from petals_core.swarm_key import SwarmKey
from petals_core.testing.factories import make_checkpoint
from petals_core.wire.hello import MAGIC, NONCE_BYTES
from petals_dht.directory import Directory

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
PROMPT = torch.tensor([[3, 40, 5, 60, 7]])


@contextmanager
def distributed(folder: Path, swarm: Any, **settings: Any) -> Iterator[Any]:
    options = ClientOptions.make(initial_peers=swarm.initial_peers, **settings)
    model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=swarm.initial_peers, options=options)
    try:
        yield model
    finally:
        model.close()


def check_exact(model: Any, folder: Path) -> set[Any]:
    """See that the model continues as the local one does; return the peers that it asked."""
    local = AutoModelForCausalLM.from_pretrained(folder).eval()
    with model.inference_session(max_length=20) as session:
        assert torch.equal(model.generate(PROMPT, **GREEDY), local.generate(PROMPT, **GREEDY))
        return {hop.peer_id for step in session.trace() for hop in step.hops}


async def close(server: asyncio.Server) -> None:
    server.close()


def announce(
    swarm: Any, identity: Identity, imitated: Any, start: int, end: int, *, address: Address | None = None
) -> None:
    """Announce blocks of the imitated server's model at its address or another, under another identity."""
    now_s = time.time()
    announcement = Announcement(
        model_name=imitated.model.name,
        fingerprint=imitated.model.fingerprint,
        num_blocks=imitated.model.num_blocks,
        start=start,
        end=end,
        addresses=(address or imitated.address,),
        state="online",
        torch_dtype="float32",
        issued_at_s=now_s,
        expires_at_s=now_s + 60,
        inference_tokens_per_s=1e6,
    )

    async def tell() -> None:
        peers = [Address.parse(peer) for peer in swarm.initial_peers]
        async with await Directory.connect(peers, identity=identity) as directory:
            await directory.announce(SignedAnnouncement.sign(announcement, identity))

    swarm.run(tell())


def test_two_models_in_one_swarm(new_swarm: Any, checkpoints: Any) -> None:
    swarm = new_swarm()
    peers = {
        family: {swarm.add(checkpoints(family), start, end).peer_id for start, end in ((0, 3), (3, 6))}
        for family in ("llama", "bloom")
    }
    for family, own in peers.items():
        with distributed(checkpoints(family), swarm) as model:
            assert check_exact(model, checkpoints(family)) == own


def test_two_checkpoints_of_one_name_do_not_mix(new_swarm: Any, checkpoints: Any, tmp_path: Path) -> None:
    swarm = new_swarm()
    other = make_checkpoint(tmp_path / "tiny-llama", "llama", num_blocks=6, seed=1)
    for folder in (checkpoints("llama"), other):
        own = {swarm.add(folder, start, end).peer_id for start, end in ((0, 2), (2, 6))}
        with distributed(folder, swarm) as model:
            assert check_exact(model, folder) == own


def test_who_answers_in_the_place_of_another_is_not_used(new_swarm: Any, checkpoints: Any) -> None:
    swarm = new_swarm()
    folder = checkpoints("llama")
    server = swarm.add(folder, 0, 4)
    announce(swarm, Identity.ephemeral(), server, 0, 6)
    with distributed(folder, swarm) as model, pytest.raises(AuthenticationError, match=r"answers there, expected"):
        model.generate(PROMPT, **GREEDY)
    rest = swarm.add(folder, 4, 6)
    with distributed(folder, swarm) as model:
        assert check_exact(model, folder) == {server.peer_id, rest.peer_id}


def test_a_server_of_another_protocol_version_is_named(new_swarm: Any, checkpoints: Any) -> None:
    swarm = new_swarm()
    folder = checkpoints("llama")
    server = swarm.add(folder, 0, 4)
    identity = Identity.ephemeral()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(MAGIC + (8).to_bytes(2, "big") + (9).to_bytes(2, "big") + bytes(NONCE_BYTES))
        await reader.read()
        writer.close()

    stranger = swarm.run(asyncio.start_server(greet, "127.0.0.1", 0, ssl=listener_context(identity)))
    try:
        announce(swarm, identity, server, 4, 6, address=Address(*stranger.sockets[0].getsockname()))
        with (
            distributed(folder, swarm) as model,
            pytest.raises(VersionMismatchError, match=rf"server {identity.peer_id.short} .* versions? 8"),
        ):
            model.generate(PROMPT, **GREEDY)
    finally:  # or the swarm's loop would wait for it when it is closed
        swarm.run(close(stranger))
    assert server.num_sessions == 0


def test_a_private_swarm_serves_only_who_knows_its_key(new_swarm: Any, checkpoints: Any, tmp_path: Path) -> None:
    key = SwarmKey.generate()
    (tmp_path / "key").write_text(key.secret.hex())
    swarm = new_swarm(swarm_key=key)
    folder = checkpoints("llama")
    server = swarm.add(folder, 0, 6)
    with distributed(folder, swarm, swarm_key_file=tmp_path / "key") as model:
        assert check_exact(model, folder) == {server.peer_id}
    (tmp_path / "other").write_text(SwarmKey.generate().secret.hex())
    for path in (None, tmp_path / "other"):
        with (
            pytest.raises(NoPeersError, match="same swarm key"),
            distributed(folder, swarm, swarm_key_file=path, connect_timeout_s=0.5) as model,
        ):
            model.generate(PROMPT, **GREEDY)
    assert server.num_sessions == 0
