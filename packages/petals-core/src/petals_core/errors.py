"""The one tree of errors.

Every error that may cross the wire has a ``code`` and a ``disposition``, so that a caller decides what to do next by a
value and not by a ladder of ``isinstance``. The text says what happened and what to do; it ends up in front of users as
one line.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Disposition(StrEnum):
    """What a caller may do after an error."""

    RETRY_SAME = "retry_same"
    """The same server may be asked again, after ``retry_after_s`` where it is given."""
    GO_ELSEWHERE = "go_elsewhere"
    """Another server may succeed; this one should be avoided for a while."""
    GIVE_UP = "give_up"
    """The request itself is at fault, or nobody can serve it; no server is to blame."""


class PetalsError(Exception):
    """Base of all errors that this project raises on purpose."""

    code: ClassVar[str] = "internal"
    disposition: ClassVar[Disposition] = Disposition.GO_ELSEWHERE

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.attempt: int | None = None
        """Of a session's step that failed: the attempt that it belonged to."""


# --- configuration and input ------------------------------------------------------------------------------------------


class InvalidRequestError(PetalsError):
    """The arguments or the request are wrong; asking again, anywhere, gives the same answer."""

    code = "invalid_request"
    disposition = Disposition.GIVE_UP


class ConfigurationError(InvalidRequestError):
    """A flag, file or address given by the user can't be used."""

    code = "configuration"


class CheckpointError(ConfigurationError):
    """A model can't be found or read: no such name, no safetensors, a missing or broken file."""

    code = "checkpoint"


class UnsupportedModelError(ConfigurationError):
    """The architecture can't be split into spans of blocks."""

    code = "unsupported_model"


class DeviceError(ConfigurationError):
    """The device does not exist or can't compute in the wanted dtype."""

    code = "device"


class NotEnoughMemoryError(ConfigurationError):
    """What was asked for does not fit the memory of the device."""

    code = "not_enough_memory"


class SessionLengthError(InvalidRequestError):
    """A prompt or continuation does not fit the session's ``max_length``."""

    code = "session_length"


# --- the wire ---------------------------------------------------------------------------------------------------------


class ProtocolError(PetalsError):
    """The peer broke the wire protocol; the connection can't go on."""

    code = "protocol"


class FrameTooLargeError(ProtocolError):
    """A frame or message is over the limit that was agreed."""

    code = "frame_too_large"


class VersionMismatchError(ProtocolError):
    """The peer speaks no protocol version that we speak."""

    code = "version_mismatch"


class AuthenticationError(PetalsError):
    """The peer is not who it should be, or does not know the swarm's key."""

    code = "authentication"


class PeerConnectionError(PetalsError):
    """No connection could be made, or it was lost."""

    code = "connection"


class DeadlineExceededError(PetalsError):
    """The peer did not answer in time."""

    code = "deadline_exceeded"


class CancelledByPeerError(PetalsError):
    """The peer gave up the stream."""

    code = "cancelled"


class DrainingError(PetalsError):
    """The server is about to stop and takes no new work."""

    code = "draining"


class OverloadedError(PetalsError):
    """The server has no room now; ``retry_after_s`` says when to ask again."""

    code = "overloaded"
    disposition = Disposition.RETRY_SAME


class RemoteFailureError(PetalsError):
    """The server failed in a way that is its own fault."""

    code = "remote_failure"


class WrongModelError(PetalsError):
    """The server holds another checkpoint, or not the blocks that were asked for."""

    code = "wrong_model"


class NoSessionError(PetalsError):
    """The server has no such session, or not for this peer."""

    code = "no_session"


class NextHopError(PetalsError):
    """The server can't pass states on to the next one of the chain: the client may carry them."""

    code = "next_hop"
    disposition = Disposition.RETRY_SAME


class OutputsGoneError(PetalsError):
    """The server has not kept what it computed in a session: an earlier server, or the client, must replay it."""

    code = "outputs_gone"
    disposition = Disposition.RETRY_SAME


class GraphExpiredError(PetalsError):
    """The server no longer has what it kept of a forward: the backward must bring the inputs along."""

    code = "graph_expired"
    disposition = Disposition.RETRY_SAME


class MissingAdapterError(PetalsError):
    """The server, or no server, has the adapter that was asked for."""

    code = "missing_adapter"


class TuningExpiredError(PetalsError):
    """The server does not hold these values of the client's adapter (any more): they must be sent again."""

    code = "tuning_expired"
    disposition = Disposition.RETRY_SAME


class CacheLostError(PetalsError):
    """A session's cache is gone and nobody is to blame: open it again, here or elsewhere, and compute it anew."""

    code = "cache_lost"
    disposition = Disposition.RETRY_SAME


# --- the directory ----------------------------------------------------------------------------------------------------


class NoPeersError(PetalsError):
    """None of the initial peers answered."""

    code = "no_peers"
    disposition = Disposition.GIVE_UP


class MissingBlocksError(PetalsError):
    """No live server holds some blocks of the model."""

    code = "missing_blocks"
    disposition = Disposition.GIVE_UP


class InvalidAnnouncementError(PetalsError):
    """An announcement is malformed, oversized, forged or expired."""

    code = "invalid_announcement"


def _subclasses(error: type[PetalsError]) -> list[type[PetalsError]]:
    return [error, *(leaf for child in error.__subclasses__() for leaf in _subclasses(child))]


_BY_CODE = {error.code: error for error in _subclasses(PetalsError)}


def error_from_wire(code: str, message: str, retry_after_s: float | None = None) -> PetalsError:
    """Rebuild an error that a peer reported; unknown codes become ``RemoteFailureError``."""
    return _BY_CODE.get(code, RemoteFailureError)(message, retry_after_s=retry_after_s)


def first_line(error: BaseException) -> str:
    """What an error of others' software says, cut to one line of 200 characters, to be told inside one of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
