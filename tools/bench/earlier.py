"""Petals 2.2.0 for comparison: an environment of its own, its model as a hub entry, its servers.

It runs on Python 3.10 with the versions of its time. hivemind is taken from its source archive, whose build would
download a program; that program is in the wheel of a later version. Needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
FOLDER: Final = ROOT / ".benchmarks" / "petals-2.2.0"
"""Git-ignored; 6 GB, most of it torch with CUDA, which is the only one that a package index has for this version."""
MODEL_NAME: Final = "bench/llama"
PORT: Final = 31330
READY: Final = re.compile(r"\[INFO\] Started$")
INSTALL_TIMEOUT_S: Final = 900.0
_TOOLS: Final = ("setuptools<70", "wheel", "grpcio-tools==1.59.0")
_PACKAGES: Final = (
    *("torch==2.1.2", "transformers==4.34.1", "numpy<2", "accelerate==0.23.0", "huggingface-hub<0.18"),
    *("bitsandbytes==0.41.1", "tensor_parallel==1.0.23", "peft==0.5.0", "pydantic<2", "protobuf<5", "multiaddr==0.0.9"),
    *("speedtest-cli", "humanfriendly", "async-timeout", "cpufeature", "packaging", "safetensors", "Dijkstar"),
    *("sentencepiece", "msgpack", "sortedcontainers", "uvloop", "prefetch_generator", "pymultihash", "cryptography"),
    *("configargparse", "base58", "PyYAML", "scipy"),
)
_CONFIG_KEYS: Final = (
    *("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "vocab_size", "rms_norm_eps", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "initializer_range"),
)


class UnavailableError(Exception):
    """The earlier Petals can't be run here; the text says why."""


def prepare(say: Callable[[str], None]) -> Path:
    """Return the Python of the environment, made if it isn't there.

    Raises:
        UnavailableError: it can't be made.
    """
    python = FOLDER / "environment" / "bin" / "python"
    done = FOLDER / "done"
    if done.exists() and python.exists():
        return python
    base = _find_python()
    say("installing Petals 2.2.0 into an environment of its own (once; several minutes and gigabytes)")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    _run([base, "-m", "venv", str(FOLDER / "environment")])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    _run([*pip, "install", *_TOOLS])
    _run([*pip, "install", *_PACKAGES])
    _run([*pip, "install", "--no-deps", "petals==2.2.0.post1"])
    archives = FOLDER / "archives"
    download = [*pip, "download", "--no-deps", "-d", str(archives)]
    _run([*download, "--no-build-isolation", "--no-binary", ":all:", "hivemind==1.1.10.post2"])
    _run([*download, "hivemind==1.1.12"])
    _place_hivemind(python, archives)
    _run([str(python), "-c", "import petals, hivemind"])
    done.touch()
    return python


def _find_python() -> str:
    """A Python 3.10."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*sorted(map(str, versions.glob("3.10.*/bin/python"))), shutil.which("python3.10")]
    for candidate in candidates:
        probe = [candidate or "", "-c", "import venv"]
        if candidate and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return candidate
    raise UnavailableError("there is no Python 3.10 (looked for python3.10 and among pyenv's versions)")


def _place_hivemind(python: Path, archives: Path) -> None:
    """Copy hivemind's sources into the environment, with its messages compiled and the program that it starts."""
    (packages,) = (python.parent.parent / "lib").glob("python3.10/site-packages")
    (source,) = archives.glob("hivemind-1.1.10.post2.tar.gz")
    (wheel,) = archives.glob("hivemind-1.1.12*.whl")
    shutil.unpack_archive(source, archives / "source")
    (package,) = (archives / "source").glob("*/hivemind")
    target = packages / "hivemind"
    shutil.copytree(package, target)
    program = target / "hivemind_cli" / "p2pd"
    with zipfile.ZipFile(wheel) as file, file.open("hivemind/hivemind_cli/p2pd") as content:
        program.write_bytes(content.read())
    program.chmod(0o755)
    messages = target / "proto"
    command = [str(python), "-m", "grpc_tools.protoc", f"--proto_path={messages}", f"--python_out={messages}"]
    _run([*command, *map(str, messages.glob("*.proto"))])
    for path in messages.glob("*_pb2.py"):
        path.write_text(re.sub(r"^import (\w+_pb2)", r"from . import \1", path.read_text(), flags=re.MULTILINE))


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False, cwd=FOLDER
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"its installation took longer than {INSTALL_TIMEOUT_S:.0f} s") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise UnavailableError(f"it can't be installed: {lines[-1].strip() if lines else command[3:5]}")


def make_hub(model: Path, folder: Path) -> Path:
    """Lay a checkpoint out as an entry of the hub's cache, with a config of that time; returns the cache's folder."""
    config = json.loads((model / "config.json").read_text())
    old = {name: config[name] for name in _CONFIG_KEYS if name in config}
    old |= {"torch_dtype": "float32", "use_cache": True, "rope_theta": 10000.0, "transformers_version": "4.34.1"}
    commit = "0" * 40
    entry = folder / f"models--{MODEL_NAME.replace('/', '--')}"
    snapshot = entry / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    for path in model.glob("*.safetensors*"):
        (snapshot / path.name).symlink_to(path.resolve())
    (snapshot / "config.json").write_text(json.dumps(old))
    return folder


def variables(hub: Path) -> Mapping[str, str]:
    """For processes: no network, no GPU, threads as few as the cores that servers share.

    ``EARLIER_THREADS`` in the environment sets another number of threads; ``default`` leaves it to torch.
    """
    number = os.environ.get("EARLIER_THREADS", "1")
    threads = {} if number == "default" else {"OMP_NUM_THREADS": number}
    return threads | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(hub.parent),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }


def server_command(
    python: Path,
    hub: Path,
    blocks: tuple[int, int],
    initial_peer: str | None,
    *,
    host: str,
    port: int | None,
    identity: Path,
) -> list[str]:
    """A server's command line; without ``port`` one that is free on loopback."""
    address = f"/ip4/{host}/tcp/{_free_port() if port is None else port}"
    swarm = ["--new_swarm"] if initial_peer is None else ["--initial_peers", initial_peer]
    return [
        *(str(python), "-m", "petals.cli.run_server", MODEL_NAME, *swarm),
        *("--block_indices", f"{blocks[0]}:{blocks[1]}", "--torch_dtype", "float32", "--device", "cpu"),
        *("--host_maddrs", address, "--announce_maddrs", address, "--identity_path", str(identity)),
        *("--cache_dir", str(hub), "--attn_cache_tokens", "16384", "--num_handlers", "4", "--throughput", "10"),
        *("--no_auto_relay", "--skip_reachability_check"),
    ]


def address_pattern(host: str) -> re.Pattern[str]:
    """What a server prints of where others find it."""
    return re.compile(rf"/ip4/{re.escape(host)}/tcp/\d+/p2p/\w+")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    print(prepare(lambda text: print(text, file=sys.stderr)))
