"""Connections ask for a congestion control without pacing, and go on where they do not get it."""

from __future__ import annotations

import socket

import pytest

from petals_core.net.congestion import read_progress, send_at_rate, send_bursts_at_once

OPTION = getattr(socket, "TCP_CONGESTION", None)


@pytest.mark.skipif(OPTION is None, reason="only Linux lets a socket choose")
def test_a_connection_is_not_paced_where_the_kernel_allows_to_choose() -> None:
    assert OPTION is not None
    with socket.socket() as asked, socket.socket() as listening, socket.socket() as dialing:
        try:
            asked.setsockopt(socket.IPPROTO_TCP, OPTION, b"cubic")
            expected = b"cubic"
        except OSError:
            expected = asked.getsockopt(socket.IPPROTO_TCP, OPTION, 16).rstrip(b"\0")
        for each in (listening, dialing):
            send_bursts_at_once(each)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        dialing.connect(listening.getsockname())
        accepted, _ = listening.accept()
        with accepted:
            for each in (dialing, accepted):
                assert each.getsockopt(socket.IPPROTO_TCP, OPTION, 16).rstrip(b"\0") == expected


@pytest.mark.skipif(OPTION is None, reason="only Linux lets a socket choose")
def test_a_connection_goes_on_in_another_way_where_the_kernel_allows_to_choose() -> None:
    assert OPTION is not None
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as asked, socket.socket() as dialing:
        send_bursts_at_once(dialing)
        dialing.connect(listening.getsockname())
        accepted, _ = listening.accept()
        expected = dialing.getsockopt(socket.IPPROTO_TCP, OPTION, 16)
        try:
            asked.setsockopt(socket.IPPROTO_TCP, OPTION, b"bbr")
            expected = asked.getsockopt(socket.IPPROTO_TCP, OPTION, 16)
        except OSError:
            pass  # not in this kernel, or not for this user
        with accepted:
            send_at_rate(dialing)
            assert dialing.getsockopt(socket.IPPROTO_TCP, OPTION, 16) == expected
            dialing.sendall(b"?")
            assert accepted.recv(1) == b"?"


def test_other_sockets_stay_as_they_are() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        send_bursts_at_once(datagrams)
        send_at_rate(datagrams)


def test_what_has_arrived_is_counted_and_what_waits_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as dialing:
        dialing.connect(listening.getsockname())
        accepted, _ = listening.accept()
        with accepted:
            before = read_progress(dialing)
            if before is None:
                return  # this kernel can't tell
            dialing.sendall(bytes(50_000))
            num_read = 0
            while num_read < 50_000:
                num_read += len(accepted.recv(65536))
            accepted.sendall(b"!")  # confirms all that came before
            assert dialing.recv(1) == b"!"
            after = read_progress(dialing)
            assert after is not None
            assert after.num_arrived - before.num_arrived == 50_000
            assert 0 < after.least_rtt_s < 60
            assert 0 < after.rtt_s < 60
            assert 0 <= after.num_resent < 50_000
    assert read_progress(dialing) is None  # closed
