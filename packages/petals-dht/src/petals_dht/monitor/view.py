"""What a monitor shows, as values: made from what was observed, sorted, filtered and judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import MissingBlocksError
from petals_core.identity import PeerId
from petals_core.routing.cost import estimate_cost
from petals_core.routing.graph import describe_blocks, find_gaps
from petals_core.routing.planner import cost_of, plan_chain
from petals_dht.monitor.observations import SILENT, Observations, speed_bound
from petals_dht.overview import ModelOverview, ModelSummary

_MAX_NAMED = 3
_MIN_ID_CHARS = 3
_STATE_ORDER = (SILENT, "joining", "draining", "online")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """One server. What the probe told is newer than what was announced, and counts where both say something."""

    peer_id: PeerId
    name: str
    start: int
    end: int
    state: str
    """As announced, or ``SILENT``."""
    intent: tuple[int, int] | None
    """Blocks that it is about to hold instead: it asks for them, or is on the way."""
    failure: str
    """Why it does not answer; empty if it does, or was not asked yet."""
    precision: str
    adapters: tuple[str, ...]
    addresses: tuple[str, ...]
    version: str
    tokens_per_s: float | None
    forward_tokens_per_s: float | None
    cache_tokens_left: int | None
    load: float | None
    num_sessions: int | None
    delay_s: float | None
    """Measured round trip from here; None if it was not asked, or did not answer."""
    age_s: float
    """Since it announced itself, by its own clock."""
    expires_in_s: float
    seen_s: float
    """How long this monitor has been seeing it."""
    block_s: float
    session_s: float
    speeds: tuple[float, ...]
    sessions: tuple[float, ...]
    is_confirmed: bool
    """It answered, and as what it announces."""

    @property
    def title(self) -> str:
        """Its public name, or the beginning of its id."""
        return self.name or self.peer_id.short


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something that people should look at."""

    is_bad: bool
    """It stops clients now."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HopView:
    """One server of the route preview."""

    peer_id: PeerId
    title: str
    start: int
    end: int
    delay_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteView:
    """The chain that a client on this machine would choose, by the same rule; it chooses among equals at random."""

    hops: tuple[HopView, ...]
    step_s: float
    """Estimate for one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """One model."""

    model: ModelSummary
    coverage: tuple[int, ...]
    """Per block, servers that take work and are not silent."""
    servers: tuple[ServerView, ...]
    alerts: tuple[Alert, ...]
    bound_tokens_per_s: float | None
    bounds: tuple[float, ...]
    route: RouteView | None

    @property
    def dark(self) -> tuple[tuple[int, int], ...]:
        """Spans that nobody holds."""
        return _spans(self.coverage, 0)

    @property
    def single(self) -> tuple[tuple[int, int], ...]:
        """Spans that one server alone holds."""
        return _spans(self.coverage, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmView:
    """All models, as seen at one moment."""

    models: tuple[ModelView, ...]
    age_s: float | None
    """Since the last look-up that succeeded; None before the first."""
    trouble: str
    open_s: float


def view_swarm(observations: Observations, *, at_s: float, now_s: float) -> SwarmView:
    """The view of everything observed, at monotonic ``at_s`` and Unix time ``now_s``."""
    looked_up_at_s = observations.looked_up_at_s
    return SwarmView(
        models=tuple(
            view_model(observations, overview, at_s=at_s, now_s=now_s) for overview in observations.overviews()
        ),
        age_s=None if looked_up_at_s is None else at_s - looked_up_at_s,
        trouble=observations.trouble,
        open_s=at_s - observations.opened_at_s,
    )


def view_model(observations: Observations, overview: ModelOverview, *, at_s: float, now_s: float) -> ModelView:
    """The view of one model. Announcements that expired since the look-up are left out."""
    live = tuple(signed for signed in overview.servers if signed.announcement.expires_at_s > now_s)
    overview = ModelOverview(model=overview.model, servers=live)
    usable = observations.usable(overview)
    servers = tuple(_view_server(observations, signed, at_s=at_s, now_s=now_s) for signed in live)
    coverage = ModelOverview(model=overview.model, servers=tuple(usable)).coverage
    return ModelView(
        model=overview.model,
        coverage=coverage,
        servers=servers,
        alerts=tuple(_find_alerts(coverage, servers)),
        bound_tokens_per_s=speed_bound(usable, overview.model.num_blocks),
        bounds=tuple(observations.bounds(overview.model)),
        route=_preview(observations, overview.model, usable, {server.peer_id: server for server in servers}),
    )


def _view_server(observations: Observations, signed: SignedAnnouncement, *, at_s: float, now_s: float) -> ServerView:
    announcement, peer_id = signed.announcement, signed.peer_id
    probe = observations.probes.get(peer_id)
    info = probe.info if probe is not None else None
    history = observations.history(announcement.fingerprint, peer_id)
    failure = probe.failure if probe is not None else ""
    is_confirmed = info is not None and (info.fingerprint, info.start, info.end) == (
        announcement.fingerprint,
        announcement.start,
        announcement.end,
    )
    precision = announcement.torch_dtype
    if announcement.quantization != "none":
        precision = announcement.quantization
    return ServerView(
        peer_id=peer_id,
        name=announcement.public_name,
        start=announcement.start,
        end=announcement.end,
        state=observations.state(signed),
        intent=announcement.intent,
        failure=failure if failure or info is None or is_confirmed else f"answers for blocks {info.start}:{info.end}",
        precision=precision,
        adapters=announcement.adapters,
        addresses=tuple(str(address) for address in announcement.addresses),
        version=announcement.version,
        tokens_per_s=announcement.inference_tokens_per_s,
        forward_tokens_per_s=announcement.forward_tokens_per_s,
        cache_tokens_left=announcement.cache_tokens_left if info is None else info.cache_tokens_left,
        load=announcement.load,
        num_sessions=None if info is None else info.num_sessions,
        delay_s=None if probe is None else probe.round_trip_s,
        age_s=max(0.0, now_s - announcement.issued_at_s),
        expires_in_s=announcement.expires_at_s - now_s,
        seen_s=0.0 if history is None else at_s - history.first_seen_at_s,
        block_s=0.0 if history is None else history.block_s,
        session_s=0.0 if history is None else history.session_s,
        speeds=() if history is None else tuple(history.speeds),
        sessions=() if history is None else tuple(history.sessions),
        is_confirmed=is_confirmed,
    )


def _preview(
    observations: Observations,
    model: ModelSummary,
    usable: Sequence[SignedAnnouncement],
    views: dict[PeerId, ServerView],
) -> RouteView | None:
    costs = {
        signed.peer_id: estimate_cost(
            signed.announcement,
            signed.peer_id,
            round_trip_s=_steady(views[signed.peer_id].delay_s),
            penalty_s=0.0,
            num_sessions=views[signed.peer_id].num_sessions,
        )
        for signed in sorted(usable, key=lambda each: each.peer_id)
    }
    try:
        chain = plan_chain(costs.values(), 0, model.num_blocks, model_name=model.model_name)
    except MissingBlocksError:
        return None
    hops = tuple(
        HopView(
            peer_id=hop.peer_id,
            title=views[hop.peer_id].title,
            start=hop.start,
            end=hop.end,
            delay_s=views[hop.peer_id].delay_s,
        )
        for hop in chain
    )
    return RouteView(hops=hops, step_s=cost_of(chain, costs.values()))


def _steady(delay_s: float | None) -> float | None:
    """Rounded to ten steps per decade, so that the preview does not flicker."""
    return None if not delay_s else 10.0 ** (math.ceil(math.log10(delay_s) * 10) / 10)


# --- alerts -----------------------------------------------------------------------------------------------------------


def _find_alerts(coverage: Sequence[int], servers: Sequence[ServerView]) -> list[Alert]:
    """The worst first."""
    alerts = []
    dark, single = _spans(coverage, 0), _spans(coverage, 1)
    if dark:
        alerts.append(Alert(is_bad=True, text=f"dark: nobody serves {describe_blocks(dark)}"))
    silent = [server for server in servers if server.state == SILENT]
    if silent:
        verb = "announces itself and does not answer" if len(silent) == 1 else "announce themselves and do not answer"
        reason = f" ({silent[0].failure})" if len(silent) == 1 else ""
        alerts.append(Alert(is_bad=False, text=f"{_names(silent)} {verb}{reason}"))
    lying = [server for server in servers if server.state != SILENT and server.failure]
    if lying:
        alerts.append(Alert(is_bad=False, text=f"{_names(lying)}: not what is announced ({lying[0].failure})"))
    if single:
        text = f"held by one server only: {describe_blocks(single)}"
        alerts.append(Alert(is_bad=False, text=text))
    outdated, newest = find_outdated(servers)
    if outdated:
        verb = "runs" if len(outdated) == 1 else "run"
        text = f"{_names(outdated)} {verb} an older version than {newest}"
        alerts.append(Alert(is_bad=False, text=text))
    full = [server for server in servers if server.state == "online" and server.cache_tokens_left == 0]
    if full:
        verb = "has" if len(full) == 1 else "have"
        alerts.append(Alert(is_bad=False, text=f"{_names(full)} {verb} no attention cache left"))
    return alerts


def find_outdated(servers: Sequence[ServerView]) -> tuple[list[ServerView], str]:
    """Servers of an older version than the newest that is announced, and that one. Unreadable versions don't count."""
    versions = {server.version: _release(server.version) for server in servers}
    known = {version: release for version, release in versions.items() if release}
    newest = max(known, key=known.__getitem__, default="")
    return [server for server in servers if known.get(server.version, known.get(newest)) != known.get(newest)], newest


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    numbers: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits or not digits.isascii():
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def _names(servers: Sequence[ServerView]) -> str:
    names = [server.title for server in servers[:_MAX_NAMED]]
    others = len(servers) - len(names)
    if others:
        return f"{', '.join(names)} and {others} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _spans(coverage: Sequence[int], count: int) -> tuple[tuple[int, int], ...]:
    """Ranges of blocks that exactly ``count`` servers hold."""
    others = ((block, block + 1) for block, held in enumerate(coverage) if held != count)
    return tuple(find_gaps(others, 0, len(coverage)))


# --- order and choice -------------------------------------------------------------------------------------------------

SORTS: dict[str, Callable[[ServerView], Any]] = {
    "blocks": lambda server: (server.start, server.end),
    "name": lambda server: server.title.lower(),
    "state": lambda server: _STATE_ORDER.index(server.state),
    "speed": lambda server: _descending(server.tokens_per_s),
    "cache": lambda server: server.cache_tokens_left,
    "load": lambda server: _descending(server.load),
    "delay": lambda server: server.delay_s,
    "version": lambda server: _release(server.version),
    "given": lambda server: _descending(server.block_s),
}
"""What servers may be sorted by; the most interesting first."""


def _descending(value: float | None) -> float | None:
    return None if value is None else -value


def arrange(
    servers: Sequence[ServerView], *, sort: str = "blocks", is_reversed: bool = False, wanted: str = ""
) -> list[ServerView]:
    """The servers that match ``wanted``, in order; who does not tell the value comes last either way."""
    key = SORTS[sort]
    chosen = sorted((server for server in servers if matches(server, wanted)), key=lambda server: server.peer_id)
    telling = [server for server in chosen if key(server) is not None]
    return [
        *sorted(telling, key=key, reverse=is_reversed),
        *(server for server in chosen if key(server) is None),
    ]


def matches(server: ServerView, wanted: str) -> bool:
    """Whether every word is part of its name, state, version, precision or adapters, begins its id, or is its block."""
    texts = (server.name, server.state, server.version, server.precision, *server.adapters)
    return all(
        any(word in text.lower() for text in texts)
        or (len(word) >= _MIN_ID_CHARS and str(server.peer_id).startswith(word))
        or (word.isascii() and word.isdecimal() and len(word) < 6 and server.start <= int(word) < server.end)
        for word in wanted.lower().split()
    )
