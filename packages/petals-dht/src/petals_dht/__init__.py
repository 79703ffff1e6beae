"""The directory of a Petals swarm: a Kademlia DHT of signed, expiring announcements."""
