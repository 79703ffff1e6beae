import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from petals_core.errors import ConfigurationError
from petals_server.cli import normalize_arguments
from petals_server.config import ServerConfig, parse_blocks

ADDRESS = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "m", "--num_blocks", "3"], ["serve", "m", "--num-blocks", "3"]),
        (["--block_indices=0:4"], ["--blocks=0:4"]),
        (
            ["--adapters", "a", "x=b/c", "--new_swarm"],
            ["--adapters", "a", "--adapters", "x=b/c", "--new-swarm"],
        ),
        (["--torch_dtype", "float32", "--new_swarm"], ["--torch-dtype", "float32", "--new-swarm"]),
        (["--public_name", "a_b"], ["--public-name", "a_b"]),
        (["--public_ip", "1.2.3.4", "--identity_path=x_y"], ["--announce-host", "1.2.3.4", "--identity=x_y"]),
        (
            ["--initial_peers", "a:1", "b:2", "[::1]:3", "--port", "0"],
            ["--initial-peers", "a:1", "--initial-peers", "b:2", "--initial-peers", "[::1]:3", "--port", "0"],
        ),
        (["--initial-peers", "a:1", "my/model"], ["--initial-peers", "a:1", "my/model"]),
        (["--initial-peers=a:1", "b:2", "model"], ["--initial-peers=a:1", "--initial-peers", "b:2", "model"]),
        (["--initial-peers", "nonsense", "model"], ["--initial-peers", "nonsense", "model"]),
        (["model", "a:1"], ["model", "a:1"]),
        (["--", "--num_blocks"], ["--", "--num_blocks"]),
    ],
)
def test_options_of_earlier_versions(arguments: list[str], expected: list[str]) -> None:
    assert normalize_arguments(arguments) == expected


def test_blocks_are_read() -> None:
    assert parse_blocks("0:4") == (0, 4)


@pytest.mark.parametrize("text", ["", "4", "0-4", "a:b", "-1:3", "1:2:3", "0x1:2", "²:3", "1:" + "9" * 5000])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--blocks"):
        parse_blocks(text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"blocks": (4, 4)}, "4:4 are not a span"),
        ({"blocks": (0, 4), "num_blocks": 4}, "exclude each other"),
        ({"num_blocks": 0}, "--num-blocks 0"),
        ({"port": 65536}, "--port 65536"),
        ({"torch_dtype": "int8"}, "--torch-dtype int8 is none of auto"),
        ({"host": "not a host"}, "--host 'not a host'"),
        ({"announce_host": "0.0.0.0"}, "nobody can connect to a wildcard"),
        ({"public_name": "two\nlines"}, "--public-name"),
        ({"public_name": "x" * 129}, "--public-name"),
        ({"cache_tokens": 0}, "--attn-cache-tokens"),
        ({"num_threads": 0}, "--threads"),
    ],
)
def test_configurations_that_contradict_themselves(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        ServerConfig(model="m", **changes)  # type: ignore[arg-type]


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "petals_server", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["/no/such/folder", "--new-swarm"], "/no/such/folder is not a checkpoint"),
        (["model", "--new-swarm", "--initial-peers", ADDRESS], "either --new-swarm.* or --initial-peers"),
        (["model", "--initial_peers", "nowhere"], "'nowhere' is not an address: expected HOST:PORT"),
    ],
)
def test_errors_take_one_line(arguments: list[str], text: str) -> None:
    with start(["serve", *arguments]) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")

    assert re.search(text, errors), errors


def test_without_arguments_there_is_help() -> None:
    with start([]) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("Usage: ")
    assert errors.count("\n") > 5


def test_help_shows_no_names_of_earlier_versions() -> None:
    with start(["serve", "--help"]) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--num-blocks" in output
    assert "num_blocks" not in output
    assert "Servers can read what passes through them." in " ".join(output.split())


def test_a_server_says_where_to_join_and_leaves_when_asked_to(checkpoint: Path) -> None:
    with start(["serve", str(checkpoint), "--new-swarm", "--port", "0", "--threads", "1"]) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    start_of_line = f"serving {checkpoint.name} blocks 0:4 · join with --initial-peers 127.0.0.1:"
    assert line.startswith(start_of_line)
    assert line.removeprefix(start_of_line).strip().isdecimal()
    assert output == ""
    assert len(errors.splitlines()) <= 12
    assert "can read whatever passes through it" in errors
