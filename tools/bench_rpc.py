"""What a message costs: ``python3 tools/bench_rpc.py [--rounds N] [--json FILE]``.

Round trips of 4 KiB between two processes on the loopback interface: through a stream of Petals (decode priority, TLS,
msgpack envelope) and, beside it, through nothing but the event loop's own TLS. Both alternate on each event loop, so
that they see the same machine.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from petals_core.addresses import Address
from petals_core.identity import Identity
from petals_core.net.dialer import Dialer
from petals_core.net.listener import Listener
from petals_core.net.loop import new_event_loop
from petals_core.net.stream import Stream
from petals_core.net.tls import dialer_context, listener_context
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Step, StepResult

MESSAGE_BYTES = 4096
TRIPS_PER_ROUND = 200
WARM_UP_ROUNDS = 2
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
KINDS = ("petals", "tls")
TENSOR = {"shape": [1, 2048], "dtype": "float16", "num_bytes": MESSAGE_BYTES}


async def answer(stream: Stream) -> None:
    """Reply to steps as a server does, without computing anything."""
    while True:
        message = await stream.receive(timeout_s=None)
        step = message.body
        assert isinstance(step, Step)
        result = StepResult(step=step.step, tensors=step.tensors, queue_us=1, compute_us=1)
        await stream.send(result, message.payload)


class Echo(asyncio.Protocol):
    """Sends back every 4 KiB."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if sum(map(len, self._parts)) == MESSAGE_BYTES:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()


class Caller(asyncio.Protocol):
    """Waits for the echo of 4 KiB."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._num_bytes == MESSAGE_BYTES:
            self._num_bytes = 0
            self.reply.set_result(None)


async def serve(kind: str) -> None:
    """Tell the port and answer until standard input ends."""
    loop = asyncio.get_running_loop()
    identity = Identity.ephemeral()
    if kind == "petals":
        listener = await Listener.start(identity=identity, handler=answer, host="127.0.0.1")
        port = listener.port
    else:
        server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=listener_context(identity))
        port = server.sockets[0].getsockname()[1]
    print(port, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    if kind == "petals":
        await listener.close()
    else:
        server.close()


class Bench:
    """One kind of connection on one event loop, to a server process of its own."""

    def __init__(self, kind: str, loop: str) -> None:
        self.kind = kind
        self.loop = loop
        self.times_us: list[float] = []
        self._runner = asyncio.Runner(loop_factory=LOOPS[loop])
        self._server = subprocess.Popen(
            [sys.executable, __file__, "--serve", kind, "--loop", loop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        self._address = Address("127.0.0.1", int(self._server.stdout.readline()))
        self._trip: Callable[[int], Coroutine[Any, Any, None]]
        self._runner.run(self._connect_petals() if kind == "petals" else self._connect_tls())

    def round(self) -> list[float]:
        """Return the time of each of some round trips, in microseconds."""
        return self._runner.run(self._round())

    def close(self) -> None:
        if self.kind == "petals":
            self._runner.run(self._dialer.close())
        else:
            self._transport.abort()
        self._runner.close()
        self._server.communicate()

    async def _connect_petals(self) -> None:
        self._dialer = Dialer(identity=Identity.ephemeral())
        connection = await self._dialer.connect([self._address], peer_id=None)
        stream = connection.open_stream(Priority.DECODE)
        payload = [os.urandom(MESSAGE_BYTES)]

        async def trip(number: int) -> None:
            step = Step(step=number, keep=number, row_tokens=(1,), tensors=(TENSOR,), deadline_ms=10_000)
            await stream.send(step, payload)
            await stream.receive(timeout_s=10)

        self._trip = trip

    async def _connect_tls(self) -> None:
        loop = asyncio.get_running_loop()
        self._transport, caller = await loop.create_connection(
            Caller, self._address.host, self._address.port, ssl=dialer_context(), server_hostname=""
        )
        content = os.urandom(MESSAGE_BYTES)

        async def trip(number: int) -> None:
            caller.reply = loop.create_future()
            self._transport.write(content)
            await caller.reply

        self._trip = trip

    async def _round(self) -> list[float]:
        times_us = []
        for number in range(TRIPS_PER_ROUND):
            started_s = time.perf_counter()
            await self._trip(number)
            times_us.append((time.perf_counter() - started_s) * 1e6)
        return times_us


def measure(num_rounds: int) -> list[dict[str, Any]]:
    """Return the figures of each kind on each loop."""
    benches = [Bench(kind, loop) for loop in LOOPS for kind in KINDS]
    for number in range(num_rounds + WARM_UP_ROUNDS):
        for bench in benches:
            times_us = bench.round()
            if number >= WARM_UP_ROUNDS:
                bench.times_us.extend(times_us)
    for bench in benches:
        bench.close()
    return [
        {
            "loop": bench.loop,
            "kind": bench.kind,
            "median_us": round(statistics.median(bench.times_us), 1),
            "p90_us": round(statistics.quantiles(bench.times_us, n=10)[-1], 1),
            "best_us": round(min(bench.times_us), 1),
        }
        for bench in benches
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="round trips of 4 KiB, through Petals and through TLS alone")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help=f"of {TRIPS_PER_ROUND} trips each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--loop", choices=LOOPS, default="uvloop", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        with asyncio.Runner(loop_factory=LOOPS[arguments.loop]) as runner:
            runner.run(serve(arguments.serve))
        return
    figures = measure(arguments.rounds)
    for row in figures:
        print(
            f"{row['loop']:8} {row['kind']:7} median {row['median_us']:7.1f} us   p90 {row['p90_us']:7.1f} us   "
            f"best {row['best_us']:7.1f} us"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
