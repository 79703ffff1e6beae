import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError
from petals_core.testing.strategies import addresses


@given(addresses())
def test_an_address_reads_as_it_is_written(address: Address) -> None:
    assert Address.parse(str(address)) == address


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_configuration_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigurationError:
        return
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("example.org:80", "example.org", 80),
        (" 203.0.113.5:31330\n", "203.0.113.5", 31330),
        ("[2001:db8::1]:1", "2001:db8::1", 1),
        ("my_host-1:65535", "my_host-1", 65535),
    ],
)
def test_forms_of_an_address(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:0",
        "host:65536",
        "host:-1",
        "host:８０",
        "2001:db8::1:80",
        "a b:80",
        "-a:80",
        "a..b:80",
        "[]:80",
        "a/b:80",
        "x" * 64 + ":80",
        ".".join(["x" * 60] * 5) + ":80",
        "host:1e3",
        "user@host:80",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Address.parse(text)


def test_kinds_of_hosts() -> None:
    assert Address("localhost", 1).is_loopback
    assert Address("127.0.0.5", 1).is_loopback
    assert Address("::1", 1).is_loopback
    assert Address("::ffff:127.0.0.1", 1).is_loopback
    assert Address("LocalHost.", 1).is_loopback
    assert Address("demo.localhost", 1).is_loopback
    assert not Address("localhost.example.org", 1).is_loopback
    assert not Address("example.org", 1).is_loopback
    assert Address("0.0.0.0", 1).is_unspecified
    assert Address("::", 1).is_unspecified
    assert Address("::ffff:0.0.0.0", 1).is_unspecified
    assert not Address("10.0.0.1", 1).is_unspecified
    assert Address("example.org", 1).ip is None
