from __future__ import annotations

from pathlib import Path

import pytest

from petals_core.errors import ConfigurationError, DrainingError
from petals_core.identity import Identity
from petals_core.testing.network import run_clean
from petals_server.comfort.busyness import BUSY_AFTER_S, IDLE_AFTER_S, Busyness, parse_gpu_use
from petals_server.comfort.guest import Guest, Served
from petals_server.comfort.ledger import ServedLedger
from petals_server.comfort.meter import CpuMeter, GpuMeter, make_meter
from petals_server.comfort.schedule import Schedule
from petals_server.config import parse_rate
from petals_server.status import ServerRecord, look, read_records, remove_record, save_record
from petals_server.testing import connected, random_states, served


@pytest.mark.parametrize(
    ("text", "minute", "is_open"),
    [
        ("22:00-07:00", 23 * 60, True),
        ("22:00-07:00", 6 * 60 + 59, True),
        ("22:00-07:00", 7 * 60, False),
        ("8:00-12:00,13:00-17:30", 12 * 60 + 30, False),
        ("8:00-12:00, 13:00-17:30", 13 * 60, True),
        ("20:00-24:00", 24 * 60 - 1, True),
    ],
)
def test_hours(text: str, minute: int, is_open: bool) -> None:
    assert Schedule.parse(text).is_open(minute) is is_open


@pytest.mark.parametrize("text", ["", "22-7", "25:00-3:00", "1:00-1:00", "1:60-2:00", "1:00-2:00;3:00-4:00"])
def test_hours_that_are_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--schedule"):
        Schedule.parse(text)


def test_rates_are_of_bits_or_bytes() -> None:
    assert parse_rate("20mbit") == 2.5e6
    assert parse_rate("2.5 MB") == 2.5e6
    assert parse_rate("1Gbps".replace("bps", "bit")) == 1.25e8
    for text in ("", "20", "1kbit", "-5MB", "fast"):
        with pytest.raises(ConfigurationError, match="--max-upload"):
            parse_rate(text)


def test_the_owner_is_busy_soon_and_idle_after_a_while() -> None:
    busyness = Busyness()
    assert not busyness.note(0.9, now_s=0)
    assert not busyness.note(0.1, now_s=5)  # a moment only
    assert not busyness.note(0.9, now_s=6)
    assert busyness.note(0.9, now_s=6 + BUSY_AFTER_S)
    assert busyness.note(0.0, now_s=20)
    assert busyness.note(0.3, now_s=30)  # neither busy nor idle
    assert busyness.note(0.0, now_s=40)
    assert not busyness.note(0.0, now_s=40 + IDLE_AFTER_S)


def test_what_the_driver_tells() -> None:
    text = """# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command
# Idx           #    C/G      %      %      %      %      %      %    name
    0       1234     C     87     40      -      -      -      -    python
    0        999     G     31      5      -      -      -      -    game
    0       1000     G      -      -      -      -      -      -    Xorg
"""
    assert parse_gpu_use(text, {1234}) == pytest.approx(0.31)
    assert parse_gpu_use(text, set()) == 1.0
    assert parse_gpu_use("garbage\n\n0 - - -", set()) == 0.0


def test_meters_measure() -> None:
    run_clean(_meters_measure())


async def _meters_measure() -> None:
    meter = make_meter("cpu")
    assert isinstance(meter, CpuMeter)
    assert 0.0 <= await meter.measure() <= 1.0
    other = make_meter("cuda:1")
    assert isinstance(other, GpuMeter)
    assert 0.0 <= await other.measure() <= 1.0


def test_a_gpu_that_cannot_be_measured_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def measure() -> None:
        meter = GpuMeter(0)
        assert [await meter.measure() for _ in range(2)] == [0.0, 0.0]

    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi there
    run_clean(measure())
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert record.getMessage().startswith("--pause-when-busy has no effect, since nvidia-smi can't be run: ")


def test_the_minutes_line() -> None:
    before, after = Served(num_tokens=10, num_requests=1), Served(num_tokens=52, num_requests=2, num_sessions=3)
    assert after.since(before) == "served 42 tokens in the last minute, 1 new requests, 3 sessions open"
    assert not after.since(after)


def test_the_ledger_forgets_the_oldest() -> None:
    ledger = ServedLedger()
    peers = [Identity.ephemeral().peer_id for _ in range(3)]
    for peer in [*peers, peers[0]]:
        ledger.note(peer, num_tokens=2, num_blocks=3)
    assert (ledger.num_tokens, ledger.block_tokens, ledger.num_peers) == (8, 24, 3)
    assert ledger.block_tokens_of(peers[0]) == 12


def test_a_server_pauses_and_goes_on_by_the_clock(checkpoint: Path) -> None:
    run_clean(_a_server_pauses_and_goes_on_by_the_clock(checkpoint))


async def _a_server_pauses_and_goes_on_by_the_clock(checkpoint: Path) -> None:
    async with served(checkpoint) as client:
        server = client.server
        guest = Guest(server, schedule=Schedule.parse("22:00-07:00"), meter=None)
        await guest.look(minute=12 * 60, now_s=0.0)
        assert not server.is_online
        assert server.record().state == "paused"
        with pytest.raises(DrainingError):
            await client.open()
        await guest.look(minute=12 * 60 + 1, now_s=60.0)
        await guest.look(minute=22 * 60, now_s=120.0)
        assert server.is_online
        session = await client.open()
        await session.step([random_states(1, 3)[0]])
        assert server.served().num_tokens == 3


def test_sending_is_limited_and_exact(checkpoint: Path) -> None:
    run_clean(_sending_is_limited_and_exact(checkpoint))


async def _sending_is_limited_and_exact(checkpoint: Path) -> None:
    states = [random_states(1, 64)[0]]
    async with served(checkpoint) as free:
        expected = await free.forward(states)
    async with served(checkpoint, max_upload_bytes_per_s=200_000.0) as limited, connected(limited.server) as client:
        result = await client.forward(states)
    assert (result[0] == expected[0]).all()


def test_status_tells_what_runs(checkpoint: Path) -> None:
    run_clean(_status_tells_what_runs(checkpoint))


async def _status_tells_what_runs(checkpoint: Path) -> None:
    async with served(checkpoint) as client:
        await client.forward([random_states(1, 5)[0]])
        path = save_record(client.server.record())
        ((record, round_trip_s),) = await look(None)
        assert round_trip_s is not None
        assert (record.start, record.end, record.num_tokens, record.state) == (0, 4, 5, "online")
        text = "\n".join(record.lines(round_trip_s, now_s=record.saved_at_s))
        assert "blocks 0:4 of 4, online, answers in" in text
    ((record, round_trip_s),) = await look(None)
    assert round_trip_s is None
    assert path is not None
    path.write_text("{nonsense")
    assert read_records() == []
    with pytest.raises(ValueError, match="not JSON"):
        ServerRecord.read(path)
    remove_record(path)
    with pytest.raises(ConfigurationError, match="no server of yours runs"):
        await look(None)
