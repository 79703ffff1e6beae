"""What the monitor costs while it is left open: servers without a model, and ``petals-dht monitor`` on a terminal.

    python tools/bench_monitor.py --servers 60 --seconds 60

Prints the share of one core that the monitor's process takes, in the state it reaches after the first look-ups, and how
long after a server left or vanished the screen said so.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import pty
import random
import struct
import sys
import termios
import time

import environment

environment.enter()

import psutil

from petals_core.addresses import Address
from petals_core.net.loop import run
from petals_dht.testing import StubServer, start_swarm

_NUM_NODES = 8
_NUM_BLOCKS = 80
_SPAN = 12
_WARM_UP_S = 10.0
_LIFETIME_S = 1700.0


class Screen:
    """A monitor on a terminal of its own."""

    def __init__(self, peer: Address, size: str, refresh_s: float) -> None:
        width, height = (int(part) for part in size.split("x"))
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            arguments = ["monitor", "--initial-peers", str(peer), "--refresh", str(refresh_s)]
            os.execve(
                sys.executable,
                [sys.executable, "-m", "petals_dht", *arguments],
                {**os.environ, "TERM": "xterm-256color"},
            )
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.num_bytes = 0
        self._last = ""
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.descriptor, self._read)

    def _read(self) -> None:
        try:
            content = os.read(self.descriptor, 1 << 16)
        except OSError:  # The end of a terminal on Linux.
            content = b""
        if not content:
            asyncio.get_running_loop().remove_reader(self.descriptor)
        self.num_bytes += len(content)
        self._last = (self._last + content.decode(errors="replace"))[-100_000:]
        self._changed.set()

    async def wait_for(self, text: str) -> float:
        """Seconds until the screen shows ``text`` from now on."""
        started_at_s, self._last = time.monotonic(), ""
        while text not in self._last:
            self._changed.clear()
            await self._changed.wait()
        return time.monotonic() - started_at_s

    def quit(self) -> int:
        os.write(self.descriptor, b"q")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


async def bench(num_servers: int, seconds: float, size: str, refresh_s: float) -> None:
    random_ = random.Random(0)
    async with start_swarm(_NUM_NODES) as swarm:
        peer = Address("127.0.0.1", swarm[0].port)

        async def start(number: int) -> StubServer:
            first = number * (_NUM_BLOCKS - _SPAN) // max(1, num_servers - 1)
            return await StubServer.start(
                [peer],
                num_blocks=_NUM_BLOCKS,
                start=first,
                end=first + _SPAN,
                public_name=f"server-{number}",
                version="0.1.0",
                inference_tokens_per_s=random_.uniform(10, 200),
                cache_tokens_left=random_.randrange(200_000),
                load=0.0,
                expires_at_s=time.time() + _LIFETIME_S,
            )

        servers = [await start(number) for number in range(num_servers)]
        screen = Screen(peer, size, refresh_s)
        print(f"first picture after {await screen.wait_for('server-0'):.2f} s")
        await asyncio.sleep(_WARM_UP_S)
        process = psutil.Process(screen.pid)
        before, started_at_s, num_bytes = process.cpu_times(), time.monotonic(), screen.num_bytes
        await asyncio.sleep(seconds)
        after, took_s = process.cpu_times(), time.monotonic() - started_at_s
        used_s = after.user + after.system - before.user - before.system
        print(
            f"{num_servers} servers, {size}, a look-up every {refresh_s:g} s: "
            f"{100 * used_s / took_s:.2f} % of one core, "
            f"{(screen.num_bytes - num_bytes) / took_s / 1e3:.1f} kB/s to the terminal, "
            f"{process.memory_info().rss / 2**20:.0f} MiB"
        )
        leaver, vanisher = servers[0], servers[1]
        leaving, seen = await asyncio.gather(leaver.leave(), screen.wait_for(f"{num_servers - 1} servers"))
        del leaving
        print(f"a server left: seen after {seen:.1f} s")
        vanishing, seen = await asyncio.gather(vanisher.vanish(), screen.wait_for("silent"))
        del vanishing
        print(f"a server vanished: seen after {seen:.1f} s")
        print(f"exit code {screen.quit()}")
        await asyncio.gather(*(server.vanish() for server in servers[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--size", default="120x40")
    parser.add_argument("--refresh", type=float, default=5.0)
    options = parser.parse_args()
    run(bench(options.servers, options.seconds, options.size, options.refresh))


if __name__ == "__main__":
    main()
