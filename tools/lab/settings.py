"""What a host of the lab is like, and how it is written: ``NAME:delay=50ms,rate=100mbit,loss=1%,outage=10s+5s``."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_HOSTS = 250
"""All hosts share one /24 network."""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,14}")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z%]*)")
_TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATE_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SIZE_UNITS = {"b": 1.0, "kb": 1e3, "mb": 1e6}
_SHARE_UNITS = {"": 1.0, "%": 0.01}
_QUEUE_S = 0.1
_MIN_QUEUE_BYTES = 192_000


class LabError(Exception):
    """The lab can't do what was asked; the text says what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A time in which a host can't be reached and reaches nobody."""

    start_s: float
    """After the start of the lab."""
    duration_s: float

    def covers(self, time_s: float) -> bool:
        """Whether a moment, counted from the start of the lab, falls into it."""
        return self.start_s <= time_s < self.start_s + self.duration_s


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """How one host is connected to the middle of the network, where all hosts meet."""

    delay_s: float = 0.0
    """One way between the host and the middle. Between two hosts their delays add up; a round trip takes twice that."""
    up_bits_per_s: float | None = None
    """From the host to the middle; ``None`` is unlimited. Counts whole IP packets."""
    down_bits_per_s: float | None = None
    loss: float = 0.0
    """The share of packets that vanish, in each direction on its own."""
    queue_bytes: int | None = None
    """What waits at most for a direction's rate before further packets are dropped."""
    outages: tuple[Outage, ...] = ()

    def queue_limit_bytes(self, bits_per_s: float) -> int:
        """The bound of the queue before a rate: as set, or 100 ms of the rate; never less than three large packets."""
        if self.queue_bytes is not None:
            return self.queue_bytes
        return max(_MIN_QUEUE_BYTES, int(bits_per_s / 8 * _QUEUE_S))

    def is_out(self, time_s: float) -> bool:
        """Whether the host is cut off at a moment after the start of the lab."""
        return any(outage.covers(time_s) for outage in self.outages)


def parse_hosts(texts: Iterable[str]) -> dict[str, HostSettings]:
    """Read hosts from ``NAME`` or ``NAME:KEY=VALUE,...``.

    Raises:
        LabError: a name or value isn't one, or a name comes twice.
    """
    hosts: dict[str, HostSettings] = {}
    for text in texts:
        name, _, rest = text.partition(":")
        check_name(name)
        if name in hosts:
            raise LabError(f"host {name} is given twice: give every host a name of its own")
        hosts[name] = parse_settings(rest)
    return _checked(hosts)


def parse_settings(text: str, start: HostSettings | None = None) -> HostSettings:
    """Read ``KEY=VALUE,...``, as changes to ``start`` if that is given.

    Raises:
        LabError: a key or a value isn't one.
    """
    values: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise LabError(f"{part!r} is no setting: write KEY=VALUE, with {_KEYS} for KEY")
        values[key.strip()] = value.strip()
    return _settings(values, start or HostSettings())


def parse_toml(text: str) -> dict[str, HostSettings]:
    """Read hosts from TOML: a table ``[hosts.NAME]`` each, with the same keys and values as on the command line.

    Raises:
        LabError: it isn't TOML, or a name, key or value isn't one.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LabError(f"the file of hosts is not TOML: {error}") from error
    tables = document.get("hosts")
    if set(document) != {"hosts"} or not isinstance(tables, dict):
        raise LabError("the file of hosts has tables [hosts.NAME] and nothing else")
    hosts = {}
    for name, table in tables.items():
        check_name(name)
        if not isinstance(table, dict):
            raise LabError(f"host {name} is not a table: write [hosts.{name}]")
        hosts[name] = _settings({key: str(value) for key, value in table.items()}, HostSettings())
    return _checked(hosts)


def check_name(name: str) -> str:
    """Return a host's name.

    Raises:
        LabError: it can't be one.
    """
    if not _NAME.fullmatch(name):
        raise LabError(f"{name!r} can't be a host's name: small letters, digits and -, at most 15, a letter first")
    return name


def describe(settings: HostSettings) -> str:
    """Write settings as they are read."""
    parts = [f"delay={_short(settings.delay_s * 1e3)}ms"] if settings.delay_s else []
    rates = {"up": settings.up_bits_per_s, "down": settings.down_bits_per_s}
    if len(set(rates.values())) == 1:
        rates = {"rate": settings.up_bits_per_s}
    parts += [f"{key}={_short(rate / 1e6)}mbit" for key, rate in rates.items() if rate is not None]
    if settings.loss:
        parts.append(f"loss={_short(settings.loss * 100)}%")
    if settings.queue_bytes is not None:
        parts.append(f"queue={settings.queue_bytes}b")
    if settings.outages:
        spans = (f"{_short(outage.start_s)}s+{_short(outage.duration_s)}s" for outage in settings.outages)
        parts.append("outage=" + "/".join(spans))
    return ",".join(parts) or "no limits"


def _settings(values: Mapping[str, str], start: HostSettings) -> HostSettings:
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key == "delay":
            changes["delay_s"] = _quantity(key, value, _TIME_UNITS)
        elif key == "rate":
            changes["up_bits_per_s"] = changes["down_bits_per_s"] = _rate(key, value)
        elif key in ("up", "down"):
            changes[f"{key}_bits_per_s"] = _rate(key, value)
        elif key == "loss":
            changes["loss"] = _quantity(key, value, _SHARE_UNITS)
        elif key == "queue":
            changes["queue_bytes"] = int(_quantity(key, value, _SIZE_UNITS))
        elif key == "outage":
            changes["outages"] = tuple(_outage(span) for span in value.split("/"))
        else:
            raise LabError(f"{key!r} is no setting of a host: there are {_KEYS}")
    if changes.get("loss", 0.0) > 1.0:
        raise LabError("loss is a share of the packets: at most 100%")
    return dataclasses.replace(start, **changes)


_KEYS = "delay, rate, up, down, loss, queue and outage"


def _checked(hosts: dict[str, HostSettings]) -> dict[str, HostSettings]:
    if not 1 <= len(hosts) <= MAX_HOSTS:
        raise LabError(f"a lab has 1 to {MAX_HOSTS} hosts, and these are {len(hosts)}")
    return hosts


def _rate(key: str, value: str) -> float | None:
    if value == "unlimited":
        return None
    rate = _quantity(key, value, _RATE_UNITS)
    if rate <= 0:
        raise LabError(f"{key}={value} lets nothing through: for that, say loss=100%")
    return rate


def _outage(text: str) -> Outage:
    start, plus, duration = text.partition("+")
    if not plus:
        raise LabError(f"outage={text} is none: write START+DURATION, for example outage=10s+5s")
    return Outage(
        start_s=_quantity("outage", start, _TIME_UNITS), duration_s=_quantity("outage", duration, _TIME_UNITS)
    )


def _quantity(key: str, text: str, units: Mapping[str, float]) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in units:
        example = f"{key}=5{next(iter(units))}" if key != "outage" else "outage=10s+5s"
        raise LabError(
            f"{text!r} is no {key}: write a number with {' or '.join(filter(None, units))}, such as {example}"
        )
    return float(match[1]) * units[match[2].lower()]


def _short(number: float) -> str:
    return f"{number:.6g}"
