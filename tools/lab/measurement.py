"""What TCP gets through a lab, beside what was asked: round trips of one byte, and the rate of a long transfer.

Each host answers in a process of its own; each then measures to the others, one pair at a time. Or all hosts send at
once, each to the next: what that costs this machine's processors, in the router and at the ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import router
from lab.sandbox import address_of, current_folder
from lab.settings import HostSettings

PORT = 5201
_WARM_UP_TRIPS = 3
_CHUNK = bytes(65536)
_CONNECT_TIMEOUT_S = 30.0
_READY = "ready\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One pair of hosts."""

    source: str
    destination: str
    asked_trip_s: float
    trip_s: tuple[float, float, float]
    """Lower quartile, median, upper quartile."""
    asked_bits_per_s: float | None
    bits_per_s: float
    """Of the payload, at the receiver, after the first third of the time (the start of TCP)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """All hosts sending to the next at once. Processor times are of programs and of the kernel for them, in seconds."""

    num_bytes: int
    """Of each host."""
    taken_s: float
    """Until all had all."""
    router_s: tuple[float, float]
    ends_s: tuple[float, float]
    num_packets: int
    """That passed the router, acknowledgements included; a train of segments is one."""


def pairs(hosts: Sequence[str]) -> list[tuple[str, str]]:
    """Which to measure: all, in both directions; with more than four hosts each and its neighbour."""
    if len(hosts) > 4:
        return [(name, hosts[(number + 1) % len(hosts)]) for number, name in enumerate(hosts)]
    return [(source, destination) for source in hosts for destination in hosts if source != destination]


def measure(hosts: Mapping[str, HostSettings], num_trips: int, transfer_s: float) -> Iterator[Figures]:
    """Measure all pairs, one after the other; called in a lab of these hosts."""
    names = list(hosts)
    with _answering(names):
        for source, destination in pairs(names):
            address = address_of(names.index(destination))
            with _on_host(source, ["ask", address, str(num_trips), str(transfer_s)]) as asking:
                output, _ = asking.communicate()
            if asking.returncode != 0:
                raise RuntimeError(f"measuring from {source} to {destination} ended with {asking.returncode}")
            ends = hosts[source], hosts[destination]
            rates = [rate for rate in (ends[0].up_bits_per_s, ends[1].down_bits_per_s) if rate is not None]
            result = json.loads(output)
            yield Figures(
                source=source,
                destination=destination,
                asked_trip_s=2 * sum(end.delay_s for end in ends),
                trip_s=tuple(result["trip_s"]),
                asked_bits_per_s=min(rates, default=None),
                bits_per_s=result["bits_per_s"],
            )


def measure_ring(names: Sequence[str], num_bytes: int) -> Ring:
    """Have every host send to the next at once; called in a lab of these hosts."""
    with _answering(names), contextlib.ExitStack() as stack:
        sending = []
        for number, name in enumerate(names):
            arguments = ["send", address_of((number + 1) % len(names)), str(num_bytes)]
            sending.append(stack.enter_context(_on_host(name, arguments)))
            stack.callback(sending[-1].kill)
            _await_ready(sending[-1])
        before, started_s = router.ask(current_folder()), time.monotonic()
        for process in sending:
            assert process.stdin is not None
            process.stdin.write(_READY)
            process.stdin.flush()
        outputs = [process.communicate()[0] for process in sending]
        taken_s, after = time.monotonic() - started_s, router.ask(current_folder())
    ends = [json.loads(output) for output in outputs]
    return Ring(
        num_bytes=num_bytes,
        taken_s=taken_s,
        router_s=_difference(after.processor_s, before.processor_s),
        ends_s=(sum(user for user, _ in ends), sum(system for _, system in ends)),
        num_packets=sum(after.hosts[name]["sent_packets"] - before.hosts[name]["sent_packets"] for name in names),
    )


def ring_table(ring: Ring) -> str:
    """What it took, one line for each who worked."""
    sent = f"each host sent {ring.num_bytes / 1e6:g} MB to the next"
    lines = [f"{sent}: {ring.taken_s:.2f} s, {ring.num_packets} packets"]
    for name, (user, system) in (("the router", ring.router_s), ("senders and receivers", ring.ends_s)):
        shares = f"{user:.3f} s in the program, {system:.3f} s in the kernel"
        lines.append(f"processor time of {name}: {user + system:.3f} s ({shares})")
    return "\n".join(lines)


def table(figures: Sequence[Figures]) -> str:
    """What was asked and what came of it, one line for each pair."""
    rows = [("from", "to", "round trip asked", "got, ms (quartiles)", "rate asked", "got, Mbit/s")]
    for each in figures:
        low, median, high = (1e3 * value for value in each.trip_s)
        asked = "unlimited" if each.asked_bits_per_s is None else f"{each.asked_bits_per_s / 1e6:g}"
        share = "" if each.asked_bits_per_s is None else f" ({each.bits_per_s / each.asked_bits_per_s:.1%})"
        rows.append(
            (
                each.source,
                each.destination,
                f"{1e3 * each.asked_trip_s:g}",
                f"{median:.2f} ({low:.2f} to {high:.2f})",
                asked,
                f"{each.bits_per_s / 1e6:.2f}{share}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_json(figures: Sequence[Figures] | Ring) -> str:
    """The same for programs."""
    return json.dumps(asdict(figures) if isinstance(figures, Ring) else [asdict(each) for each in figures], indent=1)


@contextlib.contextmanager
def _answering(names: Sequence[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            answering = stack.enter_context(_on_host(name, ["answer"]))
            stack.callback(answering.kill)
            _await_ready(answering)
        yield


def _await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    process.stdout.readline()


def _difference(after: tuple[float, float], before: tuple[float, float]) -> tuple[float, float]:
    return after[0] - before[0], after[1] - before[1]


def _on_host(name: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    tools = Path(__file__).resolve().parent.parent
    command = [sys.executable, str(tools / "network_lab.py"), "--on", name, "--", sys.executable, "-m", __spec__.name]
    variables = {**os.environ, "PYTHONPATH": str(tools)}
    return subprocess.Popen(
        [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
    )


# --- the two ends -----------------------------------------------------------------------------------------------------


def answer() -> None:
    """Serve one connection after the other: echo bytes until a zero comes, then swallow and count."""
    with socket.create_server(("0.0.0.0", PORT)) as server:
        print(_READY, end="", flush=True)
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _serve(connection)


def _serve(connection: socket.socket) -> None:
    while (byte := connection.recv(1)) not in (b"\0", b""):
        connection.sendall(byte)
    if not byte:
        return
    before = _processor_s()
    arrivals: list[tuple[float, int]] = []
    buffer = bytearray(1 << 20)
    while count := connection.recv_into(buffer):
        arrivals.append((time.monotonic(), count))
    result = {"bits_per_s": steady_rate(arrivals), "processor_s": _difference(_processor_s(), before)}
    connection.sendall(json.dumps(result).encode())


def _processor_s() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


def steady_rate(arrivals: Sequence[tuple[float, int]]) -> float:
    """Bits per second after the first third of the time, of (time, bytes) as they came; 0 if that was one moment."""
    if not arrivals:
        return 0.0
    start_s = arrivals[0][0] + (arrivals[-1][0] - arrivals[0][0]) / 3
    later = [(time_s, count) for time_s, count in arrivals if time_s >= start_s]
    elapsed_s = later[-1][0] - later[0][0]
    return 0.0 if elapsed_s <= 0 else 8 * sum(count for _, count in later[1:]) / elapsed_s


def ask(address: str, num_trips: int, transfer_s: float) -> None:
    """Measure to one host and print the result."""
    with socket.create_connection((address, PORT), timeout=_CONNECT_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(_WARM_UP_TRIPS + num_trips):
            started_s = time.monotonic()
            connection.sendall(b"\1")
            connection.recv(1)
            trips.append(time.monotonic() - started_s)
        connection.sendall(b"\0")
        end_s = time.monotonic() + transfer_s
        while time.monotonic() < end_s:
            connection.sendall(_CHUNK)
        connection.shutdown(socket.SHUT_WR)
        rate = json.loads(connection.makefile("rb").read())["bits_per_s"]
    print(json.dumps({"trip_s": statistics.quantiles(trips[_WARM_UP_TRIPS:], n=4), "bits_per_s": rate}))


def send(address: str, num_bytes: int) -> None:
    """Connect to one host, wait for a line, send, and print the processor time of both ends."""
    with socket.socket() as connection:
        with contextlib.suppress(OSError):  # as Petals' own connections: petals_core.net.congestion
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        connection.settimeout(_CONNECT_TIMEOUT_S)
        connection.connect((address, PORT))
        connection.settimeout(None)
        print(_READY, end="", flush=True)
        sys.stdin.readline()
        before = _processor_s()
        connection.sendall(b"\0")
        for start in range(0, num_bytes, len(_CHUNK)):
            connection.sendall(_CHUNK[: num_bytes - start])
        connection.shutdown(socket.SHUT_WR)
        there = json.loads(connection.makefile("rb").read())["processor_s"]
        here = _difference(_processor_s(), before)
    print(json.dumps((here[0] + there[0], here[1] + there[1])))


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        answer()
    elif sys.argv[1] == "send":
        send(sys.argv[2], int(sys.argv[3]))
    else:
        ask(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
