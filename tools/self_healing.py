"""Servers in real processes choose their blocks, are killed, and fill each other's gaps, while a client generates.

    python tools/self_healing.py                       # 6 servers of 3 blocks on the demo model, two killed
    python tools/self_healing.py --seed 3 --model FOLDER

Servers start in any order at once, without ``--blocks``. Then two are killed (SIGKILL), chosen by chance. Prints which
blocks are held as time goes on, and how the client's generation went on; its tokens must be the local model's.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import environment

environment.enter()

import asyncio

import torch

from local_swarm import LocalSwarm, stopping_in_order
from petals_client import AutoDistributedModelForCausalLM
from petals_core.addresses import Address
from petals_core.models.architecture import block_count
from petals_core.models.checkpoint import Checkpoint
from petals_core.net.loop import run
from petals_dht.directory import Directory

_TIMEOUT_S = 240.0
_TAIL_LINES = 30


async def _look(peer: str) -> list[tuple[str, int, int, str]]:
    """(beginning of the peer id, first block, end, state) of all servers that are announced."""
    async with await Directory.connect([Address.parse(peer)]) as directory:
        models = await directory.list_models()
        found = [signed for model in models for signed in await directory.find_servers(model.fingerprint)]
    return [
        (each.peer_id.short, each.announcement.start, each.announcement.end, each.announcement.state) for each in found
    ]


class Generation:
    """A client that generates in a thread of its own."""

    def __init__(self, model: Path, peer: str, num_tokens: int) -> None:
        self.text: torch.Tensor | None = None
        self.error: BaseException | None = None
        self.times: list[float] = []
        self._model, self._peer, self._num_tokens = model, peer, num_tokens
        self._thread = threading.Thread(target=self._run, name="generation")
        self._thread.start()

    def _run(self) -> None:
        try:
            model = AutoDistributedModelForCausalLM.from_pretrained(
                str(self._model), initial_peers=[self._peer], torch_dtype=torch.float32
            )
            tokens = torch.tensor([[1, 5, 9, 3]])
            model.generation_config.eos_token_id = None
            with torch.inference_mode(), model.inference_session(max_length=len(tokens[0]) + self._num_tokens):
                for _ in range(self._num_tokens):
                    new = model.generate(tokens if tokens.shape[1] == 4 else None, max_new_tokens=1, do_sample=False)
                    tokens = torch.cat([tokens, new[:, -1:]], dim=1)
                    self.times.append(time.monotonic())
            self.text = tokens
            model.close()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=6)
    parser.add_argument("--num-blocks", type=int, default=3, help="of each server")
    parser.add_argument("--kill", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=600, help="that the client generates meanwhile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", type=Path, default=environment.ROOT / "models" / "demo", help="folder of a checkpoint"
    )
    parser.add_argument("--interval", type=float, help="--rebalance-interval of the servers (default: theirs)")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder, stopping_in_order(), LocalSwarm() as swarm:
        os.environ["PETALS_DATA_DIR"] = folder
        model = options.model
        num_blocks = block_count(Checkpoint.open(model).config)
        peer = swarm.start_bootstrap()
        began_s = time.monotonic()
        servers = [
            swarm.start(
                f"server {number}",
                "petals-server",
                *("serve", str(model), "--initial-peers", peer, "--num-blocks", str(options.num_blocks)),
                *("--port", "0", "--host", "127.0.0.1", "--threads", "1", "--torch-dtype", "float32"),
                *(() if options.interval is None else ("--rebalance-interval", str(options.interval))),
            )
            for number in range(options.servers)
        ]

        def wait_until_whole(dead: set[str]) -> None:
            last = ""
            while time.monotonic() - began_s < _TIMEOUT_S:
                live = [each for each in run(_look(peer)) if each[0] not in dead and each[3] == "online"]
                held = {block for _, start, end, _ in live for block in range(start, end)}
                line = " ".join(f"{start}:{end}" for _, start, end, _ in sorted(live, key=lambda each: each[1]))
                if line != last:
                    print(
                        f"{time.monotonic() - began_s:6.1f} s: {len(held)} of {num_blocks} blocks: {line}",
                        flush=True,
                    )
                    last = line
                if len(held) == num_blocks:
                    return
                time.sleep(0.5)
            raise SystemExit("the blocks are not all held in time")

        wait_until_whole(set())
        generation = Generation(model, peer, options.tokens)
        while len(generation.times) < 20 and generation.error is None:
            time.sleep(0.1)
        everybody = {each[0] for each in run(_look(peer))}
        began_s = time.monotonic()
        for process in rng.sample(servers, options.kill):
            process.popen.send_signal(signal.SIGKILL)
        print(f"killed {options.kill} servers", flush=True)
        time.sleep(1.0)
        dead = _unreachable(peer, everybody)
        wait_until_whole(dead)
        print(f"all blocks are held again after {time.monotonic() - began_s:.1f} s", flush=True)
        generation.join()
        if generation.error is not None:
            for process in servers:
                print(process.name, *(f"  {line.text}" for line in process.lines[-_TAIL_LINES:]), sep="\n")
            raise SystemExit(f"the client failed: {generation.error}")
        assert generation.text is not None
        gaps = [after - before for before, after in zip(generation.times, generation.times[1:], strict=False)]
        gaps.sort()
        print(
            f"the client generated {len(generation.times)} tokens without an error; between two tokens the median is "
            f"{1000 * gaps[len(gaps) // 2]:.0f} ms and the longest {gaps[-1]:.1f} s"
        )
        from transformers import AutoModelForCausalLM

        local: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
        local.generation_config.eos_token_id = None
        with torch.inference_mode():
            expected = local.generate(generation.text[:, :4], max_new_tokens=options.tokens, do_sample=False)
        is_same = torch.equal(expected[:, : generation.text.shape[1]], generation.text)
        print("tokens equal to the local model's" if is_same else "TOKENS DIFFER from the local model's")
        if not is_same:
            raise SystemExit(1)


def _unreachable(peer: str, everybody: set[str]) -> set[str]:
    """Servers that are announced and don't accept connections."""

    async def ask() -> set[str]:
        dead = set()
        async with await Directory.connect([Address.parse(peer)]) as directory:
            for model in await directory.list_models():
                for signed in await directory.find_servers(model.fingerprint):
                    address = signed.announcement.addresses[0]
                    try:
                        _, writer = await asyncio.open_connection(address.host, address.port)
                        writer.close()
                    except OSError:
                        dead.add(signed.peer_id.short)
        return dead

    return run(ask()) & everybody


if __name__ == "__main__":
    main()
