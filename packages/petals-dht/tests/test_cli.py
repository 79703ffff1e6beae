from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from petals_core.addresses import Address
from petals_core.swarm_key import SwarmKey
from petals_dht.cli import main
from petals_dht.directory import Directory
from petals_dht.testing import FINGERPRINT, make_announcement


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["petals-dht", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith(f"petals-dht {version('petals-dht')} (Python ")


@pytest.fixture
def bootstrap(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Address]]:
    """A bootstrap node of its own process, and the address that it says to join by."""
    command = [sys.executable, "-m", "petals_dht", "bootstrap", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PETALS_DATA_DIR": str(tmp_path)}
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            prefix = "Ready. Others join with --initial-peers "
            assert line.startswith(prefix)
            yield process, Address.parse(line.removeprefix(prefix))
        finally:
            process.kill()


def announce(peer: Address, *, start: int, end: int) -> None:
    async def work() -> None:
        async with await Directory.connect([peer]) as directory:
            await directory.announce(make_announcement(directory.identity, start=start, end=end, public_name="lab"))

    asyncio.run(work())


@pytest.mark.skipif(os.name != "posix", reason="interrupts a child process")
def test_a_swarm_from_start_to_end(
    bootstrap: tuple[subprocess.Popen[str], Address],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, address = bootstrap
    peers = ["--initial-peers", str(address)]

    assert run(["show", *peers], monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: no server is online in this swarm")

    announce(address, start=0, end=4)
    announce(address, start=3, end=8)
    assert run(["show", *peers], monkeypatch) == 0
    output = capsys.readouterr().out
    assert "test-model  12 blocks" in output
    assert "11121111····" in output
    assert "missing: 8:12" in output
    assert "lab" in output
    assert "0:4     online  127.0.0.1:31330  float32" in output, "an address stays in one piece"

    assert run(["show", "--json", "TEST", *peers], monkeypatch) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["fingerprint"] == FINGERPRINT
    assert model["missing"] == [[8, 12]]
    assert [server["start"] for server in model["servers"]] == [0, 3]

    assert run(["show", "llama", *peers], monkeypatch) == 2
    assert "no server of this swarm serves a model named llama" in capsys.readouterr().err

    assert run(["bootstrap", "--host", "127.0.0.1", "--port", str(address.port)], monkeypatch) == 2
    assert f"port {address.port} is in use: choose another with --port" in capsys.readouterr().err

    process.send_signal(signal.SIGINT)
    assert process.wait() == 0

    assert run(["show", "--timeout", "0.2", *peers], monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no initial peer answered within 0.2 s: 127.0.0.1:")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_new_swarm_key_is_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "swarm.key"
    assert run(["keygen", str(file)], monkeypatch) == 0
    assert SwarmKey.read(file)
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o600
    content = file.read_bytes()
    assert run(["keygen", str(file)], monkeypatch) == 2
    assert "exists already" in capsys.readouterr().err
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show"], "give the address of a peer with --initial-peers"),
        (["show", "--initial-peers", "somewhere"], "expected HOST:PORT"),
        (["show", "--initial-peers", "0.0.0.0:1"], "wildcard"),
        (["show", "--initial-peers", "127.0.0.1:1", "--swarm-key-file", "/no/such/file"], "can't be read"),
        (["bootstrap", "--announce-host", "not a host"], "neither a host name nor an IP address"),
        (["bootstrap", "--colour"], "No such option"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(arguments, monkeypatch) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_verbose_shows_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["show", "--verbose"], monkeypatch) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: no initial peers")


def test_the_program_is_light() -> None:
    heavy = ["torch", "transformers", "numpy", "cryptography", "rich.table", "kademlia"]
    script = f"import sys, petals_dht.cli; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
