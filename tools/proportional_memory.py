"""How much memory processes take, shared pages counted in proportion (Linux's PSS)."""

from __future__ import annotations

import re
from pathlib import Path

# What a process that computes ends up with, all of it imported late by the packages themselves.
MODEL_IMPORTS = "from transformers.models.llama.modeling_llama import LlamaForCausalLM"
SERVER_IMPORTS = f"import petals_server.cli, petals_server.server, petals_server.handlers\n{MODEL_IMPORTS}"
CLIENT_IMPORTS = f"import petals_client.auto, petals_client.generation, petals_client.swarm_chain\n{MODEL_IMPORTS}"
_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)
_PARENT = re.compile(r"^PPid:\s+(\d+)$", re.MULTILINE)


def pss_bytes(pid: int | str = "self") -> int:
    """Memory of one process: its private pages, and of each shared page the part that falls to it."""
    found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
    if found is None:
        raise OSError(f"the system does not tell the memory of process {pid}")
    return int(found[1]) * 1024


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            found = _PARENT.search(status.read_text())
        except OSError:  # it has just ended
            continue
        if found is not None:
            parents[int(status.parent.name)] = int(found[1])
    members = [pid]
    for member in members:  # grows while it is walked
        members.extend(child for child, parent in parents.items() if parent == member)
    return members
