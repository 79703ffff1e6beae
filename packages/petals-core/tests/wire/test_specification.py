"""``docs/protocol.md`` says what the code does: its tables and test vectors are compared with it."""

import dataclasses
import re
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from petals_core import errors
from petals_core.errors import OverloadedError, PetalsError
from petals_core.identity import Identity
from petals_core.limits import WireLimits
from petals_core.swarm_key import SwarmKey
from petals_core.wire import messages
from petals_core.wire.connection import Connection
from petals_core.wire.frames import FrameType, Priority
from petals_core.wire.hello import DialerHello, ListenerHello
from petals_core.wire.messages import SessionOpened

PAGE = Path(__file__).parents[4] / "docs" / "protocol.md"
LISTENER, DIALER = (Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))


def every_error() -> list[type[PetalsError]]:
    return [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, PetalsError)]


def vectors() -> dict[str, bytes]:
    """What this implementation sends for the inputs that the page names."""
    result = {"listener public key": LISTENER.public_key, "listener peer id": LISTENER.peer_id.digest}
    result |= {"dialer public key": DIALER.public_key, "dialer peer id": DIALER.peer_id.digest}
    for name, key in (("without a swarm key", None), ("with the swarm key", SwarmKey(b"\x03" * 32))):
        listener = ListenerHello(identity=LISTENER, nonce=b"\x11" * 32, swarm_key=key)
        dialer = DialerHello(identity=DIALER, listener_id=LISTENER.peer_id, nonce=b"\x22" * 32, swarm_key=key)
        result["greeting"] = listener.data_to_send()
        dialer.receive_data(result["greeting"])
        answer = dialer.data_to_send()
        listener.receive_data(answer)
        result |= {f"answer {name}": answer, f"welcome {name}": listener.data_to_send()}
    listener = ListenerHello(identity=LISTENER, nonce=b"\x11" * 32)
    listener.data_to_send()
    listener.refuse(OverloadedError("too many connections", retry_after_s=2.0))
    result["refusal: overloaded, 'too many connections', retry_after_s 2.0"] = listener.data_to_send()
    return result | _frames()


def _frames() -> dict[str, bytes]:
    limits = WireLimits()
    narrow = dataclasses.replace(limits, max_frame_bytes=1024)
    dialer = Connection(is_dialer=True, local_limits=limits, remote_limits=narrow, now=0.0)

    def sent() -> bytes:
        return b"".join(dialer.data_to_send())

    result: dict[str, bytes] = {}
    first = dialer.open_stream(Priority.DECODE)
    result["OPEN of stream 1, DECODE"] = sent()
    opened = SessionOpened(cache_tokens_left=7)
    dialer.send_message(first, opened, [b"\xaa\xbb\xcc"], end=True)
    result["DATA: {cache_tokens_left: 7, kind: 'open'} with payload aabbcc, and END"] = sent()
    second = dialer.open_stream(Priority.BULK)
    sent()
    dialer.send_message(second, opened, [bytes(1024 - 8 - 30) + b"\xdd\xee"])
    data = sent()
    result["the headers of a message that takes two frames, stream 3, BULK"] = data[:10] + data[10 + 1024 : -2]
    dialer.cancel_stream(second, OverloadedError("busy"))
    result["CANCEL of stream 3: overloaded, 'busy'"] = sent()
    dialer.ping(0.0)
    result["PING, the first"] = sent()
    dialer.drain()
    result["DRAIN"] = sent()
    dialer.close()
    result["CLOSE without an error"] = sent()
    return result


def table(header: str) -> list[list[str]]:
    """The cells of the rows under a header line."""
    lines = PAGE.read_text().split(header + "\n", 1)[1].splitlines()[1:]
    rows = lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_vectors() -> None:
    block = re.search(r"```vectors\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    written = re.findall(r"^(\S.*) =\n((?:  [0-9a-f]+\n)+)", block[1], re.MULTILINE)
    assert {name: "".join(content.split()) for name, content in written} == {
        name: content.hex() for name, content in vectors().items()
    }


def test_table_of_frame_types() -> None:
    rows = table("| type | name | payload | stream | flags |")
    assert [(int(number), name) for number, name, *_ in rows] == [(kind.value, kind.name) for kind in FrameType]


def test_table_of_errors() -> None:
    rows = table("| code | disposition | |")
    assert [(code.strip("`"), disposition) for code, disposition, _ in rows] == [
        (error.code, error.disposition.value) for error in every_error()
    ]


def test_table_of_messages() -> None:
    rows = table("| kind | message | fields |")
    assert [kind.strip("`") for kind, _, _ in rows] == list(messages._KINDS)
    for kind, name, fields in rows:
        body = messages._KINDS[kind.strip("`")]
        assert name == body.__name__
        expected = [
            f"`{field.name}`" if field.default is dataclasses.MISSING else f"(`{field.name}`)"
            for field in dataclasses.fields(body)
        ]
        assert fields == (", ".join(expected) or "none")


def test_table_of_limits() -> None:
    rows = table("| offset | field | range | default |")
    for offset, field, _, default in rows:
        name = field.split("`")[1]
        number, _, unit = default.replace(",", "").partition(" ")
        assert getattr(WireLimits(), name) == int(number) * (1 << 20 if unit == "MiB" else 1)
        assert int(offset) == 4 * [row[1].split("`")[1] for row in rows].index(name)
