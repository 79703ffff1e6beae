"""A view for programs: JSON, and the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from petals_dht.monitor.observations import SILENT
from petals_dht.monitor.view import ModelView, ServerView, SwarmView

_STATES = (SILENT, "joining", "online", "draining")


def to_json(view: SwarmView) -> dict[str, Any]:
    """Everything, in types that JSON has. Durations are in seconds."""
    return {"models": [_model_to_json(model) for model in view.models]}


def _model_to_json(model: ModelView) -> dict[str, Any]:
    route = model.route
    return {
        "name": model.model.model_name,
        "fingerprint": model.model.fingerprint,
        "num_blocks": model.model.num_blocks,
        "coverage": list(model.coverage),
        "dark": [list(span) for span in model.dark],
        "held_once": [list(span) for span in model.single],
        "bound_tokens_per_s": model.bound_tokens_per_s,
        "route": None
        if route is None
        else {
            "step_s": route.step_s,
            "hops": [{"peer_id": str(hop.peer_id), "start": hop.start, "end": hop.end} for hop in route.hops],
        },
        "alerts": [{"is_bad": alert.is_bad, "text": alert.text} for alert in model.alerts],
        "servers": [_server_to_json(server) for server in model.servers],
    }


def _server_to_json(server: ServerView) -> dict[str, Any]:
    return {
        "peer_id": str(server.peer_id),
        "name": server.name,
        "start": server.start,
        "end": server.end,
        "state": server.state,
        "intent": None if server.intent is None else list(server.intent),
        "failure": server.failure,
        "precision": server.precision,
        "adapters": list(server.adapters),
        "addresses": list(server.addresses),
        "version": server.version,
        "tokens_per_s": server.tokens_per_s,
        "forward_tokens_per_s": server.forward_tokens_per_s,
        "cache_tokens_left": server.cache_tokens_left,
        "load": server.load,
        "num_sessions": server.num_sessions,
        "delay_s": server.delay_s,
        "age_s": server.age_s,
        "expires_in_s": server.expires_in_s,
        "seen_s": server.seen_s,
        "given_block_s": server.block_s,
        "given_session_s": server.session_s,
    }


@dataclass(slots=True)
class _Metric:
    """A gauge and its samples."""

    name: str
    meaning: str
    samples: list[tuple[Mapping[str, str], float]] = field(default_factory=list)

    def add(self, value: float | None, labels: Mapping[str, str]) -> None:
        if value is not None:
            self.samples.append((labels, value))

    def lines(self) -> Iterable[str]:
        if not self.samples:
            return
        yield f"# HELP {self.name} {self.meaning}"
        yield f"# TYPE {self.name} gauge"
        for labels, value in self.samples:
            text = ",".join(f'{name}="{_escaped(content)}"' for name, content in labels.items())
            yield f"{self.name}{{{text}}} {value:g}"


def to_prometheus(view: SwarmView) -> str:
    """The text exposition format (version 0.0.4): gauges with the model and, where it is of a server, the peer id."""
    metrics = {
        name: _Metric(f"petals_{name}", meaning)
        for name, meaning in (
            ("model_blocks", "Blocks of the model."),
            ("model_dark_blocks", "Blocks that no server holds."),
            ("model_single_blocks", "Blocks that one server alone holds."),
            ("model_bound_tokens_per_second", "Announced speed of the weakest block."),
            ("model_route_seconds", "Estimated time of one token through the cheapest chain from here."),
            ("model_servers", "Servers by state; silent ones announce themselves and do not answer."),
            ("block_servers", "Servers that take work for a block."),
            ("server_up", "1 if the server answered, 0 if it did not."),
            ("server_blocks", "Blocks that the server announces."),
            ("server_tokens_per_second", "Announced speed for one session."),
            ("server_cache_tokens_left", "Free attention cache."),
            ("server_load", "Work waiting over work that a turn takes."),
            ("server_sessions", "Open sessions."),
            ("server_delay_seconds", "Round trip from here."),
            ("server_announcement_age_seconds", "Time since the server announced itself."),
        )
    }
    for model in view.models:
        labels = {"model": model.model.model_name, "fingerprint": model.model.fingerprint[:12]}
        _add_model(metrics, model, labels)
        for server in model.servers:
            _add_server(metrics, server, {**labels, "peer": server.peer_id.short, "name": server.name})
    return "".join(f"{line}\n" for metric in metrics.values() for line in metric.lines())


def _add_model(metrics: Mapping[str, _Metric], model: ModelView, labels: Mapping[str, str]) -> None:
    metrics["model_blocks"].add(model.model.num_blocks, labels)
    metrics["model_dark_blocks"].add(sum(end - start for start, end in model.dark), labels)
    metrics["model_single_blocks"].add(sum(end - start for start, end in model.single), labels)
    metrics["model_bound_tokens_per_second"].add(model.bound_tokens_per_s, labels)
    metrics["model_route_seconds"].add(None if model.route is None else model.route.step_s, labels)
    for state in _STATES:
        count = sum(server.state == state for server in model.servers)
        metrics["model_servers"].add(count, {**labels, "state": state})
    for block, count in enumerate(model.coverage):
        metrics["block_servers"].add(count, {**labels, "block": str(block)})


def _add_server(metrics: Mapping[str, _Metric], server: ServerView, labels: Mapping[str, str]) -> None:
    if server.state == SILENT or server.delay_s is not None:
        metrics["server_up"].add(float(server.state != SILENT), labels)
    metrics["server_blocks"].add(server.end - server.start, labels)
    metrics["server_tokens_per_second"].add(server.tokens_per_s, labels)
    metrics["server_cache_tokens_left"].add(server.cache_tokens_left, labels)
    metrics["server_load"].add(server.load, labels)
    metrics["server_sessions"].add(server.num_sessions, labels)
    metrics["server_delay_seconds"].add(server.delay_s, labels)
    metrics["server_announcement_age_seconds"].add(server.age_s, labels)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
