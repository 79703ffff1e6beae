import socket

import pytest

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError
from petals_server.config import DEFAULT_PORT
from petals_server.reachability import bind_ports, choose_announced_host, choose_listen_host

HERE, ELSEWHERE = Address("127.0.0.1", 1), Address("203.0.113.5", 31330)


def announced(
    *, listen: str | None, announce: str | None = None, observed: str | None = None, peers: tuple[Address, ...] = ()
) -> str:
    return choose_announced_host(
        listen_host=listen, announce_host=announce, observed_host=observed, own_host="192.168.1.7", initial_peers=peers
    )


def test_a_swarm_on_this_machine_stays_on_it() -> None:
    assert choose_listen_host(None, None, ()) == "127.0.0.1"
    assert choose_listen_host(None, None, (HERE,)) == "127.0.0.1"
    assert choose_listen_host(None, None, (HERE, ELSEWHERE)) is None
    assert choose_listen_host("0.0.0.0", None, ()) == "0.0.0.0"


def test_who_announces_another_address_listens_there() -> None:
    assert choose_listen_host(None, "example.org", ()) is None
    assert choose_listen_host(None, "localhost", (HERE,)) == "127.0.0.1"


def test_peers_on_the_loopback_of_ipv6_are_met_there() -> None:
    assert choose_listen_host(None, None, (Address("::1", 1),)) == "::1"
    assert choose_listen_host(None, None, (Address("::1", 1), HERE)) == "127.0.0.1"


def test_what_is_announced() -> None:
    assert announced(listen="127.0.0.1") == "127.0.0.1"
    assert announced(listen="10.0.0.2", peers=(ELSEWHERE,)) == "10.0.0.2"
    assert announced(listen=None, announce="example.org", peers=(ELSEWHERE,)) == "example.org"
    assert announced(listen=None, observed="198.51.100.9", peers=(ELSEWHERE,)) == "198.51.100.9"
    assert announced(listen="0.0.0.0") == "192.168.1.7"
    assert announced(listen="0.0.0.0", observed="127.0.0.1", peers=(HERE,)) == "192.168.1.7"


@pytest.mark.parametrize(
    ("listen", "announce", "option"),
    [
        ("127.0.0.1", None, "--host"),
        (None, "localhost", "--announce-host"),
        (None, "LocalHost.", "--announce-host"),
        (None, "::ffff:127.0.0.1", "--announce-host"),
    ],
)
def test_loopback_is_not_announced_to_peers_elsewhere(listen: str | None, announce: str | None, option: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{option} .* set --announce-host"):
        announced(listen=listen, announce=announce, peers=(HERE, ELSEWHERE))


def test_tcp_and_udp_share_a_port() -> None:
    tcp, udp = bind_ports("127.0.0.1", 0)
    with tcp, udp:
        port = tcp.getsockname()[1]
        assert udp.getsockname()[1] == port
        with pytest.raises(ConfigurationError, match=f"port {port} is in use.*--port"):
            bind_ports("127.0.0.1", port)


def test_a_taken_udp_port_frees_the_tcp_port_again() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match="in use"):
            bind_ports("127.0.0.1", port)
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_the_default_port_gives_way_when_it_is_taken() -> None:
    tcp, udp = bind_ports("127.0.0.1", None)
    other_tcp, other_udp = bind_ports("127.0.0.1", None)
    with tcp, udp, other_tcp, other_udp:
        ports = {tcp.getsockname()[1], other_tcp.getsockname()[1]}
        assert len(ports) == 2
        assert other_tcp.getsockname()[1] != DEFAULT_PORT


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("192.0.2.1", "can't listen on 192.0.2.1: it is no address of this machine; give one of its own"),
        ("no-such-host.invalid", "can't listen on no-such-host.invalid: the name is not known"),
    ],
)
def test_hosts_of_other_machines_are_refused(host: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        bind_ports(host, 0)
