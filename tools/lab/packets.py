"""What a packet from a TUN device says of itself: where it goes, and how long it is on the wire.

With ``IFF_VNET_HDR`` every packet begins with a ``virtio_net_hdr`` (Virtual I/O Device specification 1.2, section
5.1.6): a TCP packet may be a train of segments that share one set of headers, and its checksum may be left to whoever
puts it on a wire. Both go unchanged to the device that receives it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

VIRTIO_BYTES = 10
_VIRTIO = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_NO_SEGMENTS = 0
_IPV4_BYTES = 20
_TCP_OFFSET_PLACE = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the router wants to know of a packet."""

    destination: bytes
    """IPv4 address."""
    num_bytes: int
    """On the wire, if every segment has headers of its own."""
    segment_bytes: int


def parse(data: bytes) -> Header | None:
    """Read the start of what a TUN device gave; ``None`` if that isn't IPv4."""
    packet_bytes = len(data) - VIRTIO_BYTES
    if packet_bytes < _IPV4_BYTES or data[VIRTIO_BYTES] >> 4 != 4:
        return None
    _, kind, _, segment_bytes, _, _ = _VIRTIO.unpack_from(data)
    destination = data[VIRTIO_BYTES + 16 : VIRTIO_BYTES + 20]
    # The header's own hdr_len is a hint that may cover some of the payload: the packet's fields count.
    tcp_start = VIRTIO_BYTES + (data[VIRTIO_BYTES] & 15) * 4
    if kind == _NO_SEGMENTS or segment_bytes == 0 or len(data) <= tcp_start + _TCP_OFFSET_PLACE:
        return Header(destination=destination, num_bytes=packet_bytes, segment_bytes=packet_bytes)
    header_bytes = tcp_start - VIRTIO_BYTES + (data[tcp_start + _TCP_OFFSET_PLACE] >> 4) * 4
    payload_bytes = max(0, packet_bytes - header_bytes)
    if payload_bytes <= segment_bytes:
        return Header(destination=destination, num_bytes=packet_bytes, segment_bytes=packet_bytes)
    num_segments = -(-payload_bytes // segment_bytes)
    return Header(
        destination=destination,
        num_bytes=payload_bytes + num_segments * header_bytes,
        segment_bytes=segment_bytes + header_bytes,
    )
