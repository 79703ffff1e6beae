"""What a user can get wrong, through the public commands and functions: one clear line, and never a traceback.

What a peer can get wrong is tested with the packages (``petals-core/tests/wire`` for frames and versions,
``petals-server/tests/test_serving.py`` for requests), missing blocks and silent servers in ``test_sessions.py``.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import petals_dht.cli
import petals_server.cli
from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_client.directory import ServerDirectory
from petals_core.errors import MissingBlocksError
from petals_core.identity import Identity
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.terminal import EXIT_ERROR, run_app
from petals_core.testing.factories import edit_config, make_checkpoint
from petals_core.testing.hub import NAME, FakeHub, serving, sha256
from petals_dht.testing import make_announcement, start_swarm

Refuse = Callable[..., str]
NEW_SWARM = ("--new-swarm", "--host", "127.0.0.1", "--port", "0")


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and remembered hashes of tests do not mix with the user's, and nobody asks the hub."""
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setitem(os.environ, "PETALS_DATA_DIR", str(folder / "data"))
    monkeypatch.setitem(os.environ, "PETALS_CACHE_DIR", str(folder / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of three blocks."""
    return make_checkpoint(tmp_path_factory.mktemp("llama"), num_blocks=3)


@pytest.fixture
def serve(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run ``petals-server serve`` in this process and return its line of error."""
    return lambda *arguments: refusal(capsys, petals_server.cli.app, ["serve", *map(str, arguments)])


@pytest.fixture
def directory(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run ``petals-dht`` in this process and return its line of error."""
    return lambda *arguments: refusal(capsys, petals_dht.cli.app, list(map(str, arguments)))


def refusal(capsys: pytest.CaptureFixture[str], app: Any, arguments: Sequence[str]) -> str:
    """Run a command that has to fail, as its program does, and return what it says."""
    with pytest.raises(SystemExit) as ended:
        run_app(partial(app, args=list(arguments)))
    output = capsys.readouterr().err
    assert ended.value.code == EXIT_ERROR, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert output.splitlines()[-1] == errors[0]
    assert "Traceback" not in output
    return errors[0]


# --- the model --------------------------------------------------------------------------------------------------------


def test_no_such_model(serve: Refuse, tmp_path: Path) -> None:
    assert f"{tmp_path / 'missing'} is not a checkpoint" in serve(tmp_path / "missing", *NEW_SWARM)


def test_checkpoint_without_safetensors(serve: Refuse, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert "safetensors" in serve(tmp_path, *NEW_SWARM)


def test_architecture_that_can_not_be_split(serve: Refuse, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_blocks=1)
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "t5" in serve(folder, *NEW_SWARM)


def copy_of(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """A checkpoint to be broken, with another config."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    edit_config(folder, **changes)
    return folder


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_weights(serve: Refuse, checkpoint: Path, tmp_path: Path, kept: float) -> None:
    weights = copy_of(checkpoint, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * kept)])
    assert "truncated" in serve(tmp_path, *NEW_SWARM)


def test_weights_with_a_broken_header(serve: Refuse, checkpoint: Path, tmp_path: Path) -> None:
    weights = copy_of(checkpoint, tmp_path) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[8:40] = b"?" * 32
    weights.write_bytes(content)
    assert "has a broken header: copy or download the checkpoint again" in serve(tmp_path, *NEW_SWARM)


def test_a_file_is_missing(serve: Refuse, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_blocks=3, max_shard_size=100_000)
    missing = sorted(tmp_path.glob("*.safetensors"))[2]
    missing.unlink()
    assert f"{missing} is missing although the checkpoint's index names it" in serve(tmp_path, *NEW_SWARM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "do not fit its config"),
        ({"intermediate_size": 96}, "do not fit its config"),
        ({"num_key_value_heads": 4}, "do not fit its config"),
        ({"num_hidden_layers": 5}, "has no tensors for block 3 although its config says 5 blocks"),
        ({"attention_bias": True}, "lacks 12 tensors that its config asks for"),
        ({"hidden_size": "wide"}, "can't be read"),
    ],
)
def test_a_config_that_disagrees_with_the_weights(
    serve: Refuse, checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in serve(copy_of(checkpoint, tmp_path, **changes), *NEW_SWARM)


def test_code_that_comes_with_a_checkpoint(serve: Refuse, checkpoint: Path, tmp_path: Path) -> None:
    copy_of(checkpoint, tmp_path, model_type="novel", auto_map={"AutoConfig": "code.Config"})
    (tmp_path / "code.py").write_text("raise SystemExit('the code was run')")
    line = serve(tmp_path, *NEW_SWARM)
    assert "comes with code of its own (novel)" in line
    assert "--trust-remote-code" in line


def test_quantization_that_can_not_be_had(serve: Refuse, checkpoint: Path, tmp_path: Path) -> None:
    assert "--quantization int4 is none of none, int8, nf4, auto" in serve(
        checkpoint, *NEW_SWARM, "--quantization", "int4"
    )
    copy_of(checkpoint, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    assert "is stored quantized in gptq, which can't be used on cpu here" in serve(tmp_path, *NEW_SWARM)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(checkpoint, monkeypatch) as hub:
        yield hub


def test_a_hub_out_of_reach(serve: Refuse, hub: FakeHub, tmp_path: Path) -> None:
    hub.status = 503
    assert "the hub could not be reached for" in serve(NAME, *NEW_SWARM, "--cache-dir", tmp_path)


def test_downloads_that_fail_leave_nothing_that_breaks_the_next_start(
    serve: Refuse, hub: FakeHub, tmp_path: Path
) -> None:
    options = (*NEW_SWARM, "--cache-dir", tmp_path)
    assert "more than --max-disk-space 0 MiB leaves" in serve(NAME, *options, "--max-disk-space", "10kB")
    hub.claimed_bytes = 10**17
    assert "too little room" in serve(NAME, *options)
    hub.claimed_bytes, hub.num_corrupted = None, 1000
    assert "arrives broken from the hub" in serve(NAME, *options)
    hub.num_corrupted = 0
    assert load_span(Checkpoint.open(NAME, cache_dir=tmp_path), 0, 3).num_blocks == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
def test_a_full_disk(serve: Refuse, hub: FakeHub, tmp_path: Path) -> None:
    Checkpoint.open(NAME, cache_dir=tmp_path)
    full = next(tmp_path.glob("models--*")) / "blobs" / f"{sha256(hub.folder / 'model.safetensors')}.part"
    full.symlink_to("/dev/full")
    assert "(No space left on device): make room" in serve(NAME, *NEW_SWARM, "--cache-dir", tmp_path)
    assert load_span(Checkpoint.open(NAME, cache_dir=tmp_path), 0, 3).num_blocks == 3


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_outside_the_model(serve: Refuse, checkpoint: Path) -> None:
    assert "has blocks 0:3, which do not include 2:5" in serve(checkpoint, *NEW_SWARM, "--blocks", "2:5")


def test_blocks_that_are_no_span(serve: Refuse, checkpoint: Path) -> None:
    assert "give FIRST:END" in serve(checkpoint, *NEW_SWARM, "--blocks", "2-5")


# --- the machine ------------------------------------------------------------------------------------------------------


def test_not_enough_memory(serve: Refuse, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_blocks=1)
    edit_config(folder, intermediate_size=10**10)  # 7,000 gigabytes a block; only the config says so
    line = serve(folder, *NEW_SWARM, "--blocks", "0:1")
    assert "MiB are free" in line or "there is no memory" in line


def test_more_cache_than_there_is_memory(serve: Refuse, checkpoint: Path) -> None:
    line = serve(checkpoint, *NEW_SWARM, "--attn-cache-tokens", 10**17)  # no address space holds them
    assert "there is not enough memory on cpu for blocks 0:3" in line
    assert "lower --attn-cache-tokens" in line


def test_device_that_is_not_there(serve: Refuse, checkpoint: Path) -> None:
    assert "there is no device cuda:99" in serve(checkpoint, *NEW_SWARM, "--device", "cuda:99")


def test_port_in_use(serve: Refuse, checkpoint: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = serve(checkpoint, "--new-swarm", "--host", "127.0.0.1", "--port", port)
    assert str(port) in line
    assert "in use" in line


# --- the swarm --------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_address() -> Iterator[str]:
    """An address where nobody answers: the port is held, and never read."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{silent.getsockname()[1]}"


def test_no_peer_answers(directory: Refuse, silent_address: str) -> None:
    line = directory("show", "--initial-peers", silent_address, "--timeout", "0.2")
    assert silent_address in line


def test_addresses_that_nobody_can_connect_to(serve: Refuse, checkpoint: Path) -> None:
    assert "wildcard" in serve(checkpoint, "--initial-peers", "0.0.0.0:31330")
    assert "expected HOST:PORT" in serve(checkpoint, "--initial-peers", "nowhere")


def test_neither_new_swarm_nor_peers(serve: Refuse, checkpoint: Path) -> None:
    assert "give either --new-swarm" in serve(checkpoint)


def test_swarm_key_that_is_none(directory: Refuse, tmp_path: Path, silent_address: str) -> None:
    (tmp_path / "key").write_text("secret")
    line = directory("show", "--initial-peers", silent_address, "--swarm-key-file", tmp_path / "key")
    assert "is not 64 hexadecimal digits" in line


@pytest.mark.parametrize(("offset_s", "way"), [(3600.0, "behind"), (-3600.0, "ahead")])
def test_a_clock_that_is_an_hour_off(offset_s: float, way: str) -> None:
    def clock() -> float:  # the swarm's, as this process sees it
        return time.time() + offset_s

    async def find() -> MissingBlocksError:
        announcement = make_announcement(now_s=clock())
        async with start_swarm(2, clock=clock) as swarm:
            await swarm[1].announce(announcement)
            known = ServerDirectory(
                ClientOptions.make(initial_peers=[f"127.0.0.1:{swarm[0].port}"]),
                model_name="TEST",
                fingerprint=announcement.announcement.fingerprint,
                num_blocks=announcement.announcement.num_blocks,
                identity=Identity.ephemeral(),
            )
            try:
                return await known.explain_missing(0, 1)
            finally:
                await known.close()

    assert f"this machine's clock seems to be about 60 minutes {way}" in asyncio.run(find()).message


# --- results that are not exact ---------------------------------------------------------------------------------------


def test_servers_of_another_dtype_are_told(new_swarm: Any, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    swarm = new_swarm()
    swarm.add(checkpoint, 0, 2)
    odd = swarm.add(checkpoint, 2, 3, torch_dtype="bfloat16")
    model = AutoDistributedModelForCausalLM.from_pretrained(checkpoint, initial_peers=swarm.initial_peers)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
        model(torch.tensor([[3, 4, 5]]))
    model.close()
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("petals_client")]
    assert odd.peer_id.short in warning
    assert "computes with bfloat16 and this model with float32: results differ slightly" in warning
