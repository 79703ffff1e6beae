"""Labs of real namespaces, where the system allows them: what TCP gets, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from lab import sandbox  # noqa: E402

LAB = [sys.executable, str(TOOLS / "network_lab.py")]
OBSTACLE = sandbox.obstacle()
needs_lab = pytest.mark.skipif(OBSTACLE is not None, reason=f"no lab here: {OBSTACLE}")
# Says who it is and waits, with a child of its own in another session, which no signal to a group would reach.
PARENT = "setsid sleep 1000 & echo $$; exec sleep 1000"


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process of a lab is left by a test, so no namespace and no device either, and no folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    assert traces(tmp_path) == set()


def traces(folder: Path) -> set[str]:
    """Folders of labs in ``folder``, and processes that were told to make theirs there."""
    found = {str(path) for path in folder.glob("network-lab-*")}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={folder}".encode() in path.read_bytes().split(b"\0") and path.parts[2] != str(os.getpid()):
                found.add((path.parent / "cmdline").read_text())
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAB, *arguments], capture_output=True, text=True, check=False, timeout=60)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*LAB, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True)


@needs_lab
def test_tcp_gets_what_was_asked() -> None:
    done = lab("--hosts", "a:delay=4ms,rate=20mbit", "b:delay=6ms", "--measure", "--seconds=1", "--trips=10", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert [(each["source"], each["destination"]) for each in figures] == [("a", "b"), ("b", "a")]
    for each in figures:
        assert each["asked_trip_s"] == pytest.approx(0.020)
        assert each["trip_s"][1] >= 0.020
        # A busy machine may be slower, but no path is faster than it was asked to be.
        assert 0 < each["bits_per_s"] <= 20e6


@needs_lab
def test_a_ring_of_senders_says_what_the_router_took() -> None:
    hosts = [f"{name}:delay=1ms,rate=80mbit" for name in ("a", "b", "c")]
    done = lab("--hosts", *hosts, "--measure", "--ring=0.5", "--json")
    assert done.returncode == 0, done.stderr
    ring = json.loads(done.stdout)
    assert ring["taken_s"] >= 0.05
    assert ring["num_packets"] >= 3 * 500_000 / 65_536
    assert all(sum(ring[who]) > 0 for who in ("router_s", "ends_s"))


@needs_lab
def test_an_open_connection_sends_trains_of_the_size_that_a_change_asks_for() -> None:
    serve = f"""{sys.executable} -c "
import socket
connection = socket.create_server(('b', 99)).accept()[0]
while connection.recv(65536): pass
connection.send(b'!')
" """
    ask = f"""
import json, socket, subprocess
def state():
    done = subprocess.run({LAB} + ["--state", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["a"]
while True:
    try:
        connection = socket.socket()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        connection.connect(("b", 99))
        break
    except ConnectionRefusedError:
        pass
subprocess.run({LAB} + ["--change", "a:rate=40mbit"], check=True, stdout=subprocess.DEVNULL)
before = state()
connection.sendall(bytes(400_000))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
after = state()
print(after["dropped"]["queue"], after["sent_packets"] - before["sent_packets"])
"""
    done = lab("--hosts", "a", "b", "--run", "b", serve, "--", sys.executable, "-c", ask)
    assert done.returncode == 0, done.stderr
    num_dropped, num_packets = map(int, done.stdout.split())
    # Less than the queue before the rate holds: a lost train would come again as single segments.
    assert num_dropped == 0
    # 17 segments of 1,448 bytes each; single ones, as the kernel would send of trains that are too long, are 276.
    assert 400_000 / 25_000 <= num_packets <= 60


@needs_lab
def test_a_command_has_a_network_of_its_own_with_names_and_gives_its_exit_code() -> None:
    script = "import socket, os; print(socket.gethostbyname('b'), os.getpid() < 100); raise SystemExit(7)"
    done = lab("--hosts", "a", "b", "--", sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (7, "10.77.0.2 True\n")


@needs_lab
def test_hosts_are_changed_and_asked_from_within() -> None:
    tool = " ".join(LAB)
    done = lab("--hosts", "a:delay=5ms", "b", "--", "sh", "-c", f"{tool} --change a:rate=3mbit b:loss=5% --json")
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    assert state["a"]["settings"] == "delay=5ms,rate=3mbit"
    assert state["b"]["settings"] == "loss=5%"


@needs_lab
def test_a_command_beside_runs_on_its_host_and_is_ended() -> None:
    serve = f"{sys.executable} -c \"import socket; socket.create_server(('b', 99)).accept()[0].send(b'hi')\""
    ask = """import socket
while True:
    try:
        print(socket.create_connection(("b", 99)).recv(9))
        break
    except ConnectionRefusedError:
        pass"""
    done = lab("--hosts", "a", "b", "--run", "b", serve, "--run", "b", PARENT, "--", sys.executable, "-c", ask)
    assert done.returncode == 0, done.stderr
    assert "b'hi'" in done.stdout


@needs_lab
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(number: signal.Signals, tmp_path: Path) -> None:
    with start("--hosts", "a", "b", "--run", "b", PARENT, "--", "sh", "-c", PARENT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        code = process.wait(30)
        process.stdout.read()  # ends when the last process in the lab has gone
    assert code == (-9 if number is signal.SIGKILL else 128 + number)
    if number is signal.SIGKILL:
        (folder,) = tmp_path.iterdir()
        folder.rmdir()  # it is empty: what was in it went with the lab


@needs_lab
def test_nothing_is_left_when_the_router_dies() -> None:
    done = lab("--hosts", "a", "--", "sh", "-c", "kill -9 2; sleep 1000")
    assert done.returncode == 1
    assert "router has ended" in done.stderr


@needs_lab
@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--hosts", "a", "--", "no-such-program"), 127, "no-such-program"),
        (("--hosts", "a", "--on", "c", "--", "true"), 2, "there is no host c"),
        (("--hosts", "a", "--congestion-control", "none-such", "--", "true"), 1, "none-such"),
        (("--hosts", "a", "--", *LAB, "--change", "c:delay=1ms"), 2, "there is no host c"),
        (("--hosts", "a", "--", *LAB, "--change", "a:delay=much"), 2, "delay"),
        (("--hosts", "a", "--", *LAB, "--on", "c", "--", "true"), 2, "there is no host c"),
    ],
)
def test_what_can_not_be_done_is_said(arguments: tuple[str, ...], code: int, complaint: str) -> None:
    done = lab(*arguments)
    assert done.returncode == code
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--hosts", "a"), "nothing to run"),
        (("--measure",), "has hosts"),
        (("--hosts", "a:speed=1", "--", "true"), "no setting"),
        (("--change", "a:delay=1ms"), "in a lab"),
        (("--on", "a", "--", "true"), "in a lab"),
        (("--file", "/nowhere.toml", "--", "true"), "nowhere"),
        (("--forward", "1", "2", "--hosts", "a", "--", "true"), "two --hosts"),
    ],
)
def test_a_wrong_command_line_is_explained_without_root(arguments: tuple[str, ...], complaint: str) -> None:
    done = lab(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
