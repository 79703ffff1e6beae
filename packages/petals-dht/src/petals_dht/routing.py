"""The routing table of the ``kademlia`` package (2.2.3), with its faults repaired."""

from __future__ import annotations

import heapq

from kademlia.routing import RoutingTable as PackageRoutingTable

from petals_dht.contacts import Contact, distance


class RoutingTable(PackageRoutingTable):
    """Buckets of contacts that have answered.

    Differences to the package: an id at a bucket's midpoint has one bucket, not two; ``nearest`` is exact; adding a
    contact never sends anything by itself.
    """

    def __init__(self, own: Contact, bucket_size: int) -> None:
        super().__init__(None, bucket_size, own)

    def get_bucket_for(self, node: Contact) -> int:
        """Index of the bucket whose range, ends included, holds the contact's id.

        The package compares with ``<`` although its ranges include their upper end, so that an id at a midpoint goes
        into one bucket on a split and into the next one when it is looked for.
        """
        return next(index for index, bucket in enumerate(self.buckets) if node.long_id <= bucket.range[1])

    def get(self, contact_id: bytes) -> Contact | None:
        """The contact with that id, if it is in use (and not only a replacement)."""
        probe = Contact(contact_id, "", 0)
        found: Contact | None = self.buckets[self.get_bucket_for(probe)][contact_id]
        return found

    def knows(self, contact: Contact) -> bool:
        """Whether the contact is in use or a replacement, at the same address."""
        bucket = self.buckets[self.get_bucket_for(contact)]
        return contact in (bucket[contact.id], bucket.replacement_nodes.get(contact.id))

    def add(self, contact: Contact) -> Contact | None:
        """Add a contact that has answered, or note that it was seen.

        Returns the contact that has been silent for longest in a bucket that is full: if it is pinged and does not
        answer, ``remove`` lets the newcomer take its place (section 4.1 of the paper).
        """
        while True:
            index = self.get_bucket_for(contact)
            bucket = self.buckets[index]
            if bucket.add_node(contact):
                return None
            # Section 4.2: split where this node itself lies, and elsewhere a little, to make the tree less unbalanced.
            if not bucket.has_in_range(self.node) and bucket.depth() % 5 == 0:
                silent: Contact = bucket.head()
                return silent
            self.split_bucket(index)

    def remove(self, contact: Contact) -> None:
        """Forget a contact that does not answer; nothing happens if its id is known at another address by now."""
        if self.get(contact.id) in (contact, None):
            self.remove_contact(contact)

    def nearest(self, key: bytes, count: int, *, without: bytes | None = None) -> list[Contact]:
        """Exactly the ``count`` contacts that are nearest to ``key``, the nearest first."""
        probe = Contact(key, "", 0)
        self.buckets[self.get_bucket_for(probe)].touch_last_updated()
        candidates = (contact for contact in self.contacts() if contact.id != without)
        return heapq.nsmallest(count, candidates, key=lambda contact: distance(contact.id, key))

    def contacts(self) -> list[Contact]:
        """All contacts in use."""
        return [contact for bucket in self.buckets for contact in bucket.nodes.values()]

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)
