"""The first success of several attempts, and no trace of the others."""

from __future__ import annotations

import asyncio

import pytest

from petals_core.errors import AuthenticationError, PeerConnectionError
from petals_core.net.race import race
from petals_core.testing.network import run_clean


def test_first_candidate_wins_and_others_are_not_started() -> None:
    started: list[str] = []

    async def attempt(name: str) -> str:
        started.append(name)
        return name

    async def main() -> None:
        assert await race(["a", "b"], attempt, head_start_s=10, discard=lambda _: None) == "a"

    run_clean(main())
    assert started == ["a"]


def test_next_candidate_starts_when_one_fails() -> None:
    async def attempt(name: str) -> str:
        if name == "a":
            raise PeerConnectionError("a failed")
        return name

    async def main() -> None:
        assert await race(["a", "b"], attempt, head_start_s=10, discard=lambda _: None) == "b"

    run_clean(main())


def test_slow_candidate_gets_company_and_is_cancelled() -> None:
    cancelled: list[str] = []

    async def attempt(name: str) -> str:
        if name == "slow":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(name)
                raise
        return name

    async def main() -> None:
        assert await race(["slow", "b"], attempt, head_start_s=0, discard=lambda _: None) == "b"

    run_clean(main())
    assert cancelled == ["slow"]


def test_late_success_is_discarded() -> None:
    discarded: list[str] = []

    async def attempt(name: str) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if name == "stubborn":
                return name
            raise
        return name

    async def main() -> None:
        async def quick(name: str) -> str:
            return name if name == "quick" else await attempt(name)

        assert await race(["stubborn", "quick"], quick, head_start_s=0, discard=discarded.append) == "quick"

    run_clean(main())
    assert discarded == ["stubborn"]


def test_cancelled_race_leaves_no_task() -> None:
    async def attempt(name: str) -> str:
        await asyncio.Event().wait()
        return name

    async def main() -> None:
        task = asyncio.create_task(race(["a", "b"], attempt, head_start_s=0, discard=lambda _: None))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_clean(main())


@pytest.mark.parametrize(
    ("errors", "kind", "text"),
    [
        ([PeerConnectionError("one")], PeerConnectionError, "^one$"),
        ([PeerConnectionError("one"), PeerConnectionError("two")], PeerConnectionError, "^one; two$"),
        ([PeerConnectionError("one"), AuthenticationError("two")], AuthenticationError, "^two$"),
    ],
)
def test_most_telling_error_is_raised(errors: list[Exception], kind: type[Exception], text: str) -> None:
    async def attempt(error: Exception) -> None:
        raise error

    async def main() -> None:
        with pytest.raises(kind, match=text):
            await race(errors, attempt, head_start_s=10, discard=lambda _: None)

    run_clean(main())
