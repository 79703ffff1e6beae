from __future__ import annotations

import asyncio
import socket

import pytest

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError
from petals_dht.sockets import bind_udp, families_of, resolve


def test_a_port_serves_one_node() -> None:
    with bind_udp("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert not sock.getblocking()
        assert families_of(sock) == {4}
        with pytest.raises(ConfigurationError, match=f"port {port} is in use: choose another with --port"):
            bind_udp("127.0.0.1", port)


def test_hosts_of_others_are_refused() -> None:
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(ConfigurationError, match=f"can't listen on {host}"):
            bind_udp(host, 0)


def test_every_address_of_this_machine() -> None:
    with bind_udp(None, 0) as sock:
        assert 4 in families_of(sock)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_families_follow_the_host() -> None:
    try:
        dual, only_6 = bind_udp("::", 0), bind_udp("::1", 0)
    except ConfigurationError:
        pytest.skip("this machine has no IPv6 loopback")
    with dual, only_6:
        assert families_of(dual) == {4, 6}
        assert families_of(only_6) == {6}


def test_names_become_addresses_of_our_families() -> None:
    async def main() -> None:
        assert await resolve(Address("192.0.2.1", 7), frozenset({4})) == (("192.0.2.1", 7),)
        assert await resolve(Address("2001:db8::1", 7), frozenset({4})) == ()
        assert ("127.0.0.1", 7) in await resolve(Address("localhost", 7), frozenset({4}))
        assert await resolve(Address("no-such-host.invalid", 7), frozenset({4, 6})) == ()

    asyncio.run(main())
