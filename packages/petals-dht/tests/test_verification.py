from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.errors import InvalidAnnouncementError
from petals_core.next_delays import NextDelays
from petals_dht.testing import make_announcement
from petals_dht.verification import Verifier

NOW_S = 1_800_000_000.0


def test_a_remembered_announcement_is_still_checked_against_the_clock() -> None:
    verifier = Verifier()
    signed = make_announcement(now_s=NOW_S)
    assert verifier.decode(signed.encoded, now_s=NOW_S) == signed
    assert verifier.decode(signed.encoded, now_s=NOW_S + 299) == signed
    with pytest.raises(InvalidAnnouncementError, match="expired"):
        verifier.decode(signed.encoded, now_s=NOW_S + 300)
    with pytest.raises(InvalidAnnouncementError, match="future"):
        verifier.decode(signed.encoded, now_s=NOW_S - 61)


def test_forged_ones_are_never_remembered() -> None:
    verifier = Verifier()
    forged = make_announcement(now_s=NOW_S).encoded.replace(b"test-model", b"best-model")
    for _ in range(2):
        with pytest.raises(InvalidAnnouncementError, match="signature"):
            verifier.decode(forged, now_s=NOW_S)


def test_memory_is_bounded() -> None:
    verifier = Verifier(max_remembered=2)
    announcements = [make_announcement(now_s=NOW_S) for _ in range(5)]
    for signed in [*announcements, *announcements]:
        assert verifier.decode(signed.encoded, now_s=NOW_S) == signed
    assert len(verifier._authentic) == 2


SIGNED = make_announcement(now_s=NOW_S, adapters=("adapter",), next_delays=NextDelays.of([(bytes(32), 0.1)]))


@given(st.data())
def test_any_altered_byte_is_found(data: st.DataObject) -> None:
    encoded = bytearray(SIGNED.encoded)
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidAnnouncementError):
        Verifier().decode(bytes(encoded), now_s=NOW_S)


@given(st.binary(max_size=1000), st.integers(0, 900))
def test_garbage_raises_only_the_documented_error(garbage: bytes, length: int) -> None:
    for encoded in (garbage, SIGNED.encoded[:length], SIGNED.encoded + garbage):
        if encoded != SIGNED.encoded:
            with pytest.raises(InvalidAnnouncementError):
                Verifier().decode(encoded, now_s=NOW_S)
