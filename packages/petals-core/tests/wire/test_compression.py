"""What is compressed arrives earlier, by what was measured; a token never waits for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_core.wire.compression import MIN_BYTES, Compression, quantized_arrives_first
from petals_core.wire.link_rate import LinkRate

SIZES = st.integers(1, 1 << 26)
RATES = st.floats(1e3, 1e11)


@given(
    num_bytes=SIZES, rate=RATES, share=st.floats(0.01, 1.1), price_s=st.floats(1e-10, 1e-7), tries=st.integers(30, 60)
)
def test_only_what_arrives_earlier(num_bytes: int, rate: float, share: float, price_s: float, tries: int) -> None:
    compression = Compression("auto")
    for _ in range(tries):
        compression.note("Step 0", "float32", 1_000_000, int(share * 1_000_000), price_s * 1_000_000)
    wants = compression.wants("Step 0", "float32", num_bytes, rate)
    raw_s = num_bytes / rate
    packed_s = share * raw_s + 1.7 * price_s * num_bytes
    if num_bytes < MIN_BYTES:
        assert not wants
    elif abs(packed_s - raw_s) > 0.01 * raw_s:  # what was measured has not quite converged
        assert wants == (packed_s < raw_s)


@given(num_bytes=SIZES)
def test_fixed_choices_and_unknown_links(num_bytes: int) -> None:
    assert not Compression("auto").wants("Step 0", "float32", num_bytes, None)
    assert not Compression("none").wants("Step 0", "float32", num_bytes, 1.0)
    assert Compression("zstd").wants("Step 0", "float32", num_bytes, None) == (num_bytes >= MIN_BYTES)


def test_kinds_are_learned_apart() -> None:
    compression = Compression("auto")
    for _ in range(30):
        compression.note("Backward 1", "float32", 1000, 1000, 1e-6)
        compression.note("Step 0", "float32", 1000, 500, 1e-6)
    assert compression.wants("Step 0", "float32", 1 << 20, 1e6)
    assert not compression.wants("Backward 1", "float32", 1 << 20, 1e6)


def test_what_is_sent_raw_is_looked_at_now_and_then() -> None:
    compression = Compression("auto")
    assert sum(compression.wants_sample("Step 0", "float32", 1 << 20, 1e6) for _ in range(64)) == 4
    assert not any(compression.wants_sample("Step 0", "float32", 1 << 20, 1e10) for _ in range(64))
    assert not any(compression.wants_sample("Step 0", "float32", MIN_BYTES - 1, 1e6) for _ in range(64))


@given(num_elements=st.integers(1, 1 << 24), item_bytes=st.sampled_from([2, 4]), rate=RATES)
def test_quantized_only_where_it_arrives_earlier(num_elements: int, item_bytes: int, rate: float) -> None:
    if quantized_arrives_first(num_elements, item_bytes, rate):
        assert num_elements * item_bytes / rate > num_elements / rate + 1e-4
    assert quantized_arrives_first(num_elements, item_bytes, None)
    assert not quantized_arrives_first(4096, item_bytes, 1e9), "a token on a quick link"
    assert quantized_arrives_first(4096, item_bytes, 2.5e6), "a token on a slow one"


@given(rates=st.lists(st.floats(1.0, 1e9), min_size=1, max_size=20))
def test_a_rate_is_that_of_the_last_measurements_together(rates: list[float]) -> None:
    link = LinkRate()
    assert link.bytes_per_s is None
    link.note(1000, 1.0)
    assert link.bytes_per_s is None, "so few bytes say nothing"
    for rate in rates:
        link.note(1 << 20, (1 << 20) / rate)
    assert link.bytes_per_s is not None
    together = len(rates[-8:]) / sum(1 / rate for rate in rates[-8:])
    assert abs(link.bytes_per_s / together - 1) < 1e-6
