"""How hosts are written, and what packets say of themselves."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from lab.packets import Header, parse
from lab.settings import (
    HostSettings,
    LabError,
    Outage,
    describe,
    parse_hosts,
    parse_settings,
    parse_toml,
)


def test_hosts_are_read() -> None:
    assert parse_hosts(
        ["a", "b:delay=2.5ms,rate=100mbit,loss=1%", "far-1:delay=0.1s,up=5mbit,down=1gbit,queue=64kB"]
    ) == {
        "a": HostSettings(),
        "b": HostSettings(delay_s=0.0025, up_bits_per_s=1e8, down_bits_per_s=1e8, loss=0.01),
        "far-1": HostSettings(delay_s=0.1, up_bits_per_s=5e6, down_bits_per_s=1e9, queue_bytes=64_000),
    }


def test_outages_are_read() -> None:
    expected = (Outage(start_s=10, duration_s=5), Outage(start_s=60, duration_s=0.25))
    assert parse_settings("outage=10s+5s/60s+250ms").outages == expected


def test_a_file_says_the_same() -> None:
    text = '[hosts.a]\ndelay = "50ms"\n[hosts.b]\nrate = "20mbit"\nloss = 0.5\n[hosts.c]\n'
    assert parse_toml(text) == parse_hosts(["a:delay=50ms", "b:rate=20mbit,loss=50%", "c"])


def test_changes_keep_the_rest() -> None:
    before = parse_settings("delay=5ms,rate=20mbit,loss=1%")
    assert parse_settings("delay=7ms,up=unlimited", before) == HostSettings(
        delay_s=0.007, down_bits_per_s=20e6, loss=0.01
    )


@pytest.mark.parametrize(
    "text", ["", "delay=0.5ms", "rate=20mbit", "up=1mbit,down=2mbit", "delay=3ms,loss=2.5%,queue=9b,outage=1s+2s/4s+1s"]
)
def test_a_description_reads_as_what_it_describes(text: str) -> None:
    described = describe(parse_settings(text))
    assert described == (text or "no limits")
    if text:
        assert parse_settings(described) == parse_settings(text)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (["a", "a"], "twice"),
        (["A"], "name"),
        ([""], "name"),
        (["a/b"], "name"),
        (["a:delay"], "KEY=VALUE"),
        (["a:speed=5"], "no setting"),
        (["a:delay=5"], "us or ms or s"),
        (["a:rate=fast"], "bit"),
        (["a:rate=0mbit"], "loss=100%"),
        (["a:loss=200%"], "at most"),
        (["a:loss=-1%"], "loss"),
        (["a:outage=5s"], "START"),
        ([], "0"),
        ([f"h{number}" for number in range(251)], "251"),
    ],
)
def test_what_is_no_host_is_refused_with_what_to_write(texts: list[str], complaint: str) -> None:
    with pytest.raises(LabError, match=complaint):
        parse_hosts(texts)


@pytest.mark.parametrize("text", ["hosts = 3", "[hosts.a]\nx = 1", "[host.a]", "[hosts.a", "[hosts]\na = 1", "[hosts]"])
def test_what_is_no_file_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(LabError):
        parse_toml(text)


def ip_packet(payload_bytes: int, *, kind: int = 0, segment_bytes: int = 0, tcp_words: int = 8) -> bytes:
    virtio = struct.pack("=BBHHHH", 1, kind, 0, segment_bytes, 20, 16)
    ip = bytes([0x45]) + bytes(11) + bytes([10, 77, 0, 1, 10, 77, 0, 2])
    tcp = bytes(12) + bytes([tcp_words << 4]) + bytes(tcp_words * 4 - 13)
    return virtio + ip + tcp + bytes(payload_bytes)


def test_a_packet_says_where_it_goes_and_how_long_it_is() -> None:
    assert parse(ip_packet(1000)) == Header(destination=bytes([10, 77, 0, 2]), num_bytes=1052, segment_bytes=1052)


def test_a_train_counts_the_headers_of_all_its_segments() -> None:
    header = parse(ip_packet(3000, kind=1, segment_bytes=1448))
    assert header is not None
    assert header.num_bytes == 3000 + 3 * 52
    assert header.segment_bytes == 1500


def test_a_train_of_one_is_a_packet() -> None:
    header = parse(ip_packet(1448, kind=1, segment_bytes=1448))
    assert header is not None
    assert header.num_bytes == header.segment_bytes == 1500


@pytest.mark.parametrize("data", [b"", bytes(29), bytes(10) + b"\x60" + bytes(60)])
def test_what_is_not_ipv4_is_none(data: bytes) -> None:
    assert parse(data) is None


def test_any_short_packet_is_read_without_an_error() -> None:
    whole = ip_packet(100, kind=1, segment_bytes=10)
    for length in range(len(whole)):
        parse(whole[:length])
