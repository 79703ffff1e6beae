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


@given(tokens=TEXTS, max_tokens=st.integers(1, 10))
def test_longest_match_of_the_latest_places(tokens: list[int], max_tokens: int) -> None:
    found = PromptLookup(tokens).find(max_tokens)
    places = [place for place in range(2, len(tokens)) if matching(tokens, place) >= 2][-8:]
    if not places:
        assert found is None
        return
    best = max(places, key=lambda place: (matching(tokens, place), place))
    assert found is not None
    assert found.num_matching == matching(tokens, best)
    whole = list(tokens)
    for index in range(max_tokens):
        whole.append(whole[best + index])
    assert list(found.tokens) == whole[len(tokens) :]


@given(tokens=TEXTS, cut=st.integers(0, 40))
def test_however_the_text_arrives(tokens: list[int], cut: int) -> None:
    lookup = PromptLookup(tokens[:cut])
    lookup.extend(tokens[cut:])
    assert len(lookup) == len(tokens)
    assert lookup.find(5) == PromptLookup(tokens).find(5)


def test_a_phrase_that_repeats_is_drafted_on_and_on() -> None:
    match = PromptLookup([7, 1, 2, 3, 1, 2, 3, 1, 2]).find(7)
    assert match is not None
    assert match.tokens == (3, 1, 2, 3, 1, 2, 3)
    assert PromptLookup([1, 2, 3]).find(4) is None
    assert PromptLookup([1, 2, 1, 2, 1, 2]).find(0) is None
