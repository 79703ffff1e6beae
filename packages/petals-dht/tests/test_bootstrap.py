"""Bootstrap nodes as processes of their own: they come back as who they were, and say how they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from petals_core.addresses import Address
from petals_core.identity import Identity
from petals_dht.contacts import Contact
from petals_dht.directory import Directory
from petals_dht.node import Node, NodeTiming
from petals_dht.systemd import notify

PREFIX = "Ready. Others join with --initial-peers "
pytestmark = pytest.mark.skipif(os.name != "posix", reason="ends child processes by signals")


def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    program = [sys.executable, "-m", "petals_dht", "bootstrap", "--host", "127.0.0.1", *arguments]
    return program, {**os.environ, "PETALS_DATA_DIR": str(folder)}


@contextlib.contextmanager
def bootstrap(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Address]]:
    program, variables = command(folder, *arguments)
    with subprocess.Popen(program, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(PREFIX)
            yield process, Address.parse(line.removeprefix(PREFIX))
        finally:
            process.kill()


def ask(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program, variables = command(folder, *arguments)
    return subprocess.run(program, env=variables, text=True, capture_output=True, check=False)


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_node_that_was_restarted_is_who_it_was_and_knows_its_swarm(tmp_path: Path) -> None:
    port = str(free_port())

    async def main() -> None:
        with bootstrap(tmp_path, "--port", port) as (process, address):
            member = await Directory.start(Identity.ephemeral(), "127.0.0.1", initial_peers=[address])
            # The node pings who greets it; when it knows the member, it tells others about it.
            while True:
                async with await Directory.connect([address]) as client:
                    if member.port in {contact.port for contact in client.node.protocol.router.contacts()}:
                        break
            first = json.loads(
                await asyncio.to_thread(lambda: ask(tmp_path, "--port", port, "--status", "--json").stdout)
            )
            process.terminate()
            assert await asyncio.to_thread(process.wait) == 0

        with contextlib.ExitStack() as stack:
            # In a thread, since the member has to answer meanwhile.
            entering = bootstrap(tmp_path, "--port", port)
            process, _ = await asyncio.to_thread(stack.enter_context, entering)
            # The member is known at once, without having said a word.
            answered = json.loads(
                await asyncio.to_thread(lambda: ask(tmp_path, "--port", port, "--status", "--json").stdout)
            )
            assert answered["peer_id"] == first["peer_id"]
            assert answered["num_contacts"] == answered["num_answering"] == 1
            status = await asyncio.to_thread(ask, tmp_path, "--port", port, "--status")
            assert status.returncode == 0
            assert status.stdout.startswith("answers   in ")
            assert "contacts  1, of which 1 answered lately" in status.stdout
            process.send_signal(signal.SIGKILL)
        await member.close()

        status = await asyncio.to_thread(ask, tmp_path, "--port", port, "--status")
        assert status.returncode == 2
        assert f"does not answer at port {port}" in status.stderr

    asyncio.run(main())


def test_a_state_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    file, content = tmp_path / "state.json", b"\x80\x04cos\nsystem"
    file.write_bytes(content)
    for arguments in (["--port", "0"], ["--status"]):
        outcome = ask(tmp_path, "--state", str(file), *arguments)
        assert outcome.returncode == 2
        assert outcome.stderr.startswith(f"error: {file} is no state file of a bootstrap node (it is not JSON)")
        assert outcome.stderr.count("\n") == 1
    assert file.read_bytes() == content


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["--status"], "no bootstrap node has written"),
        (["--port", "0", "--json"], "--json goes with --status"),
        (["--port", "0", "--state", "/proc/no/such/file"], "can't be written"),
        (["--port", "0", "--max-requests-per-s", "1"], "--max-requests-per-s"),
    ):
        outcome = ask(tmp_path, *arguments)
        assert outcome.returncode == 2
        assert message in outcome.stderr
        assert outcome.stderr.count("\n") == 1


def test_the_state_file_is_private(tmp_path: Path) -> None:
    with bootstrap(tmp_path, "--port", "0"):
        file = tmp_path / "bootstrap-0.json"
        assert file.stat().st_mode & 0o777 == 0o600


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        with bootstrap(tmp_path, "--port", "0") as (process, _):
            assert manager.recv(1000).startswith(b"READY=1\nSTATUS=listening on port ")
            process.terminate()
            assert process.wait() == 0
        messages = [manager.recv(1000), manager.recv(1000)]
        assert messages[-1] == b"STOPPING=1"
    assert not notify("READY=1"), "nobody listens any more"


def test_contacts_that_are_gone_do_not_keep_a_node_from_starting() -> None:
    async def main() -> None:
        living = await Node.start(Identity.ephemeral(), "127.0.0.1")
        timing = NodeTiming(attempt_timeout_s=0.1)
        dead = [Contact(bytes([number]) * 20, "127.0.0.1", free_port()) for number in range(3)]
        known = Contact(living.protocol.own.id, "127.0.0.1", living.port)
        node = await Node.start(
            Identity.ephemeral(),
            "127.0.0.1",
            contacts=[*dead, known],
            initial_peers=[Address("127.0.0.1", dead[0].port)],
            timing=timing,
        )
        assert [contact.port for contact in node.protocol.router.contacts()] == [living.port]
        alone = await Node.start(Identity.ephemeral(), "127.0.0.1", contacts=dead, timing=timing)
        assert not len(alone.protocol.router)
        for each in (living, node, alone):
            await each.close()

    asyncio.run(main())
