"""Telling systemd how a service is doing (sd_notify(3)), without its library."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*states: str) -> bool:
    """Send states such as ``READY=1``; False where no service manager listens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path or not hasattr(socket, "AF_UNIX"):
        return False
    # A name that begins with @ is in Linux' abstract namespace.
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        sender.sendall("\n".join(states).encode())
        return True
    return False
