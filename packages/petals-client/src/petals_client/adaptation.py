"""What changes the blocks for a request: an adapter that servers have loaded, and matrices of the client's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from petals_core.adapter_names import find_meant
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import MissingAdapterError
from petals_core.identity import PeerId

if TYPE_CHECKING:
    from torch import Tensor

    from petals_core.models.low_rank import LoraLayout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TunedValues:
    """The client's own low-rank matrices as they are at one moment."""

    layout: LoraLayout
    """Of all blocks of the model."""
    values: Tensor
    """[V] on the CPU; nobody changes it."""
    values_id: bytes
    """A hash of layout and values, so that equal names mean equal values."""
    owner: object
    """Whose values they are: those of one owner take each other's place on servers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adaptation:
    """What changes the blocks."""

    adapter: str | None = None
    """A loaded adapter, as the user calls it."""
    tuned: TunedValues | None = None


def choose_servers(servers: Mapping[PeerId, SignedAnnouncement], adapter: str) -> dict[PeerId, SignedAnnouncement]:
    """Those servers that have an adapter, and all the same one.

    Raises:
        MissingAdapterError: several different adapters are called so.
    """
    meant = find_meant(adapter, (name for each in servers.values() for name in each.announcement.adapters))
    if len(meant) > 1:
        raise MissingAdapterError(
            f"servers have different adapters called {adapter}: choose one of {', '.join(meant)} by its whole name"
        )
    return {peer_id: each for peer_id, each in servers.items() if set(meant) & set(each.announcement.adapters)}


def whole_name(adapter: str, server: SignedAnnouncement) -> str:
    """What a server calls an adapter; raises ``MissingAdapterError`` if it does not have it."""
    meant = find_meant(adapter, server.announcement.adapters)
    if not meant:
        raise MissingAdapterError(f"the server does not announce the adapter {adapter}")
    return meant[0]


def explain_missing_adapter(
    servers: Iterable[SignedAnnouncement], adapter: str, blocks: str, model_name: str
) -> MissingAdapterError:
    """Say which servers have which adapters, where not all blocks have the wanted one."""
    holders = [
        f"{each.peer_id.short} ({each.announcement.start}:{each.announcement.end}): "
        f"{', '.join(each.announcement.adapters) or 'none'}"
        for each in sorted(servers, key=lambda each: (each.announcement.start, each.announcement.end))
    ]
    shown = "; ".join(holders[:12]) + ("; ..." if len(holders) > 12 else "")
    return MissingAdapterError(
        f"no server has the adapter {adapter} for {blocks} of {model_name}; servers and their adapters: {shown}. "
        "Start one with petals-server serve --adapters, or choose another adapter"
    )
