"""Server processes that choose their blocks themselves: ``forked_servers.py MODEL PEER COUNT NUM_BLOCKS``.

What takes long to import is imported once, then each server is a process of its own. Prints their process ids; when
its input ends all are killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback

import torch

import petals_server.assembly  # noqa: F401
from petals_core.addresses import Address
from petals_core.errors import PetalsError
from petals_core.identity import Identity
from petals_core.net.loop import run
from petals_server.config import ServerConfig
from petals_server.loading import load_model, open_model
from petals_server.server import Server


async def serve(config: ServerConfig) -> None:
    await Server.start(config)
    await asyncio.Event().wait()


def main(model: str, peer: str, count: int, num_blocks: int) -> None:
    torch.set_num_threads(1)
    fixed = ServerConfig(model=model, torch_dtype="float32", num_threads=1, cache_tokens=16)
    load_model(open_model(fixed, None), 0, 1, fixed)  # imports what is imported only then
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                config = ServerConfig(
                    model=model,
                    num_blocks=num_blocks,
                    host="127.0.0.1",
                    port=0,
                    identity=Identity.ephemeral(),
                    initial_peers=(Address.parse(peer),),
                    torch_dtype="float32",
                    num_threads=1,
                    cache_tokens=8192,
                )
                run(serve(config))
            except (PetalsError, OSError):
                traceback.print_exc()
            finally:
                os._exit(1)
        pids.append(pid)
    print(*pids, flush=True)
    sys.stdin.read()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
