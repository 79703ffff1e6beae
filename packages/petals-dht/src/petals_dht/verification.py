"""Signatures are checked once, however often an announcement comes by."""

from __future__ import annotations

from collections import OrderedDict

from petals_core import schema
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import InvalidAnnouncementError
from petals_core.limits import MAX_CLOCK_SKEW_S


class Verifier:
    """``SignedAnnouncement.decode`` with a memory of the last authentic ones.

    A client that looks up the same servers every few seconds so pays only for what is new.
    """

    def __init__(self, *, max_remembered: int = 16384) -> None:
        self._max_remembered = max_remembered
        self._authentic: OrderedDict[bytes, SignedAnnouncement] = OrderedDict()

    def decode(self, encoded: bytes, *, now_s: float) -> SignedAnnouncement:
        """Read and verify an announcement from an untrusted peer. ``now_s`` is Unix time.

        Raises:
            InvalidAnnouncementError: it is malformed, oversized, forged, expired, or from the future.
        """
        signed = self._authentic.get(encoded)
        if signed is None:
            signed = SignedAnnouncement.decode(encoded, now_s=now_s)
            self._authentic[encoded] = signed
            if len(self._authentic) > self._max_remembered:
                self._authentic.popitem(last=False)
            return signed
        self._authentic.move_to_end(encoded)
        if signed.announcement.expires_at_s <= now_s:
            raise InvalidAnnouncementError("the announcement has expired, or a clock is wrong")
        if signed.announcement.issued_at_s > now_s + MAX_CLOCK_SKEW_S:
            raise InvalidAnnouncementError("the announcement is from the future: a clock is wrong")
        return signed


def untimely_by_s(encoded: bytes, *, now_s: float) -> float | None:
    """How far in the future an authentic announcement was issued that is far out of time; None for any other.

    Negative for one that expired long ago. Who is given only such ones has a clock that is wrong by about that.
    """
    try:
        _, _, content = schema.sequence(schema.binary(1, len(encoded)), 3, 3)(schema.unpack(encoded))
        fields = schema.unpack(content)
        issued_at_s = schema.number(0, 1e11)(fields.get("issued_at_s") if type(fields) is dict else None)
        signed = SignedAnnouncement.decode(encoded, now_s=issued_at_s)
    except (schema.SchemaError, InvalidAnnouncementError):
        return None
    # Who just expired is no sign of a wrong clock: those of others may differ a little.
    is_old = signed.announcement.expires_at_s <= now_s - MAX_CLOCK_SKEW_S
    return issued_at_s - now_s if is_old or issued_at_s > now_s + MAX_CLOCK_SKEW_S else None
