"""The middle of the network: a process that carries packets between the hosts' TUN devices when they are due.

It answers lines of JSON on a Unix socket: ``{"change": {"a": "delay=5ms"}}`` connects a host differently from now on,
``{}`` only asks; the answer says how every host is connected, what has passed, and what processor time it took.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import kernel
from lab.links import Network, Packet, Trains
from lab.packets import VIRTIO_BYTES, parse
from lab.settings import HostSettings, LabError, describe, parse_settings

_MAX_READ_BYTES = VIRTIO_BYTES + 65536
_MAX_READS = 64
_REQUEST_BYTES = 65536
_MAX_WAIT_S = 60.0
_LONG_WAIT_S, _EARLY_S = 5e-3, 3e-4
"""After a long sleep a processor is slow to start: a router that was idle wakes a little before it has to write."""
_PRIORITY = -15


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """Where a host is plugged in."""

    name: str
    address: bytes
    tun: int
    namespace: Path


class Router:
    """Carries packets until its process is ended."""

    def __init__(self, ports: list[Port], hosts: Mapping[str, HostSettings], control: socket.socket, seed: int) -> None:
        self._ports = {port.tun: port for port in ports}
        self._tuns = {port.name: port.tun for port in ports}
        self._names = {port.address: port.name for port in ports}
        self._control = control
        self._network: Network[bytes] = Network(hosts, seed=seed, start_s=time.monotonic())
        self._trains: dict[int, Trains] = {}
        self._adjust()

    def run(self) -> None:
        """Work for ever."""
        kernel.wake_exactly()
        # On a busy machine a late router is a longer delay. Without the right to a priority it has to do without.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
        inputs = [self._control.fileno(), *self._ports]
        while True:
            for tun in self._deliver():
                # The kernel has received within our call: acknowledgements, and what they set free, wait already.
                self._read(tun)
            due_s = self._network.next_s
            wait_s = _MAX_WAIT_S if due_s is None else max(0.0, due_s - time.monotonic())
            if wait_s > _LONG_WAIT_S:
                wait_s -= _EARLY_S
            readable, _, _ = select.select(inputs, (), (), wait_s)
            for each in readable:
                if each == self._control.fileno():
                    self._answer()
                else:
                    self._read(each)

    def _deliver(self) -> set[int]:
        """Write what is due; return the devices of the receivers."""
        tuns = set()
        for packet in self._network.arrivals(time.monotonic()):
            tuns.add(tun := self._tuns[packet.destination])
            # A full device of the receiver drops the packet, as a full card does.
            with contextlib.suppress(BlockingIOError):
                os.write(tun, packet.content)
        return tuns

    def _read(self, tun: int) -> None:
        name = self._ports[tun].name
        for _ in range(_MAX_READS):
            try:
                data = os.read(tun, _MAX_READ_BYTES)
            except BlockingIOError:
                return
            header = parse(data)
            if header is None or (destination := self._names.get(header.destination)) is None:
                continue  # nobody has that address
            packet = Packet(
                source=name,
                destination=destination,
                num_bytes=header.num_bytes,
                segment_bytes=header.segment_bytes,
                content=data,
            )
            self._network.send(time.monotonic(), packet)

    def _answer(self) -> None:
        connection, _ = self._control.accept()
        with connection:
            try:
                connection.settimeout(1.0)
                self._change(json.loads(connection.recv(_REQUEST_BYTES)).get("change", {}))
                used = resource.getrusage(resource.RUSAGE_SELF)
                answer: dict[str, object] = {"hosts": self._state(), "processor_s": (used.ru_utime, used.ru_stime)}
            except (LabError, ValueError, TypeError, AttributeError) as error:
                answer = {"error": str(error)}
            except OSError:
                return  # it asked and left
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def _change(self, changes: dict[str, str]) -> None:
        hosts = self._network.hosts
        if unknown := set(changes) - set(hosts):
            raise LabError(f"there is no host {', '.join(sorted(unknown))}: there are {', '.join(hosts)}")
        settings = {name: parse_settings(text, hosts[name]) for name, text in changes.items()}
        for name, each in settings.items():
            self._network.change(time.monotonic(), name, each)
        self._adjust()

    def _adjust(self) -> None:
        """Choose how the kernel hands over TCP's segments: one by one where chance picks among them."""
        hosts = self._network.hosts
        loses = any(settings.loss for settings in hosts.values())
        for tun, port in self._ports.items():
            kernel.allow_trains(tun, not loses)
            if self._trains.get(tun) != (trains := Trains.of(port.name, hosts)):
                kernel.enter_network(port.namespace)
                kernel.size_trains(trains)
                self._trains[tun] = trains

    def _state(self) -> dict[str, object]:
        return {
            name: {
                "settings": describe(settings),
                **dataclasses.asdict(self._network.counters[name]),
            }
            for name, settings in self._network.hosts.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a router answers."""

    hosts: dict[str, dict[str, Any]]
    """How they are connected and what they have sent."""
    processor_s: tuple[float, float]
    """Of the router so far: in Python, and in the kernel for it, where the receivers' TCP works too."""


def ask(folder: Path, changes: Mapping[str, str] | None = None) -> State:
    """Have the router of a lab make changes, and return its state.

    Raises:
        LabError: the router refused, or there is none.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(folder / CONTROL))
            connection.sendall(json.dumps({"change": dict(changes or {})}).encode())
            with connection.makefile("rb") as answers:
                answer = json.loads(answers.readline())
        except (OSError, ValueError) as error:
            raise LabError(f"the lab's router doesn't answer: {error}") from error
    if "error" in answer:
        raise LabError(answer["error"])
    return State(hosts=answer["hosts"], processor_s=tuple(answer["processor_s"]))


CONTROL = "control"
"""The socket's name in the lab's folder."""
