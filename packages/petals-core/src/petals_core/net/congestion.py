"""How the kernel paces what a connection is given, and what it has brought to the other end."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from typing import Final

_UNPACED: Final = b"cubic"
_BYTES_ACKED: Final = struct.Struct("120xQ")
"""Where ``tcpi_bytes_acked`` stands in Linux's ``struct tcp_info`` (include/uapi/linux/tcp.h)."""


def send_bursts_at_once(sock: socket.socket) -> None:
    """Have a socket that is not connected yet send a step's segments together, where the kernel allows it.

    BBR, which some hosts choose, spreads segments over time by a rate that it estimates from what was delivered. A
    session that sends one small message in each round trip never shows it more, so of every message all segments but
    the first two wait: at a round trip of 100 ms a third one came 3.4 ms later. It has to be chosen before the
    connection is made, because pacing that has begun stays. Connections of a listening socket inherit it.
    """
    option = getattr(socket, "TCP_CONGESTION", None)  # Linux only
    if option is not None:
        with contextlib.suppress(OSError):  # not in this kernel, or not for this user
            sock.setsockopt(socket.IPPROTO_TCP, option, _UNPACED)


def bytes_acknowledged(sock: socket.socket) -> int | None:
    """Bytes that the other end's kernel has confirmed so far; None where this kernel can't tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None or not sys.platform.startswith("linux"):
        return None
    try:
        content = sock.getsockopt(socket.IPPROTO_TCP, option, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(content)[0])
    except (OSError, struct.error):  # closed, or a kernel that is older than this number
        return None
