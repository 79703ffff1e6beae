"""The directory of a Petals swarm: a Kademlia DHT of signed, expiring announcements."""

from petals_dht.directory import Directory, ModelSummary, Reachability
from petals_dht.node import Node

__all__ = ["Directory", "ModelSummary", "Node", "Reachability"]
