"""A node that does nothing but let others join, and that finds its swarm again after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError, PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.swarm_key import SwarmKey
from petals_dht.contacts import Contact, node_id
from petals_dht.directory import Directory
from petals_dht.node import Node
from petals_dht.reachability import dial_back
from petals_dht.record import MAX_CONTACTS, MAX_RECORD_BYTES, NodeRecord
from petals_dht.responder import NodeLimits
from petals_dht.signals import stop_signals
from petals_dht.systemd import notify

log = logging.getLogger(__name__)
SAVE_INTERVAL_S = 15.0
_STATUS_TIMEOUT_S = 2.0
_STALE_S = 4 * SAVE_INTERVAL_S


async def run_bootstrap(
    identity: Identity,
    host: str | None,
    port: int,
    *,
    announce_host: str | None,
    swarm_key: SwarmKey | None,
    initial_peers: Sequence[Address],
    state_file: Path,
    limits: NodeLimits,
    on_ready: Callable[[Address, int], None],
) -> None:
    """Run a node until the process is interrupted or told to end.

    Contacts that ``state_file`` names are greeted first; then ``on_ready`` gets the address to join by and how many
    nodes are known. The file is renewed while the node runs.

    Raises:
        ConfigurationError: the port is in use, the host is not this machine's, or the file can't be used.
        NoPeersError: there are initial peers and neither any of them nor a node in the file answers.
    """
    remembered = read_record(state_file)
    with stop_signals() as stopped:
        directory = await Directory.start(
            identity,
            host,
            port,
            swarm_key=swarm_key,
            initial_peers=initial_peers,
            contacts=() if remembered is None else remembered.contacts,
            reach=dial_back(identity, swarm_key),
            limits=limits,
        )
        async with directory:
            node = directory.node
            keeper = _RecordKeeper(node, identity, host, state_file)
            keeper.save()
            join_host = announce_host or _listening_host(host) or directory.observed_host() or _outward_host()
            on_ready(Address(join_host, directory.port), len(node.protocol.router))
            notify("READY=1", f"STATUS=listening on port {directory.port}")
            while not stopped.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), SAVE_INTERVAL_S)
                keeper.save_or_warn()
                notify("WATCHDOG=1", f"STATUS={len(node.protocol.router)} contacts")
            notify("STOPPING=1")


class _RecordKeeper:
    """Writes down how a node is."""

    def __init__(self, node: Node, identity: Identity, host: str | None, path: Path) -> None:
        self._node = node
        self._identity = identity
        self._asked_at = (_listening_host(host) or "127.0.0.1", node.port)
        self._path = path
        self._started_at_s = time.time()

    def save(self) -> None:
        """Write the file anew.

        Raises:
            ConfigurationError: it can't be written.
        """
        node = self._node
        write_record(
            self._path,
            NodeRecord(
                peer_id=str(self._identity.peer_id),
                address=self._asked_at,
                pid=os.getpid(),
                started_at_s=self._started_at_s,
                saved_at_s=time.time(),
                contacts=tuple(node.protocol.router.contacts()[:MAX_CONTACTS]),
                num_answering=node.num_answering(),
                num_announcements=node.storage.num_entries,
                stored_bytes=node.storage.total_bytes,
                num_requests=node.protocol.num_requests,
                dropped=tuple(sorted(node.protocol.dropped.items())),
            ),
        )

    def save_or_warn(self) -> None:
        """As ``save``; a disk that is full now is no reason to stop."""
        try:
            self.save()
        except ConfigurationError as error:
            log.warning("%s", error.message)


def read_record(path: Path) -> NodeRecord | None:
    """What a node wrote down; None if there is no such file yet.

    Raises:
        ConfigurationError: the file can't be read, or is something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"state file {path} can't be read: {error.strerror or error}") from error
    try:
        return NodeRecord.decode(content)
    except ValueError as error:
        raise ConfigurationError(
            f"{path} is no state file of a bootstrap node ({error}): remove it, or give another with --state"
        ) from None


def write_record(path: Path, record: NodeRecord) -> None:
    """Write the file in one go, so that it is whole whatever happens; only its owner may read it.

    Raises:
        ConfigurationError: it can't be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(record.encode())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ConfigurationError(f"state file {path} can't be written: {error.strerror or error}") from error


async def ask_status(path: Path, swarm_key: SwarmKey | None) -> tuple[NodeRecord, float]:
    """What the node of a state file wrote down last, and the round trip to it in seconds.

    Raises:
        ConfigurationError: there is no such file, or it can't be used.
        PetalsError: the node does not answer.
    """
    record = read_record(path)
    if record is None:
        raise ConfigurationError(
            f"no bootstrap node has written {path}: give the same --port or --state as it was started with"
        )
    node = await Node.start(
        Identity.ephemeral(), _any_host_towards(record.address[0]), is_client=True, swarm_key=swarm_key
    )
    try:
        contact = Contact(node_id(PeerId.parse(record.peer_id)), *record.address)
        started_at_s = time.perf_counter()
        async with asyncio.timeout(_STATUS_TIMEOUT_S):
            answer = await node.protocol.call_ping(contact)
        round_trip_s = time.perf_counter() - started_at_s
    except TimeoutError:
        answer = None
    finally:
        await node.close()
    if answer is None:
        age_s = time.time() - record.saved_at_s
        raise PetalsError(
            f"the bootstrap node of {path} does not answer at port {record.address[1]} (it wrote {age_s:.0f} s ago): "
            "start it, or give the same --swarm-key-file"
        )
    return record, round_trip_s


def describe_status(record: NodeRecord, round_trip_s: float, *, now_s: float) -> list[str]:
    """A node's health as lines for people."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in record.dropped)
    hours = max(0.0, now_s - record.started_at_s) / 3600
    age_s = max(0.0, now_s - record.saved_at_s)
    lines = [
        f"answers   in {round_trip_s * 1e3:.1f} ms at port {record.address[1]}",
        f"runs      for {hours:.1f} h as process {record.pid}",
        f"peer id   {record.peer_id}",
        f"contacts  {len(record.contacts):,}, of which {record.num_answering:,} answered lately",
        f"keeps     {record.num_announcements:,} announcements ({record.stored_bytes / 2**20:.1f} MiB)",
        f"requests  {record.num_requests:,} answered",
        f"dropped   {dropped or 'nothing'}",
    ]
    if age_s > _STALE_S:
        lines.append(f"warning   all but the first line was written {age_s:.0f} s ago: is the disk full?")
    return lines


def _any_host_towards(host: str) -> str:
    """Where a socket is bound to speak to ``host``."""
    return "::" if ":" in host else "0.0.0.0"


def _listening_host(host: str | None) -> str | None:
    return None if host in (None, "", "0.0.0.0", "::") else host


def _outward_host() -> str:
    """The address by which this machine reaches others. Nothing is sent: connecting a UDP socket only picks a route."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # A documentation address (RFC 5737).
        return str(probe.getsockname()[0])
    return "127.0.0.1"
