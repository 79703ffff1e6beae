from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from petals_dht.overview import ModelOverview, ModelSummary, choose, spans_text, speed_text, strip_of
from petals_dht.testing import FINGERPRINT, make_announcement

MODEL = ModelSummary("test-model", FINGERPRINT, 12, 2e9)


def make_overview(*spans: tuple[int, int, str]) -> ModelOverview:
    servers = [make_announcement(start=start, end=end, state=state) for start, end, state in spans]
    return ModelOverview.of(MODEL, [*servers, make_announcement(num_blocks=13, start=0, end=13)])


def test_coverage_counts_servers_that_take_work() -> None:
    overview = make_overview((2, 5, "online"), (0, 3, "online"), (6, 8, "draining"), (8, 12, "online"))
    assert overview.coverage == (1, 1, 2, 1, 1, 0, 0, 0, 1, 1, 1, 1)
    assert overview.missing == ((5, 8),)
    assert [signed.announcement.start for signed in overview.servers] == [0, 2, 6, 8]
    assert strip_of(overview.coverage) == "11211···1111"
    assert spans_text(overview.missing) == "5:8"
    assert json.loads(json.dumps(overview.to_json()))["missing"] == [[5, 8]]


def test_nobody_serves_anything() -> None:
    assert make_overview().missing == ((0, 12),)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=300), st.integers(1, 64))
def test_the_strip_never_hides_a_gap(coverage: list[int], max_characters: int) -> None:
    strip = strip_of(coverage, max_characters)
    assert len(strip) == min(len(coverage), max_characters)
    assert ("·" in strip) == (0 in coverage)


def test_choosing() -> None:
    one = make_overview()
    other = ModelOverview.of(ModelSummary("test-model-large", "e" * 64, 12, 2e9), [])
    assert choose([one, other], None) == [one, other]
    assert choose([one, other], "test-model") == [one]
    assert choose([one, other], "MODEL") == [one, other]
    assert choose([one, other], "eee") == [other]
    assert choose([one, other], "llama") == []


def test_speeds() -> None:
    assert speed_text(make_announcement().announcement) == ""
    assert speed_text(make_announcement(inference_tokens_per_s=1234.5).announcement) == "1,234"
    assert speed_text(make_announcement(inference_tokens_per_s=1.25).announcement) == "1.2"
