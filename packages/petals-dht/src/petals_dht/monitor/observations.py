"""What a monitor has seen of a swarm since it was opened, without network or clock.

``at_s`` is monotonic time. Announcements tell what servers say of themselves; a probe tells what the monitor met when
it connected. What nobody announces (how long a server has been there, what it gave) is summed up from these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from petals_core.announcement import SignedAnnouncement
from petals_core.identity import PeerId
from petals_core.wire.messages import Info
from petals_dht.overview import ModelOverview, ModelSummary

SILENT = "silent"
"""State of a server that announces itself and does not answer."""
MAX_SAMPLES = 240
_MAX_HISTORIES = 4096
_MAX_GAP_S = 120.0
"""Between two look-ups; what a server did in a longer one (the machine slept, say) was not seen and does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One attempt to connect to a server and to ask what it is."""

    at_s: float
    failure: str = ""
    """Why there was no answer; empty if there was."""
    round_trip_s: float | None = None
    state: str | None = None
    """The server's state as it told; None where it did not."""
    info: Info | None = None


@dataclass(slots=True, kw_only=True)
class History:
    """What was seen of one server of a model."""

    first_seen_at_s: float
    last_seen_at_s: float
    block_s: float = 0.0
    """Blocks times the seconds that the server was there for them."""
    session_s: float = 0.0
    """Open sessions times seconds, as far as probes told."""
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    """Announced tokens per second, one sample per look-up."""
    sessions: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    """Open sessions, one sample per look-up."""


class Observations:
    """Grows with every look-up and probe; bounded."""

    def __init__(self, *, opened_at_s: float) -> None:
        self.opened_at_s = opened_at_s
        self.looked_up_at_s: float | None = None
        """When a look-up last succeeded."""
        self.trouble = ""
        """Why the last look-up failed; empty if it did not."""
        self.probes: dict[PeerId, Probe] = {}
        self._models: dict[str, ModelSummary] = {}
        self._overviews: dict[str, ModelOverview] = {}
        self._histories: dict[tuple[str, PeerId], History] = {}
        self._bounds: dict[str, deque[float]] = {}

    def note_models(self, models: Iterable[ModelSummary], *, at_s: float) -> None:
        """Take note of which models there are."""
        self._models = {_id(model): model for model in models}
        self.looked_up_at_s, self.trouble = at_s, ""
        for table in (self._overviews, self._bounds):
            for gone in set(table) - set(self._models):
                del table[gone]

    def note_servers(self, model: ModelSummary, servers: Iterable[SignedAnnouncement], *, at_s: float) -> None:
        """Take note of a model's servers."""
        overview = ModelOverview.of(model, servers)
        self._overviews[_id(model)] = overview
        self.looked_up_at_s, self.trouble = at_s, ""
        for signed in overview.servers:
            self._sample(model, signed, at_s)
        bound = speed_bound(self.usable(overview), model.num_blocks)
        self._bounds.setdefault(_id(model), deque(maxlen=MAX_SAMPLES)).append(bound or 0.0)
        while len(self._histories) > _MAX_HISTORIES:
            del self._histories[min(self._histories, key=lambda each: self._histories[each].last_seen_at_s)]
        announced = {signed.peer_id for each in self._overviews.values() for signed in each.servers}
        for peer_id in set(self.probes) - announced:
            del self.probes[peer_id]

    def note_probe(self, peer_id: PeerId, probe: Probe) -> None:
        """Take note of an attempt to talk to a server."""
        self.probes[peer_id] = probe

    def note_trouble(self, reason: str) -> None:
        """A look-up failed; what was seen before stays."""
        self.trouble = reason

    def models(self) -> list[ModelSummary]:
        """All models that were announced, by name."""
        return sorted(self._models.values())

    def overview(self, model: ModelSummary) -> ModelOverview:
        """What was last seen of a model; empty before the first look-up."""
        return self._overviews.get(_id(model)) or ModelOverview.of(model, ())

    def overviews(self) -> list[ModelOverview]:
        """Those models of which servers are known, by name."""
        return [overview for model in self.models() if (overview := self.overview(model)).servers]

    def history(self, fingerprint: str, peer_id: PeerId) -> History | None:
        """What was seen of a server."""
        return self._histories.get((fingerprint, peer_id))

    def bounds(self, model: ModelSummary) -> Sequence[float]:
        """Samples of the model's announced speed, at its weakest block."""
        return tuple(self._bounds.get(_id(model), ()))

    def is_silent(self, peer_id: PeerId) -> bool:
        """Whether the server was tried last without an answer."""
        probe = self.probes.get(peer_id)
        return probe is not None and bool(probe.failure)

    def state(self, signed: SignedAnnouncement) -> str:
        """What a server is doing: as it announced, unless it told something else since, or is silent."""
        if self.is_silent(signed.peer_id):
            return SILENT
        probe = self.probes.get(signed.peer_id)
        told = probe.state if probe is not None else None
        is_later = signed.announcement.state == "online" and told in ("joining", "draining")
        return told if is_later and told is not None else signed.announcement.state

    def usable(self, overview: ModelOverview) -> list[SignedAnnouncement]:
        """Servers that take new work, and are not known to be silent."""
        return [signed for signed in overview.servers if self.state(signed) == "online"]

    def _sample(self, model: ModelSummary, signed: SignedAnnouncement, at_s: float) -> None:
        announcement, peer_id = signed.announcement, signed.peer_id
        history = self._histories.setdefault(
            (model.fingerprint, peer_id), History(first_seen_at_s=at_s, last_seen_at_s=at_s)
        )
        probe = self.probes.get(peer_id)
        num_sessions = probe.info.num_sessions if probe is not None and probe.info is not None else 0
        elapsed_s = at_s - history.last_seen_at_s
        if self.state(signed) == "online" and elapsed_s <= _MAX_GAP_S:
            history.block_s += elapsed_s * (announcement.end - announcement.start)
            history.session_s += elapsed_s * num_sessions
        history.last_seen_at_s = at_s
        history.speeds.append(announcement.inference_tokens_per_s or 0.0)
        history.sessions.append(float(num_sessions))


def speed_bound(servers: Iterable[SignedAnnouncement], num_blocks: int) -> float | None:
    """The tokens per second that all servers of the weakest block announce together.

    If they say the truth, and compute the token of one session after the other, no more can go through the model.
    0.0 if a block is dark; None if for no block all servers announce a speed.
    """
    speeds = [0.0] * num_blocks
    num_unknown = [0] * num_blocks
    num_servers = [0] * num_blocks
    for signed in servers:
        announcement = signed.announcement
        for block in range(announcement.start, announcement.end):
            num_servers[block] += 1
            if announcement.inference_tokens_per_s is None:
                num_unknown[block] += 1
            else:
                speeds[block] += announcement.inference_tokens_per_s
    if not all(num_servers):
        return 0.0
    known = [speed for speed, unknown in zip(speeds, num_unknown, strict=True) if not unknown]
    return min(known) if known else None


def _id(model: ModelSummary) -> str:
    """Two models may share a fingerprint under two names."""
    return f"{model.fingerprint} {model.num_blocks} {model.model_name}"
