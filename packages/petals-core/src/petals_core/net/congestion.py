"""How the kernel paces what a connection is given, and what it has brought to the other end."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Final

_UNPACED: Final = b"cubic"
_PACED: Final = b"bbr"
_TCP_INFO: Final = struct.Struct("=68xI28xI16xQ20xI")
"""Where ``tcpi_rtt``, ``tcpi_total_retrans``, ``tcpi_bytes_acked`` and ``tcpi_min_rtt`` stand in Linux's ``struct
tcp_info`` (include/uapi/linux/tcp.h)."""


def send_bursts_at_once(sock: socket.socket) -> None:
    """Have a socket that is not connected yet send a step's segments together, where the kernel allows it.

    BBR, which some hosts choose, spreads segments over time by a rate that it estimates from what was delivered. A
    session that sends one small message in each round trip never shows it more, so of every message all segments but
    the first two wait: at a round trip of 100 ms a third one came 3.4 ms later. It has to be chosen before the
    connection is made, because pacing that has begun stays. Connections of a listening socket inherit it.
    """
    _choose(sock, _UNPACED)


def send_at_rate(sock: socket.socket) -> None:
    """Have a connected socket send at the rate that arrives, where the kernel allows it.

    Others than BBR take each lost packet for a sign that they send too fast. On a path that loses packets for no such
    reason, a radio link or a busy exchange, they get to a small part of its rate. And unless the host is set otherwise
    (``net.ipv4.tcp_slow_start_after_idle``) they forget in a pause what the path takes, and begin anew. A connection
    that has shown BBR its rate keeps it, so that small messages later on do not wait.
    """
    _choose(sock, _PACED)


def _choose(sock: socket.socket, name: bytes) -> None:
    option = getattr(socket, "TCP_CONGESTION", None)  # Linux only
    if option is not None:
        with contextlib.suppress(OSError):  # not in this kernel, or not for this user
            sock.setsockopt(socket.IPPROTO_TCP, option, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a connection's kernel knows of it so far."""

    num_arrived: int
    """Bytes that the other end's kernel has confirmed."""
    num_resent: int
    """Packets."""
    rtt_s: float
    """Of the last round trips."""
    least_rtt_s: float


def read_progress(sock: socket.socket) -> Progress | None:
    """How far a connection is; None where this kernel can't tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None or not sys.platform.startswith("linux"):
        return None
    try:
        rtt_us, num_resent, num_arrived, least_rtt_us = _TCP_INFO.unpack(
            sock.getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO.size)
        )
    except (OSError, struct.error):  # closed, or a kernel that is older than these numbers
        return None
    return Progress(num_arrived=num_arrived, num_resent=num_resent, rtt_s=rtt_us / 1e6, least_rtt_s=least_rtt_us / 1e6)
