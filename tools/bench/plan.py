"""What the suite measures: scenarios, networks, and the ways of running a model (modes)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

LOOPBACK = "loopback"


class Unit(StrEnum):
    """What a figure counts."""

    RATE = "tokens/s"
    TIME = "s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Work that is given to a model, and timed."""

    name: str
    title: str
    kind: str
    """``generate``, ``prefill``, ``forward`` or ``backward``: what a worker does."""
    unit: Unit
    prompt_tokens: int
    new_tokens: int = 0
    num_clients: int = 1
    """Of ``generate``: so many at a time, each with a session of its own."""
    num_rows: int = 1
    first_token: bool = False
    """Of ``generate``: the time to the first token counts, and not the rate of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What lies between any two hosts."""

    name: str
    title: str
    host: str | None
    """How each host of the network lab is connected, with a quarter of the round trip. ``None``: loopback."""


class Kind(StrEnum):
    """Whose software runs the model."""

    LOCAL = "local"
    CPU_OFFLOAD = "cpu-offload"
    DISK_OFFLOAD = "disk-offload"
    SWARM = "swarm"
    EARLIER = "earlier"
    """Servers of Petals 2.2.0."""

    @property
    def has_network(self) -> bool:
        """Whether the network makes a difference to it."""
        return self in (Kind.SWARM, Kind.EARLIER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way of running the model."""

    name: str
    title: str
    kind: Kind
    num_servers: int = 0


SCENARIOS = (
    Scenario(
        name="decode", title="decode, one stream", kind="generate", unit=Unit.RATE, prompt_tokens=16, new_tokens=48
    ),
    Scenario(
        name="first-token",
        title="first token after 128",
        kind="generate",
        unit=Unit.TIME,
        prompt_tokens=128,
        new_tokens=1,
        first_token=True,
    ),
    Scenario(name="prefill-512", title="prefill of 512", kind="prefill", unit=Unit.RATE, prompt_tokens=512),
    Scenario(name="prefill-2048", title="prefill of 2,048", kind="prefill", unit=Unit.RATE, prompt_tokens=2048),
    Scenario(
        name="clients-4",
        title="decode, 4 clients together",
        kind="generate",
        unit=Unit.RATE,
        prompt_tokens=16,
        new_tokens=24,
        num_clients=4,
    ),
    Scenario(name="forward", title="forward 8 x 128", kind="forward", unit=Unit.RATE, prompt_tokens=128, num_rows=8),
    Scenario(
        name="backward",
        title="forward + backward 8 x 128",
        kind="backward",
        unit=Unit.RATE,
        prompt_tokens=128,
        num_rows=8,
    ),
)
NETWORKS = (
    Network(name=LOOPBACK, title="loopback", host=None),
    Network(name="1gbit-5ms", title="1 Gbit/s, 5 ms", host="delay=1.25ms,rate=1gbit"),
    Network(name="100mbit-5ms", title="100 Mbit/s, 5 ms", host="delay=1.25ms,rate=100mbit"),
    Network(name="100mbit-100ms", title="100 Mbit/s, 100 ms", host="delay=25ms,rate=100mbit"),
    Network(name="20mbit-40ms", title="20 Mbit/s, 40 ms", host="delay=10ms,rate=20mbit"),
    Network(name="300ms", title="300 ms", host="delay=75ms"),
)
MODES = (
    Mode(name="local", title="Transformers, local", kind=Kind.LOCAL),
    Mode(name="petals-1", title="Petals, 1 server", kind=Kind.SWARM, num_servers=1),
    Mode(name="petals-3", title="Petals, 3 servers", kind=Kind.SWARM, num_servers=3),
    Mode(name="earlier-1", title="Petals 2.2.0, 1 server", kind=Kind.EARLIER, num_servers=1),
    Mode(name="earlier-3", title="Petals 2.2.0, 3 servers", kind=Kind.EARLIER, num_servers=3),
    Mode(name="cpu-offload", title="accelerate, CPU offload", kind=Kind.CPU_OFFLOAD),
    Mode(name="disk-offload", title="accelerate, disk offload", kind=Kind.DISK_OFFLOAD),
)
# In five minutes: the figures that say most.
QUICK_SCENARIOS = ("decode", "first-token", "prefill-512", "clients-4", "forward")
QUICK_NETWORKS = (LOOPBACK, "100mbit-100ms")
QUICK_MODES = ("local", "petals-1", "petals-3", "earlier-3", "cpu-offload", "disk-offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and for how long."""

    scenarios: Sequence[Scenario]
    networks: Sequence[Network]
    modes: Sequence[Mode]
    minutes: float
    """Divided among the cells: each is measured in rounds until its share is spent."""
    min_rounds: int
    max_rounds: int

    def modes_of(self, network: Network) -> list[Mode]:
        """The modes that a network makes a difference to; all, where there is none."""
        if network.host is None:
            return list(self.modes)
        return [mode for mode in self.modes if mode.kind.has_network]

    def cells(self) -> list[tuple[Network, Scenario]]:
        """What is measured, in order: a network at a time."""
        return [
            (network, scenario) for network in self.networks for scenario in self.scenarios if self.modes_of(network)
        ]

    def reference_of(self, network: Network) -> Mode:
        """The mode that the others of a network are compared with: the first."""
        return self.modes_of(network)[0]
