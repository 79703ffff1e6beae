"""What contributing brings: the share of a contributor's client and of a stranger's on a busy server.

    python tools/bench_contribution.py                       # about two minutes
    python tools/bench_contribution.py --given 400000 --seconds 5

Real processes and no invented receipts. A contributor's server computes for some clients, which sign for it. Then two
clients keep another server busy, each with as many requests under way: that of the contributor, which is started with
the identity of his server, and a stranger's. Once without ``--prefer-contributors``, once with it.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import argparse
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import local_swarm
from petals_client.options import ClientOptions
from petals_client.swarm_chain import SwarmChain
from petals_core.identity import Identity, receipts_path
from petals_core.models.checkpoint import Checkpoint
from petals_core.receipts import Receipt, split_file
from petals_core.testing.factories import make_checkpoint

NUM_BLOCKS, WIDTH = 12, 256
ROW_TOKENS = 128
ROWS = 2
REQUESTS = 2
"""Under way at once of each client, so that both always wait; of more, some would be left out for so many turns that
they go first, whoever asked."""
_READY_TIMEOUT_S = 120.0
_WEIGHT_TIMEOUT_S = 20.0
_SERVING = re.compile(r"^serving .* --initial-peers (\S+)")


class Client:
    """A client that may use one server, with forward requests in threads of their own."""

    def __init__(self, model: Path, peer: str, server: Identity, identity: Path | None = None) -> None:
        options = ClientOptions.make(
            initial_peers=[peer], allowed_servers=(str(server.peer_id),), identity=identity, compression="none"
        )
        self.chain = SwarmChain.connect(Checkpoint.open(model), options, dtype="float32")
        self.num_tokens = 0
        self._server = server.peer_id
        self._hidden = torch.randn(ROWS * ROW_TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
        self._is_stopped = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def request(self) -> None:
        """One request, computed by the server."""
        self.chain.forward(self._hidden, start=0, end=NUM_BLOCKS, row_tokens=(ROW_TOKENS,) * ROWS, position_runs=None)
        with self._lock:
            self.num_tokens += ROWS * ROW_TOKENS

    def start(self) -> None:
        """Make requests until it is stopped."""
        self._threads = [threading.Thread(target=self._run) for _ in range(REQUESTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Make no more."""
        self._is_stopped = True
        for thread in self._threads:
            thread.join()
        self.chain.close()
        if self._error is not None:
            raise self._error

    @property
    def weight(self) -> float | None:
        """What the server said of its weight; None: nothing was said."""
        swarm = self.chain._swarm
        return None if swarm is None else swarm.contribution.weights.get(self._server)

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self.request()
        except BaseException as error:
            self._error = error


def give(model: Path, swarm: local_swarm.LocalSwarm, key: Path, block_tokens: int) -> int:
    """Let a server of the contributor compute for three clients; returns what they have signed for."""
    process = swarm.start_server(model, 0, NUM_BLOCKS, "--threads", "1", "--identity", str(key))
    process.wait_for(_SERVING, _READY_TIMEOUT_S)
    server = Identity.read(key)
    for _ in range(3):
        client = Client(model, swarm.address, server)
        while client.num_tokens * NUM_BLOCKS < block_tokens / 3:
            client.request()
        client.stop()
    process.stop()
    content = receipts_path(server.peer_id).read_bytes()
    receipts = [Receipt.decode(encoded, now_s=time.time()) for encoded in split_file(content)]
    return sum(each.statement.block_tokens for each in receipts if each.server_signature is not None)


def share(
    model: Path, swarm: local_swarm.LocalSwarm, folder: Path, contributor: Path, seconds: float, *options: str
) -> tuple[float, float | None, float]:
    """The contributor's share of a busy server, its weight, and tokens per second of both together."""
    key = folder / f"busy{len(options)}.key"
    process = swarm.start_server(model, 0, NUM_BLOCKS, "--threads", "1", "--identity", str(key), *options)
    process.wait_for(_SERVING, _READY_TIMEOUT_S)
    server = Identity.read(key)
    clients = [Client(model, swarm.address, server, identity) for identity in (contributor, None)]
    for client in clients:
        client.request()
    deadline_s = time.monotonic() + _WEIGHT_TIMEOUT_S
    while clients[0].weight is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for client in clients:
        client.start()
    time.sleep(1.0)
    before, began_s = [client.num_tokens for client in clients], time.monotonic()
    time.sleep(seconds)
    after, took_s = [client.num_tokens for client in clients], time.monotonic() - began_s
    weight = clients[0].weight
    for client in clients:
        client.stop()
    process.stop()
    own, others = (end - begin for begin, end in zip(before, after, strict=True))
    return own / max(1, own + others), weight, (own + others) / took_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--given", type=int, default=4_000_000, help="tokens times blocks (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="that shares are measured (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with local_swarm.stopping_in_order(), tempfile.TemporaryDirectory(prefix="petals-bench-") as temporary:
        folder = Path(temporary)
        os.environ["PETALS_DATA_DIR"] = os.environ["PETALS_CACHE_DIR"] = temporary
        variables = {"PETALS_DATA_DIR": temporary}
        model = make_checkpoint(folder / "model", num_blocks=NUM_BLOCKS, hidden_size=WIDTH, intermediate_size=4 * WIDTH)
        with local_swarm.LocalSwarm(variables) as swarm:
            swarm.start_bootstrap()
            contributor = folder / "contributor.key"
            given = give(model, swarm, contributor, options.given)
            print(f"the contributor's server has receipts for {given:,} tokens times blocks", flush=True)
            is_right = True
            for name, flags in (("without", ()), ("with", ("--prefer-contributors",))):
                part, weight, rate = share(model, swarm, folder, contributor, options.seconds, *flags)
                expected = (weight or 1.0) / ((weight or 1.0) + 1.0)
                print(
                    f"{name} --prefer-contributors: the contributor's client gets {part:.1%} of {rate:,.0f} tokens/s "
                    f"and the stranger's {1 - part:.1%}; its weight is {weight or 1.0:.2f}, that is {expected:.1%}",
                    flush=True,
                )
                is_right = is_right and abs(part - expected) < 0.08
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
