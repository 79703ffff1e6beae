from pathlib import Path

import pytest
import torch

from petals_core.errors import NotEnoughMemoryError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_server import memory, threads
from petals_server.scheduling.request import Urgency


def test_blocks_are_counted_with_room_for_the_cache() -> None:
    assert memory.count_blocks_that_fit(100, 1000) == 7
    assert memory.count_blocks_that_fit(1001, 1000) == 0


def test_blocks_that_do_not_fit_are_refused_with_advice() -> None:
    memory.check_fits(10, 100, 1000)
    with pytest.raises(NotEnoughMemoryError, match="serve at most 10 with --num-blocks"):
        memory.check_fits(11, 100, 1000)


def test_free_memory_leaves_headroom() -> None:
    assert memory.free_bytes(torch.device("cpu")) >= 0


def test_the_size_of_a_token_is_measured(checkpoint: Path) -> None:
    span = load_span(Checkpoint.open(checkpoint), 0, 4)
    # Keys and values of 2 heads of 16 in float32, in 4 blocks.
    assert memory.measure_cache_cost(span) == memory.CacheCost(token_bytes=2 * 2 * 16 * 4 * 4, state_tokens=0)
    assert memory.choose_cache_tokens(1024, 1 << 20) == 512
    assert memory.choose_cache_tokens(1 << 30, 1 << 20) == 1


def test_recurrent_states_are_counted_as_tokens(bamba: Path) -> None:
    span = load_span(Checkpoint.open(bamba), 0, 4)
    # One block with keys and values; inputs of width 64. Three with a state [4, 32, 8] and a convolution's [144, 4].
    token_bytes = 2 * 2 * 16 * 4 + 64 * 4
    state_bytes = 2 * 3 * (4 * 32 * 8 + 144 * 4) * 4
    assert memory.measure_cache_cost(span) == memory.CacheCost(
        token_bytes=token_bytes, state_tokens=-(-state_bytes // token_bytes)
    )


def test_models_without_fused_attention_take_memory_per_pair_and_head(checkpoint: Path, bloom: Path) -> None:
    fused, eager = (load_span(Checkpoint.open(model), 0, 1) for model in (checkpoint, bloom))
    assert memory.choose_max_scores(fused, 1 << 20) == (1 << 20) // 8 // 4
    assert memory.choose_max_scores(eager, 1 << 20) == (1 << 20) // 8 // (12 * 4)


def test_threads_are_measured_and_set(checkpoint: Path) -> None:
    before = torch.get_num_threads()
    span = load_span(Checkpoint.open(checkpoint), 0, 1)
    try:
        plan = threads.measure(span)
        assert plan.decode in threads.candidates()
        assert plan.bulk in threads.candidates()
        assert plan.bulk_tokens_per_s > 0
        assert threads.measure(span, num_threads=1).bulk == 1
        plan.apply(Urgency.BULK)
        assert torch.get_num_threads() == plan.bulk
    finally:
        torch.set_num_threads(before)
