"""Run large language models together: Transformers' own classes, whose blocks are computed by a swarm.

>>> import petals_client
>>> with petals_client.connect("petals-team/demo", initial_peers=["192.0.2.1:31330"]) as client:
...     print(client.generate("Once upon a time", max_new_tokens=20))

or, as with Transformers:

>>> from petals_client import AutoDistributedModelForCausalLM
>>> model = AutoDistributedModelForCausalLM.from_pretrained("petals-team/demo", initial_peers=["192.0.2.1:31330"])
>>> model.generate(inputs, max_new_tokens=20)

Names are imported when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petals_client.auto import (
        AutoDistributedConfig,
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from petals_client.client import AsyncClient, Client, connect, connect_async
    from petals_client.inference_session import InferenceSession
    from petals_client.options import ClientOptions
    from petals_client.remote_sequential import RemoteSequential
    from petals_client.trace import format_trace

__all__ = [
    "AsyncClient",
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "Client",
    "ClientOptions",
    "InferenceSession",
    "RemoteSequential",
    "connect",
    "connect_async",
    "format_trace",
]

_MODULES = {
    "AsyncClient": "client",
    "AutoDistributedConfig": "auto",
    "AutoDistributedModel": "auto",
    "AutoDistributedModelForCausalLM": "auto",
    "AutoDistributedModelForSequenceClassification": "auto",
    "Client": "client",
    "ClientOptions": "options",
    "InferenceSession": "inference_session",
    "RemoteSequential": "remote_sequential",
    "connect": "client",
    "connect_async": "client",
    "format_trace": "trace",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"petals_client.{_MODULES[name]}"), name)
    elif name.startswith("Distributed"):
        families = import_module("petals_client.auto").FAMILY_CLASSES
        if name not in families:
            raise AttributeError(f"module 'petals_client' has no attribute {name!r}; there are {', '.join(families)}")
        value = families[name]
    else:
        raise AttributeError(f"module 'petals_client' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *globals()])
