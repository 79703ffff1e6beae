from __future__ import annotations

import pytest

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError
from petals_core.terminal import one_line_errors, parse_addresses, parse_connectable_addresses, run_app


def outcome_of(error: BaseException, *, verbose: bool = False) -> int:
    with pytest.raises(SystemExit) as caught, one_line_errors(verbose=verbose):
        raise error
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_an_error_for_the_user_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome_of(ConfigurationError("port 1 is in use:\n choose another")) == 2
    assert capsys.readouterr() == ("", "error: port 1 is in use: choose another\n")


def test_verbose_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome_of(ConfigurationError("no"), verbose=True) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: no"


def test_a_bug_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome_of(ZeroDivisionError("division by zero")) == 1
    assert capsys.readouterr().err.startswith("error: unexpected ZeroDivisionError: division by zero")


def test_an_interrupt_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


def test_usage_errors_of_an_app(capsys: pytest.CaptureFixture[str]) -> None:
    class UsageError(Exception):
        exit_code = 2

        def format_message(self) -> str:
            return "No such option: --colour"

    def app(*, standalone_mode: bool) -> object:
        assert not standalone_mode
        raise UsageError

    with pytest.raises(SystemExit) as caught:
        run_app(app)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: No such option: --colour (--help shows what is possible)\n"


def test_a_program_without_arguments_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    class NoArgsIsHelpError(Exception):
        message = "Usage: petals COMMAND\n\n  Several lines."

    def app(*, standalone_mode: bool) -> object:
        raise NoArgsIsHelpError

    with pytest.raises(SystemExit) as caught:
        run_app(app)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "Usage: petals COMMAND\n\n  Several lines.\n"


def test_exit_code_of_an_app() -> None:
    for returned, expected in ((None, 0), (3, 3)):
        with pytest.raises(SystemExit) as caught:
            run_app(lambda standalone_mode, code=returned: code)
        assert caught.value.code == expected


def test_addresses() -> None:
    expected = (Address("127.0.0.1", 1), Address("::1", 2), Address("example.org", 3))
    assert parse_addresses(["127.0.0.1:1, [::1]:2", "example.org:3", "127.0.0.1:1"]) == expected
    assert parse_addresses([]) == ()
    with pytest.raises(ConfigurationError, match="expected HOST:PORT"):
        parse_addresses(["127.0.0.1"])


def test_wildcards_are_nowhere_to_connect() -> None:
    with pytest.raises(ConfigurationError, match=r"--initial-peers 0\.0\.0\.0:1"):
        parse_connectable_addresses(["0.0.0.0:1"], option="--initial-peers")
