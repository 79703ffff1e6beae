from pathlib import Path

import pytest
import torch
from _pytest.logging import LogCaptureFixture

from petals_core.errors import ConfigurationError, UnsupportedModelError
from petals_core.testing.factories import edit_config, make_checkpoint
from petals_core.testing.network import run_clean
from petals_dht.directory import Directory
from petals_server.config import ServerConfig, parse_size
from petals_server.loading import open_model
from petals_server.server import Server
from petals_server.testing import config_for, connected, random_states


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_server_says_what_its_weights_are(checkpoint: Path, quantization: str, caplog: LogCaptureFixture) -> None:
    caplog.set_level("INFO", "petals_server")
    states = random_states(1, 5)

    async def run() -> None:
        async with (
            Server(config_for(checkpoint)) as exact,
            Server(config_for(checkpoint, quantization=quantization)) as server,
            connected(exact) as exact_client,
            connected(server) as client,
            await Directory.connect([server.address]) as directory,
        ):
            assert [(await each.info()).quantization for each in (exact_client, client)] == ["none", quantization]
            found = await directory.find_servers(server.model.fingerprint)
            assert [signed.announcement.quantization for signed in found] == [quantization]
            assert server.model.span.num_bytes < exact.model.span.num_bytes / 2
            (expected,), (output,) = await exact_client.forward(states), await client.forward(states)
            assert 0.001 < float((output - expected).norm() / expected.norm()) < 0.8

    run_clean(run())
    assert f"100 % of the weights are in {quantization}: results differ a little" in caplog.text


def test_a_quantized_block_takes_less_memory(checkpoint: Path) -> None:
    opened = {kind: open_model(ServerConfig(model=str(checkpoint), quantization=kind)) for kind in ("none", "nf4")}
    assert {kind: model.quantization for kind, model in opened.items()} == {"none": "none", "nf4": "nf4"}
    assert opened["nf4"].block_bytes < opened["none"].block_bytes / 5
    assert opened["none"].dtype == opened["nf4"].dtype == torch.float32


def test_what_can_not_be_quantized_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_blocks=1)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="stored quantized in gptq, which can't be used on cpu here"):
        open_model(ServerConfig(model=str(folder)))
    with pytest.raises(ConfigurationError, match="--quantization int4 is none of none, int8, nf4, auto"):
        ServerConfig(model=str(folder), quantization="int4")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1", 1), ("500MB", 5 * 10**8), ("1.5 GiB", 3 << 29), ("2T", 2 * 10**12), ("10kb", 10_000)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1PB", "0", "1e9", "0.1", "1 000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a size: give for example 200GB"):
        parse_size(text)
