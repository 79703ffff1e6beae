"""Look-ups in the text itself, against a search that is slow and obvious."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_client.speculation.lookup import PromptLookup

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def matching(tokens: list[int], place: int) -> int:
    """How many tokens before ``place`` are those at the end, 16 at most."""
    count = 0
    while count < 16 and count < place and tokens[place - count - 1] == tokens[len(tokens) - count - 1]:
        count += 1
    return count


@given(tokens=TEXTS, num_tokens=st.integers(1, 10))
def test_longest_match_of_the_latest_places(tokens: list[int], num_tokens: int) -> None:
    lookup = PromptLookup(tokens)
    found = lookup.find()
    places = [place for place in range(2, len(tokens)) if matching(tokens, place) >= 2][-8:]
    if not places:
        assert found is None
        return
    best = max(places, key=lambda place: (matching(tokens, place), place))
    assert found == (best, matching(tokens, best))
    whole = list(tokens)
    for index in range(num_tokens):
        whole.append(whole[best + index])
    assert lookup.follow(found, num_tokens) == whole[len(tokens) :]


@given(tokens=TEXTS, cut=st.integers(0, 40))
def test_however_the_text_arrives(tokens: list[int], cut: int) -> None:
    lookup = PromptLookup(tokens[:cut])
    lookup.extend(tokens[cut:])
    assert len(lookup) == len(tokens)
    assert lookup.find() == PromptLookup(tokens).find()


def test_a_phrase_that_repeats_is_drafted_on_and_on() -> None:
    lookup = PromptLookup([7, 1, 2, 3, 1, 2, 3, 1, 2])
    match = lookup.find()
    assert match is not None
    assert lookup.follow(match, 7) == [3, 1, 2, 3, 1, 2, 3]
    assert PromptLookup([1, 2, 3]).find() is None
