"""How the servers of this machine are: each writes it down, and ``petals-server status`` reads it and asks them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from petals_core import schema
from petals_core.addresses import Address
from petals_core.errors import ConfigurationError, PetalsError
from petals_core.identity import Identity, PeerId, data_folder
from petals_core.limits import MAX_BLOCKS, MAX_NAME_CHARS
from petals_core.schema import ruled
from petals_core.swarm_key import SwarmKey

_MAX_RECORD_BYTES: Final = 1 << 16
_ASK_TIMEOUT_S: Final = 3.0
_count = schema.integer(0, 1 << 62)
_time_s = schema.number(0, 1e11)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """A server at one moment. Times are Unix times."""

    peer_id: str = ruled(schema.text(64))
    port: int = ruled(schema.integer(1, 65535))
    address: str = ruled(schema.text(300))
    """Where others reach it."""
    pid: int = ruled(_count)
    model_name: str = ruled(schema.text(MAX_NAME_CHARS))
    start: int = ruled(schema.integer(0, MAX_BLOCKS))
    end: int = ruled(schema.integer(0, MAX_BLOCKS))
    num_blocks: int = ruled(schema.integer(0, MAX_BLOCKS))
    state: str = ruled(schema.text(32))
    pause_reason: str = ruled(schema.text(200), default="")
    started_at_s: float = ruled(_time_s)
    saved_at_s: float = ruled(_time_s)
    num_sessions: int = ruled(_count)
    num_requests: int = ruled(_count)
    num_tokens: int = ruled(_count)
    block_tokens: int = ruled(_count)
    num_peers: int = ruled(_count)
    num_moves: int = ruled(_count)
    tokens_per_s: float = ruled(schema.number(0, 1e12))
    cache_tokens_left: int = ruled(_count)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what a server wrote down.

        Raises:
            ValueError: it is something else; the text says what.
            OSError: it can't be read.
        """
        content = path.read_bytes()
        if len(content) > _MAX_RECORD_BYTES:
            raise ValueError("it is too long")
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON") from None
        return schema.from_map(cls, fields)

    def lines(self, round_trip_s: float | None, *, now_s: float) -> list[str]:
        """For people."""
        answer = "does not answer" if round_trip_s is None else f"answers in {1000 * round_trip_s:.0f} ms"
        hours = (now_s - self.started_at_s) / 3600
        state = self.state + (f" ({self.pause_reason})" if self.pause_reason else "")
        return [
            f"{self.model_name} blocks {self.start}:{self.end} of {self.num_blocks}, {state}, {answer}",
            f"  peer {self.peer_id[:8]} at {self.address}, process {self.pid}, up for {hours:.1f} h, "
            f"moved {self.num_moves} times",
            f"  {self.num_sessions} sessions open, {self.cache_tokens_left} tokens of cache left, "
            f"{self.tokens_per_s:.0f} tokens/s measured",
            f"  served {self.num_tokens} tokens in {self.num_requests} requests of {self.num_peers} peers",
        ]


def record_folder() -> Path:
    """Where the servers of this user write down how they are."""
    return data_folder() / "servers"


def save_record(record: ServerRecord) -> Path | None:
    """Write a record in one go; None where the folder can't be written, which is no reason to stop serving."""
    folder = record_folder()
    path = folder / f"{record.port}.json"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(schema.to_map(record), indent=1) + "\n")
        os.replace(temporary, path)
    except OSError:
        return None
    return path


def remove_record(path: Path | None) -> None:
    """Forget a server that has stopped."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink()


def read_records() -> list[ServerRecord]:
    """The records of this user's servers, by port; files that are something else are left out."""
    records = []
    for path in sorted(record_folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            records.append(ServerRecord.read(path))
    return records


async def ask(record: ServerRecord, swarm_key: SwarmKey | None) -> float | None:
    """Round trip to a server on this machine in seconds; None if it does not answer as itself."""
    from petals_core.net.dialer import Dialer
    from petals_core.net.rpc import call
    from petals_core.wire.messages import Info, InfoRequest

    dialer = Dialer(identity=Identity.ephemeral(), swarm_key=swarm_key, connect_timeout_s=_ASK_TIMEOUT_S)
    own = Address.parse(record.address)
    places = [Address("127.0.0.1", record.port), Address("::1", record.port), own]
    try:
        connection = await dialer.connect(places, peer_id=PeerId.parse(record.peer_id))
        await call(connection, InfoRequest(), reply=Info, timeout_s=_ASK_TIMEOUT_S)
        return connection.rtt_s
    except PetalsError:
        return None
    finally:
        await dialer.close()


async def look(swarm_key: SwarmKey | None) -> list[tuple[ServerRecord, float | None]]:
    """All servers of this user on this machine, with the round trip to each.

    Raises:
        ConfigurationError: there are none.
    """
    records = read_records()
    if not records:
        raise ConfigurationError("no server of yours runs on this machine: start one with 'petals-server serve MODEL'")
    return [(record, await ask(record, swarm_key)) for record in records]


def to_json(looked: list[tuple[ServerRecord, float | None]]) -> Mapping[str, Any]:
    """The same for programs."""
    return {"servers": [{**schema.to_map(record), "round_trip_s": trip_s} for record, trip_s in looked]}
