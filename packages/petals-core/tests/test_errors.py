import pytest

from petals_core import errors
from petals_core.errors import Disposition, PetalsError, RemoteFailureError, error_from_wire


def every_error() -> list[type[PetalsError]]:
    return [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, PetalsError)]


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [error.code for error in every_error()]
    assert len(codes) > 20
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("error", every_error())
def test_every_error_crosses_the_wire_as_itself(error: type[PetalsError]) -> None:
    rebuilt = error_from_wire(error.code, "what to do", 2.5)
    assert type(rebuilt) is error
    assert (rebuilt.message, str(rebuilt), rebuilt.retry_after_s) == ("what to do", "what to do", 2.5)


def test_codes_of_later_versions_mean_a_failure_of_the_server() -> None:
    assert type(error_from_wire("brand_new", "x")) is RemoteFailureError


@pytest.mark.parametrize(
    ("error", "disposition"),
    [
        (errors.SessionLengthError, Disposition.GIVE_UP),
        (errors.CheckpointError, Disposition.GIVE_UP),
        (errors.MissingBlocksError, Disposition.GIVE_UP),
        (errors.OverloadedError, Disposition.RETRY_SAME),
        (errors.PeerConnectionError, Disposition.GO_ELSEWHERE),
        (errors.WrongModelError, Disposition.GO_ELSEWHERE),
        (errors.FrameTooLargeError, Disposition.GO_ELSEWHERE),
    ],
)
def test_dispositions(error: type[PetalsError], disposition: Disposition) -> None:
    assert error("x").disposition is disposition
