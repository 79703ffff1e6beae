from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from petals_dht.contacts import Contact, distance
from petals_dht.crawl import Crawl

KEY, OWN = b"k" * 20, b"o" * 20


def make_contact(number: int) -> Contact:
    return Contact(random.Random(number).randbytes(20), "192.0.2.1", number + 1)


def nearest_of(contacts: list[Contact], count: int) -> list[Contact]:
    return sorted(contacts, key=lambda contact: distance(contact.id, KEY))[:count]


@settings(max_examples=60)
@given(st.integers(1, 60), st.sets(st.integers(0, 59)), st.integers(1, 10), st.randoms(use_true_random=False))
def test_finds_the_nearest_that_live(num_nodes: int, dead: set[int], width: int, order: random.Random) -> None:
    contacts = [make_contact(number) for number in range(num_nodes)]
    alive = [contact for number, contact in enumerate(contacts) if number not in dead]
    crawl = Crawl(KEY, contacts[:3], own_id=OWN, width=width, max_asked=1000)
    under_way: list[Contact] = []
    while not crawl.is_done:
        under_way += crawl.take()
        assert len(under_way) == crawl.num_under_way <= max(5, width)
        contact = under_way.pop(order.randrange(len(under_way)))
        if contact in alive:
            crawl.answered(contact, contacts)
        else:
            crawl.failed(contact)
    expected = nearest_of(alive, width) if any(contact in alive for contact in contacts[:3]) else []
    assert crawl.nearest() == expected


def test_a_liar_who_invents_nodes_comes_to_an_end() -> None:
    crawl = Crawl(KEY, [make_contact(0)], own_id=OWN, width=20, max_asked=50)
    num_asked = 0
    while not crawl.is_done:
        for contact in crawl.take():
            num_asked += 1
            nearness = int.from_bytes(KEY, "big") ^ (2**150 >> num_asked)
            crawl.answered(contact, [Contact(nearness.to_bytes(20, "big"), "192.0.2.66", num_asked)])
    assert num_asked == 50


def test_a_false_address_does_not_hide_the_true_one() -> None:
    true = make_contact(1)
    false = Contact(true.id, "192.0.2.66", 6)
    crawl = Crawl(KEY, [make_contact(0)], own_id=OWN, width=5)
    (first,) = crawl.take()
    crawl.answered(first, [false, true])
    assert set(crawl.take()) == {false, true}
    crawl.failed(false)
    crawl.answered(true, [])
    assert crawl.is_done
    assert set(crawl.nearest()) == {first, true}


def test_a_node_at_two_addresses_counts_once() -> None:
    one, other = make_contact(1), Contact(make_contact(1).id, "2001:db8::1", 2)
    crawl = Crawl(KEY, [one, other], own_id=OWN, width=5)
    for contact in crawl.take():
        crawl.answered(contact, [])
    assert len(crawl.nearest()) == 1


def test_we_never_ask_ourselves() -> None:
    crawl = Crawl(KEY, [Contact(OWN, "192.0.2.1", 1)], own_id=OWN, width=5)
    assert crawl.is_done
    assert crawl.take() == []


def test_who_takes_long_holds_up_nobody_and_may_answer_yet() -> None:
    contacts = nearest_of([make_contact(number) for number in range(12)], 12)
    crawl = Crawl(KEY, contacts, own_id=OWN, width=12)
    slow = crawl.take()
    assert slow == contacts[:5]
    assert not crawl.take()
    for contact in slow[:2]:
        crawl.stalled(contact)
    assert crawl.take() == contacts[5:7]
    crawl.answered(slow[0], [])
    for contact in crawl.take() + contacts[1:7]:
        crawl.answered(contact, [])
    assert crawl.is_done
    assert crawl.nearest() == contacts


def test_a_search_comes_through_when_half_of_a_thousand_nodes_have_left() -> None:
    random_ = random.Random(0)
    contacts = [make_contact(number) for number in range(1000)]
    living = set(random_.sample(contacts, 500))

    def table(own: Contact) -> list[Contact]:
        """What a node knows: up to 20 contacts at each order of distance, the dead ones too."""
        buckets: dict[int, list[Contact]] = {}
        for contact in random_.sample(contacts, 1000):
            if contact != own:
                buckets.setdefault(distance(own.id, contact.id).bit_length(), []).append(contact)
        return [contact for bucket in buckets.values() for contact in bucket[:20]]

    for _ in range(10):
        seeds = nearest_of(table(random_.choice(sorted(living, key=lambda contact: contact.id))), 20)
        crawl = Crawl(KEY, seeds, own_id=OWN, width=20)
        silent: list[Contact] = []
        while not crawl.is_done:
            taken = crawl.take()
            for contact in taken:
                if contact in living:
                    crawl.answered(contact, nearest_of(table(contact), 20))
                else:
                    crawl.stalled(contact)
                    silent.append(contact)
            for contact in [] if taken else silent:
                crawl.failed(contact)
            silent = silent if taken else []
        # Those that were nearest before keep what is looked for; some of them do not know all of each other.
        keepers = living & set(nearest_of(contacts, 20))
        assert len(keepers & set(crawl.nearest())) >= len(keepers) / 2
