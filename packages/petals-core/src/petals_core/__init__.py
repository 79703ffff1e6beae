"""What every member of a Petals swarm shares: identity, wire protocol, tensor codec and model splitting."""
