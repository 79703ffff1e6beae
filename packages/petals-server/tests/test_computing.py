"""What a server computes equals what the same blocks compute here."""

from pathlib import Path
from typing import Any

import pytest
import torch

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_core.tensors.codec import Encoding
from petals_core.testing.network import run_clean
from petals_server.config import ServerLimits
from petals_server.testing import Client, random_states, served

TOLERANCE: dict[str, Any] = {"atol": 3e-5, "rtol": 1e-4}


@pytest.fixture(params=["llama", "bloom", "bamba"])
def model(request: pytest.FixtureRequest, checkpoint: Path, bloom: Path, bamba: Path) -> Path:
    return {"llama": checkpoint, "bloom": bloom, "bamba": bamba}[request.param]


def local_span(model: Path) -> Span:
    return load_span(Checkpoint.open(model), 0, 4)


def expected_rows(model: Path, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each row alone through all blocks at once."""
    span = local_span(model)
    with torch.inference_mode():
        return [span(row[None])[0] if len(row) else row for row in rows]


def assert_rows_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for actual_row, expected_row in zip(actual, expected, strict=True):
        tolerance = 1e-5 * max(1.0, float(expected_row.abs().max())) if expected_row.numel() else 0.0
        torch.testing.assert_close(actual_row, expected_row, atol=tolerance, rtol=0.0)


def test_steps_of_a_session_equal_one_forward(model: Path) -> None:
    states = random_states(1, 12)[0]

    async def run() -> list[torch.Tensor]:
        async with served(model) as client:
            session = await client.open()
            assert session.opened.cache_tokens_left == 1000 - 16 - client.server.model.state_tokens
            parts = [await session.step([states[a:b]]) for a, b in ((0, 7), (7, 8), (8, 9), (9, 12))]
            assert session.last_result is not None
            assert session.last_result.compute_us > 0
            return [torch.cat([part[0] for part in parts]), (await client.forward([states]))[0]]

    assert_rows_close(run_clean(run()), expected_rows(model, [states, states]))


def test_rows_of_any_lengths_equal_rows_alone(model: Path) -> None:
    lengths = [(5, 1, 12), (2, 1, 0), (0, 1, 7), (1, 0, 0)]
    rows = [random_states(1, sum(parts), seed)[0] for seed, parts in enumerate(lengths)]

    async def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        async with served(model, limits=ServerLimits(max_turn_tokens=8)) as client:
            session = await client.open(num_rows=4)
            results: list[list[torch.Tensor]] = [[] for _ in rows]
            left = [row.split(list(parts)) for row, parts in zip(rows, lengths, strict=True)]
            for step in range(3):
                for row, result in enumerate(await session.step([parts[step] for parts in left])):
                    results[row].append(result)
            return [torch.cat(result) for result in results], await client.forward(rows)

    stepped, forwarded = run_clean(run())
    assert_rows_close(stepped, expected_rows(model, rows))
    assert_rows_close(forwarded, expected_rows(model, rows))


def test_keep_forgets_what_lies_beyond(model: Path) -> None:
    kept, dropped, new = random_states(1, 6, 0), random_states(1, 5, 1), random_states(1, 3, 2)

    async def run() -> list[torch.Tensor]:
        async with served(model) as client:
            session = await client.open()
            await session.step([torch.cat([kept[0], dropped[0]])])
            after = await session.step([new[0]], keep=6)
            again = await session.step([torch.cat([kept[0], new[0]])], keep=0)
            nothing = await session.step([new[0][:0]], keep=2)
            assert nothing[0].shape == (0, 64)
            last = await session.step([kept[0][2:]], keep=2)
            return [after[0], again[0], last[0]]

    whole = expected_rows(model, [torch.cat([kept[0], new[0]]), kept[0]])
    assert_rows_close(run_clean(run()), [whole[0][6:], whole[0], whole[1][2:]])


def test_keep_in_a_padded_batch_forgets_columns(model: Path) -> None:
    rows = [random_states(1, 5, 0)[0], random_states(1, 2, 1)[0]]
    new = [random_states(1, 1, 2)[0], random_states(1, 1, 3)[0]]

    async def run() -> list[torch.Tensor]:
        async with served(model) as client:
            session = await client.open(num_rows=2)
            await session.step(rows)
            await session.step([torch.cat([row, row]) for row in new])
            return await session.step(new, keep=5)

    whole = expected_rows(model, [torch.cat(pair) for pair in zip(rows, new, strict=True)])
    assert_rows_close(run_clean(run()), [row[-1:] for row in whole])


def test_row_order_lets_rows_continue_others(model: Path) -> None:
    rows = [random_states(1, 4, seed)[0] for seed in range(3)]
    new = [random_states(1, 1, seed)[0] for seed in range(3, 6)]

    async def run() -> list[torch.Tensor]:
        async with served(model) as client:
            session = await client.open(num_rows=3)
            await session.step(rows)
            return await session.step(new, row_order=(2, 0, 0))

    continued = [torch.cat([rows[row], token]) for row, token in zip((2, 0, 0), new, strict=True)]
    assert_rows_close(run_clean(run()), [row[-1:] for row in expected_rows(model, continued)])


def test_positions_may_be_given(checkpoint: Path) -> None:
    states = random_states(1, 6)
    positions = torch.tensor([[3, 4, 5, 0, 1, 9]])

    async def run() -> list[torch.Tensor]:
        async with served(checkpoint) as client:
            session = await client.open()
            first = await session.step([states[0, :4]], position_runs=(((3, 3), (0, 1)),))
            second = await session.step([states[0, 4:]], position_runs=(((1, 1), (9, 1)),))
            forwarded = await client.forward([states[0]], position_runs=(((3, 3), (0, 2), (9, 1)),))
            return [torch.cat([first[0], second[0]]), forwarded[0]]

    with torch.inference_mode():
        span = local_span(checkpoint)
        expected = span(states, attention_mask=torch.ones(1, 6), position_ids=positions)[0]
        usual = span(states)[0]
    assert not torch.allclose(expected, usual, atol=1e-3)
    assert_rows_close(run_clean(run()), [expected, expected])


def test_a_part_of_the_span_can_be_asked_for(model: Path) -> None:
    states = random_states(1, 5)[0]

    async def run() -> list[torch.Tensor]:
        async with served(model, blocks=(1, 4)) as client:
            assert (client.server.model.span.start, client.server.model.span.end) == (1, 4)
            session = await client.open(start=2, end=3)
            stepped = torch.cat([(await session.step([part]))[0] for part in states.split([3, 2])])
            return [stepped, (await client.forward([states], start=2, end=3))[0]]

    part = local_span(model).slice(2, 3)
    with torch.inference_mode():
        expected = part(states[None])[0]
    assert_rows_close(run_clean(run()), [expected, expected])


def test_sessions_that_interleave_do_not_mix(model: Path) -> None:
    rows = [random_states(1, 9, seed)[0] for seed in range(2)]

    async def run() -> list[torch.Tensor]:
        async with served(model) as client:
            sessions = [await client.open(), await client.open()]
            results: list[list[torch.Tensor]] = [[], []]
            for start, end in ((0, 4), (4, 5), (5, 9)):
                for index, session in enumerate(sessions):
                    results[index] += await session.step([rows[index][start:end]])
            return [torch.cat(result) for result in results]

    assert_rows_close(run_clean(run()), expected_rows(model, rows))


def test_a_long_prefill_in_turns_equals_one_in_one_go(model: Path) -> None:
    states = random_states(1, 40)[0]

    async def run(client: Client) -> list[torch.Tensor]:
        return await (await client.open()).step([states])

    async def run_in_turns() -> list[torch.Tensor]:
        async with served(model, limits=ServerLimits(max_turn_tokens=7)) as client:
            return await run(client)

    assert_rows_close(run_clean(run_in_turns()), expected_rows(model, [states]))


def test_replies_are_encoded_like_requests(checkpoint: Path) -> None:
    states = random_states(1, 3)[0]

    async def run() -> None:
        async with served(checkpoint, torch_dtype="bfloat16") as client:
            assert (await client.info()).torch_dtype == "bfloat16"
            session = await client.open()
            exact = (await session.step([states]))[0]
            assert exact.dtype is torch.float32
            assert torch.equal(exact, exact.bfloat16().float())
            assert session.last_result is not None
            assert session.last_result.tensors[0][1:3] == ("float32", "float32")
            lossy = (await session.step([states], keep=0, encoding=Encoding.INT8))[0]
            assert session.last_result.tensors[0][1:3] == ("float32", "int8")
            assert not torch.equal(lossy, exact)
            assert (lossy - exact).abs().mean() < 0.1 * exact.abs().mean()

    run_clean(run())


def test_nan_is_carried_and_stays_in_its_row(checkpoint: Path) -> None:
    states = random_states(2, 3)
    broken = states.clone()
    broken[0, 1, 5] = torch.nan

    async def run() -> list[torch.Tensor]:
        async with served(checkpoint) as client:
            session = await client.open(num_rows=2)
            rows = await session.step(list(broken))
            assert rows[0].isnan().any()
            return [rows[1], *await session.step(list(states), keep=0)]

    whole = expected_rows(checkpoint, list(states))
    assert_rows_close(run_clean(run()), [whole[1], *whole])
