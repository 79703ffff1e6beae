"""Namespaces and TUN devices of Linux, without any program but Python.

Python's own ``os.unshare`` and ``os.setns`` are newer than the oldest Python that Petals supports (3.12).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
from pathlib import Path

from lab.links import Trains

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29

TUN = Path("/dev/net/tun")
DEVICE = "lab0"
MTU_BYTES = 1500
_TUN_QUEUE_PACKETS = 10_000
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_OFFLOAD_CHECKSUM, _OFFLOAD_TCP4 = 0x01, 0x02
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCSIFADDR, _SIOCSIFNETMASK = 0x8916, 0x891C
_SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8922, 0x8943
_IFF_UP = 0x1
_RTM_NEWLINK, _NLM_REQUEST_ACK, _IFLA_GSO_MAX_BYTES = 16, 0x5, 41
_IPV4_SETTINGS = Path("/proc/sys/net/ipv4")
_USUAL_RTT_LOG, _ANY_RTT_LOG = 9, 30

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Leave namespaces of the given kinds for new ones; a new pid namespace is for the children.

    Raises:
        OSError: the system doesn't allow it.
    """
    _check(_libc.unshare(flags))


def enter_network(path: Path) -> None:
    """Make this thread belong to the network namespace whose file that is.

    Raises:
        OSError: there is none, or it is not allowed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(descriptor, CLONE_NEWNET))
    finally:
        os.close(descriptor)


def mount(source: str, target: Path, kind: str | None = None, flags: int = 0) -> None:
    """Mount a file system, or a file or folder somewhere else (``MS_BIND``).

    Raises:
        OSError: it is not allowed or a path is missing.
    """
    encoded = kind.encode() if kind else None
    _check(_libc.mount(source.encode(), os.fsencode(target), encoded, ctypes.c_ulong(flags), None))


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, however that ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0))


def wake_exactly() -> None:
    """Have sleeps of this process end on time, not up to 50 us later."""
    _check(_libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0))


def open_tun(address: str, netmask: str) -> int:
    """Make a TUN device in the current network namespace, up and with an address; return its file.

    The device goes when the file is closed, so also when the process ends.

    Raises:
        OSError: it is not allowed.
    """
    tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, _TUNSETIFF, _request(DEVICE, struct.pack("=H", _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFADDR, _request(DEVICE, _address(address)))
            fcntl.ioctl(control, _SIOCSIFNETMASK, _request(DEVICE, _address(netmask)))
            fcntl.ioctl(control, _SIOCSIFMTU, _request(DEVICE, struct.pack("=i", MTU_BYTES)))
            fcntl.ioctl(control, _SIOCSIFTXQLEN, _request(DEVICE, struct.pack("=i", _TUN_QUEUE_PACKETS)))
        bring_up(DEVICE)
    except BaseException:
        os.close(tun)
        raise
    return tun


def bring_up(device: str) -> None:
    """Switch a network device of the current namespace on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _request(device, b""))
        flags = struct.unpack_from("=h", answer, 16)[0] | _IFF_UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, _request(device, struct.pack("=h", flags)))


def allow_trains(tun: int, allowed: bool) -> None:
    """Let the kernel hand over TCP segments in trains, or one by one."""
    fcntl.ioctl(tun, _TUNSETOFFLOAD, _OFFLOAD_CHECKSUM | (_OFFLOAD_TCP4 if allowed else 0))


def size_trains(trains: Trains) -> None:
    """Have TCP of the current namespace's device send trains of such sizes, on connections that are open too.

    Raises:
        OSError: the kernel refused.
    """
    attribute = struct.pack("=HHI", 8, _IFLA_GSO_MAX_BYTES, trains.max_bytes)
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(DEVICE), 0, 0) + attribute
    message = struct.pack("=IHHII", 16 + len(body), _RTM_NEWLINK, _NLM_REQUEST_ACK, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.send(message)
        code = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
    if code:
        raise OSError(code, os.strerror(code))
    (_IPV4_SETTINGS / "tcp_min_tso_segs").write_text(str(trains.usual_segments))
    # BBR doesn't heed that. Its trains are what its rate sends in 1 ms and what this setting adds: all of max_bytes,
    # halved for each so many us of the least round trip, where the number is this power of two.
    rtt_log = _ANY_RTT_LOG if trains.are_long else _USUAL_RTT_LOG
    with contextlib.suppress(OSError):  # a kernel older than 5.18: the router has more to do then
        (_IPV4_SETTINGS / "tcp_tso_rtt_log").write_text(str(rtt_log))
    # A connection asks for the device's bound when it looks up its route. This setting's change makes all do that; the
    # setting itself means nothing here, where a device has one address. Otherwise the kernel would take what is too
    # long apart into single segments.
    flushing = _IPV4_SETTINGS / "conf" / DEVICE / "promote_secondaries"
    flushing.write_text("0" if flushing.read_text().strip() == "1" else "1")


def _request(device: str, content: bytes) -> bytes:
    """A ``struct ifreq``."""
    return struct.pack("=16s24s", device.encode(), content)


def _address(text: str) -> bytes:
    """A ``struct sockaddr_in``."""
    return struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(text))


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
