"""The monitor as people and programs start it: real nodes, servers without a model, processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import struct
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from petals_core.addresses import Address
from petals_core.identity import Identity
from petals_core.swarm_key import SwarmKey
from petals_dht.testing import StubServer, make_announcement, start_swarm


async def run_monitor(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``petals-dht monitor``."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "petals_dht",
        "monitor",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100"},
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def start_servers() -> AsyncIterator[tuple[str, StubServer, StubServer]]:
    """A swarm with two servers; the option to join it by."""
    async with start_swarm(2) as swarm:
        peer = Address("127.0.0.1", swarm[0].port)
        first = await StubServer.start([peer], start=0, end=8, public_name="attic", inference_tokens_per_s=40.0)
        second = await StubServer.start([peer], start=6, end=12, public_name="lab")
        try:
            yield f"--initial-peers={peer}", first, second
        finally:
            await first.vanish()
            await second.vanish()


def test_printing_and_exports() -> None:
    async def main() -> None:
        async with start_servers() as (peer, _, second):
            code, text, _ = await run_monitor(peer)
            assert code == 0
            assert "✔ complete" in text
            assert "held by 111111221111" in text
            assert all(name in text for name in ("attic", "lab", "online"))
            assert "\x1b" not in text

            await second.listener.close()
            code, text, _ = await run_monitor(peer, "--json")
            assert code == 0
            (model,) = json.loads(text)["models"]
            assert model["dark"] == [[8, 12]]
            assert {server["name"]: server["state"] for server in model["servers"]} == {
                "attic": "online",
                "lab": "silent",
            }
            assert model["servers"][0]["delay_s"] > 0
            assert "refused" in model["servers"][1]["failure"]

            code, text, _ = await run_monitor(peer, "--prometheus", "TEST")
            assert code == 0
            assert "\npetals_model_dark_blocks{" in text
            assert text.count("\npetals_server_up{") == 2

            code, text, error = await run_monitor(peer, "llama", "--once")
            assert (code, text) == (2, "")
            assert error.startswith("error: no server of this swarm serves a model named llama")

    asyncio.run(main())


def test_a_private_swarm_and_one_without_servers(tmp_path: Path) -> None:
    key, file = SwarmKey.generate(), tmp_path / "swarm.key"
    file.touch(mode=0o600)
    file.write_text(key.secret.hex() + "\n")

    async def main() -> None:
        async with start_swarm(1, swarm_key=key) as swarm:
            peer = f"--initial-peers=127.0.0.1:{swarm[0].port}"
            code, _, error = await run_monitor(peer, f"--swarm-key-file={file}")
            assert code == 2
            assert error.startswith("error: no server is online in this swarm")
            code, _, error = await run_monitor(peer, "--timeout=0.3")
            assert code == 2
            assert error.startswith("error: no initial peer answered within 0.3 s")
            assert error.count("\n") == 1

    asyncio.run(main())


@pytest.mark.parametrize(("offset_s", "way"), [(3600.0, "behind"), (-3600.0, "ahead")])
def test_a_clock_that_is_an_hour_off(offset_s: float, way: str) -> None:
    async def main() -> None:
        # The swarm's clock differs from that of the monitor's process, which is this machine's.
        def clock() -> float:
            return time.time() + offset_s

        async with start_swarm(2, clock=clock) as swarm:
            await swarm[1].announce(make_announcement(Identity.ephemeral(), now_s=clock()))
            code, _, error = await run_monitor(f"--initial-peers=127.0.0.1:{swarm[0].port}", "--once")
            assert code == 2
            assert error.startswith(f"error: this machine's clock seems to be about 60 minutes {way}")
            assert error.count("\n") == 1

    asyncio.run(main())


def test_contradicting_options_are_one_line() -> None:
    code, _, error = asyncio.run(run_monitor("--json", "--prometheus", "--initial-peers=127.0.0.1:1"))
    assert code == 2
    assert error == "error: --once, --json and --prometheus exclude each other: give one of them\n"


class Screen:
    """A monitor on a terminal of its own."""

    def __init__(self, *arguments: str, width: int = 80, height: int = 24) -> None:
        import pty

        self.outer, self.inner = pty.openpty()
        self.resize(width, height)
        self.arguments = arguments
        self.shown = ""
        self._changed = asyncio.Event()

    def resize(self, width: int, height: int) -> None:
        import termios

        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    async def __aenter__(self) -> Screen:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "petals_dht",
            "monitor",
            *self.arguments,
            stdin=self.inner,
            stdout=self.inner,
            stderr=self.inner,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            | {"TERM": "xterm-256color"},
        )
        asyncio.get_running_loop().add_reader(self.outer, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        asyncio.get_running_loop().remove_reader(self.outer)
        os.close(self.outer)
        os.close(self.inner)

    def _read(self) -> None:
        self.shown += os.read(self.outer, 1 << 16).decode(errors="replace")
        self._changed.set()

    async def wait_for(self, *texts: str) -> None:
        """Until all of these were written since the last call."""
        while not all(text in self.shown for text in texts):
            self._changed.clear()
            await self._changed.wait()
        self.shown = ""

    def press(self, keys: bytes) -> None:
        self.shown = ""
        os.write(self.outer, keys)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_live_screen() -> None:
    import termios

    async def main() -> None:
        async with start_servers() as (peer, first, second), Screen(peer, "--refresh=1") as screen:
            before = termios.tcgetattr(screen.inner)
            await screen.wait_for("2 servers", "attic", "lab", "sort: blocks")
            screen.press(b"s")
            await screen.wait_for("sort: name")
            screen.press(b"\r")
            await screen.wait_for("peer id", str(first.directory.identity.peer_id), "answers")
            screen.press(b"\x1b")
            await screen.wait_for("sort: name")
            screen.press(b"/lab\r")
            await screen.wait_for("only", "'lab'")
            screen.press(b"\x1b")
            await second.leave()
            await screen.wait_for("1 server ", "4 dark")
            await first.vanish()
            await screen.wait_for("attic announces itself and does not answer")
            screen.press(b"q")
            assert await screen.process.wait() == 0
            assert termios.tcgetattr(screen.inner) == before

    asyncio.run(main())


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_that_is_too_small() -> None:
    async def main() -> None:
        async with start_servers() as (peer, _, _):
            async with Screen(peer, width=40, height=10) as screen:
                await screen.wait_for("error: the terminal has room for 40 x 10 characters")
                assert await screen.process.wait() == 2
            async with Screen(peer, "--refresh=1") as screen:
                await screen.wait_for("attic")
                screen.resize(40, 10)
                await screen.wait_for("at least 60 x 16 is needed")
                screen.resize(100, 30)
                await screen.wait_for("attic")
                screen.process.terminate()
                assert await screen.process.wait() == 0

    asyncio.run(main())
