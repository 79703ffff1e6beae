"""Real server processes choose their blocks, are killed, and fill each other's gaps while a client generates.

``tools/self_healing.py`` does it with the public commands, and tells how long it takes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_core.addresses import Address
from petals_core.announcement import SignedAnnouncement
from petals_dht.directory import Directory
from petals_server.testing import InProcessSwarm

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
NUM_SERVERS, NUM_BLOCKS = 6, 3
PROMPT = torch.tensor([[5, 6, 7, 8]])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TIMEOUT_S = 100.0


@contextmanager
def forked(peer: str, folder: Path) -> Iterator[list[int]]:
    """The processes of servers that start at once."""
    script = Path(__file__).with_name("forked_servers.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(DEMO), peer, str(NUM_SERVERS), str(NUM_BLOCKS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PETALS_DATA_DIR": str(folder), "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield [int(pid) for pid in process.stdout.readline().split()]
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(30)


class Lookout:
    """Sees which blocks are held, as announced."""

    def __init__(self, swarm: InProcessSwarm) -> None:
        self._swarm = swarm
        self._peers = [Address.parse(peer) for peer in swarm.initial_peers]

    async def _find(self, directory: Directory) -> list[SignedAnnouncement]:
        found = [await directory.find_servers(model.fingerprint) for model in await directory.list_models()]
        return [each for each in itertools.chain(*found) if each.announcement.state == "online"]

    def wait(self, count: int, *, without: frozenset[int] = frozenset()) -> list[SignedAnnouncement]:
        """Wait until so many servers are there, ports ``without`` left out, and together hold all blocks."""

        async def look() -> list[SignedAnnouncement]:
            async with asyncio.timeout(TIMEOUT_S), await Directory.connect(self._peers) as directory:
                while True:
                    found = [
                        each
                        for each in await self._find(directory)
                        if each.announcement.addresses[0].port not in without
                    ]
                    held = {block for each in found for block in range(each.announcement.start, each.announcement.end)}
                    if len(found) >= count and len(held) == 8:
                        return found
                    await asyncio.sleep(0.2)

        return asyncio.run(look())


def ports_of(pids: list[int]) -> dict[int, int]:
    """The process that listens on each port."""
    import psutil

    return {
        connection.laddr.port: pid
        for pid in pids
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes can't be forked here")
def test_killed_servers_are_made_up_for_while_a_client_generates(tmp_path: Path) -> None:
    swarm = InProcessSwarm()
    lookout = Lookout(swarm)
    try:
        with forked(swarm.initial_peers[0], tmp_path) as pids:
            servers = lookout.wait(NUM_SERVERS)
            # The two without whom most blocks are dark.
            spans = {
                each.announcement.addresses[0].port: set(range(each.announcement.start, each.announcement.end))
                for each in servers
            }
            killed = min(
                itertools.combinations(spans, 2),
                key=lambda two: len(set().union(*(span for port, span in spans.items() if port not in two))),
            )
            options = ClientOptions.make(initial_peers=swarm.initial_peers, recovery_timeout_s=TIMEOUT_S)
            model = AutoDistributedModelForCausalLM.from_pretrained(
                DEMO, initial_peers=[], options=options, dtype=torch.float32
            )
            tokens, healed = PROMPT, threading.Event()
            processes = ports_of(pids)

            def wait_until_healed() -> None:
                lookout.wait(NUM_SERVERS - 2, without=frozenset(killed))
                healed.set()

            watcher = threading.Thread(target=wait_until_healed)
            with torch.inference_mode(), model.inference_session(max_length=1024):
                while not healed.is_set() or tokens.shape[1] < 60:
                    new = model.generate(tokens if tokens is PROMPT else None, max_new_tokens=4, **GREEDY)
                    tokens = torch.cat([tokens, new[:, -4:]], dim=1)
                    if tokens.shape[1] == 20:
                        for port in killed:
                            os.kill(processes[port], signal.SIGKILL)
                        watcher.start()
                    assert tokens.shape[1] < 1000 or healed.is_set()
            watcher.join()
            model.close()
        local = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        with torch.inference_mode():
            expected = local.generate(PROMPT, max_new_tokens=tokens.shape[1] - PROMPT.shape[1], **GREEDY)
        assert torch.equal(tokens, expected)
    finally:
        swarm.close()
