import asyncio
import random
from typing import Any, cast

from petals_core.addresses import Address
from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.errors import NoPeersError
from petals_core.identity import Identity
from petals_core.testing.network import run_clean
from petals_dht.directory import Directory
from petals_server.announcer import Announcer
from petals_server.testing import until


class Notebook:
    """Stands for a directory: notes what it is told, or fails."""

    def __init__(self) -> None:
        self.announced: list[SignedAnnouncement] = []
        self.withdrawn: list[SignedAnnouncement] = []
        self.num_attempts = 0
        self.is_down = False

    async def announce(self, signed: SignedAnnouncement, *, timeout_s: float) -> int:
        self.num_attempts += 1
        if self.is_down:
            raise NoPeersError("nobody answers")
        self.announced.append(signed)
        return 1

    async def withdraw(self, signed: SignedAnnouncement) -> int:
        if self.is_down:
            raise NoPeersError("nobody answers")
        self.withdrawn.append(signed)
        return 1


def describe(now_s: float, expires_at_s: float) -> Announcement:
    return Announcement(
        model_name="demo",
        fingerprint="f" * 64,
        num_blocks=4,
        start=0,
        end=2,
        addresses=(Address("127.0.0.1", 31330),),
        state="online",
        torch_dtype="float32",
        issued_at_s=now_s,
        expires_at_s=expires_at_s,
    )


def announcer(notebook: Notebook, **changes: Any) -> Announcer:
    arguments: dict[str, Any] = {"interval_s": 0.01, "lifetime_s": 120.0, "rng": random.Random(0), **changes}
    return Announcer(cast(Directory, notebook), Identity.ephemeral(), describe, **arguments)


def test_it_announces_again_and_again_and_then_withdraws() -> None:
    async def run() -> None:
        notebook = Notebook()
        server = announcer(notebook)
        await server.start()
        assert len(notebook.announced) == 1
        await until(lambda: len(notebook.announced) >= 3)
        first, *_, last = notebook.announced
        assert first.announcement.issued_at_s < last.announcement.issued_at_s
        assert last.announcement.expires_at_s - last.announcement.issued_at_s == 120
        await server.stop()
        await server.stop()
        assert notebook.withdrawn == [notebook.announced[-1]]

    run_clean(run())


def test_it_survives_a_directory_that_is_gone_for_a_while() -> None:
    async def run() -> None:
        notebook = Notebook()
        server = announcer(notebook)
        await server.start()
        notebook.is_down = True
        num_attempts = notebook.num_attempts
        await until(lambda: notebook.num_attempts >= num_attempts + 3)
        notebook.is_down = False
        num_announced = len(notebook.announced)
        await until(lambda: len(notebook.announced) > num_announced)
        notebook.is_down = True
        await server.stop()
        assert notebook.withdrawn == []

    run_clean(run())


def test_a_first_announcement_that_nobody_keeps_is_an_error() -> None:
    async def run() -> None:
        notebook = Notebook()
        notebook.is_down = True
        server = announcer(notebook)
        try:
            await server.start()
        except NoPeersError:
            pass
        else:
            raise AssertionError("the server believes that it is announced")
        assert len(asyncio.all_tasks()) == 1

    run_clean(run())
