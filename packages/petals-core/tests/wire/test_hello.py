import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.errors import (
    AuthenticationError,
    ConfigurationError,
    OverloadedError,
    PetalsError,
    ProtocolError,
    VersionMismatchError,
)
from petals_core.identity import Identity, PeerId
from petals_core.limits import WireLimits
from petals_core.swarm_key import SwarmKey
from petals_core.testing.strategies import splits
from petals_core.wire.hello import ANSWER_BYTES, GREETING_BYTES, WELCOME_BYTES, DialerHello, ListenerHello


def identity(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


SERVER, CLIENT, OTHER = identity(1), identity(2), identity(3)
KEY, OTHER_KEY = SwarmKey(b"k" * 32), SwarmKey(b"o" * 32)
SERVER_LIMITS = WireLimits(max_frame_bytes=2048, max_streams=7)
CLIENT_LIMITS = WireLimits(max_frame_bytes=4096, max_streams=0)


def listener(
    key: SwarmKey | None = None, versions: tuple[int, int] = (1, 1), nonce: bytes = b"l" * 32
) -> ListenerHello:
    return ListenerHello(identity=SERVER, nonce=nonce, swarm_key=key, limits=SERVER_LIMITS, versions=versions)


def dialer(
    key: SwarmKey | None = None, versions: tuple[int, int] = (1, 1), listener_id: PeerId = SERVER.peer_id
) -> DialerHello:
    return DialerHello(
        identity=CLIENT,
        listener_id=listener_id,
        nonce=b"d" * 32,
        swarm_key=key,
        limits=CLIENT_LIMITS,
        versions=versions,
    )


def say_hello(dialing: DialerHello, listening: ListenerHello) -> None:
    """Both sides to the end."""
    dialing.receive_data(listening.data_to_send())
    listening.receive_data(dialing.data_to_send())
    dialing.receive_data(listening.data_to_send())


def refusals(dialing: DialerHello, listening: ListenerHello) -> tuple[PetalsError, PetalsError]:
    """What the listener raises, and what the dialer raises when it is told."""
    dialing.receive_data(listening.data_to_send())
    with pytest.raises(PetalsError) as at_listener:
        listening.receive_data(dialing.data_to_send())
    with pytest.raises(PetalsError) as at_dialer:
        dialing.receive_data(listening.data_to_send())
    assert dialing.result is None
    assert listening.result is None
    return at_listener.value, at_dialer.value


@pytest.mark.parametrize("key", [None, KEY])
def test_both_sides_learn_identity_version_and_limits(key: SwarmKey | None) -> None:
    dialing, listening = dialer(key), listener(key)
    say_hello(dialing, listening)
    assert dialing.result is not None
    assert listening.result is not None
    assert (dialing.result.peer_id, listening.result.peer_id) == (SERVER.peer_id, CLIENT.peer_id)
    assert (dialing.result.version, listening.result.version) == (1, 1)
    assert dialing.result.remote_limits == SERVER_LIMITS
    assert listening.result.remote_limits == CLIENT_LIMITS
    assert dialing.result.trailing == listening.result.trailing == b""


def test_bytes_behind_the_hello_are_handed_on() -> None:
    dialing, listening = dialer(KEY), listener(KEY)
    dialing.receive_data(listening.data_to_send())
    listening.receive_data(dialing.data_to_send() + b"first frames")
    dialing.receive_data(listening.data_to_send() + b"of both")
    assert listening.result is not None
    assert listening.result.trailing == b"first frames"
    assert dialing.result is not None
    assert dialing.result.trailing == b"of both"


@given(st.data())
def test_any_split_of_the_bytes_gives_the_same_hello(data: st.DataObject) -> None:
    dialing, listening = dialer(KEY), listener(KEY)
    for piece in data.draw(splits(listening.data_to_send())):
        dialing.receive_data(piece)
    answer = dialing.data_to_send()
    assert len(answer) == ANSWER_BYTES
    for piece in data.draw(splits(answer)):
        if listening.result is None:
            listening.receive_data(piece)
    for piece in data.draw(splits(listening.data_to_send() + b"x")):
        if dialing.result is None:
            dialing.receive_data(piece)
    assert dialing.result is not None
    assert listening.result is not None


@pytest.mark.parametrize(
    ("dialer_key", "listener_key", "text"),
    [
        (None, KEY, "private swarm: give the swarm's key"),
        (KEY, None, "not in a private swarm"),
        (OTHER_KEY, KEY, "not the one of the server's swarm"),
    ],
)
def test_peers_of_different_swarms_refuse_each_other(
    dialer_key: SwarmKey | None, listener_key: SwarmKey | None, text: str
) -> None:
    for error in refusals(dialer(dialer_key), listener(listener_key)):
        assert type(error) is AuthenticationError
        assert text in error.message


@pytest.mark.parametrize("dialer_key", [None, KEY, OTHER_KEY])
@pytest.mark.parametrize("listener_key", [None, KEY])
def test_a_dialer_believes_no_welcome_without_the_right_proof(
    dialer_key: SwarmKey | None, listener_key: SwarmKey | None
) -> None:
    """The listener here is one that lets everybody in."""
    dialing, listening = dialer(dialer_key), listener(dialer_key)
    dialing.receive_data(listening.data_to_send())
    answer = dialing.data_to_send()
    listening.receive_data(answer)
    welcome = bytearray(listening.data_to_send())
    core = answer[:98]
    transcript = listener(None).data_to_send() + SERVER.peer_id.digest + core
    welcome[1:33] = bytes(32) if listener_key is None else listener_key.proof(b"hello listener", transcript)
    if dialer_key is listener_key:
        dialing.receive_data(bytes(welcome))
        assert dialing.result is not None
    else:
        with pytest.raises(AuthenticationError):
            dialing.receive_data(bytes(welcome))


def test_the_newest_common_version_is_spoken() -> None:
    dialing, listening = dialer(versions=(1, 4)), listener(versions=(2, 3))
    say_hello(dialing, listening)
    assert dialing.result is not None
    assert dialing.result.version == 3


@pytest.mark.parametrize(("theirs", "ours"), [((1, 1), (2, 3)), ((4, 9), (2, 3))])
def test_no_common_version_is_one_clear_line(theirs: tuple[int, int], ours: tuple[int, int]) -> None:
    dialing = dialer(versions=ours)
    with pytest.raises(VersionMismatchError, match=f"versions {theirs[0]} to {theirs[1]}.*update the older one"):
        dialing.receive_data(listener(versions=theirs).data_to_send())


def test_a_version_that_was_not_offered_is_refused() -> None:
    dialing = dialer(versions=(1, 5))
    dialing.receive_data(listener(versions=(1, 5)).data_to_send())
    strict = listener(versions=(1, 4))
    strict.data_to_send()
    with pytest.raises(VersionMismatchError):
        strict.receive_data(dialing.data_to_send())


@pytest.mark.parametrize("data", [b"H", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x89PNG\r\n\x1a\n"])
def test_another_protocol_is_found_by_its_first_bytes(data: bytes) -> None:
    with pytest.raises(VersionMismatchError, match="does not speak"):
        dialer().receive_data(data)
    listening = listener()
    with pytest.raises(VersionMismatchError, match="does not speak"):
        listening.receive_data(data)


def test_a_private_listener_reads_nothing_of_whoever_lacks_the_key() -> None:
    listening = listener(KEY)
    listening.receive_data(b"GET / HTTP/1.1\r\n")
    with pytest.raises(AuthenticationError):
        listening.receive_data(bytes(ANSWER_BYTES))


def test_an_answer_to_one_listener_is_worth_nothing_at_another() -> None:
    """A server in the middle, itself in the swarm, passes on what the client signed for it."""
    dialing = dialer(KEY, listener_id=OTHER.peer_id)
    listening = listener(KEY)
    dialing.receive_data(listening.data_to_send())
    with pytest.raises(AuthenticationError):
        listening.receive_data(dialing.data_to_send())


def test_an_answer_can_not_be_replayed() -> None:
    dialing, first = dialer(), listener()
    dialing.receive_data(first.data_to_send())
    answer = dialing.data_to_send()
    first.receive_data(answer)
    with pytest.raises(AuthenticationError, match="signature"):
        listener(nonce=b"n" * 32).receive_data(answer)


@settings(max_examples=60)
@given(st.sampled_from([None, KEY]), st.integers(0, ANSWER_BYTES * 8 - 1))
def test_any_changed_bit_of_an_answer_is_refused(key: SwarmKey | None, bit: int) -> None:
    dialing, listening = dialer(key), listener(key)
    dialing.receive_data(listening.data_to_send())
    answer = bytearray(dialing.data_to_send())
    answer[bit // 8] ^= 1 << bit % 8
    with pytest.raises((AuthenticationError, ProtocolError)):
        listening.receive_data(bytes(answer))
    with pytest.raises((AuthenticationError, ProtocolError)):
        dialing.receive_data(listening.data_to_send())


@given(st.binary(max_size=300))
def test_garbage_raises_only_documented_errors(data: bytes) -> None:
    for start in (b"", listener().data_to_send()):
        dialing = dialer()
        try:
            dialing.receive_data(start + data)
        except PetalsError:
            assert dialing.result is None
    listening = listener()
    if len(data) > 8:
        with pytest.raises(PetalsError):
            listening.receive_data(data)


@pytest.mark.parametrize("data", [b"\x03", b"\x00", b"\x02\xff\xff", b"\x02\x00\x01\xc1"])
def test_a_malformed_end_of_the_hello_is_a_protocol_error(data: bytes) -> None:
    dialing = dialer()
    dialing.receive_data(listener().data_to_send())
    with pytest.raises(ProtocolError):
        dialing.receive_data(data)


def test_a_listener_may_refuse_with_any_error_before_and_after_the_answer() -> None:
    for answers_first in (False, True):
        dialing, listening = dialer(), listener()
        if answers_first:
            dialing.receive_data(listening.data_to_send())
        listening.refuse(OverloadedError("too many connections", retry_after_s=3.0))
        with pytest.raises(OverloadedError, match="too many connections") as caught:
            dialing.receive_data(listening.data_to_send())
        assert caught.value.retry_after_s == 3.0


def test_a_listener_may_refuse_whom_it_has_just_authenticated() -> None:
    dialing, listening = dialer(KEY), listener(KEY)
    dialing.receive_data(listening.data_to_send())
    listening.receive_data(dialing.data_to_send())
    assert listening.result is not None
    listening.refuse(OverloadedError("too many connections of this peer"))
    assert listening.result is None
    with pytest.raises(OverloadedError, match="of this peer"):
        dialing.receive_data(listening.data_to_send())
    assert dialing.result is None


@pytest.mark.parametrize("change", [{"max_frame_bytes": 10}, {"connection_credit_bytes": 0}, {"max_streams": 70000}])
def test_limits_that_can_not_work_are_refused(change: dict[str, int]) -> None:
    limits = dataclasses.replace(WireLimits(), **change)
    dialing = DialerHello(identity=CLIENT, listener_id=SERVER.peer_id, nonce=b"d" * 32, limits=limits)
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        dialing.receive_data(listener().data_to_send())


def test_a_peer_that_tells_impossible_limits_is_refused() -> None:
    dialing, listening = dialer(), listener()
    dialing.receive_data(listening.data_to_send())
    listening.receive_data(dialing.data_to_send())
    welcome = bytearray(listening.data_to_send())
    welcome[33:37] = bytes(4)
    with pytest.raises(ProtocolError, match="max_frame_bytes is 0"):
        dialing.receive_data(bytes(welcome))


def test_sizes_are_those_of_the_specification() -> None:
    assert (GREETING_BYTES, ANSWER_BYTES, WELCOME_BYTES) == (44, 194, 57)
