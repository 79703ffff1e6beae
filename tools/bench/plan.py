"""What the suite measures: scenarios, networks, and the ways of running a model (modes)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

LOOPBACK = "loopback"
HOP_SCENARIOS, HOP_SERVERS = ("hop", "hop-bench"), (1, 3)
"""What tells the software's cost of a hop, and the numbers of servers there."""
CLAIM_FACTOR = 2.5
"""So many times its share of the time gets a cell that carries a claim, so that it has more rounds."""


class Model(StrEnum):
    """Which model is run."""

    THIN = "thin"
    """Many blocks and next to no computing: what is left of a step is the software's."""
    TEXT = "demo"
    """Continues text as its draft model expects."""
    LARGE = "bench"
    """Random weights that take a while to compute."""


class Unit(StrEnum):
    """What a figure counts."""

    RATE = "tokens/s"
    TIME = "s"
    STEP = "ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Work that is given to a model, and timed."""

    name: str
    title: str
    kind: str
    """``generate``, ``steps``, ``prefill``, ``forward`` or ``backward``: what a worker does."""
    unit: Unit
    prompt_tokens: int
    new_tokens: int = 0
    num_clients: int = 1
    """Of ``generate``: so many at a time, each with a session of its own."""
    num_rows: int = 1
    first_token: bool = False
    """Of ``generate``: the time to the first token counts, and not the rate of the others."""
    weight: float = 1.0
    """How long a round takes, roughly and relative to others: the time is divided by it."""
    model: Model = Model.LARGE
    networks: tuple[str, ...] | None = None
    """Where it is measured; None: everywhere."""
    claimed_on: tuple[str, ...] = ()
    """Networks on which something is claimed of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What lies between any two hosts."""

    name: str
    title: str
    host: str | None
    """How each host of the network lab is connected, with a quarter of the round trip. ``None``: loopback."""
    weight: float = 1.0
    """How long a round takes there, roughly and relative to loopback."""
    is_urgent: bool = False
    """Whether it is measured before others, because more is claimed of it."""


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

    @property
    def is_offload(self) -> bool:
        """Whether it moves weights while it computes, for one call at a time."""
        return self in (Kind.CPU_OFFLOAD, Kind.DISK_OFFLOAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way of running the model."""

    name: str
    title: str
    kind: Kind
    num_servers: int = 0
    has_drafts: bool = False
    """Several tokens per trip (``speculation="auto"``, with the draft model), or one."""
    is_for_lab: bool = True
    """Whether it is measured on emulated networks too."""

    @property
    def swarm(self) -> str:
        """The name of its servers, which modes may share."""
        return f"{self.kind}-{self.num_servers}"


SCENARIOS = (
    Scenario(
        name="decode",
        title="decode, one stream",
        kind="generate",
        unit=Unit.RATE,
        prompt_tokens=16,
        new_tokens=48,
        weight=3.0,
        claimed_on=(LOOPBACK, "100mbit-100ms"),
    ),
    Scenario(
        name="clients-4",
        title="decode, 4 clients together",
        kind="generate",
        unit=Unit.RATE,
        prompt_tokens=16,
        new_tokens=24,
        num_clients=4,
        weight=4.0,
        claimed_on=(LOOPBACK,),
    ),
    Scenario(
        name="first-token",
        title="first token after 128",
        kind="generate",
        unit=Unit.TIME,
        prompt_tokens=128,
        new_tokens=1,
        first_token=True,
        weight=1.5,
    ),
    Scenario(name="prefill-512", title="prefill of 512", kind="prefill", unit=Unit.RATE, prompt_tokens=512, weight=2.5),
    Scenario(
        name="prefill-2048",
        title="prefill of 2,048",
        kind="prefill",
        unit=Unit.RATE,
        prompt_tokens=2048,
        weight=8.0,
    ),
    Scenario(
        name="forward",
        title="forward 8 x 128",
        kind="forward",
        unit=Unit.RATE,
        prompt_tokens=128,
        num_rows=8,
        weight=4.0,
    ),
    Scenario(
        name="backward",
        title="forward + backward 8 x 128",
        kind="backward",
        unit=Unit.RATE,
        prompt_tokens=128,
        num_rows=8,
        weight=9.0,
    ),
    Scenario(
        name="hop",
        title="one step, thin model",
        kind="steps",
        unit=Unit.STEP,
        prompt_tokens=16,
        new_tokens=100,
        weight=6.0,
        model=Model.THIN,
        networks=(LOOPBACK,),
        claimed_on=(LOOPBACK,),
    ),
    Scenario(
        name="hop-bench",
        title="one step, bench model",
        kind="steps",
        unit=Unit.STEP,
        prompt_tokens=16,
        new_tokens=16,
        weight=4.0,
        networks=(LOOPBACK,),
        claimed_on=(LOOPBACK,),
    ),
    Scenario(
        name="text",
        title="decode of text, demo model",
        kind="generate",
        unit=Unit.RATE,
        prompt_tokens=16,
        new_tokens=64,
        weight=8.0,
        model=Model.TEXT,
        networks=("100mbit-100ms",),
        claimed_on=("100mbit-100ms",),
    ),
)
NETWORKS = (
    Network(name=LOOPBACK, title="loopback", host=None),
    Network(name="1gbit-5ms", title="1 Gbit/s, 5 ms", host="delay=1.25ms,rate=1gbit"),
    Network(name="100mbit-5ms", title="100 Mbit/s, 5 ms", host="delay=1.25ms,rate=100mbit"),
    Network(
        name="100mbit-100ms", title="100 Mbit/s, 100 ms", host="delay=25ms,rate=100mbit", weight=1.5, is_urgent=True
    ),
    Network(name="20mbit-40ms", title="20 Mbit/s, 40 ms", host="delay=10ms,rate=20mbit", weight=2.2),
    Network(name="300ms", title="300 ms", host="delay=75ms", weight=2.2),
)
MODES = (
    Mode(name="local", title="Transformers, local", kind=Kind.LOCAL),
    Mode(name="petals-1", title="Petals, 1 server", kind=Kind.SWARM, num_servers=1),
    Mode(name="petals-3", title="Petals, 3 servers", kind=Kind.SWARM, num_servers=3),
    Mode(name="petals-3-drafts", title="Petals, 3 servers, drafts", kind=Kind.SWARM, num_servers=3, has_drafts=True),
    Mode(name="earlier-1", title="Petals 2.2.0, 1 server", kind=Kind.EARLIER, num_servers=1, is_for_lab=False),
    Mode(name="earlier-3", title="Petals 2.2.0, 3 servers", kind=Kind.EARLIER, num_servers=3),
    Mode(name="cpu-offload", title="accelerate, CPU offload", kind=Kind.CPU_OFFLOAD),
    Mode(name="disk-offload", title="accelerate, disk offload", kind=Kind.DISK_OFFLOAD),
)
# In five minutes: the figures that say most.
QUICK_SCENARIOS = ("decode", "clients-4", "hop", "text")
QUICK_NETWORKS = (LOOPBACK, "100mbit-100ms")
QUICK_MODES = ("local", "petals-1", "petals-3", "petals-3-drafts", "earlier-3", "disk-offload")
_MODES_OF = {
    Model.TEXT: ("petals-3", "petals-3-drafts", "earlier-3"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A scenario on a network, and the modes that take turns there."""

    network: Network
    scenario: Scenario
    modes: tuple[Mode, ...]

    @property
    def weight(self) -> float:
        """How much of the time it needs, relative to other cells."""
        factor = CLAIM_FACTOR if self.network.name in self.scenario.claimed_on else 1.0
        return self.scenario.weight * self.network.weight * len(self.modes) * factor

    @property
    def reference(self) -> Mode:
        """The mode that the others are compared with: the first."""
        return self.modes[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and for how long."""

    scenarios: Sequence[Scenario]
    networks: Sequence[Network]
    modes: Sequence[Mode]
    minutes: float
    """Divided among the cells: each is measured in rounds until its share is spent, but once at least."""
    most_minutes: float
    """When nothing more is begun."""
    min_rounds: int
    """Of a cell, if they take little more than its share."""
    max_rounds: int
    done: frozenset[tuple[str, str]] = frozenset()
    """Networks and scenarios of cells that an earlier run has measured."""

    def cells(self, *, model: Model | None = None, is_lab: bool | None = None) -> list[Cell]:
        """What is measured, in order: a network at a time, urgent ones first. ``None``: any model, all networks."""
        return [
            Cell(network=network, scenario=scenario, modes=modes)
            for network in sorted(self.networks, key=lambda each: not each.is_urgent)
            for scenario in self.scenarios
            if (network.name, scenario.name) not in self.done
            and (model is None or scenario.model is model)
            and (is_lab is None or (network.host is not None) is is_lab)
            and (scenario.networks is None or network.name in scenario.networks)
            and (modes := tuple(mode for mode in self.modes if _makes_sense(mode, network, scenario)))
        ]


def _makes_sense(mode: Mode, network: Network, scenario: Scenario) -> bool:
    """Whether a mode is measured in a scenario on a network."""
    if network.host is not None and not (mode.kind.has_network and mode.is_for_lab):
        return False
    if scenario.kind == "steps":
        return mode.kind in (Kind.LOCAL, Kind.SWARM, Kind.EARLIER) and not mode.has_drafts
    if scenario.model in _MODES_OF:
        return mode.name in _MODES_OF[scenario.model]
    if mode.kind is Kind.DISK_OFFLOAD and scenario.kind == "backward":
        return False  # the weights of all blocks stay in memory until their gradients are there
    return not mode.has_drafts and not (mode.kind.is_offload and scenario.num_clients > 1)
